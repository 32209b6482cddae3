//! 3×3 convolutions with stride 1 by Winograd's minimal filtering F(4×4, 3×3): 36 products for 16 outputs, where the
//! sum itself takes 144 (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308).
//!
//! Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A per tile of 6×6 inputs, evaluated at 0, ±3/4, ±3/2 and ∞. With these points, all
//! of them exact, the error in norm is half that of the usual 0, ±1, ±2 (1.7e-6 at 320 channels).
//! Everything is f32 whatever the type in memory, so 16-bit weights lose nothing more.
//!
//! Tiles pass by in groups, whose transformed inputs stay in cache. A task owns one panel of output channels: it
//! transforms its weights, which is a few per cent of the work and saves holding them four times as large, multiplies
//! them for each of the 36 positions with all tiles of the group, and transforms the sums into its part of y.

use super::gemm::{Conv, ConvShape, Epilogue, Packed, PackedLayout, Panels, Weights, arith};
use super::math::activate_in_place_with;
use super::scratch::scratch;
use super::simd::{Arith, Block, Grid, Isa, KC, Kernel, LDA, Panel, Simd, tile};
use super::slice::{Element, Slice, SliceMut, each_mut};
use crate::tensor::DType;
use bytemuck::cast_slice_mut;
use rayon::prelude::*;
use std::array::from_fn;
use std::ops::Range;
use std::sync::OnceLock;

/// Rows and columns of an input tile, and their number in one.
const IN: usize = 6;
/// Rows and columns of an output tile.
const OUT: usize = 4;
/// Positions of a transformed tile.
const POINTS: usize = IN * IN;
/// Words of transformed input of one group, about.
const GROUP: usize = 3 << 20;
/// Fewest tiles of a group: the transformed weights of a panel are used that often.
const FEWEST: usize = 56;
/// Input channels whose weights are transformed together: they stay in the second-level cache.
const DEPTH: usize = 128;
/// Input channels whose weights are unpacked at a time.
const CHANNELS: usize = 32;

/// Whether a convolution is computed in this way: where it multiplies less. `LDM_WINOGRAD=off` says never.
pub fn applies(s: &ConvShape, dtype: DType) -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    let on = || !std::env::var("LDM_WINOGRAD").is_ok_and(|v| v == "off" || v == "0");
    let dot = arith(Isa::best(), dtype) == Arith::Dot;
    let pair = if dot { 2 } else { 1 };
    let tiles = s.b * s.out_h.div_ceil(OUT) * s.out_w.div_ceil(OUT);
    // Where more than one row of zeros stands around the image, a result at its edge is a sum of few products, but its error is
    // that of a whole tile's: off by 1.5 times what the tests allow, seen with two rows.
    let scale = if s.upsample { 2 } else { 1 };
    let narrow = |out: usize, size: usize, before: usize| before <= 1 && out + 2 <= size * scale + before + 1;
    (s.kh, s.kw, s.stride) == (3, 3, 1)
        && narrow(s.out_h, s.h, s.pad_top)
        && narrow(s.out_w, s.w, s.pad_left)
        // Where pairs are multiplied at full width the transforms cost more than they save: on Zen 5 (EPYC, 2 cores) Stable
        // Diffusion's UNet takes 2.3 s instead of 2.6 at 512×512, decoding 3.0 instead of 3.4.
        && !(dot && Isa::best().has_wide_dot())
        && s.c % 16 == 0
        && s.c >= 32
        // The transform of a weight costs about as much as 400 products; pairs of bf16 are multiplied at once.
        && POINTS * tiles + 400 < 9 * s.b * s.out_h * s.out_w / pair
        && *ON.get_or_init(on)
}

/// out (B,H',W',N) = epilogue(conv(x, w)), w (N,3,3,C), for a shape that [`applies`]. Bits do not depend on the number
/// of threads, nor on whether w was packed before. Panics if a length or a type does not fit.
pub fn conv3x3(conv: &Conv, w: Weights, n: usize, epilogue: &Epilogue, out: SliceMut) {
    conv3x3_with(Isa::best(), conv, w, n, epilogue, out);
}

