//! What a folder describes, without its weights: enough to say what a picture costs.

use super::tiles::Axis;
use super::{Beside, Classes, Request};
use crate::diffusion::{Settings, evaluation_graph};
use crate::error::{Error, Result};
use crate::exec::{Graph, Program, Target};
use crate::io::ModelFolder;
use crate::models::{AutoencoderKL, Codec, Conditioner, Model, UNet2D, UNet2DCondition, VQModel};
use crate::samplers::{Method, ScheduleConfig};
use crate::tensor::DType;

/// An autoencoder of either kind.
#[derive(Clone, PartialEq, Debug)]
pub enum Vae {
    /// KL-regularised.
    Kl(AutoencoderKL),
    /// VQ-regularised.
    Vq(VQModel),
}

impl Vae {
    /// Encoder and decoder.
    pub fn codec(&self) -> &Codec {
        match self {
            Vae::Kl(v) => &v.codec,
            Vae::Vq(v) => &v.codec,
        }
    }

    /// `latents` (B,h,w,Z) to `image` (B,H,W,C), f32.
    ///
    /// # Errors
    /// When the sizes do not fit.
    pub fn decode_graph(&self, size: [usize; 3], dtype: DType) -> Result<Graph> {
        match self {
            Vae::Kl(v) => v.decode_graph(size, dtype),
            Vae::Vq(v) => v.decode_graph(size, dtype),
        }
    }

    /// The autoencoder of a folder.
    ///
    /// # Errors
    /// When its configuration is not understood.
    pub fn read(folder: &ModelFolder) -> Result<Vae> {
        let name = vae_name(folder);
        match &*folder.component(name)?.class {
            "VQModel" => Ok(Vae::Vq(model(folder, name)?)),
            _ => Ok(Vae::Kl(model(folder, name)?)),
        }
    }
}

/// Pipelines whose UNet has no context.
const WITHOUT: [&str; 2] = ["LDMPipeline", "LDMSuperResolutionPipeline"];

/// What makes the context of a folder's UNet.
pub(super) fn conditioner(folder: &ModelFolder) -> Result<Conditioner> {
    if folder.has("class_embedder") {
        return Ok(Conditioner::Class(model(folder, "class_embedder")?));
    }
    if WITHOUT.contains(&folder.class()) {
        return Ok(Conditioner::Nothing);
    }
    if folder.has("bert") {
        return Ok(Conditioner::Bert(model(folder, "bert")?));
    }
    Ok(Conditioner::Clip(model(folder, "text_encoder")?))
}

/// The UNet of a folder; without a condition it is one of the other class.
fn denoiser(folder: &ModelFolder) -> Result<UNet2DCondition> {
    if WITHOUT.contains(&folder.class()) {
        return Ok(model::<UNet2D>(folder, "unet")?.into());
    }
    model(folder, "unet")
}

/// The folder that the autoencoder is in: older pipelines call it `vqvae`, of whatever kind it is.
pub(super) fn vae_name(folder: &ModelFolder) -> &'static str {
    if folder.has("vqvae") { "vqvae" } else { "vae" }
}

/// Reads a component's configuration as the model that it must be.
pub(super) fn model<M: Model>(folder: &ModelFolder, name: &str) -> Result<M> {
    let component = folder.component(name)?;
    if !M::CLASSES.contains(&&*component.class) {
        return Err(Error::Config {
            file: folder.index().file().into(),
            key: name.into(),
            want: M::CLASSES.join(" or "),
            got: component.class.clone(),
        });
    }
    M::from_config(&folder.config(name)?)
}

/// Longest side of a picture, in pixels. Far beyond what fits into memory today; below it, sizes can be counted.
const MAX_SIDE: usize = 1 << 17;
/// Most pictures that are made together; as [`MAX_SIDE`].
pub(super) const MAX_BATCH: usize = 1 << 16;
/// Shortest side of a tile, in latents: below, there is more border than picture.
const MIN_TILE: usize = 8;

/// The models and settings of a folder.
#[derive(Clone, Debug)]
pub struct Blueprint {
    /// What makes the context: a text encoder, or a table of classes.
    pub condition: Conditioner,
    /// The classes, of a model that draws such and not texts.
    pub classes: Option<Classes>,
    /// The UNet.
    pub unet: UNet2DCondition,
    /// What the UNet is given beside the latents.
    pub beside: Beside,
    /// The autoencoder.
    pub vae: Vae,
    /// The noise schedule.
    pub schedule: ScheduleConfig,
    /// The scheduler's class, as the folder names it.
    pub scheduler: String,
}

