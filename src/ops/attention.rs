//! y = softmax(scale · q kᵀ) v per head, without the score matrix in memory.
//!
//! Flash attention (Dao et al. 2022): blocks of keys pass by while maximum, sum and result are kept per query.
//! PyTorch: `F.scaled_dot_product_attention`. Kernels: on tensor cores `kernels/attention_flash.cu`, `kernels/attention_long.cu`
//! for many queries, `kernels/attention_wide.cu` for large heads and `kernels/attention_short.cu` for the few keys of a text;
//! `kernels/attention_f32.cu` by float units, `kernels/attention.cu` for all that those do not take.
mod choice;
mod grad;

pub use grad::AttentionGrad;

use super::array::dot;
use super::prelude::*;
use crate::kernels::attention as plain;
use crate::kernels::attention_f32 as floats;
use crate::kernels::attention_flash as flash;
use crate::kernels::attention_long as long;
use crate::kernels::attention_short as short;
use crate::kernels::attention_wide as wide;
use choice::{Choice, Kernel, choose};
use std::borrow::Cow;
use std::f64::consts::LOG2_E;

/// Attention of q (B,…,N·D) over k, v (B,…,N·D); the axes between are tokens. Result as q.
#[derive(Clone, PartialEq, Debug)]
pub struct Attention {
    /// Heads N; divides the width.
    pub heads: usize,
    /// Query i sees keys up to i + S − T.
    pub causal: bool,
    /// One input (B,…,3·N·D) holds q, k and v side by side: 16-bit types on tensor cores.
    pub joined: bool,
}

struct Sizes {
    b: usize,
    t: usize,
    s: usize,
    d: usize,
}

/// The shapes of q, k, v inside a joined input, or those that came.
fn separate(joined: bool, x: &[Spec]) -> Vec<Spec> {
    if !joined || x.len() != 1 || x[0].shape.is_empty() {
        return x.to_vec();
    }
    vec![Spec::new(x[0].dtype, x[0].shape.with_last(x[0].shape.last() / 3)); 3]
}

impl Attention {
    /// q, k and v by themselves.
    fn arrays<'a>(&self, x: &'a [Array]) -> Cow<'a, [Array]> {
        if !self.joined {
            return Cow::Borrowed(x);
        }
        let width = x[0].shape.last() / 3;
        let part = |i: usize| {
            x[0].data.chunks(3 * width).flat_map(|row| row[i * width..][..width].to_vec()).collect()
        };
        Cow::Owned((0..3).map(|i| Array { shape: x[0].shape.with_last(width), data: part(i) }).collect())
    }

    fn sizes(&self, q: Shape, keys: Shape) -> Sizes {
        let b = q[0];
        Sizes { b, t: q.rows() / b.max(1), s: keys.rows() / b.max(1), d: q.last() / self.heads }
    }

    /// The shape as the CPU's code takes it.
    fn on_cpu(&self, x: &[Spec]) -> cpu::attention::Attention {
        let Sizes { b, t, s, d } = self.sizes(x[0].shape, x[1].shape);
        let (heads, scale, causal) = (self.heads, self.scale(d) as f32, self.causal);
        cpu::attention::Attention { b, t, s, heads, d, scale, causal }
    }

    /// D^-1/2, the scale of the scores.
    fn scale(&self, d: usize) -> f64 {
        1.0 / (d as f64).sqrt()
    }

    /// Per query and head: `f(weights, query index, head)`, where weights are the softmax over keys.
    fn each(&self, x: &[Array], mut f: impl FnMut(&[f64], usize, usize, usize)) {
        let Sizes { b, t, s, d } = self.sizes(x[0].shape, x[1].shape);
        let width = self.heads * d;
        for (image, query, head) in
            (0..b).flat_map(|i| (0..t).flat_map(move |q| (0..self.heads).map(move |h| (i, q, h))))
        {
            let q = &x[0].data[(image * t + query) * width + head * d..][..d];
            let visible = if self.causal { (query + s + 1).saturating_sub(t).min(s) } else { s };
            let mut p: Vec<f64> = (0..visible)
                .map(|key| {
                    let k = &x[1].data[(image * s + key) * width + head * d..][..d];
                    dot(q, k) * self.scale(d)
                })
                .collect();
            let max = p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            p.iter_mut().for_each(|v| *v = (*v - max).exp());
            let sum: f64 = p.iter().sum();
            p.iter_mut().for_each(|v| *v /= sum);
            f(&p, image, query, head);
        }
    }

    /// What is summed into a score, at most.
    fn score_size(&self, x: &[Array]) -> f64 {
        let d = x[0].shape.last() / self.heads;
        let largest = |a: &Array| a.data.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let norm = |a: &Array| {
            a.data.chunks(d).map(|r| r.iter().map(|v| v * v).sum::<f64>()).fold(0.0, f64::max).sqrt()
        };
        (norm(&x[0]) * norm(&x[1])).min(largest(&x[0]) * largest(&x[1]) * d as f64) * self.scale(d)
    }

    fn weighted(&self, x: &[Array], f: impl Fn(f64) -> f64) -> Array {
        let Sizes { t, s, d, .. } = self.sizes(x[0].shape, x[1].shape);
        let width = self.heads * d;
        let mut y = Array::zeros(x[0].shape);
        self.each(x, |p, image, query, head| {
            for i in 0..d {
                let v = |key| x[2].data[(image * s + key) * width + head * d + i];
                y.data[(image * t + query) * width + head * d + i] =
                    p.iter().enumerate().map(|(key, p)| p * f(v(key))).sum();
            }
        });
        y
    }
}

