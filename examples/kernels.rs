//! Lists what each compiled kernel needs (registers, shared memory, stack, spills), then what is planned for every real
//! shape in bf16 and in f32 on an H200: the launch, how it fills the card, the time by the model of `ldm::ops::launch`, and the
//! floor. Nothing in it is measured. Fails if a kernel uses local memory.

use ldm::kernels;
use ldm::ops::Cost;
use ldm::ops::launch::{LaunchPlan, MULTIPROCESSORS, Planned, f32_floor, floor, occupancy, planned};
use ldm::tensor::DType;
use std::process::ExitCode;

fn main() -> ExitCode {
    print!("{}", kernels::report());
    for t in [DType::BF16, DType::F32] {
        match planned(t) {
            Ok(shapes) => {
                print!("\n{t}\n{}\n", plans(&shapes, if t == DType::F32 { f32_floor } else { floor }))
            }
            Err(e) => {
                eprintln!("{e}");
                return ExitCode::FAILURE;
            }
        }
    }
    print!("{}", kernels::summary());
    ExitCode::from(u8::from(!kernels::spilling().is_empty()))
}

/// A line per launch. Registers and what follows from them are there where the build found nvcc.
fn plans(shapes: &[Planned], floor: fn(Cost) -> f64) -> String {
    let mut text = format!(
        "{:10} {:62} {:38} {:>7} {:>5} {:>6} {:>4} {:>6} {:>5} {:>8} {:>8} {:>6}\n",
        "room", "shape", "kernel", "blocks", "regs", "smem", "b/mp", "waves", "tail", "us", "floor", "ratio"
    );
    for p in shapes {
        for (i, launch) in p.launches.iter().enumerate() {
            let (room, shape) = if i == 0 { (p.room, p.shape.as_str()) } else { ("", "") };
            text += &format!("{room:10} {shape:62} {}", launched(launch));
            if i + 1 == p.launches.len() {
                let floor = floor(p.cost);
                text +=
                    &format!(" {:8.2} {floor:8.2} {:6.2}", p.microseconds, p.microseconds / floor.max(1e-9));
            }
            text += "\n";
        }
        if p.launches.is_empty() {
            let floor = floor(p.cost);
            let (us, ratio) = (p.microseconds, p.microseconds / floor.max(1e-9));
            text += &format!("{:10} {:62} {:84} {us:8.2} {floor:8.2} {ratio:6.2}\n", p.room, p.shape, "");
        }
    }
    text
}

/// Kernel, blocks, registers, shared memory, blocks of a multiprocessor, waves, and how full the last one is.
fn launched(l: &LaunchPlan) -> String {
    let name = match l.variant {
        "" => l.kernel.to_string(),
        variant => format!("{}<{variant}>", l.kernel),
    };
    let Some(r) = l.resource("sm_90").or(l.resource("sm_80")) else {
        return format!("{name:38} {:7} {:>5} {:>6} {:>4} {:>6} {:>5}", l.blocks, "-", "-", "-", "-", "-");
    };
    let each = occupancy(r, l.threads);
    let slots = (each * MULTIPROCESSORS).max(1);
    let (waves, rest) = (l.blocks as f64 / slots as f64, l.blocks % slots);
    let tail = if rest == 0 { 100.0 } else { 100.0 * rest as f64 / slots as f64 };
    let (registers, smem) = (r.registers, r.smem);
    format!("{name:38} {:7} {registers:5} {smem:6} {each:4} {waves:6.2} {tail:4.0}%", l.blocks)
}
