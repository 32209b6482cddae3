//! The gradient of weights on a GPU: which kernel takes it, in which tiles, and its pixels in how many parts.

use super::super::prelude::*;
use super::tiles::{Choice, Tile, tile, windows};
use crate::backend::cpu::gemm::ConvShape;
use crate::kernels::conv2d_weight_grad as plain;
use crate::kernels::conv2d_weight_grad_mma as k;
use crate::kernels::reduce;

/// Output channels by taps and channels of x. 160 divides the output channels of the Stable Diffusion family, 128 those of the
/// autoencoders.
const TILES: [Tile; 2] = [tile("BM=128,BN=128", 128, 128), tile("BM=160,BN=128", 160, 128)];

/// Most bytes of partial results, where there is more than one part: no more than what the largest weights of Stable
/// Diffusion take by themselves.
const SCRATCH: usize = 64 << 20;

/// The sums of one gradient, divided among blocks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Divided {
    /// Of the kernel on tensor cores; `None`: the plain kernel takes it.
    tile: Option<Tile>,
    /// Parts of the pixels.
    parts: usize,
    /// Pixels of a part.
    each: usize,
    /// Output channels.
    o: usize,
    /// Taps times channels of x.
    n: usize,
}

/// Pixels of y, and columns of the gradient.
fn sizes(s: &ConvShape) -> (usize, usize) {
    (s.b * s.out_h * s.out_w, s.kh * s.kw * s.c)
}

impl Divided {
    /// `o`: channels of dy. `None`: what is asked for does not suit.
    pub(super) fn new(s: &ConvShape, o: usize, dtype: DType, asked: Option<Choice>) -> Option<Divided> {
        if let Some(asked) = asked {
            return Divided::all(s, o, dtype).find(|d| d.choice() == Some(asked));
        }
        // Of what is as good as the best, within 2 %, the first.
        let (mut best, mut least) = (None, f64::INFINITY);
        for divided in Divided::all(s, o, dtype) {
            let time = divided.microseconds(s);
            if time < 0.98 * least {
                (best, least) = (Some(divided), time);
            }
        }
        best.or_else(|| Some(Divided::plainly(s, o)))
    }

    /// All that the kernel on tensor cores could do.
    pub(super) fn all(s: &ConvShape, o: usize, dtype: DType) -> impl Iterator<Item = Divided> {
        let ((m, n), tiles) = (sizes(s), if takes(s, o, dtype) { &TILES[..] } else { &[] });
        let most = (SCRATCH / (o * n * size_of::<f32>()).max(1)).clamp(1, 2 * launch::MULTIPROCESSORS);
        let every = tiles.iter().flat_map(move |t| (1..=most).map(move |parts| (*t, parts)));
        every.filter_map(move |(tile, parts)| {
            let each = m.div_ceil(parts).next_multiple_of(k::BK).max(k::BK);
            // Without parts that have no pixels.
            (m.div_ceil(each) == parts).then_some(Divided { tile: Some(tile), parts, each, o, n })
        })
    }

    /// Of the kernel on tensor cores.
    pub(super) fn choice(&self) -> Option<Choice> {
        self.tile.map(|tile| Choice { variant: tile.name, splits: self.parts })
    }

    /// Enough blocks for two on each multiprocessor of the largest cards.
    fn plainly(s: &ConvShape, o: usize) -> Divided {
        let (m, n) = sizes(s);
        let tiles = o.div_ceil(plain::BM) * n.div_ceil(plain::BN);
        let parts = (2 * launch::MULTIPROCESSORS / tiles.max(1)).clamp(1, m.div_ceil(256).max(1));
        let each = m.div_ceil(parts).next_multiple_of(plain::BK).max(plain::BK);
        Divided { tile: None, parts: m.div_ceil(each).max(1), each, o, n }
    }

    /// Microseconds of all by the model: the products' by that of [`tensor_cores`](super::tensor_cores), at the speed that was
    /// measured there for the 128×128 tile, whose warps and loop are alike (nothing was measured of this kernel itself),
    /// and those of adding up; of the plain kernel nothing is known.
    fn microseconds(&self, s: &ConvShape) -> f64 {
        let Some(tile) = self.tile else { return f64::INFINITY };
        // FLOP per clock of a multiprocessor with one and two blocks; clocks until the first operands are there.
        const BESIDE: [f64; 2] = [1470.0, 1870.0];
        const START: f64 = 2500.0;
        // Bytes that a multiprocessor writes in a clock.
        const WRITTEN: f64 = 40.0;
        let [rows, columns, each] = [tile.rows, tile.columns, self.each].map(|n| n as f64);
        let blocks = (tile.count(self.o, self.n) * self.parts).div_ceil(launch::MULTIPROCESSORS);
        let together = |count: usize| match count {
            0 => 0.0,
            _ => START + count as f64 * rows * columns * (2.0 * each / BESIDE[count - 1] + 4.0 / WRITTEN),
        };
        let clocks = (blocks / 2) as f64 * together(2) + together(blocks % 2);
        let operands = 2 * (s.b * s.h * s.w * s.c + sizes(s).0 * self.o);
        let bytes = (operands + self.parts * self.bytes()) as f64;
        f64::max(clocks / launch::CLOCK, bytes / launch::MEMORY) + launch::GAP + self.adding_up()
    }

