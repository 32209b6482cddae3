//! Products with every tile and number of splits that their kernel could take, measured one by one: what the rooms' choice,
//! which a model of the card makes, is to be compared with.

use ldm::Result;
use ldm::backend::Device;
use ldm::backend::cuda::Wgmma;
use ldm::diffusion::{Settings, evaluation_graph};
use ldm::exec::{Program, Weights};
use ldm::graph::{Due, Graph, Target, fuse};
use ldm::ops::{Arg, Case, Fill, Op, Ty, launch};
use ldm::pipeline::Parts;
use ldm::presets::Preset;
use ldm::rng::Small;
use ldm::samplers::Method;
use ldm::tensor::{DType, HostTensor, Spec};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// An op with something to choose, and its inputs.
pub struct Subject {
    pub op: Op,
    pub x: Vec<Spec>,
    /// Microseconds by the model, of all runs of nodes that are like it.
    pub weight: f64,
}

/// How long to measure.
#[derive(Clone, Copy)]
pub struct Effort {
    /// Of one try.
    pub slice: Duration,
    /// The median of so many counts.
    pub tries: usize,
}

/// The nodes of these graphs, each of which runs so many times, as a GPU runs them, that have something to choose: each kind
/// once, heaviest first.
pub fn heaviest(graphs: &[(Graph, f64)], most: usize) -> Result<Vec<Subject>> {
    let mut all: Vec<Subject> = vec![];
    for (graph, times) in graphs {
        let graph = fuse(graph, Target::Cuda)?;
        for (node, _) in graph.nodes().iter().zip(graph.due()).filter(|(_, due)| *due == Due::Always) {
            let x: Vec<Spec> = node.x.iter().map(|&v| graph.spec(v)).collect();
            if node.op.choices(&x).len() < 2 {
                continue;
            }
            let weight = times * launch::predict(&node.op, &x)?.1;
            match all.iter_mut().find(|s| s.op == node.op && s.x == x) {
                Some(like) => like.weight += weight,
                None => all.push(Subject { op: node.op.clone(), x, weight }),
            }
        }
    }
    all.sort_by(|a, b| b.weight.total_cmp(&a.weight));
    all.truncate(most);
    Ok(all)
}

impl Subject {
    /// As the benches name a case.
    pub fn title(&self) -> String {
        let ty = |t| if t == DType::I32 { Ty::I32 } else { Ty::T };
        let arg = |s: &Spec| Arg { shape: s.shape, ty: ty(s.dtype), fill: Fill::Normal(0.0, 1.0) };
        let args = self.x.iter().map(arg).collect();
        let (bench, weights, loose, types) = (true, 0..0, None, &DType::FLOATS);
        Case { op: self.op.clone(), args, bench, weights, loose, types }.title()
    }

    /// Everything but the time that it takes, of each choice that is predicted to take less than `near` times the best.
    fn rows(&self, near: f64) -> Result<Vec<(Op, Value)>> {
        let time = |op: &Op| launch::predict(op, &self.x).map(|(_, us)| us);
        let own = self.op.launches(&self.x)[0];
        let (title, best) = (self.title(), time(&self.op)?);
        let mut rows = vec![];
        for op in self.op.choices(&self.x) {
            let (plan, predicted) = (op.launches(&self.x)[0], time(&op)?);
            if predicted <= near * best {
                let chosen = (plan.variant, plan.splits) == (own.variant, own.splits);
                let row = json!({
                    "op": op.name(), "dtype": plan.dtype.name(), "shape": title, "kernel": plan.kernel,
                    "variant": plan.variant, "splits": plan.splits, "chosen": chosen, "predicted": predicted,
                });
                rows.push((op, row));
            }
        }
        Ok(rows)
    }

