//! Matrix product C (M,N) = A (M,K) · W (N,K)ᵀ with an epilogue; a convolution is the same product, its A read in
//! place ([`Conv`]), so that there is no im2col buffer.
//!
//! Blocking after Goto and van de Geijn 2008 and BLIS: K is cut into blocks of at most [`KC`] words; W lies in panels
//! of `nr` columns, in which a register tile reads straight on; rows of A are copied, not transposed, into lines of
//! [`LDA`] words. A tile adds its K block to C, and after the last one the block of C gets its epilogue while it is in
//! cache. Threads share M and N, never K. 16-bit operands are multiplied in pairs where the machine can, else widened
//! as they are packed; sums are f32, and rounded once.

mod panels;
mod rows;
mod serial;

pub use panels::{Packed, PackedLayout};
pub(super) use panels::{Panels, arith};
pub use rows::{Conv, ConvShape, Dense, Lane, Rows, Transposed};
pub use serial::{Mat, product};

use super::math::{Act, activate_in_place_with};
use super::scratch::scratch;
use super::simd::{Arith, Block, Grid, Isa, KC, Kernel, LDA, MAX_MR, MAX_NR, Panel, Simd, tile};
use super::slice::{Element, Slice, SliceMut, each_mut};
use crate::tensor::DType;
use bytemuck::cast_slice_mut;
use half::bf16;
use rayon::prelude::*;

/// Up to this many rows A is packed whole and tasks own columns; above it tasks own rows and columns.
const FEW_ROWS: usize = 256;
/// Rows of one task, about: its packed A (528 · 4 bytes a row) stays in the second-level cache.
const ROWS: usize = 168;
/// Columns of one task, about.
const COLS: usize = 320;

