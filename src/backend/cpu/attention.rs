//! Attention softmax(scale · Q Kᵀ) V without a T × S matrix (online softmax: Milakov and Gimelshein 2018; blocks of
//! queries and keys as in FlashAttention, Dao et al. 2022), on the register tiles of the matrix product.
//!
//! K and V are packed into panels once per head. A task owns a block of queries of one head: for each block of keys it
//! forms scores, turns them into weights relative to the running maximum, and adds weights · V to its output.

mod grad;

pub use grad::{Known, attention_grad, grad_working_bytes};

use super::gemm::{Panels, arith, multiply};
use super::math::exp2_nonpositive;
use super::scratch::scratch;
use super::simd::{Arith, Block, Grid, Isa, KC, Kernel, LDA, MAX_MR, Panel, Simd, narrow_for_dot};
use super::slice::{Element, Slice, SliceMut, each_mut};
use crate::tensor::DType;
use bytemuck::cast_slice_mut;
use half::bf16;
use rayon::prelude::*;
use std::array::from_fn;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Queries of one task, about: nine register tiles of 14 rows.
const QUERIES: usize = 126;
/// Keys of one block: the scores of a register tile's rows stay in the first-level cache.
const KEYS: usize = 256;
/// Floats of packed K and V at a time; more batch items than fit go through in groups.
const PACKED: usize = 8 << 20;

/// Queries, keys or values in memory, or a part of a fused projection: element (b, t, head, d) is
/// data\[b·batch + t·row + head·D + d\].
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    /// From the first element of the part on.
    pub data: Slice<'a>,
    /// Elements from one token to the next.
    pub row: usize,
    /// Elements from one batch item to the next.
    pub batch: usize,
}

impl<'a> Heads<'a> {
    /// A contiguous (B, tokens, width) with width = N·D.
    pub fn new(data: Slice<'a>, tokens: usize, width: usize) -> Heads<'a> {
        Heads { data, row: width, batch: tokens * width }
    }

    fn check(&self, name: &str, b: usize, tokens: usize, width: usize) {
        let want = (b - 1) * self.batch + (tokens - 1) * self.row + width;
        assert!(
            self.data.len() >= want,
            "attention: {name} has {} elements, want {want} or more",
            self.data.len()
        );
    }
}

/// The shape of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Batch.
    pub b: usize,
    /// Query tokens, T.
    pub t: usize,
    /// Key and value tokens, S.
    pub s: usize,
    /// Heads, N.
    pub heads: usize,
    /// Head size, D, at most 1024.
    pub d: usize,
    /// Factor of the scores, usually 1 / √D.
    pub scale: f32,
    /// Query t sees keys 0 ..= t + (S - T) only. One that sees none gives zeros.
    pub causal: bool,
}

impl Attention {
    /// Keys that query t sees.
    fn visible(&self, t: usize) -> usize {
        if self.causal { (t + 1 + self.s).saturating_sub(self.t).min(self.s) } else { self.s }
    }
}

/// out (B,T,N·D) = softmax(scale · Q Kᵀ) V per batch item and head. Operands of one type; bf16 is multiplied in pairs
/// where the machine can, and the weights are rounded to bf16 then. Bits do not depend on the number of threads.
/// A row with a NaN score, or with nothing but -∞, is NaN. Panics if a length does not fit or D is over 1024.
pub fn attention(p: &Attention, q: Heads, k: Heads, v: Heads, out: SliceMut) {
    attention_with(Isa::best(), p, q, k, v, out);
}

/// [`attention`] on a given instruction set.
pub fn attention_with(isa: Isa, p: &Attention, q: Heads, k: Heads, v: Heads, out: SliceMut) {
    each_mut!(out, y => typed(isa, p, q, k, v, y))
}

