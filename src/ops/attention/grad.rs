//! Gradients of attention from q, k, v, its result y and dy: with p the weights and δ = Σ dy · y of a query,
//! ds = scale · p · (dy vᵀ − δ); dq = ds k, dk = dsᵀ q, dv = pᵀ dy (Dao et al. 2022, algorithm 4).
//! Kernels: on tensor cores `kernels/attention_grad_q_mma.cu`, then `kernels/attention_grad_kv_mma.cu`;
//! `kernels/attention_grad.cu` for all that those do not take.

use super::super::prelude::*;
use super::{Attention, SIXTEEN, Sizes};
use crate::backend::cpu::attention::{Known, attention_grad, grad_working_bytes};
use crate::kernels::attention_grad as plain;
use crate::kernels::attention_grad_kv_mma as mma_kv;
use crate::kernels::attention_grad_q_mma as mma_q;
use std::f64::consts::LOG2_E;

/// q (B,…,N·D), k, v (B,…,N·D), y and dy as q to the gradients of q, k and v.
#[derive(Clone, PartialEq, Debug)]
pub struct AttentionGrad {
    /// As that of [`Attention`].
    pub heads: usize,
    /// As that of [`Attention`].
    pub causal: bool,
}

impl AttentionGrad {
    fn forward(&self) -> Attention {
        Attention { heads: self.heads, causal: self.causal, joined: false }
    }

    /// dq, dk, dv; with `size`, what is summed into each, and what an error of the scores costs.
    fn all(&self, x: &[Array], size: bool) -> Vec<Array> {
        let op = self.forward();
        let Sizes { t, s, d, .. } = op.sizes(x[0].shape, x[1].shape);
        let width = self.heads * d;
        let amplified = if size { 1.0 + op.score_size(x) } else { 1.0 };
        let abs = |v: f64| if size { v.abs() } else { v };
        let sign = if size { 1.0 } else { -1.0 };
        let mut out = [Array::zeros(x[0].shape), Array::zeros(x[1].shape), Array::zeros(x[1].shape)];
        op.each(x, |p, image, query, head| {
            let row = (image * t + query) * width + head * d;
            let q = &x[0].data[row..][..d];
            let (y, dy) = (&x[3].data[row..][..d], &x[4].data[row..][..d]);
            let delta: f64 = y.iter().zip(dy).map(|(a, b)| abs(a * b)).sum();
            for (key, p) in p.iter().enumerate() {
                let at = (image * s + key) * width + head * d;
                let (k, v) = (&x[1].data[at..][..d], &x[2].data[at..][..d]);
                let dp: f64 = dy.iter().zip(v).map(|(a, b)| abs(a * b)).sum();
                let ds = op.scale(d) * p * (dp + sign * delta) * amplified;
                for i in 0..d {
                    out[0].data[row + i] += ds * abs(k[i]);
                    out[1].data[at + i] += ds * abs(q[i]);
                    out[2].data[at + i] += p * amplified * abs(dy[i]);
                }
            }
        });
        out.into()
    }
}

/// Which kernels compute the gradients, in which variants.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Choice {
    /// All types and head sizes, without tensor cores, heads in so many parts.
    Plain { variant: &'static str, parts: usize },
    /// 16 bits, heads of up to 160, in whole 16-byte chunks: the variant that owns queries, and the one that owns keys.
    TensorCores { q: &'static str, kv: &'static str },
}

/// The kernels for a head size `d`, `t` queries and `s` keys in each of `n` heads, those of all images together.
fn choose(dtype: DType, d: usize, [t, s]: [usize; 2], n: usize) -> Choice {
    let tensor_cores = SIXTEEN.contains(&dtype) && d.is_multiple_of(8);
    // Large blocks read what passes by half as often, if there are enough to give each multiprocessor of the largest cards
    // (132) the two that its registers hold, and if they are not half empty.
    let large = |rows: usize| {
        n * rows.div_ceil(128) >= 2 * 132 && (rows % 128 == 0 || rows % 128 > 64 || rows > 1024)
    };
    let (q, kv) = match d {
        161.. => return Choice::Plain { variant: "D=512", parts: d.div_ceil(512) },
        65.. if !tensor_cores => return Choice::Plain { variant: "D=160", parts: 1 },
        _ if !tensor_cores => return Choice::Plain { variant: "D=64", parts: 1 },
        129.. => ("BM=64,D=160", "BN=64,D=160"),
        81.. => ("BM=64,D=128", "BN=64,D=128"),
        65.. => ("BM=64,D=80", "BN=64,D=80"),
        41.. => (if large(t) { "BM=128,D=64" } else { "BM=64,D=64" }, "BN=64,D=64"),
        33.. => (
            if large(t) { "BM=128,D=40" } else { "BM=64,D=40" },
            if large(s) { "BN=128,D=40" } else { "BN=64,D=40" },
        ),
        _ => ("BM=64,D=32", "BN=64,D=32"),
    };
    Choice::TensorCores { q, kv }
}

