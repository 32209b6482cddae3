//! y = (x − mean) / √(var + eps) · w + bias by channel, with the mean and variance of the batch, or with given ones.
//!
//! PyTorch: `F.batch_norm`. Ioffe and Szegedy 2015. Kernels: `kernels/batch_norm.cu`, `kernels/batch_norm_grad.cu`. Parts of
//! the rows are summed by themselves and put together in order, so that the bits depend on the shape alone.
use super::prelude::*;
use super::{Act, Fill, Op};
use crate::backend::cpu::math::{Channels, norm_grad_apply, norm_grad_sums, scale_shift_act};
use crate::kernels::batch_norm as k;
use crate::kernels::batch_norm_grad as back;
use rayon::prelude::*;

/// x (…,C), w, bias (C) to y (…,C), and mean and biased variance (C) in f32 of the batch, at least two rows; or with given
/// statistics x, w, bias, mean, var (C) f32 to y alone. The statistics that come out are there to be read: no gradient
/// passes through them.
#[derive(Clone, PartialEq, Debug)]
pub struct BatchNorm {
    /// Added to the variance.
    pub eps: f32,
    /// Mean and variance are inputs: the evaluation mode.
    pub given: bool,
}

/// Rows of a part, on a GPU.
const PART: usize = 512;
/// Elements of a part whose sums one task of the CPU adds up.
pub(super) const CHUNK: usize = 1 << 15;

/// Parts of the rows on a GPU, and the rows of a part.
pub(super) fn parts(rows: usize) -> (usize, usize) {
    let each = rows.div_ceil(rows.div_ceil(PART).clamp(1, 128)).max(1);
    (rows.div_ceil(each).max(1), each)
}

/// Of each channel of x: mean, biased variance, mean of absolute values.
fn moments(x: &Array) -> Vec<[f64; 3]> {
    let (c, rows) = (x.shape.last(), x.shape.rows() as f64);
    let of = |i: usize| {
        let column = || x.data.iter().skip(i).step_by(c);
        let mean = column().sum::<f64>() / rows;
        let var = column().map(|v| (v - mean) * (v - mean)).sum::<f64>() / rows;
        [mean, var, column().map(|v| v.abs()).sum::<f64>() / rows]
    };
    (0..c).map(of).collect()
}

impl BatchNorm {
    /// [`moments`], those that are given in place of the first two.
    fn stats(&self, x: &[Array]) -> Vec<[f64; 3]> {
        if !self.given {
            return moments(&x[0]);
        }
        x[3].data.iter().zip(&x[4].data).map(|(&mean, &var)| [mean, var, mean.abs()]).collect()
    }

    /// y from the moments of each channel.
    fn apply(&self, io: &mut cpu::Call, stats: &[[f64; 2]]) {
        let (x, c, w, bias) = (io.slice(0), io.x[0].shape.last(), io.f32(1), io.f32(2));
        let scale = |i: usize| f64::from(w[i]) / (stats[i][1] + f64::from(self.eps)).sqrt();
        let a: Vec<f32> = (0..c).map(|i| scale(i) as f32).collect();
        let b: Vec<f32> = (0..c).map(|i| (f64::from(bias[i]) - stats[i][0] * scale(i)) as f32).collect();
        io.rows(0, c, |first, y| {
            x.with(first * c..first * c + y.len(), |x| scale_shift_act(x, &a, &b, Act::None, y));
        });
    }
}

