//! Products in f32 by float units: which of them the kernel takes, in which tiles, and the launch.

use super::super::prelude::*;
use super::tiles::{Sums, Tile, Tiled, corners_fit, operands, tile, windows};
use super::{Conv2d, Epi, Linear};
use crate::backend::cpu::gemm::ConvShape;
pub(super) use crate::kernels::conv2d_f32 as k;

/// The first for the large levels; the lower ones for what they divide better and for the small levels, the narrow one for
/// the last layers.
pub(super) const TILES: [Tile; 4] = [
    tile("BM=128,BN=128", 128, 128),
    tile("BM=128,BN=64", 128, 64),
    tile("BM=64,BN=64", 64, 64),
    tile("BM=128,BN=16", 128, 16),
];

/// Microseconds that a product takes by a model of an H200: float units at [`launch::FFMA`], in a loop of which a share is
/// other instructions; blocks that fit onto a multiprocessor share it, and fewer than two warps for each of its four
/// schedulers leave some idle; 800 clocks until a copy has landed; memory at 4.3 TB/s. Splits are added up as
/// in [`Tile::additions`]. Measured on an H100, all of it takes a quarter longer.
pub(super) fn microseconds(tile: Tile, &Sums { m, n, blocks, .. }: &Sums, splits: usize) -> f64 {
    const SMS: f64 = launch::MULTIPROCESSORS as f64;
    const FMA: f64 = launch::FFMA / 2.0 / SMS / launch::CLOCK; // per clock and multiprocessor
    let warps = k::BLOCK.of(tile.name) as f64 / 32.0;
    // Of the instructions between two k-blocks, as they are in the machine code: 1024 of 1220; of 700, in the narrow tile, 512.
    let share = if tile.columns >= 64 { 0.84 } else { 0.73 };
    let (left, added) = tile.additions(splits);
    let tiles = tile.count(m, n) as f64;
    let [bm, bn, bk, splits] = [tile.rows, tile.columns, k::BK, splits].map(|n| n as f64);
    let grid = tiles * splits;
    let each = (grid / SMS).ceil(); // blocks that one multiprocessor runs
    let beside = warps * each.min(16.0 / warps); // warps of them at a time
    let alone = if beside < 4.0 { 1.2 * 4.0 / beside } else { 1.0 + 0.2 * f64::from(u8::from(beside < 8.0)) };
    let steps = (blocks as f64 / splits).ceil();
    let ends = (tiles / SMS).ceil() * (bm * bn * 8.0 / 40.0 + added);
    let waves = (each * warps / 16.0).ceil();
    let landed = waves * steps * 800.0 / (k::STAGES - 1) as f64;
    let clocks = f64::max(each * (steps * bm * bn * bk / FMA / share * alone + left) + ends, landed) + 1500.0;
    // Each block reads its operands through the second-level cache, 6153 bytes a clock.
    let clocks = f64::max(clocks, grid * steps * (bm + bn) * bk * 4.0 / 6153.0);
    let bytes = (m * n) as f64 * 4.0 + (n * blocks) as f64 * bk * 4.0;
    1.25 * f64::max(clocks / launch::CLOCK, bytes / launch::MEMORY) + launch::GAP
}

/// A convolution as the kernel takes it; `None` for what it does not take.
pub(super) fn conv(op: &Conv2d, x: &[Spec]) -> Option<Sums> {
    let s = op.shape(x[0].shape, x[1].shape)?;
    let (m, n) = (s.b * s.out_h * s.out_w, op.columns(x[1].shape));
    // A tile lies in one phase: in one small image.
    let (rows, taps) = if op.phases { (s.h * s.w, 4) } else { (m, s.kh * s.kw) };
    let fits = op.shortcut == 0 && corners_fit(op, &s) && takes(x, &op.epi, [m, n, taps * s.c], s.c);
    fits.then(|| Sums { rows, ..Sums::new(m, n, taps * s.c.div_ceil(k::BK)) })
}

/// A matrix product as the kernel takes it; `None` for what it does not take.
pub(super) fn linear(op: &Linear, x: &[Spec]) -> Option<Sums> {
    let (m, c, n) = (x[0].shape.rows(), x[0].shape.last(), x[1].shape[0]);
    let fits = op.more == 0 && takes(x, &op.epi, [m, n, c], c);
    fits.then(|| Sums::new(m, n, c.div_ceil(k::BK)))
}

pub(super) fn launch_conv(product: &Tiled, op: &Conv2d, s: &ConvShape, io: &cuda::Call) -> Result<()> {
    let mut p = k::Conv2dF32 { flat: s.pointwise() as i32, ..Default::default() };
    windows!(io, s, p);
    if op.phases {
        (p.phases, p.upsample, p.kh, p.kw) = (1, 0, 2, 2);
    }
    launch(product, &op.epi, io, p)
}

