//! What a run is told: every key is read and checked here, before anything is loaded.
//!
//! Sections of models hold diffusers' own keys, so that what a run exports says the same as what it was told.

mod autoencoder;
mod condition;
mod diffusion;

pub use condition::{Conditioned, GivenEncoder, TextKind};

use super::frozen::FirstStage;
use super::{Concatenated, FirstStageLoss, Objective, Optimiser, Schedule};
use crate::data::transform::{Crop, Filter, Transform};
use crate::error::{Error, Result};
use crate::io::Config;
use crate::io::compvis::Names;
use crate::models::UNet2DCondition;
use crate::ops::Distance;
use crate::pipeline::Vae;
use crate::samplers::ScheduleConfig;
use crate::tensor::DType;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// What is trained.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// An autoencoder, KL- or VQ-regularised.
    Autoencoder,
    /// A UNet with what makes its context, if it has one.
    Diffusion,
}

/// Where pictures come from.
#[derive(Clone, PartialEq, Debug)]
pub struct DataSettings {
    /// A folder; `None` for scenes of the shapes world.
    pub folder: Option<PathBuf>,
    /// Side of the pictures, in pixels.
    pub size: usize,
    /// Scenes of the shapes world that make an epoch; 0 for new ones without end.
    pub count: u64,
    /// Objects in each scene; `None` for one or two.
    pub objects: Option<usize>,
    /// Of the scenes.
    pub seed: u64,
    /// What is done to the pictures of a folder.
    pub transform: Transform,
    /// Threads that make batches; 0 for as many as there are cores.
    pub threads: usize,
}

impl DataSettings {
    /// Whether a picture is the same each time it is asked for, and there is an end: then latents can be kept.
    pub fn is_fixed(&self) -> bool {
        let chance = self.transform.flip || matches!(self.transform.crop, Crop::Random | Crop::Part(_));
        if self.folder.is_some() { !chance } else { self.count > 0 }
    }
}

/// The parts of a diffusion run.
#[derive(Clone, Debug)]
pub struct DiffusionSettings {
    /// The UNet.
    pub unet: UNet2DCondition,
    /// Its `config.json`.
    pub unet_config: Value,
    /// What the model is conditioned on.
    pub condition: Conditioned,
    /// What stands beside the noisy latents in its input, if anything.
    pub concat: Option<Concatenated>,
    /// Where latents come from.
    pub first: FirstStage,
    /// Whether the latents of all pictures are computed once and kept in a file.
    pub cache: bool,
    /// The noise schedule.
    pub schedule: ScheduleConfig,
    /// Its `scheduler_config.json`.
    pub schedule_config: Value,
    /// Loss and noise.
    pub objective: Objective,
    /// Share of the captions, or classes, that are left out.
    pub drop: f64,
}

/// The parts of an autoencoder run.
#[derive(Clone, Debug)]
pub struct AutoencoderSettings {
    /// The model.
    pub model: Vae,
    /// Its `config.json`.
    pub config: Value,
    /// Deviation of the draws at the start; `None` for what the layer before them starts with, about 1.
    pub initial_deviation: Option<f64>,
    /// What it is trained for.
    pub loss: FirstStageLoss,
    /// The file with the weights of its perceptual term.
    pub lpips: Option<PathBuf>,
}

/// What is particular to the kind.
#[derive(Clone, Debug)]
pub enum Parts {
    /// Of an autoencoder.
    Autoencoder(Box<AutoencoderSettings>),
    /// Of a diffusion model.
    Diffusion(Box<DiffusionSettings>),
}

