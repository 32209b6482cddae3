//! First layers: 3×3 convolutions of few channels, whose sum is short and whose result is long.

use super::super::prelude::*;
use super::{Conv2d, Epi, SLAB};
use crate::backend::cpu::gemm::ConvShape;
use crate::kernels::conv2d_edge as k;

/// One such convolution as the kernel sees it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Edge {
    /// Rows of y.
    m: usize,
    /// Channels of y.
    o: usize,
    variant: &'static str,
    /// Tiles of pixels of a block.
    walk: usize,
}

impl Edge {
    /// As the kernel takes a convolution; `None` for what it does not take. Beside the bias it adds nothing.
    pub(super) fn conv(op: &Conv2d, x: &[Spec]) -> Option<Edge> {
        let s = op.shape(x[0].shape, x[1].shape)?;
        let (m, o) = (s.b * s.out_h * s.out_w, x[1].shape[0]);
        let plain = Epi { bias: op.epi.bias, stats: op.epi.stats, ..Epi::default() };
        let fits = matches!(x[0].dtype, DType::F16 | DType::BF16)
            && x.iter().all(|s| s.shape.numel() < 1 << 31)
            && m < 1 << 31
            && m * o > 0
            && (s.kh, s.kw, s.stride, s.upsample) == (3, 3, 1, false)
            && o.is_multiple_of(8)
            && op.epi == plain
            && op.shortcut == 0;
        let variant = match s.c {
            3 => "C=3",
            4 => "C=4",
            8 => "C=8",
            9 => "C=9",
            _ => return None,
        };
        fits.then(|| Edge { m, o, variant, walk: walk(m.div_ceil(k::BM), o.div_ceil(k::BN)) })
    }

    /// Name of the kernel variant.
    pub(super) fn variant(&self) -> &'static str {
        self.variant
    }

    /// Blocks along x, y and z.
    fn grid(&self) -> [usize; 3] {
        [self.m.div_ceil(k::BM * self.walk), self.o.div_ceil(k::BN), 1]
    }

    /// Clocks in which a multiprocessor passes a tile through its caches and shared memory, 128 bytes each: two for a load of
    /// x, since neighbouring pixels lie side by side; the patch written once and read by two warps, y written and read,
    /// and stored.
    fn clocks(&self) -> f64 {
        let loads = 9 * k::C.of(self.variant) / k::WIDTH.of(self.variant);
        let (patch, y) = (k::BM * k::CHUNKS.of(self.variant) * 16, k::BM * k::BN * 2);
        (k::BM / 32 * loads * 2 + (3 * patch + 3 * y) / 128) as f64
    }

    /// The launch, and its time by the model: what memory takes for x, w and y, or what the multiprocessor with most tiles
    /// takes, and 1500 clocks of latencies as every product has.
    pub(super) fn plan(&self, dtype: DType) -> LaunchPlan {
        let [along, across, _] = self.grid();
        let each = ((along * across).div_ceil(launch::MULTIPROCESSORS) * self.walk) as f64;
        let elements = self.m * (self.o + k::C.of(self.variant)) + self.o * 9 * k::C.of(self.variant);
        let memory = launch::streaming((elements * dtype.size()) as f64, along * across);
        let time = f64::max((each * self.clocks() + 1500.0) / launch::CLOCK + launch::GAP, memory);
        LaunchPlan::new(k::CONV2D_EDGE, dtype, self.variant, self.grid(), k::BLOCK, time)
    }

    pub(super) fn launch(&self, op: &Conv2d, s: &ConvShape, io: &cuda::Call) -> Result<()> {
        let none = Default::default();
        let p = k::Conv2dEdge {
            y: io.y(0),
            x: io.x(0),
            w: io.x(1),
            bias: if op.epi.bias { io.x(2) } else { none },
            stats: if op.epi.stats { io.y(1) } else { none },
            m: io.int(self.m)?,
            o: io.int(self.o)?,
            h: io.int(s.h)?,
            w_: io.int(s.w)?,
            out_h: io.int(s.out_h)?,
            out_w: io.int(s.out_w)?,
            top: io.int(s.pad_top)?,
            left: io.int(s.pad_left)?,
            walk: io.int(self.walk)?,
        };
        io.launch(k::CONV2D_EDGE, io.y_spec(0).dtype, self.variant, self.grid(), k::BLOCK, p)
    }
}

