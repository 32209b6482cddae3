//! Gradients of layer normalisation: with n = (x − mean) · rstd and g = dy · w,
//! dx = rstd · (g − mean(g) − n · mean(g · n)), dw = Σ dy · n, dbias = Σ dy. Kernels: `kernels/layer_norm_grad.cu`, `kernels/layer_norm_grad_params.cu`.

use super::super::prelude::*;
use super::{LayerNorm, variant};
use crate::kernels::layer_norm_grad as k;
use crate::kernels::layer_norm_grad_params as params;
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

/// How the parameters' gradients are shared out on a GPU.
struct Parts {
    /// A thread takes vectors of 16 bytes.
    wide: bool,
    strips: usize,
    /// Of the rows.
    parts: usize,
    /// Rows of a part.
    each: usize,
}

impl Parts {
    /// Enough blocks for four on each of the 132 multiprocessors of an H100, but no part of fewer than 64 rows.
    fn of(x: Spec) -> Parts {
        let (rows, c) = (x.shape.rows(), x.shape.last());
        let vector = launch::at_once(x.dtype, &[c]);
        let strips = c.div_ceil(if vector > 1 { params::ACROSS * vector } else { params::NARROW });
        let want = (4 * launch::MULTIPROCESSORS).div_ceil(strips.max(1));
        let each = rows.div_ceil(want).next_multiple_of(64).max(64);
        Parts { wide: vector > 1, strips, parts: rows.div_ceil(each), each }
    }

    /// Bytes of the sums that the parts leave.
    fn bytes(&self, c: usize) -> usize {
        2 * self.parts * c * size_of::<f32>()
    }
}

/// What is left of each row: mean, as a sum of two, and reciprocal deviation, in 16 bytes.
const ROW: usize = 4 * size_of::<f32>();

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
        if io.x[0].shape.numel() == 0 {
            (1..io.y.len()).for_each(|j| io.write(j, |y| y.fill(0.0)));
            return Ok(());
        }
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
        let share = Parts::of(x);
        let stats = io.scratch;
        let dw = stats.offset(rows * ROW);
        let dbias = dw.offset(share.parts * c * size_of::<f32>());
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
        let variant = variant(c, x.dtype);
        let grid = [rows.div_ceil(k::BLOCK / k::LANES.of(variant)), 1, 1];
        io.launch(k::LAYER_NORM_GRAD, x.dtype, variant, grid, k::BLOCK, p)?;
        let p = params::LayerNormGradParams {
            dw,
            dbias,
            stats,
            x: io.x(0),
            dy: io.x(2),
            rows: rows_i,
            c: c_i,
            each: io.int(share.each)?,
            wide: share.wide as i32,
        };
        let grid = [share.strips, share.parts, 1];
        io.launch(params::LAYER_NORM_GRAD_PARAMS, x.dtype, "", grid, params::BLOCK, p)?;
        // Both at once: dbias stands behind dw.
        let p = reduce::SumParts {
            y: Default::default(),
            wide: io.y(1),
            second: io.y(2),
            partial: dw,
            n: io.int(2 * c)?,
            c: c_i,
            splits: io.int(share.parts)?,
        };
        let grid = [(2 * c).div_ceil(reduce::BLOCK), 1, 1];
        io.launch(reduce::SUM_PARTS, x.dtype, "", grid, reduce::BLOCK, p)
    }

    fn launches(&self, x: &[Spec]) -> Vec<LaunchPlan> {
        let (dtype, rows, c) = (x[0].dtype, x[0].shape.rows(), x[0].shape.last());
        let (bytes, share, variant) = (x[0].bytes(), Parts::of(x[0]), variant(c, dtype));
        let time = |bytes: usize, blocks: usize| launch::streaming(bytes as f64, blocks);
        let (stats, sums) = (rows * ROW, share.bytes(c));
        let blocks = [
            rows.div_ceil(k::BLOCK / k::LANES.of(variant)),
            share.strips * share.parts,
            (2 * c).div_ceil(reduce::BLOCK),
        ];
        // x, dy and dx, of any width x thrice more and dy once; 1 µs more, as for the norm itself.
        let own = time(bytes * if variant == "W=0" { 7 } else { 3 } + stats, blocks[0]) + 1.0;
        let [a, b, d] = blocks.map(|blocks| [blocks, 1, 1]);
        vec![
            LaunchPlan::new(k::LAYER_NORM_GRAD, dtype, variant, a, k::BLOCK, own),
            LaunchPlan::new(
                params::LAYER_NORM_GRAD_PARAMS,
                dtype,
                "",
                b,
                params::BLOCK,
                time(2 * bytes + stats * share.strips + sums, blocks[1]),
            ),
            LaunchPlan::new(reduce::SUM_PARTS, dtype, "", d, reduce::BLOCK, time(sums, blocks[2])),
        ]
    }

    fn variant(&self, x: &[Spec]) -> &'static str {
        variant(x[0].shape.last(), x[0].dtype)
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        x[0].shape.rows() * ROW + Parts::of(x[0]).bytes(x[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(16 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let norm = |x: &[usize]| {
            let c = x[x.len() - 1];
            Case::new(LayerNorm { eps: 1e-5 }, [t(x), t([c]).normal(1.0, 0.2), t([c])])
        };
        // Several parts, of which the last is short, with and without vectors; a strip that is not full; no rows: zeros.
        let own = [norm(&[333, 40]), norm(&[150, 136]), norm(&[200, 37]), norm(&[2, 97, 36]), norm(&[0, 16])];
        own.into_iter().chain(LayerNorm::cases()).map(with_gradient).collect()
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