/// Pictures that show how far a run is.
#[derive(Clone, PartialEq, Debug)]
pub struct SampleSettings {
    /// Steps from one grid to the next; 0 for none.
    pub every: usize,
    /// Prompts of a grid, or classes; where there are none, some are chosen.
    pub prompts: Vec<String>,
    /// Pictures of a grid of reconstructions.
    pub count: usize,
    /// Steps of the sampler.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Of everything random.
    pub seed: u64,
    /// Length of the run.
    pub steps: usize,
    /// Pictures of a batch; a step has `optimiser.accumulate` of them.
    pub batch: usize,
    /// What models compute in; weights and moments are f32 always.
    pub dtype: DType,
    /// Blocks are made again in the backward pass, in place of being kept.
    pub recompute: bool,
    /// Pictures.
    pub data: DataSettings,
    /// How weights follow their gradients.
    pub optimiser: Optimiser,
    /// The learning rate.
    pub rate: f64,
    /// Its course.
    pub schedule: Schedule,
    /// What the average of the weights keeps of itself; `None` where there is none.
    pub average: Option<f64>,
    /// Steps from one checkpoint to the next.
    pub checkpoint_every: usize,
    /// Checkpoints that stay, beside the best.
    pub newest: usize,
    /// Steps from one line of metrics to the next.
    pub log_every: usize,
    /// Pictures on the way.
    pub sample: SampleSettings,
    /// Type of the exported weights.
    pub export: DType,
    /// Whether the export is written as one file too, beside its folder.
    pub single_file: bool,
    /// The rest.
    pub parts: Parts,
    /// All that the run was told, as it is stored beside it.
    pub value: Value,
}

const KEYS: &[&str] = &[
    "seed",
    "steps",
    "batch_size",
    "accumulate",
    "dtype",
    "recompute",
    "log_every",
    "data",
    "model",
    "loss",
    "optimiser",
    "average",
    "checkpoint",
    "sample",
    "export",
];

/// A section, empty where it is absent.
fn section(c: &Config, key: &str, known: &[&str]) -> Result<Config> {
    let found = match c.section(key)? {
        Some(found) => found,
        None => Config::from_value(c.file(), json!({}))?,
    };
    found.only(known)?;
    Ok(found)
}

fn within(c: &Config, key: &str, default: f64, low: f64, high: f64) -> Result<f64> {
    let v = c.f64_or(key, default)?;
    if (low..=high).contains(&v) {
        Ok(v)
    } else {
        Err(c.error(key, format!("a number from {low} to {high}")))
    }
}

fn at_least_one(c: &Config, key: &str, default: usize) -> Result<usize> {
    let n = c.usize_or(key, default)?;
    if n > 0 { Ok(n) } else { Err(c.error(key, "at least 1")) }
}

fn dtype(c: &Config, key: &str) -> Result<DType> {
    match c.one_of(key, &["f32", "bf16", "f16"], "f32")? {
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        _ => Ok(DType::F32),
    }
}

fn data(c: &Config) -> Result<DataSettings> {
    let keys = ["source", "size", "count", "objects", "seed", "crop", "flip", "threads"];
    let d = section(c, "data", &keys)?;
    let source = d.str_or("source", "shapes")?;
    let size = at_least_one(&d, "size", 64)?;
    let crop = d.one_of("crop", &["center", "random", "square", "part"], "center")?;
    let base = match crop {
        "random" => Transform::random(size),
        "square" => Transform::square(size),
        "part" => Transform::part(size),
        _ => Transform { filter: Filter::Bicubic, ..Transform::center(size) },
    };
    let objects = d.opt_usize("objects")?;
    let folder = (source != "shapes").then(|| PathBuf::from(source));
    if let Some(folder) = folder.as_ref().filter(|f| !f.is_dir()) {
        return Err(d.error(
            "source",
            format!("`shapes`, or a folder of pictures; there is none at {}", folder.display()),
        ));
    }
    if folder.is_none() && !crate::data::shapes::World::SIDES.contains(&size) {
        return Err(d.error("size", "32 to 2048 pixels for shapes"));
    }
    if objects.is_some_and(|n| n == 0 || n > 2) {
        return Err(d.error("objects", "1 or 2"));
    }
    Ok(DataSettings {
        size,
        count: d.usize_or("count", 0)? as u64,
        objects,
        seed: d.usize_or("seed", 0)? as u64,
        transform: Transform {
            flip: d.bool_or("flip", base.flip && crop == "square" && d.has("crop"))?,
            ..base
        },
        threads: d.usize_or("threads", 0)?,
        folder,
    })
}

