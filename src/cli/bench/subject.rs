//! What is measured: a part of a model, ready to be run again and again.

use super::Arguments;
use crate::diffusion::{Sampling, Settings, evaluation_graph};
use crate::error::{Error, Result};
use crate::exec::timing::Recorder;
use crate::exec::{Device, Graph, Program, Weights, check_finite, human_bytes};
use crate::io::ModelFolder;
use crate::models::load as weights;
use crate::models::{Inventory, Model};
use crate::pipeline::{Parts, Vae, random_weights, upload};
use crate::presets::Preset;
use crate::rng::Generator;
use crate::samplers::{Ladder, Method};
use crate::tensor::{DType, HostTensor, Spec};
use clap::ValueEnum;

/// The part of a model that is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum Component {
    /// One forward pass of the UNet
    Unet,
    /// The autoencoder's decoder, all pictures of the batch together
    VaeDecoder,
    /// The autoencoder's encoder
    VaeEncoder,
    /// The text encoder
    Text,
    /// One evaluation as sampling runs it: UNet, guidance, the sampler's update, the check of its result
    Step,
    /// A picture: text encoder, all steps, decoder
    Pipeline,
}

/// Largest picture and batch that are asked for: as in sampling, far beyond any memory.
const MAX: usize = 1 << 17;

/// Where a model comes from.
pub(super) enum Source {
    /// A checkpoint on disk.
    Folder(Box<ModelFolder>),
    /// A preset: random weights.
    Preset,
}

/// A model and the sizes at which it is measured.
pub(super) struct Plan {
    pub(super) source: Source,
    pub(super) parts: Parts,
    pub(super) name: String,
    pub(super) component: Component,
    pub(super) width: usize,
    pub(super) height: usize,
    latent: [usize; 2],
    pub(super) batch: usize,
    pub(super) guidance: f64,
    pub(super) steps: usize,
    pub(super) method: Option<(Method, Ladder)>,
    pub(super) dtype: DType,
}

impl Plan {
    /// Checks all that can be known before any weight is read.
    pub(super) fn new(a: &Arguments) -> Result<Plan> {
        let (source, parts, name) = match (&a.model, &a.preset) {
            (Some(path), None) => {
                let folder = ModelFolder::open_as(path, a.predicts.prediction)?;
                let parts = Parts::read(&folder)?;
                let full = folder.path().canonicalize().unwrap_or_else(|_| path.clone());
                let name = full.file_name().unwrap_or_default().to_string_lossy().into_owned();
                (Source::Folder(Box::new(folder)), parts, name)
            }
            (None, Some(_)) if a.predicts.prediction.is_some() => {
                let why = "a preset says itself what its UNet predicts: want no --prediction";
                return Err(Error::invalid(why));
            }
            (None, Some(name)) => {
                let preset = Preset::find(name)?;
                (Source::Preset, Parts::preset(preset)?, preset.name.to_string())
            }
            _ => return Err(Error::invalid("bench: want a model: either -m FOLDER or --preset NAME")),
        };
        for (flag, n) in
            [("--batch-size", a.batch_size), ("--steps", a.steps), ("--iterations", a.iterations)]
        {
            if n == 0 || n > MAX {
                return Err(Error::invalid(format!("{flag}: want 1 to {MAX}; got {n}")));
            }
        }
        if !(a.cfg_scale.is_finite() && a.cfg_scale >= 0.0) {
            return Err(Error::invalid(format!("--cfg-scale: want a number from 0 on; got {}", a.cfg_scale)));
        }
        let component = a.component.unwrap_or(match (&parts.unet, &parts.vae) {
            (Some(_), _) => Component::Unet,
            (None, Some(_)) => Component::VaeDecoder,
            (None, None) => Component::Text,
        });
        let dtype = a.device.dtype()?.unwrap_or(DType::F32);
        if dtype == DType::I32 {
            return Err(Error::invalid("--dtype: want f32, f16 or bf16; got i32"));
        }
        let (mut factor, mut native, mut multiple) = (None, 1, 1);
        if let Some(vae) = &parts.vae {
            (factor, native) = (Some(vae.codec().factor()), vae.codec().sample_size);
        }
        if let (Some(unet), Component::Unet | Component::Step | Component::Pipeline) =
            (&parts.unet, component)
        {
            (native, multiple) = (unet.sample_size * factor.unwrap_or(1), unet.multiple());
        }
        if factor.is_none() && a.size.width.or(a.size.height).is_some() {
            return Err(Error::invalid(format!(
                "-W, -H: {name} has no autoencoder that the engine runs, so the pixels of a latent are not known; \
                 leave out the size"
            )));
        }
        let f = factor.unwrap_or(1);
        let (width, height) = (a.size.width.unwrap_or(native), a.size.height.unwrap_or(native));
        let m = f * multiple;
        for (flag, n) in [("-W", width), ("-H", height)] {
            if n == 0 || n > MAX || n % m != 0 {
                return Err(Error::invalid(format!(
                    "{flag}: want a multiple of {m} up to {MAX}; got {n}; the nearest is {}",
                    ((n.min(MAX) + m / 2) / m).max(1) * m
                )));
            }
        }
        let alone = parts.unet.as_ref().is_some_and(|unet| unet.context == 0);
        let mut plan = Plan {
            source,
            parts,
            name,
            component,
            width,
            height,
            latent: [height / f, width / f],
            batch: a.batch_size,
            // As in sampling: without a condition there is nothing to guide by.
            guidance: if alone { 1.0 } else { a.cfg_scale },
            steps: a.steps,
            method: None,
            dtype,
        };
        if matches!(component, Component::Step | Component::Pipeline) {
            plan.method = Some(plan.sampler(a)?);
        }
        Ok(plan)
    }

