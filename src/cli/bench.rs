//! `ldm bench`: what a part of a model costs here, in time, memory and work, and where the time goes.

mod compare;
mod machine;
mod measure;
mod record;
mod roofline;
mod subject;
mod table;
mod trace;

use super::{DeviceFlags, PredictionFlag, SizeFlags, check_input, check_output, print};
use crate::error::{Error, Result};
use crate::exec::Device;
use crate::graph::{Graph, Node, Var};
use crate::presets::PRESETS;
use crate::samplers::Choice;
use clap::{Args, ValueEnum};
use measure::{Measured, Repeats};
use record::{Counts, Memory, Record, Settings, Time};
use std::path::PathBuf;
use std::process::ExitCode;
use subject::{Component, Plan, Source, Subject};

/// What to measure, how often, and what to do with the numbers.
#[derive(Args, Debug)]
#[command(after_help = "\
An evaluation is one run of the component; its time is that of the clock on a CPU and of events on a GPU. \
With guidance the UNet gets two rows for each picture. The table per operation is the average of the middle half of the \
evaluations, so that it adds up. Comparisons end with exit code 1 at a \
regression. On a GPU evaluations and (with --per-op) nodes are NVTX ranges, if libnvToolsExt (CUDA 12) is installed; \
how fast a GPU multiplies at most is measured by the engine's own product.")]
pub(super) struct Arguments {
    /// A checkpoint: a diffusers folder (with model_index.json), or one .safetensors file with a whole model
    #[arg(short, long, value_name = "MODEL", conflicts_with = "preset")]
    model: Option<PathBuf>,
    #[arg(long, value_name = "NAME", help = preset_help())]
    preset: Option<String>,
    #[command(flatten)]
    predicts: PredictionFlag,
    /// Part to measure [default: unet; vae-decoder where there is none]
    #[arg(long, value_enum, value_name = "PART")]
    component: Option<Component>,
    #[command(flatten)]
    size: SizeFlags,
    /// Pictures that are made together
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch_size: usize,
    /// Guidance; at 1 or below the UNet gets one row for each picture
    #[arg(long, alias = "guidance-scale", default_value_t = 7.5, value_name = "X")]
    cfg_scale: f64,
    /// Steps of the sampler, for step and pipeline; for images per second also with unet
    #[arg(long, default_value_t = 30, value_name = "N")]
    steps: usize,
    #[arg(long, value_name = "NAME", help = super::sampler_help())]
    sampling_method: Option<Choice>,
    /// Evaluations that are not counted, before the others; on a GPU at least 2, the second of which records a CUDA graph
    #[arg(long, default_value_t = 2, value_name = "N")]
    warmup: usize,
    /// Evaluations that are counted
    #[arg(long, default_value_t = 10, value_name = "N")]
    iterations: usize,
    /// Show every operation: time, work, rate, share of the ceiling (with --roofline)
    #[arg(long)]
    per_op: bool,
    /// Nodes that --per-op shows; 0 for all
    #[arg(long, default_value_t = 20, value_name = "N")]
    top: usize,
    /// Measure first how fast this machine copies and multiplies at most
    #[arg(long)]
    roofline: bool,
    /// Write a timeline for Perfetto or chrome://tracing
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Write everything that was measured
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compare with what --json wrote before; exit code 1 where it is slower
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// How much slower is a regression, such as 5%
    #[arg(long, default_value = "5%", value_name = "SHARE")]
    threshold: String,
    /// Compare (and write) only what does not depend on the clock: nodes, work, bytes, allocations; none may grow
    #[arg(long)]
    counts_only: bool,
    #[command(flatten)]
    device: DeviceFlags,
}

fn preset_help() -> String {
    let names: Vec<&str> = PRESETS.iter().map(|p| p.name).collect();
    format!("A built-in configuration with random weights: {}", names.join(", "))
}

/// What the flags call a component.
fn name(c: Component) -> String {
    c.to_possible_value().map_or(String::new(), |v| v.get_name().into())
}

impl Arguments {
    /// A share of 1.
    fn threshold(&self) -> Result<f64> {
        let text = self.threshold.trim();
        let (number, unit) = text.strip_suffix('%').map_or((text, 1.0), |n| (n.trim_end(), 0.01));
        let share = number.parse::<f64>().ok().map(|x| x * unit).filter(|x| (0.0..=100.0).contains(x));
        share.ok_or_else(|| {
            Error::invalid(format!("--threshold: want a share such as 5% or 0.05; got `{text}`"))
        })
    }

    /// Whether anything needs the times of nodes.
    fn detail(&self) -> bool {
        self.per_op
            || self.trace.is_some()
            || (!self.counts_only && (self.json.is_some() || self.compare.is_some()))
    }

    fn settings(&self, plan: &Plan, device: &Device) -> Settings {
        let stepwise = matches!(plan.component, Component::Unet | Component::Step | Component::Pipeline);
        Settings {
            model: plan.name.clone(),
            weights: if matches!(plan.source, Source::Preset) { "random" } else { "file" }.into(),
            component: name(plan.component),
            width: plan.width,
            height: plan.height,
            batch_size: plan.batch,
            cfg_scale: plan.guidance,
            sampler: plan.method.as_ref().map(|(m, _)| m.name().into()),
            steps: stepwise.then_some(plan.steps),
            dtype: plan.dtype.to_string(),
            device: if matches!(device, Device::Cpu) { "cpu" } else { "cuda" }.into(),
            threads: rayon::current_num_threads(),
        }
    }
}