    fn program(&self, op: &Op, device: &Device) -> Result<Program> {
        let mut g = Graph::new();
        let name = |i: usize| format!("x{i}");
        let x: Vec<_> = self.x.iter().enumerate().map(|(i, s)| g.input(&name(i), s.dtype, s.shape)).collect();
        let y = g.push_all(op.name(), op.clone(), &x)?;
        y.iter().enumerate().for_each(|(i, &v)| g.output(&format!("y{i}"), v));
        let mut program = Program::new(g, &Weights::new(device), device)?;
        for (i, s) in self.x.iter().enumerate() {
            program.write(&name(i), &contents(*s)?)?;
        }
        Ok(program)
    }
}

/// A few thousand numbers below 1 in size, repeated; a counter is 0. Zeros would let a card clock higher.
fn contents(s: Spec) -> Result<HostTensor> {
    let n = s.shape.numel();
    if s.dtype == DType::I32 {
        return HostTensor::i32(s.shape, vec![0; n]);
    }
    let mut r = Small::new(1);
    let draws: Vec<f32> = (0..n.min(8191)).map(|_| (r.below(2001) as f32 - 1000.0) / 1000.0).collect();
    Ok(HostTensor::f32(s.shape, draws.into_iter().cycle().take(n).collect())?.to(s.dtype))
}

/// Microseconds of a run, by events.
fn time(device: &Device, program: &mut Program, effort: Effort) -> Result<f64> {
    let Device::Cuda(cuda) = device else {
        return Err(ldm::Error::invalid("a sweep wants a GPU; got the CPU"));
    };
    let mut runs = |n: usize| -> Result<f64> {
        let start = cuda.record()?;
        for _ in 0..n {
            program.run(&mut ())?;
        }
        let end = cuda.record()?;
        cuda.synchronize()?;
        Ok(start.elapsed(&end)? * 1e3 / n as f64)
    };
    runs(3)?; // the second one is recorded
    let once = runs(1)?.max(1.0);
    let n = (effort.slice.as_secs_f64() * 1e6 / once).clamp(1.0, 10_000.0) as usize;
    let mut times = (0..effort.tries).map(|_| runs(n)).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// What tells one row from another.
fn key(row: &Value) -> [String; 5] {
    ["op", "dtype", "shape", "variant", "splits"].map(|k| row[k].to_string())
}

/// Measures what is not among `done`, and gives each row to `write`, until the time is over. Whether nothing is left.
pub fn sweep(
    device: &Device,
    subjects: &[Subject],
    near: f64,
    effort: Effort,
    done: &[Value],
    until: Instant,
    mut write: impl FnMut(&Value) -> Result<()>,
) -> Result<bool> {
    let done: Vec<_> = done.iter().map(key).collect();
    for subject in subjects {
        for (op, mut row) in subject.rows(near)? {
            if done.contains(&key(&row)) {
                continue;
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            let us = time(device, &mut subject.program(&op, device)?, effort)?;
            row["microseconds"] = json!(us);
            let wgmma = if let Device::Cuda(cuda) = device { cuda.wgmma() } else { Wgmma::Off };
            match wgmma {
                Wgmma::Off => {}
                Wgmma::On => row["wgmma"] = json!("on"),
                Wgmma::Threads => row["wgmma"] = json!("threads"),
                Wgmma::Tma => row["wgmma"] = json!("tma"),
            }
            write(&row)?;
        }
    }
    Ok(true)
}

/// Steps of a picture.
const STEPS: usize = 30;

/// A step of Stable Diffusion 1.5 at 512×512 with guidance, which runs so many times for a picture, and its decoder.
pub fn graphs(dtype: DType) -> Result<Vec<(Graph, f64)>> {
    let parts = Parts::preset(Preset::find("sd15")?)?;
    let (class, schedule) = parts.schedule.as_ref().expect("Stable Diffusion has a schedule");
    let method: Method = class.parse()?;
    let ladder = method.ladder(schedule, STEPS, 0)?;
    let settings = Settings { batch: 1, size: [64, 64], tokens: 77, guidance: 7.5, known: false, dtype };
    let step = evaluation_graph(parts.unet()?, &method.table(&ladder)?, &settings)?;
    Ok(vec![(step, STEPS as f64), (parts.vae()?.decode_graph([1, 64, 64], dtype)?, 1.0)])
}
