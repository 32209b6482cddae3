//! y = act((x − mean) · rstd · w + bias), mean and variance over the pixels and channels of a group.
//!
//! PyTorch: `F.silu(F.group_norm(x, groups, w, b, eps))`. Kernel: `kernels/group_norm.cu`.
use super::activation::{Act, code};
use super::prelude::*;
use crate::kernels::group_norm as k;

/// Group normalisation of x (B,…,C) with w, bias (C), and an activation after it.
#[derive(Clone, PartialEq, Debug)]
pub struct GroupNorm {
    /// Number of groups; divides C.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Applied to the result.
    pub act: Act,
}

/// Statistics of a group in f64: mean, mean of absolute values, reciprocal deviation.
#[derive(Clone, Copy)]
struct Stats {
    mean: f64,
    size: f64,
    rstd: f64,
}

/// Statistics of group `g` of image `b`.
fn moments(x: &Array, groups: usize, eps: f64, b: usize, g: usize) -> Stats {
    let c = x.shape.last();
    let per_image = x.data.len() / x.shape[0].max(1);
    let image = &x.data[b * per_image..][..per_image];
    let cpg = c / groups;
    let members = || image.chunks(c).flat_map(|pixel| &pixel[g * cpg..][..cpg]);
    let n = (per_image / c * cpg) as f64;
    let mean = members().sum::<f64>() / n;
    let var = members().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    let size = members().map(|v| v.abs()).sum::<f64>() / n;
    Stats { mean, size, rstd: 1.0 / (var + eps).sqrt() }
}

impl GroupNorm {
    /// Each element through `f(x, statistics, w, b)`.
    fn each(&self, x: &[Array], f: impl Fn(f64, Stats, f64, f64) -> f64) -> Vec<Array> {
        let (c, batch) = (x[0].shape.last(), x[0].shape[0]);
        let per_image = x[0].data.len() / batch.max(1);
        let mut y = x[0].clone();
        for b in 0..batch {
            let stats: Vec<_> =
                (0..self.groups).map(|g| moments(&x[0], self.groups, self.eps as f64, b, g)).collect();
            for (i, v) in y.data[b * per_image..][..per_image].iter_mut().enumerate() {
                *v = f(*v, stats[i % c / (c / self.groups)], x[1].data[i % c], x[2].data[i % c]);
            }
        }
        vec![y]
    }
}

impl GroupNorm {
    /// Pixels of one image, whose groups have these means and variances.
    fn normalise(&self, x: &[f32], stats: &[[f64; 2]], cpg: usize, (w, bias): (&[f32], &[f32]), y: &mut [f32]) {
        let c = w.len();
        // a·x + b cancels where |mean| ≫ deviation; the pivot keeps the digits.
        if stats.iter().any(|[mean, var]| mean * mean > 1e4 * var) {
            for (i, (y, &x)) in y.iter_mut().zip(x).enumerate() {
                let [mean, var] = stats[i % c / cpg];
                let (high, a) = (mean as f32, w[i % c] as f64 / (var + self.eps as f64).sqrt());
                *y = ((x - high) - (mean - high as f64) as f32) * a as f32 + bias[i % c];
            }
            return cpu::math::activate_in_place(self.act, y);
        }
        cpu::with_scratch(2 * c, |factors| {
            let (scale, shift) = factors.split_at_mut(c);
            for i in 0..c {
                let [mean, var] = stats[i / cpg];
                let a = w[i] as f64 / (var + self.eps as f64).sqrt();
                (scale[i], shift[i]) = (a as f32, (bias[i] as f64 - mean * a) as f32);
            }
            cpu::math::scale_shift_act(x, scale, shift, self.act, y);
        });
    }
}

