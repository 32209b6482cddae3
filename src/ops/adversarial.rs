//! What a discriminator's logits cost, the weight that balances this against a likelihood, and the product with it.
//!
//! Goodfellow et al. 2014 (vanilla, not saturating), Lim and Ye 2017 (hinge); the adaptive weight is equation 7 of Esser,
//! Rombach and Ommer 2021, as the CompVis code has it. PyTorch: `F.relu(1 - x).mean()`, `F.softplus(-x).mean()`.
//! Kernel: `kernels/adversarial.cu`.
use super::Op;
use super::prelude::*;
use crate::kernels::adversarial as k;

/// What one logit costs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Criterion {
    /// −x: of the generator, for both kinds of discriminator.
    Generator,
    /// max(0, 1 − x): of a hinge discriminator, on real pictures.
    HingeReal,
    /// max(0, 1 + x): the same on generated ones.
    HingeFake,
    /// log(1 + e^−x): of a vanilla discriminator, on real pictures.
    VanillaReal,
    /// log(1 + e^x): the same on generated ones.
    VanillaFake,
}

impl Criterion {
    const ALL: [Criterion; 5] = [
        Criterion::Generator,
        Criterion::HingeReal,
        Criterion::HingeFake,
        Criterion::VanillaReal,
        Criterion::VanillaFake,
    ];

    fn of(self, x: f64) -> f64 {
        let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        match self {
            _ if x.is_nan() => x,
            Criterion::Generator => -x,
            Criterion::HingeReal => (1.0 - x).max(0.0),
            Criterion::HingeFake => (1.0 + x).max(0.0),
            Criterion::VanillaReal => softplus(-x),
            Criterion::VanillaFake => softplus(x),
        }
    }

    fn slope(self, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match self {
            Criterion::Generator => -1.0,
            Criterion::HingeReal => -f64::from(u8::from(x < 1.0)),
            Criterion::HingeFake => f64::from(u8::from(x > -1.0)),
            Criterion::VanillaReal => -sigmoid(-x),
            Criterion::VanillaFake => sigmoid(x),
        }
    }
}

/// Logits x of any shape, not empty, to the mean of their costs (1) f32.
#[derive(Clone, PartialEq, Debug)]
pub struct LogitLoss(pub Criterion);

const ONE: &[usize] = &[1];

fn scalar() -> Spec {
    Spec::new(DType::F32, ONE)
}

fn number(v: f64) -> Array {
    Array { shape: ONE.into(), data: vec![v] }
}

impl Operation for LogitLoss {
    const NAME: &'static str = "logit_loss";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "logits of a float type, not empty";
        let [x0] = args(Self::NAME, want, x)?;
        ensure!(DType::FLOATS.contains(&x0.dtype) && x0.shape.numel() > 0, Self::NAME, want, x);
        Ok(vec![scalar()])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let sum = x[0].data.iter().map(|&v| self.0.of(v)).sum::<f64>();
        vec![number(sum / x[0].data.len() as f64)]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        vec![number(x[0].data.iter().map(|v| 1.0 + v.abs()).sum::<f64>() / x[0].data.len() as f64)]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let x = io.f32(0);
        let sum = x.iter().map(|&v| self.0.of(v.into())).sum::<f64>();
        io.write(0, |y| y[0] = (sum / x.len() as f64) as f32);
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = *io.x_spec(0);
        let n = x.shape.numel();
        let count = n.div_ceil(k::BLOCK).clamp(1, 1024);
        let p = k::LogitLossFwd { partial: io.scratch, x: io.x(0), n: n as i64, kind: self.0 as i32 };
        io.launch(k::LOGIT_LOSS_FWD, x.dtype, "", [count, 1, 1], k::BLOCK, p)?;
        let p = k::LogitLossMean { y: io.y(0), partial: io.scratch, count: io.int(count)?, n: n as f32 };
        io.launch(k::LOGIT_LOSS_MEAN, x.dtype, "", [1, 1, 1], k::BLOCK, p)
    }

    fn scratch(&self, _x: &[Spec], _y: &[Spec]) -> usize {
        1024 * size_of::<f32>()
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dloss)] = dy else { return Ok(vec![None]) };
        Ok(vec![Some(g.push("dx", LogitLossGrad(self.0), &[x[0], *dloss])?)])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(4 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 3] = [&[1], &[3, 7, 5, 1], &[4, 300, 1]];
        let all = Criterion::ALL.iter().flat_map(|&kind| shapes.map(|x| logits(kind, x, 3)));
        all.collect()
    }

    fn random(r: &mut Small) -> Case {
        let kind = Criterion::ALL[r.below(5)];
        let shape = [r.below(4) + 1, r.below(30) + 1, r.below(30) + 1, 1];
        logits(kind, &shape, r.below(1000) as u64)
    }
}

