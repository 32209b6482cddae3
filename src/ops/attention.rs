//! y = softmax(scale · q kᵀ) v per head, without the score matrix in memory.
//!
//! Flash attention (Dao et al. 2022): blocks of keys pass by while maximum, sum and result are kept per query.
//! PyTorch: `F.scaled_dot_product_attention`. Kernel: `kernels/attention.cu`.
use super::prelude::*;
use crate::kernels::attention as k;

/// Attention of q (B,…,N·D) over k, v (B,…,N·D); the axes between are tokens. Result as q.
#[derive(Clone, PartialEq, Debug)]
pub struct Attention {
    /// Heads N; divides the width.
    pub heads: usize,
    /// Query i sees keys up to i + S − T.
    pub causal: bool,
}

struct Sizes {
    b: usize,
    t: usize,
    s: usize,
    d: usize,
}

impl Attention {
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
                    q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * self.scale(d)
                })
                .collect();
            let max = p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            p.iter_mut().for_each(|v| *v = (*v - max).exp());
            let sum: f64 = p.iter().sum();
            p.iter_mut().for_each(|v| *v /= sum);
            f(&p, image, query, head);
        }
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
        let [q, keys, values] = args(Self::NAME, &want, x)?;
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
        Ok(vec![q])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        vec![self.weighted(x, |v| v)]
    }

    /// Σ p|v|, times what an error of the scores costs: their rounding moves p by a share of Σ|q||k|·scale.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let d = x[0].shape.last() / self.heads;
        let largest = |a: &Array| a.data.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let norm = |a: &Array| a.data.chunks(d).map(|r| r.iter().map(|v| v * v).sum::<f64>()).fold(0.0, f64::max).sqrt();
        let scores = (norm(&x[0]) * norm(&x[1])).min(largest(&x[0]) * largest(&x[1]) * d as f64) * self.scale(d);
        vec![self.weighted(x, f64::abs).map(|v| v * (1.0 + scores))]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
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
        cpu::attention::working_bytes(x[0].dtype, &self.on_cpu(x))
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let Sizes { b, t, s, d } = self.sizes(io.x_spec(0).shape, io.x_spec(1).shape);
        let p = k::AttentionFwd {
            y: io.y(0),
            q: io.x(0),
            k: io.x(1),
            v: io.x(2),
            t: io.int(t)?,
            s: io.int(s)?,
            heads: io.int(self.heads)?,
            d: io.int(d)?,
            scale: self.scale(d) as f32,
            causal: self.causal as i32,
        };
        let specs: Vec<Spec> = (0..3).map(|i| *io.x_spec(i)).collect();
        let (variant, queries) = choose(d);
        debug_assert_eq!(variant, self.variant(&specs));
        io.launch(k::ATTENTION_FWD, specs[0].dtype, variant, [t.div_ceil(queries), self.heads, b], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let Sizes { b, t, s, d } = self.sizes(x[0].shape, x[1].shape);
        // In f64: the product of two counts of pixels outgrows an integer long before a picture outgrows memory.
        let [b, t, s, d, heads] = [b, t, s, d, self.heads].map(|n| n as f64);
        let pairs = b * heads * if self.causal { t * s - t * (t.max(1.0) - 1.0) / 2.0 } else { t * s };
        Cost::streaming((4.0 * pairs * d) as usize, x, y)
    }

    fn variant(&self, x: &[Spec]) -> &'static str {
        choose(x[0].shape.last() / self.heads).0
    }

    fn cases() -> Vec<Case> {
        let heads = |heads, d: usize, b, tq: usize, s: usize, causal| {
            let kv = [b, s, heads * d];
            Case::new(Attention { heads, causal }, [t([b, tq, heads * d]), t(kv), t(kv)])
        };
        let mut image = heads(2, 40, 2, 1, 9, false);
        image.args[0] = t([2, 5, 7, 80]);
        vec![
            heads(1, 1, 1, 1, 1, false),
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
        let (heads, d) = (r.below(3) + 1, r.below(90) + 1);
        let s = r.below(60) + 1;
        let causal = r.below(3) == 0;
        let tq = if causal { r.below(s) + 1 } else { r.below(60) + 1 };
        let kv = [r.below(2) + 1, s, heads * d];
        Case::new(Attention { heads, causal }, [t([kv[0], tq, heads * d]), t(kv), t(kv)])
    }
}

/// Kernel variant for a head size, and the queries that one of its blocks owns.
fn choose(d: usize) -> (&'static str, usize) {
    match d {
        ..=64 => ("D=64", 32),
        65..=160 => ("D=160", 32),
        161..=512 => ("D=512", 8),
        _ => ("D=1024", 8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_size_of_the_models_has_a_variant_that_holds_it() {
        for d in [8, 24, 32, 40, 48, 64, 80, 96, 128, 160, 256, 384, 512, 640, 960, 1024] {
            let (variant, queries) = choose(d);
            let holds: usize = variant[2..].parse().unwrap();
            assert!(d <= holds && k::VARIANTS.contains(&variant) && queries > 0, "{d}: {variant}");
        }
        assert_eq!(choose(40).0, "D=64");
        assert_eq!(choose(80).0, "D=160");
    }
}
