//! The weights of a 3×3 convolution behind a nearest upsampling, as those of four 2×2 convolutions of the small image.
//!
//! Pixel (2i + p, …) of the upsampled image's convolution sees rows i + p − 1 and i + p of the small image, one of them through
//! two taps, whose weights are added: 16 products in place of 36 for each four pixels. [`Conv2d`](super::Conv2d) takes them
//! with `phases`. Kernel: `kernels/phase_weights.cu`.
use super::prelude::*;
use crate::kernels::phase_weights as k;

/// w (O,3,3,C) to (4,O,2,2,C): phase 2·py + px makes the pixels of row parity py and column parity px.
#[derive(Clone, PartialEq, Debug)]
pub struct PhaseWeights;

/// The taps of one axis that fall on pixel `d` of the two that phase `p` sees.
fn taps(p: usize, d: usize) -> std::ops::Range<usize> {
    if d == 0 { 0..1 + p } else { 1 + p..3 }
}

impl Operation for PhaseWeights {
    const NAME: &'static str = "phase_weights";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "w (O,3,3,C) of a float type";
        let [w] = args(Self::NAME, want, x)?;
        let fits = w.shape.len() == 4 && w.shape[1..3] == [3, 3] && DType::FLOATS.contains(&w.dtype);
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![Spec::new(w.dtype, [4, w.shape[0], 2, 2, w.shape[3]])])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let (o, c) = (x[0].shape[0], x[0].shape[3]);
        vec![Array::from_fn([4, o, 2, 2, c], |i| {
            let rows = taps(i[0] / 2, i[2]);
            let column =
                |kh: usize| taps(i[0] % 2, i[3]).map(|kw| x[0].at(&[i[1], kh, kw, i[4]])).sum::<f64>();
            rows.map(column).sum()
        })]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (w, o, c) = (io.f32(0), io.x[0].shape[0], io.x[0].shape[3]);
        io.rows(0, c, |first, y| {
            for (i, y) in y.chunks_mut(c).enumerate() {
                let (row, tap) = ((first + i) / 4, (first + i) % 4);
                let (phase, o) = (row / o, row % o);
                y.fill(0.0);
                for kh in taps(phase / 2, tap / 2) {
                    for kw in taps(phase % 2, tap % 2) {
                        let w = &w[((o * 3 + kh) * 3 + kw) * c..][..c];
                        y.iter_mut().zip(w).for_each(|(y, w)| *y += w);
                    }
                }
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let (w, y) = (io.x_spec(0).shape, io.y_spec(0));
        let n = y.shape.numel();
        let p =
            k::PhaseWeightsFwd { y: io.y(0), w: io.x(0), n: n as i64, o: io.int(w[0])?, c: io.int(w[3])? };
        io.launch(k::PHASE_WEIGHTS_FWD, y.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(x[0].shape.numel() / 9 * 20, x, y)
    }

    fn cases() -> Vec<Case> {
        let mut all: Vec<Case> = [[1, 1], [1, 8], [3, 5], [8, 16], [17, 33], [2, 64], [40, 24], [5, 300]]
            .map(|[o, c]| Case::new(PhaseWeights, [t([o, 3, 3, c])]))
            .into();
        let real = [[1280, 1280], [640, 640], [512, 512], [256, 256]];
        all.extend(real.map(|[o, c]| Case::new(PhaseWeights, [t([o, 3, 3, c])]).weights(0..1).bench()));
        all
    }

    fn random(r: &mut Small) -> Case {
        Case::new(PhaseWeights, [t([r.below(20) + 1, 3, 3, r.below(70) + 1])])
    }
}
