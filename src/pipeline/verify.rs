//! Comparison with recorded tensors of diffusers, part by part or step by step: the first tensor that diverges is the
//! bug.
//!
//! A reference file is safetensors with inputs and outputs in diffusers' layout (NCHW), and under `reference` in its
//! metadata the settings of the run as JSON, with `floors`: PyTorch's own relative error in bf16 and f16. In f32 the
//! bound is 1e-4 at every tensor, in the 16-bit types 1.5 times the floor of that tensor; a tensor without a floor is
//! shown and not judged. Pictures have at least 50 dB in f32.

use super::beside::RGB;
use super::blueprint::{conditioner, model, scheduler, vae_name};
use super::{Beside, Blueprint, Inventory, Mask, Pipeline, Request, load, repeat, unscaled};
use crate::diffusion::{Sampling, Settings};
use crate::error::{Error, Result};
use crate::exec::{Device, Graph, Program, Weights};
use crate::io::{Checkpoint, ModelFolder, weights};
use crate::models::{Conditioner, UNet2DCondition};
use crate::samplers::{Ladder, Method, skipped};
use crate::tensor::{DType, HostTensor};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;

/// Relative error in f32, as the tests of whole models have it.
const BOUND_F32: f64 = 1e-4;
/// Of PyTorch's own error, in the 16-bit types.
const FLOOR_FACTOR: f64 = 1.5;
/// A floor above this says that PyTorch's own run in the type drew other noise, not how it rounds: it bounds nothing.
const FLOOR_MAX: f64 = 0.4;
/// PSNR of a picture in f32, dB.
const PSNR_F32: f64 = 50.0;

/// One tensor, ours against theirs.
#[derive(Clone, Debug)]
pub struct Line {
    /// Name in the reference file.
    pub name: String,
    /// ‖ours − theirs‖ / ‖theirs‖.
    pub relative: f64,
    /// Largest absolute difference.
    pub largest: f64,
    /// Of pictures, dB with peak 1 for pictures in 0…1 and 2 for −1…1.
    pub psnr: Option<f64>,
    /// The bound on `relative`; none where the file has no floor for this type.
    pub bound: Option<f64>,
    /// Why the line counts as failed, if it does.
    pub failed: Option<String>,
}

/// The outcome.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In the order of the computation.
    pub lines: Vec<Line>,
    /// Parts of the file that were not asked for.
    pub left_out: Vec<String>,
    /// Ours, under their names, in their layout.
    pub ours: Vec<(String, HostTensor)>,
}

impl Report {
    /// The first tensor that diverges.
    pub fn first_failure(&self) -> Option<&Line> {
        self.lines.iter().find(|l| l.failed.is_some())
    }
}

/// What to verify.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Type of weights and activations; f32 by default.
    pub dtype: Option<DType>,
    /// Of a file of single parts, those to run: `unet`, `vae`, `vq`, `text`. Empty: all.
    pub parts: Vec<String>,
}

struct Session<'a> {
    folder: &'a ModelFolder,
    device: &'a Device,
    dtype: DType,
    reference: Checkpoint,
    meta: Value,
    report: Report,
}

/// Runs a checkpoint from the stored inputs of a reference file and compares every stored output.
///
/// # Errors
/// When a file cannot be read, or the checkpoint has a part that the engine does not know. A tensor that diverges is no
/// error but a line of the report.
pub fn verify(folder: &ModelFolder, reference: &Path, device: &Device, options: &Options) -> Result<Report> {
    let reference = Checkpoint::open(reference)?;
    let missing = || Error::Tensor {
        file: reference.path().into(),
        name: "reference".into(),
        want: "JSON under this key of the file's metadata".into(),
        got: "none; was the file recorded with the recording script?".into(),
    };
    let text = reference.metadata().get("reference").ok_or_else(missing)?;
    let meta =
        serde_json::from_str(text).map_err(|e| Error::file(reference.path(), format!("`reference`: {e}")))?;
    let dtype = options.dtype.unwrap_or(DType::F32);
    let mut s = Session { folder, device, dtype, reference, meta, report: Report::default() };
    if s.has("initial_latents") {
        if !options.parts.is_empty() {
            return Err(Error::invalid(
                "--part: this file records a whole pipeline; parts are for files of parts",
            ));
        }
        s.pipeline()?;
    } else {
        s.parts(&options.parts)?;
    }
    Ok(s.report)
}

