//! Products on tensor cores: which of them the kernel takes, in which tiles, and the launch. Where the device's `wgmma` says so, the
//! kernels of whole warpgroups take the same products in the same tiles. Tiles and splits are those that suit `mma.sync`.

use super::super::prelude::*;
use super::tiles::{Sums, Tile, Tiled, corners_fit, operands, tile, windows};
use super::{Conv2d, Epi, Linear, SLAB, boxes};
use crate::backend::cpu::gemm::ConvShape;
use crate::kernels;
use crate::backend::cuda::Wgmma;
pub(super) use crate::kernels::conv2d_mma as k;
use crate::kernels::conv2d_tma as tma;
use crate::kernels::conv2d_wgmma as wgmma;

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

/// How fast a tile is, in clocks of a multiprocessor of an H100.
struct Speed {
    /// FLOP per clock with one, two, … blocks beside each other; as many as fit.
    beside: &'static [f64],
    /// What comes after the sums: rounding, residual, statistics, the way to memory.
    end: f64,
    /// What one level of the tree of splits takes.
    level: f64,
}

/// Measured (an H100 80GB HBM3 at 1.72 GHz under load, `clock64` around the parts of the kernel, shapes of Stable Diffusion 1.5),
/// rounded; of the narrow tile only that it was far slower than the others, and of the 64×64 one not how fast it is alone.
fn speed(tile: Tile) -> Speed {
    let (beside, end, level): (&'static [f64], f64, f64) = match (tile.rows, tile.columns) {
        (128, 160) => (&[1610.0], 5000.0, 7500.0),
        (128, 128) => (&[1470.0, 1870.0], 5800.0, 11000.0),
        (128, _) => (&[1270.0, 1600.0], 4400.0, 6500.0),
        (64, 160) => (&[1200.0, 1490.0], 4400.0, 6500.0),
        (64, 80) => (&[917.0, 1250.0, 1490.0], 2900.0, 4000.0),
        (64, 64) => (&[840.0, 1150.0, 1410.0], 2700.0, 4000.0),
        // A group's (`linear_group`): a guess, of what its copies need.
        (16, _) => (&[200.0, 300.0, 370.0, 410.0, 440.0], 1500.0, 0.0),
        // Sixteen columns for sixty-four rows: bound by the cache.
        _ => (&[150.0, 270.0, 350.0, 400.0], 1500.0, 2000.0),
    };
    Speed { beside, end, level }
}

/// Microseconds that a product takes: every multiprocessor runs its share of the blocks, as many at a time as fit beside each
/// other, and those that began together end together.
pub(super) fn microseconds(tile: Tile, &Sums { m, n, blocks, .. }: &Sums, splits: usize) -> f64 {
    // Until the first operands are there.
    const START: f64 = 2500.0;
    let Speed { beside, end, level } = speed(tile);
    let levels = f64::from(splits.next_power_of_two().ilog2());
    let each = (tile.count(m, n) * splits).div_ceil(launch::MULTIPROCESSORS);
    let work = (2 * tile.rows * tile.columns * k::BK) as f64 * (blocks as f64 / splits as f64).ceil();
    let together = |count: usize| match count {
        0 => 0.0,
        _ => START + count as f64 * work / beside[count - 1] + levels * level + end,
    };
    let clocks = (each / beside.len()) as f64 * together(beside.len()) + together(each % beside.len());
    let bytes = (n * blocks * k::BK * 2) as f64;
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
    let product = product.on(io.device.shared_memory()?, io.y_spec(0).dtype)?;
    let (dtype, name, grid) = (io.y_spec(0).dtype, product.tile.name, product.grid());
    let wanted = io.device.wgmma();
    let boxes = wanted == Wgmma::Tma || wanted == Wgmma::On && boxes_are_faster(product.tile);
    if boxes
        && tma::VARIANTS.contains(&name)
        && let Some(p) = boxes::of_boxes(&p, product.tile.rows, product.tile.columns, io)?
    {
        return io.launch(tma::CONV2D_TMA, dtype, name, grid, tma::BLOCK.of(name), p);
    }
    if wanted != Wgmma::Off && wgmma::VARIANTS.contains(&name) {
        return io.launch(wgmma::CONV2D_WGMMA, dtype, name, grid, wgmma::BLOCK.of(name), of_warpgroups(p));
    }
    io.launch(k::CONV2D_MMA, dtype, name, grid, k::BLOCK.of(name), p)
}

/// Whether a tile's operands better come as boxes of tensors than by the copies of its threads. Measured on an H200: boxes are faster
/// in large tiles, by up to 17 % in 3×3 convolutions, and as fast within 5 % where there are few blocks of channels to go through; in
/// small tiles what a product needs before its first box costs 1 to 2 µs.
fn boxes_are_faster(tile: Tile) -> bool {
    tile.rows >= 128 || tile.columns >= 160
}

/// The arguments of the kernel that does the same by whole warpgroups.
fn of_warpgroups(p: k::Conv2dMma) -> wgmma::Conv2dWgmma {
    macro_rules! same {
        ($($field:ident)*) => { wgmma::Conv2dWgmma { $($field: p.$field),* } };
    }
    same!(
        y x w x1 w1 x2 w2 bias bias1 time counter residual stats partial counters m o h w_ c kh kw out_h
        out_w stride top left upsample flat w_row w_tap c1 w_row1 w_tap1 flat1 c2 w_row2 segments blocks
        part time_rows act glu phases
    )
}

impl Tiled {
    /// The same product where blocks have so much shared memory. The largest tile wants more than cards of sm_86, sm_89 and
    /// sm_120 have: there each is two of the tile of half its rows, which suits what it suits, and needs no more memory for
    /// sums in parts.
    fn on(&self, shared: usize, dtype: DType) -> Result<Tiled> {
        let unit = kernels::find("conv2d_mma", dtype.name(), self.tile.name)?;
        let halved = TILES.iter().find(|t| t.columns == self.tile.columns && 2 * t.rows == self.tile.rows);
        let mut product = *self;
        if let Some(&tile) = halved.filter(|_| kernels::UNITS[unit].smem > shared) {
            product.tile = tile;
        }
        Ok(product)
    }
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
        // A launch with either kernel leaves the same sums of splits, and the ends of both have a thread take the same rows.
        for twins in [wgmma::VARIANTS, tma::VARIANTS] {
            assert!(twins.iter().all(|name| names.contains(name)), "{twins:?}");
        }
        assert_eq!((wgmma::BK, wgmma::SLAB), (k::BK, k::SLAB));
        assert_eq!((tma::BK, tma::SLAB), (k::BK, k::SLAB));
        for t in TILES {
            assert_eq!(t.name, format!("BM={},BN={}", t.rows, t.columns));
        }
    }

    fn chosen(m: usize, n: usize, k: usize) -> (&'static str, usize) {
        let p = Tiled::of_tensor_cores(Sums::new(m, n, k / k::BK));
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
            let p = Tiled::of_tensor_cores(Sums::new(m, n, k / k::BK));
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