pub(super) fn launch_linear(product: &Tiled, op: &Linear, io: &cuda::Call) -> Result<()> {
    let (c, out_h) = (io.int(io.x_spec(0).shape.last())?, io.int(product.sums.m)?);
    let p = k::Conv2dF32 { c, kh: 1, kw: 1, out_h, out_w: 1, flat: 1, ..Default::default() };
    launch(product, &op.epi, io, p)
}

fn launch(product: &Tiled, epi: &Epi, io: &cuda::Call, mut p: k::Conv2dF32) -> Result<()> {
    operands!(io, epi, p);
    let Sums { m, n, blocks, .. } = product.sums;
    (p.m, p.o, p.blocks) = (io.int(m)?, io.int(n)?, io.int(blocks)?);
    p.w_row = p.kh * p.kw * p.c;
    if product.splits > 1 {
        (p.partial, p.counters) = (io.scratch, io.counters()?);
    }
    let name = product.tile.name;
    io.launch(k::CONV2D_F32, DType::F32, name, product.grid(), k::BLOCK.of(name), p)
}

/// Whether type and sizes suit the kernel, which counts elements with 32 bits, also those of rows of w beyond the last.
fn takes(x: &[Spec], epi: &Epi, [m, n, k]: [usize; 3], c: usize) -> bool {
    let counts = |elements: usize| elements < 1 << 31;
    x[0].dtype == DType::F32
        && !epi.fused()
        && c % 4 == 0
        && m * n * k > 0
        && x.iter().all(|s| counts(s.shape.numel()))
        && counts(x[1].shape.numel() + 128 * k)
}

#[cfg(test)]
mod tests {
    use super::super::tensor_cores;
    use super::*;

    #[test]
    fn every_variant_is_a_tile() {
        let names: Vec<_> = TILES.iter().map(|t| t.name).collect();
        assert_eq!(names, k::VARIANTS);
        for t in TILES {
            assert_eq!(t.name, format!("BM={},BN={}", t.rows, t.columns));
        }
    }

    #[test]
    fn what_is_chosen_for_the_real_shapes() {
        for (m, n, k, chosen) in [
            (8192, 320, 2880, ("BM=128,BN=64", 2)),
            (2048, 640, 5760, ("BM=64,BN=64", 2)),
            (512, 1280, 11520, ("BM=64,BN=64", 4)),
            (128, 1280, 11520, ("BM=64,BN=64", 13)),
            (8192, 2560, 320, ("BM=64,BN=64", 1)),
            (262144, 128, 1152, ("BM=128,BN=128", 1)),
            (8192, 4, 2880, ("BM=128,BN=16", 8)),
        ] {
            let p = Tiled::of_floats(Sums::new(m, n, k / 16));
            let us = p.plan(DType::F32).microseconds;
            let rate = 2.0 * (m * n * k) as f64 / us / 1e6;
            println!("{m} {n} {k}: {} {} {us:.1} us, {rate:.1} TFLOP/s", p.tile.name, p.splits);
            assert_eq!((p.tile.name, p.splits), chosen, "{m} {n} {k}");
        }
    }

    #[test]
    fn listed_cases_take_every_tile_whole_and_split() {
        let all = [super::super::cases::conv(), super::super::cases::linear()].concat();
        let mut taken = vec![];
        for case in all.iter().filter(|c| !c.bench && c.types.contains(&DType::F32)) {
            taken.extend(case.op.launches(&case.specs(DType::F32)).iter().map(|l| (l.variant, l.splits > 1)));
        }
        for t in TILES {
            for split in [false, true] {
                assert!(taken.contains(&(t.name, split)), "{} split {split}: {taken:?}", t.name);
            }
        }
    }

    #[test]
    fn f32_takes_the_fast_kernel_and_what_that_cannot_the_plain_one() {
        let specs = |c| [Spec::new(DType::F32, [2, 8, 8, c]), Spec::new(DType::F32, [16, 3, 3, c])];
        let bare = Conv2d { epi: Epi::default(), ..Conv2d::same(3) };
        for (c, kernels) in [(4, ["conv2d_f32"].as_slice()), (320, &["conv2d_f32"]), (3, &[]), (37, &[])] {
            let launches = bare.launches(&specs(c));
            let got: Vec<_> = launches.iter().map(|l| l.stem).collect();
            assert_eq!(got, kernels, "{c} channels");
            assert!(tensor_cores::conv(&bare, &specs(c)).is_none(), "tensor cores round f32");
        }
        let rows = |t, c| [Spec::new(t, [8, c]), Spec::new(t, [16, c])];
        assert!(linear(&Linear::default(), &rows(DType::F32, 36)).is_some());
        assert!(linear(&Linear::default(), &rows(DType::F32, 37)).is_none());
        assert!(linear(&Linear::default(), &rows(DType::F16, 36)).is_none());
    }
}
