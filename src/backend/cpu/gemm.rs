//! Matrix product C (M,N) = A (M,K) · W (N,K)ᵀ with an epilogue; a convolution is the same product, its A read in
//! place ([`Conv`]), so that there is no im2col buffer.
//!
//! Blocking after Goto and van de Geijn 2008 and BLIS: K is cut into blocks of at most [`KC`]; W is packed into panels
//! of `nr` columns, in which a register tile reads straight on; rows of A are copied, not transposed, into lines of
//! [`LDA`] floats. A tile adds its K block to C, and after the last one the block of C gets its epilogue while it is
//! in cache. Threads share M and N, never K.

mod rows;

pub use rows::{Conv, ConvShape, Dense, DenseT, Rows};

use super::math::{Act, activate_in_place_with};
use super::scratch::{scratch, scratch_line};
use super::simd::{Block, Grid, Isa, KC, Kernel, LDA, MAX_MR, MAX_NR, Panel, Simd, tile, transpose};
use rayon::prelude::*;

/// Up to this many rows A is packed whole and tasks own columns; above it W is packed whole and tasks own rows.
const FEW_ROWS: usize = 256;
/// Rows of one task, about: its packed A (528 · 4 bytes a row) stays in the second-level cache.
const ROWS: usize = 168;
/// Columns of one task, about.
const COLS: usize = 320;

/// How a matrix (N,K) lies in panels: K blocks one after the other, in each the panels of `nr` columns (the last may
/// be half as wide), in each k after k one line of columns. Padded columns are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Panels {
    pub(super) isa: Isa,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Length of a K block (the last is shorter). It depends on K alone: so do the bits of a product.
    pub(super) kc: usize,
}

impl Panels {
    /// K blocks of about equal length, at most `limit` (a multiple of `MAX_NR`, as their length is).
    pub(super) fn new(isa: Isa, n: usize, k: usize, limit: usize) -> Panels {
        let blocks = k.div_ceil(limit).max(1);
        Panels { isa, n, k, kc: k.div_ceil(blocks).next_multiple_of(MAX_NR).min(limit) }
    }

    /// Number of K blocks.
    pub(super) fn blocks(&self) -> usize {
        self.k.div_ceil(self.kc)
    }

    /// First k and length of a K block.
    pub(super) fn block(&self, block: usize) -> (usize, usize) {
        (block * self.kc, self.kc.min(self.k - block * self.kc))
    }

    /// Number of panels.
    pub(super) fn panels(&self) -> usize {
        self.n.div_ceil(self.isa.nr())
    }

    /// Columns of a panel, padding included.
    pub(super) fn width(&self, panel: usize) -> usize {
        let rest = self.n - panel * self.isa.nr();
        if rest > self.isa.lanes() { self.isa.nr() } else { self.isa.lanes() }
    }

    /// All columns, padding included.
    pub(super) fn padded(&self) -> usize {
        (self.panels() - 1) * self.isa.nr() + self.width(self.panels() - 1)
    }

    /// Floats in all panels.
    pub(super) fn len(&self) -> usize {
        self.padded() * self.k
    }

    /// Where a panel of a K block lies.
    pub(super) fn range(&self, block: usize, panel: usize) -> std::ops::Range<usize> {
        let (k0, kc) = self.block(block);
        let start = k0 * self.padded() + panel * self.isa.nr() * kc;
        start..start + self.width(panel) * kc
    }

    /// One panel of one K block of `packed`, which holds them all.
    pub(super) fn view<'a>(&self, packed: &'a [f32], block: usize, panel: usize) -> Panel<'a> {
        self.alone(&packed[self.range(block, panel)], block, panel)
    }

    /// The panel that was packed alone into `data`.
    fn alone<'a>(&self, data: &'a [f32], block: usize, panel: usize) -> Panel<'a> {
        Panel { isa: self.isa, data, width: self.width(panel), kc: self.block(block).1 }
    }

    /// Packs one panel of one K block from rows (N,K) or, `transposed`, (K,N), with `ld` floats between rows.
    pub(super) fn pack(
        &self,
        w: &[f32],
        transposed: bool,
        ld: usize,
        block: usize,
        panel: usize,
        out: &mut [f32],
    ) {
        let ((k0, kc), width, n0) = (self.block(block), self.width(panel), panel * self.isa.nr());
        let cols = width.min(self.n - n0);
        if !transposed {
            return transpose(self.isa, &w[n0 * ld + k0..], ld, cols, kc, width, out);
        }
        for (k, line) in out.chunks_exact_mut(width).take(kc).enumerate() {
            let from = (k0 + k) * ld + n0;
            line[..cols].copy_from_slice(&w[from..from + cols]);
            line[cols..].fill(0.0);
        }
    }

    /// Packs everything, in parallel.
    fn pack_all(&self, w: &[f32], transposed: bool, out: &mut [f32]) {
        let ld = if transposed { self.n } else { self.k };
        let mut rest = out;
        let mut parts = Vec::with_capacity(self.blocks() * self.panels());
        for block in 0..self.blocks() {
            for panel in 0..self.panels() {
                let (part, tail) = rest.split_at_mut(self.range(block, panel).len());
                parts.push((block, panel, part));
                rest = tail;
            }
        }
        parts
            .into_par_iter()
            .for_each(|(block, panel, part)| self.pack(w, transposed, ld, block, panel, part));
    }
}