/// [`conv3x3`] on a given instruction set.
pub fn conv3x3_with(isa: Isa, conv: &Conv, w: Weights, n: usize, epilogue: &Epilogue, out: SliceMut) {
    match w {
        Weights::Packed(w) => each_mut!(out, y => typed(conv, &w, n, epilogue, y)),
        Weights::Pixels(_) => unreachable!("pixels are the operand of a weight gradient"),
        Weights::Raw(w) => {
            let layout = PackedLayout::new_with(isa, w.dtype(), n, 9 * conv.shape.c);
            scratch(layout.bytes() / 4, |packed| {
                let packed = cast_slice_mut(packed);
                layout.pack(w, packed);
                let w = Packed::new(layout, packed);
                each_mut!(out, y => typed(conv, &w, n, epilogue, y));
            });
        }
    }
}

/// Bytes of working memory that [`conv3x3`] takes with a packed weight, all threads together.
pub fn working_bytes(s: &ConvShape, n: usize) -> usize {
    if [s.b, s.out_h, s.out_w, n].contains(&0) {
        return 0;
    }
    let (isa, threads) = (Isa::best(), rayon::current_num_threads());
    let sizes = Sizes::new(isa, s, n);
    let tiles = sizes.rows.div_ceil(sizes.groups) * sizes.wide;
    let group = tiles.div_ceil(isa.mr()) * sizes.panels.blocks() * POINTS * isa.mr() * LDA;
    let task = POINTS * (DEPTH + tiles) * isa.nr() + 9 * CHANNELS * isa.nr() + POINTS * KC;
    (group * if sizes.apart() { threads } else { 1 } + task * threads) * size_of::<f32>()
}

fn typed<T: Element>(conv: &Conv, w: &Packed, n: usize, epilogue: &Epilogue, out: &mut [T]) {
    let s = &conv.shape;
    assert_eq!(w.layout().shape(), (n, 9 * s.c), "winograd: shape of w");
    assert_eq!(out.len(), s.b * s.out_h * s.out_w * n, "winograd: length of the output");
    if out.is_empty() {
        return;
    }
    let isa = w.panels().isa;
    let sizes = Sizes::new(isa, s, n);
    let groups = 0..sizes.groups;
    Winograd { conv, w, epilogue, n, isa, sizes }.run(groups, out);
}

/// How a convolution is dealt out.
struct Sizes {
    /// The products' own panels: K is C alone.
    panels: Panels,
    /// Tiles of an image, down and across.
    high: usize,
    wide: usize,
    /// Rows of tiles of all images, and the groups into which they are dealt.
    rows: usize,
    groups: usize,
}

impl Sizes {
    fn new(isa: Isa, s: &ConvShape, n: usize) -> Sizes {
        let panels = Panels::new(isa, Arith::Fma, n, s.c, KC);
        let (high, wide) = (s.out_h.div_ceil(OUT), s.out_w.div_ceil(OUT));
        let most = (GROUP / (panels.blocks() * POINTS * LDA)).max(FEWEST);
        let rows = s.b * high;
        Sizes { panels, high, wide, rows, groups: rows.div_ceil((most / wide).max(1)) }
    }

    /// Whether each thread takes groups of its own.
    fn apart(&self) -> bool {
        self.groups >= 4 * rayon::current_num_threads()
    }
}

struct Winograd<'a> {
    conv: &'a Conv<'a>,
    w: &'a Packed<'a>,
    epilogue: &'a Epilogue<'a>,
    n: usize,
    isa: Isa,
    sizes: Sizes,
}

