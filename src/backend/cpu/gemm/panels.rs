//! The right operand in the order in which the register tiles read it.

use super::rows::{Conv, Rows};
use crate::backend::cpu::math;
use crate::backend::cpu::scratch::scratch;
use crate::backend::cpu::simd::{Arith, Isa, KC, MAX_NR, Panel, transpose};
use crate::backend::cpu::slice::Slice;
use crate::tensor::DType;
use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// How a matrix (N,K) lies in panels: panel after panel of `nr` rows of the matrix (the last may be half as wide), in
/// each k after k one line of them. Rows that pad the last panel are zero. K counts words, see [`Arith`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend::cpu) struct Panels {
    pub(in crate::backend::cpu) isa: Isa,
    pub(in crate::backend::cpu) arith: Arith,
    pub(in crate::backend::cpu) n: usize,
    pub(in crate::backend::cpu) k: usize,
    /// Length of a K block (the last is shorter). It depends on K alone: so do the bits of a product.
    pub(in crate::backend::cpu) kc: usize,
}

impl Panels {
    /// K blocks of about equal length, at most `limit` words (a multiple of `MAX_NR`, as their length is).
    pub(in crate::backend::cpu) fn new(isa: Isa, arith: Arith, n: usize, k: usize, limit: usize) -> Panels {
        let k = if arith == Arith::Dot { k.div_ceil(2) } else { k };
        let blocks = k.div_ceil(limit).max(1);
        Panels { isa, arith, n, k, kc: k.div_ceil(blocks).next_multiple_of(MAX_NR).clamp(MAX_NR, limit) }
    }

    /// Number of K blocks.
    pub(in crate::backend::cpu) fn blocks(&self) -> usize {
        self.k.div_ceil(self.kc)
    }

    /// First word and length of a K block.
    pub(in crate::backend::cpu) fn block(&self, block: usize) -> (usize, usize) {
        (block * self.kc, self.kc.min(self.k - block * self.kc))
    }

    /// Number of panels.
    pub(in crate::backend::cpu) fn panels(&self) -> usize {
        self.n.div_ceil(self.isa.nr())
    }

    /// Words of a line of a panel, padding included.
    pub(in crate::backend::cpu) fn width(&self, panel: usize) -> usize {
        let rest = self.n - panel * self.isa.nr();
        if rest > self.isa.lanes() { self.isa.nr() } else { self.isa.lanes() }
    }

    /// All rows, padding included.
    pub(in crate::backend::cpu) fn padded(&self) -> usize {
        (self.panels() - 1) * self.isa.nr() + self.width(self.panels() - 1)
    }

    /// Words in all panels.
    pub(in crate::backend::cpu) fn len(&self) -> usize {
        self.padded() * self.k
    }

    /// Where lines `k` of a panel lie.
    fn lines(&self, panel: usize, k: Range<usize>) -> Range<usize> {
        let (start, width) = (panel * self.isa.nr() * self.k, self.width(panel));
        start + k.start * width..start + k.end * width
    }

    /// Where a K block of a panel lies.
    pub(in crate::backend::cpu) fn range(&self, block: usize, panel: usize) -> Range<usize> {
        let (k0, kc) = self.block(block);
        self.lines(panel, k0..k0 + kc)
    }