/// Weights in the layout of the register tiles, to be packed once and used often.
pub struct PackedW {
    panels: Panels,
    data: Vec<f32>,
    start: usize,
}

impl PackedW {
    /// Packs w (N,K) for this machine's instruction set.
    pub fn new(w: &[f32], n: usize, k: usize) -> PackedW {
        Self::new_with(Isa::best(), w, n, k)
    }

    /// [`PackedW::new`] for a given instruction set.
    pub fn new_with(isa: Isa, w: &[f32], n: usize, k: usize) -> PackedW {
        assert!(
            w.len() == n * k && n * k > 0,
            "PackedW: w has {} elements, want {n} · {k}, not zero",
            w.len()
        );
        let panels = Panels::new(isa, n, k, KC);
        let (mut data, start) = scratch_line(panels.len());
        panels.pack_all(w, false, &mut data[start..start + panels.len()]);
        PackedW { panels, data, start }
    }

    /// (N, K)
    pub fn shape(&self) -> (usize, usize) {
        (self.panels.n, self.panels.k)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.len() * size_of::<f32>()
    }

    fn data(&self) -> &[f32] {
        &self.data[self.start..self.start + self.panels.len()]
    }
}

/// The right operand.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// (N,K), as linear (O,I) and convolution (O,KH,KW,I) weights lie.
    Raw(&'a [f32]),
    /// (K,N): a plain product A · B.
    Transposed(&'a [f32]),
    /// Packed before, for the same instruction set.
    Packed(&'a PackedW),
}

/// A vector per batch item, added to all its rows: the time embedding of a residual block.
#[derive(Clone, Copy)]
pub struct BatchAdd<'a> {
    /// (B,N), or (1,N) for all.
    pub data: &'a [f32],
    /// Rows of C per batch item, H'·W'.
    pub rows: usize,
}

/// What happens to a block of C when its sums are complete:
/// y = act(A·Wᵀ + bias\[n\] + batch\[m / rows, n\]) + residual\[m, n\].
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// (N)
    pub bias: Option<&'a [f32]>,
    /// See [`BatchAdd`].
    pub batch: Option<BatchAdd<'a>>,
    /// Activation.
    pub act: Act,
    /// (M,N)
    pub residual: Option<&'a [f32]>,
}

impl Epilogue<'_> {
    fn check(&self, m: usize, n: usize) {
        if let Some(bias) = self.bias {
            assert_eq!(bias.len(), n, "epilogue: length of bias");
        }
        if let Some(batch) = self.batch {
            let fits =
                batch.data.len() == n || (batch.rows > 0 && batch.data.len() == m.div_ceil(batch.rows) * n);
            assert!(fits, "epilogue: batch has {} elements for {m} rows of {n}", batch.data.len());
        }
        if let Some(residual) = self.residual {
            assert_eq!(residual.len(), m * n, "epilogue: length of residual");
        }
    }

    /// Finishes a block whose first element is (m0, n0) of a matrix with n columns.
    fn apply(&self, isa: Isa, block: &mut Block, m0: usize, n0: usize, n: usize) {
        for r in 0..block.rows() {
            let y = block.row(r);
            let cols = n0..n0 + y.len();
            let batch = self.batch.map(|b| {
                let row = if b.data.len() == n { 0 } else { (m0 + r) / b.rows };
                &b.data[row * n..][cols.clone()]
            });
            isa.run(AddTwo { y, a: self.bias.map(|b| &b[cols.clone()]), b: batch });
            activate_in_place_with(isa, self.act, y);
            isa.run(AddTwo { y, a: self.residual.map(|x| &x[(m0 + r) * n..][cols]), b: None });
        }
    }
}

/// y += a + b, each if there.
struct AddTwo<'a> {
    y: &'a mut [f32],
    a: Option<&'a [f32]>,
    b: Option<&'a [f32]>,
}

impl Kernel for AddTwo<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for x in [self.a, self.b].into_iter().flatten() {
            for (y, x) in self.y.iter_mut().zip(x) {
                *y += x;
            }
        }
    }
}

/// C block (+)= A lines (rows × kc, row stride LDA) · one packed panel, whose first column is column c0 of the block.
/// Rows are dealt evenly, so that no tile is left with one or two.
pub(super) fn multiply(a: &[f32], panel: &Panel, c: &mut Block, c0: usize, add: bool) {
    let (rows, width) = (c.rows(), panel.width);
    let tiles = rows.div_ceil(panel.isa.mr());
    let cols = width.min(c.cols() - c0);
    for t in 0..tiles {
        let (r0, r1) = (rows * t / tiles, rows * (t + 1) / tiles);
        if cols == width {
            tile(r1 - r0, &a[r0 * LDA..], panel, c, (r0, c0), add);
            continue;
        }
        // The last panel is wider than what is left of C: through a buffer.
        let mut edge = [0.0; MAX_MR * MAX_NR];
        let mut block = Block::new(&mut edge, MAX_NR, r1 - r0, width);
        tile(r1 - r0, &a[r0 * LDA..], panel, &mut block, (0, 0), false);
        for r in r0..r1 {
            let (sum, y) = (&block.row(r - r0)[..cols], &mut c.row(r)[c0..c0 + cols]);
            if add {
                y.iter_mut().zip(sum).for_each(|(y, x)| *y += x);
            } else {
                y.copy_from_slice(sum);
            }
        }
    }
}

