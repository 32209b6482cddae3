//! A trained first stage: the frozen one of a diffusion run, pictures to latents; and pictures as it gives them back.

use super::grid::bytes;
use super::memory::Load;
use crate::error::{Error, Result};
use crate::exec::{Device, Program, Target, Weights};
use crate::graph::Graph;
use crate::io::{Checkpoint, Config, single_file};
use crate::models::{AutoencoderKL, Model, VQModel};
use crate::ops::Gaussian;
use crate::pipeline::{Vae, load};
use crate::tensor::{DType, HostTensor};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A trained autoencoder, whose configuration has been read and whose weights have not.
#[derive(Clone, Debug)]
pub struct FirstStage {
    /// Its folder; or the file that it is in, alone or with the rest of a model.
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
    /// pipeline that has one; or a single file with one.
    ///
    /// # Errors
    /// When there is none, or its configuration is not understood.
    pub(super) fn read(c: &Config) -> Result<FirstStage> {
        let want = "an autoencoder: a run of `ldm train autoencoder`, a diffusers folder, its vae, or a single file with one";
        if !c.has("path") {
            return Err(Error::Config {
                file: c.file().into(),
                key: "first_stage.path".into(),
                want: want.into(),
                got: "nothing (--first-stage FOLDER sets it)".into(),
            });
        }
        let given = Path::new(c.str("path")?);
        let (path, class, config) = if given.is_file() {
            let (class, config) = single_file::autoencoder(given)?;
            (given.into(), class, config)
        } else {
            let places = ["export/vae", "vae", "vqvae", ""].map(|inner| given.join(inner));
            let Some(path) = places.into_iter().find(|p| p.join("config.json").is_file()) else {
                return Err(c.error("path", want));
            };
            let config = Config::read(path.join("config.json"))?;
            (path, config.str_or("_class_name", "AutoencoderKL")?.to_string(), config)
        };
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

    /// The autoencoder of a folder, see `first_stage.path` of a run.
    ///
    /// # Errors
    /// When there is none, or its configuration is not understood.
    pub fn open(folder: &Path) -> Result<FirstStage> {
        FirstStage::read(&Config::from_value("autoencoder", json!({"path": folder}))?)
    }

    /// With its weights on a device, in f32, to give pictures back.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn reconstruction(&self, device: &Device) -> Result<Reconstruction> {
        let (vae, weights) = (self.vae.clone(), self.weights(device)?);
        Ok(Reconstruction { vae, weights, device: device.clone(), program: None })
    }

    /// Its weights, by diffusers' names.
    pub(super) fn checkpoint(&self) -> Result<Checkpoint> {
        if self.path.is_file() {
            return single_file::autoencoder_weights(&self.path);
        }
        Checkpoint::open(&self.path)
    }

    /// Its weights on a device, in f32.
    pub(super) fn weights(&self, device: &Device) -> Result<Weights> {
        load(self.checkpoint()?, &self.vae.inventory(DType::F32)?, device)
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
        let (graph, output) = self.encoder_graph(batch, side)?;
        let program = Program::new(graph, &self.weights(device)?, device)?;
        Ok(Encoder { program, output, side, batch, factor: self.factor() })
    }

    /// The memory of [`FirstStage::encoder`]: while its weights are read, then as long as it is there, and while it runs.
    ///
    /// # Errors
    /// When the size does not fit.
    pub(super) fn encoder_memory(&self, batch: usize, side: usize, target: Target) -> Result<[Load; 3]> {
        let (stays, runs) = Load::program(&self.encoder_graph(batch, side)?.0, target)?;
        let whole = self.vae.inventory(DType::F32)?.bytes();
        Ok([stays.and(Load { device: whole, host: 0 }), stays, runs])
    }

    fn encoder_graph(&self, batch: usize, side: usize) -> Result<(Graph, &'static str)> {
        let size = [batch, side, side];
        Ok(match &self.vae {
            Vae::Kl(m) => (m.encode_graph(size, DType::F32)?, "moments"),
            Vae::Vq(m) => (m.encode_graph(size, DType::F32)?, "latents"),
        })
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

    /// What makes of its tensors (f32, by name) those of an autoencoder whose latents are `factor` times as large and whose pictures
    /// are the same: for pipelines that know no factor. The last layer before the latents takes it in, the codebook too, and
    /// the first layer behind them takes it out.
    pub(super) fn folded(&self, factor: f64) -> Result<impl Fn(&str, HostTensor) -> Result<HostTensor>> {
        let there = self.checkpoint()?;
        let layer = |own: &str, other: &str| {
            let found = there.entry(&format!("{own}.weight")).is_some();
            if found { own.to_string() } else { other.to_string() }
        };
        let before = layer("quant_conv", "encoder.conv_out");
        let behind = layer("post_quant_conv", "decoder.conv_in");
        // A KL encoder says means, and after them logarithms of variances.
        let (said, z) = (self.moments(), self.channels());
        Ok(move |name: &str, value: HostTensor| {
            let Some((layer, kind)) = name.rsplit_once('.').filter(|_| factor != 1.0) else {
                return Ok(value);
            };
            let (shape, mut x) = (value.shape(), value.to_f32());
            let times = |part: &mut [f32], by: f64| {
                part.iter_mut().for_each(|v| *v = (f64::from(*v) * by) as f32);
            };
            if layer == before {
                let (means, variances) = x.split_at_mut(value.shape().numel() / said * z);
                times(means, factor);
                if kind == "bias" {
                    variances.iter_mut().for_each(|v| *v = (f64::from(*v) + 2.0 * factor.ln()) as f32);
                }
            } else if layer == "quantize.embedding" {
                times(&mut x, factor);
            } else if layer == behind && kind == "weight" {
                times(&mut x, 1.0 / factor);
            } else {
                return Ok(value);
            }
            HostTensor::f32(shape, x)
        })
    }

    /// What stays the same as long as the encoder does: a hash of its weights' names and values.
    pub(super) fn fingerprint(&self) -> Result<String> {
        let encoder = |name: &str| name.starts_with("encoder.") || name.starts_with("quant_conv.");
        self.checkpoint()?.fingerprint(encoder)
    }
}

/// The encoder on a device.
pub(super) struct Encoder {
    program: Program,
    output: &'static str,
    side: usize,
    batch: usize,
    factor: usize,
}

impl Encoder {
    /// Of the pictures that it takes, in pixels.
    pub(super) fn side(&self) -> usize {
        self.side
    }