    /// One K block of one panel of `packed`, which holds them all.
    pub(in crate::backend::cpu) fn view<'a>(
        &self,
        packed: &'a [f32],
        block: usize,
        panel: usize,
    ) -> Panel<'a> {
        self.alone(&packed[self.range(block, panel)], block, panel)
    }

    /// The K block of a panel that lies alone in `data`.
    pub(in crate::backend::cpu) fn alone<'a>(
        &self,
        data: &'a [f32],
        block: usize,
        panel: usize,
    ) -> Panel<'a> {
        Panel { isa: self.isa, arith: self.arith, data, width: self.width(panel), kc: self.block(block).1 }
    }

    /// Packs one K block of one panel from w, whose rows are `ld` elements apart and have `elements` elements.
    pub(in crate::backend::cpu) fn pack(
        &self,
        w: Slice,
        (elements, ld): (usize, usize),
        block: usize,
        panel: usize,
        out: &mut [f32],
    ) {
        let ((k0, kc), width, n0) = (self.block(block), self.width(panel), panel * self.isa.nr());
        let cols = width.min(self.n - n0);
        let words = |w: &[f32], ld: usize, out: &mut [f32]| transpose(self.isa, w, ld, cols, kc, width, out);
        match (w, self.arith) {
            (Slice::F32(w), Arith::Fma) => words(&w[n0 * ld + k0..], ld, out),
            (w, Arith::Fma) => scratch(cols * kc, |wide| {
                for (r, wide) in wide.chunks_exact_mut(kc).enumerate() {
                    w.read((n0 + r) * ld + k0, wide);
                }
                words(wide, kc, out);
            }),
            (Slice::BF16(w), Arith::Dot) => {
                let w = &w[n0 * ld + 2 * k0..];
                if ld % 2 == 0
                    && elements % 2 == 0
                    && let Ok(pairs) = bytemuck::try_cast_slice(&w[..w.len() / 2 * 2])
                {
                    return words(pairs, ld / 2, out);
                }
                scratch(cols * kc, |pairs| {
                    let count = (2 * kc).min(elements - 2 * k0);
                    for (r, line) in cast_slice_mut::<f32, bf16>(pairs).chunks_exact_mut(2 * kc).enumerate() {
                        line[..count].copy_from_slice(&w[r * ld..r * ld + count]);
                        line[count..].fill(bf16::ZERO);
                    }
                    words(pairs, kc, out);
                });
            }
            (w, Arith::Dot) => unreachable!("dot products are of bf16, not {}", w.dtype()),
        }
    }

    /// Packs one K block of one panel of pixels, see [`Weights::Pixels`](super::Weights::Pixels): lines are parts of rows.
    pub(super) fn pack_pixels(&self, x: &Conv, block: usize, panel: usize, out: &mut [f32]) {
        let ((k0, kc), width, n0) = (self.block(block), self.width(panel), panel * self.isa.nr());
        let cols = width.min(self.n - n0);
        if self.arith == Arith::Fma {
            if cols < width {
                out[..kc * width].fill(0.0);
            }
            return x.pack(k0, kc, n0, cols, out, width);
        }
        scratch(kc * cols, |rows| {
            let (rows, count) = (cast_slice_mut::<f32, bf16>(rows), (2 * kc).min(x.m() - 2 * k0));
            x.pack(2 * k0, count, n0, cols, rows, cols);
            rows[count * cols..].fill(bf16::ZERO);
            let words = cast_slice_mut::<f32, bf16>(&mut out[..kc * width]);
            for (line, two) in words.chunks_exact_mut(2 * width).zip(rows.chunks_exact(2 * cols)) {
                let (even, odd) = two.split_at(cols);
                line[2 * cols..].fill(bf16::ZERO);
                for (pair, (a, b)) in line.chunks_exact_mut(2).zip(even.iter().zip(odd)) {
                    (pair[0], pair[1]) = (*a, *b);
                }
            }
        });
    }

    /// [`Panels::pack_pixels`] of all, in parallel.
    pub(super) fn pack_all_pixels(&self, x: &Conv, out: &mut [f32]) {
        let each = self.isa.nr() * self.k;
        out.par_chunks_mut(each).enumerate().for_each(|(panel, out)| {
            let mut rest = out;
            for block in 0..self.blocks() {
                let (part, tail) = rest.split_at_mut(self.range(block, panel).len());
                self.pack_pixels(x, block, panel, part);
                rest = tail;
            }
        });
    }

    /// Packs all of w (N, `elements`), in parallel.
    pub(in crate::backend::cpu) fn pack_all(&self, w: Slice, elements: usize, out: &mut [f32]) {
        let each = self.isa.nr() * self.k;
        out.par_chunks_mut(each).enumerate().for_each(|(panel, out)| {
            let mut rest = out;
            for block in 0..self.blocks() {
                let (part, tail) = rest.split_at_mut(self.range(block, panel).len());
                self.pack(w, (elements, elements), block, panel, part);
                rest = tail;
            }
        });
    }
}

