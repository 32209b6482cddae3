//! Products on tensor cores: which of them the kernel takes, in which tiles, and the launch.

use super::super::prelude::*;
use super::tiles::{Sums, Tile, Tiled, corners_fit, operands, tile, windows};
use super::{Conv2d, Epi, Linear, SLAB};
use crate::backend::cpu::gemm::ConvShape;
pub(super) use crate::kernels::conv2d_mma as k;

/// 160 divides the channels of the Stable Diffusion family, 128 those of the autoencoders; half of 160 gives twice as many
/// tiles, one for each multiprocessor in products of few rows; lower tiles are for the small levels, and the narrow one for
/// the last layers.
pub(super) const TILES: [Tile; 7] = [
    tile("BM=128,BN=160", 128, 160),
    tile("BM=128,BN=128", 128, 128),
    tile("BM=128,BN=80", 128, 80).without_gates(),
    tile("BM=64,BN=160", 64, 160),
    tile("BM=64,BN=80", 64, 80).without_gates(),
    tile("BM=64,BN=64", 64, 64),
    tile("BM=64,BN=16", 64, 16),
];

/// Blocks of channels that a part of a sum has at least.
const LEAST: usize = 2;

/// Microseconds that a product takes by a model of an H200: tensor cores at 470 TFLOP/s through `mma.sync`, 128 bytes of
/// shared memory per clock and multiprocessor, 6153 bytes of operands per clock from the second-level cache, 4.3 TB/s of
/// memory, and a wave of blocks as long as its slowest. Not measured: it orders the choices.
pub(super) fn microseconds(tile: Tile, &Sums { m, n, blocks, .. }: &Sums, splits: usize) -> f64 {
    const SMS: f64 = launch::MULTIPROCESSORS as f64;
    const FMA: f64 = launch::MMA / 2.0 / SMS / launch::CLOCK; // per clock and multiprocessor
    let [warps_m, warps_n] = [k::WARPS_M.of(tile.name), k::WARPS_N.of(tile.name)].map(|n| n as f64);
    let (left, added) = tile.additions(splits);
    let tiles = tile.count(m, n) as f64;
    let [bm, bn, bk, splits] = [tile.rows, tile.columns, k::BK, splits].map(|n| n as f64);
    let read = warps_m * warps_n * (bm / warps_m + bn / warps_n) * bk * 2.0;
    let write = (bm + bn) * bk * 2.0;
    let grid = tiles * splits;
    let each = (grid / SMS).ceil(); // blocks that one multiprocessor runs
    let alone = if each < 2.0 { 1.2 } else { 1.0 }; // nothing hides the latencies of a single one
    let steps = (blocks as f64 / splits).ceil();
    let step = f64::max(bm * bn * bk / FMA, (read + write) / 128.0) * alone;
    let end = bm * bn * 8.0 / 128.0 * 1.5 + added;
    let clocks = each * (steps * step + left) + (tiles / SMS).ceil() * end + 1500.0;
    let clocks = f64::max(clocks, grid * steps * write / 6153.0);
    let bytes = (n * blocks) as f64 * bk * 2.0;
    f64::max(clocks / launch::CLOCK, bytes / launch::MEMORY) + launch::GAP
}

/// A convolution as the kernel takes it; `None` for what it does not take.
pub(super) fn conv(op: &Conv2d, x: &[Spec]) -> Option<Sums> {
    let s = op.shape(x[0].shape, x[1].shape)?;
    let first = op.epi.inputs().end;
    let others: Vec<usize> = x[first..].iter().take(op.shortcut).map(|s| s.shape.last()).collect();
    let fits = takes(x) && s.c % 8 == 0 && others.iter().all(|c| c % 8 == 0) && corners_fit(op, &s);
    let blocks = |c: usize| c.div_ceil(k::BK);
    let (m, n) = (s.b * s.out_h * s.out_w, op.columns(x[1].shape));
    // A tile lies in one phase: in one small image.
    let (rows, taps) = if op.phases { (s.h * s.w, 4) } else { (m, s.kh * s.kw) };
    let sum = taps * blocks(s.c) + others.into_iter().map(blocks).sum::<usize>();
    let fits = fits && m * n > 0 && (!op.phases || rows % SLAB == 0);
    fits.then_some(Sums { rows, least: LEAST, ..Sums::new(m, n, sum) })
}

/// A matrix product as the kernel takes it; `None` for what it does not take.
pub(super) fn linear(op: &Linear, x: &[Spec]) -> Option<Sums> {
    let (m, c, part) = (x[0].shape.rows(), x[0].shape.last(), x[1].shape[0]);
    let n = part * (1 + op.more);
    let fits = takes(x)
        && c % 8 == 0
        && m * n * c > 0
        && (!op.epi.glu || n % 16 == 0)
        && (op.more == 0 || part % 16 == 0);
    fits.then(|| Sums { part, gates: op.epi.glu, least: LEAST, ..Sums::new(m, n, c.div_ceil(k::BK)) })
}

