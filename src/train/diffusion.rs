//! Runs of a latent diffusion model: Rombach et al. 2022, sections 3.2 and 3.3. The text encoder, or the table of
//! classes, is trained with the UNet, unless it is given and stays as it is, or there is none.

use super::concat::{Concatenated, Paired, joined, scaled};
use super::condition::Condition;
use super::export;
use super::frozen::FirstStage;
use super::grid::Tiles;
use super::latents::{Latents, drawn, dropped};
use super::memory::{Beside, Load, image, loaded};
use super::objective::Levels;
use super::run::{Task, Watch, note};
use super::settings::{DiffusionSettings, Settings};
use super::shown::Shown;
use super::source::{Stream, Subject, drawing, normal};
use super::step::{Trainer, blocks, update};
use super::{initial, is_zero_module};
use crate::data::loader::Options;
use crate::data::source::Sample;
use crate::error::{Error, Result};
use crate::exec::{Device, Target};
use crate::graph::{Graph, Var};
use crate::io::ModelFolder;
use crate::models::{Conditioner, UNet2DCondition};
use crate::ops::{Loss, cast};
use crate::pipeline::{Blueprint, Pipeline, Request, Residency};
use crate::tensor::{DType, HostTensor};
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

/// The UNet's part of the graph of a step, as its parameters are called.
const UNET: &str = "unet";

/// Inputs of a step: noisy latents with the channels that condition beside them (B,h,w,Z + X), timesteps (B), targets (B,h,w,Z), all f32; ids of
/// captions or classes (B,T) i32, or a context; and weights (B) of the pictures, f32.
#[derive(Clone, Copy, Debug)]
pub struct Noised {
    /// Noisy latents, and after them what [`super::Concatenated`] says.
    pub x: Var,
    /// Timesteps.
    pub t: Var,
    /// Tokens of the captions, or classes; where no conditioner is trained, the context itself (B,T,E) f32, or none.
    pub condition: Option<Var>,
    /// What the UNet should say.
    pub target: Var,
    /// Weights of the pictures.
    pub weights: Var,
}

/// The loss (1) f32 of a step of UNet and conditioner together, or of the UNet alone. Their weights are called `unet.…` and, after
/// [`Conditioner::part`], `text_encoder.…`.
///
/// # Errors
/// When the sizes do not fit the models.
pub fn diffusion_loss(
    g: &mut Graph,
    (unet, conditioner): (&UNet2DCondition, Option<&Conditioner>),
    input: Noised,
    distance: crate::ops::Distance,
    dtype: DType,
) -> Result<Var> {
    let context = match (conditioner, input.condition) {
        (Some(conditioner), Some(ids)) => {
            g.part(conditioner.part());
            Some(conditioner.build(g, ids, dtype)?)
        }
        (_, Some(context)) => Some(cast(g, "context", context, dtype, 1.0)?),
        (_, None) => None,
    };
    g.part(UNET);
    let x = cast(g, "x", input.x, dtype, 1.0)?;
    let y = unet.body(g, x, (input.t, None), context)?;
    g.part("");
    g.push("loss", Loss(distance), &[y, input.target, input.weights])
}

/// A run under way.
pub(super) struct Diffusion {
    settings: Settings,
    own: DiffusionSettings,
    condition: Condition,
    latents: Latents,
    levels: Levels,
    pictures: Paired,
    /// Factor of the latents.
    scale: f64,
    /// What tells the first stage from others.
    stage: String,
}