fn optimiser(c: &Config, kind: Kind, steps: usize) -> Result<(Optimiser, f64, Schedule)> {
    let keys =
        ["rate", "betas", "eps", "decay", "coupled", "clip", "schedule", "warmup", "start", "most", "least"];
    let o = section(c, "optimiser", &keys)?;
    let betas = o.opt_f64_list("betas")?.unwrap_or(match kind {
        Kind::Autoencoder => vec![0.5, 0.9],
        Kind::Diffusion => vec![0.9, 0.999],
    });
    let [b1, b2] = betas[..] else { return Err(o.error("betas", "two numbers")) };
    // As f32, which the optimiser computes with.
    if ![b1, b2].iter().all(|b| (0.0..1.0).contains(&(*b as f32))) {
        return Err(o.error("betas", "two numbers from 0 to below 1"));
    }
    let how = Optimiser {
        betas: [b1 as f32, b2 as f32],
        eps: within(&o, "eps", 1e-8, 1e-30, 1.0)? as f32,
        decay: within(&o, "decay", 0.01, 0.0, 1.0)? as f32,
        coupled: o.bool_or("coupled", false)?,
        clip: within(&o, "clip", 1.0, 0.0, 1e9)? as f32,
        average: false,
        loss_scale: false,
        accumulate: at_least_one(c, "accumulate", 1)?,
    };
    let rate = within(&o, "rate", if kind == Kind::Autoencoder { 2e-4 } else { 1e-4 }, 0.0, 1.0)?;
    let warmup = o.usize_or("warmup", (steps / 20).min(100))?;
    let end = |key, default| within(&o, key, default, 0.0, 1e3);
    let (start, most, least) = (end("start", 0.0)?, end("most", 1.0)?, end("least", 0.0)?);
    let name = o.one_of("schedule", &["constant", "cosine", "linear", "warmup_cosine"], "constant")?;
    let schedule = match name {
        "cosine" => Schedule::Cosine { warmup, steps },
        "linear" => Schedule::LambdaLinear { warmup, steps, start, most, least },
        "warmup_cosine" => Schedule::WarmUpCosine { warmup, steps, start, most, least },
        _ => Schedule::Constant { warmup },
    };
    let given = ["start", "most", "least"].into_iter().find(|key| o.has(key));
    if let Some(key) = given.filter(|_| matches!(name, "constant" | "cosine")) {
        return Err(
            o.error(key, format!("no such key: the schedule is {name}; linear and warmup_cosine have ends"))
        );
    }
    schedule
        .check()
        .map_err(|_| o.error("warmup", format!("fewer steps than the run, which has {steps}")))?;
    Ok((how, rate, schedule))
}

fn distance(c: &Config, default: &str) -> Result<Distance> {
    let delta = within(c, "huber_delta", 1.0, 1e-6, 1e6)? as f32;
    Ok(match c.one_of("distance", &["l1", "l2", "huber"], default)? {
        "l1" => Distance::L1,
        "l2" => Distance::L2,
        _ => Distance::Huber(delta),
    })
}

/// A model's section with the keys that it leaves out.
fn completed(c: &Config, key: &str, defaults: Value) -> Result<Value> {
    let mut all: Map<String, Value> = defaults.as_object().cloned().unwrap_or_default();
    if let Some(own) = c.section(key)? {
        for k in own.keys() {
            all.insert(k.into(), own.get(k).cloned().unwrap_or(Value::Null));
        }
    }
    Ok(Value::Object(all))
}

