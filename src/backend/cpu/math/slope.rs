//! Derivatives of the activations, sums of rows, and softmax: what gradients need.

use super::{Act, LEAK, TANH_SCALE, exp_nonpositive, exp_vector, one_plus_erf};
use crate::backend::cpu::simd::{Isa, Kernel, Simd};

impl Act {
    /// The derivative in f64: the specification.
    pub fn slope_f64(self, x: f64) -> f64 {
        let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
        // d/dx x σ(z(x))
        let gated = |z: f64, dz: f64| sigmoid(z) + x * sigmoid(z) * sigmoid(-z) * dz;
        match self {
            Act::None => 1.0,
            Act::Silu => gated(x, 1.0),
            Act::Gelu => {
                let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
                0.5 * super::erfc_f64(-x * std::f64::consts::FRAC_1_SQRT_2) + x * density
            }
            Act::QuickGelu => gated(1.702 * x, 1.702),
            Act::GeluTanh => {
                gated(TANH_SCALE * (x + 0.044715 * x * x * x), TANH_SCALE * (1.0 + 0.134145 * x * x))
            }
            Act::Relu | Act::LeakyRelu if x > 0.0 => 1.0,
            Act::Relu => 0.0,
            Act::LeakyRelu => LEAK,
        }
    }
}

impl Act {
    /// What is summed into the derivative, and what an error of the gate's argument z by a share of it costs.
    pub fn slope_size_f64(self, x: f64) -> f64 {
        let bell = |z: f64| 1.0 / ((1.0 + (-z).exp()) * (1.0 + z.exp()));
        let gated = |z: f64, dz: f64| 1.0 + ((x * dz).abs() + z.abs() * (1.0 + (x * dz).abs())) * bell(z);
        match self {
            Act::None | Act::Relu | Act::LeakyRelu => 1.0,
            Act::Silu => gated(x, 1.0),
            Act::Gelu => 1.0 + x.abs() * (1.0 + x * x) * (-0.5 * x * x).exp(),
            Act::QuickGelu => gated(1.702 * x, 1.702),
            Act::GeluTanh => {
                gated(TANH_SCALE * (x + 0.044715 * x * x * x), TANH_SCALE * (1.0 + 0.134145 * x * x))
            }
        }
    }
}

/// σ(z) + x σ(z) σ(-z) dz, where σ(-z) = e^-z σ(z): 1 - σ(z) would have no digits left for large z.
#[inline(always)]
fn gated<S: Simd>(s: S, x: S::F, z: S::F, dz: S::F) -> S::F {
    // Below -80, where both terms are zero in f32, the exponential would be infinite.
    let e = exp_vector(s, s.sub(s.splat(0.0), s.max(s.splat(-80.0), z)));
    let sigmoid = s.div(s.splat(1.0), s.add(s.splat(1.0), e));
    s.fma(s.mul(x, dz), s.mul(sigmoid, s.mul(e, sigmoid)), sigmoid)
}

#[inline(always)]
pub(super) fn slope<S: Simd>(s: S, act: Act, x: S::F) -> S::F {
    match act {
        Act::None => s.splat(1.0),
        Act::Silu => gated(s, x, x, s.splat(1.0)),
        Act::QuickGelu => gated(s, x, s.mul(x, s.splat(1.702)), s.splat(1.702)),
        Act::GeluTanh => {
            let square = s.mul(x, x);
            let (k, one) = (s.splat(TANH_SCALE as f32), s.splat(1.0));
            let z = s.mul(s.mul(k, x), s.fma(s.splat(0.044715), square, one));
            gated(s, x, z, s.mul(k, s.fma(s.splat(0.134145), square, one)))
        }
        Act::Gelu => {
            let density = exp_vector(s, s.mul(s.mul(x, x), s.splat(-0.5)));
            let x_density = s.mul(s.mul(x, s.splat(0.398_942_3)), density);
            let e = one_plus_erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
            s.fma(e, s.splat(0.5), x_density)
        }
        Act::Relu => s.select_lt(s.splat(0.0), x, s.splat(1.0), s.splat(0.0)),
        Act::LeakyRelu => s.select_lt(s.splat(0.0), x, s.splat(1.0), s.splat(LEAK as f32)),
    }
}

