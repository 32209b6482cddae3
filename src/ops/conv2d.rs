//! y = act(conv(x, w) + bias + time) + residual, and the same for a matrix product.
//!
//! y[b,h,w,o] = Σ x[b, h·s − top + kh, w·s − left + kw, c] · w[o,kh,kw,c], zero outside; with `upsample` x is first
//! doubled by nearest neighbour. PyTorch: `F.conv2d`, `F.linear`, `F.interpolate(scale_factor=2)`.
//! Kernels, one implicit GEMM for both: `kernels/conv2d_mma.cu` on tensor cores, for 16-bit types and channels that are
//! multiples of 8; on Hopper `kernels/conv2d_tma.cu` and `kernels/conv2d_wgmma.cu` in its place, by `LDM_CUDA_WGMMA`
//! ([`crate::backend::cuda::Wgmma`]); `kernels/conv2d_f32.cu` by float units, for f32 and multiples of 4; `kernels/conv2d_edge.cu` for first
//! layers in 16 bits; `kernels/conv2d.cu` for the rest.
mod boxes;
mod cases;
mod edge;
mod epi;
mod floats;
mod fold;
mod grad;
mod tensor_cores;
mod tiles;
mod weight_grad;

pub use epi::{Epi, SLAB};
pub(super) use fold::{absorb_residual, gates, together};
pub use grad::{TransposeWeights, WeightGrad, Window};
pub use tiles::Choice;

use super::Op;
use super::array::dot;
use super::prelude::*;
use super::sampler::checked_row;
use crate::backend::cpu::SliceMut;
use crate::backend::cpu::gemm::{BatchAdd, Conv, ConvShape, Dense, Epilogue, Weights, gemm, working_bytes};
use crate::backend::cpu::winograd;
use crate::kernels::conv2d as k;
use edge::Edge;
use tiles::{Tiled, operands, windows};

/// Convolution of x (B,H,W,C) with w (O,KH,KW,C); further inputs in the order of [`Epi`], then those of the shortcut.
#[derive(Clone, PartialEq, Debug)]
pub struct Conv2d {
    /// Step of the window on both axes.
    pub stride: usize,
    /// Zeros at top, left, bottom, right.
    pub pad: [usize; 4],
    /// Double x by nearest neighbour first.
    pub upsample: bool,
    /// With `upsample`: w is that of [`PhaseWeights`](super::PhaseWeights), (4,O,2,2,C), of a 3×3 window that keeps the size.
    pub phases: bool,
    /// The rest of the sum.
    pub epi: Epi,
    /// Inputs u (B,H',W',U) and, with 2, v (B,H',W',V), then their weights (O,U+V) and bias (O): the 1×1 convolution of
    /// their concatenation is added to the sum, as a residual block that changes its channels does.
    pub shortcut: usize,
    /// Tile and splits on a GPU, for measurements and tests; by default the room chooses.
    pub choice: Option<Choice>,
}

/// Matrix product of x (…,C) with w (O,C); further inputs in the order of [`Epi`].
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Linear {
    /// The rest of the sum.
    pub epi: Epi,
    /// Two: further weights (O,C) follow w, and y (…,3·O) holds the three products side by side, such as queries, keys and
    /// values. Takes nothing of [`Epi`].
    pub more: usize,
    /// Tile and splits on a GPU, for measurements and tests; by default the room chooses.
    pub choice: Option<Choice>,
}

const WANT: &str = "x (B,H,W,C), w (O,KH,KW,C)[, bias (O)][, time (B or 1,O)[, counter (4) i32]][, residual (B,H',W',O)]\
    [, u (B,H',W',U)[, v (B,H',W',V)], w (O,U+V), bias (O)], one float type (with shortcut or statistics a 16-bit one, with \
    C, U, V multiples of 8, or as a first layer, and H'·W' of 64)";
