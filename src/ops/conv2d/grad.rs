//! Gradients of products. That of the input is a product again, with the weights transposed, so it runs on the same fast
//! kernels; that of the weights is a product over pixels, in f32 (`kernels/conv2d_weight_grad_mma.cu` on tensor cores, for 16-bit
//! types and channels that are multiples of 8; `kernels/conv2d_weight_grad.cu` for the rest).

use super::super::prelude::*;
use super::super::{ActivationGrad, Dilate, Op, SumPool, SumRows};
use super::tiles::Choice;
use super::weight_grad::Divided;
use super::{Conv2d, Epi, Linear, WANT_CHOICE};
use crate::backend::cpu::gemm::{
    Conv, ConvShape, Epilogue, Transposed, Weights, gemm, pixels_bytes, working_bytes,
};
use crate::kernels::conv2d_transpose as turn;
use crate::ops::Act;

/// The gradients of what follows a product: those of the inputs from the third on, and of the bare product's result.
fn epilogue(op: Op, epi: &Epi, g: &mut Graph, x: &[Var], dy: Var) -> Result<(Var, Vec<Option<Var>>)> {
    let (at, mut dx) = (epi.inputs(), vec![None; x.len()]);
    if epi.residual {
        dx[at.residual] = Some(dy);
    }
    let mut dz = dy;
    if epi.act != Act::None {
        // The sum before the activation, once more: the activation left nothing to tell it from.
        let inputs = if epi.residual { &x[..x.len() - 1] } else { x };
        let sum = g.push("sum", op, inputs)?;
        dz = g.push("act.dx", ActivationGrad(epi.act), &[sum, dy])?;
    }
    if epi.bias {
        dx[at.bias] = Some(g.push("dbias", SumRows { by_image: false }, &[dz])?);
    }
    if epi.time {
        dx[at.time] = Some(g.push("dtime", SumRows { by_image: true }, &[dz])?);
    }
    Ok((dz, dx))
}

/// Whether what follows the product can be differentiated: not what only fused graphs and samplers hold.
fn plain(epi: &Epi) -> bool {
    !epi.fused() && !epi.step
}

impl Conv2d {
    pub(super) fn gradients(&self, g: &mut Graph, x: &[Var], dy: Var) -> Result<Vec<Option<Var>>> {
        let time_by_image = || {
            let rows = g.shape(x[self.epi.inputs().time]).rows();
            !self.epi.time || rows == g.shape(dy)[0]
        };
        let [_, kh, kw, _] = *g.shape(x[1]) else { return Err(Error::NoGradient(Self::NAME)) };
        let narrow = [kh, kw, kh, kw].iter().zip(self.pad).all(|(&k, pad)| pad < k);
        if !plain(&self.epi) || self.shortcut > 0 || !narrow || !time_by_image() {
            return Err(Error::NoGradient(Self::NAME));
        }
        let bare =
            Conv2d { epi: Epi { act: Act::None, residual: false, ..self.epi.clone() }, ..self.clone() };
        let (dz, mut dx) = epilogue(bare.into(), &self.epi, g, x, dy)?;
        let window = Window { kernel: [kh, kw], stride: self.stride, pad: self.pad, upsample: self.upsample };
        dx[1] = Some(g.push("dw", WeightGrad { window: Some(window), choice: None }, &[x[0], dz])?);
        dx[0] = Some(self.to_input(g, x[0], x[1], dz)?);
        Ok(dx)
    }

    /// dx: the gradient with zeros between its pixels where there is a stride, convolved with the weights transposed.
    fn to_input(&self, g: &mut Graph, x: Var, w: Var, dz: Var) -> Result<Var> {
        let (s, window) = (g.shape(x), g.shape(w));
        let up = if self.upsample { 2 } else { 1 };
        let size = [s[1] * up, s[2] * up];
        let w = g.push("w.transposed", TransposeWeights, &[w])?;
        let dz = match self.stride {
            1 => dz,
            stride => g.push("dy.dilated", Dilate { stride }, &[dz])?,
        };
        let (d, [top, left, ..]) = (g.shape(dz), self.pad);
        // All of the input: as many rows above as the window reaches beyond the padding, and below as are left.
        let before = [window[1] - 1 - top, window[2] - 1 - left];
        let after = [0, 1].map(|i| size[i] + window[1 + i] - 1 - before[i] - d[1 + i]);
        let pad = [before[0], before[1], after[0], after[1]];
        let op = Conv2d { pad, epi: Epi::default(), ..Conv2d::same(1) };
        let dx = g.push("dx", op, &[dz, w])?;
        if self.upsample { g.push("dx.pooled", SumPool, &[dx]) } else { Ok(dx) }
    }
}

