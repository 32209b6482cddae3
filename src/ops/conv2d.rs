//! y = act(conv(x, w) + bias + time) + residual, and the same for a matrix product.
//!
//! y[b,h,w,o] = Σ x[b, h·s − top + kh, w·s − left + kw, c] · w[o,kh,kw,c], zero outside; with `upsample` x is first
//! doubled by nearest neighbour. PyTorch: `F.conv2d`, `F.linear`, `F.interpolate(scale_factor=2)`.
//! Kernel: `kernels/conv2d.cu`, one implicit GEMM for both.
use super::activation::{Act, code};
use super::prelude::*;
use super::Op;
use crate::backend::cpu::SliceMut;
use crate::backend::cpu::gemm::{BatchAdd, Conv, ConvShape, Dense, Epilogue, Weights, gemm, working_bytes};
use crate::backend::cpu::winograd;
use crate::kernels::conv2d as k;

/// What is added to a product before it is stored; absent parts take no input.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Epi {
    /// Input bias (O).
    pub bias: bool,
    /// Input time (B,O) or (1,O): added to every pixel of an image.
    pub time: bool,
    /// Applied to the sum.
    pub act: Act,
    /// Input residual of y's shape, added last.
    pub residual: bool,
}

/// Convolution of x (B,H,W,C) with w (O,KH,KW,C); further inputs in the order of [`Epi`].
#[derive(Clone, PartialEq, Debug)]
pub struct Conv2d {
    /// Step of the window on both axes.
    pub stride: usize,
    /// Zeros at top, left, bottom, right.
    pub pad: [usize; 4],
    /// Double x by nearest neighbour first.
    pub upsample: bool,
    /// The rest of the sum.
    pub epi: Epi,
}

/// Matrix product of x (…,C) with w (O,C); further inputs in the order of [`Epi`].
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Linear {
    /// The rest of the sum.
    pub epi: Epi,
}

const WANT: &str = "x (B,H,W,C), w (O,KH,KW,C)[, bias (O)][, time (B or 1,O)][, residual (B,H',W',O)], one float type";
const WANT_LINEAR: &str = "x (…,C), w (O,C)[, bias (O)][, residual (…,O)], one float type";

/// Which input holds what; 0 stands for none, since input 0 is always x.
#[derive(Default)]
struct Inputs {
    bias: usize,
    time: usize,
    residual: usize,
}

impl Epi {
    fn inputs(&self) -> Inputs {
        let mut next = 2;
        let mut take = |there: bool| {
            next += there as usize;
            if there { next - 1 } else { 0 }
        };
        Inputs { bias: take(self.bias), time: take(self.time), residual: take(self.residual) }
    }

    fn count(&self) -> usize {
        2 + self.bias as usize + self.time as usize + self.residual as usize
    }

    fn fits(&self, x: &[Spec], y: Spec) -> bool {
        let (at, o) = (self.inputs(), y.shape.last());
        let time = |s: Spec| s.shape.last() == o && [1, y.shape[0]].contains(&s.shape.rows());
        x.iter().all(|s| s.dtype == x[0].dtype)
            && (!self.bias || *x[at.bias].shape == [o])
            && (!self.time || (time(x[at.time]) && y.shape.len() == 4))
            && (!self.residual || x[at.residual] == y)
    }

    fn finish(&self, x: &[Array], mut y: Array) -> Array {
        let (at, o) = (self.inputs(), y.shape.last());
        let per_image = y.data.len() / y.shape[0].max(1);
        for (i, v) in y.data.iter_mut().enumerate() {
            if self.bias {
                *v += x[at.bias].data[i % o];
            }
            if self.time {
                let row = if x[at.time].shape.rows() == 1 { 0 } else { i / per_image };
                *v += x[at.time].data[row * o + i % o];
            }
            *v = self.act.apply_f64(*v);
            if self.residual {
                *v += x[at.residual].data[i];
            }
        }
        y
    }

