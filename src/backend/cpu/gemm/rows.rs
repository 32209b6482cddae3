//! Left operands of the matrix product: matrices in memory, and convolution inputs read as matrices.

use crate::backend::cpu::simd::{Isa, transpose};
use crate::backend::cpu::slice::Slice;
use crate::tensor::DType;
use half::bf16;

/// What a line of a tile's left operand is made of: f32, or bf16 in pairs.
pub trait Lane: bytemuck::Zeroable + Copy {
    /// y = the elements of x from `from` on.
    fn read(x: Slice, from: usize, y: &mut [Self]);
    /// out\[r·ld + j\] = x\[from + j·m + r\] for r < rows, j < count: columns of a matrix with m of them, as lines.
    fn columns(
        x: Slice,
        (from, m): (usize, usize),
        (rows, count): (usize, usize),
        out: &mut [Self],
        ld: usize,
    ) {
        let mut row = [Self::zeroed(); 64];
        for r0 in (0..rows).step_by(row.len()) {
            let row = &mut row[..64.min(rows - r0)];
            for j in 0..count {
                Self::read(x, from + j * m + r0, row);
                row.iter().enumerate().for_each(|(r, v)| out[(r0 + r) * ld + j] = *v);
            }
        }
    }
}

impl Lane for f32 {
    #[inline]
    fn read(x: Slice, from: usize, y: &mut [f32]) {
        x.read(from, y);
    }
    fn columns(
        x: Slice,
        (from, m): (usize, usize),
        (rows, count): (usize, usize),
        out: &mut [f32],
        ld: usize,
    ) {
        match x {
            Slice::F32(x) => transpose(Isa::best(), &x[from..], m, count, rows, ld, out),
            x => {
                let mut row = [0.0; 64];
                for r0 in (0..rows).step_by(row.len()) {
                    let row = &mut row[..64.min(rows - r0)];
                    for j in 0..count {
                        x.read(from + j * m + r0, row);
                        row.iter().enumerate().for_each(|(r, v)| out[(r0 + r) * ld + j] = *v);
                    }
                }
            }
        }
    }
}

impl Lane for bf16 {
    #[inline]
    fn read(x: Slice, from: usize, y: &mut [bf16]) {
        match x {
            Slice::BF16(x) => y.copy_from_slice(&x[from..from + y.len()]),
            x => unreachable!("dot products are of bf16, not {}", x.dtype()),
        }
    }
}

/// The left operand: a matrix (M,K) that can copy parts of its rows.
pub trait Rows: Sync {
    /// Number of rows, M.
    fn m(&self) -> usize;
    /// Length of a row, K.
    fn k(&self) -> usize;
    /// Element type.
    fn dtype(&self) -> DType;
    /// out\[r·ld + j\] = A\[m0 + r, k0 + j\] for r < rows, j < kc.
    fn pack<E: Lane>(&self, m0: usize, rows: usize, k0: usize, kc: usize, out: &mut [E], ld: usize);
}

/// Rows in memory: A\[m, k\] = data\[m·ld + k\].
#[derive(Clone, Copy)]
pub struct Dense<'a> {
    /// The matrix.
    pub data: Slice<'a>,
    /// Rows.
    pub m: usize,
    /// Columns.
    pub k: usize,
    /// Elements from one row to the next.
    pub ld: usize,
}

impl<'a> Dense<'a> {
    /// A contiguous matrix (m, k).
    pub fn new(data: Slice<'a>, m: usize, k: usize) -> Dense<'a> {
        assert_eq!(data.len(), m * k, "Dense: length of a ({m}, {k}) matrix");
        Dense { data, m, k, ld: k }
    }
}

impl Rows for Dense<'_> {
    fn m(&self) -> usize {
        self.m
    }
    fn k(&self) -> usize {
        self.k
    }
    fn dtype(&self) -> DType {
        self.data.dtype()
    }
    fn pack<E: Lane>(&self, m0: usize, rows: usize, k0: usize, kc: usize, out: &mut [E], ld: usize) {
        for r in 0..rows {
            E::read(self.data, (m0 + r) * self.ld + k0, &mut out[r * ld..r * ld + kc]);
        }
    }
}

/// Columns of a contiguous matrix (K,M) in memory, as rows: A\[m, k\] = data\[k·M + m\].
#[derive(Clone, Copy)]
pub struct Transposed<'a> {
    /// (K,M)
    pub data: Slice<'a>,
    /// M.
    pub m: usize,
}

impl Rows for Transposed<'_> {
    fn m(&self) -> usize {
        self.m
    }
    fn k(&self) -> usize {
        self.data.len() / self.m.max(1)
    }
    fn dtype(&self) -> DType {
        self.data.dtype()
    }
    fn pack<E: Lane>(&self, m0: usize, rows: usize, k0: usize, kc: usize, out: &mut [E], ld: usize) {
        E::columns(self.data, (k0 * self.m + m0, self.m), (rows, kc), out, ld);
    }
}

/// The geometry of a 2-D convolution over (B,H,W,C) with weights (O,KH,KW,I).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConvShape {
    /// Batch.
    pub b: usize,
    /// Height in memory.
    pub h: usize,
    /// Width in memory.
    pub w: usize,
    /// Input channels.
    pub c: usize,
    /// Kernel height.
    pub kh: usize,
    /// Kernel width.
    pub kw: usize,
    /// Step of the output, both ways.
    pub stride: usize,
    /// Rows of zeros above. Those below follow from `out_h`.
    pub pad_top: usize,
    /// Columns of zeros to the left. Those to the right follow from `out_w`.
    pub pad_left: usize,
    /// Output height.
    pub out_h: usize,
    /// Output width.
    pub out_w: usize,
    /// The convolution sees x doubled both ways by nearest neighbour, without the doubled x being made.
    pub upsample: bool,
}

