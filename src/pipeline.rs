//! From a prompt to a picture: text encoder, sampling, decoder, with the checkpoint of a diffusers folder.

mod begin;
mod beside;
mod blueprint;
mod classes;
mod convert;
mod memory;
mod parts;
mod random;
mod request;
mod residency;
mod tiles;
pub mod verify;

pub use beside::Beside;
pub use blueprint::{Blueprint, Vae};
pub use classes::Classes;
pub use convert::{Converted, convert};
pub use memory::{Estimate, Stage};
pub use parts::{Parts, random_weights};
pub use request::{Init, Mask, Observer, Picture, Request};
pub use residency::{Residency, load, upload};

use crate::diffusion::{Sampling, Settings};
use crate::error::{Error, Result};
use crate::exec::{Device, Graph, Program, check_finite, human_bytes};
use crate::io::{Encoded, ModelFolder, Tokenizer};
use crate::models::load::stored_type;
use crate::models::{Conditioner, Inventory, Source};
use crate::samplers::skipped;
use crate::tensor::{DType, HostTensor};
use blueprint::vae_name;
use residency::Part;
use std::path::Path;
use tiles::Port;

/// A pipeline: everything that a diffusers folder holds, ready on a device.
pub struct Pipeline {
    blueprint: Blueprint,
    device: Device,
    dtype: DType,
    /// Of a model that takes texts.
    tokenizer: Option<Tokenizer>,
    residency: Residency,
    /// Where there is a context.
    condition: Option<Part>,
    unet: Part,
    vae: Part,
    bytes: usize,
}

impl Pipeline {
    /// Loads a diffusers folder, to stay. Without a type, that of the UNet's file on a GPU and f32 on a CPU.
    ///
    /// # Errors
    /// When the folder, a configuration or a tensor is not what it should be; nothing is guessed.
    pub fn open(folder: &ModelFolder, device: &Device, dtype: Option<DType>) -> Result<Pipeline> {
        Pipeline::open_with(folder, device, dtype, Residency::Always)
    }

    /// [`Pipeline::open`], with a choice of how long weights stay.
    ///
    /// # Errors
    /// As there.
    pub fn open_with(
        folder: &ModelFolder,
        device: &Device,
        dtype: Option<DType>,
        residency: Residency,
    ) -> Result<Pipeline> {
        let blueprint = Blueprint::read(folder)?;
        let dtype = Self::compute_type(folder, device, dtype)?;
        let tokenizer = match &blueprint.condition {
            Conditioner::Class(_) | Conditioner::Nothing => None,
            Conditioner::Clip(_) | Conditioner::Bert(_) => {
                let path = &folder.component("tokenizer")?.path;
                Some(tokenizer_for(folder.tokenizer("tokenizer")?, path, &blueprint.condition)?)
            }
        };
        // All headers, before any work.
        let condition = match &blueprint.condition {
            Conditioner::Nothing => None,
            model => {
                let inventory = Inventory::of(&model.inventory(dtype)?);
                Some(Source::new(folder.checkpoint(model.part())?, &inventory)?)
            }
        };
        let unet = Part::source(folder, "unet", &blueprint.unet, dtype)?;
        let vae = match &blueprint.vae {
            Vae::Kl(model) => Part::source(folder, vae_name(folder), model, dtype)?,
            Vae::Vq(model) => Part::source(folder, vae_name(folder), model, dtype)?,
        };
        if residency == Residency::Staged {
            // What is read last would otherwise spoil the work of all before it.
            vae.check()?;
        }
        Ok(Pipeline {
            bytes: blueprint.weight_bytes(dtype)?,
            device: device.clone(),
            dtype,
            tokenizer,
            residency,
            condition: condition.map(|source| Part::new(source, device, residency)).transpose()?,
            unet: Part::new(unet, device, residency)?,
            vae: Part::new(vae, device, residency)?,
            blueprint,
        })
    }

