//! Elementwise functions, row statistics and type conversions over slices, vectorised.
//!
//! Functions are polynomials of our own (weighted minimax fits), within 2 ulp for exp and 1e-7 absolute for erf.
//! Statistics sum in f64, in an order that depends on the shape alone.

mod adam;
mod norm_grad;
mod slope;

pub use adam::{AdamStep, square_sum};
pub use norm_grad::{Channels, layer_norm_grad, layer_norm_grad_sums, norm_grad_apply, norm_grad_sums};
pub use slope::{softmax, sum_rows, times_slope};

use super::scratch::scratch;
use super::simd::{Isa, Kernel, Simd};
use super::slice::Slice;
use bytemuck::cast_slice_mut;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

/// An activation function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Act {
    /// x
    #[default]
    None,
    /// x / (1 + e^-x)
    Silu,
    /// x · (1 + erf(x / √2)) / 2
    Gelu,
    /// x / (1 + e^(-1.702 x)): the text encoders of CLIP
    QuickGelu,
    /// x · (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2
    GeluTanh,
    /// max(x, 0)
    Relu,
    /// x where it is positive, else x / 5: the discriminators
    LeakyRelu,
}

/// 2 √(2/π): tanh(u) = 2 / (1 + e^-2u) - 1 turns the tanh form into one exponential.
const TANH_SCALE: f64 = 1.595_769_121_605_730_7;

/// What [`Act::LeakyRelu`] leaves of a negative number.
const LEAK: f64 = 0.2;

/// ln of the smallest normal number, rounded towards zero: below it [`exp_nonpositive`] gives 0.
const LN_MIN: f32 = -87.336_54;

/// n and p with e^x = 2^n · p, for x within ±104. Two-step reduction by ln 2, then 1 + r + r² P(r) on |r| <= ln 2 / 2.
#[inline(always)]
fn exp_parts<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, the first with 9 bits, so that n · LN2_HI is exact.
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let r = s.fma(n, s.splat(-LN2_HI), x);
    let r = s.fma(n, s.splat(-LN2_LO), r);
    let mut p = s.splat(1.395_048_8e-3);
    for c in [8.368_888e-3, 4.166_620_6e-2, 1.666_651_8e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.fma(s.mul(p, r), r, r);
    (n, s.add(p, s.splat(1.0)))
}

/// e^x: infinity above 88.72, subnormal results kept, NaN kept.
#[inline(always)]
pub fn exp_vector<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.max(s.splat(-104.0), s.min(s.splat(89.0), x));
    let (n, p) = exp_parts(s, x);
    // 2^n in two factors: each is a normal number even where the result overflows or is subnormal.
    let half = s.round(s.mul(n, s.splat(0.5)));
    s.mul(s.mul(p, s.pow2(half)), s.pow2(s.sub(n, half)))
}

/// e^x for x <= 0, as softmax needs it: 0 where the result would be subnormal; NaN kept.
#[inline(always)]
pub fn exp_nonpositive<S: Simd>(s: S, x: S::F) -> S::F {
    let (n, p) = exp_parts(s, s.max(s.splat(LN_MIN), x));
    s.select_lt(x, s.splat(LN_MIN), s.splat(0.0), s.mul(p, s.pow2(n)))
}

/// 2^x for x <= 0, as softmax needs it: below -126 something at most 2^-126; NaN kept. Within 2 ulp.
#[inline(always)]
pub fn exp2_nonpositive<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.max(s.splat(-126.0), x);
    let n = s.round(x);
    let r = s.sub(x, n);
    let mut p = s.splat(EXP2[0]);
    for c in &EXP2[1..] {
        p = s.fma(p, r, s.splat(*c));
    }
    s.scale2(p, n)
}

/// 2^r on |r| <= 1/2, highest power first: a minimax fit of the relative error, 9e-8.
#[expect(clippy::approx_constant, reason = "a fitted coefficient, near ln 2 but not it")]
const EXP2: [f32; 6] = [1.326_472_7e-3, 9.671_513e-3, 5.550_733_6e-2, 2.402_224_2e-1, 6.931_47e-1, 1.0];

