//! Attention softmax(scale · Q Kᵀ) V without a T × S matrix (online softmax: Milakov and Gimelshein 2018; blocks of
//! queries and keys as in FlashAttention, Dao et al. 2022), on the register tiles of the matrix product.
//!
//! K and V are packed into panels once per head. A task owns a block of queries of one head: for each block of keys it
//! forms scores, turns them into weights relative to the running maximum, and adds weights · V to its output.

use super::gemm::{Panels, multiply};
use super::math::exp_nonpositive;
use super::scratch::scratch;
use super::simd::{Block, Grid, Isa, KC, Kernel, LDA, MAX_MR, Panel, Simd};
use rayon::prelude::*;
use std::array::from_fn;
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
    pub data: &'a [f32],
    /// Floats from one token to the next.
    pub row: usize,
    /// Floats from one batch item to the next.
    pub batch: usize,
}

impl<'a> Heads<'a> {
    /// A contiguous (B, tokens, width) with width = N·D.
    pub fn new(data: &'a [f32], tokens: usize, width: usize) -> Heads<'a> {
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

/// out (B,T,N·D) = softmax(scale · Q Kᵀ) V per batch item and head. Bits do not depend on the number of threads.
/// A row with a NaN score, or with nothing but -∞, is NaN. Panics if a length does not fit or D is over 1024.
pub fn attention(p: &Attention, q: Heads, k: Heads, v: Heads, out: &mut [f32]) {
    attention_with(Isa::best(), p, q, k, v, out);
}

/// [`attention`] on a given instruction set.
pub fn attention_with(isa: Isa, p: &Attention, q: Heads, k: Heads, v: Heads, out: &mut [f32]) {
    let width = p.heads * p.d;
    assert_eq!(out.len(), p.b * p.t * width, "attention: length of the output");
    if out.is_empty() {
        return;
    }
    assert!(p.d <= 1024, "attention: head size {}, at most 1024", p.d);
    if p.s == 0 {
        return out.fill(0.0);
    }
    q.check("q", p.b, p.t, width);
    k.check("k", p.b, p.s, width);
    v.check("v", p.b, p.s, width);
    let (keys, values) = (Panels::new(isa, p.s, p.d, KC), Panels::new(isa, p.d, p.s, KEYS));
    let each = keys.len() + values.len();
    let group = (PACKED / (each * p.heads)).clamp(1, p.b);
    for (g, out) in out.chunks_mut(group * p.t * width).enumerate() {
        let (b0, items) = (g * group, out.len() / (p.t * width));
        scratch(each * p.heads * items, |packed| {
            packed.par_chunks_mut(each).enumerate().for_each(|(i, packed)| {
                let (b, head) = (b0 + i / p.heads, i % p.heads);
                let (pk, pv) = packed.split_at_mut(keys.len());
                pack(keys, &k.data[b * k.batch + head * p.d..], false, k.row, pk);
                pack(values, &v.data[b * v.batch + head * p.d..], true, v.row, pv);
            });
            let packed = &*packed;
            let block = p.t.div_ceil(p.t.div_ceil(QUERIES));
            let grids: Vec<Grid> =
                out.chunks_mut(p.t * width).map(|out| Grid::new(out, p.t, width, block, p.d)).collect();
            let tasks = grids[0].count();
            (0..items * tasks).into_par_iter().with_max_len(1).for_each(|i| {
                let item = i / tasks;
                // Head by head, so that the tasks at work at one time share a head's keys and values.
                let blocks = tasks / p.heads;
                let (head, block) = (i % tasks / blocks, i % blocks);
                let (t0, _, out) = grids[item].take(block * p.heads + head);
                let packed = &packed[(item * p.heads + head) * each..][..each];
                let (pk, pv) = packed.split_at(keys.len());
                let queries = &q.data[(b0 + item) * q.batch + t0 * q.row + head * p.d..];
                Task { p, q: queries, q_row: q.row, t0, out, keys, values, pk, pv }.run();
            });
        });
    }
}

fn pack(panels: Panels, src: &[f32], transposed: bool, ld: usize, out: &mut [f32]) {
    for block in 0..panels.blocks() {
        for panel in 0..panels.panels() {
            panels.pack(src, transposed, ld, block, panel, &mut out[panels.range(block, panel)]);
        }
    }
}

/// A block of queries of one head.
struct Task<'a> {
    p: &'a Attention,
    /// From the block's first query on.
    q: &'a [f32],
    q_row: usize,
    t0: usize,
    out: Block<'a>,
    keys: Panels,
    values: Panels,
    pk: &'a [f32],
    pv: &'a [f32],
}

impl Task<'_> {
    fn run(mut self) {
        let isa = self.keys.isa;
        let (rows, d_blocks, wide) = (self.out.rows(), self.keys.blocks(), self.values.padded());
        scratch((d_blocks * rows + MAX_MR) * LDA + rows * wide, |buffer| {
            let (queries, buffer) = buffer.split_at_mut(d_blocks * rows * LDA);
            let (scores, sums) = buffer.split_at_mut(MAX_MR * LDA);
            self.scale_queries(queries);
            let mut state = [Running { max: f32::NEG_INFINITY, sum: 0.0 }; QUERIES];
            // Blocks of keys outside, so that a block's K and V stay in the second-level cache for all queries.
            for block in 0..self.values.blocks() {
                let tiles = rows.div_ceil(isa.mr());
                for tile in 0..tiles {
                    let range = rows * tile / tiles..rows * (tile + 1) / tiles;
                    let (queries, sums) = (&queries[range.start * LDA..], &mut sums[range.start * wide..]);
                    self.step(block, range.clone(), queries, scores, &mut state[range], sums);
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
        scores: &mut [f32],
        state: &mut [Running],
        sums: &mut [f32],
    ) {
        let isa = self.keys.isa;
        let (first, len) = self.values.block(block);
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
        isa.run(Softmax { scores, len, valid: &valid[..count], state, sums, wide });
        let mut c = Block::new(sums, wide, count, wide);
        for panel in 0..self.values.panels() {
            let v = Panel { kc: len, ..self.values.view(self.pv, block, panel) };
            multiply(scores, &v, &mut c, panel * isa.nr(), block > 0);
        }
    }

    /// The block's queries times the scale, in lines per block of D.
    fn scale_queries(&self, queries: &mut [f32]) {
        let rows = self.out.rows();
        for (block, lines) in queries.chunks_exact_mut(rows * LDA).enumerate() {
            let (d0, len) = self.keys.block(block);
            for (r, line) in lines.chunks_exact_mut(LDA).enumerate() {
                let from = r * self.q_row + d0;
                line.iter_mut().zip(&self.q[from..from + len]).for_each(|(y, x)| *y = x * self.p.scale);
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
            let shift = s.splat(max);
            let mut sum = s.splat(0.0);
            for x in line.chunks_exact_mut(S::LANES) {
                let weight = exp_nonpositive(s, s.sub(s.load(x), shift));
                sum = s.add(sum, weight);
                s.store(x, weight);
            }
            let sum = s.reduce(sum, |a, b| a + b);
            if max > state.max {
                let factor = if state.max == f32::NEG_INFINITY { 0.0 } else { (state.max - max).exp() };
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
mod tests {
    use super::super::simd::tests::{assert_close, assert_threads_agree, random};
    use super::*;

    /// In f64: the result, and its bound before the factor 8 · 2^-23. An error of a score, a share of Σ|q||k| · scale,
    /// moves its weight by as much.
    fn spec(p: &Attention, q: Heads, k: Heads, v: Heads) -> (Vec<f64>, Vec<f64>) {
        let width = p.heads * p.d;
        let (mut out, mut bound) = (vec![0.0; p.b * p.t * width], vec![0.0; p.b * p.t * width]);
        for i in 0..p.b * p.t * p.heads {
            let (b, t, head) = (i / (p.t * p.heads), i / p.heads % p.t, i % p.heads);
            let row = |x: &Heads, t: usize| x.data[b * x.batch + t * x.row + head * p.d..][..p.d].to_vec();
            let q = row(&q, t);
            let seen: Vec<usize> = (0..p.s)
                .filter(|&s| !p.causal || s as isize <= t as isize + p.s as isize - p.t as isize)
                .collect();
            let products = |s: usize| -> Vec<f64> {
                q.iter().zip(row(&k, s)).map(|(&q, k)| q as f64 * k as f64 * p.scale as f64).collect()
            };
            let scores: Vec<f64> = seen.iter().map(|&s| products(s).iter().sum()).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
            for (score, &s) in scores.iter().zip(&seen) {
                let weight = (score - top).exp() / total;
                let share = 1.0 + products(s).iter().map(|x| x.abs()).sum::<f64>();
                for (j, v) in row(&v, s).into_iter().enumerate() {
                    out[i * p.d + j] += weight * v as f64;
                    bound[i * p.d + j] += weight * (v as f64).abs() * share;
                }
            }
        }
        (out, bound)
    }

    fn inputs(p: &Attention) -> [Vec<f32>; 3] {
        let width = p.heads * p.d;
        [random(p.b * p.t * width, 1), random(p.b * p.s * width, 2), random(p.b * p.s * width, 3)]
    }

    #[test]
    fn attention_is_right() {
        // (B, T, S, N, D)
        let shapes = [
            (1, 1, 1, 1, 1),
            (1, 3, 1, 2, 5),
            (2, 5, 7, 3, 4),
            (2, 64, 64, 2, 40),
            (1, 77, 77, 2, 64),
            (3, 130, 77, 2, 40),
            (1, 15, 600, 1, 33),
            (1, 127, 257, 1, 80),
            (1, 260, 512, 1, 17),
            (1, 9, 40, 1, 520),
            (1, 600, 15, 1, 16),
            (1, 4, 300, 1, 1024),
        ];
        for (b, t, s, heads, d) in shapes {
            for causal in [false, true] {
                let p = Attention { b, t, s, heads, d, scale: 1.0 / (d as f32).sqrt(), causal };
                let [q, k, v] = inputs(&p);
                let [q, k, v] = [
                    Heads::new(&q, t, heads * d),
                    Heads::new(&k, s, heads * d),
                    Heads::new(&v, s, heads * d),
                ];
                let (want, bound) = spec(&p, q, k, v);
                for &isa in Isa::available() {
                    let mut out = vec![f32::NAN; want.len()];
                    attention_with(isa, &p, q, k, v, &mut out);
                    assert_close(&out, &want, &bound, &format!("{isa:?} {p:?}"));
                }
            }
        }
    }

    /// Scores of some hundreds that grow along the keys: the running maximum moves in every block.
    #[test]
    fn large_and_growing_scores_do_not_overflow() {
        let p = Attention { b: 1, t: 20, s: 900, heads: 1, d: 8, scale: 1.0, causal: false };
        let [q, mut k, v] = inputs(&p);
        k.iter_mut().enumerate().for_each(|(i, k)| *k *= (i / 8) as f32);
        let [q, k, v] = [Heads::new(&q, 20, 8), Heads::new(&k, 900, 8), Heads::new(&v, 900, 8)];
        let (want, bound) = spec(&p, q, k, v);
        for &isa in Isa::available() {
            let mut out = vec![f32::NAN; want.len()];
            attention_with(isa, &p, q, k, v, &mut out);
            // Scores of 1000 carry errors of 1e-4: the bound per element knows, one in norm does not.
            for (i, got) in out.iter().enumerate() {
                let error = (*got as f64 - want[i]).abs();
                assert!(
                    error <= 8.0 * f64::from(f32::EPSILON) * bound[i],
                    "{isa:?} at {i}: {got}, want {}",
                    want[i]
                );
            }
        }
    }

    #[test]
    fn a_fused_projection_is_read_in_place() {
        let (b, t, heads, d) = (2, 33, 3, 20);
        let p = Attention { b, t, s: t, heads, d, scale: 0.2, causal: false };
        let width = heads * d;
        let fused = random(b * t * 3 * width, 4);
        let part = |i: usize| Heads { data: &fused[i * width..], row: 3 * width, batch: t * 3 * width };
        let copy = |i: usize| -> Vec<f32> {
            fused.chunks(3 * width).flat_map(|row| row[i * width..(i + 1) * width].to_vec()).collect()
        };
        let (q, k, v) = (copy(0), copy(1), copy(2));
        let (mut one, mut two) = (vec![0.0; b * t * width], vec![1.0; b * t * width]);
        attention(&p, part(0), part(1), part(2), &mut one);
        let [q, k, v] = [&q, &k, &v].map(|x| Heads::new(x, t, width));
        attention(&p, q, k, v, &mut two);
        assert_eq!(one, two);
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let p = Attention { b: 3, t: 200, s: 300, heads: 2, d: 40, scale: 0.16, causal: false };
        let [q, k, v] = inputs(&p);
        for &isa in Isa::available() {
            assert_threads_agree(&format!("{isa:?}"), || {
                let mut out = vec![f32::NAN; p.b * p.t * p.heads * p.d];
                let [q, k, v] = [Heads::new(&q, 200, 80), Heads::new(&k, 300, 80), Heads::new(&v, 300, 80)];
                attention_with(isa, &p, q, k, v, &mut out);
                out
            });
        }
    }

    #[test]
    fn a_nan_shows_in_its_row_alone() {
        let p = Attention { b: 1, t: 30, s: 300, heads: 1, d: 16, scale: 0.25, causal: false };
        let [mut q, k, v] = inputs(&p);
        q[7 * 16] = f32::NAN;
        for &isa in Isa::available() {
            let mut out = vec![0.0; 30 * 16];
            let [q, k, v] = [Heads::new(&q, 30, 16), Heads::new(&k, 300, 16), Heads::new(&v, 300, 16)];
            attention_with(isa, &p, q, k, v, &mut out);
            for (i, x) in out.iter().enumerate() {
                assert_eq!(x.is_nan(), i / 16 == 7, "{isa:?} at {i}: {x}");
            }
        }
    }

    #[test]
    fn no_keys_give_zeros() {
        let p = Attention { b: 1, t: 2, s: 0, heads: 1, d: 3, scale: 1.0, causal: false };
        let mut out = [f32::NAN; 6];
        attention(&p, Heads::new(&[1.0; 6], 2, 3), Heads::new(&[], 0, 3), Heads::new(&[], 0, 3), &mut out);
        assert_eq!(out, [0.0; 6]);
    }
}