    /// The type to compute in: the one asked for, else that of the UNet's file on a GPU and f32 on a CPU.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn compute_type(folder: &ModelFolder, device: &Device, dtype: Option<DType>) -> Result<DType> {
        match (dtype, device) {
            (Some(dtype), _) => Ok(dtype),
            (None, Device::Cpu) => Ok(DType::F32),
            (None, Device::Cuda(_)) => Ok(stored_type(&folder.checkpoint("unet")?)),
        }
    }

    /// The models and settings, without weights.
    pub fn blueprint(&self) -> &Blueprint {
        &self.blueprint
    }

    /// Type of weights and activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of all weights, whether they are on the device now or only while their stage runs.
    pub fn weight_bytes(&self) -> usize {
        self.bytes
    }

    /// Makes the pictures.
    ///
    /// # Errors
    /// For a request that cannot be met, a device that fails, or values that are not finite.
    pub fn generate(&self, r: &Request, observer: &mut dyn Observer) -> Result<Vec<Picture>> {
        self.blueprint.check_words(r)?;
        self.blueprint.check_pictures(r)?;
        self.blueprint.check_memory(r, self.dtype, &self.device, self.residency, true)?;
        let size = self.blueprint.latent_size(r)?;
        let unet = &self.blueprint.unet;
        let (method, schedule) = self.blueprint.choose(r)?;
        let strength =
            r.init.as_ref().filter(|_| self.blueprint.beside != Beside::Picture).map(|i| i.strength);
        let skip = strength.map_or(0, |strength| skipped(r.steps, strength));
        if skip >= r.steps {
            let least = 1.0 / r.steps as f64;
            return Err(Error::invalid(format!("strength: with {} steps want at least {least:.3}", r.steps)));
        }
        let ladder = method.ladder(&schedule, r.steps, skip)?;

        let context = self.context(r, observer)?;
        let tokens = context.as_ref().map_or(0, |context| context.shape()[1]);
        let guidance = self.blueprint.guidance(r);
        let known = self.blueprint.blends(r);
        let settings = Settings { batch: r.batch, size, tokens, guidance, known, dtype: self.dtype };
        if r.mask.as_ref().is_some_and(Mask::is_empty) {
            observer.warning("the mask has no white: nothing is drawn anew");
        }
        let begin = self.begin(r, &method.table(&ladder)?, &ladder, observer)?;

        let latents = {
            if self.unet.is_staged() {
                observer.stage("loading")?;
            }
            let weights = self.unet.weights(&self.device, None)?;
            observer.stage("sampling")?;
            let mut run = Sampling::new(unet, &weights, &self.device, (method, &ladder), settings)?;
            if let Some(context) = &context {
                run.set_context(context)?;
            }
            if let Some(beside) = &begin.beside {
                run.set_condition(beside)?;
            }
            if let Some([mask, clean, hidden]) = &begin.known {
                run.set_known(mask, clean, hidden)?;
            }
            run.start(&begin.state)?;
            if run.noises() > 0 {
                run.set_noise(&begin.noises)?;
            }
            drop(begin);
            let (mut more, mut told) = (true, 0);
            while more {
                more = run.step()?;
                for k in told..run.finished() {
                    observer.step(k + 1, run.evaluations())?;
                }
                told = run.finished();
            }
            run.state()?
        };
        let mut pictures = self.pictures(r, &latents, observer)?;
        if let (Some(mask), Some(init)) = (r.mask.as_ref().filter(|mask| mask.composite), &r.init) {
            pictures.iter_mut().try_for_each(|picture| mask.composite(&init.rgb, &mut picture.rgb))?;
        }
        Ok(pictures)
    }

    /// The program of a part's graph, with its weights; then the stage begins.
    fn program(
        &self,
        part: &Part,
        graph: Graph,
        stage: &str,
        observer: &mut dyn Observer,
    ) -> Result<Program> {
        if part.is_staged() {
            observer.stage("loading")?;
        }
        let weights = part.weights(&self.device, Some(&graph))?;
        observer.stage(stage)?;
        Program::new(graph, &weights, &self.device)
    }

    fn encode_prompt(
        tokenizer: &Tokenizer,
        what: &str,
        prompt: &str,
        observer: &mut dyn Observer,
    ) -> Result<Encoded> {
        let encoded = tokenizer.encode(prompt)?;
        if let Some(cut) = &encoded.cut {
            let (max, n) = (tokenizer.max_length() - 2, encoded.tokens);
            observer.warning(&format!(
                "the {what} has {n} tokens, the model takes {max}; this was cut off: {cut}"
            ));
        }
        Ok(encoded)
    }

    /// The context of a request, (copies·B,S,E) f32: with guidance of the negative prompt, or of the null class, first. `None`
    /// where the model has none.
    fn context(&self, r: &Request, observer: &mut dyn Observer) -> Result<Option<HostTensor>> {
        let copies = 1 + (r.cfg_scale > 1.0) as usize;
        let ids: Vec<Vec<i32>> = match (&self.tokenizer, &self.blueprint.classes) {
            (Some(tokenizer), _) => {
                let mut encode =
                    |what: &str, text: &String| Ok(Self::encode_prompt(tokenizer, what, text, observer)?.ids);
                let negative = (copies == 2).then(|| encode("negative prompt", &r.negative)).transpose()?;
                let own = if r.prompts.is_empty() { std::slice::from_ref(&r.prompt) } else { &r.prompts[..] };
                let own = own.iter().map(|text| encode("prompt", text)).collect::<Result<Vec<_>>>()?;
                negative.into_iter().chain(own).collect()
            }
            (None, Some(classes)) => classes.ids(r)?.into_iter().map(|id| vec![id]).collect(),
            (None, None) => return Ok(None),
        };
        if ids.len() == copies {
            return repeat(&self.encode_text(&ids.concat(), copies, r.clip_skip, observer)?, r.batch)
                .map(Some);
        }
        // One row at a time: the memory of a request counts no more than two.
        let tokens = ids[0].len();
        let mut program = self.text_program(1, tokens, r.clip_skip, observer)?;
        let mut rows = vec![];
        for ids in ids {
            program.write("ids", &HostTensor::i32([1, tokens], ids)?)?;
            rows.push(finite(&mut program, "context", self.blueprint.condition.part())?.to_f32());
        }
        let positive = rows.split_off(copies - 1);
        let negative = rows.iter().cycle().take(rows.len() * r.batch);
        let shape = [copies * r.batch, tokens, positive[0].len() / tokens];
        HostTensor::f32(shape, negative.chain(&positive).flatten().copied().collect()).map(Some)
    }

    /// ids (rows·T) to the hidden states (rows,T,E) f32.
    fn encode_text(
        &self,
        ids: &[i32],
        rows: usize,
        skip: usize,
        observer: &mut dyn Observer,
    ) -> Result<HostTensor> {
        let tokens = ids.len() / rows;
        let mut program = self.text_program(rows, tokens, skip, observer)?;
        program.write("ids", &HostTensor::i32([rows, tokens], ids.to_vec())?)?;
        finite(&mut program, "context", self.blueprint.condition.part())
    }

    fn text_program(
        &self,
        rows: usize,
        tokens: usize,
        skip: usize,
        observer: &mut dyn Observer,
    ) -> Result<Program> {
        let graph = self.blueprint.condition.context_graph(rows, tokens, self.dtype, skip)?;
        let part = self.condition.as_ref();
        let part = part.ok_or_else(|| Error::invalid("text: this model has no condition"))?;
        self.program(part, graph, "text", observer)
    }

    /// Latents (B,h,w,Z) in the sampler's scale to pictures, one at a time: the decoder's arena is the largest of all.
    fn pictures(
        &self,
        r: &Request,
        latents: &HostTensor,
        observer: &mut dyn Observer,
    ) -> Result<Vec<Picture>> {
        let ((width, height), [rows, columns]) = (self.blueprint.size(r)?, self.blueprint.tiles(r)?);
        let graph = self.blueprint.vae.decode_graph([1, rows.tile, columns.tile], self.dtype)?;
        let mut program = self.program(&self.vae, graph, "decoding", observer)?;
        let codec = self.blueprint.vae.codec();
        let (z, [_, h, w, c]) = (unscaled(latents, self.blueprint.scale())?, axes(latents)?);
        let n = h * w * c;
        (0..r.batch)
            .map(|i| {
                let z = HostTensor::f32([1, h, w, c], z.to_f32()[i * n..][..n].to_vec())?;
                let output = Port { name: "image", scale: codec.factor() };
                let input = [(Port { name: "latents", scale: 1 }, &z)];
                let image = tiles::run(&mut program, "decoder", &input, output, [&rows, &columns], observer)?;
                let rgb = to_bytes(image.as_f32().unwrap_or_default());
                Ok(Picture { width, height, rgb, seed: r.seed.wrapping_add(i as u64) })
            })
            .collect()
    }

    /// Latents (B,h,w,Z), in the autoencoder's own scale, to pictures (B,H,W,C) in −1…1.
    fn decode_scaled(&self, z: &HostTensor) -> Result<HostTensor> {
        let [b, h, w, _] = axes(z)?;
        let graph = self.blueprint.vae.decode_graph([b, h, w], self.dtype)?;
        let mut program = self.program(&self.vae, graph, "decoding", &mut ())?;
        program.write("latents", z)?;
        finite(&mut program, "image", "decoder")
    }

    /// One line about what was loaded.
    pub fn describe(&self) -> String {
        let (device, dtype, bytes) = (self.device.describe(), self.dtype, human_bytes(self.weight_bytes()));
        format!("{device}, {dtype}, {bytes} of weights")
    }
}