/// The width of each level, to say what blocks a model has.
fn levels(c: &Config, section: &str, default: &[usize]) -> Result<Vec<usize>> {
    match c.section(section)? {
        Some(s) if s.has("block_out_channels") => {
            let found = s.usize_list("block_out_channels")?;
            if found.is_empty() {
                Err(s.error("block_out_channels", "at least one level"))
            } else {
                Ok(found)
            }
        }
        _ => Ok(default.to_vec()),
    }
}

/// Errors of a model's own reader name the section.
fn in_section<T>(result: Result<T>, section: &str) -> Result<T> {
    result.map_err(|e| match e {
        Error::Config { file, key, want, got } => {
            Error::Config { file, key: format!("{section}.{key}"), want, got }
        }
        other => other,
    })
}

impl Settings {
    /// Pictures of a step.
    pub fn pictures(&self) -> usize {
        self.batch * self.optimiser.accumulate
    }

    /// Reads what a run is told; `file` is what errors name.
    ///
    /// # Errors
    /// [`Error::Config`] for a key that is not known, with the one that it resembles, and for a value that does not do.
    pub fn read(kind: Kind, value: Value, file: impl AsRef<Path>) -> Result<Settings> {
        let c = Config::from_value(file, value.clone())?;
        let own: &[&str] = match kind {
            Kind::Autoencoder => &[],
            Kind::Diffusion => &["first_stage", "scheduler", "tokenizer", "conditioning"],
        };
        c.only(&[KEYS, own].concat())?;
        let (steps, batch) = (at_least_one(&c, "steps", 1000)?, at_least_one(&c, "batch_size", 16)?);
        let data = data(&c)?;
        let (mut optimiser, rate, schedule) = optimiser(&c, kind, steps)?;
        let average = section(&c, "average", &["decay"])?;
        let default = if kind == Kind::Diffusion { 0.9999 } else { 0.0 };
        let decay = within(&average, "decay", default, 0.0, 1.0)?;
        optimiser.average = decay > 0.0;
        let parts = match kind {
            Kind::Autoencoder => Parts::Autoencoder(Box::new(autoencoder::read(&c, data.size)?)),
            Kind::Diffusion => Parts::Diffusion(Box::new(diffusion::read(&c, &data)?)),
        };
        let checkpoint = section(&c, "checkpoint", &["every", "newest"])?;
        let sample = section(&c, "sample", &["every", "count", "prompts", "steps", "guidance"])?;
        let prompts = match sample.has("prompts") {
            true => sample.str_list("prompts")?,
            false => vec![],
        };
        let export = section(&c, "export", &["dtype", "single_file"])?;
        let single_file = export.bool_or("single_file", false)?;
        if let (true, Parts::Diffusion(own)) = (single_file, &parts) {
            // Said before the run, not behind it.
            let class = own.unet_config["_class_name"].as_str().unwrap_or_default();
            let unet = Config::from_value(c.file(), own.unet_config.clone())?;
            in_section(Names::of(class, &unet, false), "model.unet")?;
        }
        let compute = dtype(&c, "dtype")?;
        // Small gradients would be lost in f16.
        let optimiser = Optimiser { loss_scale: compute == DType::F16, ..optimiser };
        Ok(Settings {
            seed: c.usize_or("seed", 0)? as u64,
            steps,
            batch,
            dtype: compute,
            recompute: c.bool_or("recompute", false)?,
            data,
            rate,
            schedule,
            average: (decay > 0.0).then_some(decay),
            optimiser,
            checkpoint_every: at_least_one(&checkpoint, "every", 500)?,
            newest: at_least_one(&checkpoint, "newest", 3)?,
            log_every: at_least_one(&c, "log_every", 10)?,
            sample: SampleSettings {
                every: sample.usize_or("every", 500)?,
                count: at_least_one(&sample, "count", 8)?,
                prompts,
                steps: at_least_one(&sample, "steps", 30)?,
                guidance: within(&sample, "guidance", 3.0, 0.0, 100.0)?,
            },
            export: dtype(&export, "dtype")?,
            single_file,
            parts,
            value,
        })
    }
}
