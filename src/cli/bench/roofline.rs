//! The machine's own ceilings: how fast it copies, and how fast it multiplies.

use super::record::{Ceilings, CopyRate, MultiplyRate, Row};
use crate::backend::cpu::simd::{Arith, Block, Isa, Kernel, LDA, Panel, Simd, tile};
use crate::backend::cuda::Cuda;
use crate::error::Result;
use crate::exec::{Device, Program, Weights};
use crate::graph::{Graph, Layout};
use crate::ops::Linear;
use crate::tensor::{DType, HostTensor, Spec};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// Each ceiling is the best of so many tries: short ones, so that other work on the machine misses some.
const TRIES: usize = 20;
/// Seconds of one try, about.
const TRY: f64 = 0.02;
/// The same for multiplying: shorter than a scheduler's turn.
const SLICES: usize = 150;
const SLICE: f64 = 0.002;

/// A way to multiply, compiled for an instruction set: runs `rounds`, returns the operations done.
struct Multiply {
    name: &'static str,
    /// Types that the engine computes in this way.
    dtypes: &'static [DType],
    sets: fn() -> Vec<Isa>,
    run: fn(Isa, usize) -> f64,
}

/// Every way in which the CPU engine multiplies. One line each.
const MULTIPLY: &[Multiply] = &[
    Multiply {
        name: "f32 fma",
        dtypes: &[DType::F32, DType::F16, DType::BF16],
        sets: || Isa::available().to_vec(),
        run: |isa, rounds| isa.run(Fma { rounds }),
    },
    Multiply {
        name: "bf16 pairs",
        dtypes: &[DType::BF16],
        sets: || Isa::available().iter().copied().filter(|isa| isa.has_dot()).collect(),
        run: pairs,
    },
];

/// Chains of multiply-adds in registers: two units that take four cycles each are kept busy by eight. With more, the
/// portable code spills: 9 GFLOP/s instead of 39 on one core with SSE2.
const CHAINS: usize = 8;

struct Fma {
    rounds: usize,
}

impl Kernel for Fma {
    type Out = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        // Converges to 2: no chain overflows or becomes subnormal, which would be slow.
        let (a, b) = (s.splat(black_box(0.5)), s.splat(black_box(1.0)));
        let mut x = [s.splat(black_box(1.0)); CHAINS];
        for _ in 0..self.rounds {
            for x in &mut x {
                *x = s.fma(*x, a, b);
            }
        }
        let sum = x.into_iter().fold(s.splat(0.0), |sum, x| s.add(sum, x));
        black_box(s.reduce(sum, |a, b| a + b));
        (2 * S::LANES * CHAINS * self.rounds) as f64
    }
}

/// Register tiles of pairs of bf16, whose operands stay in the first-level cache.
fn pairs(isa: Isa, rounds: usize) -> f64 {
    /// Words of the inner dimension.
    const DEEP: usize = 128;
    let (rows, width) = (isa.mr(), isa.nr());
    // Two bf16 ones.
    let one = f32::from_bits(0x3f80_3f80);
    let (a, b) = (vec![one; rows * LDA], vec![one; DEEP * width]);
    let mut c = vec![0.0; rows * width];
    for _ in 0..rounds {
        let panel = Panel { isa, data: black_box(&b), width, kc: DEEP, arith: Arith::Dot };
        let mut block = Block::new(black_box(&mut c), width, rows, width);
        tile(rows, black_box(&a), &panel, &mut block, (0, 0), false);
    }
    // Two products and two sums in each word.
    (4 * rows * width * DEEP * rounds) as f64
}

/// Bytes that a copy touches over and over: in the second-level cache, in the last one, in memory.
const SETS: [usize; 3] = [1 << 19, 1 << 24, 1 << 29];

/// Measures the ceilings of a device.
///
/// On a GPU, multiplying is that of the engine's own product, large and square, in each type.
pub(super) fn measure(device: &Device) -> Result<Ceilings> {
    match device {
        Device::Cpu => Ok(Ceilings { copy: SETS.map(copy).to_vec(), multiply: multiply() }),
        Device::Cuda(c) => {
            let n = (c.memory()?.0 / 4).min(1 << 30) & !255;
            let (from, to) = (c.alloc(n)?, c.alloc(n)?);
            c.fill(&from, 0, n, 0)?;
            let mut best = f64::INFINITY;
            for _ in 0..TRIES {
                let start = c.record()?;
                c.copy(&from, 0, &to, 0, n)?;
                let end = c.record()?;
                best = best.min(start.elapsed(&end)? / 1e3);
            }
            let rate =
                CopyRate { set_bytes: 2 * n as u64, bytes_per_second: 2.0 * n as f64 / best.max(1e-12) };
            let multiply = DType::FLOATS.iter().map(|&t| product(c, device, t)).collect::<Result<_>>()?;
            Ok(Ceilings { copy: vec![rate], multiply })
        }
    }
}

/// Sides of the products that a GPU is measured with: up to where one takes a millisecond.
const SIDES: [usize; 5] = [256, 512, 1024, 2048, 4096];