pub(super) fn launch_conv(product: &Tiled, op: &Conv2d, s: &ConvShape, io: &cuda::Call) -> Result<()> {
    let (w_row, w_tap) = (io.int(s.kh * s.kw * s.c)?, io.int(s.c)?);
    let mut p = k::Conv2dMma { w_row, w_tap, segments: 1, ..Default::default() };
    windows!(io, s, p);
    if op.phases {
        (p.phases, p.upsample, p.kh, p.kw, p.w_row) = (1, 0, 2, 2, 4 * p.c);
    }
    p.flat = s.pointwise() as i32;
    if op.shortcut > 0 {
        let first = op.epi.inputs().end;
        let width = |i: usize| io.x_spec(first + i).shape.last();
        let w = io.x(first + op.shortcut);
        let row = io.int((0..op.shortcut).map(width).sum())?;
        (p.x1, p.w1, p.c1, p.w_row1, p.flat1) = (io.x(first), w, io.int(width(0))?, row, 1);
        if op.shortcut == 2 {
            let element = io.x_spec(0).dtype.size();
            (p.x2, p.w2, p.c2, p.w_row2) =
                (io.x(first + 1), w.offset(width(0) * element), io.int(width(1))?, row);
        }
        p.bias1 = io.x(first + op.shortcut + 1);
        p.segments += op.shortcut as i32;
    }
    launch(product, &op.epi, io, p)
}

pub(super) fn launch_linear(product: &Tiled, op: &Linear, io: &cuda::Call) -> Result<()> {
    let c = io.int(io.x_spec(0).shape.last())?;
    let (w1, w2) = if op.more > 0 { (io.x(2), io.x(3)) } else { Default::default() };
    let p = k::Conv2dMma {
        w1,
        w2,
        part: if op.more > 0 { io.int(io.x_spec(1).shape[0])? } else { 0 },
        c,
        kh: 1,
        kw: 1,
        out_h: io.int(product.sums.m)?,
        out_w: 1,
        flat: 1,
        w_row: c,
        w_tap: c,
        segments: 1,
        ..Default::default()
    };
    launch(product, &op.epi, io, p)
}

fn launch(product: &Tiled, epi: &Epi, io: &cuda::Call, mut p: k::Conv2dMma) -> Result<()> {
    operands!(io, epi, p);
    p.stats = if epi.stats { io.y(1) } else { Default::default() };
    let Sums { m, n, blocks, .. } = product.sums;
    (p.m, p.o, p.blocks) = (io.int(m)?, io.int(epi.columns(n))?, io.int(blocks)?);
    p.glu = epi.glu as i32;
    if product.splits > 1 {
        (p.partial, p.counters) = (io.scratch, io.counters()?);
    }
    io.launch(k::CONV2D_MMA, io.y_spec(0).dtype, product.tile.name, product.grid(), k::BLOCK.of(product.tile.name), p)
}

/// Whether type and sizes suit the kernel, which counts elements with 32 bits.
fn takes(x: &[Spec]) -> bool {
    matches!(x[0].dtype, DType::F16 | DType::BF16) && x.iter().all(|s| s.shape.numel() < 1 << 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_is_a_tile() {
        let names: Vec<_> = TILES.iter().map(|t| t.name).collect();
        assert_eq!(names, k::VARIANTS);
        for t in TILES {
            assert_eq!(t.name, format!("BM={},BN={}", t.rows, t.columns));
        }
    }

    fn chosen(m: usize, n: usize, k: usize) -> (&'static str, usize) {
        let p = Tiled::of_tensor_cores(Sums::new(m, n, k / 32));
        (p.tile.name, p.splits)
    }

    #[test]
    fn what_is_chosen_for_the_real_shapes() {
        for (m, n, k) in [
            (8192, 320, 2880),
            (8192, 320, 5760),
            (2048, 640, 5760),
            (512, 1280, 11520),
            (128, 1280, 11520),
            (128, 1280, 23040),
            (8192, 2560, 320),
            (8192, 320, 320),
            (512, 1280, 1280),
            (262144, 128, 1152),
            (8192, 4, 2880),
        ] {
            let p = Tiled::of_tensor_cores(Sums::new(m, n, k / 32));
            let us = p.plan(DType::F16).microseconds;
            let rate = 2.0 * (m * n * k) as f64 / us / 1e6;
            println!("{m} {n} {k}: {:?} {us:.1} us, {rate:.0} TFLOP/s", chosen(m, n, k));
        }
    }

    #[test]
    fn a_case_with_statistics_ends_half_way_through_a_tile() {
        let p = Tiled::of_tensor_cores(Sums::new(129 * SLAB, 256, 9));
        assert_eq!((p.tile.rows, p.sums.m % p.tile.rows), (128, SLAB), "{p:?}");
        let case = |c: &Case| {
            matches!(&c.op, crate::ops::Op::Conv2d(op) if op.epi.stats) && *c.args[0].shape == [129, 8, 8, 16]
        };
        assert!(super::super::cases::conv().iter().any(case));
    }

    #[test]
    fn other_types_and_odd_channels_take_the_plain_kernel() {
        let specs = |t, c| [Spec::new(t, [2, 8, 8, c]), Spec::new(t, [16, 3, 3, c]), Spec::new(t, [16])];
        assert!(conv(&Conv2d::same(3), &specs(DType::BF16, 32)).is_some());
        assert!(conv(&Conv2d::same(3), &specs(DType::F32, 32)).is_none());
        assert!(conv(&Conv2d::same(3), &specs(DType::F16, 4)).is_none());
        let rows = |c| [Spec::new(DType::F16, [8, c]), Spec::new(DType::F16, [16, c])];
        assert!(linear(&Linear::default(), &rows(40)).is_some());
        assert!(linear(&Linear::default(), &rows(37)).is_none());
    }
}
