//! Losses of training: distances between a prediction and a target, and the divergence of a KL autoencoder's code.
//!
//! PyTorch: `F.l1_loss`, `F.mse_loss`, `F.huber_loss` by image, weighted and averaged; diffusers
//! `DiagonalGaussianDistribution.kl()`. Rombach et al. 2022, sections 3.1 and 3.3. Kernel: `kernels/loss.cu`.
use super::prelude::*;
use crate::kernels::loss as k;
use rayon::prelude::*;

/// What a difference d of one element costs.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Distance {
    /// |d|
    L1,
    /// d²
    L2,
    /// d² / 2 for |d| ≤ δ, δ (|d| − δ / 2) beyond.
    Huber(f32),
}

impl Distance {
    /// The number that kernels know it by, and δ.
    fn code(self) -> (i32, f32) {
        match self {
            Distance::L1 => (0, 0.0),
            Distance::L2 => (1, 0.0),
            Distance::Huber(delta) => (2, delta),
        }
    }

    fn of(self, d: f64) -> f64 {
        match self {
            Distance::L1 => d.abs(),
            Distance::L2 => d * d,
            Distance::Huber(delta) => {
                let delta = f64::from(delta);
                if d.abs() <= delta { 0.5 * d * d } else { delta * (d.abs() - 0.5 * delta) }
            }
        }
    }

    fn slope(self, d: f64) -> f64 {
        let sign = if d > 0.0 {
            1.0
        } else if d < 0.0 {
            -1.0
        } else {
            0.0
        };
        match self {
            Distance::L1 => sign,
            Distance::L2 => 2.0 * d,
            Distance::Huber(delta) if d.abs() <= f64::from(delta) => d,
            Distance::Huber(delta) => f64::from(delta) * sign,
        }
    }
}

/// prediction (B,…), target (B,…) f32 and weights (B) f32 to the loss (1), the mean over images of weight · distance, and
/// the distance of each image (B), both f32. The distance is the mean over an image's elements. The target and the weights are
/// data: no gradient reaches them.
#[derive(Clone, PartialEq, Debug)]
pub struct Loss(pub Distance);

/// Elements per image.
fn size(x: Shape) -> usize {
    x.numel() / x[0].max(1)
}

const WANT: &str = "prediction (B,…) of a float type, target (B,…) of f32, weights (B) of f32, none empty";

fn fits(x: &[Spec]) -> bool {
    let [prediction, target, weights, ..] = x else { return false };
    DType::FLOATS.contains(&prediction.dtype)
        && prediction.shape.numel() > 0
        && *target == Spec::new(DType::F32, prediction.shape)
        && *weights == Spec::new(DType::F32, [prediction.shape[0]])
}