/// dy · act′(x), in place of dy.
struct TimesSlope<'a> {
    act: Act,
    x: &'a [f32],
    dy: &'a mut [f32],
}

impl Kernel for TimesSlope<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let whole = self.dy.len() / S::LANES * S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            let d = slope(s, self.act, s.load(&self.x[i..]));
            let y = s.mul(d, s.load(&self.dy[i..]));
            s.store(&mut self.dy[i..], y);
        }
        let mut pad = [0.0; 16];
        pad[..self.dy.len() - whole].copy_from_slice(&self.x[whole..]);
        let d = s.to_array(slope(s, self.act, s.load(&pad)));
        self.dy[whole..].iter_mut().zip(d).for_each(|(y, d)| *y *= d);
    }
}

/// dy = dy · act′(x), on one thread.
pub fn times_slope(act: Act, x: &[f32], dy: &mut [f32]) {
    assert_eq!(x.len(), dy.len(), "times_slope: lengths");
    // One loop per activation: the compiler sees the choice as constant.
    match act {
        Act::None => {}
        Act::Silu => Isa::best().run(TimesSlope { act: Act::Silu, x, dy }),
        Act::Gelu => Isa::best().run(TimesSlope { act: Act::Gelu, x, dy }),
        Act::QuickGelu => Isa::best().run(TimesSlope { act: Act::QuickGelu, x, dy }),
        Act::GeluTanh => Isa::best().run(TimesSlope { act: Act::GeluTanh, x, dy }),
        Act::Relu => Isa::best().run(TimesSlope { act: Act::Relu, x, dy }),
        Act::LeakyRelu => Isa::best().run(TimesSlope { act: Act::LeakyRelu, x, dy }),
    }
}

struct SumRows<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for SumRows<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for x in self.x.chunks_exact(self.y.len()) {
            self.y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
        }
    }
}

/// y\[c\] = Σ x\[r, c\] for x (R,C), in order of r, on one thread.
pub fn sum_rows(x: &[f32], y: &mut [f32]) {
    y.fill(0.0);
    if !y.is_empty() {
        Isa::best().run(SumRows { x, y });
    }
}

struct Softmax<'a> {
    x: &'a mut [f32],
    scale: f32,
}

impl Kernel for Softmax<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (x, scale) = (self.x, self.scale);
        let max = x.iter().fold(f32::NEG_INFINITY, |m, v| m.max(v * scale));
        let whole = x.len() / S::LANES * S::LANES;
        let mut sums = s.splat(0.0);
        let exp = |v: S::F| exp_nonpositive(s, s.fma(v, s.splat(scale), s.splat(-max)));
        for i in (0..whole).step_by(S::LANES) {
            let e = exp(s.load(&x[i..]));
            s.store(&mut x[i..], e);
            sums = s.add(sums, e);
        }
        let mut sum = s.reduce(sums, |a, b| a + b);
        if whole < x.len() {
            let mut pad = [0.0; 16];
            pad[..x.len() - whole].copy_from_slice(&x[whole..]);
            let e = s.to_array(exp(s.load(&pad)));
            for (x, e) in x[whole..].iter_mut().zip(e) {
                *x = e;
                sum += e;
            }
        }
        let inverse = 1.0 / sum;
        x.iter_mut().for_each(|v| *v *= inverse);
    }
}

/// x = softmax(scale · x) of one row, scale > 0; a row with a NaN is NaN.
pub fn softmax(x: &mut [f32], scale: f32) {
    Isa::best().run(Softmax { x, scale });
}