/// The right operand (N,K).
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// As linear (O,I) and convolution (O,KH,KW,I) weights are written.
    Raw(Slice<'a>),
    /// Packed before, for the same instruction set.
    Packed(Packed<'a>),
    /// A convolution's input (pixels, KH·KW·C), transposed: W\[n, k\] is column n of pixel k. Packed as it is used.
    Pixels(Conv<'a>),
}

/// Most elements of A, or of pixels, that are packed whole.
const WHOLE: usize = 1 << 24;

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
    pub residual: Option<Slice<'a>>,
}

impl<'a> Epilogue<'a> {
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

    /// What is added to row m, from column n0 on.
    pub(super) fn batch_row(&self, m: usize, n0: usize, n: usize) -> Option<&'a [f32]> {
        let b = self.batch?;
        let row = if b.data.len() == n { 0 } else { m / b.rows };
        Some(&b.data[row * n + n0..])
    }

    /// Finishes a block whose first element is (m0, n0) of a matrix with n columns.
    fn apply(&self, isa: Isa, block: &mut Block, m0: usize, n0: usize, n: usize) {
        for r in 0..block.rows() {
            let y = block.row(r);
            let batch = self.batch_row(m0 + r, n0, n);
            isa.run(AddTwo { y, a: self.bias.map(|b| &b[n0..]), b: batch });
            activate_in_place_with(isa, self.act, y);
            match self.residual {
                None => {}
                Some(Slice::F32(x)) => isa.run(AddTwo { y, a: Some(&x[(m0 + r) * n + n0..]), b: None }),
                Some(x) => {
                    let mut wide = [0.0; 64];
                    for (i, y) in y.chunks_mut(wide.len()).enumerate() {
                        let wide = &mut wide[..y.len()];
                        x.read((m0 + r) * n + n0 + i * 64, wide);
                        isa.run(AddTwo { y, a: Some(wide), b: None });
                    }
                }
            }
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

/// out (M,N) = epilogue(A · Wᵀ), in the type of out. Bits do not depend on the number of threads, on M, or on whether W
/// was packed before. Panics if a length or a type does not fit.
pub fn gemm(a: &impl Rows, w: Weights, n: usize, epilogue: &Epilogue, out: SliceMut) {
    gemm_with(Isa::best(), a, w, n, epilogue, out);
}

/// [`gemm`] on a given instruction set. Avx2 and Avx512 give the same bits in f32 without an activation.
pub fn gemm_with(isa: Isa, a: &impl Rows, w: Weights, n: usize, epilogue: &Epilogue, out: SliceMut) {
    each_mut!(out, y => typed(isa, a, w, n, epilogue, y))
}

fn typed<T: Element>(isa: Isa, a: &impl Rows, w: Weights, n: usize, epilogue: &Epilogue, out: &mut [T]) {
    let (m, k) = (a.m(), a.k());
    assert_eq!(out.len(), m * n, "gemm: length of the output, ({m}, {n})");
    epilogue.check(m, n);
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0, "gemm: K is 0");
    let layout = PackedLayout::new_with(isa, a.dtype(), n, k);
    match w {
        Weights::Raw(w) => {
            assert!(w.len() == n * k && w.dtype() == a.dtype(), "gemm: length or type of w, ({n}, {k})")
        }
        Weights::Packed(w) => assert_eq!(*w.layout(), layout, "gemm: packed for another product"),
        Weights::Pixels(x) => {
            assert!(
                x.m() == k && x.k() == n && x.dtype() == a.dtype(),
                "gemm: size or type of pixels, ({n}, {k})"
            )
        }
    }
    let panels = Panels::new(isa, arith(isa, a.dtype()), n, k, KC);
    let product = Product { panels, a, n, k, epilogue };
    match w {
        Weights::Pixels(x) if m > FEW_ROWS && panels.len() <= WHOLE => scratch(panels.len(), |packed| {
            panels.pack_all_pixels(&x, packed);
            product.many_rows(|block, panel, f| f(&panels.view(packed, block, panel)), out);
        }),
        Weights::Pixels(x) if m > FEW_ROWS || m * k > WHOLE => product.many_rows(
            |block, panel, f| {
                scratch(KC * MAX_NR, |buffer| {
                    panels.pack_pixels(&x, block, panel, buffer);
                    f(&panels.alone(buffer, block, panel));
                });
            },
            out,
        ),
        _ if m <= FEW_ROWS => product.few_rows(w, out),
        Weights::Pixels(_) => unreachable!("taken by the first arm"),
        Weights::Packed(w) => product.many_rows(|block, panel, f| with_panel(&w, block, panel, f), out),
        Weights::Raw(w) => scratch(panels.len(), |packed| {
            panels.pack_all(w, k, packed);
            product.many_rows(|block, panel, f| f(&panels.view(packed, block, panel)), out);
        }),
    }
}

/// Bytes of working memory that [`gemm`] takes for (M,N,K) and a packed weight, all threads together.
pub fn working_bytes(dtype: DType, m: usize, n: usize, k: usize) -> usize {
    if [m, n, k].contains(&0) {
        return 0;
    }
    let isa = Isa::best();
    let (panels, threads) = (Panels::new(isa, arith(isa, dtype), n, k, KC), rayon::current_num_threads());
    let narrow = (dtype != DType::F32) as usize;
    let words = if m <= FEW_ROWS {
        panels.blocks() * m * LDA + threads * (KC * MAX_NR + narrow * m * isa.nr())
    } else {
        let (rows, cols) = (m.div_ceil(m.div_ceil(ROWS)), n.min(COLS + MAX_NR));
        threads * (rows * LDA + narrow * (KC * MAX_NR + rows * cols))
    };
    words * size_of::<f32>()
}

/// What [`gemm`] takes beside [`working_bytes`] for packing [`Weights::Pixels`].
pub fn pixels_bytes(m: usize, n: usize, k: usize) -> usize {
    let words = n.saturating_add(MAX_NR).saturating_mul(k);
    if m > FEW_ROWS && words <= WHOLE { words * size_of::<f32>() } else { 0 }
}

fn with_panel(w: &Packed, block: usize, panel: usize, f: &mut dyn FnMut(&Panel)) {
    scratch(KC * MAX_NR, |buffer| f(&w.panel(block, panel, buffer)));
}

struct Product<'a, A> {
    panels: Panels,
    a: &'a A,
    n: usize,
    /// Elements.
    k: usize,
    epilogue: &'a Epilogue<'a>,
}

impl<A: Rows> Product<'_, A> {
    /// Copies a K block of some rows of A into lines.
    fn lines(&self, m0: usize, rows: usize, block: usize, lines: &mut [f32]) {
        let (k0, kc) = self.panels.block(block);
        if self.panels.arith == Arith::Fma {
            return self.a.pack(m0, rows, k0, kc, lines, LDA);
        }
        let pairs: &mut [bf16] = cast_slice_mut(lines);
        let count = (2 * kc).min(self.k - 2 * k0);
        self.a.pack(m0, rows, 2 * k0, count, pairs, 2 * LDA);
        if count < 2 * kc {
            (0..rows).for_each(|r| pairs[r * 2 * LDA + count] = bf16::ZERO);
        }
    }

    /// Tasks own rows × columns of C and pack their rows of A, K block by K block. `with` hands over a panel.
    fn many_rows<T: Element>(
        &self,
        with: impl Fn(usize, usize, &mut dyn FnMut(&Panel)) + Sync,
        out: &mut [T],
    ) {
        let (m, n, isa, panels) = (self.a.m(), self.n, self.panels.isa, &self.panels);
        let mb = m.div_ceil(m.div_ceil(ROWS));
        let nb = n.div_ceil(n.div_ceil(COLS)).next_multiple_of(isa.nr());
        let grid = Grid::new(out, m, n, mb, nb);
        (0..grid.count()).into_par_iter().with_max_len(1).for_each(|task| {
            let (m0, n0, c) = grid.take(task);
            let first = n0 / isa.nr();
            let last = (n0 + c.cols()).div_ceil(isa.nr());
            T::fill(c, |c| {
                scratch(c.rows() * LDA, |lines| {
                    for block in 0..panels.blocks() {
                        self.lines(m0, c.rows(), block, lines);
                        for panel in first..last {
                            with(block, panel, &mut |b| {
                                multiply(lines, b, c, panel * isa.nr() - n0, block > 0);
                            });
                        }
                    }
                });
                self.epilogue.apply(isa, c, m0, n0, n);
            });
        });
    }

    /// A is packed whole; tasks own one panel's columns of C and pack their part of W, unless it is packed already.
    fn few_rows<T: Element>(&self, w: Weights, out: &mut [T]) {
        let (m, n, isa, panels) = (self.a.m(), self.n, self.panels.isa, &self.panels);
        scratch(panels.blocks() * m * LDA, |lines| {
            lines
                .par_chunks_mut(m * LDA)
                .enumerate()
                .for_each(|(block, lines)| self.lines(0, m, block, lines));
            let lines = &*lines;
            let grid = Grid::new(out, m, n, m, isa.nr());
            (0..grid.count()).into_par_iter().with_max_len(1).for_each(|panel| {
                let (_, n0, c) = grid.take(panel);
                T::fill(c, |c| {
                    scratch(KC * MAX_NR, |buffer| {
                        for block in 0..panels.blocks() {
                            let b = match &w {
                                Weights::Packed(w) => w.panel(block, panel, buffer),
                                Weights::Pixels(x) => {
                                    panels.pack_pixels(x, block, panel, buffer);
                                    panels.alone(buffer, block, panel)
                                }
                                Weights::Raw(w) => {
                                    panels.pack(*w, (self.k, self.k), block, panel, buffer);
                                    panels.alone(buffer, block, panel)
                                }
                            };
                            multiply(&lines[block * m * LDA..], &b, c, 0, block > 0);
                        }
                    });
                    self.epilogue.apply(isa, c, 0, n0, n);
                });
            });
        });
    }
}

#[cfg(test)]
mod tests;