/// Logits away from the bends at ±1, across which finite differences say nothing.
fn logits(kind: Criterion, shape: &[usize], seed: u64) -> Case {
    let mut r = Small::new(seed);
    let mut one = || {
        let size = if r.below(2) == 0 { r.range(0.0, 0.9) } else { r.range(1.1, 4.0) };
        if r.below(2) == 0 { size } else { -size }
    };
    let values = (0..shape.iter().product()).map(|_| one()).collect();
    Case::new(LogitLoss(kind), [t(shape).values(values)])
}

/// Logits and the gradient of their loss (1) f32 to that of the logits.
#[derive(Clone, PartialEq, Debug)]
pub struct LogitLossGrad(pub Criterion);

impl Operation for LogitLossGrad {
    const NAME: &'static str = "logit_loss_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "logits of a float type, not empty, dloss (1) of f32";
        let [x0, dloss] = args(Self::NAME, want, x)?;
        ensure!(LogitLoss(self.0).infer(&[x0]).is_ok() && dloss == scalar(), Self::NAME, want, x);
        Ok(vec![x0])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let share = x[1].data[0] / x[0].data.len() as f64;
        vec![x[0].map(|v| share * self.0.slope(v))]
    }

    /// The argument of the sigmoid is exact; the terms of 1 + e^x are of one sign.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let share = (x[1].data[0] / x[0].data.len() as f64).abs();
        vec![x[0].map(|v| share * self.0.slope(v).abs() * (1.0 + v.abs()))]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, share) = (io.slice(0), f64::from(io.f32(1)[0]) / io.x[0].shape.numel() as f64);
        io.rows(0, 1, |first, dx| {
            x.with(first..first + dx.len(), |x| {
                dx.iter_mut().zip(x).for_each(|(d, &x)| *d = (share * self.0.slope(x.into())) as f32);
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = *io.x_spec(0);
        let n = x.shape.numel();
        let p =
            k::LogitLossGrad { dx: io.y(0), x: io.x(0), dloss: io.x(1), n: n as i64, kind: self.0 as i32 };
        io.launch(k::LOGIT_LOSS_GRAD, x.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(5 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        LogitLoss::cases().into_iter().map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        with_gradient(LogitLoss::random(r))
    }
}

fn with_gradient(case: Case) -> Case {
    let Op::LogitLoss(LogitLoss(kind)) = case.op else { return case };
    // As large as there are elements, so that gradients of a mean are normal numbers in f16.
    let dloss = f32s(ONE).values(vec![case.args[0].shape.numel() as f64]);
    Case { op: LogitLossGrad(kind).into(), args: [&case.args[..], &[dloss]].concat(), ..case }
}

/// The weight of a discriminator's say, so that at the decoder's last layer it pulls as hard as the likelihood: `times` ·
/// min(√likely / (√judged + 1e-4 · scale), 10⁴), where likely and judged (1) are the sums of squares of the gradients there of
/// likelihood and generator loss, both times scale (1). Outputs the weight (1) and the weight times factor (1), all f32. A
/// constant of training: it has no gradient.
#[derive(Clone, PartialEq, Debug)]
pub struct AdaptiveWeight {
    /// `disc_weight` of the CompVis code.
    pub times: f32,
}

/// Most that the quotient of the norms can be.
const MOST: f32 = 1e4;

impl Operation for AdaptiveWeight {
    const NAME: &'static str = "adaptive_weight";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "likely (1), judged (1), scale (1), factor (1), f32";
        ensure!(x.len() == 4 && x.iter().all(|s| *s == scalar()), Self::NAME, want, x);
        Ok(vec![scalar(); 2])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let [likely, judged, scale, factor] = [0, 1, 2, 3].map(|i| x[i].data[0]);
        let quotient = likely.sqrt() / (judged.sqrt() + 1e-4 * scale);
        let quotient = if quotient > f64::from(MOST) { f64::from(MOST) } else { quotient };
        let weight = f64::from(self.times) * quotient;
        vec![number(weight), number(factor * weight)]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let [likely, judged, scale, factor] = [0, 1, 2, 3].map(|i| io.f32(i)[0]);
        let quotient = likely.sqrt() / 1e-4f32.mul_add(scale, judged.sqrt());
        // A comparison, so that NaN stays.
        let weight = self.times * if quotient > MOST { MOST } else { quotient };
        io.write(0, |y| y[0] = weight);
        io.write(1, |y| y[0] = factor * weight);
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let p = k::AdaptiveWeightFwd {
            weight: io.y(0),
            share: io.y(1),
            likely: io.x(0),
            judged: io.x(1),
            scale: io.x(2),
            factor: io.x(3),
            most: MOST,
            times: self.times,
        };
        io.launch(k::ADAPTIVE_WEIGHT_FWD, DType::F32, "", [1, 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(8, x, y)
    }

    fn cases() -> Vec<Case> {
        let all = [
            (0.5, [4.0, 9.0, 1.0, 1.0]),
            (1.0, [4.0, 9.0, 1.0, 0.0]),
            (0.5, [4.0, 0.0, 1.0, 1.0]),
            (0.8, [0.0, 9.0, 1.0, 1.0]),
            (1.0, [0.0, 0.0, 1.0, 1.0]),
            (1.0, [1e6, 1e-2, 1024.0, 1.0]),
            (0.5, [1e-6, 1e-7, 1.0, 1.0]),
            (1.0, [1e8, 1e-9, 1.0, 0.5]),
        ];
        all.into_iter().map(|(times, x)| adaptive(times, x)).collect()
    }

    fn random(r: &mut Small) -> Case {
        adaptive(r.range(0.1, 1.0), [r.uniform(), r.uniform(), r.range(0.5, 4.0), r.uniform()])
    }
}

fn adaptive(times: f64, x: [f64; 4]) -> Case {
    let op = AdaptiveWeight { times: times as f32 };
    Case::new(op, x.map(|v| f32s(ONE).values(vec![v]))).only(&[DType::F32])
}

/// y = s · x for x of any shape and a number s (1) f32.
#[derive(Clone, PartialEq, Debug)]
pub struct Scale;

impl Operation for Scale {
    const NAME: &'static str = "scale";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x of a float type, s (1) of f32";
        let [x0, s] = args(Self::NAME, want, x)?;
        ensure!(DType::FLOATS.contains(&x0.dtype) && s == scalar(), Self::NAME, want, x);
        Ok(vec![x0])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        vec![x[0].map(|v| v * x[1].data[0])]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let s = io.f32(1)[0];
        io.update(0, 0, |_, y| y.iter_mut().for_each(|y| *y *= s));
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = *io.x_spec(0);
        let n = x.shape.numel();
        let p = k::ScaleFwd { y: io.y(0), x: io.x(0), s: io.x(1), n: n as i64 };
        io.launch(k::SCALE_FWD, x.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(x[0].shape.numel(), x, y)
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 8] =
            [&[1], &[7], &[3, 5], &[256], &[257], &[2, 9, 9, 3], &[1, 70, 300], &[2, 16, 16, 32]];
        shapes.iter().map(|&x| Case::new(Scale, [t(x), f32s(ONE)])).collect()
    }

    fn random(r: &mut Small) -> Case {
        Case::new(Scale, [t([r.below(9) + 1, r.below(300) + 1]), f32s(ONE)])
    }
}