/// The best rate at which a GPU runs a product in a type, of the sides that were tried.
fn product(cuda: &Cuda, device: &Device, dtype: DType) -> Result<MultiplyRate> {
    let (mut best, mut name) = (0.0, String::new());
    for side in SIDES {
        // Numbers of both signs and many sizes: zeros would take less power, and a faster clock.
        let values =
            (0..side * side).map(|i| ((i * 2_654_435_761) % 2001) as f64 / 1000.0 - 1.0).collect::<Vec<_>>();
        let matrix = HostTensor::from_f64(Spec::new(dtype, [side, side]), &values)?;
        let mut g = Graph::new();
        let (x, w) = (g.input("x", dtype, [side, side]), g.weight("w", Layout::Linear, dtype, [side, side])?);
        let y = g.push("product", Linear::default(), &[x, w])?;
        g.output("y", y);
        let mut weights = Weights::new(device);
        weights.insert_as("w", &matrix, Layout::Linear)?;
        let mut program = Program::new(g, &weights, device)?;
        program.write("x", &matrix)?;
        let mut least = f64::INFINITY;
        for _ in 0..TRIES {
            let start = cuda.record()?;
            program.run(&mut ())?;
            least = least.min(start.elapsed(&cuda.record()?)? / 1e3);
        }
        let rate = 2.0 * (side as f64).powi(3) / least.max(1e-12);
        if rate > best {
            (best, name) = (rate, format!("product {side}×{side}×{side}"));
        }
        if least > 1e-3 {
            break;
        }
    }
    let (set, dtypes) = (cuda.capability(), vec![dtype.to_string()]);
    Ok(MultiplyRate {
        name,
        instruction_set: format!("sm_{}{}", set.0, set.1),
        dtypes,
        flops_per_second: best,
    })
}

fn multiply() -> Vec<MultiplyRate> {
    let mut rates = Vec::new();
    for way in MULTIPLY {
        for isa in (way.sets)() {
            let rate = |rounds: usize| {
                let start = Instant::now();
                (way.run)(isa, rounds) / start.elapsed().as_secs_f64().max(1e-9)
            };
            // Nothing is shared: all threads at once, each with its own clock, and their best tries added up.
            let best = rayon::broadcast(|_| {
                let rounds = (rate(1 << 10) / (way.run)(isa, 1) * SLICE) as usize + 1;
                (0..SLICES).map(|_| rate(rounds)).fold(0.0, f64::max)
            });
            let best = best.into_iter().sum();
            rates.push(MultiplyRate {
                name: way.name.into(),
                instruction_set: format!("{isa:?}"),
                dtypes: way.dtypes.iter().map(|t| t.to_string()).collect(),
                flops_per_second: best,
            });
        }
    }
    rates
}

/// Copies half of `set` bytes into the other half, by all threads, each its own part.
fn copy(set: usize) -> CopyRate {
    let half = set / 2;
    let (from, mut to) = (vec![1u8; half], vec![0u8; half]);
    let part = half.div_ceil(rayon::current_num_threads());
    let mut all = |rounds: usize| {
        let start = Instant::now();
        to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| {
            for _ in 0..rounds {
                black_box(&mut *to).copy_from_slice(black_box(from));
            }
        });
        (set * rounds) as f64 / start.elapsed().as_secs_f64().max(1e-9)
    };
    let rounds = (all(1) * TRY / set as f64) as usize + 1;
    let best = (0..TRIES).map(|_| all(rounds)).fold(0.0, f64::max);
    CopyRate { set_bytes: set as u64, bytes_per_second: best }
}

impl Ceilings {
    /// Operations per second in a type: of the fastest way; 0 where none was measured.
    pub(super) fn flops(&self, dtype: &str) -> f64 {
        let ways = self.multiply.iter().filter(|m| m.dtypes.iter().any(|t| t == dtype));
        ways.map(|m| m.flops_per_second).fold(0.0, f64::max)
    }

    /// Bytes per second for data of this size: of the smallest set that holds it.
    pub(super) fn bandwidth(&self, bytes: f64) -> f64 {
        let fits = self.copy.iter().find(|c| c.set_bytes as f64 >= bytes).or(self.copy.last());
        fits.map_or(0.0, |c| c.bytes_per_second)
    }

    /// Seconds that a row takes at least: what it multiplies or what it moves, whichever takes longer.
    pub(super) fn least(&self, row: &Row, dtype: &str) -> f64 {
        let runs = row.runs.max(1) as f64;
        let at = |work: f64, rate: f64| if rate > 0.0 { work / rate } else { 0.0 };
        at(row.flops, self.flops(dtype)).max(at(row.bytes, self.bandwidth(row.bytes / runs)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_bound_by_what_takes_longer() {
        let copy = vec![
            CopyRate { set_bytes: 100, bytes_per_second: 1e3 },
            CopyRate { set_bytes: 1000, bytes_per_second: 1e2 },
        ];
        let rate = |set: &str, r| MultiplyRate {
            name: "f32 fma".into(),
            instruction_set: set.into(),
            dtypes: vec!["f32".into()],
            flops_per_second: r,
        };
        let c = Ceilings { copy, multiply: vec![rate("a", 10.0), rate("b", 20.0)] };
        let text = || String::new();
        let row = |runs, flops, bytes| {
            let (stage, node, op, shape, variant) = (text(), text(), text(), text(), text());
            Row { stage, node, op, shape, variant, runs, seconds: 1.0, fastest: 1.0, flops, bytes }
        };
        assert_eq!(c.least(&row(1, 40.0, 100.0), "f32"), 2.0);
        assert_eq!(c.least(&row(1, 2.0, 500.0), "f32"), 5.0);
        assert_eq!(c.least(&row(10, 2.0, 1000.0), "f32"), 1.0, "ten runs over 100 bytes each");
        assert_eq!(
            c.least(&row(1, 40.0, 5000.0), "bf16"),
            50.0,
            "no ceiling for the type; beyond the largest set"
        );
    }

    #[test]
    fn every_way_to_multiply_runs_on_every_set_and_counts_its_work() {
        for way in MULTIPLY {
            for isa in (way.sets)() {
                assert_eq!((way.run)(isa, 10), 10.0 * (way.run)(isa, 1), "{} {isa:?}", way.name);
            }
        }
    }
}
