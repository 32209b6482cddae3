//! The parts of a picture, whole: text encoder, one evaluation of the UNet with guidance, decoder.
//!
//! By default on the small checkpoint of the tests; `LDM_BENCH_MODEL=<diffusers folder>` takes another one,
//! `LDM_BENCH_DTYPE` a type, `LDM_BENCH_DEVICE` a device. `elem/s` is FLOP/s.

mod common;

use common::{device, ok, time};
use criterion::{Criterion, Throughput};
use ldm::Result;
use ldm::backend::Device;
use ldm::diffusion::{Sampling, Settings};
use ldm::exec::{Graph, Program, Weights};
use ldm::io::ModelFolder;
use ldm::models::{Inventory, Model};
use ldm::pipeline::{Blueprint, Pipeline, Request, Residency, Vae, load};
use ldm::rng::Generator;
use ldm::tensor::{DType, HostTensor, Spec};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A checkpoint of which only the parts that are timed are loaded.
struct Bench {
    folder: ModelFolder,
    blueprint: Blueprint,
    device: Device,
    dtype: DType,
}

fn main() {
    let (device, short) = device();
    let tiny = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sd15-tiny");
    let path = std::env::var_os("LDM_BENCH_MODEL").map_or(tiny, PathBuf::from);
    let dtype = std::env::var("LDM_BENCH_DTYPE").ok().map(|t| ok(t.parse()));
    let folder = ok(ModelFolder::open(&path));
    let dtype = ok(Pipeline::compute_type(&folder, &device, dtype));
    let bench = Bench { blueprint: ok(Blueprint::read(&folder)), folder, device, dtype };

    let mut criterion = Criterion::default().configure_from_args();
    let model = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut group = criterion.benchmark_group(format!("{model} {dtype} {short}"));
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    let text = ok(bench.blueprint.condition.context_graph(2, bench.tokens(), dtype, 0));
    let size = ok(bench.blueprint.latent_size(&Request::default()));
    let decoder = ok(bench.blueprint.vae.decode_graph([1, size[0], size[1]], dtype));

    for (part, graph) in [("text", text), ("decode", decoder)] {
        group.throughput(Throughput::Elements(graph.total_cost().flops as u64));
        let mut program = None;
        group.bench_function(part, |b| {
            let program = program.get_or_insert_with(|| ok(bench.program(part, graph.clone())));
            time(b, &bench.device, program);
        });
    }
    let estimate =
        ok(bench.blueprint.estimate(&Request::default(), dtype, Residency::Always, (&bench.device).into()));
    group.throughput(Throughput::Elements(estimate.unet_flops as u64));
    let mut run = None;
    group.bench_function("unet", |b| {
        let (run, first) = run.get_or_insert_with(|| ok(bench.sampling(size)));
        b.iter_custom(|n| ok(steps(run, first, n)));
    });
    group.finish();
    criterion.final_summary();
}

/// Time of `n` evaluations, each with the check for values that are not finite, as a sampling run makes them.
fn steps(run: &mut Sampling, first: &HostTensor, n: u64) -> Result<Duration> {
    let mut total = Duration::ZERO;
    for _ in 0..n {
        if run.done() == run.evaluations() {
            run.start(first)?;
        }
        let start = Instant::now();
        run.step()?;
        total += start.elapsed();
    }
    // A GPU has been asked for more than it has done.
    let start = Instant::now();
    run.wait()?;
    total += start.elapsed();
    Ok(total)
}

impl Bench {
    fn tokens(&self) -> usize {
        self.blueprint.condition.tokens()
    }

    fn weights(&self, name: &str, inventory: &[Graph]) -> Result<Weights> {
        load(self.folder.checkpoint(name)?, &Inventory::of(inventory), &self.device)
    }

    /// The text encoder or the decoder, with something in its inputs.
    fn program(&self, part: &str, graph: Graph) -> Result<Program> {
        let condition = &self.blueprint.condition;
        let vae = if self.folder.has("vqvae") { "vqvae" } else { "vae" };
        let weights = match (part, &self.blueprint.vae) {
            ("text", _) => self.weights(condition.part(), &condition.inventory(self.dtype)?)?,
            (_, Vae::Kl(model)) => self.weights(vae, &model.inventory(self.dtype)?)?,
            (_, Vae::Vq(model)) => self.weights(vae, &model.inventory(self.dtype)?)?,
        };
        let mut program = Program::new(graph, &weights, &self.device)?;
        if part == "text" {
            program.write("ids", &HostTensor::zeros(program.spec("ids")?))?;
        } else {
            program.write("latents", &noise(program.spec("latents")?)?)?;
        }
        Ok(program)
    }

    /// A run of the default sampler and its first state.
    fn sampling(&self, size: [usize; 2]) -> Result<(Sampling, HostTensor)> {
        let request = Request::default();
        let weights = self.weights("unet", &self.blueprint.unet.inventory(self.dtype)?)?;
        let settings = Settings {
            batch: request.batch,
            size,
            tokens: self.tokens(),
            guidance: request.cfg_scale,
            known: false,
            dtype: self.dtype,
        };
        let (method, schedule) = self.blueprint.choose(&request)?;
        let ladder = method.ladder(&schedule, request.steps, 0)?;
        let copies = settings.copies() * settings.batch;
        let mut run =
            Sampling::new(&self.blueprint.unet, &weights, &self.device, (method, &ladder), settings)?;
        run.set_context(&noise(Spec::new(
            DType::F32,
            [copies, self.tokens(), self.blueprint.unet.context],
        ))?)?;
        let first = noise(Spec::new(DType::F32, run.latents()))?;
        run.start(&first)?;
        Ok((run, first))
    }
}

/// Normal values.
fn noise(spec: Spec) -> Result<HostTensor> {
    HostTensor::f32(spec.shape, Generator::new(1).randn(spec.shape.numel()))
}