impl Operation for Loss {
    const NAME: &'static str = "loss";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        ensure!(x.len() == 3 && fits(x), Self::NAME, WANT, x);
        Ok(vec![Spec::new(DType::F32, [1]), x[2]])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let n = size(x[0].shape);
        let rows = x[0].data.chunks(n).zip(x[1].data.chunks(n));
        let mean =
            |(a, b): (&[f64], &[f64])| a.iter().zip(b).map(|(a, b)| self.0.of(a - b)).sum::<f64>() / n as f64;
        let each: Vec<f64> = rows.map(mean).collect();
        let total = each.iter().zip(&x[2].data).map(|(e, w)| e * w).sum::<f64>() / each.len() as f64;
        vec![Array { shape: [1].into(), data: vec![total] }, Array { shape: x[2].shape, data: each }]
    }

    /// A difference is off by a share of both its terms.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let sizes: Vec<Array> = x.iter().map(|a| a.map(f64::abs)).collect();
        Loss(self.0).spec(&[sizes[0].clone(), sizes[1].map(|v| -v), sizes[2].clone()])
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, target, weights, n) = (io.slice(0), io.f32(1), io.f32(2), size(io.x[0].shape));
        let each: Vec<f64> = (target.par_chunks(n).enumerate())
            .map(|(b, target)| {
                x.with(b * n..(b + 1) * n, |x| {
                    let parts = x.chunks(4096).zip(target.chunks(4096));
                    let one = |(x, t): (&[f32], &[f32])| {
                        x.iter().zip(t).map(|(x, t)| self.0.of(f64::from(x - t))).sum::<f64>()
                    };
                    parts.map(one).sum::<f64>() / n as f64
                })
            })
            .collect();
        let total = each.iter().zip(&*weights).map(|(e, w)| e * f64::from(*w)).sum::<f64>();
        io.write(0, |y| y[0] = (total / each.len() as f64) as f32);
        io.write(1, |y| y.iter_mut().zip(&each).for_each(|(y, e)| *y = *e as f32));
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let (x, (kind, delta)) = (*io.x_spec(0), self.0.code());
        let (b, n) = (x.shape[0], size(x.shape) as i64);
        let p = k::LossFwd { each: io.y(1), prediction: io.x(0), target: io.x(1), n, kind, delta };
        io.launch(k::LOSS_FWD, x.dtype, "", [b, 1, 1], k::BLOCK, p)?;
        let p = k::LossTotal { loss: io.y(0), each: io.y(1), weights: io.x(2), batch: io.int(b)? };
        io.launch(k::LOSS_TOTAL, x.dtype, "", [1, 1, 1], k::BLOCK, p)
    }

    /// Of the loss alone: the distances of single images are there to be read.
    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let &[Some(dloss), None] = dy else { return Err(Error::NoGradient(Self::NAME)) };
        Ok(vec![Some(g.push("dx", LossGrad(self.0), &[x[0], x[1], x[2], dloss])?), None, None])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(4 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 9] = [
            &[1],
            &[1, 1],
            &[3, 5],
            &[2, 8, 8, 4],
            &[4, 3, 3, 1],
            &[1, 300],
            &[3, 257],
            &[2, 16, 16, 3],
            &[7, 10],
        ];
        let all = shapes.iter().enumerate();
        all.map(|(i, s)| loss([Distance::L1, Distance::L2, Distance::Huber(0.7)][i % 3], s)).collect()
    }

    fn random(r: &mut Small) -> Case {
        let kind = [Distance::L1, Distance::L2, Distance::Huber(r.range(0.1, 2.0) as f32)][r.below(3)];
        loss(kind, &[r.below(5) + 1, r.below(30) + 1, r.below(40) + 1])
    }
}

fn loss(kind: Distance, x: &[usize]) -> Case {
    Case::new(Loss(kind), [t(x), f32s(x), f32s([x[0]]).normal(1.0, 0.3)])
}

/// prediction, target, weights as [`Loss`] has them, and the gradient of the loss (1) f32, to that of the prediction.
#[derive(Clone, PartialEq, Debug)]
pub struct LossGrad(pub Distance);

impl LossGrad {
    fn each(&self, x: &[Array], f: impl Fn(f64, f64) -> f64) -> Vec<Array> {
        let (n, total) = (size(x[0].shape), x[0].data.len() as f64);
        let mut dx = x[0].clone();
        for (i, v) in dx.data.iter_mut().enumerate() {
            *v = f(*v, x[1].data[i]) * x[2].data[i / n] * x[3].data[0] / total;
        }
        vec![dx]
    }
}