    fn sampler(&self, a: &Arguments) -> Result<(Method, Ladder)> {
        let (class, mut schedule) =
            self.parts.schedule.clone().unwrap_or(("DDIMScheduler".into(), Default::default()));
        let method = match &a.sampling_method {
            Some(choice) => {
                choice.apply(&mut schedule);
                choice.method
            }
            None => class.parse().map_err(|_| {
                Error::invalid(format!(
                    "the model's scheduler {class} is not supported: choose --sampling-method"
                ))
            })?,
        };
        Ok((method, method.ladder(&schedule, self.steps, 0)?))
    }

    /// Rows of the UNet per picture: 2 with guidance.
    pub(super) fn copies(&self) -> usize {
        1 + (self.guidance > 1.0) as usize
    }

    fn settings(&self) -> Result<Settings> {
        // A model without a text encoder is given as many tokens as CLIP has.
        let tokens = self.parts.text.as_ref().map_or(77, |t| t.tokens());
        let (batch, size, guidance, dtype) = (self.batch, self.latent, self.guidance, self.dtype);
        Ok(Settings { batch, size, tokens, guidance, known: false, dtype })
    }

    fn decoder(&self, batch: usize) -> Result<Graph> {
        let [h, w] = self.latent;
        self.parts.vae()?.decode_graph([batch, h, w], self.dtype)
    }

    /// Name, graph and part of each program that an evaluation runs, in order.
    fn graphs(&self) -> Result<Vec<(&'static str, Graph, &'static str)>> {
        let s = self.settings()?;
        let text = |rows: usize| -> Result<_> {
            let graph = self.parts.text()?.context_graph(rows, s.tokens, s.dtype, 0)?;
            Ok(("text", graph, self.parts.text()?.part()))
        };
        let step = || -> Result<_> {
            let Some((method, ladder)) = &self.method else {
                return Err(Error::invalid("a step without a sampler"));
            };
            Ok(("step", evaluation_graph(self.parts.unet()?, &method.table(ladder)?, &s)?, "unet"))
        };
        let size = [self.batch, self.height, self.width];
        Ok(match self.component {
            Component::Unet => {
                let [h, w] = s.size;
                let rows = self.copies() * self.batch;
                vec![("unet", self.parts.unet()?.graph([rows, h, w], s.tokens, s.dtype)?, "unet")]
            }
            Component::VaeDecoder => vec![("decoder", self.decoder(self.batch)?, "vae")],
            Component::VaeEncoder => {
                let graph = match self.parts.vae()? {
                    Vae::Kl(m) => m.encode_graph(size, s.dtype)?,
                    Vae::Vq(m) => m.encode_graph(size, s.dtype)?,
                };
                vec![("encoder", graph, "vae")]
            }
            Component::Text => vec![text(self.copies() * self.batch)?],
            Component::Step => vec![step()?],
            // As sampling does it: the prompts once for the whole batch, the decoder picture by picture.
            Component::Pipeline => {
                let made = if self.parts.unet()?.context > 0 { vec![text(self.copies())?] } else { vec![] };
                made.into_iter().chain([step()?, ("decoder", self.decoder(1)?, "vae")]).collect()
            }
        })
    }

    /// Refuses what the device's free memory cannot hold.
    fn check_memory(&self, graphs: &[(&'static str, Graph, &'static str)], device: &Device) -> Result<()> {
        let mut need = 0usize;
        for (_, graph, _) in graphs {
            let plan = Program::measure(graph, device.into())?;
            need = need.saturating_add(plan.arena).saturating_add(plan.states).saturating_add(plan.weights);
        }
        match device.available() {
            Some(have) if need > have => Err(Error::invalid(format!(
                "{} of {} at {}x{}, batch size {}, in {} needs {}; {} are free: try a smaller size or batch, or --dtype bf16",
                super::name(self.component),
                self.name,
                self.width,
                self.height,
                self.batch,
                self.dtype,
                human_bytes(need),
                human_bytes(have)
            ))),
            _ => Ok(()),
        }
    }

    /// The weights that a graph uses, and no others: from the folder, or random.
    fn weights(&self, graph: &Graph, part: &str, device: &Device) -> Result<Weights> {
        let used = Inventory::of(std::slice::from_ref(graph));
        let Source::Folder(folder) = &self.source else { return random_weights(&used, device, 0) };
        let whole = match part {
            "unet" => Inventory::of(&self.parts.unet()?.inventory(self.dtype)?),
            "vae" => self.parts.vae()?.inventory(self.dtype)?,
            _ => Inventory::of(&self.parts.text()?.inventory(self.dtype)?),
        };
        let part = if part == "vae" && !folder.has("vae") { "vqvae" } else { part };
        // The file is checked against the whole model.
        upload(&weights::Source::new(folder.checkpoint(part)?, &whole)?, device, |name| used.contains(name))
    }

