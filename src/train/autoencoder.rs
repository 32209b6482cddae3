//! Runs of an autoencoder: Rombach et al. 2022, section 3.1.

use super::export;
use super::first_stage::{DISCRIMINATOR, initial_discriminator};
use super::frozen::{give_back, reconstructed};
use super::grid::Tiles;
use super::initial;
use super::memory::{Beside, Load, image, loaded};
use super::run::{Task, Watch, note, rows};
use super::settings::{AutoencoderSettings, Settings};
use super::source::{Stream, Subject, normal};
use super::step::Trainer;
use crate::data::loader::{Loader, Options};
use crate::data::source::Source;
use crate::error::{Error, Result};
use crate::exec::{Device, Program, Target, Weights};
use crate::graph::Graph;
use crate::io::Checkpoint;
use crate::models::PatchNorm;
use crate::pipeline::Vae;
use crate::rng::Small;
use crate::tensor::{DType, HostTensor};
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

/// A run under way.
pub(super) struct Autoencoder {
    settings: Settings,
    own: AutoencoderSettings,
    subject: Subject,
    loader: Loader,
    /// The inputs of the first step, where they have been asked for already.
    first: Option<Vec<(&'static str, HostTensor)>>,
    /// What tells the weights of the perceptual term from others.
    lpips: Option<String>,
}

impl Autoencoder {
    pub(super) fn start(
        s: &Settings,
        own: &AutoencoderSettings,
        (step, notes): (usize, &HashMap<String, String>),
        watch: &mut dyn Watch,
    ) -> Result<Autoencoder> {
        let lpips =
            own.lpips.as_ref().map(|file| Checkpoint::open(file)?.fingerprint(|_| true)).transpose()?;
        match (&own.lpips, &lpips) {
            (None, _) => watch.say("no LPIPS: loss.lpips.file names no weights of it"),
            (Some(path), Some(hash)) if step > 0 && note::<String>(notes, "lpips")? != *hash => {
                return Err(Error::file(
                    path,
                    "want the weights that the run began with; they have changed since",
                ));
            }
            _ => {}
        }
        if let Some(d) = own.loss.adversary.as_ref().filter(|d| d.start >= s.steps) {
            watch.say(&format!(
                "the discriminator has no say in these {} steps: it starts at {}",
                s.steps, d.start
            ));
        }
        let subject = Subject::open(&s.data)?;
        let options =
            Options { batch: s.pictures(), seed: s.seed, threads: s.data.threads, ..Options::default() };
        let loader = Loader::at(subject.clone(), options, step as u64)?;
        Ok(Autoencoder { settings: s.clone(), own: own.clone(), subject, loader, first: None, lpips })
    }

    /// The layer before the draw says the same deviation everywhere.
    fn draw_with(&self, trainer: &mut Trainer, deviation: f64) -> Result<()> {
        for (name, start) in [("quant_conv.weight", 0.0), ("quant_conv.bias", 2.0 * deviation.ln())] {
            let old = trainer.read(name)?;
            let mut values = old.to_f32();
            // Rows are means, then the logarithms of variances.
            let half = values.len() / 2;
            values[half..].fill(start as f32);
            trainer.set(name, &HostTensor::f32(old.shape(), values)?)?;
        }
        Ok(())
    }

    /// Pictures that show how far the run is.
    fn tiles(&self) -> usize {
        self.subject.len().unwrap_or(u64::MAX).min(self.settings.sample.count as u64) as usize
    }

    fn latents(&self, batch: usize) -> [usize; 4] {
        let (codec, side) = (self.own.model.codec(), self.settings.data.size);
        [batch, side / codec.factor(), side / codec.factor(), codec.latent_channels]
    }
}

impl Task for Autoencoder {
    fn graph(&self) -> Result<Graph> {
        let (s, mut g) = (&self.settings, Graph::new());
        g.train(true);
        let image = g.input("image", DType::F32, [s.batch, s.data.size, s.data.size, 3]);
        self.own.loss.step(&mut g, &self.own.model, image, (s.dtype, s.recompute), &s.optimiser)?;
        Ok(g)
    }

    fn frozen(&self, device: &Device) -> Result<Weights> {
        let mut weights = Weights::new(device);
        if let (Some(term), Some(path)) = (&self.own.loss.perceptual, &self.own.lpips) {
            term.load(&Checkpoint::open(path)?, self.settings.dtype, &mut weights)?;
        }
        Ok(weights)
    }

