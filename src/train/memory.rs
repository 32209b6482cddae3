//! What a run takes, phase by phase, before its steps begin.

use super::first_stage::DISCRIMINATOR;
use super::settings::Settings;
use crate::error::Result;
use crate::exec::{Program, Target, human_bytes};
use crate::graph::{Graph, Origin};
use crate::tensor::DType;

/// The process itself: code, threads, configurations, graphs (measured).
const PROCESS: usize = 24 << 20;

/// The heap keeps as much again of what it was asked for, between what is still in use (measured: up to a twelfth).
const HEAP: f64 = 1.0 / 10.0;

/// Bytes on the device, and in the host's memory beside it; on a CPU both are the process's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Load {
    pub(super) device: usize,
    pub(super) host: usize,
}

impl Load {
    pub(super) fn host(bytes: usize) -> Load {
        Load { device: 0, host: bytes }
    }

    /// A program with its weights, that stays; what it takes while it runs.
    pub(super) fn program(graph: &Graph, target: Target) -> Result<(Load, Load)> {
        let m = Program::measure(graph, target)?;
        let stays = m.weights.saturating_add(m.arena).saturating_add(m.states);
        Ok((Load { device: stays, host: 0 }, Load::host(m.scratch)))
    }

    pub(super) fn and(self, more: Load) -> Load {
        Load { device: self.device.saturating_add(more.device), host: self.host.saturating_add(more.host) }
    }

    fn on(self, target: Target) -> usize {
        match target {
            Target::Cpu => {
                let all = self.device.saturating_add(self.host);
                all.saturating_add((HEAP * all as f64) as usize)
            }
            Target::Cuda => self.device,
        }
    }
}

/// What a kind of run takes beside its step.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Beside {
    /// Before there is a step: its name, and all that is there then.
    pub(super) before: Option<(&'static str, Load)>,
    /// From then on to the end: programs and weights that stay as they are, batches ahead of need, the inputs of a step.
    pub(super) held: Load,
    /// While the inputs of a step are made.
    pub(super) asking: Load,
    /// While weights are exported, beside them all in f32.
    pub(super) export: Load,
    /// While pictures are drawn.
    pub(super) pictures: Load,
}

/// What a run takes.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Plan {
    /// Of the graph of a step.
    graph: String,
    /// By name, in order.
    phases: Vec<(&'static str, usize)>,
    target: Target,
}

impl Plan {
    pub(super) fn new(graph: &Graph, s: &Settings, beside: &Beside, target: Target) -> Result<Plan> {
        let m = Program::measure(graph, target)?;
        let stays = m.weights.saturating_add(m.states).saturating_add(m.arena);
        let always = beside.held.and(Load { device: stays, host: PROCESS });
        let bytes = |name: &dyn Fn(&str) -> bool| {
            let states = graph.updates().iter().map(|(state, _)| &graph.values()[state.index()]);
            states.filter(|v| name(&v.name)).map(|v| v.spec.bytes()).sum::<usize>()
        };
        // Of each parameter its value, moments and average; sums of gradients are in no checkpoint.
        let saved = bytes(&|name| !name.starts_with("sum."));
        let trained = graph.parameters().iter().map(|p| graph.spec(p.state));
        let largest = trained.clone().map(|spec| spec.shape.numel()).max().unwrap_or(0);
        let values: usize = trained.map(|spec| spec.shape.numel()).sum();
        // One at a time is rounded, by way of f64.
        let exported = values * (size_of::<f32>() + s.export.size()) + 2 * largest * size_of::<f64>();
        let mut phases = vec![];
        if let Some((name, all)) = beside.before {
            phases.push((name, all.and(Load::host(PROCESS)).on(target)));
        }
        // What a step's code takes while it runs, the heap keeps, in pieces: a checkpoint, which is one piece, finds no room in it; the
        // tensors of an export do.
        let kept = Load::host(beside.asking.host.max(m.scratch));
        let above = |more: Load| always.and(kept).and(more).on(target);
        let within = |more: Load| always.and(Load { host: more.host.max(kept.host), ..more }).on(target);
        phases.push(("a step", above(Load::default())));
        // Also while a run is taken up: then the file is mapped.
        phases.push(("a checkpoint", above(Load::host(saved + largest * size_of::<f32>()))));
        phases.push(("an export", within(beside.export.and(Load::host(exported)))));
        if s.sample.every > 0 {
            phases.push(("pictures", above(beside.pictures)));
        }
        Ok(Plan { graph: parameters(graph, &m), phases, target })
    }

    /// The most that is taken at a time.
    pub(super) fn peak(&self) -> usize {
        self.phases.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0)
    }

    /// In two lines: the step, and the phases of the run.
    pub(super) fn describe(&self) -> String {
        // Of several the first.
        let most = self.phases.iter().rev().max_by_key(|(_, bytes)| *bytes).map_or("", |(name, _)| name);
        let all: Vec<String> =
            self.phases.iter().map(|(name, bytes)| format!("{name} {}", human_bytes(*bytes))).collect();
        let whose = match self.target {
            Target::Cpu => format!(" (each with {} for the process itself)", human_bytes(PROCESS)),
            Target::Cuda => String::new(),
        };
        format!(
            "{}\nthe run takes {} at the most, for {most}: {}{whose}",
            self.graph,
            human_bytes(self.peak()),
            all.join(", ")
        )
    }
}

/// What the step takes on the device, in a line.
fn parameters(graph: &Graph, m: &crate::exec::Measure) -> String {
    let count = |judge: bool| {
        let own = graph.parameters().iter().filter(|p| !judge || p.name.starts_with(DISCRIMINATOR));
        own.map(|p| graph.shape(p.state).numel()).sum::<usize>()
    };
    let judge = match count(true) {
        0 => String::new(),
        n => format!(", {n} of them the discriminator's"),
    };
    let n = count(false);
    let sums = graph.values().iter().any(|v| v.origin == Origin::State && v.name.starts_with("sum."));
    let sums = if sums { ", sums of gradients among them" } else { "" };
    format!(
        "{n} parameters{judge}; {} planned for a step: {} of weights, moments and averages{sums}, {} of values and gradients, {} beside them",
        human_bytes(m.weights + m.states + m.arena + m.scratch),
        human_bytes(m.weights + m.states),
        human_bytes(m.arena),
        human_bytes(m.scratch)
    )
}

/// Batches that the loader makes ahead of need, with the one that is taken: pictures of `side`² RGB values in f32.
pub(super) fn loaded(pictures: usize, side: usize) -> usize {
    (crate::data::loader::Options::default().ahead + 1) * image(pictures, side)
}

/// Pictures in f32.
pub(super) fn image(pictures: usize, side: usize) -> usize {
    pictures.saturating_mul(side * side * 3 * DType::F32.size())
}
