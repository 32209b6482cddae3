//! Training by hand: a UNet, a loss, their gradients, AdamW and an average of the weights as one graph, on random data.
//!
//!     cargo run --release --example 03_train -- CONFIG.json [side] [batch] [steps] [flags]
//!     cargo run --release --example 03_train -- --preset sd15 [side] [batch] [steps] [flags]
//!
//! CONFIG.json is that of a diffusers `UNet2DModel` or `UNet2DConditionModel`, which gets a random context of 77 tokens; a preset is
//! built in. Weights are random. The step is that of `ldm train diffusion`: mean squared error, gradients clipped to a norm of 1,
//! AdamW. Says what memory it takes, which is an error where it does not fit, and the median time of a step.
//!
//!     --device cpu|cuda|cuda:N    cpu where it is not said
//!     --dtype f32|bf16|f16        what is computed in; weights, moments and gradients of weights are f32
//!     --recompute                 blocks are made again in the backward pass in place of being kept
//!     --ema                       keep an average of the weights
//!     --plan                      say what memory it takes, and stop: needs no GPU
//!     --per-op                    say where the time of a step goes
//!     --json FILE                 write all that was measured; `commit` is that of LDM_COMMIT

mod options;

use ldm::exec::timing::Recorder;
use ldm::exec::{Device, DeviceName, Graph, Program, Target, Weights, human_bytes};
use ldm::io::atomic;
use ldm::ops::Distance;
use ldm::rng::Generator;
use ldm::tensor::{DType, HostTensor, Shape};
use ldm::train::{Noised, Optimiser, Trainer, blocks, diffusion_loss, initial, update};
use ldm::{Error, Result};
use options::Options;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

/// Tokens of the context, as CLIP gives them.
const TOKENS: usize = 77;