const WANT_LINEAR: &str = "x (…,C), w (O,C)[, bias (O)][, residual (…,O)], or x and three weights (O,C), one float type \
    (with gates, statistics or three weights a 16-bit one, C a multiple of 8; with gates w (2·O,C), bias (2·O), O a multiple of 8; \
    with three weights O a multiple of 16)";
const WANT_CHOICE: &str =
    "inputs that the tile and the splits suit which are asked for: `choices` lists those that do";

/// Microseconds of m×n products, each a sum of so many blocks of channels, in tiles of rows×columns on tensor cores: for rooms with a
/// kernel of such tiles.
pub(super) fn tiles_microseconds([rows, columns]: [usize; 2], [m, n]: [usize; 2], blocks: usize) -> f64 {
    tensor_cores::microseconds(tiles::tile("", rows, columns), &tiles::Sums::new(m, n, blocks), 1)
}

impl Epi {
    /// Reads what both rooms have in common; `f` multiplies. `pixels` are the rows of y that one row of `time` serves.
    fn cpu(
        &self,
        io: &mut cpu::Call,
        pixels: usize,
        f: impl FnOnce(Weights, &Epilogue, SliceMut),
    ) -> Result<()> {
        let at = self.inputs();
        let w = io.weights(1);
        let o = io.y[0].shape.last();
        // A single row of `time` serves every image.
        let table = if self.time { io.x[at.time].shape.rows() } else { 1 };
        let step = if self.step { checked_row(io.i32_at(at.step, 0), table)? } else { 0 };
        let rows = if table == 1 || self.step { io.y[0].shape.rows() } else { pixels }.max(1);
        let (bias, time) = (self.bias.then(|| io.slice(at.bias)), self.time.then(|| io.slice(at.time)));
        let residual = self.residual.then(|| io.slice(at.residual));
        cpu::optional(bias, |bias| {
            cpu::optional(time, |time| {
                let batch = time
                    .map(|all| BatchAdd { data: if self.step { &all[step * o..][..o] } else { all }, rows });
                f(w, &Epilogue { bias, batch, act: self.act, residual }, io.out(0));
            });
        });
        Ok(())
    }

    /// Fills in what both rooms give the plain kernel alike, and launches.
    fn plain(&self, io: &cuda::Call, mut p: k::Conv2dFwd, m: usize) -> Result<()> {
        let n = io.y_spec(0).shape.last();
        operands!(io, self, p);
        p.o = io.int(n)?;
        p.m = io.int(m)?;
        let grid = [m.div_ceil(k::BM), n.div_ceil(k::BN), 1];
        io.launch(k::CONV2D_FWD, io.y_spec(0).dtype, "", grid, k::BLOCK, p)
    }
}

/// Computes the outputs by a specification: for the forms that only graphs for a GPU hold, so that every graph runs on a CPU.
pub(super) fn by_specification(io: &mut cpu::Call, spec: impl Fn(&[Array]) -> Vec<Array>) {
    let array =
        |i: usize| Array { shape: io.x[i].shape, data: io.f32(i).iter().map(|&v| v as f64).collect() };
    let x: Vec<Array> = (0..io.x.len()).map(array).collect();
    for (j, y) in spec(&x).iter().enumerate() {
        io.write(j, |out| out.iter_mut().zip(&y.data).for_each(|(to, &v)| *to = v as f32));
    }
}

/// The sum of pixel `i` (b,h,w,o) of y, from the weights of its phase.
fn phase_sum(x: &Array, w: &Array, i: &[usize]) -> f64 {
    let mut sum = 0.0;
    for (dy, dx) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let (h, v) = ((i[1] / 2 + i[1] % 2 + dy).wrapping_sub(1), (i[2] / 2 + i[2] % 2 + dx).wrapping_sub(1));
        if h < x.shape[1] && v < x.shape[2] {
            let phase = i[1] % 2 * 2 + i[2] % 2;
            sum += dot(x.row(&[i[0], h, v]), w.row(&[phase, i[3], dy, dx]));
        }
    }
    sum
}

