//! Runs of a latent diffusion model: Rombach et al. 2022, sections 3.2 and 3.3. The text encoder is trained with the UNet.

use super::export;
use super::frozen::FirstStage;
use super::grid::Tiles;
use super::latents::{Latents, draw, dropped};
use super::objective::Levels;
use super::run::{Task, Watch, note};
use super::settings::{DiffusionSettings, Settings};
use super::source::{Stream, Subject, drawing, normal};
use super::step::{Trainer, blocks, update};
use super::{initial, is_zero_module};
use crate::data::loader::Options;
use crate::error::{Error, Result};
use crate::exec::Device;
use crate::graph::{Graph, Var};
use crate::io::vocabulary;
use crate::io::{Config, ModelFolder, Tokenizer};
use crate::models::{ClipText, Model, UNet2DCondition};
use crate::ops::{Loss, cast};
use crate::pipeline::{Pipeline, Request};
use crate::tensor::{DType, HostTensor};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Parts of the graph of a step, as its parameters are called.
const UNET: &str = "unet";
const TEXT: &str = "text_encoder";

/// Inputs of a step: noisy latents (B,h,w,Z), timesteps (B), targets (B,h,w,Z), all f32; captions (B,T) i32; and weights (B)
/// of the pictures, f32.
#[derive(Clone, Copy, Debug)]
pub struct Noised {
    /// Noisy latents.
    pub x: Var,
    /// Timesteps.
    pub t: Var,
    /// Tokens of the captions.
    pub ids: Var,
    /// What the UNet should say.
    pub target: Var,
    /// Weights of the pictures.
    pub weights: Var,
}

/// The loss (1) f32 of a step of UNet and text encoder together. Their weights are called `unet.…` and `text_encoder.…`.
///
/// # Errors
/// When the sizes do not fit the models.
pub fn diffusion_loss(
    g: &mut Graph,
    (unet, text): (&UNet2DCondition, &ClipText),
    input: Noised,
    distance: crate::ops::Distance,
    dtype: DType,
) -> Result<Var> {
    g.part(TEXT);
    let context = text.build(g, input.ids, dtype)?.last;
    g.part(UNET);
    let x = cast(g, "x", input.x, dtype, 1.0)?;
    let y = unet.build(g, x, (input.t, None), context)?;
    g.part("");
    g.push("loss", Loss(distance), &[y, input.target, input.weights])
}