    fn beside(&self, target: Target) -> Result<Beside> {
        let (s, side, model) = (&self.settings, self.settings.data.size, &self.own.model);
        let noise = self.latents(s.pictures()).iter().product::<usize>() * size_of::<f32>();
        let n = self.tiles();
        let (program, running) = Load::program(&reconstructed(model, [n, side, side])?, target)?;
        // As bytes and in f32, of what goes in and what comes out.
        let pixels = 2 * image(n, side) + image(n, side) / 2;
        Ok(Beside {
            // The rows of a batch are copied out of those of a step.
            held: Load::host(loaded(s.pictures(), side) + 2 * (image(s.pictures(), side) + noise)),
            pictures: program.and(running).and(Load::host(pixels)),
            ..Beside::default()
        })
    }

    fn begin(&mut self, trainer: &mut Trainer) -> Result<()> {
        let seed = self.settings.seed;
        let judge = format!("{DISCRIMINATOR}.");
        let (theirs, own): (Vec<_>, Vec<_>) =
            trainer.parameters().into_iter().partition(|(name, _)| name.starts_with(&judge));
        let values = [initial(&own, |_| false, seed)?, initial_discriminator(&theirs, seed.wrapping_add(1))?];
        for ((name, _), value) in own.iter().chain(&theirs).zip(values.iter().flatten()) {
            trainer.set(name, value)?;
        }
        if let Some(deviation) = self.own.initial_deviation {
            self.draw_with(trainer, deviation)?;
        }
        self.own.loss.begin(trainer, self.settings.batch)?;
        if self.own.loss.adversary.as_ref().is_some_and(|a| a.model.norm == PatchNorm::Act) {
            let first = self.inputs(0)?;
            let batch = first.iter().map(|(name, value)| Ok((*name, rows(value, 0, self.settings.batch)?)));
            let batch = batch.collect::<Result<Vec<_>>>()?;
            self.own.loss.begin_norms(trainer, &self.own.model, &batch, self.settings.dtype)?;
            self.first = Some(first);
        }
        Ok(())
    }

    fn inputs(&mut self, step: usize) -> Result<Vec<(&'static str, HostTensor)>> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        let (s, n) = (&self.settings, self.settings.pictures());
        let shape = self.latents(n);
        let batch = self.loader.next().unwrap_or(Err(crate::Error::Cancelled))?;
        let mut all = vec![
            ("image", HostTensor::f32([n, s.data.size, s.data.size, 3], batch.images)?),
            ("weights", HostTensor::f32([n], vec![1.0; n])?),
        ];
        if let Vae::Kl(_) = self.own.model {
            let noise = normal(s.seed, step, Stream::Noise, shape.iter().product());
            all.push(("noise", HostTensor::f32(shape, noise)?));
        }
        Ok(all)
    }

    fn ready(&self, trainer: &mut Trainer) -> Result<()> {
        self.own.loss.at_step(trainer)
    }

    fn waited(&self) -> Duration {
        self.loader.waited()
    }

    fn skipped(&self) -> Vec<String> {
        self.loader.skipped()
    }

    fn notes(&self) -> Vec<(String, String)> {
        self.lpips.iter().map(|hash| ("lpips".to_string(), hash.clone())).collect()
    }

    fn export(&self, trainer: &Trainer, folder: &Path) -> Result<()> {
        let s = &self.settings;
        export::component(&folder.join("vae"), "diffusion_pytorch_model", &self.own.config, trainer, "", s)
    }

    /// Pictures above, their reconstructions (for KL from the mean of the code) below.
    fn grid(&self, trainer: &Trainer, _: &Path, device: &Device) -> Result<Tiles> {
        let (side, model) = (self.settings.data.size, &self.own.model);
        let n = self.tiles();
        let weights = trainer.weights("", self.settings.average.is_some(), DType::F32)?;
        let mut program = Program::new(reconstructed(model, [n, side, side])?, &weights, device)?;
        let mut pixels = vec![];
        for i in 0..n as u64 {
            // What is left out has been told of by the loader.
            pixels.extend(self.subject.readable(i, &mut Small::new(i), |_| ())?.1.pixels);
        }
        let made = give_back(&mut program, [n, side, side], &pixels)?;
        let tiles = pixels.chunks(side * side * 3).chain(made.chunks(side * side * 3));
        Ok(Tiles { columns: n, width: side, height: side, pictures: tiles.map(<[u8]>::to_vec).collect() })
    }
}
