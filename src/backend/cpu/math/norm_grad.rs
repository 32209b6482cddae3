//! Gradients of the norms, vectorised along channels.

use super::super::simd::{Isa, Kernel, Simd};
use super::slope::slope;
use super::{Act, mean_var};

/// What normalises one image, by channel.
#[derive(Clone, Copy)]
pub struct Channels<'a> {
    /// The mean as a sum of two floats.
    pub mean: [&'a [f32]; 2],
    /// Reciprocal deviation.
    pub rstd: &'a [f32],
    /// Scale.
    pub w: &'a [f32],
    /// Shift.
    pub bias: &'a [f32],
    /// What follows.
    pub act: Act,
}

/// The lanes from `x` on: all, or those that are left, then zeros.
#[inline(always)]
fn part<S: Simd>(s: S, x: &[f32]) -> S::F {
    if x.len() >= S::LANES {
        return s.load(x);
    }
    let mut pad = [0.0; 16];
    pad[..x.len()].copy_from_slice(x);
    s.load(&pad)
}

#[inline(always)]
fn put<S: Simd>(s: S, y: &mut [f32], v: S::F) {
    if y.len() >= S::LANES {
        return s.store(y, v);
    }
    let a = s.to_array(v);
    let n = y.len();
    y.copy_from_slice(&a[..n]);
}

impl Channels<'_> {
    /// The normalised value n, and dz = dy · act′(n · w + bias), of the lanes from channel `c` on.
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, c: usize, x: &[f32], dy: &[f32]) -> (S::F, S::F) {
        let centred = s.sub(s.sub(part(s, x), part(s, &self.mean[0][c..])), part(s, &self.mean[1][c..]));
        let n = s.mul(centred, part(s, &self.rstd[c..]));
        let dy = part(s, dy);
        if self.act == Act::None {
            return (n, dy);
        }
        let z = s.fma(n, part(s, &self.w[c..]), part(s, &self.bias[c..]));
        (n, s.mul(dy, slope(s, self.act, z)))
    }
}

struct Sums<'a> {
    p: Channels<'a>,
    x: &'a [f32],
    dy: &'a [f32],
    dw: &'a mut [f32],
    dbias: &'a mut [f32],
}

impl Kernel for Sums<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let c = self.p.w.len();
        for (x, dy) in self.x.chunks_exact(c).zip(self.dy.chunks_exact(c)) {
            for i in (0..c).step_by(S::LANES) {
                let end = c.min(i + S::LANES);
                let (n, dz) = self.p.at(s, i, &x[i..end], &dy[i..end]);
                let dw = s.fma(dz, n, part(s, &self.dw[i..end]));
                put(s, &mut self.dw[i..end], dw);
                let dbias = s.add(part(s, &self.dbias[i..end]), dz);
                put(s, &mut self.dbias[i..end], dbias);
            }
        }
    }
}

/// dw\[c\] += Σ dz · n and dbias\[c\] += Σ dz over some pixels x, dy (P,C) of one image; one thread.
pub fn norm_grad_sums(p: Channels, x: &[f32], dy: &[f32], dw: &mut [f32], dbias: &mut [f32]) {
    Isa::best().run(Sums { p, x, dy, dw, dbias });
}

struct Apply<'a> {
    p: Channels<'a>,
    x: &'a [f32],
    dy: &'a [f32],
    means: [&'a [f32]; 2],
    dx: &'a mut [f32],
}

impl Kernel for Apply<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let c = self.p.w.len();
        let rows = self.x.chunks_exact(c).zip(self.dy.chunks_exact(c));
        for ((x, dy), dx) in rows.zip(self.dx.chunks_exact_mut(c)) {
            for i in (0..c).step_by(S::LANES) {
                let end = c.min(i + S::LANES);
                let (n, dz) = self.p.at(s, i, &x[i..end], &dy[i..end]);
                let g = s.sub(s.mul(dz, part(s, &self.p.w[i..])), part(s, &self.means[0][i..]));
                let gn = s.sub(s.splat(0.0), part(s, &self.means[1][i..]));
                let d = s.mul(part(s, &self.p.rstd[i..]), s.fma(n, gn, g));
                put(s, &mut dx[i..end], d);
            }
        }
    }
}

/// dx = rstd · (dz · w − means\[0\] − n · means\[1\]) of some pixels (P,C) of one image; the means are those of dz · w and of
/// dz · w · n over each channel's group. One thread.
pub fn norm_grad_apply(p: Channels, x: &[f32], dy: &[f32], means: [&[f32]; 2], dx: &mut [f32]) {
    Isa::best().run(Apply { p, x, dy, means, dx });
}

/// Mean as a sum of two floats, and reciprocal deviation.
fn row_stats(x: &[f32], eps: f32) -> [f32; 3] {
    let [mean, var] = mean_var(x);
    [mean as f32, (mean - mean as f32 as f64) as f32, (1.0 / (var + eps as f64).sqrt()) as f32]
}

struct Row<'a> {
    stats: [f32; 3],
    x: &'a [f32],
    w: &'a [f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let ([high, low, rstd], c) = (self.stats, self.x.len());
        let (mut g, mut gn) = ([0.0f32; 16], [0.0f32; 16]);
        for i in (0..c).step_by(16) {
            let end = c.min(i + 16);
            let lanes = self.x[i..end].iter().zip(&self.w[i..end]).zip(&self.dy[i..end]);
            for (k, ((x, w), dy)) in lanes.enumerate() {
                let d = dy * w;
                g[k] += d;
                gn[k] += d * (((x - high) - low) * rstd);
            }
        }
        let (g, gn) = (g.iter().sum::<f32>() / c as f32, gn.iter().sum::<f32>() / c as f32);
        let inputs = self.x.iter().zip(self.w).zip(self.dy);
        for (dx, ((x, w), dy)) in self.dx.iter_mut().zip(inputs) {
            *dx = rstd * (dy * w - g - (((x - high) - low) * rstd) * gn);
        }
    }
}

/// dx of layer normalisation for one row (C).
pub fn layer_norm_grad(x: &[f32], w: &[f32], dy: &[f32], eps: f32, dx: &mut [f32]) {
    let stats = row_stats(x, eps);
    Isa::best().run(Row { stats, x, w, dy, dx });
}

struct RowSums<'a> {
    stats: [f32; 3],
    x: &'a [f32],
    dy: &'a [f32],
    dw: &'a mut [f32],
    dbias: &'a mut [f32],
}

impl Kernel for RowSums<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let [high, low, rstd] = self.stats;
        let outputs = self.dw.iter_mut().zip(self.dbias);
        for ((dw, dbias), (x, dy)) in outputs.zip(self.x.iter().zip(self.dy)) {
            *dw += dy * (((x - high) - low) * rstd);
            *dbias += dy;
        }
    }
}

/// dw += dy · n and dbias += dy of layer normalisation for one row (C).
pub fn layer_norm_grad_sums(x: &[f32], dy: &[f32], eps: f32, dw: &mut [f32], dbias: &mut [f32]) {
    let stats = row_stats(x, eps);
    Isa::best().run(RowSums { stats, x, dy, dw, dbias });
}