impl Operation for AttentionGrad {
    const NAME: &'static str = "attention_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want =
            format!("q (B,…,N·D), k and v (B,…,N·D), y and dy as q, of one float type, N = {}", self.heads);
        let [q, keys, values, y, dy] = args(Self::NAME, &want, x)?;
        ensure!(self.forward().infer(&[q, keys, values]).is_ok() && q == y && q == dy, Self::NAME, want, x);
        Ok(vec![q, keys, values])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        self.all(x, false)
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.all(x, true)
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let shape = self.forward().on_cpu(io.x);
        let [q, k, v, y, dy] = [0, 1, 2, 3, 4].map(|i| io.slice(i));
        attention_grad(&shape, Known { q, k, v, y, dy }, io.outs());
        Ok(())
    }

    fn cpu_scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        grad_working_bytes(&self.forward().on_cpu(x))
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let op = self.forward();
        let Sizes { b, t, s, d } = op.sizes(io.x_spec(0).shape, io.x_spec(1).shape);
        let (dtype, scale, causal) = (io.x_spec(0).dtype, op.scale(d) as f32, i32::from(self.causal));
        let (stats, [q, k, v, y, dy]) = (io.scratch, [0, 1, 2, 3, 4].map(|i| io.x(i)));
        let [dq, dk, dv] = [0, 1, 2].map(|i| io.y(i));
        let grid = |blocks: usize| [blocks, self.heads, b];
        let heads = io.int(self.heads)?;
        let (variant, parts) = match choose(dtype, d, [t, s], self.heads * b) {
            Choice::Plain { variant, parts } => (variant, parts),
            Choice::TensorCores { q: own_q, kv: own_kv } => {
                let (grid_q, grid_k) =
                    (grid(t.div_ceil(mma_q::BM.of(own_q))), grid(s.div_ceil(mma_kv::BN.of(own_kv))));
                let (rows, exponent) = (io.int(stats_rows(t))?, (op.scale(d) * LOG2_E) as f32);
                let (t, s, d) = (io.int(t)?, io.int(s)?, io.int(d)?);
                let p = mma_q::AttentionGradQMma {
                    dq,
                    stats,
                    q,
                    k,
                    v,
                    y,
                    dy,
                    t,
                    s,
                    heads,
                    d,
                    rows,
                    scale,
                    exponent,
                    causal,
                };
                io.launch(mma_q::ATTENTION_GRAD_Q_MMA, dtype, own_q, grid_q, mma_q::BLOCK, p)?;
                let p = mma_kv::AttentionGradKvMma {
                    dk,
                    dv,
                    stats,
                    q,
                    k,
                    v,
                    dy,
                    t,
                    s,
                    heads,
                    d,
                    rows,
                    scale,
                    exponent,
                    causal,
                };
                return io.launch(mma_kv::ATTENTION_GRAD_KV_MMA, dtype, own_kv, grid_k, mma_kv::BLOCK, p);
            }
        };
        let grid = |tokens: usize| grid(tokens.div_ceil(plain::TILE) * parts);
        let (grid_q, grid_k) = (grid(t), grid(s));
        let (t, s, d, parts) = (io.int(t)?, io.int(s)?, io.int(d)?, io.int(parts)?);
        let p = plain::AttentionGradQ { dq, stats, q, k, v, y, dy, t, s, heads, d, parts, scale, causal };
        io.launch(plain::ATTENTION_GRAD_Q, dtype, variant, grid_q, plain::BLOCK, p)?;
        let p = plain::AttentionGradKv { dk, dv, stats, q, k, v, dy, t, s, heads, d, parts, scale, causal };
        io.launch(plain::ATTENTION_GRAD_KV, dtype, variant, grid_k, plain::BLOCK, p)
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        let Sizes { b, t, s, d } = self.forward().sizes(x[0].shape, x[1].shape);
        let rows = match choose(x[0].dtype, d, [t, s], self.heads * b) {
            Choice::Plain { .. } => t,
            Choice::TensorCores { .. } => stats_rows(t),
        };
        b * self.heads * rows * 2 * size_of::<f32>()
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let forward = self.forward().cost(&x[..3], &y[..1]).flops;
        Cost { flops: 2.5 * forward, ..Cost::streaming(0, x, y) }
    }

    fn launches(&self, x: &[Spec]) -> Vec<LaunchPlan> {
        plans(&self.forward(), x)
    }

    fn variant(&self, x: &[Spec]) -> &'static str {
        let Sizes { b, t, s, d } = self.forward().sizes(x[0].shape, x[1].shape);
        match choose(x[0].dtype, d, [t, s], self.heads * b) {
            Choice::Plain { variant, .. } => variant,
            Choice::TensorCores { q, .. } => q,
        }
    }

    fn cases() -> Vec<Case> {
        let of = |heads, d: usize, b, t: usize, s: usize, causal| {
            let kv = super::super::t([b, s, heads * d]);
            let forward = Attention { heads, causal, joined: false };
            let case = Case::new(forward, [super::super::t([b, t, heads * d]), kv.clone(), kv]);
            gradient_of(case).expect("not joined").only(&SIXTEEN)
        };
        let own = [of(66, 40, 4, 70, 200, false), of(66, 40, 4, 70, 200, true), of(66, 64, 4, 70, 70, true)];
        Attention::cases().into_iter().filter_map(with_gradient).chain(own).collect()
    }

    fn random(r: &mut Small) -> Case {
        let of = |_| with_gradient(Attention::random(r));
        (0..).find_map(of).expect("most random cases are small")
    }
}

