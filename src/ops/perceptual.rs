//! The terms of LPIPS: distances of features, and pictures as its network wants them.
//!
//! Zhang et al. 2018, equation 1: with features of unit length over channels, the weighted squares of their difference, averaged
//! over pixels. Kernel: `kernels/perceptual.cu`.
use super::Op;
use super::prelude::*;
use crate::kernels::perceptual as k;
use rayon::prelude::*;

/// Features a, b (B,…,C), weights of channels (1,C) f32 and of images (B) f32 to the loss (1) f32: the mean over images of weight ·
/// the mean over pixels of Σ w (a / (|a| + ε) − b / (|b| + ε))², ε = 1e-10. b and the weights are data: no gradient reaches
/// them. Where a pixel of a is 0 in every channel, where the norm has no derivative, the gradient is 0.
#[derive(Clone, PartialEq, Debug)]
pub struct Perceptual;

const EPS: f64 = 1e-10;
const WANT: &str = "a, b (B,…,C) of one float type, w (1,C) and weights (B) of f32, none empty";
/// Parts of an image's pixels on a GPU.
const PARTS: usize = 64;

fn fits(x: &[Spec]) -> bool {
    let [a, b, w, weights, ..] = x else { return false };
    DType::FLOATS.contains(&a.dtype)
        && a == b
        && a.shape.len() > 1
        && a.shape.numel() > 0
        && *w == Spec::new(DType::F32, [1, a.shape.last()])
        && *weights == Spec::new(DType::F32, [a.shape[0]])
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Σ w (a / m(a) ∓ b / m(b))² of a pixel; with `size`, of absolute values that are added.
fn distance(a: &[f64], b: &[f64], w: &[f64], size: bool) -> f64 {
    let (m, n) = (norm(a) + EPS, norm(b) + EPS);
    let term = |((a, b), w): ((&f64, &f64), &f64)| match size {
        false => w * (a / m - b / n).powi(2),
        true => w.abs() * (a.abs() / m + b.abs() / n).powi(2),
    };
    a.iter().zip(b).zip(w).map(term).sum()
}

/// The gradient of [`distance`] with respect to a, into `da`.
fn slope(a: &[f64], b: &[f64], w: &[f64], size: bool, da: &mut [f64]) {
    let (n, m_b) = (norm(a), norm(b) + EPS);
    let m = n + EPS;
    if n == 0.0 {
        return da.fill(0.0);
    }
    let g = |i: usize| match size {
        false => 2.0 * w[i] * (a[i] / m - b[i] / m_b),
        true => 2.0 * w[i].abs() * (a[i].abs() / m + b[i].abs() / m_b),
    };
    let sized = |v: f64| if size { v.abs() } else { v };
    let dot: f64 = (0..a.len()).map(|i| g(i) * sized(a[i])).sum::<f64>() / (n * m * m);
    let sign = if size { 1.0 } else { -1.0 };
    for i in 0..a.len() {
        da[i] = g(i) / m + sign * sized(a[i]) * dot;
    }
}

impl Perceptual {
    fn total(x: &[Array], size: bool) -> Vec<Array> {
        let (c, batch) = (x[0].shape.last(), x[0].shape[0]);
        let pixels = x[0].shape.rows() / batch;
        let rows = x[0].data.chunks(c).zip(x[1].data.chunks(c)).enumerate();
        let sum: f64 = rows
            .map(|(i, (a, b))| {
                let weight = x[3].data[i / pixels];
                distance(a, b, &x[2].data, size) * if size { weight.abs() } else { weight }
            })
            .sum();
        vec![Array { shape: [1].into(), data: vec![sum / (pixels * batch) as f64] }]
    }
}

impl Operation for Perceptual {
    const NAME: &'static str = "perceptual";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        ensure!(x.len() == 4 && fits(x), Self::NAME, WANT, x);
        Ok(vec![Spec::new(DType::F32, [1])])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        Perceptual::total(x, false)
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        Perceptual::total(x, true)
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (a, b, w, weights) = (io.slice(0), io.slice(1), io.f32(2), io.f32(3));
        let (c, batch) = (io.x[0].shape.last(), io.x[0].shape[0]);
        let (rows, pixels) = (io.x[0].shape.rows(), io.x[0].shape.rows() / batch);
        let each: Vec<f64> = (0..rows)
            .into_par_iter()
            .map(|i| {
                let at = i * c..(i + 1) * c;
                a.with(at.clone(), |a| {
                    b.with(at, |b| f64::from(weights[i / pixels]) * distance_f32(a, b, &w))
                })
            })
            .collect();
        io.write(0, |y| y[0] = (each.iter().sum::<f64>() / rows as f64) as f32);
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let a = *io.x_spec(0);
        let (c, batch) = (a.shape.last(), a.shape[0]);
        let pixels = a.shape.rows() / batch;
        let count = parts(pixels);
        let (pixels, channels) = (io.int(pixels)?, io.int(c)?);
        let p =
            k::PerceptualFwd { partial: io.scratch, a: io.x(0), b: io.x(1), w: io.x(2), pixels, c: channels };
        io.launch(k::PERCEPTUAL_FWD, a.dtype, "", [count, batch, 1], k::BLOCK, p)?;
        let p = k::PerceptualMean {
            loss: io.y(0),
            partial: io.scratch,
            weights: io.x(3),
            batch: io.int(batch)?,
            parts: io.int(count)?,
            pixels,
        };
        io.launch(k::PERCEPTUAL_MEAN, a.dtype, "", [1, 1, 1], k::BLOCK, p)
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        let batch = x[0].shape[0];
        batch * parts(x[0].shape.rows() / batch) * size_of::<f32>()
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dloss)] = dy else { return Ok(vec![None; 4]) };
        Ok(vec![Some(g.push("da", PerceptualGrad, &[x[0], x[1], x[2], x[3], *dloss])?), None, None, None])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(9 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 8] = [
            &[1, 1],
            &[3, 5],
            &[2, 4, 4, 8],
            &[1, 7, 9, 33],
            &[2, 3, 5, 64],
            &[3, 31, 2],
            &[2, 16, 16, 3],
            &[1, 700, 40],
        ];
        shapes.into_iter().map(features).collect()
    }

    fn random(r: &mut Small) -> Case {
        features(&[r.below(3) + 1, r.below(40) + 1, r.below(90) + 2])
    }
}