    /// Reads what both rooms have in common; `f` multiplies. `pixels` are the rows of y that one row of `time` serves.
    fn cpu(&self, io: &mut cpu::Call, pixels: usize, f: impl FnOnce(Weights, &Epilogue, SliceMut)) {
        let at = self.inputs();
        let w = io.weights(1);
        // A single row of `time` serves every image.
        let all = self.time && io.x[at.time].shape.rows() == 1;
        let rows = if all { io.y[0].shape.rows() } else { pixels }.max(1);
        let (bias, time) = (self.bias.then(|| io.slice(at.bias)), self.time.then(|| io.slice(at.time)));
        let residual = self.residual.then(|| io.slice(at.residual));
        cpu::optional(bias, |bias| {
            cpu::optional(time, |time| {
                let batch = time.map(|data| BatchAdd { data, rows });
                f(w, &Epilogue { bias, batch, act: self.act, residual }, io.out(0));
            });
        });
    }

    /// Fills in what both rooms give the kernel alike, and launches.
    fn cuda(&self, io: &cuda::Call, mut p: k::Conv2dFwd, m: usize) -> Result<()> {
        let (at, n) = (self.inputs(), io.y_spec(0).shape.last());
        let input = |i: usize| if i == 0 { Default::default() } else { io.x(i) };
        p.y = io.y(0);
        p.x = io.x(0);
        p.w = io.x(1);
        p.bias = input(at.bias);
        p.time = input(at.time);
        p.residual = input(at.residual);
        p.time_rows = if self.time { io.int(io.x_spec(at.time).shape.rows())? } else { 1 };
        p.act = code(self.act);
        p.o = io.int(n)?;
        p.m = io.int(m)?;
        let grid = [m.div_ceil(k::BM), n.div_ceil(k::BN), 1];
        io.launch(k::CONV2D_FWD, io.y_spec(0).dtype, "", grid, k::BLOCK, p)
    }
}

impl Conv2d {
    /// A convolution with bias, stride 1 and the padding that keeps the size for odd kernels.
    pub fn same(kernel: usize) -> Conv2d {
        let p = kernel / 2;
        Conv2d { stride: 1, pad: [p; 4], upsample: false, epi: Epi { bias: true, ..Epi::default() } }
    }

    fn shape(&self, x: Shape, w: Shape) -> Option<ConvShape> {
        let (&[b, h, wd, c], &[_, kh, kw, _]) = (&*x, &*w) else { return None };
        let up = if self.upsample { 2 } else { 1 };
        let [top, left, bottom, right] = self.pad;
        let out = |n: usize, k: usize, pad: usize| Some((n * up + pad).checked_sub(k)? / self.stride + 1);
        let (out_h, out_w) = (out(h, kh, top + bottom)?, out(wd, kw, left + right)?);
        let (stride, upsample) = (self.stride, self.upsample);
        Some(ConvShape { b, h, w: wd, c, kh, kw, stride, pad_top: top, pad_left: left, out_h, out_w, upsample })
    }
}

