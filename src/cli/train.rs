//! `ldm train`: autoencoders and diffusion models.

use super::{DeviceFlags, print};
use crate::error::{Error, Result};
use crate::exec::{Device, peak};
use crate::train::{Kind, Settings, Standing, Watch, run as train};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// What to train.
#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// An autoencoder, KL or VQ: pictures to latents and back
    #[command(mut_arg("first_stage", |a| a.hide(true)))]
    Autoencoder(Flags),
    /// A UNet with its text encoder or table of classes, or without a condition, on the latents of an autoencoder
    Diffusion(Flags),
}

/// Flags are those of diffusers' training scripts where these have one.
#[derive(Args, Debug)]
struct Flags {
    /// Where the run goes: checkpoints, metrics, pictures, export
    #[arg(short, long, alias = "output-dir", value_name = "RUN")]
    output: PathBuf,
    /// Settings (TOML, or the run.json of another run); README lists the keys
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Go on from the last checkpoint in RUN, if there is one
    #[arg(long)]
    resume: bool,
    /// Pictures: `shapes`, or a folder [data.source]
    #[arg(long, alias = "train-data-dir", value_name = "shapes|FOLDER")]
    data: Option<String>,
    /// Side of the pictures [data.size]
    #[arg(long, alias = "resolution", value_name = "PIXELS")]
    size: Option<usize>,
    /// The trained autoencoder of a diffusion model [first_stage.path]
    #[arg(long, alias = "vae", value_name = "MODEL")]
    first_stage: Option<String>,
    /// Length of the run [steps]
    #[arg(long, alias = "max-train-steps", value_name = "N")]
    steps: Option<usize>,
    /// Pictures of a batch [batch_size]
    #[arg(long, alias = "train-batch-size", value_name = "N")]
    batch_size: Option<usize>,
    /// Batches of a step, whose gradients are added up [accumulate]
    #[arg(long, alias = "gradient-accumulation-steps", value_name = "N")]
    accumulate: Option<usize>,
    /// Learning rate [optimiser.rate]
    #[arg(long, value_name = "X")]
    learning_rate: Option<f64>,
    /// Of everything random [seed]
    #[arg(short, long, value_name = "N")]
    seed: Option<u32>,
    /// Say nothing but warnings and errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    device: DeviceFlags,
    /// Any setting, such as optimiser.rate=2e-4 or model.block_out_channels=[32,64]; overrules flags and file
    #[arg(value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

pub(super) fn run(a: Arguments) -> Result<ExitCode> {
    let (kind, a) = match a.what {
        What::Autoencoder(a) => (Kind::Autoencoder, a),
        What::Diffusion(a) => (Kind::Diffusion, a),
    };
    let (value, file) = settings(&a)?;
    let settings = Settings::read(kind, value, file)?;
    let device = a.device.open()?;
    let mut bar = Bar::new(a.quiet);
    bar.say(&format!("{}, {}", device.describe(), settings.dtype));
    let summary = train(&settings, &a.output, a.resume, &device, &mut bar)?;
    bar.finish();
    if summary.loss.is_none() {
        bar.say("nothing was left to do; steps=N makes the run longer");
    }
    if let (Device::Cpu, Some(peak)) = (&device, peak()) {
        bar.say(&format!("memory: {peak} bytes at the peak, {} planned", summary.planned));
    }
    for path in [Some(&summary.export), summary.single.as_ref()].into_iter().flatten() {
        print(&format!("{}\n", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// File, then flags, then single settings; and the name that errors give the whole.
fn settings(a: &Flags) -> Result<(Value, PathBuf)> {
    let old = a.output.join("run.json");
    let file = a.config.clone().or_else(|| (a.resume && old.is_file()).then_some(old));
    let mut all = match &file {
        Some(file) => read(file)?,
        None => json!({}),
    };
    let flags = [
        ("data.source", a.data.as_ref().map(|v| json!(v))),
        ("data.size", a.size.map(|v| json!(v))),
        ("first_stage.path", a.first_stage.as_ref().map(|v| json!(v))),
        ("steps", a.steps.map(|v| json!(v))),
        ("batch_size", a.batch_size.map(|v| json!(v))),
        ("accumulate", a.accumulate.map(|v| json!(v))),
        ("optimiser.rate", a.learning_rate.map(|v| json!(v))),
        ("seed", a.seed.map(|v| json!(v))),
        ("dtype", a.device.dtype.as_ref().map(|v| json!(v))),
    ];
    for (key, value) in flags.into_iter().filter_map(|(key, value)| Some((key, value?))) {
        set(&mut all, key, value)?;
    }
    for setting in &a.settings {
        let Some((key, value)) = setting.split_once('=') else {
            return Err(Error::invalid(format!(
                "want KEY=VALUE, such as optimiser.rate=2e-4; got `{setting}`"
            )));
        };
        set(&mut all, key.trim(), literal(value.trim()))?;
    }
    Ok((all, file.unwrap_or_else(|| "settings".into())))
}

fn read(file: &Path) -> Result<Value> {
    let invalid = |what: String| Error::invalid(format!("{}: {what}", file.display()));
    let text = fs::read_to_string(file).map_err(|e| invalid(format!("cannot be read: {e}")))?;
    if file.extension().is_some_and(|e| e == "json") {
        return serde_json::from_str(&text).map_err(|e| invalid(format!("not JSON: {e}")));
    }
    let table: toml::Table = text.parse().map_err(|e| invalid(format!("not TOML: {e}")))?;
    serde_json::to_value(table).map_err(|e| invalid(e.to_string()))
}

/// A value as TOML has it; a text that is none stands for itself.
fn literal(text: &str) -> Value {
    let table = format!("v = {text}").parse::<toml::Table>().ok();
    let value = table.filter(|t| t.len() == 1).and_then(|mut t| t.remove("v"));
    value.and_then(|v| serde_json::to_value(v).ok()).unwrap_or_else(|| json!(text))
}

/// Sets a dotted key.
fn set(all: &mut Value, key: &str, value: Value) -> Result<()> {
    let mut at = all;
    let parts: Vec<&str> = key.split('.').collect();
    for (i, part) in parts.iter().enumerate() {
        let Some(table) = at.as_object_mut() else {
            let above = parts[..i].join(".");
            return Err(Error::invalid(format!("{key}: `{above}` is a value, not a section")));
        };
        if i + 1 == parts.len() {
            table.insert((*part).into(), value);
            return Ok(());
        }
        at = table.entry(*part).or_insert_with(|| Value::Object(Map::new()));
    }
    Ok(())
}

/// Four digits, at any size.
fn short(v: f64) -> String {
    if v == 0.0 || (1e-3..1e4).contains(&v.abs()) { format!("{v:.4}") } else { format!("{v:.3e}") }
}

/// A bar on a terminal, a line from time to time otherwise.
struct Bar {
    quiet: bool,
    terminal: bool,
    bar: Option<ProgressBar>,
    printed: Option<Instant>,
}

impl Bar {
    fn new(quiet: bool) -> Bar {
        Bar { quiet, terminal: std::io::stderr().is_terminal(), bar: None, printed: None }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}

impl Watch for Bar {
    fn step(&mut self, s: &Standing) -> Result<()> {
        if self.quiet {
            return Ok(());
        }
        let left = s.seconds * (s.of - s.step) as f64;
        let parts: String = s.parts.iter().map(|(name, v)| format!("{name} {}, ", short(*v))).collect();
        let line = format!(
            "loss {:.4}, {parts}norm {:.3}, rate {:.2e}, {:.3} s/step, {left:.0} s left, {:.0} % waiting for data",
            s.loss,
            s.norm,
            s.rate,
            s.seconds,
            100.0 * s.waited
        );
        if self.terminal {
            let bar = self.bar.get_or_insert_with(|| {
                let style = ProgressStyle::with_template("{bar:20} {pos}/{len} {msg}");
                ProgressBar::new(s.of as u64)
                    .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
            });
            bar.set_position(s.step as u64);
            bar.set_message(line);
        } else if s.step == s.of || self.printed.is_none_or(|t| t.elapsed().as_secs() >= 10) {
            eprintln!("step {}/{}: {line}", s.step, s.of);
            self.printed = Some(Instant::now());
        }
        Ok(())
    }

    fn say(&mut self, what: &str) {
        match &self.bar {
            _ if self.quiet => {}
            Some(bar) => bar.println(what),
            None => eprintln!("{what}"),
        }
    }
}
