//! Training by hand: a UNet, a loss, their gradients and AdamW as one graph, on random data.
//!
//!     cargo run --release --example 03_train -- CONFIG.json [side] [batch] [steps] [--per-op]
//!
//! CONFIG.json is that of a diffusers `UNet2DModel`. Prints the median time of a step, and with --per-op where the
//! time of one goes.

use ldm::exec::timing::Recorder;
use ldm::exec::{Device, DeviceName, Graph, Program, Weights, human_bytes};
use ldm::io::Config;
use ldm::models::{Model, UNet2D};
use ldm::ops::{Distance, Loss};
use ldm::rng::Generator;
use ldm::tensor::{DType, HostTensor, Shape};
use ldm::train::{Optimiser, Trainer, initial, update};
use std::collections::BTreeMap;
use std::time::Instant;

fn main() -> ldm::Result<()> {
    let (flags, words): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|a| a.starts_with("--"));
    let number = |i: usize, default: usize| words.get(i).and_then(|w| w.parse().ok()).unwrap_or(default);
    let config = words.first().ok_or_else(|| ldm::Error::invalid("want the config.json of a UNet"))?;
    let model = UNet2D::from_config(&Config::read(config)?)?;
    let [side, batch, steps] = [number(1, 32), number(2, 8), number(3, 5)];

    let mut g = Graph::new();
    let x = g.input("x", DType::F32, [batch, side, side, model.in_channels]);
    let t = g.input("t", DType::F32, [batch]);
    let target = g.input("target", DType::F32, [batch, side, side, model.out_channels]);
    let weights = g.input("weights", DType::F32, [batch]);
    g.train(true);
    let y = model.build(&mut g, x, (t, None))?;
    let loss = g.push("loss", Loss(Distance::L2), &[y, target, weights])?;
    let how = Optimiser::default();
    update(&mut g, loss, &how, &[])?;
    let count: usize = g.parameters().iter().map(|p| g.shape(p.state).numel()).sum();

    let device = Device::open(DeviceName::Cpu)?;
    let mut trainer = Trainer::new(g, &how, &Weights::new(&device), &device)?;
    let plan = trainer.program().plan();
    let (states, arena) = (human_bytes(plan.states), human_bytes(plan.arena));
    println!("{:.1} M parameters; weights and moments {states}, the rest {arena}", count as f64 / 1e6);
    let parameters = trainer.parameters();
    let values = initial(&parameters, |_| false, 1)?;
    for ((name, _), value) in parameters.iter().zip(&values) {
        trainer.set(name, value)?;
    }
    let mut random = Generator::new(2);
    for name in ["x", "target"] {
        let shape: Shape = trainer.program().spec(name)?.shape;
        trainer.write(name, &HostTensor::f32(shape, random.randn(shape.numel()))?)?;
    }
    trainer.write("t", &HostTensor::f32([batch], (0..batch).map(|i| (i * 100) as f32).collect())?)?;
    trainer.write("weights", &HostTensor::f32([batch], vec![1.0; batch])?)?;

    trainer.step(1e-4, 0.0)?;
    let mut times = vec![];
    for _ in 0..steps {
        let start = Instant::now();
        let report = trainer.step(1e-4, 0.0)?;
        times.push(start.elapsed().as_secs_f64());
        println!("loss {:.4}, gradients {:.4}: {:.3} s", report.loss, report.norm, times[times.len() - 1]);
    }
    times.sort_by(f64::total_cmp);
    println!("median {:.3} s", times[times.len() / 2]);
    if flags.iter().any(|f| f == "--per-op") {
        per_op(trainer, &device)?;
    }
    Ok(())
}

/// Seconds of a step by kind of node.
fn per_op(trainer: Trainer, device: &Device) -> ldm::Result<()> {
    let mut program: Program = trainer.into_program();
    let mut recorder = Recorder::new(device, true);
    recorder.begin()?;
    program.run(&mut recorder)?;
    let mut kinds: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    recorder.end()?;
    for span in recorder.spans() {
        let kind = kinds.entry(program.graph().nodes()[span.step].op.name()).or_default();
        *kind = (kind.0 + 1, kind.1 + span.seconds);
    }
    let mut rows: Vec<_> = kinds.into_iter().collect();
    rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    rows.iter()
        .for_each(|(name, (count, seconds))| println!("{name:>20} {count:5} × {:8.1} ms", seconds * 1e3));
    Ok(())
}
