//! y = (x − mean) · rstd · w + bias, mean and variance over the last axis.
//!
//! PyTorch: `F.layer_norm(x, (C,), w, b, eps)`. Kernel: `kernels/layer_norm.cu`.
mod grad;

pub use grad::LayerNormGrad;

use super::prelude::*;
use crate::kernels::layer_norm as k;

/// Layer normalisation of x (…,C) with w, bias (C).
#[derive(Clone, PartialEq, Debug)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f32,
}

/// Statistics of a row in f64: mean, mean of absolute values, reciprocal deviation.
#[derive(Clone, Copy)]
struct Stats {
    mean: f64,
    size: f64,
    rstd: f64,
}

impl LayerNorm {
    fn stats(&self, row: &[f64]) -> Stats {
        let c = row.len() as f64;
        let mean = row.iter().sum::<f64>() / c;
        let var = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / c;
        let size = row.iter().map(|v| v.abs()).sum::<f64>() / c;
        Stats { mean, size, rstd: 1.0 / (var + self.eps as f64).sqrt() }
    }

    fn each(&self, x: &[Array], f: impl Fn(f64, Stats, f64, f64) -> f64) -> Vec<Array> {
        let mut y = x[0].clone();
        for row in y.data.chunks_mut(x[0].shape.last()) {
            let stats = self.stats(row);
            for (i, v) in row.iter_mut().enumerate() {
                *v = f(*v, stats, x[1].data[i], x[2].data[i]);
            }
        }
        vec![y]
    }
}

/// The variant of the kernel for rows of `c` elements: the narrowest that holds the row in registers; the one that reads
/// the row three times where it is wider than all, or no whole number of 16-byte vectors.
fn variant(c: usize, dtype: DType) -> &'static str {
    let widths = [(320, "W=320"), (640, "W=640"), (1280, "W=1280"), (2048, "W=2048")];
    let fits = widths.into_iter().find(|(w, _)| c <= *w && c.is_multiple_of(16 / dtype.size()));
    fits.map_or("W=0", |(_, name)| name)
}

impl Operation for LayerNorm {
    const NAME: &'static str = "layer_norm";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (…,C), w (C), bias (C) of one float type";
        let [x0, w, b] = args(Self::NAME, want, x)?;
        let fits = !x0.shape.is_empty() && *w.shape == [x0.shape.last()] && w == b && w.dtype == x0.dtype;
        ensure!(fits && DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        Ok(vec![x0])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |v, s, w, b| (v - s.mean) * s.rstd * w + b)
    }

    /// What is summed: x, and the row's values into its mean, both amplified by rstd.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |v, s, w, b| (v.abs() + s.size) * s.rstd * w.abs() + b.abs())
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, w, bias) = (io.slice(0), io.slice(1), io.slice(2));
        let c = io.x[0].shape.last();
        w.with_all(|w| {
            bias.with_all(|bias| {
                io.rows(0, c, |first, y| {
                    x.with(first * c..first * c + y.len(), |x| {
                        for (x, y) in x.chunks(c).zip(y.chunks_mut(c)) {
                            cpu::math::layer_norm(x, w, bias, self.eps, y);
                        }
                    });
                });
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let s = io.x_spec(0).shape;
        let p = k::LayerNormFwd {
            y: io.y(0),
            x: io.x(0),
            w: io.x(1),
            bias: io.x(2),
            rows: io.int(s.rows())?,
            c: io.int(s.last())?,
            eps: self.eps,
        };
        let dtype = io.x_spec(0).dtype;
        let variant = variant(s.last(), dtype);
        let grid = [s.rows().div_ceil(k::BLOCK / k::LANES.of(variant)), 1, 1];
        io.launch(k::LAYER_NORM_FWD, dtype, variant, grid, k::BLOCK, p)
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dy)] = dy else { return Ok(vec![None; 3]) };
        let all = g.push_all("grad", LayerNormGrad { eps: self.eps }, &[x[0], x[1], *dy])?;
        Ok(all.into_iter().map(Some).collect())
    }

    fn variant(&self, x: &[Spec]) -> &'static str {
        variant(x[0].shape.last(), x[0].dtype)
    }

    fn launches(&self, x: &[Spec]) -> Vec<LaunchPlan> {
        let blocks = x[0].shape.rows().div_ceil(k::BLOCK / k::LANES.of(self.variant(x)));
        // A row is read, summed up, and written: 1 µs more than a stream (measured on an H100).
        let time = launch::streaming(2.0 * x[0].bytes() as f64, blocks) + 1.0;
        let (dtype, grid) = (x[0].dtype, [blocks, 1, 1]);
        vec![LaunchPlan::new(k::LAYER_NORM_FWD, dtype, self.variant(x), grid, k::BLOCK, time)]
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(8 * y[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let norm = |x: &[usize]| {
            let c = x[x.len() - 1];
            Case::new(LayerNorm { eps: 1e-5 }, [t(x), t([c]).normal(1.0, 0.2), t([c])])
        };
        let far = |x: &[usize]| {
            let mut case = norm(x);
            case.args[0] = t(x).normal(100.0, 0.01);
            case.only(&[DType::F32]).loose(
                8.0,
                "the norm bound assumes |y| near |x|; here the input's own rounding is 1e-3 of its deviation",
            )
        };
        let mut small = vec![
            norm(&[1, 2]),
            norm(&[3, 7]),
            norm(&[2, 77, 32]),
            norm(&[2, 5, 5, 64]),
            norm(&[13, 320]),
            norm(&[3, 33]),
            norm(&[1, 1280]),
            norm(&[5, 9, 100]),
            // Each variant, with its widest row, and with rows that leave most lanes of its last vectors without one.
            norm(&[6, 640]),
            norm(&[3, 2048]),
            norm(&[2, 328]),
            norm(&[5, 768]),
            norm(&[2, 1288]),
            norm(&[2, 2056]),
            norm(&[7, 8]),
            far(&[9, 64]),
            far(&[3, 1280]),
            far(&[2, 33]),
        ];
        // Tokens and widths of SD 1.5, SDXL and LDM 1.45B.
        let real =
            [[4096, 320], [4096, 640], [1024, 320], [1024, 640], [1024, 1280], [256, 640], [256, 1280]];
        let real = real.into_iter().chain([[64, 1280], [16, 1280]]);
        small.extend(real.map(|[tokens, c]| norm(&[2, tokens, c]).weights(1..3).bench()));
        small
    }

    fn random(r: &mut Small) -> Case {
        let c = r.below(200) + 2;
        let x = t([r.below(20) + 1, c]).normal(-0.5, 2.0);
        Case::new(LayerNorm { eps: 1e-5 }, [x, t([c]).normal(1.0, 0.2), t([c])])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_rows_are_held_in_registers() {
        let of = |c| [DType::F32, DType::F16, DType::BF16].map(|t| variant(c, t));
        for (c, want) in [(64, "W=320"), (320, "W=320"), (640, "W=640"), (768, "W=1280"), (1024, "W=1280")] {
            assert_eq!(of(c), [want; 3], "{c}");
        }
        assert_eq!([of(1280), of(2048)], [["W=1280"; 3], ["W=2048"; 3]]);
        assert_eq!(of(100), ["W=320", "W=0", "W=0"], "100 elements of 16 bits are no whole vectors");
        assert_eq!([of(33), of(2056)], [["W=0"; 3]; 2]);
    }
}
