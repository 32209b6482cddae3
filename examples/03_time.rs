//! Seconds per UNet evaluation and per decoding, for a checkpoint and a size: the numbers of the README.
//!
//!     cargo run --release --example 03_time -- FOLDER unet|vae [LATENT_SIDE] [ITERATIONS]

use ldm::exec::{Device, DeviceName, Program};
use ldm::io::ModelFolder;
use ldm::models::{Inventory, Model};
use ldm::pipeline::{Blueprint, Vae, load};
use ldm::rng::Generator;
use ldm::tensor::{DType, HostTensor};
use std::time::Instant;

fn main() -> ldm::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| args.get(i).and_then(|a| a.parse().ok()).unwrap_or(default);
    let usage = || ldm::Error::invalid("want: FOLDER unet|vae [LATENT_SIDE] [ITERATIONS]");
    let (folder, part) = (args.first().ok_or_else(usage)?, args.get(1).ok_or_else(usage)?);
    let (side, iterations) = (number(2, 64), number(3, 5));

    let folder = ModelFolder::open(folder)?;
    let blueprint = Blueprint::read(&folder)?;
    let device = Device::open(DeviceName::Auto)?;
    let (graph, inventory) = match (&**part, &blueprint.vae) {
        ("unet", _) => {
            let unet = &blueprint.unet;
            (unet.graph([2, side, side], 77, DType::F32)?, unet.inventory(DType::F32)?)
        }
        ("vae", Vae::Kl(v)) => (v.decode_graph([1, side, side], DType::F32)?, v.inventory(DType::F32)?),
        ("vae", Vae::Vq(v)) => (v.decode_graph([1, side, side], DType::F32)?, v.inventory(DType::F32)?),
        _ => return Err(usage()),
    };
    let component = if part == "unet" || folder.has(part) { part } else { "vqvae" };
    let weights = load(folder.checkpoint(component)?, &Inventory::of(&inventory), &device)?;
    let mut program = Program::new(graph, &weights, &device)?;
    let mut noise = Generator::new(0);
    for name in ["sample", "context", "latents"].into_iter().filter(|n| program.has(n)).collect::<Vec<_>>() {
        let shape = program.spec(name)?.shape;
        program.write(name, &HostTensor::f32(shape, noise.randn(shape.numel()))?)?;
    }
    if program.has("timestep") {
        program.write("timestep", &HostTensor::f32([1], vec![481.0])?)?;
    }
    let flops = program.graph().total_cost().flops;
    let output = program.graph().outputs()[0].0.clone();
    for _ in 0..iterations {
        let start = Instant::now();
        program.run(&mut ())?;
        program.read(&output)?; // waits for the device
        let seconds = start.elapsed().as_secs_f64();
        println!("{seconds:.3} s  {:.1} GFLOP/s", flops / seconds / 1e9);
    }
    Ok(())
}
