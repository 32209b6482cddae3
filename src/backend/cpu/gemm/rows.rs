//! Left operands of the matrix product: matrices in memory, and convolution inputs read as matrices.

/// The left operand: a matrix (M,K) that can copy parts of its rows.
pub trait Rows: Sync {
    /// Number of rows, M.
    fn m(&self) -> usize;
    /// Length of a row, K.
    fn k(&self) -> usize;
    /// out\[r·ld + j\] = A\[m0 + r, k0 + j\] for r < rows, j < kc.
    fn pack(&self, m0: usize, rows: usize, k0: usize, kc: usize, out: &mut [f32], ld: usize);
}

/// Rows in memory: A\[m, k\] = data\[m·ld + k\].
#[derive(Clone, Copy)]
pub struct Dense<'a> {
    /// The matrix.
    pub data: &'a [f32],
    /// Rows.
    pub m: usize,
    /// Columns.
    pub k: usize,
    /// Floats from one row to the next.
    pub ld: usize,
}

impl<'a> Dense<'a> {
    /// A contiguous matrix (m, k).
    pub fn new(data: &'a [f32], m: usize, k: usize) -> Dense<'a> {
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
    fn pack(&self, m0: usize, rows: usize, k0: usize, kc: usize, out: &mut [f32], ld: usize) {
        for r in 0..rows {
            let from = (m0 + r) * self.ld + k0;
            out[r * ld..r * ld + kc].copy_from_slice(&self.data[from..from + kc]);
        }
    }
}

/// A transposed matrix in memory: A\[m, k\] = data\[k·ld + m\].
#[derive(Clone, Copy)]
pub struct DenseT<'a> {
    /// The matrix (K,M).
    pub data: &'a [f32],
    /// Rows of A.
    pub m: usize,
    /// Columns of A.
    pub k: usize,
    /// Floats from one k to the next.
    pub ld: usize,
}

impl<'a> DenseT<'a> {
    /// The transpose of a contiguous matrix (k, m).
    pub fn new(data: &'a [f32], m: usize, k: usize) -> DenseT<'a> {
        assert_eq!(data.len(), m * k, "DenseT: length of a ({k}, {m}) matrix");
        DenseT { data, m, k, ld: m }
    }
}

impl Rows for DenseT<'_> {
    fn m(&self) -> usize {
        self.m
    }
    fn k(&self) -> usize {
        self.k
    }
    fn pack(&self, m0: usize, rows: usize, k0: usize, kc: usize, out: &mut [f32], ld: usize) {
        // Eight k at a time: a line of the target is written in runs, a row of the source read as one.
        for k in (0..kc).step_by(8) {
            let src = &self.data[(k0 + k) * self.ld + m0..];
            for r in 0..rows {
                for j in 0..8.min(kc - k) {
                    out[r * ld + k + j] = src[j * self.ld + r];
                }
            }
        }
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

/// A convolution's input as a matrix: row m = (b·H' + oh)·W' + ow, column k = (kh·KW + kw)·C + c.
#[derive(Clone, Copy)]
pub struct Conv<'a> {
    /// (B,H,W,C)
    pub x: &'a [f32],
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
    fn pack(&self, m0: usize, rows: usize, k0: usize, kc: usize, out: &mut [f32], ld: usize) {
        let p = &self.shape;
        for r in 0..rows {
            let m = m0 + r;
            let (b, oh, ow) = (m / (p.out_w * p.out_h), m / p.out_w % p.out_h, m % p.out_w);
            let line = &mut out[r * ld..r * ld + kc];
            // One kernel row after the other; each is a run of KW · C floats, of which the block may want a part.
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
    /// Floats `from..` of the kernel row that lies on input row `ih` (outside: zeros) at output column `ow`.
    #[inline]
    fn pack_run(&self, b: usize, ih: usize, ow: usize, from: usize, out: &mut [f32]) {
        let p = &self.shape;
        let (h, w, shift) = if p.upsample { (2 * p.h, 2 * p.w, 1) } else { (p.h, p.w, 0) };
        if ih >= h {
            return out.fill(0.0);
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
                    part.fill(0.0);
                } else {
                    let start = row + (iw >> shift) * p.c + c;
                    part.copy_from_slice(&self.x[start..start + len]);
                }
                done += len;
            }
            return;
        }
        // Memory is contiguous along (kw, c): zeros to the left, one copy, zeros to the right.
        let zeros = (p.pad_left.saturating_sub(left) * p.c).clamp(from, from + out.len()) - from;
        let end = ((w + p.pad_left).saturating_sub(left) * p.c).clamp(from, from + out.len()) - from;
        let end = end.max(zeros);
        out[..zeros].fill(0.0);
        if end > zeros {
            let start = row + left * p.c + from + zeros - p.pad_left * p.c;
            out[zeros..end].copy_from_slice(&self.x[start..start + end - zeros]);
        }
        out[end..].fill(0.0);
    }
}