impl Operation for Attention {
    const NAME: &'static str = "attention";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = format!(
            "q (B,…,N·D), k and v (B,…,N·D) of one float type, N = {}, D ≤ 1024{}",
            self.heads,
            if self.causal { ", no fewer keys than queries" } else { "" }
        );
        let thirds = !self.joined || x.len() == 1 && !x[0].shape.is_empty() && x[0].shape.last() % 3 == 0;
        ensure!(thirds, Self::NAME, want, x);
        let [q, keys, values] = args(Self::NAME, &want, &separate(self.joined, x))?;
        let width = q.shape.last();
        let fits = q.shape.len() >= 2
            && keys.shape.len() >= 2
            && keys == values
            && q.dtype == keys.dtype
            && DType::FLOATS.contains(&q.dtype)
            && width == keys.shape.last()
            && q.shape[0] == keys.shape[0]
            && self.heads > 0
            && width % self.heads == 0
            && width / self.heads <= 1024;
        ensure!(fits, Self::NAME, want, x);
        let Sizes { t, s, .. } = self.sizes(q.shape, keys.shape);
        ensure!(s > 0 && (!self.causal || s >= t), Self::NAME, want, x);
        let tensor_cores =
            || !matches!(choose(q.dtype, width / self.heads, [t, s], self.heads, true).kernel, Kernel::Plain);
        ensure!(!self.joined || tensor_cores(), Self::NAME, want, x);
        Ok(vec![q])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        vec![self.weighted(&self.arrays(x), |v| v)]
    }

    /// Σ p|v|, times what an error of the scores costs: their rounding moves p by a share of Σ|q||k|·scale.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let x = self.arrays(x);
        let x = &*x;
        let scores = self.score_size(x);
        vec![self.weighted(x, f64::abs).map(|v| v * (1.0 + scores))]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        if self.joined {
            super::conv2d::by_specification(io, |x| self.spec(x));
            return Ok(());
        }
        let Sizes { t, s, d, .. } = self.sizes(io.x[0].shape, io.x[1].shape);
        use cpu::attention::{Heads, attention};
        let (q, keys, values) = (io.slice(0), io.slice(1), io.slice(2));
        let width = self.heads * d;
        let shape = self.on_cpu(io.x);
        let (q, keys, values) =
            (Heads::new(q, t, width), Heads::new(keys, s, width), Heads::new(values, s, width));
        attention(&shape, q, keys, values, io.out(0));
        Ok(())
    }

    fn cpu_scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        cpu::attention::working_bytes(x[0].dtype, &self.on_cpu(&separate(self.joined, x)))
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = separate(self.joined, &io.x.iter().map(|x| x.spec).collect::<Vec<_>>());
        let Sizes { b, t, s, d } = self.sizes(x[0].shape, x[1].shape);
        let dtype = x[0].dtype;
        let Choice { kernel, variant, queries } = choose(dtype, d, [t, s], self.heads * b, self.causal);
        let grid = [t.div_ceil(queries), self.heads, b];
        let width = self.heads * d;
        let third = |i: usize| io.x(0).offset(i * width * dtype.size());
        let (y, [q, k, v]) = (io.y(0), [0, 1, 2].map(|i| if self.joined { third(i) } else { io.x(i) }));
        let pitch = io.int(if self.joined { 3 * width } else { width })?;
        let (t, s, d, heads) = (io.int(t)?, io.int(s)?, io.int(d)?, io.int(self.heads)?);
        let ([ldq, ldk, ldv], ldy) = ([pitch; 3], io.int(width)?);
        let causal = i32::from(self.causal);
        match kernel {
            Kernel::Plain => {
                let scale = self.scale(d as usize) as f32;
                let p = plain::AttentionFwd { y, q, k, v, t, s, heads, d, scale, causal };
                io.launch(plain::ATTENTION_FWD, dtype, variant, grid, plain::BLOCK, p)
            }
            Kernel::Floats => {
                let scale = (self.scale(d as usize) * LOG2_E) as f32;
                let p = floats::AttentionF32Fwd { y, q, k, v, t, s, d, ldq, ldk, ldv, ldy, scale, causal };
                io.launch(floats::ATTENTION_F32_FWD, dtype, variant, grid, floats::BLOCK.of(variant), p)
            }
            Kernel::Flash => {
                let scale = (self.scale(d as usize) * LOG2_E) as f32;
                let p = flash::AttentionFlashFwd { y, q, k, v, t, s, d, ldq, ldk, ldv, ldy, scale, causal };
                io.launch(flash::ATTENTION_FLASH_FWD, dtype, variant, grid, flash::BLOCK, p)
            }
            Kernel::Long => {
                let scale = (self.scale(d as usize) * LOG2_E) as f32;
                let p = long::AttentionLongFwd { y, q, k, v, t, s, d, ldq, ldk, ldv, ldy, scale, causal };
                io.launch(long::ATTENTION_LONG_FWD, dtype, variant, grid, long::BLOCK, p)
            }
            Kernel::Short => {
                let scale = (self.scale(d as usize) * LOG2_E) as f32;
                let walk = io.int(queries / short::BM)?;
                let p = short::AttentionShortFwd { y, q, k, v, t, s, d, ldq, ldk, ldv, ldy, walk, scale };
                io.launch(short::ATTENTION_SHORT_FWD, dtype, variant, grid, short::BLOCK, p)
            }
            Kernel::Wide => {
                let scale = (self.scale(d as usize) * LOG2_E) as f32;
                let p = wide::AttentionWideFwd { y, q, k, v, t, s, d, ldq, ldk, ldv, ldy, scale, causal };
                io.launch(wide::ATTENTION_WIDE_FWD, dtype, variant, grid, wide::BLOCK, p)
            }
        }
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let x = &separate(self.joined, x);
        let Sizes { b, t, s, d } = self.sizes(x[0].shape, x[1].shape);
        // In f64: the product of two counts of pixels outgrows an integer long before a picture outgrows memory.
        let [b, t, s, d, heads] = [b, t, s, d, self.heads].map(|n| n as f64);
        let pairs = b * heads * if self.causal { t * s - t * (t.max(1.0) - 1.0) / 2.0 } else { t * s };
        Cost::streaming((4.0 * pairs * d) as usize, x, y)
    }

    fn launches(&self, x: &[Spec]) -> Vec<LaunchPlan> {
        let x = &separate(self.joined, x);
        let Sizes { b, t, s, d } = self.sizes(x[0].shape, x[1].shape);
        let choice = choose(x[0].dtype, d, [t, s], self.heads * b, self.causal);
        let Choice { kernel, variant, queries } = choice;
        let grid = [t.div_ceil(queries), self.heads, b];
        let bytes = (2 * x[0].bytes() + x[1].bytes() + x[2].bytes()) as f64;
        let time = choice.microseconds(grid.iter().product(), [t, s], d, self.causal, bytes);
        let dtype = x[0].dtype;
        vec![match kernel {
            Kernel::Plain => LaunchPlan::new(plain::ATTENTION_FWD, dtype, variant, grid, plain::BLOCK, time),
            Kernel::Floats => {
                let block = floats::BLOCK.of(variant);
                LaunchPlan::new(floats::ATTENTION_F32_FWD, dtype, variant, grid, block, time)
            }
            Kernel::Flash => {
                LaunchPlan::new(flash::ATTENTION_FLASH_FWD, dtype, variant, grid, flash::BLOCK, time)
            }
            Kernel::Long => {
                LaunchPlan::new(long::ATTENTION_LONG_FWD, dtype, variant, grid, long::BLOCK, time)
            }
            Kernel::Short => {
                LaunchPlan::new(short::ATTENTION_SHORT_FWD, dtype, variant, grid, short::BLOCK, time)
            }
            Kernel::Wide => {
                LaunchPlan::new(wide::ATTENTION_WIDE_FWD, dtype, variant, grid, wide::BLOCK, time)
            }
        }]
    }

    fn grad(&self, g: &mut Graph, x: &[Var], y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dy)] = dy else { return Ok(vec![None; x.len()]) };
        if self.joined {
            return Err(Error::NoGradient(Self::NAME));
        }
        let op = AttentionGrad { heads: self.heads, causal: self.causal };
        Ok(g.push_all("grad", op, &[x[0], x[1], x[2], y[0], *dy])?.into_iter().map(Some).collect())
    }

    /// Queries, keys and values that are plain products of one input become one product.
    fn fuse(&self, g: &Graph, at: Var, target: Target) -> Option<Rewrite> {
        let node = g.maker(at).filter(|_| target == Target::Cuda && !self.joined)?;
        let (v, op, x) = super::conv2d::together(g, [node.x[0], node.x[1], node.x[2]])?;
        let joined = Attention { joined: true, ..self.clone() };
        let q = g.spec(node.x[0]);
        let qkv = Spec::new(q.dtype, q.shape.with_last(3 * q.shape.last()));
        joined.infer(&[qkv]).is_ok().then(|| Rewrite {
            op: joined.into(),
            x: vec![v],
            made: vec![(v, op, x)],
        })
    }

    fn variant(&self, x: &[Spec]) -> &'static str {
        let x = separate(self.joined, x);
        let Sizes { b, t, s, d } = self.sizes(x[0].shape, x[1].shape);
        choose(x[0].dtype, d, [t, s], self.heads * b, self.causal).variant
    }

    fn cases() -> Vec<Case> {
        let heads = |heads, d: usize, b, tq: usize, s: usize, causal| {
            let kv = [b, s, heads * d];
            Case::new(Attention { heads, causal, joined: false }, [t([b, tq, heads * d]), t(kv), t(kv)])
        };
        let of = |mut case: Case, queries: fn(super::Arg) -> super::Arg| {
            case.args[0] = queries(case.args[0].clone());
            case
        };
        let joined = |heads, d: usize, b, tokens: usize, causal| {
            let qkv = t([b, tokens, 3 * heads * d]);
            Case::new(Attention { heads, causal, joined: true }, [qkv]).only(&SIXTEEN)
        };
        let mut image = heads(2, 40, 2, 1, 9, false);
        image.args[0] = t([2, 5, 7, 80]);
        vec![
            heads(1, 1, 1, 1, 1, false),
            joined(2, 40, 2, 70, false),
            joined(3, 16, 1, 33, true),
            joined(1, 320, 2, 20, false),
            heads(8, 4, 2, 65, 77, false),
            heads(4, 8, 2, 77, 77, true),
            heads(2, 40, 3, 33, 64, false),
            heads(1, 64, 1, 70, 31, false),
            heads(2, 80, 1, 35, 77, false),
            heads(1, 96, 1, 20, 40, true),
            heads(2, 160, 1, 33, 33, false),
            heads(1, 128, 2, 9, 100, false),
            heads(1, 512, 1, 20, 20, false),
            heads(1, 960, 1, 5, 7, false),
            heads(3, 24, 1, 10, 50, true),
            image,
            // Every variant on tensor cores, in tails and whole blocks of queries (64, 128) and of keys (64, 32), with
            // columns that are zeros (d = 8, 48, 104, 136, 168, 320).
            heads(2, 8, 1, 64, 65, false),
            heads(2, 32, 1, 65, 128, false),
            heads(1, 48, 2, 40, 70, false),
            heads(1, 64, 3, 100, 130, true),
            heads(1, 104, 1, 66, 70, true),
            heads(1, 136, 1, 20, 33, false),
            heads(2, 160, 1, 65, 70, true),
            heads(2, 168, 3, 17, 33, false),
            heads(1, 256, 1, 65, 64, false),
            heads(1, 320, 1, 30, 50, true),
            heads(1, 512, 1, 70, 72, false),
            heads(44, 40, 3, 130, 260, false).only(&SIXTEEN),
            of(heads(66, 64, 2, 160, 300, true).only(&SIXTEEN), |q| q.normal(0.0, 30.0)),
            // In f32: every variant, in tails and whole blocks of queries (128, 64) and of keys (64, 32), with columns that
            // are zeros; and heads for the plain kernel in every type.
            heads(2, 40, 1, 130, 150, false).only(&[DType::F32]),
            heads(1, 12, 2, 128, 129, true).only(&[DType::F32]),
            heads(1, 64, 1, 129, 192, true).only(&[DType::F32]),
            heads(1, 76, 2, 64, 130, false).only(&[DType::F32]),
            heads(1, 132, 1, 66, 64, false).only(&[DType::F32]),
            heads(2, 42, 1, 35, 40, true),
            heads(1, 150, 1, 20, 33, false),
            // Few keys: every variant, the fewest and the most of them, tails of queries; blocks that walk over four tiles.
            heads(2, 8, 1, 64, 65, false),
            heads(2, 40, 2, 70, 80, false),
            heads(1, 48, 2, 9, 66, false),
            heads(2, 72, 1, 65, 80, false),
            heads(1, 136, 2, 20, 77, false),
            heads(1, 160, 1, 66, 80, false),
            heads(2, 40, 1, 66, 81, false),
            heads(1, 56, 3, 17, 128, false),
            heads(1, 80, 1, 70, 120, false),
            joined(2, 64, 2, 77, false),
            heads(66, 8, 6, 250, 77, false).only(&SIXTEEN),
            // All weights alike; weights of which few are not zero.
            of(heads(2, 40, 1, 20, 77, false), |q| q.values(vec![0.0])),
            of(heads(1, 512, 1, 20, 37, false), |q| q.values(vec![0.0])),
            of(heads(2, 40, 1, 20, 150, false), |q| q.normal(0.0, 30.0)),
            of(heads(1, 512, 1, 20, 150, false), |q| q.normal(0.0, 30.0)),
            // SD 1.5 and LDM 1.45B, then SDXL, to themselves and to the text; then the autoencoders.
            heads(8, 40, 2, 4096, 4096, false).bench(),
            heads(8, 40, 2, 4096, 77, false).bench(),
            heads(8, 40, 2, 1024, 1024, false).bench(),
            heads(8, 40, 2, 1024, 77, false).bench(),
            heads(8, 80, 2, 1024, 1024, false).bench(),
            heads(8, 80, 2, 1024, 77, false).bench(),
            heads(8, 80, 2, 256, 256, false).bench(),
            heads(8, 80, 2, 256, 77, false).bench(),
            heads(8, 160, 2, 256, 256, false).bench(),
            heads(8, 160, 2, 256, 77, false).bench(),
            heads(8, 160, 2, 64, 64, false).bench(),
            heads(8, 160, 2, 64, 77, false).bench(),
            heads(8, 160, 2, 16, 16, false).bench(),
            heads(8, 160, 2, 16, 77, false).bench(),
            heads(10, 64, 2, 4096, 4096, false).bench(),
            heads(10, 64, 2, 4096, 77, false).bench(),
            heads(20, 64, 2, 1024, 1024, false).bench(),
            heads(20, 64, 2, 1024, 77, false).bench(),
            heads(1, 512, 1, 4096, 4096, false).bench(),
        ]
    }

    fn random(r: &mut Small) -> Case {
        let heads = r.below(3) + 1;
        // Half of them of a size that tensor cores take in 16 bits.
        let d = if r.below(2) == 0 { r.below(90) + 1 } else { 8 * (r.below(24) + 1) };
        let s = r.below(60) + 1;
        let causal = r.below(3) == 0;
        let tq = if causal { r.below(s) + 1 } else { r.below(60) + 1 };
        let kv = [r.below(2) + 1, s, heads * d];
        Case::new(Attention { heads, causal, joined: false }, [t([kv[0], tq, heads * d]), t(kv), t(kv)])
    }
}

/// The types of the kernels on tensor cores.
const SIXTEEN: [DType; 2] = [DType::F16, DType::BF16];