impl ConvShape {
    /// Whether the window is of one pixel and meets each pixel of x once: a matrix product.
    pub fn pointwise(&self) -> bool {
        (self.kh, self.kw, self.stride, self.pad_top, self.pad_left, self.upsample) == (1, 1, 1, 0, 0, false)
            && (self.out_h, self.out_w) == (self.h, self.w)
    }
}

/// A convolution's input as a matrix: row m = (b·H' + oh)·W' + ow, column k = (kh·KW + kw)·C + c.
#[derive(Clone, Copy)]
pub struct Conv<'a> {
    /// (B,H,W,C)
    pub x: Slice<'a>,
    /// See [`ConvShape`].
    pub shape: ConvShape,
}

impl Rows for Conv<'_> {
    fn m(&self) -> usize {
        self.shape.b * self.shape.out_h * self.shape.out_w
    }
    fn k(&self) -> usize {
        self.shape.kh * self.shape.kw * self.shape.c
    }
    fn dtype(&self) -> DType {
        self.x.dtype()
    }
    fn pack<E: Lane>(&self, m0: usize, rows: usize, k0: usize, kc: usize, out: &mut [E], ld: usize) {
        let p = &self.shape;
        if k0 % p.c + kc <= p.c {
            return self.pack_window(m0, rows, k0, kc, out, ld);
        }
        for r in 0..rows {
            let m = m0 + r;
            let (b, oh, ow) = (m / (p.out_w * p.out_h), m / p.out_w % p.out_h, m % p.out_w);
            let line = &mut out[r * ld..r * ld + kc];
            // One kernel row after the other; each is a run of KW · C elements, of which the block may want a part.
            let run = p.kw * p.c;
            let mut k = k0;
            while k < k0 + kc {
                let (kh, from) = (k / run, k % run);
                let to = run.min(from + (k0 + kc - k));
                let part = &mut line[k - k0..k - k0 + (to - from)];
                self.pack_run(b, (oh * p.stride + kh).wrapping_sub(p.pad_top), ow, from, part);
                k += to - from;
            }
        }
    }
}

impl Conv<'_> {
    /// [`Rows::pack`] of columns that lie within one position of the window.
    fn pack_window<E: Lane>(&self, m0: usize, rows: usize, k0: usize, kc: usize, out: &mut [E], ld: usize) {
        let p = &self.shape;
        let (window, c0) = (k0 / p.c, k0 % p.c);
        let (kh, kw) = (window / p.kw, window % p.kw);
        let (h, w, shift) = if p.upsample { (2 * p.h, 2 * p.w, 1) } else { (p.h, p.w, 0) };
        let (mut b, mut oh, mut ow) = (m0 / (p.out_w * p.out_h), m0 / p.out_w % p.out_h, m0 % p.out_w);
        for r in 0..rows {
            let line = &mut out[r * ld..r * ld + kc];
            let ih = (oh * p.stride + kh).wrapping_sub(p.pad_top);
            let iw = (ow * p.stride + kw).wrapping_sub(p.pad_left);
            if ih < h && iw < w {
                E::read(self.x, ((b * p.h + (ih >> shift)) * p.w + (iw >> shift)) * p.c + c0, line);
            } else {
                line.fill(E::zeroed());
            }
            ow += 1;
            if ow == p.out_w {
                (ow, oh) = (0, oh + 1);
            }
            if oh == p.out_h {
                (oh, b) = (0, b + 1);
            }
        }
    }

    /// Elements `from..` of the kernel row that lies on input row `ih` (outside: zeros) at output column `ow`.
    #[inline]
    fn pack_run<E: Lane>(&self, b: usize, ih: usize, ow: usize, from: usize, out: &mut [E]) {
        let p = &self.shape;
        let (h, w, shift) = if p.upsample { (2 * p.h, 2 * p.w, 1) } else { (p.h, p.w, 0) };
        if ih >= h {
            return out.fill(E::zeroed());
        }
        let row = (b * p.h + (ih >> shift)) * p.w * p.c;
        let left = ow * p.stride;
        if p.upsample {
            let mut done = 0;
            while done < out.len() {
                let (kw, c) = ((from + done) / p.c, (from + done) % p.c);
                let len = (p.c - c).min(out.len() - done);
                let iw = (left + kw).wrapping_sub(p.pad_left);
                let part = &mut out[done..done + len];
                if iw >= w {
                    part.fill(E::zeroed());
                } else {
                    let start = row + (iw >> shift) * p.c + c;
                    E::read(self.x, start, part);
                }
                done += len;
            }
            return;
        }
        // Memory is contiguous along (kw, c): zeros to the left, one copy, zeros to the right.
        let zeros = (p.pad_left.saturating_sub(left) * p.c).clamp(from, from + out.len()) - from;
        let end = ((w + p.pad_left).saturating_sub(left) * p.c).clamp(from, from + out.len()) - from;
        let end = end.max(zeros);
        out[..zeros].fill(E::zeroed());
        if end > zeros {
            let start = row + left * p.c + from + zeros - p.pad_left * p.c;
            E::read(self.x, start, &mut out[zeros..end]);
        }
        out[end..].fill(E::zeroed());
    }
}