impl Diffusion {
    /// Prepares what steps from `step` on need: the vocabulary, the latents, and their scale, which `notes` of a checkpoint hold.
    pub(super) fn start(
        s: &Settings,
        own: &DiffusionSettings,
        folder: &Path,
        (step, notes): (usize, &HashMap<String, String>),
        device: &Device,
        watch: &mut dyn Watch,
    ) -> Result<Diffusion> {
        let (subject, factor) = (Subject::open(&s.data)?, own.first.factor());
        let pictures = Paired { subject, kind: own.concat, factor };
        let subject = &pictures.subject;
        let stage = own.first.fingerprint()?;
        if step > 0 && note::<String>(notes, "first_stage")? != stage {
            let path = own.first.path.display();
            return Err(Error::invalid(format!(
                "{path}: want the first stage that the run began with; its weights have changed since"
            )));
        }
        let condition = Condition::start(&own.condition, subject, (folder, s.batch), notes, device, watch)?;
        condition.check(&s.sample.prompts)?;
        let options =
            Options { batch: s.pictures(), seed: s.seed, threads: s.data.threads, ..Options::default() };
        let mut latents = match own.cache && s.data.is_fixed() {
            false => Latents::live(&pictures, options, step, (&own.first, s.batch), device)?,
            true => {
                let file = folder.join("latents.safetensors");
                let first = (&own.first, s.batch, &stage[..]);
                Latents::kept(&pictures, options, first, (&file, &condition), device, watch)?
            }
        };
        let scale = match own.first.scaling_factor {
            Some(scale) => scale,
            None if step > 0 => note(notes, "scaling_factor")?,
            None => {
                let said = latents.next(0, &condition)?;
                // The first step takes this batch again.
                if matches!(latents, Latents::Live { .. }) {
                    latents = Latents::live(&pictures, options, 0, (&own.first, s.batch), device)?;
                }
                1.0 / deviation(&drawn(&own.first, &said.moments, (s.seed, 0, Stream::Latent)))
            }
        };
        let beside = own.concat.map_or("", Concatenated::described);
        watch.say(&format!("latents are multiplied by {scale:.5}; {}{beside}", condition.describe()));
        if let Some(kind) = own.concat {
            let z = own.first.channels();
            let why = match kind.pipeline(own.unet.context) {
                None => Some("it has no pipeline with a mask and no other condition".to_string()),
                Some((class, wants)) if wants != z => {
                    Some(format!("its {class} wants latents of {wants} channels, these have {z}"))
                }
                Some(_) => None,
            };
            why.iter().for_each(|why| {
                watch.say(&format!("diffusers' own pipelines will not run the export: {why}"))
            });
        }
        let levels = Levels::new(&own.schedule)?;
        let (settings, own) = (s.clone(), own.clone());
        Ok(Diffusion { settings, own, condition, latents, levels, pictures, scale, stage })
    }

    fn first(&self) -> &FirstStage {
        &self.own.first
    }

    /// Of the latents of a batch, or of a step.
    fn shape(&self, batch: usize) -> [usize; 4] {
        let side = self.settings.data.size / self.first().factor();
        [batch, side, side, self.first().channels()]
    }

    /// Of the UNet's input.
    fn wide(&self, batch: usize) -> [usize; 4] {
        let [b, h, w, _] = self.shape(batch);
        [b, h, w, self.own.unet.in_channels]
    }
}

/// Of all elements, as torch has it.
fn deviation(x: &[f32]) -> f64 {
    let n = x.len() as f64;
    let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let square = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>();
    (square / (n - 1.0).max(1.0)).sqrt().max(1e-12)
}

impl Task for Diffusion {
    fn graph(&self) -> Result<Graph> {
        let (b, t, mut g) = (self.settings.batch, self.condition.length(), Graph::new());
        g.train(true);
        let input = Noised {
            x: g.input("x", DType::F32, self.wide(b)),
            t: g.input("t", DType::F32, [b]),
            condition: match self.condition.trained() {
                Some(_) => Some(g.input("ids", DType::I32, [b, t])),
                None if t == 0 => None,
                None => Some(g.input("context", DType::F32, [b, t, self.own.unet.context])),
            },
            target: g.input("target", DType::F32, self.shape(b)),
            weights: g.input("weights", DType::F32, [b]),
        };
        let models = (&self.own.unet, self.condition.trained());
        let loss = diffusion_loss(&mut g, models, input, self.own.objective.distance, self.settings.dtype)?;
        let again = if self.settings.recompute { blocks(&g) } else { vec![] };
        update(&mut g, loss, &self.settings.optimiser, &again)?;
        Ok(g)
    }