fn typed<T: Element>(isa: Isa, p: &Attention, q: Heads, k: Heads, v: Heads, out: &mut [T]) {
    let width = p.heads * p.d;
    assert_eq!(out.len(), p.b * p.t * width, "attention: length of the output");
    if out.is_empty() {
        return;
    }
    assert!(p.d <= 1024, "attention: head size {}, at most 1024", p.d);
    if p.s == 0 {
        return out.fill(T::zeroed());
    }
    q.check("q", p.b, p.t, width);
    k.check("k", p.b, p.s, width);
    v.check("v", p.b, p.s, width);
    let types = [q, k, v].map(|x| x.data.dtype());
    assert!(types[0] == types[1] && types[1] == types[2], "attention: types {types:?}");
    let arith = arith(isa, types[0]);
    let limit = if arith == Arith::Dot { KEYS / 2 } else { KEYS };
    let (keys, values) = (Panels::new(isa, arith, p.s, p.d, KC), Panels::new(isa, arith, p.d, p.s, limit));
    let each = keys.len() + values.len();
    let group = (PACKED / (each * p.heads)).clamp(1, p.b);
    let block = p.t.div_ceil(p.t.div_ceil(QUERIES));
    // Tasks of one head, and of one batch item.
    let blocks = p.t.div_ceil(block);
    let tasks = blocks * p.heads;
    for (g, out) in out.chunks_mut(group * p.t * width).enumerate() {
        let (b0, items) = (g * group, out.len() / (p.t * width));
        scratch(each * p.heads * items, |packed| {
            packed.par_chunks_mut(each).enumerate().for_each(|(i, packed)| {
                let (b, head) = (b0 + i / p.heads, i % p.heads);
                let (pk, pv) = packed.split_at_mut(keys.len());
                pack_keys(keys, k.data.from(b * k.batch + head * p.d), (p.d, k.row), pk);
                pack_values(values, v.data.from(b * v.batch + head * p.d), (p.s, v.row), pv);
            });
            let packed = &*packed;
            let run = |item: usize, grid: &Grid<T>, i: usize| {
                // Head by head, so that the tasks at work at one time share a head's keys and values.
                let (head, block) = (i / blocks, i % blocks);
                let (t0, _, out) = grid.take(block * p.heads + head);
                let packed = &packed[(item * p.heads + head) * each..][..each];
                let (pk, pv) = packed.split_at(keys.len());
                let queries = q.data.from((b0 + item) * q.batch + t0 * q.row + head * p.d);
                T::fill(out, |out| Task { p, q: queries, q_row: q.row, t0, out, keys, values, pk, pv }.run());
            };
            out.par_chunks_mut(p.t * width).enumerate().for_each(|(item, out)| {
                let grid = Grid::new(out, p.t, width, block, p.d);
                (0..tasks).into_par_iter().with_max_len(1).for_each(|i| run(item, &grid, i));
            });
        });
    }
}

/// Bytes of working memory that [`attention`] takes, all threads together.
pub fn working_bytes(dtype: DType, p: &Attention) -> usize {
    if [p.b, p.t, p.s, p.heads, p.d].contains(&0) {
        return 0;
    }
    let isa = Isa::best();
    let arith = arith(isa, dtype);
    let (keys, values) = (Panels::new(isa, arith, p.s, p.d, KC), Panels::new(isa, arith, p.d, p.s, KEYS));
    let each = keys.len() + values.len();
    let rows = p.t.min(QUERIES);
    let task = (keys.blocks() * rows + 2 * MAX_MR) * LDA + rows * (values.padded() + p.d);
    let item = each.saturating_mul(p.heads);
    let packed = item.saturating_mul((PACKED / item).clamp(1, p.b));
    packed.saturating_add(task * rayon::current_num_threads()).saturating_mul(size_of::<f32>())
}

/// Keys: one panel holds `nr` keys of D `elements`.
fn pack_keys(panels: Panels, src: Slice, (elements, ld): (usize, usize), out: &mut [f32]) {
    for block in 0..panels.blocks() {
        for panel in 0..panels.panels() {
            let out = &mut out[panels.range(block, panel)];
            panels.pack(src, (elements, ld), block, panel, out);
        }
    }
}