impl Operation for BatchNorm {
    const NAME: &'static str = "batch_norm";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (…,C), w (C), bias (C) of one float type, at least two rows; or given statistics: x, w, bias, mean (C), \
            var (C), these of f32";
        ensure!(x.len() == if self.given { 5 } else { 3 } && !x[0].shape.is_empty(), Self::NAME, want, x);
        let (dtype, c) = (x[0].dtype, x[0].shape.last());
        let stats = Spec::new(DType::F32, [c]);
        let fits = DType::FLOATS.contains(&dtype)
            && c > 0
            && x[1..3].iter().all(|s| *s == Spec::new(dtype, [c]))
            && x[3..].iter().all(|s| *s == stats)
            && (self.given || x[0].shape.rows() > 1);
        ensure!(fits, Self::NAME, want, x);
        Ok(if self.given { vec![x[0]] } else { vec![x[0], stats, stats] })
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let (stats, c) = (self.stats(x), x[0].shape.last());
        let mut y = x[0].clone();
        for (i, v) in y.data.iter_mut().enumerate() {
            let [mean, var, _] = stats[i % c];
            let rstd = 1.0 / (var + f64::from(self.eps)).sqrt();
            *v = (*v - mean) * rstd * x[1].data[i % c] + x[2].data[i % c];
        }
        let of = |j: usize| Array { shape: [c].into(), data: stats.iter().map(|s| s[j]).collect() };
        if self.given { vec![y] } else { vec![y, of(0), of(1)] }
    }

    /// What is summed: x, and the channel's values into its mean, both amplified.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let (stats, c) = (self.stats(x), x[0].shape.last());
        let mut y = x[0].clone();
        for (i, v) in y.data.iter_mut().enumerate() {
            let [_, var, size] = stats[i % c];
            let rstd = 1.0 / (var + f64::from(self.eps)).sqrt();
            *v = (v.abs() + size) * rstd * x[1].data[i % c].abs() + x[2].data[i % c].abs();
        }
        if self.given {
            return vec![y];
        }
        let (mut var, rows) = (Array::zeros([c]), x[0].shape.rows() as f64);
        for (i, v) in x[0].data.iter().enumerate() {
            var.data[i % c] += (v.abs() + stats[i % c][2]).powi(2) / rows;
        }
        vec![y, Array { shape: [c].into(), data: stats.iter().map(|s| s[2]).collect() }, var]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        if self.given {
            let (mean, var) = (io.f32(3), io.f32(4));
            let stats: Vec<[f64; 2]> = mean.iter().zip(&*var).map(|(&m, &v)| [m.into(), v.into()]).collect();
            self.apply(io, &stats);
            return Ok(());
        }
        let (x, c) = (io.slice(0), io.x[0].shape.last());
        cpu::math::group_stats(x, 1, c, c, |stats| {
            for j in 0..2 {
                io.write(1 + j, |y| y.iter_mut().zip(stats).for_each(|(y, s)| *y = s[j] as f32));
            }
            self.apply(io, stats);
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = *io.x_spec(0);
        let (c, n) = (x.shape.last(), x.shape.numel());
        let [mean, var] = if self.given { [io.x(3), io.x(4)] } else { [io.y(1), io.y(2)] };
        if !self.given {
            let (count, each) = parts(x.shape.rows());
            let (rows, channels, each) = (io.int(x.shape.rows())?, io.int(c)?, io.int(each)?);
            let p = k::BatchNormStats { partial: io.scratch, x: io.x(0), rows, c: channels, each };
            io.launch(k::BATCH_NORM_STATS, x.dtype, "", [c.div_ceil(k::COLUMNS), count, 1], k::BLOCK, p)?;
            let parts = io.int(count)?;
            let p = k::BatchNormMerge { mean, var, partial: io.scratch, rows, c: channels, each, parts };
            io.launch(k::BATCH_NORM_MERGE, x.dtype, "", [c.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)?;
        }
        let p = k::BatchNormApply {
            y: io.y(0),
            x: io.x(0),
            w: io.x(1),
            bias: io.x(2),
            mean,
            var,
            n: n as i64,
            c: io.int(c)?,
            eps: self.eps,
        };
        io.launch(k::BATCH_NORM_APPLY, x.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn grad(&self, g: &mut Graph, x: &[Var], y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let Some(dy) = dy[0].filter(|_| dy[1..].iter().all(Option::is_none)) else {
            return Err(Error::NoGradient(Self::NAME));
        };
        let [mean, var] = if self.given { [x[3], x[4]] } else { [y[1], y[2]] };
        let op = BatchNormGrad { eps: self.eps, given: self.given };
        let dx = g.push_all("dx", op, &[x[0], x[1], dy, mean, var])?;
        let mut all: Vec<Option<Var>> = dx.into_iter().map(Some).collect();
        all.resize(x.len(), None);
        Ok(all)
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        if self.given { 0 } else { partial_bytes(x[0].shape) }
    }

    fn cpu_scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        let (c, rows) = (x[0].shape.last(), x[0].shape.rows());
        cpu::working_bytes(c) + cpu::math::stats_bytes(rows, c)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(6 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 7] =
            [&[2, 1], &[3, 5], &[2, 4, 4, 8], &[700, 3], &[2, 37, 31, 33], &[1, 9, 9, 64], &[4, 130]];
        let mut all: Vec<Case> = shapes.iter().map(|&x| norm(x, false, 0.0)).collect();
        all.push(norm(&[3, 11, 7, 40], false, 3.0));
        all.extend([&[1, 1][..], &[3, 5], &[2, 9, 9, 33]].map(|x| norm(x, true, 0.5)));
        // The widest layer of a discriminator of pictures of 256².
        all.push(norm(&[4, 31, 31, 512], false, 0.0).bench());
        all
    }

    fn random(r: &mut Small) -> Case {
        norm(&[r.below(3) + 2, r.below(300) + 1, r.below(40) + 1], r.below(3) == 0, 0.3)
    }
}

fn partial_bytes(x: Shape) -> usize {
    parts(x.rows()).0 * x.last() * 2 * size_of::<f32>()
}

fn norm(x: &[usize], given: bool, mean: f64) -> Case {
    let c = [x[x.len() - 1]];
    let mut args = vec![t(x).normal(mean, 1.0), t(c).normal(1.0, 0.2), t(c)];
    args.extend(given.then(|| [f32s(c).normal(mean, 0.1), f32s(c).normal(1.0, 0.05)]).into_iter().flatten());
    Case::new(BatchNorm { eps: 1e-5, given }, args)
}

/// x (…,C), w (C), dy (…,C), mean, var (C) f32 to dx, and dw, dbias (C) in f32.
#[derive(Clone, PartialEq, Debug)]
pub struct BatchNormGrad {
    /// As that of [`BatchNorm`].
    pub eps: f32,
    /// As that of [`BatchNorm`]: the statistics are no function of x.
    pub given: bool,
}

impl BatchNormGrad {
    /// dx, dw, dbias; with `size`, what is summed into each.
    fn each(&self, x: &[Array], size: bool) -> Vec<Array> {
        let (c, rows) = (x[0].shape.last(), x[0].shape.rows() as f64);
        let sized = |v: f64| if size { v.abs() } else { v };
        let sign = if size { 1.0 } else { -1.0 };
        let rstd = |i: usize| 1.0 / (x[4].data[i % c] + f64::from(self.eps)).sqrt();
        let n = |i: usize| (sized(x[0].data[i]) + sign * sized(x[3].data[i % c])) * rstd(i);
        let (mut dx, mut dw, mut db) = (x[0].clone(), Array::zeros([c]), Array::zeros([c]));
        for i in 0..dx.data.len() {
            dw.data[i % c] += sized(x[2].data[i]) * n(i);
            db.data[i % c] += sized(x[2].data[i]);
        }
        let share = if self.given { 0.0 } else { sign / rows };
        for i in 0..dx.data.len() {
            let means = share * (db.data[i % c] + n(i) * dw.data[i % c]);
            dx.data[i] = sized(x[1].data[i % c]) * rstd(i) * (sized(x[2].data[i]) + means);
        }
        vec![dx, dw, db]
    }
}

impl Operation for BatchNormGrad {
    const NAME: &'static str = "batch_norm_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (…,C), w (C), dy as x, of one float type, mean (C), var (C) of f32";
        let [x0, w, dy, mean, var] = args(Self::NAME, want, x)?;
        let forward = BatchNorm { eps: self.eps, given: true };
        let fits = forward.infer(&[x0, w, w, mean, var]).is_ok() && x0 == dy && x0.shape.numel() > 0;
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![x0, mean, mean])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, false)
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, true)
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, w, dy, mean, var) = (io.slice(0), io.f32(1), io.slice(2), io.f32(3), io.f32(4));
        let (c, rows) = (io.x[0].shape.last(), io.x[0].shape.rows());
        let rstd = |&v: &f32| (1.0 / (f64::from(v) + f64::from(self.eps)).sqrt()) as f32;
        let (rstd, zero): (Vec<f32>, _) = (var.iter().map(rstd).collect(), vec![0.0; c]);
        let p = Channels { mean: [&mean, &zero], rstd: &rstd, w: &w, bias: &zero, act: Act::None };
        let each = (CHUNK / c).max(1);
        // Σ dy · n, then Σ dy.
        let totals: Vec<f64> = cpu::with_scratch(rows.div_ceil(each) * 2 * c, |sums| {
            sums.par_chunks_mut(2 * c).enumerate().for_each(|(i, sums)| {
                sums.fill(0.0);
                let (dw, dbias) = sums.split_at_mut(c);
                let range = i * each * c..rows.min((i + 1) * each) * c;
                x.with(range.clone(), |x| dy.with(range, |dy| norm_grad_sums(p, x, dy, dw, dbias)));
            });
            (0..2 * c).map(|i| sums.iter().skip(i).step_by(2 * c).map(|&v| f64::from(v)).sum()).collect()
        });
        for (j, totals) in [(1, &totals[..c]), (2, &totals[c..])] {
            io.write(j, |y| y.iter_mut().zip(totals).for_each(|(y, v)| *y = *v as f32));
        }
        let share = if self.given { 0.0 } else { 1.0 / rows as f64 };
        let mean_of = |i: usize| (totals[i] * share * f64::from(w[i % c])) as f32;
        let (gn, g): (Vec<f32>, Vec<f32>) =
            ((0..c).map(mean_of).collect(), (c..2 * c).map(mean_of).collect());
        io.rows(0, c, |first, dx| {
            let range = first * c..first * c + dx.len();
            x.with(range.clone(), |x| dy.with(range, |dy| norm_grad_apply(p, x, dy, [&g, &gn], dx)));
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = *io.x_spec(0);
        let (rows, c, n) = (x.shape.rows(), x.shape.last(), x.shape.numel());
        let ((count, each), channels) = (parts(rows), io.int(c)?);
        let p = back::BatchNormGradSums {
            partial: io.scratch,
            x: io.x(0),
            dy: io.x(2),
            mean: io.x(3),
            var: io.x(4),
            rows: io.int(rows)?,
            c: channels,
            each: io.int(each)?,
            eps: self.eps,
        };
        let grid = [c.div_ceil(back::COLUMNS), count, 1];
        io.launch(back::BATCH_NORM_GRAD_SUMS, x.dtype, "", grid, back::BLOCK, p)?;
        let parts = io.int(count)?;
        let p =
            back::BatchNormGradTotal { dw: io.y(1), dbias: io.y(2), partial: io.scratch, c: channels, parts };
        io.launch(back::BATCH_NORM_GRAD_TOTAL, x.dtype, "", [c.div_ceil(back::BLOCK), 1, 1], back::BLOCK, p)?;
        let p = back::BatchNormGradApply {
            dx: io.y(0),
            x: io.x(0),
            w: io.x(1),
            dy: io.x(2),
            mean: io.x(3),
            var: io.x(4),
            dw: io.y(1),
            dbias: io.y(2),
            n: n as i64,
            c: channels,
            eps: self.eps,
            share: if self.given { 0.0 } else { 1.0 / rows as f32 },
        };
        io.launch(back::BATCH_NORM_GRAD_APPLY, x.dtype, "", [n.div_ceil(back::BLOCK), 1, 1], back::BLOCK, p)
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        partial_bytes(x[0].shape)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(14 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        BatchNorm::cases().into_iter().map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        with_gradient(BatchNorm::random(r))
    }
}

/// The case of the gradients for one of the op.
fn with_gradient(case: Case) -> Case {
    let Op::BatchNorm(BatchNorm { eps, given }) = case.op else { return case };
    let (x, w) = (case.args[0].clone(), case.args[1].clone());
    let Fill::Normal(mean, _) = x.fill else { return case };
    let stats = [f32s(w.shape).normal(mean, 0.1), f32s(w.shape).normal(1.0, 0.05)];
    let args = [vec![x.clone(), w, t(x.shape)], stats.to_vec()].concat();
    Case { op: BatchNormGrad { eps, given }.into(), args, ..case }
}

/// Moves a running statistic (C) towards `factor` times that of a batch (C): state + momentum · (factor · value − state), f32.
#[derive(Clone, PartialEq, Debug)]
pub struct Running {
    /// The share that is new: 0.1 in PyTorch.
    pub momentum: f32,
    /// 1, or n / (n − 1) for a biased variance of n rows, of which PyTorch keeps the unbiased one.
    pub factor: f32,
}

impl Operation for Running {
    const NAME: &'static str = "running";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "state (C), value (C), f32";
        let [state, value] = args(Self::NAME, want, x)?;
        ensure!(state == value && state.dtype == DType::F32, Self::NAME, want, x);
        Ok(vec![state])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let (m, factor) = (f64::from(self.momentum), f64::from(self.factor));
        vec![x[0].zip(&x[1], |state, value| state + m * (factor * value - state))]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        vec![x[0].zip(&x[1], |state, value| state.abs() + (f64::from(self.factor) * value).abs())]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let value = io.f32(1);
        io.update(0, 0, |at, y| {
            y.iter_mut().zip(&value[at..]).for_each(|(y, v)| *y += self.momentum * (self.factor * v - *y));
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let n = io.y_spec(0).shape.numel();
        let &Running { momentum, factor } = self;
        let p = k::RunningFwd { state: io.y(0), value: io.x(1), n: io.int(n)?, momentum, factor };
        io.launch(k::RUNNING_FWD, DType::F32, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(4 * y[0].shape.numel(), x, y)
    }

    fn updates(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn cases() -> Vec<Case> {
        let sizes = [1, 2, 7, 64, 255, 256, 257, 1000];
        sizes.iter().enumerate().map(|(i, &c)| running(c, if i % 2 == 0 { 1.0 } else { 1.25 })).collect()
    }

    fn random(r: &mut Small) -> Case {
        running(r.below(600) + 1, r.range(1.0, 2.0))
    }
}

fn running(c: usize, factor: f64) -> Case {
    let op = Running { momentum: 0.1, factor: factor as f32 };
    Case::new(op, [f32s([c]), f32s([c]).normal(1.0, 0.2)]).only(&[DType::F32])
}
