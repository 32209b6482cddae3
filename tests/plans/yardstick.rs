//! What an op would take by a good kernel: the tiles, splits and clusters that suit its size best, exponentials, and one
//! launch, on an H200 whose tensor cores are used through `mma.sync`. No kernel of ours is looked at. The tiles are those of
//! a card that shares operands between two blocks, which ours do not, so the yardstick errs to their disadvantage.

use ldm::ops::launch::MMA;
use ldm::ops::{Cost, Op};
use ldm::tensor::Spec;

// Per microsecond: bytes of memory; of the second-level cache by streams, and of up to CACHED of them; clocks.
const MEMORY: f64 = 4.3e6;
const CACHE: f64 = 5.5e6;
const CACHED: f64 = 40e6;
const CLOCK: f64 = 1755.0;
/// Bytes that the second-level cache gives in a clock to kernels with tiles; to one multiprocessor, 64.
const OPERANDS: f64 = 6153.0;
const SMS: usize = 132;
/// Microseconds of a launch within a captured graph: to get going, to run out, and the step to the next.
const LAUNCH: f64 = 1.5;

/// Microseconds.
pub fn microseconds(op: &Op, x: &[Spec], cost: Cost) -> f64 {
    match op {
        Op::Linear(op) => {
            let (m, k, n) = (x[0].shape.rows(), x[0].shape.last(), x[1].shape[0] * (1 + op.more));
            product([m, n, k], (n * k * 2) as f64, cost)
        }
        Op::Conv2d(_) => {
            let y = op.infer(x).unwrap()[0].shape;
            if x[0].shape.last().min(y.last()) < 16 {
                return f64::max(cost.bytes / MEMORY, cost.flops / (MMA / 8.0)) + LAUNCH;
            }
            let (m, n) = (y.rows(), y.last());
            let k = (cost.flops / (2 * m * n) as f64) as usize;
            // In four phases there are four sets of weights.
            let weights = f64::max((n * k * 2) as f64, x[1].bytes() as f64);
            product([m, n, k], weights, cost)
        }
        Op::Attention(op) => {
            let tokens = |x: &Spec| x.shape.rows() / x.shape[0];
            let (b, t, s) = (x[0].shape[0], tokens(&x[0]), tokens(&x[if op.joined { 0 } else { 1 }]));
            let d = x[0].shape.last() / op.heads / if op.joined { 3 } else { 1 };
            attention(b * op.heads, t, s, d, cost.bytes)
        }
        _ => cost.bytes / stream(cost.bytes) + LAUNCH,
    }
}

fn stream(bytes: f64) -> f64 {
    if bytes < CACHED { CACHE } else { MEMORY }
}

/// Products with columns rounded up to what the instructions take, and seven tenths of the exponentials, 16 in a clock.
fn attention(heads: usize, t: usize, s: usize, d: usize, bytes: f64) -> f64 {
    let scores = (heads * t * s.next_multiple_of(8)) as f64;
    let products = 2.0 * scores * (d.next_multiple_of(16) + d.next_multiple_of(8)) as f64 / MMA;
    let exponentials = scores / (16 * SMS) as f64 / CLOCK;
    f64::max(products + 0.7 * exponentials, bytes / stream(bytes)) + LAUNCH
}

/// An m×k by k×n product in the tiles that suit it best.
fn product([m, n, k]: [usize; 3], weights: f64, cost: Cost) -> f64 {
    const SPLITS: [usize; 12] = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 18, 20];
    const CLUSTERS: [[usize; 2]; 3] = [[1, 1], [2, 1], [1, 2]];
    let blocks = k.div_ceil(64);
    let activations = cost.bytes - weights;
    let memory = (weights + if activations > CACHED { activations } else { 0.0 }) / MEMORY;
    let mut best = f64::INFINITY;
    for bm in [64, 128, 192, 256] {
        for bn in [32, 64, 80, 96, 128, 160, 192, 256, 320] {
            let warpgroups = if bm == 192 { 3 } else { bm.min(128) / 64 };
            let stages = (227 * 1024 - 2048) / ((bm + bn) * 128);
            let registers = bm * bn / (warpgroups * 128);
            if registers > if warpgroups == 3 { 128 } else { 200 }
                || stages < if bm * bn >= 128 * 192 { 3 } else { 4 }
            {
                continue;
            }
            let tiles = [m.div_ceil(bm), n.div_ceil(bn)];
            for split in SPLITS.into_iter().filter(|&s| s == 1 || blocks / s >= 4) {
                for [cm, cn] in CLUSTERS.into_iter().filter(|c| tiles[0] % c[0] == 0 && tiles[1] % c[1] == 0)
                {
                    let work = tiles[0] * tiles[1] * split;
                    let waves = work.div_ceil(SMS) as f64;
                    let each = blocks.div_ceil(split) as f64;
                    let by_products = (2 * bm * bn * 64) as f64 * each / (MMA / SMS as f64);
                    let reads = bm / 64 * (64 * bn.div_ceil(256) + bn) * 128;
                    let by_shared = ((bm + bn) * 128 + reads) as f64 * each / (128.0 * CLOCK);
                    let operands = (bm as f64 / cn as f64 + bn as f64 / cm as f64) * 128.0 * each;
                    let supply = f64::min(64.0, OPERANDS / work.min(SMS) as f64) * CLOCK;
                    let all = f64::max(by_products, by_shared).max(operands / supply);
                    let sums = if split > 1 { (split * m * n * 4) as f64 / CACHE + 0.5 } else { 0.0 };
                    best = best.min(f64::max(waves * all, memory) + sums + LAUNCH);
                }
            }
        }
    }
    best
}

#[test]
fn the_yardstick_of_known_shapes() {
    // Rows, columns, depth, microseconds: 470 TFLOP/s of tensor cores, and what the size costs on top.
    for (m, n, k, want) in [
        (512, 1280, 1280, 5.18),
        (128, 1280, 11520, 10.76),
        (8192, 2560, 320, 30.79),
        (512, 10240, 1280, 30.95),
        (2048, 640, 5760, 34.63),
    ] {
        let cost = Cost { flops: (2 * m * n * k) as f64, bytes: (2 * (m * k + n * k + m * n)) as f64 };
        let got = product([m, n, k], (n * k * 2) as f64, cost);
        assert!((got - want).abs() < 0.01, "{m} {n} {k}: {got:.3}; want {want}");
    }
    let got = attention(16, 4096, 4096, 40, 21e6);
    assert!((got - 152.6).abs() < 0.5, "{got}");
}