/// What an evaluation is made of. Allocations are counted when it runs.
fn counts(subject: &Subject) -> Counts {
    let mut c = Counts {
        nodes: 0,
        flops: 0.0,
        bytes: 0.0,
        weight_bytes: subject.weights as u64,
        arena_bytes: 0,
        state_bytes: 0,
        scratch_bytes: 0,
        allocations: 0.0,
    };
    for stage in &subject.stages {
        let (graph, plan) = (stage.program().graph(), stage.program().plan());
        let cost = graph.total_cost();
        c.nodes += (graph.nodes().len() * stage.runs) as u64;
        c.flops += cost.flops * stage.runs as f64;
        c.bytes += cost.bytes * stage.runs as f64;
        c.arena_bytes += plan.arena as u64;
        c.state_bytes += plan.states as u64;
        let scratch = plan.scratch.iter().map(|part| part.len()).max().unwrap_or(0);
        c.scratch_bytes = c.scratch_bytes.max(scratch as u64);
    }
    c
}

/// What the CPU's threads take beside arena and states, at the neediest node.
fn working_bytes(subject: &Subject) -> u64 {
    let of = |graph: &Graph, node: &Node| {
        let specs = |vars: &[Var]| vars.iter().map(|&v| graph.spec(v)).collect::<Vec<_>>();
        node.op.cpu_scratch(&specs(&node.x), &specs(&node.y))
    };
    let graphs = subject.stages.iter().map(|stage| stage.program().graph());
    graphs.flat_map(|g| g.nodes().iter().map(move |n| of(g, n))).max().unwrap_or(0) as u64
}

fn time(plan: &Plan, m: &Measured, subject: &Subject, warmup: usize, flops: f64) -> Time {
    let mut sorted = m.seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|p| measure::percentile(&sorted, p));
    let of_a_picture = match plan.component {
        Component::Unet => plan.steps,
        Component::Step => plan.method.as_ref().map_or(plan.steps, |(_, ladder)| ladder.steps.len()),
        _ => 1,
    };
    let images_per_second = plan.batch as f64 / (p50 * of_a_picture as f64).max(1e-12);
    let gflops = flops / p50.max(1e-12) / 1e9;
    let kernels =
        subject.stages.iter().map(|s| Some(s.program().launches()? * s.runs)).sum::<Option<usize>>();
    let kernels = kernels.map(|n| n as u64);
    let early: usize = subject.stages.iter().map(|s| s.program().early_launches() * s.runs).sum();
    let early_kernels = (early > 0).then_some(early as u64);
    let evaluations = m.seconds.clone();
    Time { warmup, kernels, early_kernels, evaluations, p50, p95, p99, images_per_second, gflops }
}

pub(super) fn run(a: Arguments) -> Result<ExitCode> {
    let (threshold, load) = (a.threshold()?, machine::load());
    for path in [&a.json, &a.trace].into_iter().flatten() {
        check_output(path)?;
    }
    if let Some(path) = &a.compare {
        check_input(path, "a record that `ldm bench --json` wrote (--compare)")?;
    }
    let plan = Plan::new(&a)?;
    let old = a.compare.as_deref().map(|path| Record::read(path).map(|r| (r, path))).transpose()?;
    let device = a.device.open()?;
    let settings = a.settings(&plan, &device);
    if let Some((old, path)) = &old {
        compare::check(&settings, old, path, a.counts_only)?;
    }
    let ceilings = if a.roofline { Some(roofline::measure(&device)?) } else { None };
    machine::forget_peak();
    let mut subject = plan.open(&device)?;
    let mut record = Record::new(settings, counts(&subject));

    let repeats = Repeats { warmup: a.warmup, iterations: a.iterations };
    let m = measure::measure(&mut subject, &device, repeats, a.detail())?;
    record.counts.allocations = m.allocations;
    record.time = Some(time(&plan, &m, &subject, repeats.warmup(&device), record.counts.flops));
    record.machine = Some(machine::describe(&device, load));
    record.memory = Some(Memory {
        process_peak_bytes: machine::process_peak(),
        working_bytes: if matches!(device, Device::Cpu) { working_bytes(&subject) } else { 0 },
        other_heap_bytes: m.live,
        allocated_bytes: m.allocated,
    });
    record.ceilings = ceilings;
    let rows = measure::rows(&subject, &device);
    if let Some(path) = &a.trace {
        let title = format!("ldm bench: {} {}", record.settings.model, record.settings.component);
        trace::write(path, &title, &rows, &m.evaluations)?;
    }
    if a.detail() {
        record.per_op = Some(measure::per_op(rows, &m.evaluations));
    }

    print(&table::summary(&record, &m))?;
    if let Some(c) = &record.ceilings {
        print(&table::ceilings(c))?;
    }
    if let (true, Some(p)) = (a.per_op, &record.per_op) {
        let (c, dtype) = (record.ceilings.as_ref(), &record.settings.dtype);
        print(&table::nodes(p, c, dtype, a.top))?;
        print(&table::by_op(p, c, dtype))?;
    }
    if let Some(path) = &a.json {
        if a.counts_only { record.counts_only().write(path)? } else { record.write(path)? }
    }
    let Some((old, _)) = &old else { return Ok(ExitCode::SUCCESS) };
    let (text, worse) = compare::compare(&record, old, threshold, a.counts_only);
    print(&text)?;
    Ok(if worse { ExitCode::from(1) } else { ExitCode::SUCCESS })
}