    /// Microseconds in which the partial results are added up.
    fn adding_up(&self) -> f64 {
        match self.parts {
            1 => 0.0,
            parts => launch::streaming(((parts + 1) * self.bytes()) as f64, self.sums()[0]),
        }
    }

    /// Bytes of the gradient.
    fn bytes(&self) -> usize {
        self.o * self.n * size_of::<f32>()
    }

    /// Bytes of the partial results.
    pub(super) fn scratch(&self) -> usize {
        if self.parts == 1 { 0 } else { self.parts * self.bytes() }
    }

    /// The grid that adds up.
    fn sums(&self) -> [usize; 3] {
        [(self.o * self.n).div_ceil(reduce::BLOCK), 1, 1]
    }

    fn grid(&self, tile: Tile) -> [usize; 3] {
        [self.n.div_ceil(tile.columns), self.o.div_ceil(tile.rows), self.parts]
    }

    /// The launches and their times by the model; none of the plain kernel.
    pub(super) fn launches(&self, s: &ConvShape, dtype: DType) -> Vec<LaunchPlan> {
        let Some(tile) = self.tile else { return vec![] };
        let (grid, time) = (self.grid(tile), self.microseconds(s) - self.adding_up());
        let products = LaunchPlan::new(k::CONV2D_WEIGHT_GRAD_MMA, dtype, tile.name, grid, k::BLOCK, time);
        let mut all = vec![LaunchPlan { splits: self.parts, ..products }];
        if self.parts > 1 {
            let (grid, time) = (self.sums(), self.adding_up());
            all.push(LaunchPlan::new(reduce::SUM_PARTS, dtype, "", grid, reduce::BLOCK, time));
        }
        all
    }

    /// x and dy are inputs 0 and 1, dw output 0.
    pub(super) fn launch(&self, s: &ConvShape, io: &cuda::Call) -> Result<()> {
        let dtype = io.x_spec(0).dtype;
        let (x, dy, dw) = (io.x(0), io.x(1), if self.parts > 1 { io.scratch } else { io.y(0) });
        let (m, o, each) = (io.int(sizes(s).0)?, io.int(self.o)?, io.int(self.each)?);
        if let Some(tile) = self.tile {
            let mut p = k::Conv2dWeightGradMma { dw, x, dy, m, o, each, ..Default::default() };
            windows!(io, s, p);
            p.next_column = io.int(k::STRIDE % s.out_w * s.stride)?;
            p.next_row = io.int(k::STRIDE / s.out_w % s.out_h * s.stride)?;
            p.next_image = io.int(k::STRIDE / (s.out_w * s.out_h) * s.h * s.w)?;
            io.launch(k::CONV2D_WEIGHT_GRAD_MMA, dtype, tile.name, self.grid(tile), k::BLOCK, p)?;
        } else {
            let mut p = plain::Conv2dWeightGrad { dw, x, dy, m, o, each, ..Default::default() };
            windows!(io, s, p);
            let grid = [self.n.div_ceil(plain::BN), self.o.div_ceil(plain::BM), self.parts];
            io.launch(plain::CONV2D_WEIGHT_GRAD, dtype, "", grid, plain::BLOCK, p)?;
        }
        if self.parts == 1 {
            return Ok(());
        }
        let n = io.int(self.o * self.n)?;
        let (wide, splits) = (io.y(0), io.int(self.parts)?);
        let [y, second] = [Default::default(), Default::default()];
        let p = reduce::SumParts { y, wide, second, partial: io.scratch, n, c: n, splits };
        io.launch(reduce::SUM_PARTS, dtype, "", self.sums(), reduce::BLOCK, p)
    }
}

