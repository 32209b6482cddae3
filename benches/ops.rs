//! Every room on the real shapes that it lists: `cargo bench --bench ops -- conv2d` is one kernel developer's loop.
//!
//! The rooms come from the list; none is named here. A case is planned once, and only its runs are timed; `elem/s` is
//! FLOP/s. `LDM_BENCH_DEVICE=cuda` measures the CUDA code in every type, by events; otherwise the CPU code in f32.

mod common;

use common::{device, ok, time};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use ldm::Result;
use ldm::backend::Device;
use ldm::exec::{Program, Weights};
use ldm::graph::{Graph, Var};
use ldm::ops::{Case, Cost, ROOMS};
use ldm::tensor::DType;
use std::time::Duration;

fn main() {
    let (device, short) = device();
    let mut criterion = Criterion::default().configure_from_args();
    for of_a_file in ROOMS.chunk_by(|a, b| a.stem == b.stem) {
        let mut group = criterion.benchmark_group(of_a_file[0].stem);
        for room in of_a_file {
            for case in (room.cases)().into_iter().filter(|c| c.bench) {
                for &t in types(&device, &case) {
                    let shapes: Vec<String> = case.args.iter().map(|a| join(&a.shape)).collect();
                    let id = BenchmarkId::new(format!("{} {t} {short}", room.name), shapes.join(" "));
                    run(&mut group, id, &device, &case, t);
                }
            }
        }
        group.finish();
    }
    criterion.final_summary();
}

/// Every type on a GPU; on a CPU, which computes in f32 whatever the type, that alone.
fn types<'a>(device: &Device, case: &'a Case) -> &'a [DType] {
    match device {
        Device::Cpu => &case.types[..case.types.len().min(1)],
        Device::Cuda(_) => case.types,
    }
}

/// `2x64x64x320`: what a filter on the command line can be without quotes.
fn join(shape: &[usize]) -> String {
    shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
}

fn run(group: &mut BenchmarkGroup<WallTime>, id: BenchmarkId, device: &Device, case: &Case, t: DType) {
    let (graph, cost) = ok(graph(case, t));
    // A rough guess, for the number of samples only.
    let seconds = if let Device::Cpu = device { cost.flops / 50e9 + cost.bytes / 5e9 } else { 0.0 };
    let slow = seconds > 0.02;
    group.sampling_mode(if slow { SamplingMode::Flat } else { SamplingMode::Auto });
    group.sample_size(if slow { 10 } else { 50 });
    group.warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs_f64((15.0 * seconds).max(3.0)));
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

/// The case as a graph of its own, and its work.
fn graph(case: &Case, t: DType) -> Result<(Graph, Cost)> {
    let mut g = Graph::new();
    let state = |i: usize| case.op.updates().iter().any(|&(_, input)| input == i);
    let x: Vec<Var> = (case.specs(t).iter().enumerate())
        .map(|(i, s)| match state(i) {
            true => g.state(&name(i), s.dtype, s.shape),
            false => g.input(&name(i), s.dtype, s.shape),
        })
        .collect();
    let y = g.push_all(case.op.name(), case.op.clone(), &x)?;
    case.op.updates().iter().for_each(|&(output, input)| g.update(x[input], y[output]));
    y.iter().enumerate().for_each(|(i, &v)| g.output(&format!("y{i}"), v));
    let cost = g.total_cost();
    Ok((g, cost))
}

fn prepare(graph: Graph, device: &Device, case: &Case, t: DType) -> Result<Program> {
    let mut program = Program::new(graph, &Weights::new(device), device)?;
    for (i, (array, spec)) in case.inputs(t, 1).iter().zip(case.specs(t)).enumerate() {
        program.write(&name(i), &array.to_tensor(spec)?)?;
    }
    Ok(program)
}

fn name(i: usize) -> String {
    format!("x{i}")
}
