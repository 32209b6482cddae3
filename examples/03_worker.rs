//! One part of a model, loaded once, run for every line on stdin: our side of `tools/peers/compare.py`.
//!
//!     yes '' | head -n 5 | cargo run --release --example 03_worker -- FOLDER unet|vae-decoder SIDE BATCH f32|bf16|f16
//!
//! SIDE is that of the latents, an eighth of the picture's. The first line of stdout is JSON: `engine`, `flops` of a run,
//! and `warm`, the seconds of the runs that faulted the memory in. Every other line is the seconds of a run.

use ldm::exec::{Device, DeviceName, Program};
use ldm::io::ModelFolder;
use ldm::models::{Inventory, Model};
use ldm::pipeline::{Blueprint, Vae, load};
use ldm::rng::Generator;
use ldm::tensor::{DType, HostTensor, Spec};
use ldm::{Error, Result};
use std::io::{BufRead, Write, stdin, stdout};
use std::time::Instant;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = || Error::invalid("want: FOLDER unet|vae-decoder SIDE BATCH f32|bf16|f16");
    let [folder, component, side, batch, dtype] = &args[..] else { return Err(usage()) };
    let (side, batch) = (side.parse().map_err(|_| usage())?, batch.parse().map_err(|_| usage())?);
    let mut program = program(&ModelFolder::open(folder)?, component, [batch, side, side], dtype.parse()?)?;

    let flops = program.graph().total_cost().flops;
    let warm = [once(&mut program)?, once(&mut program)?];
    say(&format!(
        r#"{{"engine": "ldm {} {dtype}", "flops": {flops}, "warm": {warm:?}}}"#,
        env!("CARGO_PKG_VERSION")
    ))?;
    for line in stdin().lock().lines() {
        line.map_err(|e| Error::invalid(e.to_string()))?;
        say(&format!("{:.6}", once(&mut program)?))?;
    }
    Ok(())
}

/// The part for latents (B,H,W,·), with weights and with noise in its inputs.
fn program(folder: &ModelFolder, component: &str, size: [usize; 3], t: DType) -> Result<Program> {
    let blueprint = Blueprint::read(folder)?;
    let (name, graph, inventory) = match (component, &blueprint.vae) {
        ("unet", _) => {
            let unet = &blueprint.unet;
            ("unet", unet.graph(size, blueprint.condition.tokens(), t)?, unet.inventory(t)?)
        }
        ("vae-decoder", Vae::Kl(v)) => ("vae", v.decode_graph(size, t)?, v.inventory(t)?),
        ("vae-decoder", Vae::Vq(v)) => {
            let name = if folder.has("vqvae") { "vqvae" } else { "vae" };
            (name, v.decode_graph(size, t)?, v.inventory(t)?)
        }
        _ => return Err(Error::invalid(format!("component {component}: want unet or vae-decoder"))),
    };
    let device = Device::open(DeviceName::Auto)?;
    let weights = load(folder.checkpoint(name)?, &Inventory::of(&inventory), &device)?;
    fill(Program::new(graph, &weights, &device)?)
}

fn fill(mut program: Program) -> Result<Program> {
    let mut noise = Generator::new(0);
    for name in ["sample", "context", "latents"] {
        if program.has(name) {
            let Spec { shape, dtype } = program.spec(name)?;
            program.write(name, &HostTensor::f32(shape, noise.randn(shape.numel()))?.to(dtype))?;
        }
    }
    if program.has("timestep") {
        program.write("timestep", &HostTensor::f32([1], vec![481.0])?)?;
    }
    Ok(program)
}

/// Seconds of a run. Its result is read and looked at: what is not finite was not the work that was asked for.
fn once(program: &mut Program) -> Result<f64> {
    let output = program.graph().outputs()[0].0.clone();
    let start = Instant::now();
    program.run(&mut ())?;
    let result = program.read(&output)?; // waits for the device
    let seconds = start.elapsed().as_secs_f64();
    ldm::exec::check_finite(&result, "worker", &output)?;
    Ok(seconds)
}

fn say(line: &str) -> Result<()> {
    println!("{line}");
    stdout().flush().map_err(|e| Error::invalid(e.to_string()))
}
