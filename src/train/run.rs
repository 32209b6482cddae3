//! A run: steps from where the last checkpoint stands to the end, with metrics, checkpoints, pictures and an export.

use super::autoencoder::Autoencoder;
use super::average_decay;
use super::diffusion::Diffusion;
use super::grid::Tiles;
use super::memory::{Beside, Plan};
use super::settings::{Parts, Settings};
use super::step::Trainer;
use super::store::Store;
use crate::error::{Error, Result};
use crate::exec::{Device, Target, Weights};
use crate::graph::Graph;
use crate::pipeline::convert;
use crate::tensor::{DType, HostTensor, Shape, Spec};
use serde_json::json;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What is particular to a kind of run.
pub(super) trait Task {
    /// The graph of a step, updates included.
    fn graph(&self) -> Result<Graph>;
    /// The weights of that graph that are not trained.
    fn frozen(&self, device: &Device) -> Result<Weights> {
        Ok(Weights::new(device))
    }
    /// The memory that it takes beside the step.
    fn beside(&self, target: Target) -> Result<Beside>;
    /// Sets what a run starts with: parameters, and other states that do not start at zero.
    fn begin(&mut self, trainer: &mut Trainer) -> Result<()>;
    /// The inputs of step n = 0, 1, … with a row for each picture of all its batches; asked for in order.
    fn inputs(&mut self, step: usize) -> Result<Vec<(&'static str, HostTensor)>>;
    /// Writes what else a step depends on, before each.
    fn ready(&self, _trainer: &mut Trainer) -> Result<()> {
        Ok(())
    }
    /// How long steps have waited for data.
    fn waited(&self) -> Duration;
    /// Pictures that could not be read.
    fn skipped(&self) -> Vec<String>;
    /// What a checkpoint must hold beside the states.
    fn notes(&self) -> Vec<(String, String)>;
    /// Writes what has been trained.
    fn export(&self, trainer: &Trainer, folder: &Path) -> Result<()>;
    /// Pictures that show how far the run is; `export` has just been written to `folder`.
    fn grid(&self, trainer: &Trainer, folder: &Path, device: &Device) -> Result<Tiles>;
}

/// What a run tells while it goes.
#[derive(Clone, PartialEq, Debug)]
pub struct Standing {
    /// Steps that are done.
    pub step: usize,
    /// Steps of the run.
    pub of: usize,
    /// Mean loss since the last line of metrics.
    pub loss: f64,
    /// What the loss is made of, and other numbers of the step, by name: their means since the last line of metrics.
    pub parts: Vec<(String, f64)>,
    /// Norm of the gradients.
    pub norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// Seconds per step since the last line of metrics.
    pub seconds: f64,
    /// Share of that time that was spent waiting for data.
    pub waited: f64,
}

/// Who wants to know.
pub trait Watch {
    /// A step is done.
    ///
    /// # Errors
    /// Stops the run; what was saved stays.
    fn step(&mut self, standing: &Standing) -> Result<()>;
    /// Something else has happened, in a line.
    fn say(&mut self, what: &str);
}

impl Watch for () {
    fn step(&mut self, _: &Standing) -> Result<()> {
        Ok(())
    }
    fn say(&mut self, _: &str) {}
}

/// How a run ended.
#[derive(Clone, PartialEq, Debug)]
pub struct Summary {
    /// Loss of the last line of metrics; `None` where nothing was left to do.
    pub loss: Option<f64>,
    /// What was exported.
    pub export: PathBuf,
    /// The same as one file.
    pub single: Option<PathBuf>,
    /// Bytes that the run was said to take at the most: on a CPU by the whole process, on a GPU there.
    pub planned: usize,
}

/// Trains in `folder`: from the start, or with `resume` from the last checkpoint there, if there is one.
///
/// Everything random is a function of seed and step, and checkpoints hold parameters, moments, averages and the step, so that
/// a run that was killed at any moment goes on bit for bit.
///
/// # Errors
/// [`Error::Invalid`] when the folder holds another run, or this one without `resume`; when data, models or device fail;
/// [`Error::NonFinite`] when the loss is not finite.
pub fn run(
    s: &Settings,
    folder: &Path,
    resume: bool,
    device: &Device,
    watch: &mut dyn Watch,
) -> Result<Summary> {
    let mut store = Store::open(folder, &s.value, s.newest, resume)?;
    let last = store.last()?;
    let step = last.as_ref().map_or(0, |(step, _)| *step);
    store.rewind(step)?;
    if resume {
        watch.say(&match step {
            0 => "no checkpoint to go on from: the run starts".to_string(),
            n => format!("goes on after step {n}"),
        });
    }
    let notes = last.as_ref().map_or_else(HashMap::new, |(_, c)| c.metadata().clone());
    let mut task: Box<dyn Task> = match &s.parts {
        Parts::Autoencoder(own) => Box::new(Autoencoder::start(s, own, (step, &notes), watch)?),
        Parts::Diffusion(own) => Box::new(Diffusion::start(s, own, folder, (step, &notes), device, watch)?),
    };
    let graph = task.graph()?;
    let plan = Plan::new(&graph, s, &task.beside(device.into())?, device.into())?;
    watch.say(&plan.describe());
    let mut trainer = Trainer::new(graph, &s.optimiser, &task.frozen(device)?, device)?;
    match &last {
        Some((step, c)) => trainer.resume(*step, |name| c.read(name, DType::F32))?,
        None => task.begin(&mut trainer)?,
    }
    drop(last);
    let loss = steps(s, task.as_mut(), &mut trainer, (&mut store, folder), device, watch)?;
    let export = folder.join("export");
    task.export(&trainer, &export)?;
    let single = s.single_file.then(|| folder.join("export.safetensors"));
    if let Some(file) = &single {
        // An autoencoder is exported into a folder of its own.
        let whole = export.join("model_index.json").is_file();
        let from = if whole { export.clone() } else { export.join("vae") };
        convert(&from, file, None, None)?;
    }
    Ok(Summary { loss, export, single, planned: plan.peak() })
}

/// Rows n · batch, …, (n + 1) · batch − 1 of a tensor.
pub(super) fn rows(value: &HostTensor, batch: usize, n: usize) -> Result<HostTensor> {
    let shape = value.shape();
    let bytes = value.bytes().len() / shape[0] * n;
    let spec = Spec::new(value.spec().dtype, Shape::new(&[&[n], &shape[1..]].concat()));
    HostTensor::from_bytes(spec, &value.bytes()[batch * bytes..][..bytes])
}

/// A mean that starts anew.
#[derive(Default)]
struct Mean(f64, usize);

impl Mean {
    fn add(&mut self, v: f64) {
        self.0 += v;
        self.1 += 1;
    }
    fn take(&mut self) -> f64 {
        let Mean(sum, n) = std::mem::take(self);
        sum / n.max(1) as f64
    }
}

fn steps(
    s: &Settings,
    task: &mut dyn Task,
    trainer: &mut Trainer,
    (store, folder): (&mut Store, &Path),
    device: &Device,
    watch: &mut dyn Watch,
) -> Result<Option<f64>> {
    let (mut lines, mut since_saved, mut told) = (Mean::default(), Mean::default(), BTreeSet::new());
    let (mut clock, mut waited, mut latest) = (Instant::now(), task.waited(), None);
    let mut parts: Vec<Mean> = trainer.parts().iter().map(|_| Mean::default()).collect();
    let (mut again, mut inputs) = (false, vec![]);
    while trainer.steps() < s.steps {
        let n = trainer.steps();
        // A step that was left out is taken again on the same data: they come in order, each once.
        if !std::mem::take(&mut again) {
            inputs = task.inputs(n)?;
        }
        task.ready(trainer)?;
        let rate = s.rate * s.schedule.factor(n);
        let keep = average_decay(s.average.unwrap_or(0.0), n + 1);
        let report = trainer.step_over(rate, keep, |trainer, batch| {
            inputs.iter().try_for_each(|(name, value)| trainer.write(name, &rows(value, batch, s.batch)?))
        })?;
        if report.skipped {
            watch.say(&format!("step {n}: gradients beyond f16; once more under half the loss scale"));
            again = true;
            continue;
        }
        let step = n + 1;
        lines.add(f64::from(report.loss));
        since_saved.add(f64::from(report.loss));
        for (mean, (_, value)) in parts.iter_mut().zip(trainer.parts()) {
            mean.add(*value);
        }
        let (end, saves) = (step == s.steps, step % s.checkpoint_every == 0);
        let (count, spent) = (lines.1.max(1) as f64, clock.elapsed().as_secs_f64());
        let waits = (task.waited() - waited).as_secs_f64();
        let standing = Standing {
            step,
            of: s.steps,
            loss: lines.0 / count,
            parts: trainer
                .parts()
                .iter()
                .zip(&parts)
                .map(|((name, _), m)| (name.clone(), m.0 / count))
                .collect(),
            norm: f64::from(report.norm),
            rate,
            seconds: spent / count,
            waited: waits / spent.max(1e-9),
        };
        watch.step(&standing)?;
        if step % s.log_every == 0 || saves || end {
            let loss = lines.take();
            let mut line = json!({
                "step": step, "loss": loss, "norm": standing.norm, "rate": rate,
                "seconds_per_step": standing.seconds, "waited": standing.waited,
            });
            standing.parts.iter().for_each(|(name, value)| line[name] = json!(value));
            store.note(&line)?;
            parts.iter_mut().for_each(|part| *part = Mean::default());
            (clock, waited, latest) = (Instant::now(), task.waited(), Some(loss));
        }
        if saves || end {
            store.save(step, &trainer.states()?, since_saved.take(), &task.notes())?;
        }
        if s.sample.every > 0 && (step % s.sample.every == 0 || end) {
            let export = folder.join("export");
            task.export(trainer, &export)?;
            let file = folder.join(format!("samples/step-{step:08}.png"));
            // Pictures on the way are no reason to lose a run.
            match task.grid(trainer, &export, device).and_then(|grid| grid.write(&file)) {
                Ok(()) => watch.say(&format!("{}", file.display())),
                Err(e) => watch.say(&format!("step {step}: no pictures: {e}")),
            }
            clock = Instant::now();
        }
        for what in task.skipped() {
            if told.insert(what.clone()) {
                watch.say(&format!("left out: {what}"));
            }
        }
    }
    Ok(latest)
}

/// What an unusable checkpoint is told with.
pub(super) fn note<T: std::str::FromStr>(notes: &HashMap<String, String>, key: &str) -> Result<T> {
    let found = notes.get(key).and_then(|v| v.parse().ok());
    found.ok_or_else(|| {
        Error::invalid(format!("checkpoint: want a note `{key}`; it is of another kind of run"))
    })
}