impl Blueprint {
    /// Pipelines of diffusers that are run as they are.
    pub const PIPELINES: &'static [&'static str] = &[
        "StableDiffusionPipeline",
        "StableDiffusionInpaintPipeline",
        "LDMTextToImagePipeline",
        "LDMPipeline",
        "LDMSuperResolutionPipeline",
    ];

    /// Reads the configurations of a folder.
    ///
    /// # Errors
    /// When one is not understood, or the parts do not fit each other.
    pub fn read(folder: &ModelFolder) -> Result<Blueprint> {
        if !Self::PIPELINES.contains(&folder.class()) {
            return Err(Error::Config {
                file: folder.index().file().into(),
                key: "_class_name".into(),
                want: Self::PIPELINES.join(" or "),
                got: folder.class().into(),
            });
        }
        let (scheduler, schedule) = scheduler(folder)?;
        let (condition, unet, vae) = (conditioner(folder)?, denoiser(folder)?, Vae::read(folder)?);
        let classes = match &condition {
            Conditioner::Class(table) => Some(Classes::read(folder, table)?),
            _ => None,
        };
        let wrong = |component: &str, key: &str, want: String, got: usize| {
            let file = folder.component(component).map(|c| c.path.join("config.json")).unwrap_or_default();
            Err(Error::Config { file, key: key.into(), want, got: got.to_string() })
        };
        if (vae.codec().in_channels, vae.codec().out_channels) != (3, 3) {
            let got = vae.codec().out_channels;
            return wrong(vae_name(folder), "in_channels, out_channels", "3, for RGB".into(), got);
        }
        let (width, key) = condition.width();
        if width != unet.context {
            let want = format!("the UNet's cross_attention_dim {}", unet.context);
            return wrong(condition.part(), key, want, width);
        }
        let z = vae.codec().latent_channels;
        if unet.out_channels != z {
            return wrong(
                "unet",
                "out_channels",
                format!("the autoencoder's latent_channels {z}"),
                unet.out_channels,
            );
        }
        let beside = match Beside::read(folder.class(), z, unet.in_channels) {
            Ok(beside) => beside,
            Err(want) => return wrong("unet", "in_channels", want, unet.in_channels),
        };
        Ok(Blueprint { condition, classes, unet, beside, vae, schedule, scheduler })
    }

    /// Width and height of a request's pictures, in pixels.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the nearest size that works.
    pub fn size(&self, r: &Request) -> Result<(usize, usize)> {
        let f = self.vae.codec().factor();
        let native = self.unet.sample_size.saturating_mul(f);
        let grown = |n: usize| n.saturating_mul(self.growth());
        let init = r.init.as_ref().map(|i| (grown(i.width), grown(i.height)));
        let (width, height) = (
            r.width.unwrap_or(init.map_or(native, |i| i.0)),
            r.height.unwrap_or(init.map_or(native, |i| i.1)),
        );
        let m = f * self.unet.multiple();
        if let (Some(picture), Some((w, h))) = (&r.init, init.filter(|&i| i != (width, height))) {
            let (small_w, small_h) = (picture.width, picture.height);
            return Err(Error::invalid(match self.growth() {
                1 => format!(
                    "size {width}x{height}: the initial picture is {w}x{h}; resize it, or leave out the size"
                ),
                _ => format!(
                    "size {width}x{height}: the picture of {small_w}x{small_h} becomes {w}x{h}; resize it, or leave out the size"
                ),
            }));
        }
        if width.max(height) > MAX_SIDE {
            return Err(Error::invalid(format!(
                "size {width}x{height}: want at most {MAX_SIDE} pixels on a side"
            )));
        }
        if width == 0 || height == 0 || width % m != 0 || height % m != 0 {
            let near = |n: usize| ((n + m / 2) / m).max(1) * m;
            if let (Some(picture), true) = (&r.init, self.growth() > 1) {
                let (m, [w, h]) = (self.unet.multiple(), [near(width), near(height)].map(|n| n / f));
                return Err(Error::invalid(format!(
                    "picture {}x{}: width and height must be multiples of {m} for this model to enlarge it; the nearest is {w}x{h}",
                    picture.width, picture.height
                )));
            }
            let advice =
                if r.init.is_some() { ": resize the initial picture, and the mask with it" } else { "" };
            return Err(Error::invalid(format!(
                "size {width}x{height}: width and height must be multiples of {m} for this model; the nearest is {}x{}{advice}",
                near(width),
                near(height)
            )));
        }
        Ok((width, height))
    }

    /// Checks that a request asks for what the model draws: a text, or one of its classes.
    ///
    /// # Errors
    /// [`Error::Invalid`] that says what would do.
    pub fn check_words(&self, r: &Request) -> Result<()> {
        match (&self.classes, &r.class) {
            (Some(classes), _) => classes.ids(r).map(drop),
            (None, None) if self.condition == Conditioner::Nothing => {
                let mut words = [&r.prompt, &r.negative].into_iter().chain(&r.prompts);
                match words.all(String::is_empty) {
                    true => Ok(()),
                    false => {
                        Err(Error::invalid("this model has no condition: want neither a prompt nor a class"))
                    }
                }
            }
            (None, Some(_)) if self.condition == Conditioner::Nothing => {
                Err(Error::invalid("this model has no condition: want neither a prompt nor a class"))
            }
            (None, Some(class)) => Err(Error::invalid(format!(
                "class: this model draws texts: want --prompt; got the class `{class}`"
            ))),
            (None, None) => Ok(()),
        }
    }

    /// Checks what can be known of a request before any weight is read: numbers, size, sampler and its steps.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the value and what would do.
    pub fn check(&self, r: &Request) -> Result<()> {
        if r.batch == 0 || r.batch > MAX_BATCH {
            return Err(Error::invalid(format!("batch size: want 1 to {MAX_BATCH}; got {}", r.batch)));
        }
        if !r.prompts.is_empty() && r.prompts.len() != r.batch {
            return Err(Error::invalid(format!(
                "prompts: want one for each of the {} pictures, or none; got {}",
                r.batch,
                r.prompts.len()
            )));
        }
        if !r.cfg_scale.is_finite() {
            return Err(Error::invalid(format!("guidance: want a finite number; got {}", r.cfg_scale)));
        }
        if r.clip_skip > self.condition.layers() {
            let (most, got) = (self.condition.layers() + 1, r.clip_skip.saturating_add(1));
            return Err(Error::invalid(format!(
                "clip skip: want 1 to {most}, by the text encoder's layers; got {got}"
            )));
        }
        if let Some(side) = r.vae_tile_size.filter(|side| !(MIN_TILE..=MAX_SIDE).contains(side)) {
            return Err(Error::invalid(format!(
                "tile size: want {MIN_TILE} to {MAX_SIDE} latents on a side; got {side}"
            )));
        }
        self.size(r)?;
        let (method, schedule) = self.choose(r)?;
        method.ladder(&schedule, r.steps, 0).map(|_| ())
    }

    /// Guidance of a request; 1, which is none, where there is no condition.
    pub(super) fn guidance(&self, r: &Request) -> f64 {
        if self.condition == Conditioner::Nothing { 1.0 } else { r.cfg_scale }
    }

    /// Height and width of a request's latents.
    ///
    /// # Errors
    /// As [`Blueprint::size`].
    pub fn latent_size(&self, r: &Request) -> Result<[usize; 2]> {
        let ((width, height), f) = (self.size(r)?, self.vae.codec().factor());
        Ok([height / f, width / f])
    }

    /// How the autoencoder takes a request's pictures: the tiles of rows and columns, one of each without tiling.
    pub(super) fn tiles(&self, r: &Request) -> Result<[Axis; 2]> {
        let codec = self.vae.codec();
        let native = (codec.sample_size / codec.factor()).max(MIN_TILE);
        let side = if r.vae_tiling { r.vae_tile_size.unwrap_or(native) } else { usize::MAX };
        Ok(self.latent_size(r)?.map(|length| Axis::new(length, side)))
    }

    /// The encoder's graph for a request's initial picture, or for one tile of it.
    pub(super) fn encode_graph(&self, r: &Request, dtype: DType) -> Result<Graph> {
        let ([rows, columns], f) = (self.tiles(r)?, self.vae.codec().factor());
        let size = [1, rows.tile * f, columns.tile * f];
        match &self.vae {
            Vae::Kl(vae) => vae.sample_graph(size, dtype),
            Vae::Vq(vq) => vq.encode_graph(size, dtype),
        }
    }

    /// The sampler of a request with its schedule.
    ///
    /// # Errors
    /// When neither the request nor the folder names one that there is.
    pub fn choose(&self, r: &Request) -> Result<(Method, ScheduleConfig)> {
        let (method, mut schedule) = self.named(r, self.schedule.clone())?;
        if r.eta != 0.0 && method != Method::Ddim {
            let got = method.name();
            return Err(Error::invalid(format!("eta: only the sampler ddim draws fresh noise; got {got}")));
        }
        schedule.eta = r.eta;
        Ok((method, schedule))
    }

    fn named(&self, r: &Request, mut schedule: ScheduleConfig) -> Result<(Method, ScheduleConfig)> {
        if let Some(choice) = &r.method {
            choice.apply(&mut schedule);
            return Ok((choice.method, schedule));
        }
        if self.scheduler == "PNDMScheduler" && schedule.skip_prk.is_none() {
            return Err(Error::invalid(
                "the checkpoint's PNDMScheduler does not say `skip_prk_steps`: diffusers would begin with Runge-Kutta \
                 steps, which are not supported; choose `--sampling-method plms` to go without, or another sampler",
            ));
        }
        let names = || Method::ALL.iter().map(|m| m.name()).collect::<Vec<_>>().join(", ");
        let method = self.scheduler.parse().map_err(|_| {
            Error::invalid(format!(
                "the checkpoint's scheduler {} is not supported; choose one with --sampling-method: {}",
                self.scheduler,
                names()
            ))
        })?;
        Ok((method, schedule))
    }

    /// The graph of one evaluation, the number of evaluations, and the settings that led to both.
    pub(super) fn evaluation(&self, r: &Request, dtype: DType) -> Result<(Graph, usize, Settings)> {
        self.check(r)?;
        let size = self.latent_size(r)?;
        let (method, schedule) = self.choose(r)?;
        let table = method.table(&method.ladder(&schedule, r.steps, 0)?)?;
        let (batch, tokens) = (r.batch, self.condition.tokens());
        let s = Settings { batch, size, tokens, guidance: self.guidance(r), known: self.blends(r), dtype };
        Ok((evaluation_graph(&self.unet, &table, &s)?, table.rows.len(), s))
    }

    /// The graph of one evaluation as text, fused and planned for a target.
    ///
    /// # Errors
    /// As [`Blueprint::estimate`].
    pub fn show(&self, r: &Request, dtype: DType, target: Target) -> Result<String> {
        Program::show(&self.evaluation(r, dtype)?.0, target)
    }
}

