//! Gradients of attention from q, k, v, its result y and dy: with p the weights and δ = Σ dy · y of a query,
//! ds = scale · p · (dy vᵀ − δ); dq = ds k, dk = dsᵀ q, dv = pᵀ dy (Dao et al. 2022, algorithm 4).
//! Kernel: `kernels/attention_grad.cu`.

use super::super::prelude::*;
use super::{Attention, Sizes};
use crate::backend::cpu::attention::{Known, attention_grad, grad_working_bytes};
use crate::kernels::attention_grad as k;

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

/// The variant of the kernel that holds heads of `d`.
fn variant(d: usize) -> &'static str {
    match d {
        ..=64 => "D=64",
        65..=160 => "D=160",
        161..=512 => "D=512",
        _ => "D=1024",
    }
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
        let (stats, [q, key, v, y, dy]) = (io.scratch, [0, 1, 2, 3, 4].map(|i| io.x(i)));
        let grid = |tokens: usize| [tokens.div_ceil(k::TILE), self.heads, b];
        let (grid_q, grid_k, variant) = (grid(t), grid(s), variant(d));
        let (t, s, d, heads) = (io.int(t)?, io.int(s)?, io.int(d)?, io.int(self.heads)?);
        let p = k::AttentionGradQ { dq: io.y(0), stats, q, k: key, v, y, dy, t, s, heads, d, scale, causal };
        io.launch(k::ATTENTION_GRAD_Q, dtype, variant, grid_q, k::BLOCK, p)?;
        let (dk, dv) = (io.y(1), io.y(2));
        let p = k::AttentionGradKv { dk, dv, stats, q, k: key, v, dy, t, s, heads, d, scale, causal };
        io.launch(k::ATTENTION_GRAD_KV, dtype, variant, grid_k, k::BLOCK, p)
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        x[0].shape.rows() * self.heads * 2 * size_of::<f32>()
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let forward = self.forward().cost(&x[..3], &y[..1]).flops;
        Cost { flops: 2.5 * forward, ..Cost::streaming(0, x, y) }
    }

    fn variant(&self, x: &[Spec]) -> &'static str {
        variant(x[0].shape.last() / self.heads.max(1))
    }

    fn cases() -> Vec<Case> {
        Attention::cases().into_iter().filter_map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        let of = |_| with_gradient(Attention::random(r));
        (0..).find_map(of).expect("most random cases are small")
    }
}

/// The case of the gradients for one of the op; none for joined inputs, which only fused graphs hold.
fn with_gradient(case: Case) -> Option<Case> {
    let super::super::Op::Attention(Attention { heads, causal, joined: false }) = case.op else {
        return None;
    };
    // Long heads in many blocks of the emulator take too long, and show nothing that short ones do not.
    let work = |a: &super::super::Arg| a.shape.numel();
    if !case.bench && case.args.iter().map(work).sum::<usize>() > 60_000 {
        return None;
    }
    let q = t(case.args[0].shape);
    let args = [&case.args[..], &[q.clone(), q]].concat();
    Some(Case { op: AttentionGrad { heads, causal }.into(), args, ..case })
}
