//! y = f(x), elementwise, for the activations of the models.
//!
//! PyTorch: `F.silu`, `F.gelu`, `F.gelu(approximate="tanh")`, `F.relu`, `F.leaky_relu(0.2)`; quick GELU is x · sigmoid(1.702 x), as in CLIP.
//! Kernel: `kernels/activation.cu`.
use super::Op;
use super::prelude::*;
use crate::kernels::activation as k;
use crate::kernels::activation_grad as back;

pub use crate::backend::cpu::math::Act;

/// y = act(x).
#[derive(Clone, PartialEq, Debug)]
pub struct Activation(pub Act);

/// The number that kernels know an activation by.
pub(crate) fn code(act: Act) -> i32 {
    match act {
        Act::None => 0,
        Act::Silu => 1,
        Act::Gelu => 2,
        Act::QuickGelu => 3,
        Act::GeluTanh => 4,
        Act::Relu => 5,
        Act::LeakyRelu => 6,
    }
}

impl Operation for Activation {
    const NAME: &'static str = "activation";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x of a float type";
        let [x0] = args(Self::NAME, want, x)?;
        ensure!(DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        Ok(vec![x0])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        vec![x[0].map(|v| self.0.apply_f64(v))]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        vec![x[0].map(f64::abs)]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        io.update(0, 0, |_, y| cpu::math::activate_in_place(self.0, y));
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let spec = io.y_spec(0);
        let n = spec.shape.numel();
        let per_block = k::BLOCK * 16 / spec.dtype.size();
        let params = k::ActivationFwd { y: io.y(0), x: io.x(0), n: n as i64, act: code(self.0) };
        io.launch(k::ACTIVATION_FWD, spec.dtype, "", [n.div_ceil(per_block), 1, 1], k::BLOCK, params)
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(8 * y[0].shape.numel(), x, y)
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dy)] = dy else { return Ok(vec![None]) };
        Ok(vec![Some(g.push("dx", ActivationGrad(self.0), &[x[0], *dy])?)])
    }

    fn cases() -> Vec<Case> {
        let acts = [Act::Silu, Act::Gelu, Act::QuickGelu, Act::GeluTanh];
        let mut all = Vec::new();
        for act in acts {
            all.push(Case::new(Activation(act), [t([1]).normal(0.0, 4.0)]));
            all.push(Case::new(Activation(act), [t([3, 5, 77]).normal(0.0, 3.0)]));
            all.push(Case::new(Activation(act), [t([2, 9, 9, 32])]));
            all.push(Case::new(Activation(act), [t([64]).normal(0.0, 30.0)]));
        }
        for act in [Act::Relu, Act::LeakyRelu] {
            all.extend([&[1][..], &[3, 5, 77], &[2, 9, 9, 32]].map(|x| bent(act, x, 5)));
        }
        // The time embedding of a UNet, and a picture's worth for the bandwidth.
        all.extend(
            [&[2, 1280][..], &[2, 64, 64, 320]].map(|x| Case::new(Activation(Act::Silu), [t(x)]).bench()),
        );
        all
    }

    fn random(r: &mut Small) -> Case {
        let acts = [Act::Silu, Act::Gelu, Act::QuickGelu, Act::GeluTanh, Act::Relu, Act::LeakyRelu];
        let (act, shape) = (acts[r.below(6)], [r.below(5) + 1, r.below(300) + 1]);
        match act {
            Act::Relu | Act::LeakyRelu => bent(act, &shape, r.below(1000) as u64),
            _ => Case::new(Activation(act), [t(shape).normal(0.0, 3.0)]),
        }
    }
}

/// A case of an activation with a bend at 0, away from it: finite differences across it say nothing.
fn bent(act: Act, shape: &[usize], seed: u64) -> Case {
    let mut r = Small::new(seed);
    let n = shape.iter().product();
    let values = (0..n).map(|_| r.range(0.02, 4.0) * if r.below(2) == 0 { -1.0 } else { 1.0 }).collect();
    Case::new(Activation(act), [t(shape).values(values)])
}

/// dx = dy · act′(x) for x, dy of one shape.
#[derive(Clone, PartialEq, Debug)]
pub struct ActivationGrad(pub Act);

impl Operation for ActivationGrad {
    const NAME: &'static str = "activation_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x, dy of one shape and float type";
        let [x0, dy] = args(Self::NAME, want, x)?;
        ensure!(x0 == dy && DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        Ok(vec![x0])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        vec![x[0].zip(&x[1], |x, dy| dy * self.0.slope_f64(x))]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        vec![x[0].zip(&x[1], |x, dy| dy.abs() * self.0.slope_size_f64(x))]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let x = io.slice(0);
        io.update(1, 0, |at, dy| {
            x.with(at..at + dy.len(), |x| cpu::math::times_slope(self.0, x, dy));
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let spec = io.y_spec(0);
        let n = spec.shape.numel();
        let per_block = back::BLOCK * 16 / spec.dtype.size();
        let params =
            back::ActivationGrad { dx: io.y(0), x: io.x(0), dy: io.x(1), n: n as i64, act: code(self.0) };
        io.launch(back::ACTIVATION_GRAD, spec.dtype, "", [n.div_ceil(per_block), 1, 1], back::BLOCK, params)
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(12 * y[0].shape.numel(), x, y)
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[(0, 1)]
    }

    fn cases() -> Vec<Case> {
        Activation::cases().into_iter().filter_map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        with_gradient(Activation::random(r)).expect("a case of Activation")
    }
}

/// The case of the gradient for one of the activation.
fn with_gradient(case: Case) -> Option<Case> {
    let Op::Activation(Activation(act)) = case.op else { return None };
    let x = case.args[0].clone();
    let dy = t(x.shape);
    Some(Case { op: ActivationGrad(act).into(), args: vec![x, dy], ..case })
}