impl Linear {
    pub(super) fn gradients(&self, g: &mut Graph, x: &[Var], dy: Var) -> Result<Vec<Option<Var>>> {
        if !plain(&self.epi) || self.more > 0 {
            return Err(Error::NoGradient(Self::NAME));
        }
        let bare =
            Linear { epi: Epi { act: Act::None, residual: false, ..self.epi.clone() }, ..self.clone() };
        let (dz, mut dx) = epilogue(bare.into(), &self.epi, g, x, dy)?;
        dx[1] = Some(g.push("dw", WeightGrad { window: None, choice: None }, &[x[0], dz])?);
        let w = g.push("w.transposed", TransposeWeights, &[x[1]])?;
        dx[0] = Some(g.push("dx", Linear::default(), &[dz, w])?);
        Ok(dx)
    }
}

/// What of x meets a pixel of y, as the fields of [`Conv2d`] say it.
#[derive(Clone, PartialEq, Debug)]
pub struct Window {
    /// Height and width of the window.
    pub kernel: [usize; 2],
    /// Step of the window on both axes.
    pub stride: usize,
    /// Zeros at top, left, bottom, right.
    pub pad: [usize; 4],
    /// Double x by nearest neighbour first.
    pub upsample: bool,
}

/// x and dy, the inputs of a product and the gradient of its result, to the gradient of its weights, in f32: x (B,H,W,C), dy
/// (B,H',W',O) to (O,KH,KW,C), or without a window x (…,C), dy (…,O) to (O,C).
#[derive(Clone, PartialEq, Debug)]
pub struct WeightGrad {
    /// The window of a convolution; none for a matrix product.
    pub window: Option<Window>,
    /// Tile and parts of the pixels on a GPU, for measurements and tests; by default the room chooses.
    pub choice: Option<Choice>,
}

impl WeightGrad {
    /// The convolution whose weights these are.
    fn shape(&self, x: Shape, dy: Shape) -> Option<ConvShape> {
        let Some(Window { kernel, stride, pad, upsample }) = self.window.clone() else {
            let (rows, c) = (x.rows(), x.last());
            let one = ConvShape { b: 1, h: rows, w: 1, c, kh: 1, kw: 1, stride: 1, ..ConvShape::default() };
            return Some(ConvShape { out_h: rows, out_w: 1, ..one });
        };
        let op = Conv2d { stride, pad, upsample, epi: Epi::default(), ..Conv2d::same(1) };
        op.shape(x, [dy.last(), kernel[0], kernel[1], x.last()].into())
    }

    /// How a GPU does it; `None`: not as it is asked for.
    fn divided(&self, x: &[Spec]) -> Option<(ConvShape, Divided)> {
        let s = self.shape(x[0].shape, x[1].shape)?;
        Some((s, Divided::new(&s, x[1].shape.last(), x[0].dtype, self.choice)?))
    }
}