/// Tokens of every prompt in `LDMTextToImagePipeline`.
const LDM_TOKENS: usize = 77;

/// A tokenizer as a text encoder takes it: `folder` is where it is from.
///
/// # Errors
/// [`Error::Config`] when it has tokens or lengths that the text encoder does not.
pub fn tokenizer_for(tokenizer: Tokenizer, folder: &Path, text: &Conditioner) -> Result<Tokenizer> {
    let tokenizer = match text {
        // As diffusers' pipeline, which does not ask the tokenizer: BERT's are for longer texts.
        Conditioner::Bert(_) => tokenizer.at_most(text.tokens().min(LDM_TOKENS)),
        _ => tokenizer,
    };
    let wrong = |file, key: &str, want: String, got: usize| {
        Err(Error::Config { file, key: key.into(), want, got: got.to_string() })
    };
    if tokenizer.vocab_size() > text.vocabulary() {
        let want = format!("at most the text encoder's {} tokens", text.vocabulary());
        return wrong(folder.into(), "vocabulary", want, tokenizer.vocab_size());
    }
    if tokenizer.max_length() > text.tokens() {
        let want = format!("at most the text encoder's {} positions", text.tokens());
        let file = folder.join("tokenizer_config.json");
        return wrong(file, "model_max_length", want, tokenizer.max_length());
    }
    Ok(tokenizer)
}