fn parts(pixels: usize) -> usize {
    pixels.div_ceil(k::BLOCK / 32).clamp(1, PARTS)
}

fn features(x: &[usize]) -> Case {
    let channels = f32s([1, x[x.len() - 1]]).normal(1.0, 0.3);
    Case::new(Perceptual, [t(x), t(x), channels, f32s([x[0]]).normal(1.0, 0.3)])
}

/// [`distance`] of f32 in f64.
fn distance_f32(a: &[f32], b: &[f32], w: &[f32]) -> f64 {
    let over = |v: &[f32]| 1.0 / (v.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt() + EPS);
    let (over_a, over_b) = (over(a), over(b));
    let term = |((a, b), w): ((&f32, &f32), &f32)| {
        f64::from(*w) * (f64::from(*a) * over_a - f64::from(*b) * over_b).powi(2)
    };
    a.iter().zip(b).zip(w).map(term).sum()
}

/// The inputs of [`Perceptual`] and the gradient of the loss (1) f32 to that of a.
#[derive(Clone, PartialEq, Debug)]
pub struct PerceptualGrad;

impl PerceptualGrad {
    fn each(x: &[Array], size: bool) -> Vec<Array> {
        let (c, batch) = (x[0].shape.last(), x[0].shape[0]);
        let rows = x[0].shape.rows();
        let mut da = x[0].clone();
        for (i, da) in da.data.chunks_mut(c).enumerate() {
            let at = i * c..(i + 1) * c;
            slope(&x[0].data[at.clone()], &x[1].data[at], &x[2].data, size, da);
            let share = x[4].data[0] * x[3].data[i / (rows / batch)] / rows as f64;
            da.iter_mut().for_each(|d| *d *= if size { share.abs() } else { share });
        }
        vec![da]
    }
}

