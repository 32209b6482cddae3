//! candle's side of `compare.py`: loads one part of a Stable Diffusion 1.5 checkpoint, then runs it once for every line on
//! stdin.
//!
//!     candle-worker FOLDER unet|vae-decoder SIDE BATCH f32          threads: RAYON_NUM_THREADS
//!
//! SIDE is that of the latents. The first line of stdout is JSON: `engine`, and `warm`, the seconds of the runs that
//! faulted the memory in. Every other line is the seconds of a run. On a CPU candle multiplies no bf16 matrices.

use candle_core::{DType, Device, Error, Result, Tensor};
use candle_transformers::models::stable_diffusion::StableDiffusionConfig;
use std::io::{BufRead, Write, stdin, stdout};
use std::time::Instant;

/// candle has no constant for its version; Cargo.lock holds this one.
const ENGINE: &str = "candle 0.11.1 f32";

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = || Error::Msg("want: FOLDER unet|vae-decoder SIDE BATCH f32".into());
    let [folder, component, side, batch, dtype] = &args[..] else { return Err(usage()) };
    let (side, batch): (usize, usize) =
        (side.parse().map_err(|_| usage())?, batch.parse().map_err(|_| usage())?);
    if dtype != "f32" {
        return Err(usage());
    }

    let device = Device::Cpu;
    let config = StableDiffusionConfig::v1_5(None, Some(8 * side), Some(8 * side));
    let file = |part| format!("{folder}/{part}/diffusion_pytorch_model.safetensors");
    let randn = |shape: &[usize]| Tensor::randn(0f32, 1f32, shape, &device);
    let latents = randn(&[batch, 4, side, side])?;
    let forward: Box<dyn Fn() -> Result<Tensor>> = match &**component {
        "unet" => {
            let unet = config.build_unet(file("unet"), &device, 4, false, DType::F32)?;
            let context = randn(&[batch, 77, 768])?;
            Box::new(move || unet.forward(&latents, 481.0, &context))
        }
        "vae-decoder" => {
            let vae = config.build_vae(file("vae"), &device, DType::F32)?;
            Box::new(move || vae.decode(&latents))
        }
        _ => return Err(usage()),
    };
    let once = || {
        let start = Instant::now();
        let out = forward()?;
        let seconds = start.elapsed().as_secs_f64();
        let sum = out.sum_all()?.to_scalar::<f32>()?;
        if !sum.is_finite() {
            return Err(Error::Msg(format!("the sum of the output is {sum}")));
        }
        Ok(seconds)
    };
    let warm = [once()?, once()?];
    say(&format!(r#"{{"engine": "{ENGINE}", "warm": {warm:?}}}"#))?;
    for line in stdin().lock().lines() {
        line?;
        say(&format!("{:.6}", once()?))?;
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    println!("{line}");
    Ok(stdout().flush()?)
}
