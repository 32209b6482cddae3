//! `ldm verify`: ours against tensors recorded from diffusers.

use super::{DeviceFlags, PredictionFlag, check_output, print};
use crate::error::{Error, Result};
use crate::io::ModelFolder;
use crate::pipeline::verify::{Line, Options, Report, save, verify};
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;

/// What to compare, and where the result goes.
#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// A checkpoint: a diffusers folder (with model_index.json), or one .safetensors file with a whole model
    #[arg(short, long, value_name = "MODEL")]
    model: PathBuf,
    #[command(flatten)]
    predicts: PredictionFlag,
    /// Tensors recorded from diffusers: single parts, or a whole pipeline step by step
    #[arg(long, value_name = "FILE")]
    reference: PathBuf,
    /// Only this part of a file of parts: unet, vae, vq or text (may be repeated)
    #[arg(long, value_name = "NAME")]
    part: Vec<String>,
    /// Write our tensors here, under the same names
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceFlags,
}

pub(super) fn run(a: Arguments) -> Result<ExitCode> {
    if let Some(path) = &a.save {
        check_output(path)?;
    }
    if !a.reference.is_file() {
        let path = a.reference.display();
        return Err(Error::invalid(format!(
            "{path}: want a file of recorded tensors (--reference); there is none here"
        )));
    }
    let options = Options { dtype: a.device.dtype()?, parts: a.part.clone() };
    let device = a.device.open()?;
    let report =
        verify(&ModelFolder::open_as(&a.model, a.predicts.prediction)?, &a.reference, &device, &options)?;
    if let Some(path) = &a.save {
        save(&report, path)?;
    }
    let text = if a.json { format!("{:#}\n", as_json(&report)) } else { as_table(&report) };
    print(&text)?;
    Ok(if report.first_failure().is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn as_table(report: &Report) -> String {
    let mut text =
        format!("{:24} {:>10} {:>10} {:>10} {:>8}\n", "tensor", "relative", "bound", "largest", "PSNR dB");
    for l in &report.lines {
        let bound = l.bound.map_or("-".into(), |b| format!("{b:.3e}"));
        let psnr = l.psnr.map_or(String::new(), |p| format!("{p:.1}"));
        let mark = if l.failed.is_some() { "  DIVERGES" } else { "" };
        let row = format!("{:24} {:>10.3e} {bound:>10} {:>10.3e} {psnr:>8}", l.name, l.relative, l.largest);
        text += &format!("{}{mark}\n", row.trim_end());
    }
    if !report.left_out.is_empty() {
        text += &format!("not asked for: {}\n", report.left_out.join(", "));
    }
    let judged = report.lines.iter().filter(|l| l.bound.is_some()).count();
    text += &match report.first_failure() {
        Some(Line { name, failed: Some(why), .. }) => format!("DIVERGES: the first is {name}: {why}\n"),
        _ => format!("ok: {} tensors, {judged} with a bound\n", report.lines.len()),
    };
    text
}

fn as_json(report: &Report) -> Value {
    let line = |l: &Line| {
        json!({
            "name": l.name, "relative": l.relative, "bound": l.bound, "largest": l.largest,
            "psnr": l.psnr, "failed": l.failed,
        })
    };
    json!({
        "ok": report.first_failure().is_none(),
        "first_divergence": report.first_failure().map(|l| &l.name),
        "tensors": report.lines.iter().map(line).collect::<Vec<_>>(),
        "not_asked_for": report.left_out,
    })
}