/// The scheduler of a folder: its class and settings.
pub(super) fn scheduler(folder: &ModelFolder) -> Result<(String, ScheduleConfig)> {
    let (component, name) = (folder.component("scheduler")?, "scheduler_config.json");
    let texts = folder.texts("scheduler")?;
    let mut schedule = ScheduleConfig::from_text(&texts.text(name)?, &texts.path(name))?;
    // diffusers' pipelines overrule old configurations in these, whatever they say.
    if folder.class() == "StableDiffusionInpaintPipeline" {
        schedule.steps_offset = Some(1);
        schedule.skip_prk = Some(true);
    } else if folder.class().starts_with("StableDiffusion") {
        schedule.steps_offset = Some(1);
        schedule.clip_sample = Some(false);
    }
    same_schedule(folder, &schedule)?;
    Ok((component.class.clone(), schedule))
}

/// A single file may carry the noise schedule that it was trained with: it must be the one that is told.
fn same_schedule(folder: &ModelFolder, schedule: &ScheduleConfig) -> Result<()> {
    let Some(there) = folder.alphas_cumprod()? else { return Ok(()) };
    let own = schedule.alphas_cumprod()?;
    // Of files in half precision, it is too.
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 2e-3 * b.abs() + 1e-4;
    if own.len() == there.len() && there.iter().zip(&own).all(near) {
        return Ok(());
    }
    let said = |all: &[f32]| format!("{} values down to {:.6}", all.len(), all.last().unwrap_or(&f32::NAN));
    Err(Error::Tensor {
        file: folder.path().into(),
        name: "alphas_cumprod".into(),
        want: format!(
            "the noise schedule of {}, {}",
            folder.texts("scheduler")?.place().display(),
            said(&own)
        ),
        got: format!("{}: give it as a folder, with the scheduler that it was trained for", said(&there)),
    })
}