fn main() -> ExitCode {
    match Options::read(std::env::args().skip(1)).and_then(|o| run(&o)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

fn run(o: &Options) -> Result<()> {
    if let Some(file) = &o.json {
        atomic::check_target(file)?;
    }
    let how = Optimiser { average: o.ema, loss_scale: o.dtype == DType::F16, ..Optimiser::default() };
    let g = graph(o, &how)?;
    let count: usize = g.parameters().iter().map(|p| g.shape(p.state).numel()).sum();
    let device = if o.plan { None } else { Some(Device::open(o.device)?) };
    let target = match (&device, o.device) {
        (Some(device), _) => Target::from(device),
        (None, DeviceName::Cuda(_)) => Target::Cuda,
        (None, _) => Target::Cpu,
    };
    let m = Program::measure(&g, target)?;
    let (states, arena) = (human_bytes(m.states), human_bytes(m.arena));
    println!("{:.1} M parameters; weights and moments {states}, the rest {arena}", count as f64 / 1e6);
    // On a CPU also what its code takes while it runs, and the first values of the weights.
    let beside = if target == Target::Cpu { m.scratch + count * size_of::<f32>() } else { 0 };
    let need = m.states.saturating_add(m.arena).saturating_add(beside);
    let mut report = json!({
        "model": o.name, "parameters": count, "side": o.side, "batch": o.batch, "dtype": o.dtype.name(),
        "recompute": o.recompute, "ema": o.ema, "commit": std::env::var("LDM_COMMIT").ok(),
        "states_bytes": m.states, "arena_bytes": m.arena, "beside_bytes": beside,
    });
    if let Some(device) = device {
        report["device"] = json!(device.describe());
        let free = device.available();
        report["free_bytes"] = json!(free);
        let fits = free.is_none_or(|free| need <= free);
        report["fits"] = json!(fits);
        let (need, free) = (human_bytes(need), free.map_or("an unknown amount".into(), human_bytes));
        println!("{}: {free} of memory are free, the step takes {need}", device.describe());
        if !fits {
            write(o, &report)?;
            return Err(Error::invalid(format!(
                "out of memory on {}: the step takes {need}, of which {states} are states and {arena} values and gradients; {free} \
                 are free. Try a smaller batch, --recompute, or --dtype bf16",
                device.describe()
            )));
        }
        train(o, g, &how, &device, &mut report)?;
    }
    write(o, &report)
}

/// The step of `ldm train diffusion`, of a UNet whose condition is given.
fn graph(o: &Options, how: &Optimiser) -> Result<Graph> {
    let (b, side, unet) = (o.batch, o.side, &o.unet);
    let mut g = Graph::new();
    g.train(true);
    let input = Noised {
        x: g.input("x", DType::F32, [b, side, side, unet.in_channels]),
        t: g.input("t", DType::F32, [b]),
        condition: (unet.context > 0).then(|| g.input("context", DType::F32, [b, TOKENS, unet.context])),
        target: g.input("target", DType::F32, [b, side, side, unet.out_channels]),
        weights: g.input("weights", DType::F32, [b]),
    };
    let loss = diffusion_loss(&mut g, (unet, None), input, Distance::L2, o.dtype)?;
    let again = if o.recompute { blocks(&g) } else { vec![] };
    update(&mut g, loss, how, &again)?;
    Ok(g)
}

fn train(o: &Options, g: Graph, how: &Optimiser, device: &Device, report: &mut Value) -> Result<()> {
    let mut trainer = Trainer::new(g, how, &Weights::new(device), device)?;
    let parameters = trainer.parameters();
    let values = initial(&parameters, |_| false, 1)?;
    for ((name, _), value) in parameters.iter().zip(&values) {
        trainer.set(name, value)?;
    }
    drop(values);
    let mut random = Generator::new(2);
    for name in ["x", "context", "target"] {
        if !trainer.program().has(name) {
            continue;
        }
        let shape: Shape = trainer.program().spec(name)?.shape;
        trainer.write(name, &HostTensor::f32(shape, random.randn(shape.numel()))?)?;
    }
    let times = (0..o.batch).map(|i| (i * 1000 / o.batch) as f32).collect();
    trainer.write("t", &HostTensor::f32([o.batch], times)?)?;
    trainer.write("weights", &HostTensor::f32([o.batch], vec![1.0; o.batch])?)?;

    // On a GPU the first step loads the kernels, and the second records them as one launch.
    let warm = if matches!(device, Device::Cpu) { 1 } else { 2 };
    let mut seconds = vec![];
    for step in 0..warm + o.steps {
        let start = Instant::now();
        let made = trainer.step(1e-4, 0.9999)?;
        if step >= warm {
            seconds.push(start.elapsed().as_secs_f64());
            println!("loss {:.4}, gradients {:.4}: {:.3} s", made.loss, made.norm, seconds[step - warm]);
        }
    }
    let mut sorted = seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    println!("median {median:.3} s");
    let program = trainer.program();
    report["nodes"] = json!(program.graph().nodes().len());
    report["kernels"] = json!(program.launches());
    report["flops"] = json!(program.graph().total_cost().flops);
    report["seconds"] = json!(seconds);
    report["median_seconds"] = json!(median);
    if o.per_op {
        report["kinds"] = per_op(trainer.into_program(), device)?;
    }
    Ok(())
}

/// Seconds of a step by kind of node; products that carry a gradient back to the input of a layer are kinds of their own.
fn per_op(mut program: Program, device: &Device) -> Result<Value> {
    let mut recorder = Recorder::new(device, true);
    recorder.begin()?;
    program.run(&mut recorder)?;
    recorder.end()?;
    let mut kinds: BTreeMap<String, (usize, f64)> = BTreeMap::new();
    for span in recorder.spans() {
        let node = &program.graph().nodes()[span.step];
        let back = if node.label.ends_with(".dx") { " dx" } else { "" };
        let kind = kinds.entry(format!("{}{back}", node.op.name())).or_default();
        *kind = (kind.0 + 1, kind.1 + span.seconds);
    }
    let mut rows: Vec<_> = kinds.into_iter().collect();
    rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    rows.iter()
        .for_each(|(name, (count, seconds))| println!("{name:>20} {count:5} × {:8.1} ms", seconds * 1e3));
    let row = |(name, (count, seconds))| json!({ "kind": name, "count": count, "seconds": seconds });
    Ok(rows.into_iter().map(row).collect())
}

fn write(o: &Options, report: &Value) -> Result<()> {
    o.json.as_ref().map_or(Ok(()), |file| atomic::write(file, format!("{report:#}\n").as_bytes()))
}