/// The pixels of y (B,H,W,O) in the order of their phases, image by image.
fn by_phase(y: &Array) -> Array {
    let [b, h, w, o] = [0, 1, 2, 3].map(|axis| y.shape[axis]);
    Array::from_fn([b, 4, h / 2, w / 2, o], |i| y.at(&[i[0], 2 * i[2] + i[1] / 2, 2 * i[3] + i[1] % 2, i[4]]))
}

fn specs(io: &cuda::Call) -> Vec<Spec> {
    io.x.iter().map(|x| x.spec).collect()
}

impl Conv2d {
    /// A convolution with bias, stride 1 and the padding that keeps the size for odd kernels.
    pub fn same(kernel: usize) -> Conv2d {
        let p = kernel / 2;
        let epi = Epi { bias: true, ..Epi::default() };
        Conv2d { stride: 1, pad: [p; 4], upsample: false, phases: false, epi, shortcut: 0, choice: None }
    }

    fn shape(&self, x: Shape, w: Shape) -> Option<ConvShape> {
        // As the convolution of the upsampled image that it stands for.
        let w = match (self.phases, &*w) {
            (true, &[4, o, 2, 2, c]) => [o, 3, 3, c].into(),
            _ => w,
        };
        let (&[b, h, wd, c], &[_, kh, kw, _]) = (&*x, &*w) else { return None };
        let up = if self.upsample { 2 } else { 1 };
        let [top, left, bottom, right] = self.pad;
        let out = |n: usize, k: usize, pad: usize| Some((n * up + pad).checked_sub(k)? / self.stride + 1);
        let (out_h, out_w) = (out(h, kh, top + bottom)?, out(wd, kw, left + right)?);
        let (stride, upsample) = (self.stride, self.upsample);
        Some(ConvShape {
            b,
            h,
            w: wd,
            c,
            kh,
            kw,
            stride,
            pad_top: top,
            pad_left: left,
            out_h,
            out_w,
            upsample,
        })
    }

    /// The kernel of first layers, where it takes these inputs and no tile is asked for.
    fn edge(&self, x: &[Spec]) -> Option<Edge> {
        Edge::conv(self, x).filter(|_| self.choice.is_none())
    }

    /// Channels of y.
    fn columns(&self, w: Shape) -> usize {
        if self.phases { w[1] } else { w[0] }
    }

    fn count(&self) -> usize {
        self.epi.inputs().end + if self.shortcut > 0 { self.shortcut + 2 } else { 0 }
    }

    /// Whether the inputs of the shortcut fit the result.
    fn shortcut_fits(&self, x: &[Spec], y: Spec) -> bool {
        let (first, n) = (self.epi.inputs().end, self.shortcut);
        if n == 0 {
            return true;
        }
        let (u, w, b) = (&x[first..first + n], x[first + n], x[first + n + 1]);
        let pixels = |s: &Spec| s.shape.len() == 4 && s.shape[..3] == y.shape[..3] && s.shape[3] % 8 == 0;
        let width = u.iter().map(|s| s.shape.last()).sum();
        n <= 2 && u.iter().all(pixels) && *w.shape == [y.shape[3], width] && *b.shape == [y.shape[3]]
    }

    fn add_shortcut(&self, x: &[Array], y: &mut Array) {
        let (first, n, o) = (self.epi.inputs().end, self.shortcut, y.shape.last());
        if n == 0 {
            return;
        }
        let (u, w, b) = (&x[first..first + n], &x[first + n], &x[first + n + 1]);
        let width = w.shape.last();
        for (i, v) in y.data.iter_mut().enumerate() {
            let (pixel, row) = (i / o, &w.data[i % o * width..][..width]);
            let inputs = u.iter().flat_map(|u| &u.data[pixel * u.shape.last()..][..u.shape.last()]);
            *v += b.data[i % o] + inputs.zip(row).map(|(a, b)| a * b).sum::<f64>();
        }
    }
}

