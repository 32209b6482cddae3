//! Runs of a KL autoencoder: Rombach et al. 2022, section 3.1.

use super::export;
use super::grid::{Tiles, bytes};
use super::run::Task;
use super::settings::{AutoencoderSettings, Settings};
use super::source::{Stream, Subject, normal};
use super::step::Trainer;
use crate::data::loader::{Loader, Options};
use crate::data::source::Source;
use crate::error::Result;
use crate::exec::{Device, Program};
use crate::graph::{Graph, Var};
use crate::models::AutoencoderKL;
use crate::nn::add;
use crate::ops::{Distance, Gaussian, Kl, Loss, cast};
use crate::rng::Small;
use crate::tensor::{DType, HostTensor};
use std::path::Path;
use std::time::Duration;

/// The loss (1) f32 of a step of a KL autoencoder: the mean distance over pixels and channels of a reconstruction from a draw,
/// and `kl_weight` times the divergence, which is summed over the latent and divided by the number H·W·C of a picture's values.
///
/// CompVis adds up both terms over a picture where this takes means, so that `kl_weight` means the same (1e-6 there), the
/// minimum is the same, and gradients are H·W·C times smaller, which Adam does not notice.
///
/// `image` (B,H,W,C) and `noise` (B,h,w,Z) are f32 from −1 to 1 and of unit deviation; `weights` (B) weigh pictures.
///
/// # Errors
/// When the sizes do not fit the model.
pub fn reconstruction_loss(
    g: &mut Graph,
    model: &AutoencoderKL,
    [image, noise, weights]: [Var; 3],
    (distance, kl_weight): (Distance, f64),
    dtype: DType,
) -> Result<Var> {
    let x = cast(g, "image", image, dtype, 1.0)?;
    let moments = model.encode(g, x)?;
    let z = g.push("draw", Gaussian { scale: 1.0 }, &[moments, noise])?;
    let z = cast(g, "draw", z, dtype, 1.0)?;
    let y = model.decode(g, z)?;
    let distance = g.push("distance", Loss(distance), &[y, image, weights])?;
    if kl_weight == 0.0 {
        return Ok(distance);
    }
    let shape = g.shape(image);
    let values = (shape.numel() / shape[0].max(1)).max(1);
    let kl = g.push("kl", Kl, &[moments])?;
    let kl = cast(g, "kl.weighted", kl, DType::F32, kl_weight / values as f64)?;
    add(g, "loss", distance, kl)
}

/// A run under way.
pub(super) struct Autoencoder {
    settings: Settings,
    own: AutoencoderSettings,
    subject: Subject,
    loader: Loader,
}

impl Autoencoder {
    pub(super) fn start(s: &Settings, own: &AutoencoderSettings, step: usize) -> Result<Autoencoder> {
        let subject = Subject::open(&s.data)?;
        let options = Options { batch: s.batch, seed: s.seed, threads: s.data.threads, ..Options::default() };
        let loader = Loader::at(subject.clone(), options, step as u64)?;
        Ok(Autoencoder { settings: s.clone(), own: own.clone(), subject, loader })
    }

    fn latents(&self, batch: usize) -> [usize; 4] {
        let (codec, side) = (&self.own.model.codec, self.settings.data.size);
        [batch, side / codec.factor(), side / codec.factor(), codec.latent_channels]
    }
}

impl Task for Autoencoder {
    fn graph(&self) -> Result<(Graph, Var)> {
        let (s, mut g) = (&self.settings, Graph::new());
        g.train(true);
        let image = g.input("image", DType::F32, [s.batch, s.data.size, s.data.size, 3]);
        let noise = g.input("noise", DType::F32, self.latents(s.batch));
        let weights = g.input("weights", DType::F32, [s.batch]);
        let how = (self.own.distance, self.own.kl_weight);
        let loss = reconstruction_loss(&mut g, &self.own.model, [image, noise, weights], how, s.dtype)?;
        Ok((g, loss))
    }

    fn starts_at_zero(&self, _: &str) -> bool {
        false
    }

    /// The layer before the draw says the same deviation everywhere.
    fn begin(&self, trainer: &mut Trainer) -> Result<()> {
        let Some(deviation) = self.own.initial_deviation else { return Ok(()) };
        let (layer, z) = ("quant_conv", self.own.model.codec.latent_channels);
        for (name, start) in [("weight", 0.0), ("bias", 2.0 * deviation.ln())] {
            let name = format!("{layer}.{name}");
            let old = trainer.read(&name)?;
            let mut values = old.to_f32();
            // Rows are means, then the logarithms of variances.
            let own = z * values.len() / (2 * z);
            values[own..].fill(start as f32);
            trainer.set(&name, &HostTensor::f32(old.shape(), values)?)?;
        }
        Ok(())
    }

    fn inputs(&mut self, step: usize) -> Result<Vec<(&'static str, HostTensor)>> {
        let (s, shape) = (&self.settings, self.latents(self.settings.batch));
        let batch = self.loader.next().unwrap_or(Err(crate::Error::Cancelled))?;
        let noise = normal(s.seed, step, Stream::Noise, shape.iter().product());
        Ok(vec![
            ("image", HostTensor::f32([s.batch, s.data.size, s.data.size, 3], batch.images)?),
            ("noise", HostTensor::f32(shape, noise)?),
            ("weights", HostTensor::f32([s.batch], vec![1.0; s.batch])?),
        ])
    }

    fn waited(&self) -> Duration {
        self.loader.waited()
    }

    fn skipped(&self) -> Vec<String> {
        self.loader.skipped()
    }

    fn notes(&self) -> Vec<(String, String)> {
        vec![]
    }

    fn export(&self, trainer: &Trainer, folder: &Path) -> Result<()> {
        let s = &self.settings;
        export::component(&folder.join("vae"), "diffusion_pytorch_model", &self.own.config, trainer, "", s)
    }

    /// Pictures above, their reconstructions (from the mean of the code) below.
    fn grid(&self, trainer: &Trainer, _: &Path, device: &Device) -> Result<Tiles> {
        let (side, model) = (self.settings.data.size, &self.own.model);
        let n = (self.subject.len().unwrap_or(u64::MAX)).min(self.settings.sample.count as u64) as usize;
        let mut g = Graph::new();
        let image = g.input("image", DType::F32, [n, side, side, 3]);
        let noise = g.input("noise", DType::F32, self.latents(n));
        let moments = model.encode(&mut g, image)?;
        let z = g.push("draw", Gaussian { scale: 1.0 }, &[moments, noise])?;
        let y = model.decode(&mut g, z)?;
        g.output("reconstruction", y);
        let weights = trainer.weights("", self.settings.average.is_some(), DType::F32)?;
        let mut program = Program::new(g, &weights, device)?;
        let mut pixels = vec![];
        for i in 0..n as u64 {
            // What is left out has been told of by the loader.
            pixels.extend(self.subject.readable(i, &mut Small::new(i), |_| ())?.1.pixels);
        }
        let signed = pixels.iter().map(|v| f32::from(*v) / 127.5 - 1.0).collect();
        program.write("image", &HostTensor::f32([n, side, side, 3], signed)?)?;
        program.write("noise", &HostTensor::zeros(program.spec("noise")?))?;
        program.run(&mut ())?;
        let made = bytes(&program.read("reconstruction")?.to_f32());
        let tiles = pixels.chunks(side * side * 3).chain(made.chunks(side * side * 3));
        Ok(Tiles { columns: n, width: side, height: side, pictures: tiles.map(<[u8]>::to_vec).collect() })
    }
}