impl Winograd<'_> {
    /// First row of tiles of a group.
    fn row(&self, group: usize) -> usize {
        self.sizes.rows * group / self.sizes.groups
    }

    /// First pixel of a row of tiles.
    fn pixel(&self, row: usize) -> usize {
        let s = &self.conv.shape;
        (row / self.sizes.high * s.out_h + row % self.sizes.high * OUT) * s.out_w
    }

    /// Each thread takes groups of its own where there are enough; else the threads share the panels of one.
    fn run<T: Element>(&self, groups: Range<usize>, out: &mut [T]) {
        if groups.len() == 1 {
            return self.group(self.row(groups.start)..self.row(groups.end), out);
        }
        let middle = groups.start + groups.len() / 2;
        let at = self.pixel(self.row(middle)) - self.pixel(self.row(groups.start));
        let (first, second) = out.split_at_mut(at * self.n);
        let (left, right) = (groups.start..middle, middle..groups.end);
        if self.sizes.apart() {
            rayon::join(|| self.run(left, first), || self.run(right, second));
        } else {
            self.run(left, first);
            self.run(right, second);
        }
    }

    /// Calls `f` with each number, in parallel unless the groups are.
    fn each(&self, count: usize, f: impl Fn(usize) + Send + Sync) {
        if self.sizes.apart() {
            return (0..count).for_each(f);
        }
        (0..count).into_par_iter().with_max_len(1).for_each(f);
    }

    fn group<T: Element>(&self, rows: Range<usize>, out: &mut [T]) {
        let (blocks, n) = (self.sizes.panels.blocks(), self.n);
        let tiles = Tiles {
            first: rows.start * self.sizes.wide,
            count: rows.len() * self.sizes.wide,
            mr: self.isa.mr(),
        };
        let each = blocks * POINTS * tiles.mr * LDA;
        scratch(tiles.chunks() * each, |v| {
            let lines = Grid::new(v, tiles.chunks(), each, 1, each);
            self.each(tiles.chunks(), |chunk| self.input(tiles.chunk(chunk), lines.take(chunk).2.row(0)));
            let v = &*v;
            let pixels = out.len() / n;
            let grid = Grid::new(out, pixels, n, pixels, self.isa.nr());
            let first = self.pixel(rows.start);
            self.each(grid.count(), |panel| {
                let (_, _, block) = grid.take(panel);
                let width = self.sizes.panels.width(panel);
                scratch(POINTS * tiles.count * width, |m| {
                    self.multiply(panel, &tiles, v, m);
                    let tiles = tiles.first..tiles.first + tiles.count;
                    self.isa.run(Output { all: self, m, width, tiles, panel, first, block });
                });
            });
        });
    }

    /// Sums over C of transformed inputs times transformed weights of a panel: m (point, tile, width).
    fn multiply(&self, panel: usize, tiles: &Tiles, v: &[f32], m: &mut [f32]) {
        let (blocks, width) = (self.sizes.panels.blocks(), self.sizes.panels.width(panel));
        scratch(POINTS * DEPTH * width, |u| {
            for block in 0..blocks {
                let (c0, kc) = self.sizes.panels.block(block);
                for at in (0..kc).step_by(DEPTH) {
                    let len = DEPTH.min(kc - at);
                    self.weights(panel, c0 + at..c0 + at + len, u);
                    for point in 0..POINTS {
                        let data = &u[point * len * width..][..len * width];
                        let b = Panel { isa: self.isa, arith: Arith::Fma, data, width, kc: len };
                        let m = &mut m[point * tiles.count * width..][..tiles.count * width];
                        let mut c = Block::new(m, width, tiles.count, width);
                        for chunk in 0..tiles.chunks() {
                            let part = tiles.chunk(chunk);
                            let lines =
                                &v[((chunk * blocks + block) * POINTS + point) * tiles.mr * LDA + at..];
                            let first = (part.start - tiles.first, 0);
                            tile(part.len(), lines, &b, &mut c, first, block + at > 0);
                        }
                    }
                }
            }
        });
    }

    /// Transformed weights of some input channels of a panel: u (point, C, width).
    fn weights(&self, panel: usize, channels: Range<usize>, u: &mut [f32]) {
        let (c, width, kc) = (self.conv.shape.c, self.sizes.panels.width(panel), channels.len());
        scratch(9 * CHANNELS * width, |buffer| {
            for c0 in channels.clone().step_by(CHANNELS) {
                let count = CHANNELS.min(channels.end - c0);
                let mut rest = &mut *buffer;
                let taps = from_fn(|tap| {
                    let (part, tail) = std::mem::take(&mut rest).split_at_mut(CHANNELS * width);
                    rest = tail;
                    self.w.lines(panel, tap * c + c0..tap * c + c0 + count, part)
                });
                let u = &mut u[(c0 - channels.start) * width..];
                self.isa.run(WeightTransform { taps, u, stride: kc * width });
            }
        });
    }

    /// Transformed inputs of some tiles: v (K block, point, tile, LDA).
    fn input(&self, tiles: Range<usize>, v: &mut [f32]) {
        let s = &self.conv.shape;
        let zeros = [0.0; KC];
        for tile in tiles.clone() {
            let (row, col) = (tile / self.sizes.wide, tile % self.sizes.wide);
            let (b, top, left) = (row / self.sizes.high, row % self.sizes.high * OUT, col * OUT);
            let shift = s.upsample as usize;
            // Where a pixel of the tile lies in x, unless it is padding.
            let at = |i: usize, j: usize| {
                let ih = (top + i).checked_sub(s.pad_top)? >> shift;
                let iw = (left + j).checked_sub(s.pad_left)? >> shift;
                (ih < s.h && iw < s.w).then(|| ((b * s.h + ih) * s.w + iw) * s.c)
            };
            for block in 0..self.sizes.panels.blocks() {
                let (c0, kc) = self.sizes.panels.block(block);
                let v = &mut v[(block * POINTS * self.isa.mr() + (tile - tiles.start)) * LDA..];
                let stride = self.isa.mr() * LDA;
                if let Slice::F32(x) = self.conv.x {
                    let px = from_fn(|p| match at(p / IN, p % IN) {
                        Some(at) => &x[at + c0..at + c0 + kc],
                        None => &zeros[..kc],
                    });
                    self.isa.run(InputTransform { px, v, stride });
                } else {
                    scratch(POINTS * kc, |wide| {
                        for (p, wide) in wide.chunks_exact_mut(kc).enumerate() {
                            match at(p / IN, p % IN) {
                                Some(at) => self.conv.x.read(at + c0, wide),
                                None => wide.fill(0.0),
                            }
                        }
                        let px = from_fn(|p| &wide[p * kc..(p + 1) * kc]);
                        self.isa.run(InputTransform { px, v, stride });
                    });
                }
            }
        }
    }
}