    fn beside(&self, target: Target) -> Result<Beside> {
        let (s, first) = (&self.settings, self.first());
        let (n, side, float) = (s.pictures(), s.data.size, size_of::<f32>());
        let [words, listening] = self.condition.memory(s.batch, target)?;
        let [opening, encoder, encoding] = first.encoder_memory(s.batch, side, target)?;
        let moments = |n: usize| n * (side / first.factor()).pow(2) * first.moments() * float;
        // What the channels beside the latents are made from: a mask, a value for each pixel, or a small picture.
        let more = |n: usize| match self.own.concat {
            Some(Concatenated::Mask) => n * side * side * float,
            Some(Concatenated::LowResolution) => n * 3 * (side / first.factor()).pow(2) * float,
            None => 0,
        };
        let (before, latents, asking) = match &self.latents {
            Latents::Live { .. } => {
                // Twice, where the scale is measured on the batch that the first step takes again.
                let ahead = Load::host(loaded(n, side) + loaded(n, side) / image(1, side) * more(1));
                let twice = opening.and(encoder).and(encoding).and(ahead).and(ahead);
                // Pictures, and with masks once more without what these cover.
                let covered = if self.own.concat == Some(Concatenated::Mask) { image(n, side) } else { 0 };
                let given = Load::host(image(n, side) + more(n) + covered);
                (("the first stage", twice), encoder.and(ahead), encoding.and(given))
            }
            Latents::Kept { ids, .. } => {
                // All that is said; then it is in the file, which is mapped. Ids have a vector each, and a copy on the way.
                let each =
                    moments(1) + self.condition.length() * size_of::<i32>() + 2 * size_of::<Vec<i32>>();
                let all = Load::host(ids.len() * (each + more(1)));
                let made = opening.and(encoding).and(all).and(all).and(Load::host(3 * image(n, side)));
                (("the latents of all pictures", made), all, Load::default())
            }
        };
        let latent = self.shape(n).iter().product::<usize>() * float;
        let context = n * self.condition.length() * self.own.unet.context * float;
        // Draw, noise, offset, noisy latents, targets, and the rows of a batch; of contexts two.
        let wide = self.wide(n).iter().product::<usize>() * float;
        let own = Load::host(2 * moments(n) + 8 * latent + 3 * (wide - latent) + 2 * context);
        let blueprint = Blueprint {
            condition: self.condition.model.clone(),
            classes: None,
            unet: self.own.unet.clone(),
            beside: self.own.concat.map(Concatenated::beside).unwrap_or_default(),
            vae: first.vae.clone(),
            schedule: self.own.schedule.clone(),
            scheduler: self.own.schedule_config["_class_name"].as_str().unwrap_or_default().into(),
        };
        let r = Request { steps: s.sample.steps, cfg_scale: s.sample.guidance, ..Request::default() };
        // Of what such a picture is made from only the size counts.
        let r = match self.own.concat {
            Some(kind) => kind.asked(r, &Sample::default(), [side, first.factor()]),
            None => r,
        };
        // Where none can be drawn, the run says so when it comes to it, and goes on.
        let drawn = blueprint.estimate(&r, DType::F32, Residency::Always, target);
        let drawn = drawn.map_or(0, |e| e.beyond_process(target));
        // With a tokenizer of its own.
        let pictures = Load { device: drawn, host: words.host };
        Ok(Beside {
            before: Some((before.0, before.1.and(words))),
            held: words.and(latents).and(own),
            // One after the other.
            asking: Load {
                device: listening.device.max(asking.device),
                host: listening.host.max(asking.host),
            },
            // The first stage is written in one piece, from a file that is mapped.
            export: Load::host(3 * first.vae.inventory(DType::F32)?.bytes()),
            pictures,
        })
    }

    fn begin(&mut self, trainer: &mut Trainer) -> Result<()> {
        // Attention between pixels ends in a layer that starts at zero too; in transformers it is another layer.
        let alone = self.own.unet.context == 0;
        let way_out = |name: &str| alone && name.contains(".attentions.") && name.contains(".to_out.0.");
        let zero = |name: &str| {
            name.strip_prefix(UNET).is_some_and(|name| is_zero_module(&name[1..]) || way_out(name))
        };
        let parameters = trainer.parameters();
        let values = initial(&parameters, zero, self.settings.seed)?;
        parameters.iter().zip(&values).try_for_each(|((name, _), value)| trainer.set(name, value))?;
        let given = self.condition.begin()?;
        given.iter().try_for_each(|(name, value)| trainer.set(name, value))
    }

