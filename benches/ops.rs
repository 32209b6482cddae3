//! Every room on the real shapes that it lists: `cargo bench --bench ops -- conv2d` is one kernel developer's loop.
//!
//! The rooms come from the list; none is named here. A case is planned once, with its weights as a model holds them, and
//! only its runs are timed; `elem/s` is FLOP/s. `LDM_BENCH_DEVICE=cuda` measures the CUDA code in every type, by events;
//! otherwise the CPU code in f32 and bf16. A name holds room, type, device, shapes, and what is set in the operation; a
//! filter is a regular expression over it: `-- 'conv2d f32.*64x64x320 '`, `-- bf16`. `-- --quick` is a first look.

mod common;

use common::{device, ok, time};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use ldm::Result;
use ldm::backend::Device;
use ldm::exec::{Program, Weights};
use ldm::graph::{Graph, Layout};
use ldm::ops::{Arg, Case, Cost, Fill, ROOMS};
use ldm::rng::Small;
use ldm::tensor::{DType, HostTensor, Spec};
use std::time::Duration;

fn main() {
    let (device, short) = device();
    let mut criterion = Criterion::default()
        .sample_size(10)
        .nresamples(10_000)
        .warm_up_time(Duration::from_millis(200))
        .configure_from_args();
    for of_a_file in ROOMS.chunk_by(|a, b| a.stem == b.stem) {
        let mut group = criterion.benchmark_group(of_a_file[0].stem);
        for room in of_a_file {
            for case in (room.cases)().into_iter().filter(|c| c.bench) {
                for t in types(&device, &case) {
                    let id = BenchmarkId::new(format!("{} {t} {short}", room.name), case.title());
                    run(&mut group, id, &device, &case, t);
                }
            }
        }
        group.finish();
    }
    criterion.final_summary();
}

/// Every type on a GPU. On a CPU f16 is left out: it is converted there, and of interest to nobody.
fn types(device: &Device, case: &Case) -> Vec<DType> {
    let on_cpu = |t: &DType| matches!(t, DType::F32 | DType::BF16);
    let all = case.types.iter().copied();
    match device {
        Device::Cpu => all.filter(on_cpu).collect(),
        Device::Cuda(_) => all.collect(),
    }
}

fn run(group: &mut BenchmarkGroup<WallTime>, id: BenchmarkId, device: &Device, case: &Case, t: DType) {
    let (graph, cost) = ok(graph(case, t));
    // A rough guess, for the time that is planned only. Ten samples in a second, or of one run each where that is longer:
    // a room has a hundred shapes, and an edit of its kernel wants an answer. `--sample-size`, `--measurement-time` say more.
    let seconds = if let Device::Cpu = device { cost.flops / 50e9 + cost.bytes / 5e9 } else { 0.0 };
    group.sampling_mode(if seconds > 0.01 { SamplingMode::Flat } else { SamplingMode::Auto });
    group.measurement_time(Duration::from_secs_f64((15.0 * seconds).max(1.0)));
    group.throughput(match cost.flops {
        0.0 => Throughput::BytesDecimal(cost.bytes as u64),
        flops => Throughput::ElementsAndBytes { elements: flops as u64, bytes: cost.bytes as u64 },
    });
    // Made when the first sample is taken: a filter that skips the case skips its memory too.
    let mut program = None;
    group.bench_function(id, |b| {
        let program = program.get_or_insert_with(|| ok(prepare(graph.clone(), device, case, t)));
        time(b, device, program);
    });
}

/// The case as a graph of its own, and its work. Weights are held in the layout that they are given in.
fn graph(case: &Case, t: DType) -> Result<(Graph, Cost)> {
    let mut g = Graph::new();
    let state = |i: usize| case.op.updates().iter().any(|&(_, input)| input == i);
    let mut x = Vec::new();
    for (i, s) in case.specs(t).iter().enumerate() {
        x.push(match state(i) {
            true => g.state(&name(i), s.dtype, s.shape),
            false if case.weights.contains(&i) => g.weight(&name(i), layout(case, i), s.dtype, s.shape)?,
            false => g.input(&name(i), s.dtype, s.shape),
        });
    }
    let y = g.push_all(case.op.name(), case.op.clone(), &x)?;
    case.op.updates().iter().for_each(|&(output, input)| g.update(x[input], y[output]));
    y.iter().enumerate().for_each(|(i, &v)| g.output(&format!("y{i}"), v));
    let cost = g.total_cost();
    Ok((g, cost))
}

/// As models hold the weight of a product, and any other.
fn layout(case: &Case, i: usize) -> Layout {
    match case.op.packed() {
        Some(w) if w == i && case.args[i].shape.len() == 4 => Layout::Conv,
        Some(w) if w == i => Layout::Linear,
        _ => Layout::Same,
    }
}

fn prepare(graph: Graph, device: &Device, case: &Case, t: DType) -> Result<Program> {
    let specs = case.specs(t);
    let mut weights = Weights::new(device);
    for i in case.weights.clone() {
        weights.insert_as(&name(i), &contents(&case.args[i], specs[i])?, layout(case, i))?;
    }
    let mut program = Program::new(graph, &weights, device)?;
    for i in (0..specs.len()).filter(|i| !case.weights.contains(i)) {
        program.write(&name(i), &contents(&case.args[i], specs[i])?)?;
    }
    Ok(program)
}

/// What the case asks for. A few thousand draws are repeated: 67 million would take longer than what is measured.
fn contents(arg: &Arg, spec: Spec) -> Result<HostTensor> {
    let n = spec.shape.numel();
    let mut r = Small::new(1);
    let draws: Vec<f64> = match &arg.fill {
        Fill::Normal(mean, deviation) => (0..n.min(8191)).map(|_| mean + deviation * r.normal()).collect(),
        Fill::Below(bound) => (0..n.min(8191)).map(|_| r.below(*bound) as f64).collect(),
        Fill::Values(values) => values.clone(),
    };
    match spec.dtype {
        DType::I32 => HostTensor::i32(spec.shape, draws.iter().map(|&v| v as i32).cycle().take(n).collect()),
        t => {
            Ok(HostTensor::f32(spec.shape, draws.iter().map(|&v| v as f32).cycle().take(n).collect())?.to(t))
        }
    }
}

fn name(i: usize) -> String {
    format!("x{i}")
}