impl Session<'_> {
    fn has(&self, name: &str) -> bool {
        self.reference.entry(name).is_some()
    }

    fn read(&self, name: &str) -> Result<HostTensor> {
        self.reference.read(name, DType::F32)
    }

    /// The axes of a stored tensor: of this number, none of them empty, and such as the model takes.
    fn axes<const N: usize>(
        &self,
        name: &str,
        want: &str,
        fits: impl Fn([usize; N]) -> bool,
    ) -> Result<[usize; N]> {
        let entry = self.reference.entry(name);
        let axes = entry.and_then(|e| <[usize; N]>::try_from(&e.shape[..]).ok());
        if let Some(axes) = axes.filter(|axes| !axes.contains(&0) && fits(*axes)) {
            return Ok(axes);
        }
        let got = entry.map_or("no such tensor".into(), |e| format!("{:?}", e.shape));
        Err(Error::Tensor {
            file: self.reference.path().into(),
            name: name.into(),
            want: want.into(),
            got: format!("{got}; was the file recorded from this checkpoint?"),
        })
    }

    /// A stored picture or latent (B,C,H,W) as (B,H,W,C), with `c` channels and sides that are multiples of `m`.
    fn picture(&self, name: &str, c: usize, m: usize) -> Result<HostTensor> {
        let want = format!("(B,{c},H,W), H and W multiples of {m}");
        self.axes(name, &want, |[_, channels, h, w]| channels == c && h % m == 0 && w % m == 0)?;
        self.read_nhwc(name)
    }

    /// A stored picture or latent as (B,H,W,C).
    fn read_nhwc(&self, name: &str) -> Result<HostTensor> {
        self.axes::<4>(name, "(B,C,H,W)", |_| true)?;
        self.read(name)?.permute(&[0, 2, 3, 1])
    }

    fn read_ids(&self, name: &str) -> Result<HostTensor> {
        self.reference.read(name, DType::I32)
    }

    /// PyTorch's error for a tensor in the type under test.
    fn bound(&self, name: &str) -> Option<f64> {
        // Timesteps are f32 whatever the type.
        if self.dtype == DType::F32 || name == "timesteps" {
            return Some(BOUND_F32);
        }
        let floor = self.meta.get("floors")?.get(self.dtype.name())?.get(name)?.as_f64()?;
        (floor <= FLOOR_MAX).then_some(floor * FLOOR_FACTOR)
    }

    /// Compares ours, in the layout of the file, with the stored tensor of that name.
    fn compare(&mut self, name: &str, ours: HostTensor, peak: Option<f64>) -> Result<()> {
        let theirs = self.read(name)?;
        if theirs.shape() != ours.shape() {
            return Err(Error::Tensor {
                file: self.reference.path().into(),
                name: name.into(),
                want: ours.shape().to_string(),
                got: theirs.shape().to_string(),
            });
        }
        let (a, b) = (ours.to_f64(), theirs.to_f64());
        let square: f64 = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum();
        let norm: f64 = b.iter().map(|b| b * b).sum();
        let relative = (square / norm.max(f64::MIN_POSITIVE)).sqrt();
        let largest = a.iter().zip(&b).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
        let psnr = peak.map(|p| 10.0 * (p * p / (square / a.len() as f64).max(1e-30)).log10());
        let bound = self.bound(name);
        let mut failed = None;
        if bound.is_some_and(|bound| !(relative <= bound)) {
            failed = Some(format!("relative error {relative:.3e}, bound {:.3e}", bound.unwrap_or(0.0)));
        } else if !relative.is_finite() {
            failed = Some("not finite".into());
        } else if self.dtype == DType::F32 && psnr.is_some_and(|p| p < PSNR_F32) {
            failed = Some(format!("PSNR {:.1} dB, at least {PSNR_F32} wanted", psnr.unwrap_or(0.0)));
        }
        self.report.lines.push(Line { name: name.into(), relative, largest, psnr, bound, failed });
        self.report.ours.push((name.into(), ours));
        Ok(())
    }

    /// [`Session::compare`] for a picture or latent that is (B,H,W,C) here.
    fn compare_nhwc(&mut self, name: &str, ours: &HostTensor, peak: Option<f64>) -> Result<()> {
        self.compare(name, ours.permute(&[0, 3, 1, 2])?, peak)
    }

    fn run(&self, graph: Graph, weights: &Weights, inputs: &[(&str, &HostTensor)]) -> Result<Program> {
        let mut program = Program::new(graph, weights, self.device)?;
        for (name, x) in inputs {
            program.write(name, x)?;
        }
        program.run(&mut ())?;
        Ok(program)
    }

    fn load<M: crate::models::Model>(&self, name: &str) -> Result<(M, Weights)> {
        let model = model(self.folder, name)?;
        let inventory = Inventory::of(&M::inventory(&model, self.dtype)?);
        let weights = load(self.folder.checkpoint(name)?, &inventory, self.device)?;
        Ok((model, weights))
    }

    fn parts(&mut self, wanted: &[String]) -> Result<()> {
        let mut there = Vec::new();
        for name in self.reference.names().filter_map(|n| n.split_once('.')).map(|(part, _)| part.to_string())
        {
            if !there.contains(&name) {
                there.push(name);
            }
        }
        if let Some(bad) = wanted.iter().find(|w| !there.contains(w)) {
            return Err(Error::invalid(format!("--part {bad}: the file has {}", there.join(", "))));
        }
        for part in there {
            if !wanted.is_empty() && !wanted.contains(&part) {
                self.report.left_out.push(part);
                continue;
            }
            match &*part {
                "text" => self.text()?,
                "unet" => self.unet()?,
                "vae" => self.kl()?,
                "vq" => self.vq()?,
                _ => {
                    return Err(Error::invalid(format!(
                        "the file has a part `{part}`, which this version cannot run; name others with --part"
                    )));
                }
            }
        }
        Ok(())
    }

    fn text(&mut self) -> Result<()> {
        let text = conditioner(self.folder)?;
        let inventory = Inventory::of(&text.inventory(self.dtype)?);
        let weights = load(self.folder.checkpoint(text.part())?, &inventory, self.device)?;
        let want = format!("(B,T), T at most {}", text.tokens());
        let [rows, tokens] = self.axes("text.ids", &want, |[_, t]| t <= text.tokens())?;
        let ids = self.read_ids("text.ids")?;
        let graph = match &text {
            Conditioner::Clip(m) => m.states_graph(rows, tokens, self.dtype)?,
            Conditioner::Bert(m) => m.states_graph(rows, tokens, self.dtype)?,
            Conditioner::Class(_) | Conditioner::Nothing => {
                return Err(Error::invalid("text: the checkpoint has no text encoder"));
            }
        };
        let program = self.run(graph, &weights, &[("ids", &ids)])?;
        for i in 0.. {
            let name = format!("text.hidden_{i:02}");
            if !self.has(&name) {
                break;
            }
            self.compare(&name, program.read(&format!("hidden_{i:02}"))?, None)?;
        }
        let last = program.read("last")?;
        self.compare("text.last", last.clone(), None)?;
        if let (Conditioner::Clip(text), true) = (&text, self.has("text.pooled")) {
            let (e, v) = (last.shape().last(), last.to_f32());
            let ids: Vec<i32> = ids.to_f64().into_iter().map(|v| v as i32).collect();
            let mut pooled = Vec::with_capacity(rows * e);
            for (row, ids) in ids.chunks(tokens).enumerate() {
                pooled.extend(&v[(row * tokens + text.pooled_token(ids)) * e..][..e]);
            }
            self.compare("text.pooled", HostTensor::f32([rows, e], pooled)?, None)?;
        }
        Ok(())
    }

    fn unet(&mut self) -> Result<()> {
        let (unet, weights) = self.load::<UNet2DCondition>("unet")?;
        let x = self.picture("unet.sample", unet.in_channels, unet.multiple())?;
        let [b, h, w] = size(&x)?;
        self.axes("unet.timestep", "(1)", |[n]| n == 1)?;
        let want = format!("({b},S,{})", unet.context);
        let [_, tokens, _] = self.axes("unet.context", &want, |[n, _, e]| n == b && e == unet.context)?;
        let (t, context) = (self.read("unet.timestep")?, self.read("unet.context")?);
        let graph = unet.graph([b, h, w], tokens, self.dtype)?;
        let inputs = [("sample", &x), ("timestep", &t), ("context", &context)];
        let out = self.run(graph, &weights, &inputs)?.read("out")?;
        self.compare_nhwc("unet.out", &out, None)
    }

    fn kl(&mut self) -> Result<()> {
        let (vae, weights) = self.load::<crate::models::AutoencoderKL>(vae_name(self.folder))?;
        let image = self.picture("vae.image", vae.codec.in_channels, vae.codec.factor())?;
        let moments =
            self.run(vae.encode_graph(size(&image)?, self.dtype)?, &weights, &[("image", &image)])?;
        self.compare_nhwc("vae.moments", &moments.read("moments")?, None)?;
        drop(moments);
        let z = self.picture("vae.latents", vae.codec.latent_channels, 1)?;
        let graph = vae.decode_graph(size(&z)?, self.dtype)?;
        let decoded = self.run(graph, &weights, &[("latents", &z)])?.read("image")?;
        self.compare_nhwc("vae.decoded", &decoded, Some(2.0))
    }

    fn vq(&mut self) -> Result<()> {
        let (vq, weights) = self.load::<crate::models::VQModel>(vae_name(self.folder))?;
        let image = self.picture("vq.image", vq.codec.in_channels, vq.codec.factor())?;
        let graph = vq.encode_graph(size(&image)?, self.dtype)?;
        let z = self.run(graph, &weights, &[("image", &image)])?.read("latents")?;
        self.compare_nhwc("vq.latents", &z, None)?;

        let z = self.picture("vq.latents", vq.code_width, 1)?;
        let graph = vq.quantize_graph(size(&z)?, self.dtype)?;
        let program = self.run(graph, &weights, &[("latents", &z)])?;
        self.codes(&z, &program.read("codes")?, &program.read("quantized")?)?;

        let z = self.picture("vq.decode_in", vq.code_width, 1)?;
        let graph = vq.decode_graph(size(&z)?, self.dtype)?;
        let decoded = self.run(graph, &weights, &[("latents", &z)])?.read("image")?;
        self.compare_nhwc("vq.decoded", &decoded, Some(2.0))
    }

    /// Codes must agree, but where the second nearest is as near as the type can tell: the margin between the squared
    /// distances is then below 2 · eps · (|z| + |e|)². The quantised vectors are compared where the codes agree.
    fn codes(&mut self, z: &HostTensor, codes: &HostTensor, quantized: &HostTensor) -> Result<()> {
        let [b, h, w, c] = *quantized.shape() else { return Err(Error::invalid("codes without four axes")) };
        for name in ["vq.indices", "vq.margin"] {
            self.axes(name, &format!("({b},{h},{w})"), |axes| axes == [b, h, w])?;
        }
        self.axes("vq.quantized", &format!("({b},{c},{h},{w})"), |axes| axes == [b, c, h, w])?;
        let theirs = self.read_ids("vq.indices")?;
        let margin = self.read("vq.margin")?.to_f64();
        let book = quantized.to_f64();
        let (ours, theirs, z) = (codes.to_f64(), theirs.to_f64(), z.to_f64());
        let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
        let allowed = |i: usize| {
            let reach = norm(&z[i * c..][..c]) + norm(&book[i * c..][..c]);
            2.0 * self.dtype.eps() * reach * reach
        };
        let differ: Vec<usize> = (0..ours.len()).filter(|&i| ours[i] != theirs[i]).collect();
        let wrong: Vec<usize> = differ.iter().copied().filter(|&i| margin[i] > allowed(i)).collect();
        let failed = wrong.first().map(|&i| {
            let (got, want) = (ours[i], theirs[i]);
            format!(
                "{} wrong codes; the first at pixel {i}: want {want}; got {got}; margin {}",
                wrong.len(),
                margin[i]
            )
        });
        let share = differ.len() as f64 / ours.len().max(1) as f64;
        let name = "vq.indices".to_string();
        let (largest, bound) = (differ.len() as f64, None);
        self.report.lines.push(Line {
            name: name.clone(),
            relative: share,
            largest,
            psnr: None,
            bound,
            failed,
        });
        let shape = codes.shape();
        self.report.ours.push((name, HostTensor::i32(shape, ours.iter().map(|&v| v as i32).collect())?));

        let mut same = quantized.to_f32();
        let reference = self.read_nhwc("vq.quantized")?.to_f32();
        for &i in &differ {
            same[i * c..][..c].copy_from_slice(&reference[i * c..][..c]);
        }
        let same = HostTensor::f32(quantized.shape(), same)?;
        let at = self.report.lines.len();
        self.compare_nhwc("vq.quantized", &same, None)?;
        // A codebook in a 16-bit type is a rounded codebook; the codes above are what is judged.
        if self.dtype != DType::F32 {
            self.report.lines[at].bound = None;
            self.report.lines[at].failed = None;
        }
        Ok(())
    }

    fn setting<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<T> {
        self.meta.get(key).and_then(read).ok_or_else(|| {
            Error::file(self.reference.path(), format!("`reference`: no usable `{key}` among the settings"))
        })
    }

    /// The whole pipeline from the stored ids and the stored initial latents.
    fn pipeline(&mut self) -> Result<()> {
        let kind = self.setting("pipeline", |v| Some(v.as_str()?.to_string()))?;
        if !Blueprint::PIPELINES.contains(&self.folder.class()) {
            return Err(Error::invalid(format!(
                "the file records {kind}, the checkpoint is a {}; this version runs {}",
                self.folder.class(),
                Blueprint::PIPELINES.join(", ")
            )));
        }
        let class = self.setting("scheduler", |v| Some(v.as_str()?.to_string()))?;
        let method: Method = class.parse()?;
        let steps = self.setting("steps", |v| v.as_u64())? as usize;
        let guidance = self.setting("guidance", Value::as_f64)?;
        let strength = self.meta.get("strength").and_then(Value::as_f64);
        let (_, mut schedule) = scheduler(self.folder)?;
        schedule.eta = self.meta.get("eta").and_then(Value::as_f64).unwrap_or(0.0);
        let skip = strength.map_or(0, |s| skipped(steps, s));
        let ladder = method.ladder(&schedule, steps, skip)?;

        let pipeline = Pipeline::open(self.folder, self.device, Some(self.dtype))?;
        let start = self.picture(
            "initial_latents",
            pipeline.blueprint.unet.out_channels,
            pipeline.blueprint.unet.multiple(),
        )?;
        let [batch, h, w] = size(&start)?;
        let without = pipeline.blueprint.condition == Conditioner::Nothing;
        let guidance = if without { 1.0 } else { guidance };
        let context = match without {
            true => None,
            false => Some(self.context(&pipeline, batch, guidance > 1.0)?),
        };
        if let Some(context) = &context {
            self.compare("context", context.clone(), None)?;
        }
        if self.folder.class() == "StableDiffusionInpaintPipeline"
            && pipeline.blueprint.beside == Beside::Nothing
        {
            return Err(Error::invalid(
                "this model's UNet is given no mask: what is known is put back after each step, which the file does not \
                 store; parts can be verified (`tools/record.py modules`)",
            ));
        }
        let tokens = context.as_ref().map_or(0, |context| context.shape()[1]);
        let settings = Settings { batch, size: [h, w], tokens, guidance, known: false, dtype: self.dtype };
        let (unet, weights) = (&pipeline.blueprint.unet, pipeline.unet.weights(self.device, None)?);
        let mut run = Sampling::new(unet, &weights, self.device, (method, &ladder), settings)?;
        if run.noises() > 0 {
            return Err(Error::invalid("the run drew fresh noise (eta > 0), which the file does not store"));
        }
        if let Some(context) = &context {
            run.set_context(context)?;
        }
        if let Some(beside) = self.beside(&pipeline, &start, guidance, &ladder)? {
            run.set_condition(&beside)?;
        }
        run.start(&start)?;
        self.timesteps(&run)?;
        let mut more = true;
        while more {
            more = run.step()?;
            let k = run.done() - 1;
            let (guided, state) = (format!("model_output_{k:03}"), format!("latents_{k:03}"));
            self.compare_nhwc(&guided, &run.guided()?, None)?;
            self.compare_nhwc(&state, &run.state()?, None)?;
        }
        let z = run.state()?;
        drop(run);
        let z = unscaled(&z, pipeline.blueprint.scale())?;
        self.compare_nhwc("decoder_input", &z, None)?;
        let image = pipeline.decode_scaled(&z)?;
        let unit = image.to_f32().iter().map(|v| (v / 2.0 + 0.5).clamp(0.0, 1.0)).collect();
        self.compare_nhwc("image", &HostTensor::f32(image.shape(), unit)?, Some(1.0))
    }

    /// The context from the stored ids, unconditional half first.
    fn context(&self, pipeline: &Pipeline, batch: usize, guided: bool) -> Result<HostTensor> {
        let mut ids = Vec::new();
        let names: &[&str] = if guided { &["negative_ids", "prompt_ids"] } else { &["prompt_ids"] };
        let (positions, mut tokens) = (pipeline.blueprint.condition.tokens(), 0);
        for name in names {
            let want = format!("(1,T), T at most {positions}, of all prompts the same");
            let fits = |[rows, t]: [usize; 2]| rows == 1 && t <= positions && [0, t].contains(&tokens);
            [_, tokens] = self.axes(name, &want, fits)?;
            ids.extend(self.read_ids(name)?.to_f64().into_iter().map(|v| v as i32));
        }
        repeat(&pipeline.encode_text(&ids, names.len(), 0, &mut ())?, batch)
    }

    /// What follows the latents among the channels: of the small picture, or of the masked one, which is encoded with the
    /// stored noise. Then the first input of the UNet as a whole.
    fn beside(
        &mut self,
        pipeline: &Pipeline,
        start: &HostTensor,
        guidance: f64,
        ladder: &Ladder,
    ) -> Result<Option<HostTensor>> {
        let b = &pipeline.blueprint;
        let ([batch, h, w], z, f) = (size(start)?, b.unet.out_channels, b.vae.codec().factor());
        let side = if b.beside == Beside::Picture { 1 } else { f };
        let picture = |s: &Self, name: &str, channels: usize| -> Result<Vec<f32>> {
            let want = format!("(1,{channels},{},{})", h * side, w * side);
            s.axes(name, &want, |axes: [usize; 4]| axes == [1, channels, h * side, w * side])?;
            Ok(s.read_nhwc(name)?.to_f32())
        };
        let mut channels = match b.beside {
            Beside::Nothing => return Ok(None),
            _ => picture(self, "input_image", RGB)?,
        };
        channels.iter_mut().for_each(|v| *v = *v * 2.0 - 1.0);
        if b.beside == Beside::Mask {
            let gray = picture(self, "mask", 1)?.iter().map(|v| if *v >= 0.5 { 255 } else { 0 }).collect();
            let (width, height) = (w * f, h * f);
            let mask = Mask { width, height, gray, composite: false };
            mask.hide(&mut channels);
            let image = HostTensor::f32([1, height, width, RGB], channels)?;
            let noise = self.picture("masked_noise", z, 1)?;
            let r = Request { width: Some(width), height: Some(height), ..Request::default() };
            let latents = pipeline.encoder(&r, &mut ())?.run(&image, &mut || Ok(noise.clone()), &mut ())?;
            let whole = HostTensor::f32([batch, h, w, z], latents.repeat(batch))?;
            self.compare_nhwc("masked_latents", &whole, None)?;
            let rows = mask.latents([h, w], f).zip(latents.chunks_exact(z));
            channels = rows.flat_map(|(drawn, latents)| [&[drawn], latents].concat()).collect();
        }
        let copies = 1 + (guidance > 1.0) as usize;
        let x = b.beside.channels(z);
        let scale = ladder.steps[0].at.scale_in as f32;
        let rows = start.to_f32().repeat(copies);
        let rows = rows.chunks_exact(z).zip(channels.chunks_exact(x).cycle());
        let input = rows
            .flat_map(|(latents, beside)| latents.iter().map(|v| v * scale).chain(beside.iter().copied()));
        let input = HostTensor::f32([copies * batch, h, w, z + x], input.collect())?;
        self.compare_nhwc("unet_input_000", &input, None)?;
        HostTensor::f32([copies * batch, h, w, x], channels.repeat(copies * batch)).map(Some)
    }

    /// The timesteps must be those of the file, before anything is computed with them.
    fn timesteps(&mut self, run: &Sampling) -> Result<()> {
        let theirs = self.read("timesteps")?.to_f32();
        let ours: Vec<f32> = (0..run.evaluations()).map(|k| run.timestep(k)).collect();
        if ours.len() != theirs.len() {
            let (want, got) = (theirs.len(), ours.len());
            return Err(Error::invalid(format!(
                "timesteps: want {want} evaluations ({theirs:?}); got {got} ({ours:?})"
            )));
        }
        self.compare("timesteps", HostTensor::f32([ours.len()], ours)?, None)
    }
}

fn size(x: &HostTensor) -> Result<[usize; 3]> {
    match *x.shape() {
        [b, h, w, _] => Ok([b, h, w]),
        _ => Err(Error::invalid(format!("want four axes; got {}", x.shape()))),
    }
}

/// Writes ours under their names.
///
/// # Errors
/// When the file cannot be written.
pub fn save(report: &Report, path: &Path) -> Result<()> {
    weights::save(path, &report.ours, Some(HashMap::from([("engine".into(), "ldm".into())])))
}