/// A run under way.
pub(super) struct Diffusion {
    settings: Settings,
    own: DiffusionSettings,
    text: ClipText,
    text_config: Value,
    words: PathBuf,
    tokenizer: Tokenizer,
    empty: Vec<i32>,
    latents: Latents,
    levels: Levels,
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
        let subject = Subject::open(&s.data)?;
        let stage = own.first.fingerprint()?;
        if step > 0 && note::<String>(notes, "first_stage")? != stage {
            let path = own.first.path.display();
            return Err(Error::invalid(format!(
                "{path}: want the first stage that the run began with; its weights have changed since"
            )));
        }
        let words = folder.join("tokenizer");
        let positions = own.text_config["max_position_embeddings"].as_u64().unwrap_or(77) as usize;
        if !words.join("tokenizer_config.json").is_file() {
            let captions = subject.captions();
            if captions.iter().all(String::is_empty) {
                watch.say("the pictures have no captions: the model will make pictures like them, whatever the prompt");
            }
            export::folder(&words)?;
            vocabulary::learn(&captions, own.vocabulary)?.write(&words, positions)?;
        }
        let tokenizer = Tokenizer::open(&words)?;
        let room = tokenizer.max_length() - 2;
        let long = |caption: &String| tokenizer.encode(caption).is_ok_and(|e| e.tokens > room);
        let cut = subject.captions().iter().filter(|c| long(c)).count();
        if cut > 0 {
            watch.say(&format!(
                "{cut} captions have more than {room} tokens and are cut (model.text_encoder.max_position_embeddings)"
            ));
        }
        let size = tokenizer.vocab_size();
        let mut text_config = own.text_config.clone();
        for (key, value) in [
            ("vocab_size", size),
            ("bos_token_id", tokenizer.bos() as usize),
            ("eos_token_id", tokenizer.eos() as usize),
            ("pad_token_id", tokenizer.pad() as usize),
        ] {
            text_config[key] = json!(value);
        }
        let text =
            ClipText::from_config(&Config::from_value(words.join("config.json"), text_config.clone())?)?;
        let options =
            Options { batch: s.pictures(), seed: s.seed, threads: s.data.threads, ..Options::default() };
        let mut latents = match own.cache && s.data.is_fixed() {
            false => Latents::live(&subject, options, step, (&own.first, s.batch), device)?,
            true => {
                let file = folder.join("latents.safetensors");
                Latents::kept(
                    &subject,
                    options,
                    (&own.first, s.batch, &stage),
                    (&file, &tokenizer),
                    device,
                    watch,
                )?
            }
        };
        let scale = match own.first.scaling_factor {
            Some(scale) => scale,
            None if step > 0 => note(notes, "scaling_factor")?,
            None => {
                let said = latents.next(0, &tokenizer)?;
                // The first step takes this batch again.
                if matches!(latents, Latents::Live { .. }) {
                    latents = Latents::live(&subject, options, 0, (&own.first, s.batch), device)?;
                }
                1.0 / deviation(&draw(&own.first, &said.moments, s.seed, 0))
            }
        };
        watch.say(&format!("latents are multiplied by {scale:.5}; {size} tokens"));
        let empty = tokenizer.encode("")?.ids;
        let levels = Levels::new(&own.schedule)?;
        let (settings, own) = (s.clone(), own.clone());
        Ok(Diffusion {
            settings,
            own,
            text,
            text_config,
            words,
            tokenizer,
            empty,
            latents,
            levels,
            scale,
            stage,
        })
    }

    fn first(&self) -> &FirstStage {
        &self.own.first
    }

    /// Of the latents of a batch, or of a step.
    fn shape(&self, batch: usize) -> [usize; 4] {
        let side = self.settings.data.size / self.first().factor();
        [batch, side, side, self.first().channels()]
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
        let (b, mut g) = (self.settings.batch, Graph::new());
        g.train(true);
        let input = Noised {
            x: g.input("x", DType::F32, self.shape(b)),
            t: g.input("t", DType::F32, [b]),
            ids: g.input("ids", DType::I32, [b, self.tokenizer.max_length()]),
            target: g.input("target", DType::F32, self.shape(b)),
            weights: g.input("weights", DType::F32, [b]),
        };
        let models = (&self.own.unet, &self.text);
        let loss = diffusion_loss(&mut g, models, input, self.own.objective.distance, self.settings.dtype)?;
        let again = if self.settings.recompute { blocks(&g) } else { vec![] };
        update(&mut g, loss, &self.settings.optimiser, &again)?;
        Ok(g)
    }

    fn begin(&mut self, trainer: &mut Trainer) -> Result<()> {
        let zero = |name: &str| name.strip_prefix(UNET).is_some_and(|name| is_zero_module(&name[1..]));
        let parameters = trainer.parameters();
        let values = initial(&parameters, zero, self.settings.seed)?;
        parameters.iter().zip(&values).try_for_each(|((name, _), value)| trainer.set(name, value))
    }

    fn inputs(&mut self, step: usize) -> Result<Vec<(&'static str, HostTensor)>> {
        let (seed, b) = (self.settings.seed, self.settings.pictures());
        let shape = self.shape(b);
        let said = self.latents.next(step, &self.tokenizer)?;
        let z: Vec<f32> = draw(self.first(), &said.moments, seed, step);
        let z: Vec<f32> = z.into_iter().map(|v| (f64::from(v) * self.scale) as f32).collect();
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
        let drops = dropped(seed, step, self.own.drop, b);
        let ids = said.ids.iter().zip(drops).flat_map(|(ids, drop)| if drop { &self.empty } else { ids });
        let ids = ids.copied().collect();
        Ok(vec![
            ("x", HostTensor::f32(shape, x)?),
            ("t", HostTensor::f32([b], times)?),
            ("ids", HostTensor::i32([b, self.tokenizer.max_length()], ids)?),
            ("target", HostTensor::f32(shape, target)?),
            ("weights", HostTensor::f32([b], weights)?),
        ])
    }

    fn waited(&self) -> Duration {
        self.latents.waited()
    }

    fn skipped(&self) -> Vec<String> {
        self.latents.skipped()
    }

    fn notes(&self) -> Vec<(String, String)> {
        vec![("scaling_factor".into(), self.scale.to_string()), ("first_stage".into(), self.stage.clone())]
    }

    fn export(&self, trainer: &Trainer, folder: &Path) -> Result<()> {
        let s = &self.settings;
        let at = |name: &str| folder.join(name);
        export::component(&at("unet"), "diffusion_pytorch_model", &self.own.unet_config, trainer, UNET, s)?;
        export::component(&at("text_encoder"), "model", &self.text_config, trainer, TEXT, s)?;
        let mut vae = self.first().config.clone();
        vae["scaling_factor"] = json!(self.scale);
        export::copied(&self.first().path, &at("vae"), &vae, s.export)?;
        for name in ["tokenizer", "scheduler"] {
            export::folder(&at(name))?;
        }
        vocabulary::copy(&self.words, &at("tokenizer"))?;
        export::json(&at("scheduler").join("scheduler_config.json"), &self.own.schedule_config)?;
        let index = json!({
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [null, null],
            "image_encoder": [null, null],
            "requires_safety_checker": false,
            "safety_checker": [null, null],
            "scheduler": ["diffusers", self.own.schedule_config["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", self.first().class],
        });
        export::json(&at("model_index.json"), &index)
    }

    /// A picture of each prompt, made as `ldm sample` makes it from the export.
    fn grid(&self, _: &Trainer, folder: &Path, device: &Device) -> Result<Tiles> {
        let how = &self.settings.sample;
        let pipeline = Pipeline::open(&ModelFolder::open(folder)?, device, Some(DType::F32))?;
        let mut pictures = vec![];
        for (i, prompt) in how.prompts.iter().enumerate() {
            let request = Request {
                prompt: prompt.clone(),
                steps: how.steps,
                cfg_scale: how.guidance,
                seed: self.settings.seed + i as u64,
                ..Request::default()
            };
            pictures.extend(pipeline.generate(&request, &mut ())?);
        }
        let (width, height) = pictures.first().map_or((1, 1), |p| (p.width, p.height));
        let pictures = pictures.into_iter().map(|p| p.rgb).collect();
        Ok(Tiles { columns: 4, width, height, pictures })
    }
}