    fn inputs(&mut self, step: usize) -> Result<Vec<(&'static str, HostTensor)>> {
        let (seed, b) = (self.settings.seed, self.settings.pictures());
        let shape = self.shape(b);
        let said = self.latents.next(step, &self.condition)?;
        let z = scaled(&drawn(self.first(), &said.moments, (seed, step, Stream::Latent)), self.scale);
        let (n, c) = (z.len() / b, shape[3]);
        let mut noise = normal(seed, step, Stream::Noise, z.len());
        let objective = self.own.objective;
        if objective.noise_offset > 0.0 {
            let offset = normal(seed, step, Stream::Offset, b * c);
            for (i, v) in noise.iter_mut().enumerate() {
                *v += objective.noise_offset as f32 * offset[i / n * c + i % c];
            }
        }
        let mut draw = drawing(seed, step, Stream::Time);
        let (mut x, mut target, mut times, mut weights) = (vec![], vec![], vec![], vec![]);
        for i in 0..b {
            let t = draw.below(self.levels.count());
            let own = i * n..(i + 1) * n;
            let (noisy, wanted) = objective.pair(&self.levels, t, &z[own.clone()], &noise[own]);
            x.extend(noisy);
            target.extend(wanted);
            times.push(t as f32);
            weights.push(objective.weight(&self.levels, t) as f32);
        }
        let masked = |moments: &[f32]| Ok(drawn(self.first(), moments, (seed, step, Stream::Masked)));
        if let Some(more) = said.channels.with(c, self.scale, masked)? {
            x = joined((&x, c), (&more, self.own.unet.in_channels - c));
        }
        let drops = dropped(seed, step, self.own.drop, b);
        let nothing = &self.condition.nothing;
        let ids = said.ids.iter().zip(drops).flat_map(|(ids, drop)| if drop { nothing } else { ids });
        let condition = self.condition.input(ids.copied().collect())?;
        let all = [
            ("x", HostTensor::f32(self.wide(b), x)?),
            ("t", HostTensor::f32([b], times)?),
            ("target", HostTensor::f32(shape, target)?),
            ("weights", HostTensor::f32([b], weights)?),
        ];
        Ok(all.into_iter().chain(condition).collect())
    }

    fn waited(&self) -> Duration {
        self.latents.waited()
    }

    fn skipped(&self) -> Vec<String> {
        self.latents.skipped()
    }

    fn notes(&self) -> Vec<(String, String)> {
        let scale = self.scale.to_string();
        let own = [("scaling_factor".to_string(), scale), ("first_stage".to_string(), self.stage.clone())];
        own.into_iter().chain(self.condition.notes().iter().cloned()).collect()
    }

    fn export(&self, trainer: &Trainer, folder: &Path) -> Result<()> {
        let s = &self.settings;
        let at = |name: &str| folder.join(name);
        export::component(&at("unet"), "diffusion_pytorch_model", &self.own.unet_config, trainer, UNET, s)?;
        self.condition.export(trainer, folder, s)?;
        let (mut vae, name) = (self.first().config.clone(), self.condition.vae());
        // That pipeline knows no factor of the latents: it is in the autoencoder's weights.
        let folded = self.own.concat == Some(Concatenated::LowResolution);
        vae["scaling_factor"] = json!(if folded { 1.0 } else { self.scale });
        let factor = if folded { self.scale } else { 1.0 };
        let change = self.first().folded(factor)?;
        let to = (&*at(name), "diffusion_pytorch_model");
        export::copied(&self.first().checkpoint()?, to, &vae, s.export, change)?;
        export::folder(&at("scheduler"))?;
        export::json(&at("scheduler").join("scheduler_config.json"), &self.own.schedule_config)?;
        let mut index = self.condition.index();
        // Without such a pipeline, the parts are those of one without a mask.
        if let Some((class, _)) = self.own.concat.and_then(|kind| kind.pipeline(self.own.unet.context)) {
            index["_class_name"] = json!(class);
            // diffusers loads no inpainting pipeline that does not say which version's form it has.
            index["_diffusers_version"] = json!("0.37.1");
        }
        index["scheduler"] = json!(["diffusers", self.own.schedule_config["_class_name"]]);
        index["unet"] = json!(["diffusers", self.own.unet_config["_class_name"]]);
        index[name] = json!(["diffusers", self.first().class]);
        export::json(&at("model_index.json"), &index)
    }

    /// A picture of each prompt or class, made as `ldm sample` makes it from the export; or pictures of the data, made anew.
    fn grid(&self, _: &Trainer, folder: &Path, device: &Device) -> Result<Tiles> {
        if self.own.concat.is_some() {
            return Shown { settings: &self.settings, condition: &self.condition, pictures: &self.pictures }
                .tiles(folder, device);
        }
        let how = &self.settings.sample;
        let pipeline = Pipeline::open(&ModelFolder::open(folder)?, device, Some(DType::F32))?;
        let mut pictures = vec![];
        for (i, what) in self.condition.requests(&how.prompts).into_iter().enumerate() {
            let request = Request {
                steps: how.steps,
                cfg_scale: how.guidance,
                seed: self.settings.seed + i as u64,
                ..what
            };
            pictures.extend(pipeline.generate(&request, &mut ())?);
        }
        let (width, height) = pictures.first().map_or((1, 1), |p| (p.width, p.height));
        let pictures = pictures.into_iter().map(|p| p.rgb).collect();
        Ok(Tiles { columns: 4, width, height, pictures })
    }
}
