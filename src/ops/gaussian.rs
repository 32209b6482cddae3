//! z = scale · (mean + exp(logvar / 2) · noise): a draw from the distribution that a KL autoencoder predicts.
//!
//! Rombach et al. 2022, section 3.1; the log-variance is held within −30…20 as the reference code does. PyTorch:
//! diffusers `DiagonalGaussianDistribution.sample() * scaling_factor`. Kernel: `kernels/gaussian.cu`.
use super::prelude::*;
use crate::kernels::gaussian as k;
use crate::kernels::gaussian_grad as back;

/// moments (…,2Z), mean before log-variance, and noise (…,Z) f32 to z (…,Z) f32.
#[derive(Clone, PartialEq, Debug)]
pub struct Gaussian {
    /// Factor on the draw: the scaling factor of the latents.
    pub scale: f32,
}

impl Gaussian {
    fn each(&self, x: &[Array], f: impl Fn(f64, f64, f64) -> f64) -> Vec<Array> {
        let z = x[1].shape.last();
        let mut y = x[1].clone();
        for (i, v) in y.data.iter_mut().enumerate() {
            let row = &x[0].data[i / z * 2 * z..][..2 * z];
            *v = f(row[i % z], row[z + i % z].clamp(-30.0, 20.0), *v);
        }
        vec![y]
    }
}

impl Operation for Gaussian {
    const NAME: &'static str = "gaussian";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "moments (…,2Z) of a float type, noise (…,Z) of f32";
        let [moments, noise] = args(Self::NAME, want, x)?;
        let fits = DType::FLOATS.contains(&moments.dtype)
            && noise.dtype == DType::F32
            && !noise.shape.is_empty()
            && noise.shape.with_last(2 * noise.shape.last()) == moments.shape;
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![noise])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |mean, logvar, noise| self.scale as f64 * (mean + (logvar / 2.0).exp() * noise))
    }

    /// An error of logvar moves the deviation by its share.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |mean, logvar, noise| {
            (self.scale as f64).abs() * (mean.abs() + (logvar / 2.0).exp() * noise.abs() * (1.0 + logvar.abs()))
        })
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (moments, noise) = (io.f32(0), io.f32(1));
        let z = io.y[0].shape.last();
        io.write(0, |y| {
            for ((y, m), n) in y.chunks_mut(z).zip(moments.chunks(2 * z)).zip(noise.chunks(z)) {
                for i in 0..z {
                    let deviation = (m[z + i].clamp(-30.0, 20.0) / 2.0).exp();
                    y[i] = self.scale * deviation.mul_add(n[i], m[i]);
                }
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let y = io.y_spec(0).shape;
        let p = k::GaussianFwd {
            y: io.y(0),
            moments: io.x(0),
            noise: io.x(1),
            n: y.numel() as i64,
            z: io.int(y.last())?,
            scale: self.scale,
        };
        let grid = [y.numel().div_ceil(k::BLOCK), 1, 1];
        io.launch(k::GAUSSIAN_FWD, io.x_spec(0).dtype, "", grid, k::BLOCK, p)
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dz)] = dy else { return Ok(vec![None; 2]) };
        let dx = g.push("dx", GaussianGrad { scale: self.scale }, &[x[0], x[1], *dz])?;
        // The noise is data.
        Ok(vec![Some(dx), None])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(6 * y[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 8] =
            [&[1], &[2, 3], &[1, 4, 4, 4], &[2, 3, 5, 4], &[3, 1, 1, 1], &[1, 8, 8, 16], &[7, 33], &[1, 2, 2, 3]];
        let mut all: Vec<Case> = shapes.iter().map(|&s| gaussian(0.18215, s, 2.0)).collect();
        all.push(gaussian(1.0, &[9, 4], 40.0));
        all
    }

    fn random(r: &mut Small) -> Case {
        gaussian(r.normal() as f32, &[r.below(40) + 1, r.below(9) + 1], 3.0)
    }
}

fn gaussian(scale: f32, noise: &[usize], spread: f64) -> Case {
    let shape = Shape::new(noise);
    let moments = t(shape.with_last(2 * shape.last())).normal(0.0, spread);
    Case::new(Gaussian { scale }, [moments, f32s(shape)])
}

/// moments (…,2Z), noise (…,Z) f32, dz (…,Z) f32 to the gradient of moments (…,2Z).
#[derive(Clone, PartialEq, Debug)]
pub struct GaussianGrad {
    /// As that of [`Gaussian`].
    pub scale: f32,
}

impl GaussianGrad {
    fn each(&self, x: &[Array], f: impl Fn(f64, f64, f64) -> [f64; 2]) -> Vec<Array> {
        let (z, mut dx) = (x[1].shape.last(), x[0].clone());
        for (i, (noise, dz)) in x[1].data.iter().zip(&x[2].data).enumerate() {
            let at = i / z * 2 * z + i % z;
            [dx.data[at], dx.data[at + z]] = f(dx.data[at + z], *noise, self.scale as f64 * dz);
        }
        vec![dx]
    }
}

impl Operation for GaussianGrad {
    const NAME: &'static str = "gaussian_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "moments (…,2Z) of a float type, noise and dz (…,Z) of f32";
        let [moments, noise, dz] = args(Self::NAME, want, x)?;
        let fits = Gaussian { scale: self.scale }.infer(&[moments, noise]).is_ok_and(|z| z[0] == dz);
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![moments])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |logvar, noise, d| {
            let inside = (-30.0..=20.0).contains(&logvar);
            [d, if inside { 0.5 * d * noise * (logvar / 2.0).exp() } else { 0.0 }]
        })
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |logvar, noise, d| {
            let deviation = (logvar.clamp(-30.0, 20.0) / 2.0).exp();
            [d.abs(), (d * noise * deviation).abs() * (1.0 + logvar.abs())]
        })
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (moments, noise, dz) = (io.f32(0), io.f32(1), io.f32(2));
        let z = io.x[1].shape.last();
        io.write(0, |dx| {
            let rows = dx.chunks_mut(2 * z).zip(moments.chunks(2 * z));
            for ((dx, m), (noise, dz)) in rows.zip(noise.chunks(z).zip(dz.chunks(z))) {
                for i in 0..z {
                    let (logvar, d) = (m[z + i], self.scale * dz[i]);
                    let inside = (-30.0..=20.0).contains(&logvar);
                    dx[i] = d;
                    dx[z + i] = if inside { 0.5 * d * noise[i] * (0.5 * logvar).exp() } else { 0.0 };
                }
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let z = io.x_spec(1).shape;
        let p = back::GaussianGrad {
            dx: io.y(0),
            moments: io.x(0),
            noise: io.x(1),
            dz: io.x(2),
            n: z.numel() as i64,
            z: io.int(z.last())?,
            scale: self.scale,
        };
        let grid = [z.numel().div_ceil(back::BLOCK), 1, 1];
        io.launch(back::GAUSSIAN_GRAD, io.x_spec(0).dtype, "", grid, back::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(8 * x[1].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        Gaussian::cases().into_iter().map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        with_gradient(Gaussian::random(r))
    }
}

/// The case of the gradient for one of the op.
fn with_gradient(case: Case) -> Case {
    let dz = f32s(case.args[1].shape);
    let args = [&case.args[..], &[dz]].concat();
    Case { op: GaussianGrad { scale: 0.18215 }.into(), args, ..case }
}