/// The two launches on tensor cores; none for the plain kernels, of which nothing is said. The model: both kernels multiply
/// 4 · D columns for each pair of a query and a key, at six tenths of what long products reach, a guess: nothing of them is
/// measured. Exponentials, two for a pair in the first kernel and one in the second, are counted as in the forward pass.
fn plans(op: &Attention, x: &[Spec]) -> Vec<LaunchPlan> {
    let (Sizes { b, t, s, d }, dtype) = (op.sizes(x[0].shape, x[1].shape), x[0].dtype);
    let Choice::TensorCores { q, kv } = choose(dtype, d, [t, s], op.heads * b) else { return vec![] };
    let time = |blocks: usize, pairs: f64, columns: usize, exponentials: f64, bytes: usize| {
        let rate = 0.6 * launch::MMA / launch::MULTIPROCESSORS as f64;
        let each = pairs * (8.0 * columns as f64 / rate + 0.7 * exponentials / 16.0 / launch::CLOCK);
        let blocks_each = blocks.div_ceil(launch::MULTIPROCESSORS) as f64;
        f64::max(blocks_each * each + 2.0, launch::streaming(bytes as f64, blocks)) + launch::GAP
    };
    // With `causal` a query sees the keys before the last T, and half of those.
    let seen = if op.causal { ((s - t) as f64 + t as f64 / 2.0) / s as f64 } else { 1.0 };
    let pairs = |rows: usize, passing: usize| (rows * passing.next_multiple_of(16)) as f64 * seen;
    let (queries, keys) = (mma_q::BM.of(q), mma_kv::BN.of(kv));
    let (grid_q, grid_k) = ([t.div_ceil(queries), op.heads, b], [s.div_ceil(keys), op.heads, b]);
    let (bytes_q, bytes_k) = (4 * x[0].bytes() + 2 * x[1].bytes(), 2 * x[0].bytes() + 4 * x[1].bytes());
    let time_q = time(grid_q.iter().product(), pairs(queries, s), mma_q::D.of(q), 2.0, bytes_q);
    let time_k = time(grid_k.iter().product(), pairs(keys, t), mma_kv::D.of(kv), 1.0, bytes_k);
    vec![
        LaunchPlan::new(mma_q::ATTENTION_GRAD_Q_MMA, dtype, q, grid_q, mma_q::BLOCK, time_q),
        LaunchPlan::new(mma_kv::ATTENTION_GRAD_KV_MMA, dtype, kv, grid_k, mma_kv::BLOCK, time_k),
    ]
}

/// Rows of the statistics of a head, for blocks of any variant.
fn stats_rows(t: usize) -> usize {
    t.next_multiple_of(128)
}

/// The case of the gradients for one of the op; none for joined inputs, which only fused graphs hold.
fn gradient_of(case: Case) -> Option<Case> {
    let super::super::Op::Attention(Attention { heads, causal, joined: false }) = case.op else {
        return None;
    };
    let q = t(case.args[0].shape);
    let args = [&case.args[..], &[q.clone(), q]].concat();
    Some(Case { op: AttentionGrad { heads, causal }.into(), args, ..case })
}