    /// Loads the weights and takes the memory.
    pub(super) fn open(&self, device: &Device) -> Result<Subject> {
        let graphs = self.graphs()?;
        self.check_memory(&graphs, device)?;
        let mut subject = Subject { stages: Vec::new(), weights: 0 };
        for (name, graph, part) in graphs {
            let weights = self.weights(&graph, part, device)?;
            subject.weights += weights.bytes();
            let (runs, run) = match (name, &self.method) {
                ("step", Some((method, ladder))) => {
                    let s = self.settings()?;
                    let unet = self.parts.unet()?;
                    let context = Spec::new(DType::F32, [s.copies() * s.batch, s.tokens, unet.context]);
                    let mut run = Sampling::new(unet, &weights, device, (*method, ladder), s)?;
                    if unet.context > 0 {
                        run.set_context(&noise(context, 1)?)?;
                    }
                    if let Ok(spec) = run.program().spec("condition") {
                        run.set_condition(&noise(spec, 2)?)?;
                    }
                    let first = noise(Spec::new(DType::F32, run.latents()), 3)?;
                    let first: Vec<f32> =
                        first.to_f32().iter().map(|v| v * run.noise_scale() as f32).collect();
                    let first = HostTensor::f32(run.latents(), first)?;
                    run.start(&first)?;
                    let runs = if self.component == Component::Pipeline { run.evaluations() } else { 1 };
                    (runs, Run::Sampling(Box::new(run), first))
                }
                _ => {
                    let mut program = Program::new(graph, &weights, device)?;
                    fill(&mut program)?;
                    let decodes = self.component == Component::Pipeline && name == "decoder";
                    (if decodes { self.batch } else { 1 }, Run::Program(Box::new(program)))
                }
            };
            subject.stages.push(Stage { name, runs, run });
        }
        Ok(subject)
    }
}

/// Something in every input.
fn fill(program: &mut Program) -> Result<()> {
    for name in ["sample", "context", "latents", "image"] {
        if program.has(name) {
            let spec = program.spec(name)?;
            program.write(name, &noise(spec, 1)?)?;
        }
    }
    if program.has("timestep") {
        program.write("timestep", &HostTensor::f32([1], vec![481.0])?)?;
    }
    if program.has("ids") {
        let spec = program.spec("ids")?;
        // Numbers of tokens that even a small vocabulary has.
        let ids = (0..spec.shape.numel()).map(|i| (i % 97) as i32).collect();
        program.write("ids", &HostTensor::i32(spec.shape, ids)?)?;
    }
    Ok(())
}

fn noise(spec: Spec, seed: u64) -> Result<HostTensor> {
    HostTensor::f32(spec.shape, Generator::new(seed).randn(spec.shape.numel()))
}

enum Run {
    Program(Box<Program>),
    Sampling(Box<Sampling>, HostTensor),
}

/// One program of an evaluation.
pub(super) struct Stage {
    pub(super) name: &'static str,
    /// How often an evaluation runs it.
    pub(super) runs: usize,
    run: Run,
}

impl Stage {
    pub(super) fn program(&self) -> &Program {
        match &self.run {
            Run::Program(p) => p,
            Run::Sampling(s, _) => s.program(),
        }
    }
}

/// What is measured, with its weights and memory.
pub(super) struct Subject {
    pub(super) stages: Vec<Stage>,
    /// Bytes of the weights.
    pub(super) weights: usize,
}

impl Subject {
    /// Makes ready for an evaluation: sampling that is at its end starts again. Not timed.
    pub(super) fn prepare(&mut self) -> Result<()> {
        for stage in &mut self.stages {
            if let Run::Sampling(run, first) = &mut stage.run
                && run.done() + stage.runs > run.evaluations()
            {
                run.start(first)?;
            }
        }
        Ok(())
    }

    /// One evaluation.
    pub(super) fn evaluate(&mut self, recorder: &mut Recorder) -> Result<()> {
        for (i, stage) in self.stages.iter_mut().enumerate() {
            recorder.program(i);
            for _ in 0..stage.runs {
                match &mut stage.run {
                    Run::Program(p) => p.run(recorder)?,
                    Run::Sampling(s, _) => {
                        s.step_with(recorder)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// [`Error::NonFinite`] where a result is not finite: then the times are those of another computation.
    pub(super) fn check(&mut self) -> Result<()> {
        for stage in &mut self.stages {
            if let Run::Sampling(run, _) = &mut stage.run {
                run.wait()?;
            }
            let program = stage.program();
            for (name, v) in program.graph().outputs() {
                if program.graph().spec(*v).dtype != DType::I32 {
                    check_finite(&program.read(name)?, stage.name, name)?;
                }
            }
        }
        Ok(())
    }
}