/// 1 + erf(x), without cancellation for x < -1.
#[inline(always)]
fn one_plus_erf<S: Simd>(s: S, x: S::F) -> S::F {
    let t = s.max(x, s.sub(s.splat(0.0), x));
    // |x| < 1: erf(x) = x + x P(x²).
    let square = s.mul(x, x);
    let mut p = s.splat(7.889_122e-5);
    for c in [-8.020_842e-4, 5.189_535e-3, -2.685_444_4e-2, 1.128_36e-1, -3.761_262_6e-1, 1.283_791_7e-1] {
        p = s.fma(p, square, s.splat(c));
    }
    let small = s.add(s.fma(p, x, x), s.splat(1.0));
    // |x| >= 1: erfc(|x|) = e^Q(|x|), and 0 beyond 4, where it is below half an ulp of 1.
    let limited = s.min(s.splat(4.0), t);
    let mut q = s.splat(1.855_742_2e-4);
    for c in [-2.939_609_3e-3, 2.180_532_6e-2, -1.030_373_9e-1, -6.382_257e-1, -1.127_04, -3.537_17e-4] {
        q = s.fma(q, limited, s.splat(c));
    }
    let tail = s.select_lt(t, s.splat(4.0), exp_nonpositive(s, q), s.splat(0.0));
    let large = s.select_lt(x, s.splat(0.0), tail, s.sub(s.splat(2.0), tail));
    // Unordered compares as false, so that NaN takes `small`, which is NaN.
    s.select_lt(s.splat(0.999_999_94), t, large, small)
}

/// x / (1 + e^-z)
#[inline(always)]
fn gate<S: Simd>(s: S, x: S::F, minus_z: S::F) -> S::F {
    s.div(x, s.add(s.splat(1.0), exp_vector(s, minus_z)))
}

/// An activation as a type, so that a loop over a slice holds one formula and no branch.
trait Formula: Copy {
    fn eval<S: Simd>(self, s: S, x: S::F) -> S::F;
}

macro_rules! formulas {
    ($($(#[$doc:meta])* $name:ident($s:ident, $x:ident) $body:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy)]
        struct $name;
        impl Formula for $name {
            #[inline(always)]
            fn eval<S: Simd>(self, $s: S, $x: S::F) -> S::F {
                $body
            }
        }
    )*};
}

formulas! {
    Identity(_s, x) x;
    Exp(s, x) exp_vector(s, x);
    Silu(s, x) gate(s, x, s.sub(s.splat(0.0), x));
    QuickGelu(s, x) gate(s, x, s.mul(x, s.splat(-1.702)));
    Gelu(s, x) {
        let e = one_plus_erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
        s.mul(s.mul(x, s.splat(0.5)), e)
    };
    GeluTanh(s, x) {
        let cubic = s.fma(s.mul(x, x), s.splat((-TANH_SCALE * 0.044715) as f32), s.splat(-TANH_SCALE as f32));
        gate(s, x, s.mul(x, cubic))
    };
    Relu(s, x) s.max(s.splat(0.0), x);
    LeakyRelu(s, x) s.max(s.mul(x, s.splat(LEAK as f32)), x);
}

/// Calls `$body` with `$f` bound to the formula of an activation.
macro_rules! with_formula {
    ($act:expr, $f:ident => $body:expr) => {
        match $act {
            Act::None => {
                let $f = Identity;
                $body
            }
            Act::Silu => {
                let $f = Silu;
                $body
            }
            Act::Gelu => {
                let $f = Gelu;
                $body
            }
            Act::QuickGelu => {
                let $f = QuickGelu;
                $body
            }
            Act::GeluTanh => {
                let $f = GeluTanh;
                $body
            }
            Act::Relu => {
                let $f = Relu;
                $body
            }
            Act::LeakyRelu => {
                let $f = LeakyRelu;
                $body
            }
        }
    };
}

impl Act {
    /// The activation in f64: the specification.
    pub fn apply_f64(self, x: f64) -> f64 {
        match self {
            Act::None => x,
            Act::Silu => x / (1.0 + (-x).exp()),
            Act::Gelu => 0.5 * x * erfc_f64(-x * std::f64::consts::FRAC_1_SQRT_2),
            Act::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
            Act::GeluTanh => x / (1.0 + (-TANH_SCALE * (x + 0.044715 * x * x * x)).exp()),
            Act::Relu if x < 0.0 => 0.0,
            Act::LeakyRelu if x < 0.0 => LEAK * x,
            Act::Relu | Act::LeakyRelu => x,
        }
    }
}

/// erfc in f64: the series of erf up to 3, the continued fraction of erfc beyond; 1e-14.
pub fn erfc_f64(x: f64) -> f64 {
    let t = x.abs();
    let upper = if t < 3.0 {
        let (mut term, mut sum, mut n) = (t, t, 0.0);
        while term.abs() > 1e-18 * sum.abs() && n < 200.0 {
            n += 1.0;
            term *= 2.0 * t * t / (2.0 * n + 1.0);
            sum += term;
        }
        1.0 - 2.0 / std::f64::consts::PI.sqrt() * (-t * t).exp() * sum
    } else {
        let fraction = (1..=80).rev().fold(t, |f, n| t + 0.5 * n as f64 / f);
        (-t * t).exp() / (std::f64::consts::PI.sqrt() * fraction)
    };
    if x < 0.0 { 2.0 - upper } else { upper }
}

/// y = f(x), the tail through a padded vector.
struct Map<'a, F> {
    x: Option<&'a [f32]>,
    y: &'a mut [f32],
    f: F,
}