/// Whether type and sizes suit the kernel on tensor cores: it copies 8 channels at a time and counts with 32 bits.
fn takes(s: &ConvShape, o: usize, dtype: DType) -> bool {
    let (m, n) = sizes(s);
    let counted = |rows: usize, columns: usize| rows.saturating_mul(columns) < 1 << 31;
    let corner = |out: usize, kernel: usize| out.saturating_mul(s.stride).saturating_add(kernel) < 1 << 30;
    matches!(dtype, DType::F16 | DType::BF16)
        && s.c % 8 == 0
        && o % 8 == 0
        && m * n * o > 0
        && counted(s.b * s.h * s.w, s.c)
        && counted(m, o)
        && corner(s.out_h, s.kh)
        && corner(s.out_w, s.kw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_is_a_tile() {
        assert_eq!(TILES.map(|t| t.name), k::VARIANTS);
        for t in TILES {
            assert_eq!(t.name, format!("BM={},BN={}", t.rows, t.columns));
        }
    }

    /// A convolution that keeps the size, with `kernel` taps on both axes.
    fn same([b, h, w, c]: [usize; 4], kernel: usize) -> ConvShape {
        let (kh, kw, pad_top, pad_left) = (kernel, kernel, kernel / 2, kernel / 2);
        let (out_h, out_w, stride, upsample) = (h, w, 1, false);
        ConvShape { b, h, w, c, kh, kw, stride, pad_top, pad_left, out_h, out_w, upsample }
    }

    #[test]
    fn what_is_chosen_for_a_training_step_of_stable_diffusion() {
        // Batch 16 of 512×512: convolutions, products of rows, of texts, of times; and a convolution of the autoencoder.
        for (x, kernel, o, chosen) in [
            ([16, 64, 64, 320], 3, 320, ("BM=160,BN=128", 11)),
            ([16, 64, 64, 960], 3, 320, ("BM=160,BN=128", 5)),
            ([16, 32, 32, 640], 3, 640, ("BM=128,BN=128", 1)),
            ([16, 16, 16, 1280], 3, 1280, ("BM=128,BN=128", 1)),
            ([16, 8, 8, 1280], 3, 1280, ("BM=128,BN=128", 1)),
            ([16, 8, 8, 2560], 3, 1280, ("BM=128,BN=128", 1)),
            ([1, 65536, 1, 320], 1, 320, ("BM=160,BN=128", 43)),
            ([1, 65536, 1, 320], 1, 2560, ("BM=160,BN=128", 11)),
            ([1, 65536, 1, 1280], 1, 320, ("BM=160,BN=128", 13)),
            ([1, 1232, 1, 768], 1, 320, ("BM=128,BN=128", 7)),
            ([1, 16, 1, 1280], 1, 1280, ("BM=128,BN=128", 1)),
            ([4, 512, 512, 128], 3, 128, ("BM=128,BN=128", 29)),
        ] {
            let s = same(x, kernel);
            let d = Divided::new(&s, o, DType::BF16, None).unwrap();
            let (us, work) = (d.microseconds(&s), 2.0 * (sizes(&s).0 * d.n * o) as f64);
            let Choice { variant, splits } = d.choice().unwrap();
            println!(
                "{x:?} {kernel} {o}: {variant} {splits} {us:.1} us, {:.0} TFLOP/s, {} MB",
                work / us / 1e6,
                d.scratch() >> 20
            );
            assert_eq!((variant, splits), chosen, "{x:?} {kernel} {o}");
            assert!(d.scratch() <= SCRATCH);
        }
    }

    #[test]
    fn other_types_and_odd_channels_take_the_plain_kernel() {
        let tile = |c, o, dtype| Divided::new(&same([2, 8, 8, c], 3), o, dtype, None).unwrap().tile;
        assert!(tile(32, 40, DType::BF16).is_some() && tile(8, 8, DType::F16).is_some());
        for (c, o, dtype) in
            [(32, 40, DType::F32), (4, 40, DType::BF16), (32, 4, DType::F16), (36, 40, DType::F16)]
        {
            assert_eq!(tile(c, o, dtype), None, "{c} {o} {dtype}");
        }
        let asked = Some(Choice { variant: "BM=128,BN=128", splits: 1 });
        assert_eq!(Divided::new(&same([2, 8, 8, 32], 3), 40, DType::F32, asked), None);
        assert!(Divided::new(&same([2, 8, 8, 32], 3), 40, DType::F16, asked).is_some());
    }

    #[test]
    fn listed_cases_take_every_tile_whole_and_split_and_the_plain_kernel() {
        let mut taken = vec![];
        for case in super::super::WeightGrad::cases().into_iter().filter(|c| !c.bench) {
            for t in case.types.iter().copied() {
                let launches = case.op.launches(&case.specs(t));
                taken.push(launches.first().map(|l| (t, l.variant, l.splits > 1)));
            }
        }
        assert!(taken.contains(&None));
        for t in [DType::F16, DType::BF16] {
            for (tile, split) in TILES.into_iter().flat_map(|tile| [(tile, false), (tile, true)]) {
                assert!(
                    taken.contains(&Some((t, tile.name, split))),
                    "{} split {split}: {taken:?}",
                    tile.name
                );
            }
        }
    }
}