impl Operation for PerceptualGrad {
    const NAME: &'static str = "perceptual_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = format!("{WANT}, dloss (1) of f32");
        let scalar = x.get(4).is_some_and(|s| *s == Spec::new(DType::F32, [1]));
        ensure!(x.len() == 5 && scalar && fits(x), Self::NAME, want, x);
        Ok(vec![x[0]])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        PerceptualGrad::each(x, false)
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        PerceptualGrad::each(x, true)
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (a, b, w, weights) = (io.slice(0), io.slice(1), io.f32(2), io.f32(3));
        let (c, rows, batch) = (io.x[0].shape.last(), io.x[0].shape.rows(), io.x[0].shape[0]);
        let share = f64::from(io.f32(4)[0]) / rows as f64;
        let w: Vec<f64> = w.iter().map(|&w| w.into()).collect();
        io.rows(0, c, |first, da| {
            let wide = |v: &[f32]| -> Vec<f64> { v.iter().map(|&v| v.into()).collect() };
            let mut d = vec![0.0; c];
            for (i, da) in da.chunks_mut(c).enumerate() {
                let (row, at) = (first + i, (first + i) * c..(first + i + 1) * c);
                let (a, b) = (a.with(at.clone(), wide), b.with(at, wide));
                slope(&a, &b, &w, false, &mut d);
                let s = share * f64::from(weights[row / (rows / batch)]);
                da.iter_mut().zip(&d).for_each(|(da, d)| *da = (s * d) as f32);
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let a = *io.x_spec(0);
        let rows = a.shape.rows();
        let p = k::PerceptualGrad {
            da: io.y(0),
            a: io.x(0),
            b: io.x(1),
            w: io.x(2),
            weights: io.x(3),
            dloss: io.x(4),
            rows: io.int(rows)?,
            c: io.int(a.shape.last())?,
            pixels: io.int(rows / a.shape[0])?,
        };
        io.launch(k::PERCEPTUAL_GRAD, a.dtype, "", [rows.div_ceil(k::BLOCK / 32), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(16 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        Perceptual::cases().into_iter().map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        with_gradient(Perceptual::random(r))
    }
}

fn with_gradient(case: Case) -> Case {
    let Op::Perceptual(_) = case.op else { return case };
    // As large as there are pixels, so that gradients of a mean are normal numbers in f16.
    let dloss = f32s([1]).values(vec![case.args[0].shape.rows() as f64]);
    Case { op: PerceptualGrad.into(), args: [&case.args[..], &[dloss]].concat(), ..case }
}

/// x (…,3), pictures in −1…1, by channel to (x − shift) / scale with the numbers of LPIPS: shift (−0.030, −0.088, −0.188), scale
/// (0.458, 0.448, 0.450).
#[derive(Clone, PartialEq, Debug)]
pub struct Standardize {
    /// False: x / scale, the gradient.
    pub shifted: bool,
}

const SHIFT: [f64; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f64; 3] = [0.458, 0.448, 0.450];

impl Standardize {
    fn shift(&self, i: usize) -> f64 {
        if self.shifted { SHIFT[i % 3] } else { 0.0 }
    }
}

impl Operation for Standardize {
    const NAME: &'static str = "standardize";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (…,3) of a float type";
        let [x0] = args(Self::NAME, want, x)?;
        let fits = !x0.shape.is_empty() && x0.shape.last() == 3 && DType::FLOATS.contains(&x0.dtype);
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![x0])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let mut y = x[0].clone();
        y.data.iter_mut().enumerate().for_each(|(i, v)| *v = (*v - self.shift(i)) / SCALE[i % 3]);
        vec![y]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let mut y = x[0].clone();
        y.data.iter_mut().enumerate().for_each(|(i, v)| *v = (v.abs() + self.shift(i).abs()) / SCALE[i % 3]);
        vec![y]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        io.update(0, 0, |at, y| {
            for (i, v) in y.iter_mut().enumerate() {
                *v = ((f64::from(*v) - self.shift(at + i)) / SCALE[(at + i) % 3]) as f32;
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = *io.x_spec(0);
        let n = x.shape.numel();
        let p = k::StandardizeFwd { y: io.y(0), x: io.x(0), n: n as i64, shifted: self.shifted.into() };
        io.launch(k::STANDARDIZE_FWD, x.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn grad(&self, g: &mut Graph, _x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dy)] = dy else { return Ok(vec![None]) };
        Ok(vec![Some(g.push("dx", Standardize { shifted: false }, &[*dy])?)])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(2 * x[0].shape.numel(), x, y)
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 8] =
            [&[3], &[2, 3], &[7, 3], &[2, 5, 5, 3], &[86, 3], &[1, 16, 16, 3], &[3, 1, 3], &[2, 64, 33, 3]];
        let all = shapes.iter().enumerate();
        all.map(|(i, &x)| Case::new(Standardize { shifted: i % 4 != 3 }, [t(x)])).collect()
    }

    fn random(r: &mut Small) -> Case {
        Case::new(Standardize { shifted: r.below(4) > 0 }, [t([r.below(9) + 1, r.below(300) + 1, 3])])
    }
}
