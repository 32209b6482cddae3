//! The frozen first stage of a diffusion run: pictures to latents.

use crate::error::{Error, Result};
use crate::exec::{Device, Program};
use crate::io::{Checkpoint, Config};
use crate::models::{AutoencoderKL, Model, VQModel};
use crate::pipeline::{Vae, load};
use crate::tensor::{DType, HostTensor};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A trained autoencoder, whose configuration has been read and whose weights have not.
#[derive(Clone, Debug)]
pub struct FirstStage {
    /// Its folder.
    pub path: PathBuf,
    /// Its `config.json`.
    pub config: Value,
    /// The model.
    pub vae: Vae,
    /// Class of the model, as configurations name it.
    pub class: String,
    /// The factor of the latents, where it is given and not measured.
    pub scaling_factor: Option<f64>,
}

impl FirstStage {
    /// From the section `first_stage` of a run. `path` is the folder of an autoencoder, of a run that has trained one, or of a
    /// pipeline that has one.
    ///
    /// # Errors
    /// When there is none, or its configuration is not understood.
    pub(super) fn read(c: &Config) -> Result<FirstStage> {
        let want =
            "the folder of an autoencoder: a run of `ldm train autoencoder`, a diffusers folder, or its vae";
        if !c.has("path") {
            return Err(Error::Config {
                file: c.file().into(),
                key: "first_stage.path".into(),
                want: want.into(),
                got: "nothing (--first-stage FOLDER sets it)".into(),
            });
        }
        let given = Path::new(c.str("path")?);
        let places = ["export/vae", "vae", "vqvae", ""].map(|inner| given.join(inner));
        let Some(path) = places.into_iter().find(|p| p.join("config.json").is_file()) else {
            return Err(c.error("path", want));
        };
        let config = Config::read(path.join("config.json"))?;
        let class = config.str_or("_class_name", "AutoencoderKL")?.to_string();
        let vae = match config.one_of("_class_name", &["AutoencoderKL", "VQModel"], "AutoencoderKL")? {
            "VQModel" => Vae::Vq(VQModel::from_config(&config)?),
            _ => Vae::Kl(AutoencoderKL::from_config(&config)?),
        };
        let all = config.keys().map(|k| (k.to_string(), config.get(k).cloned().unwrap_or(Value::Null)));
        let scaling_factor = c.opt_f64("scaling_factor")?;
        if scaling_factor.is_some_and(|f| !(f > 0.0)) {
            return Err(c.error("scaling_factor", "a number above 0, or no such key: then it is measured"));
        }
        Ok(FirstStage { config: Value::Object(all.collect()), path, vae, class, scaling_factor })
    }

    /// Channels of the latents.
    pub fn channels(&self) -> usize {
        match &self.vae {
            Vae::Kl(m) => m.codec.latent_channels,
            Vae::Vq(m) => m.code_width,
        }
    }

    /// Pixels per latent, on each axis.
    pub fn factor(&self) -> usize {
        self.vae.codec().factor()
    }

    /// Channels of what the encoder says: mean and log-variance, or the latent itself.
    pub fn moments(&self) -> usize {
        if matches!(self.vae, Vae::Kl(_)) { 2 * self.channels() } else { self.channels() }
    }

    /// A program from `image` (B,S,S,3) to what the encoder says, always in f32.
    ///
    /// # Errors
    /// When its weights cannot be read, or memory runs out.
    pub(super) fn encoder(&self, batch: usize, side: usize, device: &Device) -> Result<Encoder> {
        let size = [batch, side, side];
        let (graph, output) = match &self.vae {
            Vae::Kl(m) => (m.encode_graph(size, DType::F32)?, "moments"),
            Vae::Vq(m) => (m.encode_graph(size, DType::F32)?, "latents"),
        };
        let weights = load(Checkpoint::open(&self.path)?, &self.vae.inventory(DType::F32)?, device)?;
        Ok(Encoder { program: Program::new(graph, &weights, device)?, output, side, batch })
    }

    /// Latents, not scaled, of one picture from what the encoder says of it and from noise of a latent's length.
    pub(super) fn draw(&self, said: &[f32], noise: &[f32]) -> Vec<f32> {
        let z = self.channels();
        match &self.vae {
            Vae::Vq(_) => said.to_vec(),
            Vae::Kl(_) => (said.chunks(2 * z).zip(noise.chunks(z)))
                .flat_map(|(m, n)| {
                    (0..z).map(move |i| (m[z + i].clamp(-30.0, 20.0) / 2.0).exp().mul_add(n[i], m[i]))
                })
                .collect(),
        }
    }

    /// What stays the same as long as the encoder does: a hash of its weights' file names, sizes and bytes.
    pub(super) fn fingerprint(&self) -> Result<String> {
        let encoder = |name: &str| name.starts_with("encoder.") || name.starts_with("quant_conv.");
        Checkpoint::open(&self.path)?.fingerprint(encoder)
    }
}

/// The encoder on a device.
pub(super) struct Encoder {
    program: Program,
    output: &'static str,
    side: usize,
    batch: usize,
}

impl Encoder {
    /// What the encoder says of pictures, a batch of them at a time.
    pub(super) fn encode(&mut self, images: &[f32]) -> Result<Vec<f32>> {
        let shape = [self.batch, self.side, self.side, 3];
        let mut all = vec![];
        for batch in images.chunks(shape.iter().product()) {
            self.program.write("image", &HostTensor::f32(shape, batch.to_vec())?)?;
            self.program.run(&mut ())?;
            all.extend(self.program.read(self.output)?.to_f32());
        }
        Ok(all)
    }
}