impl Operation for Conv2d {
    const NAME: &'static str = "conv2d";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let fits = x.len() == self.epi.count()
            && x[0].shape.len() == 4
            && x[1].shape.len() == 4
            && x[0].shape[3] == x[1].shape[3]
            && DType::FLOATS.contains(&x[0].dtype)
            && self.stride > 0;
        ensure!(fits, Self::NAME, WANT, x);
        let Some(s) = self.shape(x[0].shape, x[1].shape) else {
            return Err(super::shape_error(Self::NAME, "a window no larger than the padded image", x));
        };
        let y = Spec::new(x[0].dtype, [s.b, s.out_h, s.out_w, x[1].shape[0]]);
        ensure!(self.epi.fits(x, y), Self::NAME, WANT, x);
        Ok(vec![y])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let Some(s) = self.shape(x[0].shape, x[1].shape) else { return vec![] };
        let up = if self.upsample { 2 } else { 1 };
        let y = Array::from_fn([s.b, s.out_h, s.out_w, x[1].shape[0]], |i| {
            let mut sum = 0.0;
            for kh in 0..s.kh {
                for kw in 0..s.kw {
                    let ih = (i[1] * s.stride + kh).wrapping_sub(s.pad_top);
                    let iw = (i[2] * s.stride + kw).wrapping_sub(s.pad_left);
                    if ih < s.h * up && iw < s.w * up {
                        for c in 0..s.c {
                            sum += x[0].at(&[i[0], ih / up, iw / up, c]) * x[1].at(&[i[3], kh, kw, c]);
                        }
                    }
                }
            }
            sum
        });
        vec![self.epi.finish(x, y)]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let Some(shape) = self.shape(io.x[0].shape, io.x[1].shape) else { return Ok(()) };
        let (conv, n, dtype) = (Conv { x: io.slice(0), shape }, io.y[0].shape.last(), io.x[0].dtype);
        self.epi.cpu(io, shape.out_h * shape.out_w, |w, epilogue, y| match winograd::applies(&shape, dtype) {
            true => winograd::conv3x3(&conv, w, n, epilogue, y),
            false => gemm(&conv, w, n, epilogue, y),
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let Some(s) = self.shape(io.x_spec(0).shape, io.x_spec(1).shape) else { return Ok(()) };
        let p = k::Conv2dFwd {
            h: io.int(s.h)?,
            w_: io.int(s.w)?,
            c: io.int(s.c)?,
            kh: io.int(s.kh)?,
            kw: io.int(s.kw)?,
            out_h: io.int(s.out_h)?,
            out_w: io.int(s.out_w)?,
            stride: io.int(s.stride)?,
            top: io.int(s.pad_top)?,
            left: io.int(s.pad_left)?,
            upsample: s.upsample as i32,
            ..Default::default()
        };
        self.epi.cuda(io, p, s.b * s.out_h * s.out_w)
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
        let k: usize = x[1].shape[1..].iter().product();
        Cost::streaming(y[0].shape.numel().saturating_mul(2 * k), x, y)
    }

    fn cases() -> Vec<Case> {
        let same = |kernel| Conv2d::same(kernel);
        let with = |f: &dyn Fn(&mut Conv2d)| {
            let mut op = Conv2d::same(3);
            f(&mut op);
            op
        };
        let full = |act| with(&|o| o.epi = Epi { bias: true, time: true, act, residual: true });
        let down = |pad| with(&|o| (o.stride, o.pad) = (2, pad));
        let up = with(&|o| o.upsample = true);
        let bare = with(&|o| o.epi = Epi::default());
        let conv = |op: Conv2d, x: [usize; 4], o: usize, k: usize| {
            let w = t([o, k, k, x[3]]).normal(0.0, 1.0 / (k as f64 * (x[3] as f64).sqrt()));
            let mut args = vec![t(x), w];
            let (dh, dw) = {
                let s = op.shape(x.into(), [o, k, k, x[3]].into());
                s.map_or((1, 1), |s| (s.out_h, s.out_w))
            };
            args.extend(op.epi.bias.then(|| t([o])));
            args.extend(op.epi.time.then(|| t([x[0], o])));
            args.extend(op.epi.residual.then(|| t([x[0], dh, dw, o])));
            Case::new(op, args)
        };
        let mut small = vec![
            conv(same(3), [1, 1, 1, 1], 1, 3),
            conv(same(3), [2, 8, 8, 32], 32, 3),
            conv(same(3), [3, 5, 7, 3], 65, 3),
            conv(same(1), [1, 9, 4, 33], 17, 1),
            conv(same(3), [1, 6, 6, 64], 3, 3),
            conv(full(Act::None), [2, 7, 5, 20], 70, 3),
            conv(full(Act::Silu), [3, 4, 4, 8], 12, 3),
            conv(down([1; 4]), [2, 8, 8, 16], 16, 3),
            conv(down([1; 4]), [1, 7, 9, 5], 6, 3),
            conv(down([0, 0, 1, 1]), [1, 8, 6, 16], 24, 3),
            conv(up.clone(), [2, 3, 4, 16], 16, 3),
            conv(bare.clone(), [1, 10, 10, 4], 320, 3),
            conv(same(5), [1, 6, 6, 3], 4, 5),
            conv(full(Act::None), [2, 13, 11, 48], 40, 3),
            conv(up.clone(), [1, 7, 9, 32], 33, 3),
            conv(with(&|o| o.pad = [0, 2, 1, 1]), [3, 16, 10, 64], 24, 3),
            conv(bare.clone(), [1, 9, 9, 544], 20, 3),
        ];
        let real = |op, [b, side, c, o]: [usize; 4], k| conv(op, [b, side, side, c], o, k).weights(1..3).bench();
        for &(b, side, c, outs) in REAL {
            // A block that changes the channels has a 1×1 beside it; one that does not may change the size.
            small.extend(outs.iter().map(|&o| real(same(3), [b, side, c, o], 3)));
            small.extend(outs.iter().filter(|&&o| o != c).map(|&o| real(same(1), [b, side, c, o], 1)));
        }
        small.extend(REAL_DOWN.map(|[side, c]| real(down([1; 4]), [2, side, c, c], 3)));
        small.extend(REAL_UP.map(|[b, side, c]| real(up.clone(), [b, side, c, c], 3)));
        small.extend(REAL_EDGE.map(|x| real(same(3), x, 3)));
        small.extend([3, 4].map(|c| real(same(1), [1, 64, c, c], 1)));
        small
    }

    fn random(r: &mut Small) -> Case {
        let k: usize = [1, 3, 3, 4][r.below(4)];
        let x = [r.below(3) + 1, r.below(9) + 1, r.below(9) + 1, r.below(40) + 1];
        let o = r.below(72) + 1;
        let mut pad = [0; 4];
        pad.iter_mut().for_each(|p| *p = r.below(k.div_ceil(2) + 1));
        pad[2] += k.saturating_sub(x[1] + pad[0] + pad[2]);
        pad[3] += k.saturating_sub(x[2] + pad[1] + pad[3]);
        let epi = Epi { bias: r.below(2) == 0, time: r.below(3) == 0, ..Epi::default() };
        let op = Conv2d { stride: r.below(2) + 1, pad, upsample: r.below(4) == 0, epi };
        let w = t([o, k, k, x[3]]).normal(0.0, 1.0 / (k as f64 * (x[3] as f64).sqrt()));
        let mut args = vec![t(x), w];
        args.extend(op.epi.bias.then(|| t([o])));
        args.extend(op.epi.time.then(|| t([1, o])));
        Case::new(op, args)
    }
}

impl Operation for Linear {
    const NAME: &'static str = "linear";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let fits = x.len() == self.epi.count()
            && !self.epi.time
            && !x[0].shape.is_empty()
            && x[1].shape.len() == 2
            && x[0].shape.last() == x[1].shape[1]
            && DType::FLOATS.contains(&x[0].dtype);
        ensure!(fits, Self::NAME, WANT_LINEAR, x);
        let y = Spec::new(x[0].dtype, x[0].shape.with_last(x[1].shape[0]));
        ensure!(self.epi.fits(x, y), Self::NAME, WANT_LINEAR, x);
        Ok(vec![y])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let (c, o) = (x[0].shape.last(), x[1].shape[0]);
        let mut y = Array::zeros(x[0].shape.with_last(o));
        for (i, v) in y.data.iter_mut().enumerate() {
            let (row, w) = (&x[0].data[i / o * c..][..c], &x[1].data[i % o * c..][..c]);
            *v = row.iter().zip(w).map(|(a, b)| a * b).sum();
        }
        vec![self.epi.finish(x, y)]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (m, c) = (io.x[0].shape.rows(), io.x[0].shape.last());
        let (x, n) = (Dense::new(io.slice(0), m, c), io.y[0].shape.last());
        self.epi.cpu(io, m, |w, epilogue, y| gemm(&x, w, n, epilogue, y));
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
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
        self.epi.cuda(io, p, s.rows())
    }