/// The tiles of a group, dealt evenly to chunks of at most `mr`.
struct Tiles {
    first: usize,
    count: usize,
    mr: usize,
}

impl Tiles {
    fn chunks(&self) -> usize {
        self.count.div_ceil(self.mr)
    }

    fn chunk(&self, chunk: usize) -> Range<usize> {
        let at = |chunk: usize| self.first + self.count * chunk / self.chunks();
        at(chunk)..at(chunk + 1)
    }
}

/// The points other than 0 and ∞: ±P and ±Q.
const P: f32 = 0.75;
const Q: f32 = 1.5;
const PP: f32 = P * P;
const QQ: f32 = Q * Q;

/// Bᵀ d
#[inline(always)]
fn input_1d<S: Simd>(s: S, d: [S::F; IN]) -> [S::F; IN] {
    let k = |x: f32| s.splat(x);
    let (even_p, odd_p) = (s.fma(k(-QQ), d[2], d[4]), s.fma(k(-QQ), d[1], d[3]));
    let (even_q, odd_q) = (s.fma(k(-PP), d[2], d[4]), s.fma(k(-PP), d[1], d[3]));
    [
        s.fma(k(PP * QQ), d[0], s.fma(k(-(PP + QQ)), d[2], d[4])),
        s.fma(k(P), odd_p, even_p),
        s.fma(k(-P), odd_p, even_p),
        s.fma(k(Q), odd_q, even_q),
        s.fma(k(-Q), odd_q, even_q),
        s.fma(k(PP * QQ), d[1], s.fma(k(-(PP + QQ)), d[3], d[5])),
    ]
}

/// G g
#[inline(always)]
fn weight_1d<S: Simd>(s: S, g: [S::F; 3]) -> [S::F; IN] {
    let k = |x: f32| s.splat(x);
    const AT_P: f32 = 1.0 / (2.0 * PP * (PP - QQ));
    const AT_Q: f32 = 1.0 / (2.0 * QQ * (QQ - PP));
    let even_p = s.fma(k(PP * AT_P), g[2], s.mul(k(AT_P), g[0]));
    let even_q = s.fma(k(QQ * AT_Q), g[2], s.mul(k(AT_Q), g[0]));
    [
        s.mul(k(1.0 / (PP * QQ)), g[0]),
        s.fma(k(P * AT_P), g[1], even_p),
        s.fma(k(-P * AT_P), g[1], even_p),
        s.fma(k(Q * AT_Q), g[1], even_q),
        s.fma(k(-Q * AT_Q), g[1], even_q),
        g[2],
    ]
}

/// Aᵀ m
#[inline(always)]
fn output_1d<S: Simd>(s: S, m: [S::F; IN]) -> [S::F; OUT] {
    let k = |x: f32| s.splat(x);
    let (sum_p, diff_p) = (s.add(m[1], m[2]), s.sub(m[1], m[2]));
    let (sum_q, diff_q) = (s.add(m[3], m[4]), s.sub(m[3], m[4]));
    [
        s.add(m[0], s.add(sum_p, sum_q)),
        s.fma(k(Q), diff_q, s.mul(k(P), diff_p)),
        s.fma(k(QQ), sum_q, s.mul(k(PP), sum_p)),
        s.add(m[5], s.fma(k(Q * QQ), diff_q, s.mul(k(P * PP), diff_p))),
    ]
}

