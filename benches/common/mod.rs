//! What the benches share: the device under test, and how time is taken on it.

use criterion::Bencher;
use ldm::Result;
use ldm::backend::Device;
use ldm::exec::Program;
use std::process::exit;
use std::time::{Duration, Instant};

/// The device that `LDM_BENCH_DEVICE` names (`cpu`, `cuda`, `cuda:1`); the CPU if it names none. The second is its short
/// name.
pub fn device() -> (Device, &'static str) {
    let name = std::env::var("LDM_BENCH_DEVICE").unwrap_or_default();
    let name = if name.is_empty() { "cpu" } else { &name };
    let device = ok(name.parse().and_then(Device::open));
    let short = match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
    };
    eprintln!("device: {}", device.describe());
    (device, short)
}

/// The value, or the end of the bench with what went wrong.
pub fn ok<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|e| {
        eprintln!("error: {e}");
        exit(1)
    })
}

/// Times runs of a program: by the clock on the CPU, by events on a GPU.
pub fn time(b: &mut Bencher, device: &Device, program: &mut Program) {
    b.iter_custom(|n| ok(runs(device, program, n)));
}

fn runs(device: &Device, program: &mut Program, n: u64) -> Result<Duration> {
    match device {
        Device::Cpu => {
            let start = Instant::now();
            for _ in 0..n {
                program.run(&mut ())?;
            }
            Ok(start.elapsed())
        }
        Device::Cuda(cuda) => {
            let start = cuda.record()?;
            for _ in 0..n {
                program.run(&mut ())?;
            }
            let end = cuda.record()?;
            cuda.synchronize()?;
            Ok(Duration::from_secs_f64(start.elapsed(&end)? / 1e3))
        }
    }
}