impl Operation for LossGrad {
    const NAME: &'static str = "loss_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = format!("{WANT}, and dloss (1) of f32");
        let scalar = x.get(3).is_some_and(|s| *s == Spec::new(DType::F32, [1]));
        ensure!(x.len() == 4 && scalar && fits(x), Self::NAME, want, x);
        Ok(vec![x[0]])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |a, b| self.0.slope(a - b))
    }

    /// A difference is off by a share of both its terms.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |a, b| self.0.slope(a.abs() + b.abs())).into_iter().map(|a| a.map(f64::abs)).collect()
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, target, weights, scale) = (io.slice(0), io.f32(1), io.f32(2), io.f32(3)[0]);
        let (n, kind) = (size(io.x[0].shape), self.0);
        let total = io.x[0].shape.numel() as f32;
        io.rows(0, 1, |first, dx| {
            x.with(first..first + dx.len(), |x| {
                for (i, dx) in dx.iter_mut().enumerate() {
                    let d = f64::from(x[i] - target[first + i]);
                    *dx = scale * weights[(first + i) / n] / total * kind.slope(d) as f32;
                }
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let (x, (kind, delta)) = (*io.x_spec(0), self.0.code());
        let total = x.shape.numel();
        let p = k::LossGrad {
            dx: io.y(0),
            prediction: io.x(0),
            target: io.x(1),
            weights: io.x(2),
            dloss: io.x(3),
            n: size(x.shape) as i64,
            total: total as i64,
            kind,
            delta,
        };
        io.launch(k::LOSS_GRAD, x.dtype, "", [total.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(5 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        Loss::cases().into_iter().map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        with_gradient(Loss::random(r))
    }
}

fn with_gradient(case: Case) -> Case {
    let super::Op::Loss(Loss(kind)) = case.op else { return case };
    // As large as there are elements: in f16, gradients of a mean are subnormal numbers, which is what loss scales are for.
    let dloss = f32s([1]).values(vec![case.args[0].shape.numel() as f64]);
    let args = [&case.args[..], &[dloss]].concat();
    Case { op: LossGrad(kind).into(), args, ..case }
}

/// moments (B,…,2Z), mean before log-variance, to Σ (mean² + e^logvar − 1 − logvar) / 2 of each image, averaged (1), and by
/// image (B), both f32: the divergence from a standard normal distribution. The log-variance is held within −30…20.
#[derive(Clone, PartialEq, Debug)]
pub struct Kl;

impl Kl {
    fn each(x: &Array, f: impl Fn(f64, f64) -> f64) -> Vec<Array> {
        let (z, b) = (x.shape.last() / 2, x.shape[0]);
        let image = |image: &[f64]| -> f64 {
            let rows = image.chunks(2 * z);
            rows.flat_map(|row| (0..z).map(|i| f(row[i], row[z + i].clamp(-30.0, 20.0))).collect::<Vec<_>>())
                .sum()
        };
        let each: Vec<f64> = x.data.chunks(size(x.shape)).map(image).collect();
        let mean = each.iter().sum::<f64>() / b as f64;
        vec![Array { shape: [1].into(), data: vec![mean] }, Array { shape: [b].into(), data: each }]
    }
}

impl Operation for Kl {
    const NAME: &'static str = "kl";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "moments (B,…,2Z) of a float type, not empty";
        let [x0] = args(Self::NAME, want, x)?;
        let even = x0.shape.len() >= 2 && x0.shape.last() % 2 == 0 && x0.shape.numel() > 0;
        ensure!(even && DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        Ok(vec![Spec::new(DType::F32, [1]), Spec::new(DType::F32, [x0.shape[0]])])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        Kl::each(&x[0], |mean, logvar| 0.5 * (mean * mean + logvar.exp() - 1.0 - logvar))
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        Kl::each(&x[0], |mean, logvar| {
            0.5 * (mean * mean + logvar.exp() * (1.0 + logvar.abs()) + 1.0 + logvar.abs())
        })
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, z) = (io.f32(0), io.x[0].shape.last() / 2);
        let image = |image: &[f32]| -> f64 {
            let one = |row: &[f32]| -> f64 {
                let pairs = row[..z].iter().zip(&row[z..]);
                pairs
                    .map(|(m, v)| {
                        let v = v.clamp(-30.0, 20.0);
                        f64::from(0.5 * (m * m + v.exp() - 1.0 - v))
                    })
                    .sum()
            };
            image.chunks(2 * z).map(one).sum()
        };
        let each: Vec<f64> = x.par_chunks(size(io.x[0].shape)).map(image).collect();
        io.write(0, |y| y[0] = (each.iter().sum::<f64>() / each.len() as f64) as f32);
        io.write(1, |y| y.iter_mut().zip(&each).for_each(|(y, e)| *y = *e as f32));
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = *io.x_spec(0);
        let (b, z) = (x.shape[0], x.shape.last() / 2);
        let pixels = io.int(size(x.shape)).and(io.int(size(x.shape) / (2 * z)))?;
        let p = k::KlFwd { each: io.y(1), moments: io.x(0), pixels, z: io.int(z)? };
        io.launch(k::KL_FWD, x.dtype, "", [b, 1, 1], k::BLOCK, p)?;
        let p = k::LossTotal { loss: io.y(0), each: io.y(1), weights: Default::default(), batch: io.int(b)? };
        io.launch(k::LOSS_TOTAL, x.dtype, "", [1, 1, 1], k::BLOCK, p)
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let &[Some(dloss), None] = dy else { return Err(Error::NoGradient(Self::NAME)) };
        Ok(vec![Some(g.push("dx", KlGrad, &[x[0], dloss])?)])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(6 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 8] = [
            &[1, 2],
            &[3, 6],
            &[2, 4, 4, 8],
            &[1, 300, 2],
            &[4, 1, 1, 8],
            &[2, 5, 7, 10],
            &[3, 16, 16, 6],
            &[1, 8, 8, 32],
        ];
        let mut all: Vec<Case> = shapes.iter().map(|&s| Case::new(Kl, [t(s)])).collect();
        all.push(Case::new(Kl, [t([3, 9, 4]).normal(0.0, 25.0)]));
        all
    }

    fn random(r: &mut Small) -> Case {
        Case::new(Kl, [t([r.below(4) + 1, r.below(60) + 1, 2 * (r.below(8) + 1)])])
    }
}

/// moments (B,…,2Z) and the gradient of the divergence (1) f32 to that of the moments.
#[derive(Clone, PartialEq, Debug)]
pub struct KlGrad;

impl KlGrad {
    fn each(x: &[Array], f: impl Fn(f64, f64) -> [f64; 2]) -> Vec<Array> {
        let (z, share) = (x[0].shape.last() / 2, x[1].data[0] / x[0].shape[0] as f64);
        let mut dx = x[0].clone();
        for row in dx.data.chunks_mut(2 * z) {
            for i in 0..z {
                [row[i], row[z + i]] = f(row[i], row[z + i]).map(|v| v * share);
            }
        }
        vec![dx]
    }
}

impl Operation for KlGrad {
    const NAME: &'static str = "kl_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "moments (B,…,2Z) of a float type, dloss (1) of f32";
        let [moments, dloss] = args(Self::NAME, want, x)?;
        let scalar = dloss == Spec::new(DType::F32, [1]);
        ensure!(Kl.infer(&[moments]).is_ok() && scalar, Self::NAME, want, x);
        Ok(vec![moments])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        KlGrad::each(x, |mean, logvar| {
            let inside = (-30.0..=20.0).contains(&logvar);
            [mean, if inside { 0.5 * (logvar.exp() - 1.0) } else { 0.0 }]
        })
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let sizes = KlGrad::each(x, |mean, logvar| {
            let v = logvar.clamp(-30.0, 20.0);
            [mean.abs(), 0.5 * (v.exp() * (1.0 + v.abs()) + 1.0)]
        });
        sizes.into_iter().map(|a| a.map(f64::abs)).collect()
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, z) = (io.f32(0), io.x[0].shape.last() / 2);
        let share = io.f32(1)[0] / io.x[0].shape[0] as f32;
        io.write(0, |dx| {
            for (dx, x) in dx.chunks_mut(2 * z).zip(x.chunks(2 * z)) {
                for i in 0..z {
                    let logvar = x[z + i];
                    let inside = (-30.0..=20.0).contains(&logvar);
                    dx[i] = share * x[i];
                    dx[z + i] = if inside { 0.5 * share * (logvar.exp() - 1.0) } else { 0.0 };
                }
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = *io.x_spec(0);
        let n = x.shape.numel() / 2;
        let p = k::KlGrad {
            dx: io.y(0),
            moments: io.x(0),
            dloss: io.x(1),
            n: n as i64,
            z: io.int(x.shape.last() / 2)?,
            batch: io.int(x.shape[0])?,
        };
        io.launch(k::KL_GRAD, x.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(6 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        Kl::cases().into_iter().map(kl_grad).collect()
    }

    fn random(r: &mut Small) -> Case {
        kl_grad(Kl::random(r))
    }
}

fn kl_grad(case: Case) -> Case {
    let args = [&case.args[..], &[f32s([1])]].concat();
    // e^20 is beyond f16.
    let wide = matches!(case.args[0].fill, super::Fill::Normal(_, deviation) if deviation > 3.0);
    let types: &[DType] = if wide { &[DType::F32, DType::BF16] } else { case.types };
    Case { op: KlGrad.into(), args, types, ..case }
}