/// Tiles of a block, of `tiles` along the pixels and `across` the channels: the more, the less often weights are loaded, while
/// four blocks remain for each multiprocessor, and none gets more than a fiftieth more tiles than it must have.
fn walk(tiles: usize, across: usize) -> usize {
    let blocks = |walk: usize| tiles.div_ceil(walk) * across;
    let most = |walk| blocks(walk).div_ceil(launch::MULTIPROCESSORS) * walk;
    let mut walk = 1;
    while blocks(2 * walk) >= 4 * launch::MULTIPROCESSORS && 50 * most(2 * walk) <= 51 * most(1) {
        walk *= 2;
    }
    walk
}

const _: () = assert!(k::BM == SLAB, "a tile is a slab");

#[cfg(test)]
mod tests {
    use super::super::tiles::Tiled;
    use super::*;

    fn specs(x: [usize; 4], o: usize, t: DType) -> [Spec; 3] {
        [Spec::new(t, x), Spec::new(t, [o, 3, 3, x[3]]), Spec::new(t, [o])]
    }

    #[test]
    fn what_is_chosen_for_the_real_layers() {
        let table = [
            ("SD 1.5, 64×64", [2, 64, 64, 4], 320, "C=4", 1),
            ("SDXL, 128×128", [2, 128, 128, 4], 320, "C=4", 4),
            ("LDM 1.45B, 32×32", [2, 32, 32, 4], 320, "C=4", 1),
            ("two latents side by side", [2, 64, 64, 8], 320, "C=8", 1),
            ("latent, mask, masked latent", [2, 64, 64, 9], 320, "C=9", 1),
            ("decoder of KL-f8", [1, 64, 64, 4], 512, "C=4", 1),
            ("decoder of VQ-f4", [1, 64, 64, 3], 512, "C=3", 1),
            ("encoder, 512×512", [1, 512, 512, 3], 128, "C=3", 8),
        ];
        for (name, x, o, variant, walk) in table {
            let (op, m) = (Conv2d::same(3), x[0] * x[1] * x[2]);
            let edge = Edge::conv(&op, &specs(x, o, DType::BF16));
            assert_eq!(edge, Some(Edge { m, o, variant, walk }), "{name}");
            assert_eq!(Edge::conv(&op, &specs(x, o, DType::F32)), None, "{name}");
            assert!(k::VARIANTS.contains(&variant));
        }
    }

    #[test]
    fn eight_channels_are_predicted_faster_than_as_a_product() {
        for side in [16, 32, 64, 96, 128] {
            let x = specs([2, side, side, 8], 320, DType::BF16);
            let op = Conv2d::same(3);
            let (edge, product) = (Edge::conv(&op, &x).unwrap(), Tiled::conv(&op, &x).unwrap());
            let [own, other] = [edge.plan(DType::BF16), product.plan(DType::BF16)].map(|p| p.microseconds);
            assert!(own < other, "{side}: {own} us, as a product {other} us");
        }
    }

    #[test]
    fn what_it_does_not_take() {
        let same = Conv2d::same(3);
        let takes = |op: &Conv2d, c, o| Edge::conv(op, &specs([1, 8, 8, c], o, DType::F16)).is_some();
        assert!(takes(&same, 4, 24) && takes(&Conv2d { epi: Epi::default(), ..same.clone() }, 3, 8));
        assert!(!takes(&same, 4, 20) && !takes(&same, 5, 24) && !takes(&same, 16, 24));
        let act = Epi { act: super::super::super::Act::Silu, ..same.epi.clone() };
        for op in [
            Conv2d { stride: 2, ..same.clone() },
            Conv2d { upsample: true, ..same.clone() },
            Conv2d { epi: act, ..same.clone() },
            Conv2d { epi: Epi { residual: true, ..same.epi.clone() }, ..same.clone() },
        ] {
            assert!(!takes(&op, 4, 24), "{op:?}");
        }
        let one = Conv2d::same(1);
        assert!(
            Edge::conv(&one, &[Spec::new(DType::F16, [1, 8, 8, 4]), Spec::new(DType::F16, [8, 1, 1, 4])])
                .is_none()
        );
    }
}