/// Where a weight (N,K) of some type lies when it has been packed once, to be used often. In f32, and in bf16 where the
/// machine multiplies it, words as the tiles read them; else 16-bit elements in the same order, widened at each use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedLayout {
    panels: Panels,
    dtype: DType,
    elements: usize,
}

impl PackedLayout {
    /// The layout on this machine.
    pub fn new(dtype: DType, n: usize, k: usize) -> PackedLayout {
        Self::new_with(Isa::best(), dtype, n, k)
    }

    /// [`PackedLayout::new`] for a given instruction set.
    pub fn new_with(isa: Isa, dtype: DType, n: usize, k: usize) -> PackedLayout {
        assert!(n > 0 && k > 0 && dtype != DType::I32, "PackedLayout: {dtype}({n},{k})");
        let panels = Panels::new(isa, arith(isa, dtype), n, k, KC);
        PackedLayout { panels, dtype, elements: k }
    }

    /// (N, K)
    pub fn shape(&self) -> (usize, usize) {
        (self.panels.n, self.elements)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// 16-bit elements rather than words.
    fn halves(&self) -> bool {
        self.dtype != DType::F32 && self.panels.arith == Arith::Fma
    }

    fn word(&self) -> usize {
        if self.halves() { 2 } else { 4 }
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.panels.len() * self.word()
    }

    /// Bytes of each panel but the last, which may be shorter.
    pub fn panel_bytes(&self) -> usize {
        self.panels.isa.nr() * self.panels.k * self.word()
    }

    /// Rows of the matrix that a panel holds.
    pub fn rows(&self, panel: usize) -> Range<usize> {
        let nr = self.panels.isa.nr();
        panel * nr..((panel + 1) * nr).min(self.panels.n)
    }

    /// Packs one panel from its rows, contiguous.
    pub fn pack_panel(&self, panel: usize, rows: Slice, out: &mut [u8]) {
        let p = &self.panels;
        assert_eq!(rows.dtype(), self.dtype, "PackedLayout: type of the rows");
        assert_eq!(rows.len(), self.rows(panel).len() * self.elements, "PackedLayout: length of the rows");
        if self.halves() {
            let x: &[u16] = match rows {
                Slice::F16(x) => cast_slice(x),
                Slice::BF16(x) => cast_slice(x),
                Slice::F32(_) => unreachable!("f32 is packed in words"),
            };
            for (k, line) in cast_slice_mut::<u8, u16>(out).chunks_exact_mut(p.width(panel)).enumerate() {
                line.fill(0);
                line.iter_mut().zip(x.chunks_exact(self.elements)).for_each(|(y, row)| *y = row[k]);
            }
            return;
        }
        // A panel alone is the first of a matrix that has its rows only.
        let alone = Panels { n: self.rows(panel).len(), ..*p };
        let out: &mut [f32] = cast_slice_mut(out);
        for block in 0..p.blocks() {
            alone.pack(rows, (self.elements, self.elements), block, 0, &mut out[alone.range(block, 0)]);
        }
    }

    /// Packs w (N,K), in parallel.
    pub fn pack(&self, w: Slice, out: &mut [u8]) {
        out.par_chunks_mut(self.panel_bytes()).enumerate().for_each(|(panel, out)| {
            let rows = self.rows(panel);
            let range = rows.start * self.elements..rows.end * self.elements;
            let rows = match w {
                Slice::F32(w) => Slice::F32(&w[range]),
                Slice::F16(w) => Slice::F16(&w[range]),
                Slice::BF16(w) => Slice::BF16(&w[range]),
            };
            self.pack_panel(panel, rows, out);
        });
    }
}

/// How operands of this type are multiplied.
pub(in crate::backend::cpu) fn arith(isa: Isa, dtype: DType) -> Arith {
    if dtype == DType::BF16 && isa.has_dot() { Arith::Dot } else { Arith::Fma }
}

/// A packed weight.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    layout: PackedLayout,
    data: &'a [u8],
}