impl Operation for GroupNorm {
    const NAME: &'static str = "group_norm";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = format!("x (B,…,C), w (C), bias (C) of one float type, C % {} == 0", self.groups);
        let [x0, w, b] = args(Self::NAME, &want, x)?;
        let c = x0.shape.last();
        let fits = x0.shape.len() >= 2 && self.groups > 0 && c % self.groups == 0 && *w.shape == [c] && w == b;
        ensure!(fits && w.dtype == x0.dtype && DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        Ok(vec![x0])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |v, s, w, b| self.act.apply_f64((v - s.mean) * s.rstd * w + b))
    }

    /// What is summed: x, and the group's values into its mean, both amplified by rstd.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |v, s, w, b| (v.abs() + s.size) * s.rstd * w.abs() + b.abs())
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, w, bias) = (io.slice(0), io.slice(1), io.slice(2));
        let (c, batch, groups) = (io.x[0].shape.last(), io.x[0].shape[0], self.groups);
        let (pixels, cpg) = (x.len() / batch.max(1) / c, c / groups);
        w.with_all(|w| {
            bias.with_all(|bias| {
                cpu::math::group_stats(x, batch, c, groups, |stats| {
                    io.rows(0, c, |first, y| {
                        // The rows of each image that these are.
                        let (mut p, mut rest) = (first, y);
                        while !rest.is_empty() {
                            let count = (pixels - p % pixels).min(rest.len() / c);
                            let (y, tail) = rest.split_at_mut(count * c);
                            let stats = &stats[p / pixels * groups..][..groups];
                            x.with(p * c..p * c + y.len(), |x| self.normalise(x, stats, cpg, (w, bias), y));
                            (p, rest) = (p + count, tail);
                        }
                    });
                });
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let s = io.x_spec(0).shape;
        let (b, c) = (s[0], s.last());
        let p = k::GroupNormFwd {
            y: io.y(0),
            x: io.x(0),
            w: io.x(1),
            bias: io.x(2),
            hw: io.int(s.rows() / b.max(1) * (c / self.groups)).and(io.int(s.rows() / b.max(1)))?,
            c: io.int(c)?,
            groups: io.int(self.groups)?,
            eps: self.eps,
            act: code(self.act),
        };
        io.launch(k::GROUP_NORM_FWD, io.x_spec(0).dtype, "", [self.groups, b, 1], k::BLOCK, p)
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last()) + cpu::math::stats_bytes(y[0].shape.rows(), y[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(10 * y[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let norm = |groups, eps, act, x: &[usize]| {
            let c = x[x.len() - 1];
            let weight = t([c]).normal(1.0, 0.2);
            Case::new(GroupNorm { groups, eps, act }, [t(x), weight, t([c])])
        };
        let mut far = norm(4, 1e-5, Act::None, &[2, 9, 7, 32]);
        far.args[0] = t([2, 9, 7, 32]).normal(100.0, 0.01);
        let far = far.only(&[DType::F32]).loose(
            8.0,
            "the norm bound assumes |y| near |x|; here the input's own rounding is 1e-3 of its deviation",
        );
        let mut small = vec![
            norm(1, 1e-5, Act::None, &[1, 1, 1, 4]),
            norm(2, 1e-5, Act::None, &[2, 3, 3, 4]),
            norm(32, 1e-5, Act::Silu, &[2, 8, 8, 32]),
            norm(32, 1e-6, Act::Silu, &[3, 5, 7, 96]),
            norm(32, 1e-6, Act::None, &[1, 16, 16, 64]),
            norm(16, 1e-5, Act::Silu, &[2, 6, 5, 80]),
            norm(3, 1e-5, Act::None, &[1, 40, 9]),
            norm(32, 1e-5, Act::Silu, &[1, 33, 31, 160]),
            far,
        ];
        // UNets of SD 1.5, SDXL and LDM 1.45B; KL-f8 at 512×512 and VQ-f4 at 256×256, without a batch. Before attention
        // there is no activation: one of those in each size stands for them.
        let real: [(usize, usize, &[usize]); 10] = [
            (2, 128, &[320, 640, 960]),
            (2, 64, &[320, 640, 960, 1280, 1920]),
            (2, 32, &[320, 640, 960, 1280, 1920, 2560]),
            (2, 16, &[320, 640, 960, 1280, 1920, 2560]),
            (2, 8, &[640, 1280, 1920, 2560]),
            (2, 4, &[1280, 2560]),
            (1, 64, &[512]),
            (1, 128, &[256, 512]),
            (1, 256, &[128, 256, 512]),
            (1, 512, &[128, 256]),
        ];
        for (b, side, channels) in real {
            let eps = if b == 1 { 1e-6 } else { 1e-5 };
            let case = |act, c| norm(32, eps, act, &[b, side, side, c]).weights(1..3).bench();
            small.extend(channels.iter().map(|&c| case(Act::Silu, c)));
        }
        for (b, side, c) in [(2, 64, 320), (2, 32, 640), (2, 16, 1280), (2, 8, 1280), (1, 64, 512)] {
            small.push(norm(32, 1e-6, Act::None, &[b, side, side, c]).weights(1..3).bench());
        }
        small
    }

    fn random(r: &mut Small) -> Case {
        let groups = [1, 2, 3, 8, 32][r.below(5)];
        let c = groups * (r.below(6) + 1);
        let x = [r.below(3) + 1, r.below(12) + 2, r.below(12) + 2, c];
        let act = [Act::None, Act::Silu][r.below(2)];
        Case::new(GroupNorm { groups, eps: 1e-5, act }, [t(x).normal(0.3, 2.0), t([c]).normal(1.0, 0.2), t([c])])
    }
}
