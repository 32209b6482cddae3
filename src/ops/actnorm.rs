//! y = scale · (x + loc) by channel.
//!
//! CompVis `ActNorm`; Kingma and Dhariwal 2018, section 3.1. What loc and scale start with depends on the first batch, see
//! [`crate::models::NLayerDiscriminator`]. Kernel: `kernels/actnorm.cu`. Parts of the rows are summed by themselves and put
//! together in order, so that the bits depend on the shape alone.
use super::batch_norm::{CHUNK, parts};
use super::prelude::*;
use super::{Act, Op};
use crate::backend::cpu::math::{Channels, norm_grad_apply, norm_grad_sums, scale_shift_act};
use crate::kernels::actnorm as k;
use rayon::prelude::*;

/// x (…,C), loc (C), scale (C) of one float type to y (…,C).
#[derive(Clone, PartialEq, Debug)]
pub struct ActNorm;

impl Operation for ActNorm {
    const NAME: &'static str = "actnorm";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (…,C), loc (C), scale (C) of one float type";
        let [x0, loc, scale] = args(Self::NAME, want, x)?;
        let fits = DType::FLOATS.contains(&x0.dtype)
            && x0.shape.numel() > 0
            && loc == Spec::new(x0.dtype, [x0.shape.last()])
            && scale == loc;
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![x0])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let (mut y, c) = (x[0].clone(), x[1].data.len());
        y.data.iter_mut().enumerate().for_each(|(i, v)| *v = x[2].data[i % c] * (*v + x[1].data[i % c]));
        vec![y]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.spec(&[x[0].map(f64::abs), x[1].map(f64::abs), x[2].map(f64::abs)])
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, loc, scale) = (io.slice(0), io.f32(1), io.f32(2));
        let shift: Vec<f32> = loc.iter().zip(&*scale).map(|(l, s)| l * s).collect();
        let c = loc.len();
        io.rows(0, c, |first, y| {
            x.with(first * c..first * c + y.len(), |x| scale_shift_act(x, &scale, &shift, Act::None, y));
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = *io.x_spec(0);
        let (n, c) = (x.shape.numel(), io.int(x.shape.last())?);
        let p = k::ActnormFwd { y: io.y(0), x: io.x(0), loc: io.x(1), scale: io.x(2), n: n as i64, c };
        io.launch(k::ACTNORM_FWD, x.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dy)] = dy else { return Ok(vec![None; 3]) };
        let d = g.push_all("dx", ActNormGrad, &[x[0], x[1], x[2], *dy])?;
        Ok(d.into_iter().map(Some).collect())
    }

    fn cpu_scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        cpu::working_bytes(x[0].shape.last()) + x[1].shape.numel() * size_of::<f32>()
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(2 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 8] =
            [&[1], &[2, 1], &[3, 5], &[2, 4, 4, 8], &[700, 3], &[2, 37, 31, 33], &[1, 9, 9, 64], &[4, 130]];
        shapes.iter().map(|&x| norm(x)).collect()
    }

    fn random(r: &mut Small) -> Case {
        norm(&[r.below(3) + 1, r.below(300) + 1, r.below(40) + 1])
    }
}

fn norm(x: &[usize]) -> Case {
    let c = [x[x.len() - 1]];
    Case::new(ActNorm, [t(x), t(c), t(c).normal(1.0, 0.2)])
}

/// x (…,C), loc, scale (C), dy (…,C) to dx, and dloc, dscale (C) in f32.
#[derive(Clone, PartialEq, Debug)]
pub struct ActNormGrad;