/// out (M,N) = epilogue(A · Wᵀ). Bits do not depend on the number of threads, on M, or on whether W was packed
/// before. Panics if a length does not fit.
pub fn gemm(a: &impl Rows, w: Weights, n: usize, epilogue: &Epilogue, out: &mut [f32]) {
    gemm_with(Isa::best(), a, w, n, epilogue, out);
}

/// [`gemm`] on a given instruction set. Avx2 and Avx512 give the same bits without an activation.
pub fn gemm_with(isa: Isa, a: &impl Rows, w: Weights, n: usize, epilogue: &Epilogue, out: &mut [f32]) {
    let (m, k) = (a.m(), a.k());
    assert_eq!(out.len(), m * n, "gemm: length of the output, ({m}, {n})");
    epilogue.check(m, n);
    match w {
        Weights::Raw(w) | Weights::Transposed(w) => {
            assert_eq!(w.len(), n * k, "gemm: length of w, {n} · {k}")
        }
        Weights::Packed(w) => {
            assert_eq!(w.panels, Panels::new(isa, n, k, KC), "gemm: packed for another product")
        }
    }
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0, "gemm: K is 0");
    let panels = Panels::new(isa, n, k, KC);
    if m <= FEW_ROWS {
        return few_rows(panels, a, w, epilogue, out);
    }
    let (raw, transposed) = match w {
        Weights::Packed(w) => return many_rows(panels, a, w.data(), epilogue, out),
        Weights::Raw(w) => (w, false),
        Weights::Transposed(w) => (w, true),
    };
    scratch(panels.len(), |packed| {
        panels.pack_all(raw, transposed, packed);
        many_rows(panels, a, packed, epilogue, out);
    });
}

/// Tasks own rows × columns of C and pack their rows of A, K block by K block.
fn many_rows(panels: Panels, a: &impl Rows, packed: &[f32], epilogue: &Epilogue, out: &mut [f32]) {
    let (m, n, isa) = (a.m(), panels.n, panels.isa);
    let mb = m.div_ceil(m.div_ceil(ROWS));
    let nb = n.div_ceil(n.div_ceil(COLS)).next_multiple_of(isa.nr());
    let grid = Grid::new(out, m, n, mb, nb);
    (0..grid.count()).into_par_iter().with_max_len(1).for_each(|task| {
        let (m0, n0, mut c) = grid.take(task);
        let first = n0 / isa.nr();
        let last = (n0 + c.cols()).div_ceil(isa.nr());
        scratch(c.rows() * LDA, |lines| {
            for block in 0..panels.blocks() {
                let (k0, kc) = panels.block(block);
                a.pack(m0, c.rows(), k0, kc, lines, LDA);
                for panel in first..last {
                    let b = panels.view(packed, block, panel);
                    multiply(lines, &b, &mut c, panel * isa.nr() - n0, block > 0);
                }
            }
        });
        epilogue.apply(isa, &mut c, m0, n0, n);
    });
}

/// A is packed whole; tasks own one panel's columns of C and pack their part of W, unless it is packed already.
fn few_rows(panels: Panels, a: &impl Rows, w: Weights, epilogue: &Epilogue, out: &mut [f32]) {
    let (m, n, isa) = (a.m(), panels.n, panels.isa);
    scratch(panels.blocks() * m * LDA, |lines| {
        lines.par_chunks_mut(m * LDA).enumerate().for_each(|(block, lines)| {
            let (k0, kc) = panels.block(block);
            a.pack(0, m, k0, kc, lines, LDA);
        });
        let lines = &*lines;
        let grid = Grid::new(out, m, n, m, isa.nr());
        (0..grid.count()).into_par_iter().with_max_len(1).for_each(|panel| {
            let (_, n0, mut c) = grid.take(panel);
            scratch(KC * MAX_NR, |buffer| {
                for block in 0..panels.blocks() {
                    let b = match w {
                        Weights::Packed(w) => panels.view(w.data(), block, panel),
                        Weights::Raw(w) => {
                            panels.pack(w, false, panels.k, block, panel, buffer);
                            panels.alone(buffer, block, panel)
                        }
                        Weights::Transposed(w) => {
                            panels.pack(w, true, panels.n, block, panel, buffer);
                            panels.alone(buffer, block, panel)
                        }
                    };
                    multiply(&lines[block * m * LDA..], &b, &mut c, 0, block > 0);
                }
            });
            epilogue.apply(isa, &mut c, 0, n0, n);
        });
    });
}

#[cfg(test)]
mod tests;