    fn packed(&self) -> Option<usize> {
        Some(1)
    }

    fn cpu_scratch(&self, x: &[Spec], y: &[Spec]) -> usize {
        working_bytes(x[0].dtype, y[0].shape.rows(), y[0].shape.last(), x[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(y[0].shape.numel().saturating_mul(2 * x[0].shape.last()), x, y)
    }

    fn cases() -> Vec<Case> {
        let linear = |x: &[usize], o: usize, epi: Epi| {
            let c = x[x.len() - 1];
            let mut args = vec![t(x), t([o, c]).normal(0.0, 1.0 / (c as f64).sqrt())];
            args.extend(epi.bias.then(|| t([o])));
            args.extend(epi.residual.then(|| t(Shape::new(x).with_last(o))));
            Case::new(Linear { epi }, args)
        };
        let bias = Epi { bias: true, ..Epi::default() };
        let res = Epi { residual: true, ..bias.clone() };
        let act = |act| Epi { act, ..bias.clone() };
        let mut small = vec![
            linear(&[1, 1], 1, Epi::default()),
            linear(&[1, 320], 1280, bias.clone()),
            linear(&[2, 77, 32], 32, Epi::default()),
            linear(&[2, 77, 32], 37, act(Act::QuickGelu)),
            linear(&[3, 5, 37], 65, act(Act::Gelu)),
            linear(&[2, 4, 4, 64], 64, res.clone()),
            linear(&[130, 129], 67, res),
            linear(&[2, 3, 100], 1, act(Act::Silu)),
            linear(&[5, 768], 3, bias.clone()),
        ];
        for (rows, c) in REAL_TOKENS {
            // Output and queries; queries, keys and values at once; the two of the feed-forward.
            let products = [(c, c), (c, 3 * c), (c, 8 * c), (4 * c, c)];
            small.extend(products.map(|(c, o)| linear(&[rows, c], o, bias.clone()).weights(1..3).bench()));
        }
        for &(rows, c, outs) in REAL_LINEAR {
            small.extend(outs.iter().map(|&o| linear(&[rows, c], o, bias.clone()).weights(1..3).bench()));
        }
        small
    }

    fn random(r: &mut Small) -> Case {
        let (rows, c, o) = (r.below(90) + 1, r.below(150) + 1, r.below(150) + 1);
        let epi = Epi { bias: r.below(2) == 0, residual: r.below(2) == 0, ..Epi::default() };
        let mut args = vec![t([rows, c]), t([o, c]).normal(0.0, 1.0 / (c as f64).sqrt())];
        args.extend(epi.bias.then(|| t([o])));
        args.extend(epi.residual.then(|| t([rows, o])));
        Case::new(Linear { epi }, args)
    }
}

/// `at` = a + b where b (or a) is a product without residual that nothing else reads: the other becomes its residual.
pub(super) fn absorb_residual(g: &Graph, at: Var) -> Option<Rewrite> {
    let add = g.maker(at)?;
    let uses = g.uses();
    [(add.x[1], add.x[0]), (add.x[0], add.x[1])].into_iter().find_map(|(product, other)| {
        let node = g.maker(product).filter(|_| uses[product.index()] == 1 && product != other)?;
        let mut op = node.op.clone();
        match &mut op {
            Op::Conv2d(Conv2d { epi, .. }) | Op::Linear(Linear { epi }) if !epi.residual => epi.residual = true,
            _ => return None,
        }
        Some(Rewrite { op, x: [&node.x[..], &[other]].concat() })
    })
}

/// Convolutions 3×3 that keep the size, for the benches: images, side, C, each O. UNets of SD 1.5 (64×64 latents), SDXL
/// (128×128) and LDM 1.45B (32×32) with guidance; decoders of KL-f8 (512×512 pixels) and VQ-f4 (256×256).
const REAL: &[(usize, usize, usize, &[usize])] = &[
    (2, 128, 320, &[320]),
    (2, 128, 640, &[320]),
    (2, 128, 960, &[320]),
    (2, 64, 320, &[320, 640]),
    (2, 64, 640, &[320, 640]),
    (2, 64, 960, &[320, 640]),
    (2, 64, 1280, &[640]),
    (2, 64, 1920, &[640]),
    (2, 32, 320, &[320, 640]),
    (2, 32, 640, &[320, 640, 1280]),
    (2, 32, 960, &[320, 640]),
    (2, 32, 1280, &[640, 1280]),
    (2, 32, 1920, &[640, 1280]),
    (2, 32, 2560, &[1280]),
    (2, 16, 320, &[640]),
    (2, 16, 640, &[640, 1280]),
    (2, 16, 960, &[640]),
    (2, 16, 1280, &[640, 1280]),
    (2, 16, 1920, &[640, 1280]),
    (2, 16, 2560, &[1280]),
    (2, 8, 640, &[1280]),
    (2, 8, 1280, &[1280]),
    (2, 8, 1920, &[1280]),
    (2, 8, 2560, &[1280]),
    (2, 4, 1280, &[1280]),
    (2, 4, 2560, &[1280]),
    (1, 64, 512, &[512]),
    (1, 128, 256, &[256]),
    (1, 128, 512, &[256, 512]),
    (1, 256, 128, &[128]),
    (1, 256, 256, &[128, 256]),
    (1, 256, 512, &[256]),
    (1, 512, 128, &[128]),
    (1, 512, 256, &[128]),
];

/// With stride 2: side and channels of two images.
const REAL_DOWN: [[usize; 2]; 8] =
    [[128, 320], [64, 320], [64, 640], [32, 320], [32, 640], [16, 640], [16, 1280], [8, 1280]];

/// Behind a nearest upsampling: images, side before it, channels.
const REAL_UP: [[usize; 3]; 11] = [
    [2, 64, 640],
    [2, 32, 640],
    [2, 32, 1280],
    [2, 16, 640],
    [2, 16, 1280],
    [2, 8, 1280],
    [2, 4, 1280],
    [1, 256, 256],
    [1, 128, 256],
    [1, 128, 512],
    [1, 64, 512],
];

/// First and last layers: images, side, C, O.
const REAL_EDGE: [[usize; 4]; 10] = [
    [2, 128, 4, 320],
    [2, 128, 320, 4],
    [2, 64, 4, 320],
    [2, 64, 320, 4],
    [2, 32, 4, 320],
    [2, 32, 320, 4],
    [1, 64, 3, 512],
    [1, 64, 4, 512],
    [1, 256, 128, 3],
    [1, 512, 128, 3],
];

/// Rows and width of the transformers in those UNets.
const REAL_TOKENS: [(usize, usize); 9] = [
    (8192, 320),
    (8192, 640),
    (2048, 320),
    (2048, 640),
    (2048, 1280),
    (512, 640),
    (512, 1280),
    (128, 1280),
    (32, 1280),
];

/// Rows, C, each O: attention of the decoders, keys and values of the text, embeddings of the time.
const REAL_LINEAR: &[(usize, usize, &[usize])] = &[
    (4096, 512, &[512, 1536]),
    (154, 768, &[320, 640, 1280, 2560]),
    (154, 1280, &[640, 1280, 2560]),
    (154, 2048, &[1280, 2560]),
    (2, 320, &[1280]),
    (2, 1280, &[320, 640, 1280]),
    (2, 2816, &[1280]),
];