impl<F: Formula> Kernel for Map<'_, F> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let whole = self.y.len() / S::LANES * S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            let v = s.load(self.x.map_or(&self.y[i..], |x| &x[i..]));
            s.store(&mut self.y[i..], self.f.eval(s, v));
        }
        let rest = self.y.len() - whole;
        if rest > 0 {
            let mut pad = [0.0; 16];
            pad[..rest].copy_from_slice(self.x.map_or(&self.y[whole..], |x| &x[whole..]));
            let v = self.f.eval(s, s.load(&pad));
            self.y[whole..].copy_from_slice(&s.to_array(v)[..rest]);
        }
    }
}

/// y = e^x, within 2 ulp.
pub fn exp(x: &[f32], y: &mut [f32]) {
    exp_with(Isa::best(), x, y);
}

/// [`exp`] on a given instruction set.
pub fn exp_with(isa: Isa, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "exp: lengths of x and y");
    isa.run(Map { x: Some(x), y, f: Exp });
}

/// y = act(x)
pub fn activate(act: Act, x: &[f32], y: &mut [f32]) {
    activate_with(Isa::best(), act, x, y);
}

/// [`activate`] on a given instruction set.
pub fn activate_with(isa: Isa, act: Act, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "activate: lengths of x and y");
    with_formula!(act, f => isa.run(Map { x: Some(x), y, f }));
}

/// x = act(x)
pub fn activate_in_place(act: Act, x: &mut [f32]) {
    activate_in_place_with(Isa::best(), act, x);
}

/// [`activate_in_place`] on a given instruction set.
pub fn activate_in_place_with(isa: Isa, act: Act, x: &mut [f32]) {
    if act != Act::None {
        with_formula!(act, f => isa.run(Map { x: None, y: x, f }));
    }
}

struct ScaleShift<'a, F> {
    x: &'a [f32],
    a: &'a [f32],
    b: &'a [f32],
    y: &'a mut [f32],
    f: F,
}

impl<F: Formula> Kernel for ScaleShift<'_, F> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let c = self.a.len();
        let whole = c / S::LANES * S::LANES;
        for (x, y) in self.x.chunks_exact(c).zip(self.y.chunks_exact_mut(c)) {
            for i in (0..whole).step_by(S::LANES) {
                let v = s.fma(s.load(&x[i..]), s.load(&self.a[i..]), s.load(&self.b[i..]));
                s.store(&mut y[i..], self.f.eval(s, v));
            }
            if whole < c {
                let mut pad = [[0.0; 16]; 3];
                for (pad, source) in pad.iter_mut().zip([x, self.a, self.b]) {
                    pad[..c - whole].copy_from_slice(&source[whole..]);
                }
                let v = s.fma(s.load(&pad[0]), s.load(&pad[1]), s.load(&pad[2]));
                y[whole..].copy_from_slice(&s.to_array(self.f.eval(s, v))[..c - whole]);
            }
        }
    }
}

/// y\[p, c\] = act(x\[p, c\] · a\[c\] + b\[c\]) for x (P, C): the second half of a group norm. One thread.
pub fn scale_shift_act(x: &[f32], a: &[f32], b: &[f32], act: Act, y: &mut [f32]) {
    scale_shift_act_with(Isa::best(), x, a, b, act, y);
}

