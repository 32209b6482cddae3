//! y = value · GELU(gate), where value and gate are the halves of the last axis.
//!
//! PyTorch: `a, b = x.chunk(2, -1); a * F.gelu(b)`. Kernel: `kernels/geglu.cu`.
use super::activation::Act;
use super::prelude::*;
use crate::kernels::geglu as k;
use crate::kernels::geglu_grad as back;

/// x (…,2E) to (…,E): the gated feed-forward of the transformer blocks.
#[derive(Clone, PartialEq, Debug)]
pub struct Geglu;

impl Operation for Geglu {
    const NAME: &'static str = "geglu";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (…,2E) of a float type";
        let [x0] = args(Self::NAME, want, x)?;
        let fits = x0.shape.last() % 2 == 0 && !x0.shape.is_empty() && DType::FLOATS.contains(&x0.dtype);
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![Spec::new(x0.dtype, x0.shape.with_last(x0.shape.last() / 2))])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let e = x[0].shape.last() / 2;
        let rows = x[0].data.chunks(2 * e);
        let data = rows.flat_map(|r| (0..e).map(|i| r[i] * Act::Gelu.apply_f64(r[e + i]))).collect();
        vec![Array { shape: x[0].shape.with_last(e), data }]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let e = x[0].shape.last() / 2;
        let data = x[0].data.chunks(2 * e).flat_map(|r| (0..e).map(|i| (r[i] * r[e + i]).abs())).collect();
        vec![Array { shape: x[0].shape.with_last(e), data }]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, e) = (io.slice(0), io.y[0].shape.last());
        io.rows(0, e, |first, y| {
            for (i, y) in y.chunks_mut(e).enumerate() {
                x.with((first + i) * 2 * e..(first + i + 1) * 2 * e, |x| {
                    cpu::math::activate(Act::Gelu, &x[e..], y);
                    y.iter_mut().zip(x).for_each(|(y, value)| *y *= value);
                });
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let y = io.y_spec(0);
        let e = y.shape.last();
        let n = y.shape.numel() / launch::at_once(y.dtype, &[e]);
        let p = k::GegluFwd { y: io.y(0), x: io.x(0), n: io.int(n)?, e: io.int(e)? };
        io.launch(k::GEGLU_FWD, y.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dy)] = dy else { return Ok(vec![None]) };
        Ok(vec![Some(g.push("dx", GegluGrad, &[x[0], *dy])?)])
    }

    fn fuse(&self, g: &Graph, at: Var, target: Target) -> Option<Rewrite> {
        super::conv2d::gates(g, at, target)
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(12 * y[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 8] = [
            &[2],
            &[1, 6],
            &[3, 5, 8],
            &[2, 4, 4, 256],
            &[77, 74],
            &[1, 1, 514],
            &[300, 2],
            &[2, 9, 128],
        ];
        let mut all: Vec<Case> = shapes.iter().map(|&s| Case::new(Geglu, [t(s).normal(0.0, 2.0)])).collect();
        // Feed-forward layers of SD 1.5, SDXL and LDM 1.45B: tokens of an image, twice four times their width.
        let wide = [1024, 256, 64, 16].map(|tokens| [tokens, 10240]);
        let real = [[4096, 2560], [4096, 5120], [1024, 5120], [1024, 2560], [256, 5120]];
        all.extend(real.into_iter().chain(wide).map(|[tokens, c]| Case::new(Geglu, [t([2, tokens, c])]).bench()));
        all
    }

    fn random(r: &mut Small) -> Case {
        Case::new(Geglu, [t([r.below(30) + 1, 2 * (r.below(90) + 1)]).normal(0.0, 2.0)])
    }
}

/// x (…,2E), dy (…,E) to dx (…,2E).
#[derive(Clone, PartialEq, Debug)]
pub struct GegluGrad;

impl GegluGrad {
    fn each(&self, x: &[Array], f: impl Fn(f64, f64, f64) -> [f64; 2]) -> Vec<Array> {
        let (e, mut dx) = (x[1].shape.last(), x[0].clone());
        for (row, dy) in dx.data.chunks_mut(2 * e).zip(x[1].data.chunks(e)) {
            for i in 0..e {
                [row[i], row[e + i]] = f(row[i], row[e + i], dy[i]);
            }
        }
        vec![dx]
    }
}

impl Operation for GegluGrad {
    const NAME: &'static str = "geglu_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (…,2E), dy (…,E) of one float type";
        let [x0, dy] = args(Self::NAME, want, x)?;
        ensure!(Geglu.infer(&[x0]).is_ok_and(|y| y[0] == dy), Self::NAME, want, x);
        Ok(vec![x0])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |value, gate, dy| {
            [dy * Act::Gelu.apply_f64(gate), dy * value * Act::Gelu.slope_f64(gate)]
        })
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |value, gate, dy| [(dy * gate).abs(), (dy * value).abs() * Act::Gelu.slope_size_f64(gate)])
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, dy, e) = (io.slice(0), io.slice(1), io.x[1].shape.last());
        io.rows(0, 2 * e, |first, dx| {
            for (i, dx) in dx.chunks_mut(2 * e).enumerate() {
                let row = first + i;
                let (d_value, d_gate) = dx.split_at_mut(e);
                x.with(row * 2 * e..(row + 1) * 2 * e, |x| {
                    dy.with(row * e..(row + 1) * e, |dy| {
                        let (value, gate) = x.split_at(e);
                        cpu::math::activate(Act::Gelu, gate, d_value);
                        d_value.iter_mut().zip(dy).for_each(|(y, dy)| *y *= dy);
                        d_gate.iter_mut().zip(dy).zip(value).for_each(|((y, dy), v)| *y = dy * v);
                        cpu::math::times_slope(Act::Gelu, gate, d_gate);
                    });
                });
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let dy = *io.x_spec(1);
        let e = dy.shape.last();
        let n = dy.shape.numel() / launch::at_once(dy.dtype, &[e]);
        let p = back::GegluGrad { dx: io.y(0), x: io.x(0), dy: io.x(1), n: io.int(n)?, e: io.int(e)? };
        io.launch(back::GEGLU_GRAD, dy.dtype, "", [n.div_ceil(back::BLOCK), 1, 1], back::BLOCK, p)
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        2 * cpu::working_bytes(y[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(30 * x[1].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        Geglu::cases().into_iter().map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        with_gradient(Geglu::random(r))
    }
}

/// The case of the gradient for one of the op.
fn with_gradient(case: Case) -> Case {
    let x = case.args[0].clone();
    let dy = t(x.shape.with_last(x.shape.last() / 2));
    Case { op: GegluGrad.into(), args: vec![x, dy], ..case }
}