impl Operation for Conv2d {
    const NAME: &'static str = "conv2d";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let fits = x.len() == self.count()
            && x[0].shape.len() == 4
            && x[1].shape.len() == if self.phases { 5 } else { 4 }
            && x[0].shape[3] == x[1].shape.last()
            && DType::FLOATS.contains(&x[0].dtype)
            && self.stride > 0
            && !self.epi.glu;
        ensure!(fits, Self::NAME, WANT, x);
        let Some(s) = self.shape(x[0].shape, x[1].shape) else {
            return Err(super::shape_error(Self::NAME, "a window no larger than the padded image", x));
        };
        let y = Spec::new(x[0].dtype, [s.b, s.out_h, s.out_w, self.columns(x[1].shape)]);
        ensure!(!self.phases || self.shortcut == 0, Self::NAME, WANT, x);
        let keeps = || {
            self.upsample
                && self.stride == 1
                && self.pad == [1; 4]
                && x[1].shape[..4] == [4, y.shape[3], 2, 2]
        };
        ensure!(!self.phases || keeps(), Self::NAME, WANT, x);
        ensure!(self.epi.fits(x, y.shape[3], y) && self.shortcut_fits(x, y), Self::NAME, WANT, x);
        let fused = self.shortcut > 0 || self.epi.fused();
        let tiled = || Tiled::conv(self, x).is_some();
        ensure!(!fused || self.edge(x).is_some() || tiled(), Self::NAME, WANT, x);
        ensure!(!self.phases || tiled(), Self::NAME, WANT, x);
        ensure!(self.choice.is_none() || tiled(), Self::NAME, WANT_CHOICE, x);
        Ok(self.epi.outputs(y))
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let Some(s) = self.shape(x[0].shape, x[1].shape) else { return vec![] };
        let up = if self.upsample { 2 } else { 1 };
        let mut y = Array::from_fn([s.b, s.out_h, s.out_w, self.columns(x[1].shape)], |i| {
            if self.phases {
                return phase_sum(&x[0], &x[1], i);
            }
            let mut sum = 0.0;
            for kh in 0..s.kh {
                for kw in 0..s.kw {
                    let ih = (i[1] * s.stride + kh).wrapping_sub(s.pad_top);
                    let iw = (i[2] * s.stride + kw).wrapping_sub(s.pad_left);
                    if ih < s.h * up && iw < s.w * up {
                        sum += dot(x[0].row(&[i[0], ih / up, iw / up]), x[1].row(&[i[3], kh, kw]));
                    }
                }
            }
            sum
        });
        self.add_shortcut(x, &mut y);
        let mut outputs = self.epi.finish(x, y);
        if self.epi.stats && self.phases {
            outputs[1] = epi::moments(&by_phase(&outputs[0]), |v, mean| v - mean);
        }
        outputs
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let mut sizes = self.epi.magnitude(self.spec(&x.iter().map(|a| a.map(f64::abs)).collect::<Vec<_>>()));
        if self.epi.stats && self.phases {
            sizes[1] = epi::moments(&by_phase(&sizes[0]), |v, _| v);
        }
        sizes
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        if self.shortcut > 0 || self.phases || self.epi.fused() {
            by_specification(io, |x| self.spec(x));
            return Ok(());
        }
        let Some(shape) = self.shape(io.x[0].shape, io.x[1].shape) else { return Ok(()) };
        let (conv, n, dtype) = (Conv { x: io.slice(0), shape }, io.y[0].shape.last(), io.x[0].dtype);
        self.epi.cpu(io, shape.out_h * shape.out_w, |w, epilogue, y| match winograd::applies(&shape, dtype) {
            true => winograd::conv3x3(&conv, w, n, epilogue, y),
            false => gemm(&conv, w, n, epilogue, y),
        })
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let Some(s) = self.shape(io.x_spec(0).shape, io.x_spec(1).shape) else { return Ok(()) };
        if let Some(edge) = self.edge(&specs(io)) {
            return edge.launch(self, &s, io);
        }
        if let Some(product) = Tiled::conv(self, &specs(io)) {
            return product.launch_conv(self, &s, io);
        }
        let mut p = k::Conv2dFwd::default();
        windows!(io, &s, p);
        self.epi.plain(io, p, s.b * s.out_h * s.out_w)
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        dy[0].map_or_else(|| Ok(vec![None; x.len()]), |dy| self.gradients(g, x, dy))
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        match self.edge(x) {
            Some(_) => 0,
            None => Tiled::conv(self, x).map_or(0, |product| product.partial_bytes()),
        }
    }

    fn fuse(&self, g: &Graph, at: Var, target: Target) -> Option<Rewrite> {
        fold::shortcut(g, at, target)
    }

    fn variant(&self, x: &[Spec]) -> &'static str {
        let product = || Tiled::conv(self, x).map(|product| product.tile.name);
        self.edge(x).map(|edge| edge.variant()).or_else(product).unwrap_or_default()
    }

    fn launches(&self, x: &[Spec]) -> Vec<LaunchPlan> {
        let product = || Tiled::conv(self, x).map(|product| product.plan(x[0].dtype));
        self.edge(x).map(|edge| edge.plan(x[0].dtype)).or_else(product).into_iter().collect()
    }

    fn choices(&self, x: &[Spec]) -> Vec<Op> {
        let with = |choice| Conv2d { choice: Some(choice), ..self.clone() }.into();
        Tiled::choices_conv(self, x).into_iter().map(with).collect()
    }

    /// Behind an upsampling: four 2×2 convolutions, where a kernel with tiles takes them.
    fn prepared(&self, x: &[Spec]) -> Option<(Op, usize, Op)> {
        let op = Conv2d { phases: true, ..self.clone() };
        let w = super::PhaseWeights.infer(&x[1..2]).ok()?[0];
        let specs: Vec<Spec> = [&x[..1], &[w], &x[2..]].concat();
        (self.upsample && op.infer(&specs).is_ok()).then(|| (op.into(), 1, super::PhaseWeights.into()))
    }

    fn with_stats(&self, x: &[Spec]) -> Option<Op> {
        let op = Conv2d { epi: Epi { stats: true, ..self.epi.clone() }, ..self.clone() };
        op.infer(x).is_ok().then(|| op.into())
    }

    fn packed(&self) -> Option<usize> {
        Some(1)
    }

    fn cpu_scratch(&self, x: &[Spec], y: &[Spec]) -> usize {
        let Some(shape) = self.shape(x[0].shape, x[1].shape) else { return 0 };
        let n = y[0].shape.last();
        match winograd::applies(&shape, x[0].dtype) {
            true => winograd::working_bytes(&shape, n),
            false => working_bytes(x[0].dtype, y[0].shape.rows(), n, x[1].shape.numel() / n.max(1)),
        }
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let k = x[1].shape.numel() / self.columns(x[1].shape).max(1) / if self.phases { 4 } else { 1 };
        let width = if self.shortcut > 0 { x[x.len() - 2].shape.last() } else { 0 };
        Cost::streaming(y[0].shape.numel().saturating_mul(2 * (k + width)), x, y)
    }

    fn cases() -> Vec<Case> {
        cases::conv()
    }

    fn random(r: &mut Small) -> Case {
        cases::random_conv(r)
    }
}