    /// Pixels per latent, on each axis.
    pub(super) fn factor(&self) -> usize {
        self.factor
    }

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

/// An autoencoder that gives pictures back: for KL from the mean of the code.
pub struct Reconstruction {
    vae: Vae,
    weights: Weights,
    device: Device,
    /// For pictures of one size.
    program: Option<([usize; 2], Program)>,
}

impl Reconstruction {
    /// A picture, rows of RGB bytes, as the autoencoder gives it back.
    ///
    /// # Errors
    /// When its size does not fit the autoencoder, or memory runs out.
    pub fn of(&mut self, [width, height]: [usize; 2], pixels: &[u8]) -> Result<Vec<u8>> {
        let f = self.vae.codec().factor();
        if width % f != 0 || height % f != 0 || width * height == 0 {
            return Err(Error::invalid(format!(
                "want a size in multiples of {f}, by the autoencoder; got {width}x{height}"
            )));
        }
        let size = [width, height];
        let program = match self.program.take() {
            Some((of, program)) if of == size => program,
            _ => Program::new(reconstructed(&self.vae, [1, height, width])?, &self.weights, &self.device)?,
        };
        let (_, program) = self.program.insert((size, program));
        give_back(program, [1, height, width], pixels)
    }
}

/// From `image` (B,H,W,3) f32, −1 to 1, to its `reconstruction`; for KL also from the `noise` of the draw.
pub(super) fn reconstructed(vae: &Vae, [n, h, w]: [usize; 3]) -> Result<Graph> {
    let mut g = Graph::new();
    let image = g.input("image", DType::F32, [n, h, w, 3]);
    let y = match vae {
        Vae::Kl(model) => {
            let (f, z) = (model.codec.factor(), model.codec.latent_channels);
            let noise = g.input("noise", DType::F32, [n, h / f, w / f, z]);
            let moments = model.encode(&mut g, image)?;
            let z = g.push("draw", Gaussian { scale: 1.0 }, &[moments, noise])?;
            model.decode(&mut g, z)?
        }
        Vae::Vq(model) => {
            let z = model.encode(&mut g, image)?;
            model.decode(&mut g, z)?
        }
    };
    g.output("reconstruction", y);
    Ok(g)
}

/// Runs it on pictures, rows of RGB bytes, with no noise.
pub(super) fn give_back(program: &mut Program, [n, h, w]: [usize; 3], pixels: &[u8]) -> Result<Vec<u8>> {
    let signed = pixels.iter().map(|v| f32::from(*v) / 127.5 - 1.0).collect();
    program.write("image", &HostTensor::f32([n, h, w, 3], signed)?)?;
    if let Ok(noise) = program.spec("noise") {
        program.write("noise", &HostTensor::zeros(noise))?;
    }
    program.run(&mut ())?;
    Ok(bytes(&program.read("reconstruction")?.to_f32()))
}

#[cfg(test)]
mod tests {
    use super::super::concat::signed;
    use super::super::export::copied;
    use super::*;
    use crate::io::scratch::Scratch;

    /// Latents are so many times as large, also such as are drawn; pictures are the same.
    #[test]
    fn a_factor_in_the_weights_changes_latents_and_no_picture() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        for name in ["sd15-tiny/vae", "vq4-tiny/vqvae"] {
            let first = FirstStage::open(&golden.join(name)).unwrap();
            let dir = Scratch::new("folded");
            let to = (dir.path(), "diffusion_pytorch_model");
            copied(&first.checkpoint().unwrap(), to, &first.config, DType::F32, first.folded(3.0).unwrap())
                .unwrap();
            let other = FirstStage::open(dir.path()).unwrap();
            let pixels: Vec<u8> = (0..32 * 32 * 3).map(|i| ((i / 96 * 5 + i % 32 * 7) % 256) as u8).collect();
            let images: Vec<f32> = signed(&pixels).collect();
            let said = [&first, &other]
                .map(|first| first.encoder(1, 32, &Device::Cpu).unwrap().encode(&images).unwrap());
            for noise in [0.0, 1.0] {
                let noise = vec![noise; said[0].len() / first.moments() * first.channels()];
                let [a, b] = [0, 1].map(|i| [&first, &other][i].draw(&said[i], &noise));
                let most = a.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                let off = a.iter().zip(&b).fold(0.0f32, |off, (a, b)| off.max((3.0 * a - b).abs()));
                assert!(off <= 1e-5 * most, "{name}: latents of up to {most}, off by {off:e}");
            }
            let seen = [&first, &other]
                .map(|first| first.reconstruction(&Device::Cpu).unwrap().of([32, 32], &pixels).unwrap());
            let off = seen[0].iter().zip(&seen[1]).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(off <= Some(1), "{name}: a picture off by {off:?} of 255");
        }
    }
}