/// Values: one panel holds `nr` of the D columns, a line per key or pair of keys.
fn pack_values(panels: Panels, src: Slice, (keys, ld): (usize, usize), out: &mut [f32]) {
    for panel in 0..panels.panels() {
        let (n0, width) = (panel * panels.isa.nr(), panels.width(panel));
        let cols = width.min(panels.n - n0);
        let start = panels.range(0, panel).start;
        let lines = out[start..start + panels.k * width].chunks_exact_mut(width);
        for (key, line) in lines.enumerate() {
            match src {
                Slice::BF16(x) if panels.arith == Arith::Dot => {
                    let row = |key: usize| (key < keys).then(|| &x[key * ld + n0..][..cols]);
                    let pairs: &mut [bf16] = cast_slice_mut(line);
                    pairs.fill(bf16::ZERO);
                    for (i, row) in [row(2 * key), row(2 * key + 1)].into_iter().enumerate() {
                        let to = pairs[i..].iter_mut().step_by(2);
                        to.zip(row.into_iter().flatten()).for_each(|(y, x)| *y = *x);
                    }
                }
                _ => {
                    src.read(key * ld + n0, &mut line[..cols]);
                    line[cols..].fill(0.0);
                }
            }
        }
    }
}

/// A block of queries of one head.
struct Task<'a, 'b, 'c> {
    p: &'a Attention,
    /// From the block's first query on.
    q: Slice<'a>,
    q_row: usize,
    t0: usize,
    out: &'c mut Block<'b>,
    keys: Panels,
    values: Panels,
    pk: &'a [f32],
    pv: &'a [f32],
}

impl Task<'_, '_, '_> {
    fn run(self) {
        let isa = self.keys.isa;
        let (rows, d_blocks, wide) = (self.out.rows(), self.keys.blocks(), self.values.padded());
        scratch((d_blocks * rows + 2 * MAX_MR) * LDA + rows * wide, |buffer| {
            let (queries, buffer) = buffer.split_at_mut(d_blocks * rows * LDA);
            let (scores, buffer) = buffer.split_at_mut(MAX_MR * LDA);
            let (pairs, sums) = buffer.split_at_mut(MAX_MR * LDA);
            self.queries(queries);
            let mut state = [Running { max: f32::NEG_INFINITY, sum: 0.0 }; QUERIES];
            // Blocks of keys outside, so that a block's K and V stay in the second-level cache for all queries.
            for block in 0..self.values.blocks() {
                let tiles = rows.div_ceil(isa.mr());
                for tile in 0..tiles {
                    let range = rows * tile / tiles..rows * (tile + 1) / tiles;
                    let (queries, sums) = (&queries[range.start * LDA..], &mut sums[range.start * wide..]);
                    self.step(block, range.clone(), queries, (scores, pairs), &mut state[range], sums);
                }
            }
            for r in 0..rows {
                let y = self.out.row(r);
                if self.p.visible(self.t0 + r) == 0 {
                    y.fill(0.0);
                    continue;
                }
                let inverse = 1.0 / state[r].sum;
                y.iter_mut().zip(&sums[r * wide..]).for_each(|(y, x)| *y = x * inverse);
            }
        });
    }

    /// One block of keys for the queries of one register tile.
    fn step(
        &self,
        block: usize,
        rows: Range<usize>,
        queries: &[f32],
        (scores, pairs): (&mut [f32], &mut [f32]),
        state: &mut [Running],
        sums: &mut [f32],
    ) {
        let (isa, dot) = (self.keys.isa, self.keys.arith == Arith::Dot);
        // Keys, of which a word of the values holds one or two.
        let (first, len) = self.values.block(block);
        let (first, len) = if dot { (2 * first, (2 * len).min(self.p.s - 2 * first)) } else { (first, len) };
        let valid: [usize; MAX_MR] =
            from_fn(|r| self.p.visible(self.t0 + rows.start + r).saturating_sub(first).min(len));
        let count = rows.len();
        let len = valid[count - 1];
        if len == 0 {
            return;
        }
        // Scores of these queries with keys first .. first + len (and with some more, up to a whole panel).
        let mut c = Block::new(scores, LDA, count, LDA);
        for part in 0..self.keys.blocks() {
            let queries = &queries[part * self.out.rows() * LDA..];
            for panel in first / isa.nr()..(first + len).div_ceil(isa.nr()) {
                let k = self.keys.view(self.pk, part, panel);
                multiply(queries, &k, &mut c, panel * isa.nr() - first, part > 0);
            }
        }
        let wide = self.values.padded();
        let scale = LOG2_E * if dot { self.p.scale } else { 1.0 };
        isa.run(Softmax { scores, scale, len, valid: &valid[..count], state, sums, wide });
        let (weights, kc) = if dot {
            for (line, pair) in scores.chunks_exact(LDA).zip(pairs.chunks_exact_mut(LDA)).take(count) {
                let pair: &mut [bf16] = cast_slice_mut(pair);
                narrow_for_dot(isa, &line[..len], &mut pair[..len]);
                pair[len] = bf16::ZERO;
            }
            (&*pairs, len.div_ceil(2))
        } else {
            (&*scores, len)
        };
        let mut c = Block::new(sums, wide, count, wide);
        for panel in 0..self.values.panels() {
            let v = Panel { kc, ..self.values.view(self.pv, block, panel) };
            multiply(weights, &v, &mut c, panel * isa.nr(), block > 0);
        }
    }

    /// The block's queries in lines per block of D: f32 times the scale, or pairs as they are.
    fn queries(&self, queries: &mut [f32]) {
        let rows = self.out.rows();
        for (block, lines) in queries.chunks_exact_mut(rows * LDA).enumerate() {
            let (d0, len) = self.keys.block(block);
            for (r, line) in lines.chunks_exact_mut(LDA).enumerate() {
                match self.q {
                    Slice::BF16(x) if self.keys.arith == Arith::Dot => {
                        let count = (2 * len).min(self.p.d - 2 * d0);
                        let pairs: &mut [bf16] = cast_slice_mut(line);
                        pairs[..count].copy_from_slice(&x[r * self.q_row + 2 * d0..][..count]);
                        pairs[count] = bf16::ZERO;
                    }
                    x => {
                        x.read(r * self.q_row + d0, &mut line[..len]);
                        line[..len].iter_mut().for_each(|y| *y *= self.p.scale);
                    }
                }
            }
        }
    }
}

