//! Gradients of attention: with p = softmax(scale · Q Kᵀ) and δ = Σ dY ∘ Y of a query, dS = scale · p ∘ (dY Vᵀ − δ);
//! dQ = dS K, dK = dSᵀ Q, dV = pᵀ dY (Dao et al. 2022, algorithm 4). A task owns one head of one image and goes through its
//! queries block by block, so that no matrix of all queries by all keys is made.

use super::Attention;
use crate::backend::cpu::gemm::{Mat, product};
use crate::backend::cpu::math;
use crate::backend::cpu::scratch::scratch;
use crate::backend::cpu::simd::{Block, Grid};
use crate::backend::cpu::slice::{Element, Slice, SliceMut};
use rayon::prelude::*;

/// Queries of a block.
const QUERIES: usize = 128;

/// q, y, dy (B,T,N·D) and k, v (B,S,N·D), of one type.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    /// Queries.
    pub q: Slice<'a>,
    /// Keys.
    pub k: Slice<'a>,
    /// Values.
    pub v: Slice<'a>,
    /// The result.
    pub y: Slice<'a>,
    /// Its gradient.
    pub dy: Slice<'a>,
}

/// Gradients of q, k and v. Bits do not depend on the number of threads. Panics if a length or a type does not fit.
pub fn attention_grad(p: &Attention, x: Known, out: [SliceMut; 3]) {
    match out {
        [SliceMut::F32(q), SliceMut::F32(k), SliceMut::F32(v)] => typed(p, x, [q, k, v]),
        [SliceMut::F16(q), SliceMut::F16(k), SliceMut::F16(v)] => typed(p, x, [q, k, v]),
        [SliceMut::BF16(q), SliceMut::BF16(k), SliceMut::BF16(v)] => typed(p, x, [q, k, v]),
        _ => panic!("attention_grad: outputs of different types"),
    }
}

/// Bytes of working memory that [`attention_grad`] takes, all threads together.
pub fn grad_working_bytes(p: &Attention) -> usize {
    let rows = QUERIES.min(p.t.max(1));
    let task = 3 * p.t * p.d + 4 * p.s * p.d + p.t * p.d + 2 * rows * p.s + p.t + (rows + p.d + p.s) * 1056;
    task.saturating_mul(rayon::current_num_threads()).saturating_mul(size_of::<f32>())
}

fn typed<T: Element>(p: &Attention, x: Known, [dq, dk, dv]: [&mut [T]; 3]) {
    let &Attention { b, t, s, heads, d, .. } = p;
    let width = heads * d;
    if dq.is_empty() && dk.is_empty() {
        return;
    }
    let (queries, keys) = (Grid::new(dq, b * t, width, t, d), Grid::new(dk, b * s, width, s, d));
    let values = Grid::new(dv, b * s, width, s, d);
    (0..b * heads).into_par_iter().with_max_len(1).for_each(|i| {
        let (image, head) = (i / heads, i % heads);
        let ((.., dq), (.., dk), (.., dv)) = (queries.take(i), keys.take(i), values.take(i));
        let read = |from: Slice, tokens: usize, to: &mut [f32]| {
            for (row, to) in to.chunks_exact_mut(d).enumerate() {
                from.read((image * tokens + row) * width + head * d, to);
            }
        };
        scratch(4 * t * d + 4 * s * d + t, |buffer| {
            let (q, rest) = buffer.split_at_mut(t * d);
            let (dy, rest) = rest.split_at_mut(t * d);
            let (y, rest) = rest.split_at_mut(t * d);
            let (to_q, rest) = rest.split_at_mut(t * d);
            let (k, rest) = rest.split_at_mut(s * d);
            let (v, rest) = rest.split_at_mut(s * d);
            let (to_k, rest) = rest.split_at_mut(s * d);
            let (to_v, delta) = rest.split_at_mut(s * d);
            read(x.q, t, q);
            read(x.dy, t, dy);
            read(x.y, t, y);
            read(x.k, s, k);
            read(x.v, s, v);
            let pairs = y.chunks_exact(d).zip(dy.chunks_exact(d));
            for (delta, (y, dy)) in delta.iter_mut().zip(pairs) {
                *delta = y.iter().zip(dy).map(|(a, b)| a * b).sum();
            }
            Head { p, q, k, v, dy, delta }.run(to_q, to_k, to_v);
            let give = |block: &mut Block, from: &[f32]| {
                from.chunks_exact(d).enumerate().for_each(|(r, from)| block.row(r).copy_from_slice(from));
            };
            T::fill(dq, |block| give(block, to_q));
            T::fill(dk, |block| give(block, to_k));
            T::fill(dv, |block| give(block, to_v));
        });
    });
}

/// One head in f32, contiguous.
struct Head<'a> {
    p: &'a Attention,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    dy: &'a [f32],
    delta: &'a [f32],
}

impl Head<'_> {
    fn run(&self, dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) {
        let &Attention { t, s, d, scale, .. } = self.p;
        let rows = t.div_ceil(t.div_ceil(QUERIES).max(1)).max(1);
        let (k, v) = (Mat::new(self.k, d), Mat::new(self.v, d));
        dk.fill(0.0);
        dv.fill(0.0);
        scratch(2 * rows * s, |buffer| {
            let (weights, ds) = buffer.split_at_mut(rows * s);
            for t0 in (0..t).step_by(rows) {
                let count = rows.min(t - t0);
                let (q, dy) = (Mat::new(&self.q[t0 * d..], d), Mat::new(&self.dy[t0 * d..], d));
                product([count, s, d], q, k.t(), weights, s, false);
                product([count, s, d], dy, v.t(), ds, s, false);
                for r in 0..count {
                    let (p, ds) = (&mut weights[r * s..][..s], &mut ds[r * s..][..s]);
                    let seen = self.p.visible(t0 + r);
                    math::softmax(&mut p[..seen], scale);
                    p[seen..].fill(0.0);
                    let delta = self.delta[t0 + r];
                    ds.iter_mut().zip(&*p).for_each(|(ds, p)| *ds = p * (*ds - delta) * scale);
                }
                product([count, d, s], Mat::new(ds, s), k, &mut dq[t0 * d..], d, false);
                product([s, d, count], Mat::new(ds, s).t(), q, dk, d, true);
                product([s, d, count], Mat::new(weights, s).t(), dy, dv, d, true);
            }
        });
    }
}