impl Operation for WeightGrad {
    const NAME: &'static str = "weight_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = match self.window {
            Some(_) => "x (B,H,W,C), dy (B,H',W',O) of one float type, H', W' as the window gives them",
            None => "x (…,C), dy (…,O) of one float type",
        };
        let [x0, dy] = args(Self::NAME, want, x)?;
        ensure!(x0.dtype == dy.dtype && DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        let (c, o) = (x0.shape.last(), dy.shape.last());
        let Some(window) = &self.window else {
            let lead = |s: Spec| s.shape.with_last(0);
            ensure!(!x0.shape.is_empty() && lead(x0) == lead(dy), Self::NAME, want, x);
            ensure!(self.choice.is_none() || self.divided(x).is_some(), Self::NAME, WANT_CHOICE, x);
            return Ok(vec![Spec::new(DType::F32, [o, c])]);
        };
        let pixels = x0.shape.len() == 4 && dy.shape.len() == 4 && window.stride > 0;
        ensure!(pixels, Self::NAME, want, x);
        let s = self.shape(x0.shape, dy.shape);
        let fits = s.is_some_and(|s| dy.shape[..3] == [s.b, s.out_h, s.out_w]);
        ensure!(fits, Self::NAME, want, x);
        ensure!(self.choice.is_none() || self.divided(x).is_some(), Self::NAME, WANT_CHOICE, x);
        Ok(vec![Spec::new(DType::F32, [o, window.kernel[0], window.kernel[1], c])])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let Some(s) = self.shape(x[0].shape, x[1].shape) else { return vec![] };
        let (o, up) = (x[1].shape.last(), if s.upsample { 2 } else { 1 });
        let mut dw = Array::zeros([o, s.kh, s.kw, s.c]);
        for (m, dy) in x[1].data.chunks(o).enumerate() {
            let (b, oh, ow) = (m / (s.out_w * s.out_h), m / s.out_w % s.out_h, m % s.out_w);
            for (kh, kw) in (0..s.kh).flat_map(|kh| (0..s.kw).map(move |kw| (kh, kw))) {
                let ih = (oh * s.stride + kh).wrapping_sub(s.pad_top);
                let iw = (ow * s.stride + kw).wrapping_sub(s.pad_left);
                if ih >= s.h * up || iw >= s.w * up {
                    continue;
                }
                let pixel = &x[0].data[((b * s.h + ih / up) * s.w + iw / up) * s.c..][..s.c];
                for (o, dy) in dy.iter().enumerate() {
                    let row = &mut dw.data[((o * s.kh + kh) * s.kw + kw) * s.c..][..s.c];
                    row.iter_mut().zip(pixel).for_each(|(w, x)| *w += dy * x);
                }
            }
        }
        if self.window.is_none() {
            dw.shape = [o, s.c].into();
        }
        vec![dw]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, dy) = (io.slice(0), io.slice(1));
        let Some(shape) = self.shape(io.x[0].shape, io.x[1].shape) else { return Ok(()) };
        let rows = Transposed { data: dy, m: io.x[1].shape.last() };
        let n = shape.kh * shape.kw * shape.c;
        gemm(&rows, Weights::Pixels(Conv { x, shape }), n, &Epilogue::default(), io.out(0));
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let Some((s, divided)) = self.divided(&[*io.x_spec(0), *io.x_spec(1)]) else { return Ok(()) };
        divided.launch(&s, io)
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        self.divided(x).map_or(0, |(_, divided)| divided.scratch())
    }

    fn launches(&self, x: &[Spec]) -> Vec<LaunchPlan> {
        self.divided(x).map_or(vec![], |(s, divided)| divided.launches(&s, x[0].dtype))
    }

    fn choices(&self, x: &[Spec]) -> Vec<Op> {
        let Some(s) = self.shape(x[0].shape, x[1].shape) else { return vec![] };
        let all = Divided::all(&s, x[1].shape.last(), x[0].dtype);
        all.map(|divided| WeightGrad { choice: divided.choice(), ..self.clone() }.into()).collect()
    }

    fn cpu_scratch(&self, x: &[Spec], y: &[Spec]) -> usize {
        let (o, pixels) = (x[1].shape.last(), x[1].shape.rows());
        let n = y[0].shape.numel() / o.max(1);
        working_bytes(x[0].dtype, o, n, pixels).saturating_add(pixels_bytes(o, n, pixels))
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(x[1].shape.rows().saturating_mul(2 * y[0].shape.numel()), x, y)
    }

    fn cases() -> Vec<Case> {
        let conv = |x: [usize; 4], o, kernel: usize, stride, pad: [usize; 4], upsample| {
            weight_grad(x, o, Window { kernel: [kernel; 2], stride, pad, upsample })
        };
        let linear = |lead: &[usize], c, o| {
            let at = |n| t([lead, &[n]].concat().as_slice());
            Case::new(WeightGrad { window: None, choice: None }, [at(c), at(o)])
        };
        let asked = |variant, splits, mut case: Case| {
            if let Op::WeightGrad(op) = &mut case.op {
                op.choice = Some(Choice { variant, splits });
            }
            case.only(&[DType::F16, DType::BF16])
        };
        vec![
            linear(&[1], 1, 1),
            linear(&[5], 3, 2),
            linear(&[2, 77], 48, 33),
            linear(&[3, 9, 7], 20, 70),
            linear(&[700], 33, 17),
            conv([1, 1, 1, 1], 1, 1, 1, [0; 4], false),
            conv([2, 5, 7, 3], 4, 3, 1, [1; 4], false),
            conv([1, 8, 8, 32], 40, 3, 1, [1; 4], false),
            conv([3, 6, 5, 9], 7, 3, 2, [1; 4], false),
            conv([1, 9, 9, 4], 5, 3, 2, [0, 0, 1, 1], false),
            conv([2, 3, 4, 6], 5, 3, 1, [1; 4], true),
            conv([1, 12, 11, 64], 66, 3, 1, [1; 4], false),
            conv([2, 9, 8, 5], 3, 4, 2, [1; 4], false),
            conv([1, 30, 31, 8], 270, 3, 1, [1; 4], false),
            // On tensor cores: tails of pixels, several parts, tiles that end early, several images in a step.
            linear(&[40], 8, 16),
            linear(&[3, 77], 48, 64),
            linear(&[700], 40, 24),
            conv([1, 9, 9, 8], 16, 3, 2, [0, 0, 1, 1], false),
            conv([2, 3, 4, 16], 24, 3, 1, [1; 4], true),
            conv([2, 5, 7, 24], 8, 1, 1, [0; 4], false),
            conv([5, 2, 3, 8], 8, 3, 1, [1; 4], false),
            conv([2, 9, 8, 8], 16, 4, 2, [1; 4], false),
            conv([1, 30, 31, 8], 272, 3, 1, [1; 4], false),
            asked("BM=128,BN=128", 1, conv([1, 12, 11, 64], 72, 3, 1, [1; 4], false)),
            asked("BM=128,BN=128", 4, linear(&[200], 136, 264)),
            asked("BM=160,BN=128", 1, conv([2, 9, 8, 40], 168, 3, 1, [1; 4], false)),
            asked("BM=160,BN=128", 3, conv([3, 12, 11, 16], 160, 3, 2, [0, 0, 1, 1], false)),
            asked("BM=128,BN=128", 2, conv([2, 5, 6, 24], 136, 3, 1, [1; 4], true)),
            asked("BM=160,BN=128", 2, linear(&[100], 320, 168)),
            conv([2, 64, 64, 320], 320, 3, 1, [1; 4], false).bench(),
            linear(&[2, 4096], 320, 320).bench(),
            conv([2, 32, 32, 640], 640, 3, 1, [1; 4], false).bench(),
            conv([2, 16, 16, 1280], 1280, 3, 1, [1; 4], false).bench(),
            linear(&[2, 4096], 320, 2560).bench(),
        ]
    }

    fn random(r: &mut Small) -> Case {
        let (c, o) = (r.below(40) + 1, r.below(70) + 1);
        // Half of them for tensor cores.
        let whole = if r.below(2) == 0 { 8 } else { 1 };
        let (c, o) = (c.next_multiple_of(whole), o.next_multiple_of(whole));
        if r.below(3) == 0 {
            let rows = r.below(90) + 1;
            return Case::new(WeightGrad { window: None, choice: None }, [t([rows, c]), t([rows, o])]);
        }
        let (kernel, stride, upsample) = (r.below(3) + 1, r.below(2) + 1, r.below(4) == 0);
        let x = [r.below(2) + 1, r.below(8) + kernel, r.below(8) + kernel, c];
        let pad = [0; 4].map(|_: usize| r.below(kernel));
        weight_grad(x, o, Window { kernel: [kernel; 2], stride, pad, upsample })
    }
}