struct InputTransform<'a> {
    /// The tile's pixels, each its channels (a multiple of 16).
    px: [&'a [f32]; POINTS],
    v: &'a mut [f32],
    /// Words from point to point.
    stride: usize,
}

impl Kernel for InputTransform<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for c in (0..self.px[0].len()).step_by(S::LANES) {
            let mut half = [[s.splat(0.0); IN]; IN];
            for j in 0..IN {
                let y = input_1d(s, from_fn(|i| s.load(&self.px[i * IN + j][c..])));
                (0..IN).for_each(|i| half[i][j] = y[i]);
            }
            for i in 0..IN {
                let y = input_1d(s, half[i]);
                for j in 0..IN {
                    s.store(&mut self.v[(i * IN + j) * self.stride + c..], y[j]);
                }
            }
        }
    }
}

struct WeightTransform<'a> {
    /// Per tap, lines (channel, width).
    taps: [&'a [f32]; 9],
    u: &'a mut [f32],
    /// Words from point to point.
    stride: usize,
}

impl Kernel for WeightTransform<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for at in (0..self.taps[0].len()).step_by(S::LANES) {
            let mut half = [[s.splat(0.0); 3]; IN];
            for kw in 0..3 {
                let y = weight_1d(s, from_fn(|kh| s.load(&self.taps[kh * 3 + kw][at..])));
                (0..IN).for_each(|i| half[i][kw] = y[i]);
            }
            for i in 0..IN {
                let y = weight_1d(s, half[i]);
                for j in 0..IN {
                    s.store(&mut self.u[(i * IN + j) * self.stride + at..], y[j]);
                }
            }
        }
    }
}

struct Output<'a, 'b, T> {
    all: &'a Winograd<'a>,
    /// (point, tile, width)
    m: &'a [f32],
    width: usize,
    tiles: Range<usize>,
    panel: usize,
    /// The pixel that the block's first row is.
    first: usize,
    block: Block<'b, T>,
}

impl<T: Element> Kernel for Output<'_, '_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (all, width) = (self.all, self.width);
        let (shape, e) = (&all.conv.shape, all.epilogue);
        let (n0, cols) = (self.panel * all.isa.nr(), self.block.cols());
        let stride = self.tiles.len() * width;
        for t in self.tiles.clone() {
            let (row, left) = (t / all.sizes.wide, t % all.sizes.wide * OUT);
            let (pixel, top) = (all.pixel(row), row % all.sizes.high * OUT);
            // Bias and time, which are the same for the whole tile.
            let mut shift = [0.0; 32];
            let batch = e.batch_row(pixel, n0, all.n);
            for x in [e.bias.map(|b| &b[n0..]), batch].into_iter().flatten() {
                shift.iter_mut().zip(&x[..cols]).for_each(|(y, x)| *y += x);
            }
            let mut y = [[0.0; 32]; OUT * OUT];
            for c in (0..width).step_by(S::LANES) {
                let m = &self.m[(t - self.tiles.start) * width + c..];
                let mut half = [[s.splat(0.0); IN]; OUT];
                for j in 0..IN {
                    let y = output_1d(s, from_fn(|i| s.load(&m[(i * IN + j) * stride..])));
                    (0..OUT).for_each(|i| half[i][j] = y[i]);
                }
                let shift = s.load(&shift[c..]);
                for i in 0..OUT {
                    let line = output_1d(s, half[i]);
                    (0..OUT).for_each(|j| s.store(&mut y[i * OUT + j][c..], s.add(line[j], shift)));
                }
            }
            for i in 0..OUT.min(shape.out_h - top) {
                for j in 0..OUT.min(shape.out_w - left) {
                    let y = &mut y[i * OUT + j][..cols];
                    activate_in_place_with(all.isa, e.act, y);
                    let at = pixel + i * shape.out_w + left + j;
                    match e.residual {
                        None => {}
                        Some(Slice::F32(x)) => {
                            y.iter_mut().zip(&x[at * all.n + n0..]).for_each(|(y, x)| *y += x);
                        }
                        Some(x) => {
                            let mut wide = [0.0; 32];
                            x.read(at * all.n + n0, &mut wide[..cols]);
                            y.iter_mut().zip(&wide).for_each(|(y, x)| *y += x);
                        }
                    }
                    T::narrow(y, self.block.row(at - self.first));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