impl Operation for Linear {
    const NAME: &'static str = "linear";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let fits = x.len() == self.epi.inputs().end + self.more
            && !self.epi.time
            && !x[0].shape.is_empty()
            && x[1].shape.len() == 2
            && x[0].shape.last() == x[1].shape[1]
            && DType::FLOATS.contains(&x[0].dtype);
        ensure!(fits, Self::NAME, WANT_LINEAR, x);
        if self.more > 0 {
            let same = self.more == 2 && self.epi == Epi::default() && x[1..].iter().all(|w| *w == x[1]);
            ensure!(same && x[0].dtype == x[1].dtype, Self::NAME, WANT_LINEAR, x);
            ensure!(Tiled::linear(self, x).is_some(), Self::NAME, WANT_LINEAR, x);
            return Ok(vec![Spec::new(x[0].dtype, x[0].shape.with_last(3 * x[1].shape[0]))]);
        }
        let rows = x[1].shape[0];
        let y = Spec::new(x[0].dtype, x[0].shape.with_last(self.epi.columns(rows)));
        ensure!(self.epi.fits(x, rows, y), Self::NAME, WANT_LINEAR, x);
        ensure!(!self.epi.fused() || Tiled::linear(self, x).is_some(), Self::NAME, WANT_LINEAR, x);
        ensure!(self.choice.is_none() || Tiled::linear(self, x).is_some(), Self::NAME, WANT_CHOICE, x);
        Ok(self.epi.outputs(y))
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let (c, each) = (x[0].shape.last(), x[1].shape[0]);
        let o = each * (1 + self.more);
        let mut y = Array::zeros(x[0].shape.with_last(o));
        for (i, v) in y.data.iter_mut().enumerate() {
            let w = &x[1 + i % o / each].data;
            let (row, w) = (&x[0].data[i / o * c..][..c], &w[i % o % each * c..][..c]);
            *v = dot(row, w);
        }
        self.epi.finish(x, y)
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.epi.magnitude(self.spec(&x.iter().map(|a| a.map(f64::abs)).collect::<Vec<_>>()))
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        if self.epi.fused() || self.more > 0 {
            by_specification(io, |x| self.spec(x));
            return Ok(());
        }
        let (m, c) = (io.x[0].shape.rows(), io.x[0].shape.last());
        let (x, n) = (Dense::new(io.slice(0), m, c), io.y[0].shape.last());
        self.epi.cpu(io, m, |w, epilogue, y| gemm(&x, w, n, epilogue, y))
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        if let Some(product) = Tiled::linear(self, &specs(io)) {
            return product.launch_linear(self, io);
        }
        let s = io.x_spec(0).shape;
        // A convolution with a 1×1 window over a column of pixels.
        let p = k::Conv2dFwd {
            h: io.int(s.rows())?,
            w_: 1,
            c: io.int(s.last())?,
            kh: 1,
            kw: 1,
            out_h: io.int(s.rows())?,
            out_w: 1,
            stride: 1,
            ..Default::default()
        };
        self.epi.plain(io, p, s.rows())
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        dy[0].map_or_else(|| Ok(vec![None; x.len()]), |dy| self.gradients(g, x, dy))
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        Tiled::linear(self, x).map_or(0, |product| product.partial_bytes())
    }

    fn variant(&self, x: &[Spec]) -> &'static str {
        Tiled::linear(self, x).map_or("", |product| product.tile.name)
    }

    fn launches(&self, x: &[Spec]) -> Vec<LaunchPlan> {
        Tiled::linear(self, x).map(|product| product.plan(x[0].dtype)).into_iter().collect()
    }

    fn choices(&self, x: &[Spec]) -> Vec<Op> {
        let with = |choice| Linear { choice: Some(choice), ..self.clone() }.into();
        Tiled::choices_linear(self, x).into_iter().map(with).collect()
    }

    fn with_stats(&self, x: &[Spec]) -> Option<Op> {
        let op = Linear { epi: Epi { stats: true, ..self.epi.clone() }, ..self.clone() };
        op.infer(x).is_ok().then(|| op.into())
    }

    fn packed(&self) -> Option<usize> {
        Some(1)
    }

    fn cpu_scratch(&self, x: &[Spec], y: &[Spec]) -> usize {
        working_bytes(x[0].dtype, y[0].shape.rows(), y[0].shape.last(), x[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let products = 2 * x[1].shape.numel() * (1 + self.more);
        Cost::streaming(x[0].shape.rows().saturating_mul(products), x, y)
    }

    fn cases() -> Vec<Case> {
        cases::linear()
    }

    fn random(r: &mut Small) -> Case {
        cases::random_linear(r)
    }
}