fn weight_grad(x: [usize; 4], o: usize, window: Window) -> Case {
    let Window { kernel: [kh, kw], stride, pad, upsample } = window;
    let up = if upsample { 2 } else { 1 };
    let h = (x[1] * up + pad[0] + pad[2] - kh) / stride + 1;
    let w = (x[2] * up + pad[1] + pad[3] - kw) / stride + 1;
    Case::new(WeightGrad { window: Some(window), choice: None }, [t(x), t([x[0], h, w, o])])
}

/// w (O,KH,KW,I) to (I,KH,KW,O) with the window turned about its centre, or (O,I) to (I,O).
#[derive(Clone, PartialEq, Debug)]
pub struct TransposeWeights;

/// O, number of window positions, I.
fn sizes(w: Shape) -> [usize; 3] {
    [w[0], w[1..w.len() - 1].iter().product(), w.last()]
}

impl Operation for TransposeWeights {
    const NAME: &'static str = "transpose_weights";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "w (O,KH,KW,I) or (O,I) of a float type";
        let [w] = args(Self::NAME, want, x)?;
        ensure!([2, 4].contains(&w.shape.len()) && DType::FLOATS.contains(&w.dtype), Self::NAME, want, x);
        let mut shape = w.shape.to_vec();
        let last = shape.len() - 1;
        shape.swap(0, last);
        Ok(vec![Spec::new(w.dtype, shape.as_slice())])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let ([o, windows, i], w) = (sizes(x[0].shape), &x[0]);
        let at = |k: usize| {
            let (row, window, column) = (k / (windows * o), k / o % windows, k % o);
            w.data[(column * windows + windows - 1 - window) * i + row]
        };
        let mut shape = w.shape.to_vec();
        let last = shape.len() - 1;
        shape.swap(0, last);
        vec![Array { shape: shape.as_slice().into(), data: (0..w.data.len()).map(at).collect() }]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (w, [o, windows, i]) = (io.slice(0), sizes(io.x[0].shape));
        // Rows of y, a cache line of w's columns at a time.
        io.rows(0, windows * o, |first, y| {
            let rows = y.len() / (windows * o);
            cpu::with_scratch(16, |line| {
                for r0 in (0..rows).step_by(16) {
                    let line = &mut line[..16.min(rows - r0)];
                    for (window, column) in (0..windows).flat_map(|k| (0..o).map(move |o| (k, o))) {
                        w.read((column * windows + windows - 1 - window) * i + first + r0, line);
                        for (r, v) in line.iter().enumerate() {
                            y[((r0 + r) * windows + window) * o + column] = *v;
                        }
                    }
                }
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let (w, [o, windows, i]) = (*io.x_spec(0), sizes(io.x_spec(0).shape));
        let (rows, count, columns) = (io.int(o)?, io.int(windows)?, io.int(i)?);
        let p = turn::Conv2dTranspose { y: io.y(0), w: io.x(0), o: rows, i: columns, windows: count };
        let grid = [i.div_ceil(turn::TILE), o.div_ceil(turn::TILE), windows];
        io.launch(turn::CONV2D_TRANSPOSE, w.dtype, "", grid, turn::BLOCK, p)
    }

    fn grad(&self, g: &mut Graph, _x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dy)] = dy else { return Ok(vec![None]) };
        Ok(vec![Some(g.push("dw", TransposeWeights, &[*dy])?)])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(0, x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 10] = [
            &[1, 1],
            &[3, 2],
            &[33, 70],
            &[1, 3, 3, 1],
            &[4, 1, 1, 5],
            &[5, 3, 3, 4],
            &[40, 3, 3, 33],
            &[2, 4, 4, 3],
            &[64, 2, 3, 32],
            &[100, 17],
        ];
        let mut all: Vec<Case> = shapes.iter().map(|&s| Case::new(TransposeWeights, [t(s)])).collect();
        all.push(Case::new(TransposeWeights, [t([320, 3, 3, 320])]).bench());
        all
    }

    fn random(r: &mut Small) -> Case {
        let [o, i] = [r.below(60) + 1, r.below(60) + 1];
        let w = [o, r.below(3) + 1, r.below(3) + 1, i];
        Case::new(TransposeWeights, [if r.below(2) == 0 { t([o, i]) } else { t(w) }])
    }
}