/// Of one query: the largest score so far, and the sum of the weights relative to it.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

/// Scores to weights e^(score - maximum); where the maximum has grown, what was summed before is scaled down.
struct Softmax<'a> {
    scores: &'a mut [f32],
    /// log2 e, times the factor of the scores unless the queries have it already.
    scale: f32,
    len: usize,
    /// Keys that each query sees, of `len`. The others get weight 0.
    valid: &'a [usize],
    state: &'a mut [Running],
    sums: &'a mut [f32],
    wide: usize,
}

impl Kernel for Softmax<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (r, &valid) in self.valid.iter().enumerate() {
            let line = &mut self.scores[r * LDA..(r + 1) * LDA];
            let whole = valid.next_multiple_of(S::LANES);
            if self.len > whole {
                line[whole..self.len].fill(0.0);
            }
            if valid == 0 {
                continue;
            }
            line[valid..whole].fill(f32::NEG_INFINITY);
            let line = &mut line[..whole];
            let state = &mut self.state[r];
            let mut top = [s.splat(state.max); 2];
            for (i, x) in line.chunks_exact(S::LANES).enumerate() {
                top[i % 2] = s.max(s.load(x), top[i % 2]);
            }
            let max = s.reduce(s.max(top[0], top[1]), |a, b| if a > b { a } else { b });
            let (scale, shift) = (s.splat(self.scale), s.splat(-max * self.scale));
            let mut sum = s.splat(0.0);
            for x in line.chunks_exact_mut(S::LANES) {
                let weight = exp2_nonpositive(s, s.fma(s.load(x), scale, shift));
                sum = s.add(sum, weight);
                s.store(x, weight);
            }
            let sum = s.reduce(sum, |a, b| a + b);
            if max > state.max {
                let factor = if state.max == f32::NEG_INFINITY {
                    0.0
                } else {
                    ((state.max - max) * self.scale).exp2()
                };
                state.sum *= factor;
                let line = &mut self.sums[r * self.wide..(r + 1) * self.wide];
                if factor == 0.0 {
                    // The first block too, before which there may be anything in here, even NaN.
                    line.fill(0.0);
                } else {
                    line.iter_mut().for_each(|x| *x *= factor);
                }
                state.max = max;
            }
            state.sum += sum;
        }
    }
}

#[cfg(test)]
mod tests;