/// The same where it is small enough: long heads in many blocks of the emulator take too long, and show nothing that short
/// ones do not.
fn with_gradient(case: Case) -> Option<Case> {
    let work = |a: &super::super::Arg| a.shape.numel();
    let small = case.bench || case.args.iter().map(work).sum::<usize>() <= 60_000;
    if small { gradient_of(case) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_size_has_variants_that_hold_it() {
        let sizes = (1..=1024).flat_map(|d| [1, 64, 77, 128, 130, 4096].map(|tokens| (d, tokens)));
        for (d, tokens) in sizes {
            for (dtype, [t, s]) in
                DType::FLOATS.iter().flat_map(|&f| [[64, tokens], [tokens, 77]].map(|ts| (f, ts)))
            {
                match choose(dtype, d, [t, s], 128) {
                    Choice::Plain { variant, parts } => {
                        assert!(dtype == DType::F32 || d % 8 != 0 || d > 160, "{dtype:?} {d}");
                        assert!(
                            plain::VARIANTS.contains(&variant) && d <= parts * plain::D.of(variant),
                            "{d}: {variant}"
                        );
                    }
                    Choice::TensorCores { q, kv } => {
                        assert!(dtype != DType::F32 && d % 8 == 0 && d <= 160, "{dtype:?} {d}");
                        assert!(
                            mma_q::VARIANTS.contains(&q) && mma_kv::VARIANTS.contains(&kv),
                            "{d}: {q} {kv}"
                        );
                        assert!(d <= mma_q::D.of(q) && d <= mma_kv::D.of(kv), "{d}: {q} {kv}");
                        assert_eq!(stats_rows(t) % mma_q::BM.of(q), 0, "{q}");
                        assert_eq!(
                            mma_q::BM.of(q) % mma_kv::BM.of(kv),
                            0,
                            "statistics of whole turns: {q} {kv}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn what_the_models_train_with() {
        // Heads × images, head size, queries, keys.
        let table = [
            ("SD 1.5, 64×64", 128, 40, [4096, 4096], "BM=128,D=40", "BN=128,D=40"),
            ("SD 1.5, 64×64, to a text", 128, 40, [4096, 77], "BM=128,D=40", "BN=64,D=40"),
            ("SD 1.5, 32×32", 128, 80, [1024, 1024], "BM=64,D=80", "BN=64,D=80"),
            ("SD 1.5, 16×16", 128, 160, [256, 256], "BM=64,D=160", "BN=64,D=160"),
            ("SD 2, 64×64", 80, 64, [4096, 4096], "BM=128,D=64", "BN=64,D=64"),
            ("CLIP's text encoder", 192, 64, [77, 77], "BM=64,D=64", "BN=64,D=64"),
            ("LDM with heads of 32", 14, 32, [1024, 1024], "BM=64,D=32", "BN=64,D=32"),
            ("the small checkpoint", 16, 16, [64, 77], "BM=64,D=32", "BN=64,D=32"),
            ("heads of 128", 16, 128, [1024, 77], "BM=64,D=128", "BN=64,D=128"),
        ];
        for (name, n, d, sizes, q, kv) in table {
            for dtype in SIXTEEN {
                assert_eq!(choose(dtype, d, sizes, n), Choice::TensorCores { q, kv }, "{name}, {dtype:?}");
            }
            assert!(matches!(choose(DType::F32, d, sizes, n), Choice::Plain { .. }), "{name}");
        }
        let of = |d| choose(DType::BF16, d, [1024, 1024], 128);
        assert_eq!(of(36), Choice::Plain { variant: "D=64", parts: 1 }, "no whole chunks");
        assert_eq!(of(512), Choice::Plain { variant: "D=512", parts: 1 }, "an autoencoder's head");
    }

    #[test]
    fn the_launches_are_the_chosen_ones() {
        let op = AttentionGrad { heads: 8, causal: false };
        let spec = |dtype, tokens| Spec::new(dtype, Shape::from([16, tokens, 320]));
        let x = |dtype| [4096, 77, 77, 4096, 4096].map(|tokens| spec(dtype, tokens));
        let got = op.launches(&x(DType::BF16));
        let got: Vec<_> = got.iter().map(|l| (l.kernel, l.variant, l.blocks)).collect();
        let want = [
            ("attention_grad_q_mma", "BM=128,D=40", 32 * 8 * 16),
            ("attention_grad_kv_mma", "BN=64,D=40", 2 * 8 * 16),
        ];
        assert_eq!(got, want);
        assert!(op.launches(&x(DType::F32)).is_empty());
        let bytes = op.scratch(&x(DType::BF16), &[]);
        assert_eq!(bytes, 16 * 8 * 4096 * 2 * 4, "two floats for each query of each head");
    }
}
