//! Gradients of layer normalisation: with n = (x − mean) · rstd and g = dy · w,
//! dx = rstd · (g − mean(g) − n · mean(g · n)), dw = Σ dy · n, dbias = Σ dy. Kernel: `kernels/layer_norm_grad.cu`.

use super::super::prelude::*;
use super::LayerNorm;
use crate::kernels::layer_norm_grad as k;
use crate::kernels::reduce;
use rayon::prelude::*;

/// x (…,C), w (C), dy (…,C) to dx, and dw, dbias (C) in f32.
#[derive(Clone, PartialEq, Debug)]
pub struct LayerNormGrad {
    /// As that of [`LayerNorm`].
    pub eps: f32,
}

/// Elements of a part whose parameters' gradients one task of the CPU adds up.
const CHUNK: usize = 1 << 15;

/// Parts of the rows on a GPU, and rows of each.
fn parts(rows: usize) -> (usize, usize) {
    let each = rows.div_ceil(128).max(64);
    (rows.div_ceil(each).max(1), each)
}

impl LayerNormGrad {
    /// dx, dw, dbias; with `size`, what is summed into each.
    fn each(&self, x: &[Array], size: bool) -> Vec<Array> {
        let c = x[0].shape.last();
        let (mut dx, mut dw, mut db) = (x[0].clone(), Array::zeros([c]), Array::zeros([c]));
        let abs = |v: f64| if size { v.abs() } else { v };
        for r in 0..x[0].shape.rows() {
            let (row, dy) = (&x[0].data[r * c..][..c], &x[2].data[r * c..][..c]);
            let s = LayerNorm { eps: self.eps }.stats(row);
            let n: Vec<f64> = match size {
                true => row.iter().map(|v| (v.abs() + s.size) * s.rstd).collect(),
                false => row.iter().map(|v| (v - s.mean) * s.rstd).collect(),
            };
            let g: Vec<f64> = dy.iter().zip(&x[1].data).map(|(d, w)| abs(d * w)).collect();
            let mean_g = g.iter().sum::<f64>() / c as f64;
            let mean_gn = g.iter().zip(&n).map(|(g, n)| g * n).sum::<f64>() / c as f64;
            let sign = if size { 1.0 } else { -1.0 };
            for i in 0..c {
                dx.data[r * c + i] = s.rstd * (g[i] + sign * (mean_g + n[i] * mean_gn));
                dw.data[i] += abs(dy[i]) * n[i];
                db.data[i] += abs(dy[i]);
            }
        }
        vec![dx, dw, db]
    }
}

impl Operation for LayerNormGrad {
    const NAME: &'static str = "layer_norm_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (…,C), w (C), dy (…,C) of one float type";
        let [x0, w, dy] = args(Self::NAME, want, x)?;
        let fits = LayerNorm { eps: self.eps }.infer(&[x0, w, w]).is_ok() && x0 == dy;
        ensure!(fits, Self::NAME, want, x);
        let param = Spec::new(DType::F32, w.shape);
        Ok(vec![x0, param, param])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, false)
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, true)
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, w, dy, c) = (io.slice(0), io.slice(1), io.slice(2), io.x[0].shape.last());
        w.with_all(|w| {
            io.rows(0, c, |first, dx| {
                let range = first * c..first * c + dx.len();
                x.with(range.clone(), |x| {
                    dy.with(range, |dy| {
                        for ((x, dy), dx) in x.chunks(c).zip(dy.chunks(c)).zip(dx.chunks_mut(c)) {
                            cpu::math::layer_norm_grad(x, w, dy, self.eps, dx);
                        }
                    });
                });
            });
        });
        let (rows, each) = (io.x[0].shape.rows(), (CHUNK / c).max(1));
        let parts = rows.div_ceil(each);
        cpu::with_scratch(parts * 2 * c, |sums| {
            sums.par_chunks_mut(2 * c).enumerate().for_each(|(i, sums)| {
                sums.fill(0.0);
                let (dw, dbias) = sums.split_at_mut(c);
                let range = i * each * c..((i + 1) * each).min(rows) * c;
                x.with(range.clone(), |x| {
                    dy.with(range, |dy| {
                        for (x, dy) in x.chunks(c).zip(dy.chunks(c)) {
                            cpu::math::layer_norm_grad_sums(x, dy, self.eps, dw, dbias);
                        }
                    });
                });
            });
            for j in 0..2 {
                io.write(1 + j, |y| {
                    y.fill(0.0);
                    for part in sums.chunks(2 * c) {
                        y.iter_mut().zip(&part[j * c..]).for_each(|(y, v)| *y += v);
                    }
                });
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = *io.x_spec(0);
        let (rows, c) = (x.shape.rows(), x.shape.last());
        let (parts, each) = parts(rows);
        let stats = io.scratch;
        let dw = stats.offset(rows * 3 * size_of::<f32>());
        let dbias = dw.offset(parts * c * size_of::<f32>());
        let (rows_i, c_i) = (io.int(rows)?, io.int(c)?);
        let p = k::LayerNormGrad {
            dx: io.y(0),
            stats,
            x: io.x(0),
            w: io.x(1),
            dy: io.x(2),
            rows: rows_i,
            c: c_i,
            eps: self.eps,
        };
        io.launch(k::LAYER_NORM_GRAD, x.dtype, "", [rows.div_ceil(k::BLOCK / 32), 1, 1], k::BLOCK, p)?;
        let each = io.int(each)?;
        let p =
            k::LayerNormGradParams { dw, dbias, stats, x: io.x(0), dy: io.x(2), rows: rows_i, c: c_i, each };
        let grid = [c.div_ceil(k::COLUMNS), parts, 1];
        io.launch(k::LAYER_NORM_GRAD_PARAMS, x.dtype, "", grid, k::BLOCK, p)?;
        for (j, partial) in [dw, dbias].into_iter().enumerate() {
            let (y, wide, splits) = (Default::default(), io.y(1 + j), io.int(parts)?);
            let p = reduce::SumParts { y, wide, partial, n: c_i, c: c_i, splits };
            io.launch(reduce::SUM_PARTS, x.dtype, "", [c.div_ceil(reduce::BLOCK), 1, 1], reduce::BLOCK, p)?;
        }
        Ok(())
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        let (rows, c) = (x[0].shape.rows(), x[0].shape.last());
        (rows * 3 + 2 * parts(rows).0 * c) * size_of::<f32>()
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(16 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        LayerNorm::cases().into_iter().map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        with_gradient(LayerNorm::random(r))
    }
}

/// The case of the gradients for one of the op.
fn with_gradient(case: Case) -> Case {
    let (x, w) = (case.args[0].clone(), case.args[1].clone());
    let dy = t(x.shape);
    Case { op: LayerNormGrad { eps: 1e-5 }.into(), args: vec![x, w, dy], weights: 0..0, ..case }
}