/// Runs a program and reads an output; where that is not finite, repeats the run to find the node that made it so.
fn finite(program: &mut Program, output: &str, part: &str) -> Result<HostTensor> {
    program.run(&mut ())?;
    let y = program.read(output)?;
    if check_finite(&y, part, "").is_err() {
        program.unsettle();
        program.run(&mut crate::exec::CheckFinite)?;
        check_finite(&y, part, "")?;
    }
    Ok(y)
}

/// The four axes of latents.
fn axes(x: &HostTensor) -> Result<[usize; 4]> {
    <[usize; 4]>::try_from(&x.shape()[..]).map_err(|_| Error::invalid("latents without four axes"))
}

/// Latents in the sampler's scale to the autoencoder's own.
fn unscaled(latents: &HostTensor, scaling_factor: f64) -> Result<HostTensor> {
    let factor = 1.0 / scaling_factor;
    HostTensor::f32(latents.shape(), latents.to_f32().iter().map(|v| (*v as f64 * factor) as f32).collect())
}

/// Each row `times` times in a row: (R,T,E) to (R·times,T,E).
fn repeat(x: &HostTensor, times: usize) -> Result<HostTensor> {
    let [rows, t, e] = *x.shape() else { return Err(Error::invalid("a context without three axes")) };
    let v = x.to_f32();
    let data = (0..rows * times).flat_map(|i| v[i / times * t * e..][..t * e].iter().copied()).collect();
    HostTensor::f32([rows * times, t, e], data)
}

/// −1…1 to bytes, as diffusers rounds them.
fn to_bytes(x: &[f32]) -> Vec<u8> {
    x.iter().map(|v| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8).collect()
}