/// [`scale_shift_act`] on a given instruction set.
pub fn scale_shift_act_with(isa: Isa, x: &[f32], a: &[f32], b: &[f32], act: Act, y: &mut [f32]) {
    assert!(
        !a.is_empty() && a.len() == b.len(),
        "scale_shift_act: a has {}, b {} channels",
        a.len(),
        b.len()
    );
    assert!(
        x.len() == y.len() && x.len().is_multiple_of(a.len()),
        "scale_shift_act: x {}, y {}",
        x.len(),
        y.len()
    );
    with_formula!(act, f => isa.run(ScaleShift { x, a, b, y, f }));
}

/// Sums of x and x² in f64, 16 interleaved partial sums: products of two f32 are exact in f64, so that one pass is
/// as good as two until the mean is a million times the deviation, where f32 inputs themselves say nothing.
struct Moments<'a>(&'a [f32]);

impl Kernel for Moments<'_> {
    type Out = (f64, f64);
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (f64, f64) {
        let (mut s1, mut s2) = ([0.0f64; 16], [0.0f64; 16]);
        let chunks = self.0.chunks_exact(16);
        for (i, x) in chunks.remainder().iter().enumerate() {
            (s1[i], s2[i]) = (*x as f64, *x as f64 * *x as f64);
        }
        for x in chunks {
            for i in 0..16 {
                let x = x[i] as f64;
                s1[i] += x;
                s2[i] += x * x;
            }
        }
        (s1.iter().sum(), s2.iter().sum())
    }
}

fn mean_and_variance(s1: f64, s2: f64, n: f64) -> [f64; 2] {
    let mean = s1 / n;
    let var = s2 / n - mean * mean;
    // Rounding may leave a tiny negative number; NaN stays.
    [mean, if var < 0.0 { 0.0 } else { var }]
}

/// Mean and biased variance of one row, in f64.
pub fn mean_var(x: &[f32]) -> [f64; 2] {
    mean_var_with(Isa::best(), x)
}

/// [`mean_var`] on a given instruction set; the bits are the same on all.
pub fn mean_var_with(isa: Isa, x: &[f32]) -> [f64; 2] {
    assert!(!x.is_empty(), "mean_var: empty row");
    let (s1, s2) = isa.run(Moments(x));
    mean_and_variance(s1, s2, x.len() as f64)
}

/// Per-channel sums of x and x² over pixels, added to `sums` (2, C).
struct ChannelMoments<'a> {
    x: &'a [f32],
    sums: &'a mut [f64],
}

impl Kernel for ChannelMoments<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let c = self.sums.len() / 2;
        let (s1, s2) = self.sums.split_at_mut(c);
        for x in self.x.chunks_exact(c) {
            for i in 0..c {
                let x = x[i] as f64;
                s1[i] += x;
                s2[i] += x * x;
            }
        }
    }
}

/// Elements whose moments one task adds up.
const CHUNK: usize = 1 << 15;

/// Mean and biased variance of each group of C / G adjacent channels over all pixels of each image: x (B, HW, C), and
/// \[mean, variance\] per image and group (B, G) for `f`. In parallel over fixed chunks of pixels, whose sums are added
/// in order.
pub fn group_stats<R>(
    x: Slice,
    images: usize,
    c: usize,
    groups: usize,
    f: impl FnOnce(&[[f64; 2]]) -> R,
) -> R {
    group_stats_with(Isa::best(), x, images, c, groups, f)
}