impl<'a> Packed<'a> {
    /// What [`PackedLayout::pack`] wrote.
    pub fn new(layout: PackedLayout, data: &'a [u8]) -> Packed<'a> {
        assert_eq!(data.len(), layout.bytes(), "Packed: bytes");
        Packed { layout, data }
    }

    /// How it lies.
    pub fn layout(&self) -> &PackedLayout {
        &self.layout
    }

    /// The matrix (N,K) again, in its own type.
    pub fn unpack(&self) -> Vec<u8> {
        let (p, (n, k)) = (&self.layout.panels, self.layout.shape());
        // Elements are 16 bits apart within a pair, and `size` bytes wide.
        let size = self.layout.dtype.size();
        let mut y = vec![0; n * k * size];
        for (i, y) in y.chunks_exact_mut(size).enumerate() {
            let (row, k) = (i / k, i % k);
            let (panel, column) = (row / p.isa.nr(), row % p.isa.nr());
            let pair = if p.arith == Arith::Dot { 2 } else { 1 };
            let line = p.lines(panel, k / pair..k / pair).start + column;
            let at = line * self.layout.word() + k % pair * size;
            y.copy_from_slice(&self.data[at..at + size]);
        }
        y
    }

    pub(in crate::backend::cpu) fn panels(&self) -> &Panels {
        &self.layout.panels
    }

    /// One K block of one panel; 16-bit elements are widened into `buffer`.
    pub(super) fn panel<'b>(&self, block: usize, panel: usize, buffer: &'b mut [f32]) -> Panel<'b>
    where
        'a: 'b,
    {
        let p = &self.layout.panels;
        if !self.layout.halves() {
            return p.view(cast_slice(self.data), block, panel);
        }
        let range = p.range(block, panel);
        let buffer = &mut buffer[..range.len()];
        self.halves(range, buffer);
        p.alone(buffer, block, panel)
    }

    fn halves(&self, range: Range<usize>, y: &mut [f32]) {
        match self.layout.dtype {
            DType::F16 => math::f16_to_f32(&cast_slice::<u8, f16>(self.data)[range], y),
            _ => math::bf16_to_f32(&cast_slice::<u8, bf16>(self.data)[range], y),
        }
    }

    /// Lines `k` (elements of K, even ends) of a panel in f32, (len, width): in place, or unpacked into `buffer`.
    pub(in crate::backend::cpu) fn lines<'b>(
        &self,
        panel: usize,
        k: Range<usize>,
        buffer: &'b mut [f32],
    ) -> &'b [f32]
    where
        'a: 'b,
    {
        let p = &self.layout.panels;
        let width = p.width(panel);
        if self.layout.dtype == DType::F32 {
            return &cast_slice(self.data)[p.lines(panel, k)];
        }
        let buffer = &mut buffer[..k.len() * width];
        if self.layout.halves() {
            self.halves(p.lines(panel, k), buffer);
            return buffer;
        }
        debug_assert!(k.start % 2 == 0 && k.end % 2 == 0);
        let words: &[u32] = &cast_slice(self.data)[p.lines(panel, k.start / 2..k.end / 2)];
        p.isa.run(Unzip { words, width, out: buffer });
        buffer
    }
}

/// Lines of pairs of bf16 to twice as many lines of f32.
struct Unzip<'a> {
    words: &'a [u32],
    width: usize,
    out: &'a mut [f32],
}

impl crate::backend::cpu::simd::Kernel for Unzip<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: crate::backend::cpu::simd::Simd>(self, _: S) {
        let lines = self.words.chunks_exact(self.width).zip(self.out.chunks_exact_mut(2 * self.width));
        for (words, out) in lines {
            let (even, odd) = out.split_at_mut(self.width);
            for (i, &word) in words.iter().enumerate() {
                even[i] = f32::from_bits(word << 16);
                odd[i] = f32::from_bits(word & 0xFFFF_0000);
            }
        }
    }
}