impl Operation for ActNormGrad {
    const NAME: &'static str = "actnorm_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (…,C), loc (C), scale (C), dy as x, of one float type";
        let [x0, loc, scale, dy] = args(Self::NAME, want, x)?;
        ensure!(ActNorm.infer(&[x0, loc, scale]).is_ok() && x0 == dy, Self::NAME, want, x);
        let sums = Spec::new(DType::F32, loc.shape);
        Ok(vec![x0, sums, sums])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let c = x[1].data.len();
        let (mut dx, mut dloc, mut dscale) = (x[3].clone(), Array::zeros([c]), Array::zeros([c]));
        for (i, v) in dx.data.iter_mut().enumerate() {
            dscale.data[i % c] += *v * (x[0].data[i] + x[1].data[i % c]);
            *v *= x[2].data[i % c];
            dloc.data[i % c] += *v;
        }
        vec![dx, dloc, dscale]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let sizes: Vec<Array> = x.iter().map(|a| a.map(f64::abs)).collect();
        self.spec(&sizes)
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, loc, scale, dy) = (io.slice(0), io.f32(1), io.f32(2), io.slice(3));
        let (c, rows) = (loc.len(), io.x[0].shape.rows());
        let (mean, zero, one): (Vec<f32>, _, _) =
            (loc.iter().map(|v| -v).collect(), vec![0.0; c], vec![1.0; c]);
        let p = Channels { mean: [&mean, &zero], rstd: &one, w: &scale, bias: &zero, act: Act::None };
        let each = (CHUNK / c).max(1);
        // Σ dy · (x + loc), then Σ dy.
        let totals: Vec<f64> = cpu::with_scratch(rows.div_ceil(each) * 2 * c, |sums| {
            sums.par_chunks_mut(2 * c).enumerate().for_each(|(i, sums)| {
                sums.fill(0.0);
                let (moved, sum) = sums.split_at_mut(c);
                let range = i * each * c..rows.min((i + 1) * each) * c;
                x.with(range.clone(), |x| dy.with(range, |dy| norm_grad_sums(p, x, dy, moved, sum)));
            });
            (0..2 * c).map(|i| sums.iter().skip(i).step_by(2 * c).map(|&v| f64::from(v)).sum()).collect()
        });
        let dloc = totals[c..].iter().zip(&*scale).map(|(sum, s)| sum * f64::from(*s));
        io.write(1, |y| y.iter_mut().zip(dloc).for_each(|(y, v)| *y = v as f32));
        io.write(2, |y| y.iter_mut().zip(&totals).for_each(|(y, v)| *y = *v as f32));
        io.rows(0, c, |first, dx| {
            let range = first * c..first * c + dx.len();
            x.with(range.clone(), |x| dy.with(range, |dy| norm_grad_apply(p, x, dy, [&zero, &zero], dx)));
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = *io.x_spec(0);
        let (rows, n, c) = (x.shape.rows(), x.shape.numel(), x.shape.last());
        let ((count, each), channels) = (parts(rows), io.int(c)?);
        let p = k::ActnormSums {
            partial: io.scratch,
            x: io.x(0),
            loc: io.x(1),
            dy: io.x(3),
            rows: io.int(rows)?,
            c: channels,
            each: io.int(each)?,
        };
        io.launch(k::ACTNORM_SUMS, x.dtype, "", [c.div_ceil(k::COLUMNS), count, 1], k::BLOCK, p)?;
        let parts = io.int(count)?;
        let (partial, scale) = (io.scratch, io.x(2));
        let p = k::ActnormTotal { dloc: io.y(1), dscale: io.y(2), partial, scale, c: channels, parts };
        io.launch(k::ACTNORM_TOTAL, x.dtype, "", [c.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)?;
        let p = k::ActnormDx { dx: io.y(0), dy: io.x(3), scale, n: n as i64, c: channels };
        io.launch(k::ACTNORM_DX, x.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        parts(x[0].shape.rows()).0 * x[0].shape.last() * 2 * size_of::<f32>()
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(5 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        ActNorm::cases().into_iter().map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        with_gradient(ActNorm::random(r))
    }
}

/// The case of the gradients for one of the op.
fn with_gradient(case: Case) -> Case {
    let dy = t(case.args[0].shape);
    Case { op: Op::from(ActNormGrad), args: [case.args, vec![dy]].concat(), ..case }
}