/// [`group_stats`] on a given instruction set; the bits are the same on all.
pub fn group_stats_with<R>(
    isa: Isa,
    x: Slice,
    images: usize,
    c: usize,
    groups: usize,
    f: impl FnOnce(&[[f64; 2]]) -> R,
) -> R {
    assert!(
        groups > 0 && c.is_multiple_of(groups),
        "group_stats: {c} channels do not divide into {groups} groups"
    );
    assert!(
        images > 0 && !x.is_empty() && x.len().is_multiple_of(images * c),
        "group_stats: {} elements are no whole pixels of {c} channels in {images} images",
        x.len()
    );
    let (pixels, width) = (x.len() / images / c, c / groups);
    let rows = (CHUNK / c).max(1);
    let chunks = pixels.div_ceil(rows);
    // Words of f64: per chunk the sums of its channels, and per group the result.
    let (sums, results) = (images * chunks * 2 * c * 2, images * groups * 2 * 2);
    scratch(sums + results, |buffer| {
        let (sums, stats) = buffer.split_at_mut(sums);
        let (sums, stats): (&mut [f64], &mut [[f64; 2]]) = (cast_slice_mut(sums), cast_slice_mut(stats));
        sums.par_chunks_exact_mut(2 * c).enumerate().for_each(|(i, sums)| {
            let (image, first) = (i / chunks, i % chunks * rows);
            let start = (image * pixels + first) * c;
            sums.fill(0.0);
            let range = start..start + rows.min(pixels - first) * c;
            x.with(range, |x| isa.run(ChannelMoments { x, sums }));
        });
        for (i, stat) in stats.iter_mut().enumerate() {
            let (image, g) = (i / groups, i % groups);
            let sums = &sums[image * chunks * 2 * c..][..chunks * 2 * c];
            let sum = |offset: usize| -> f64 {
                let range = offset + g * width..offset + (g + 1) * width;
                sums.chunks_exact(2 * c).map(|sums| sums[range.clone()].iter().sum::<f64>()).sum()
            };
            *stat = mean_and_variance(sum(0), sum(c), (pixels * width) as f64);
        }
        f(stats)
    })
}

/// Bytes of working memory that [`group_stats`] takes for that many pixels, about.
pub fn stats_bytes(pixels: usize, c: usize) -> usize {
    pixels.div_ceil((CHUNK / c.max(1)).max(1)) * 2 * c * size_of::<f64>()
}

/// y = (x - mean) / √(variance + eps) · w + bias of one row x (C).
pub fn layer_norm(x: &[f32], w: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
    let [mean, var] = mean_var(x);
    let rstd = (1.0 / (var + eps as f64).sqrt()) as f32;
    let (high, low) = (mean as f32, (mean - mean as f32 as f64) as f32);
    Isa::best().run(Normalise { x, w, bias, factors: [high, low, rstd], y });
}

/// y = ((x - high) - low) · rstd · w + bias
struct Normalise<'a> {
    x: &'a [f32],
    w: &'a [f32],
    bias: &'a [f32],
    factors: [f32; 3],
    y: &'a mut [f32],
}

impl Kernel for Normalise<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let [high, low, rstd] = self.factors;
        for (((y, x), w), b) in self.y.iter_mut().zip(self.x).zip(self.w).zip(self.bias) {
            *y = ((x - high) - low) * rstd * w + b;
        }
    }
}

/// Widens f16. Panics if lengths differ.
pub fn f16_to_f32(x: &[f16], y: &mut [f32]) {
    x.convert_to_f32_slice(y);
}

/// Rounds to f16, nearest even. Panics if lengths differ.
pub fn f32_to_f16(x: &[f32], y: &mut [f16]) {
    y.convert_from_f32_slice(x);
}

struct WidenBf16<'a>(&'a [bf16], &'a mut [f32]);

impl Kernel for WidenBf16<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (x, y) in self.0.iter().zip(self.1) {
            *y = f32::from_bits((x.to_bits() as u32) << 16);
        }
    }
}

struct NarrowBf16<'a>(&'a [f32], &'a mut [bf16]);

impl Kernel for NarrowBf16<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (x, y) in self.0.iter().zip(self.1) {
            let bits = x.to_bits();
            // Half an ulp, less one where the kept part is even; the carry goes into the exponent as it should.
            let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
            let quiet = (bits >> 16) | 0x40;
            *y = bf16::from_bits(if bits & 0x7FFF_FFFF > 0x7F80_0000 { quiet } else { rounded } as u16);
        }
    }
}

/// Widens bf16. Panics if lengths differ.
pub fn bf16_to_f32(x: &[bf16], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "bf16_to_f32: lengths of x and y");
    Isa::best().run(WidenBf16(x, y));
}

/// Rounds to bf16, nearest even; NaN stays NaN. Panics if lengths differ.
pub fn f32_to_bf16(x: &[f32], y: &mut [bf16]) {
    assert_eq!(x.len(), y.len(), "f32_to_bf16: lengths of x and y");
    Isa::best().run(NarrowBf16(x, y));
}

#[cfg(test)]
mod tests;
