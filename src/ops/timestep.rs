//! Sinusoidal embedding of a timestep: sin and cos of t · f_i, f_i = 10000^(−i / (E/2 − shift)).
//!
//! Rombach et al. 2022 after Vaswani et al. 2017. PyTorch: diffusers `get_timestep_embedding`, whose f32 roundings of
//! f_i and of t · f_i are part of the specification: checkpoints were trained with them. Kernel: `kernels/timestep.cu`.
use super::prelude::*;
use crate::kernels::timestep as k;

/// t (B) f32 to (B,E): `[sin | cos]`, or `[cos | sin]` when flipped.
#[derive(Clone, PartialEq, Debug)]
pub struct Timestep {
    /// Width E, even.
    pub width: usize,
    /// cos first, as all models of the family have it.
    pub flip: bool,
    /// `freq_shift`: subtracted from E/2 in the exponent's divisor.
    pub shift: f32,
    /// Type of the result.
    pub dtype: DType,
}

impl Timestep {
    fn frequency(&self, i: usize) -> f32 {
        let half = (self.width / 2) as f64;
        (-(10000f64.ln()) * i as f64 / (half - self.shift as f64)).exp() as f32
    }
}

impl Operation for Timestep {
    const NAME: &'static str = "timestep";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "t (B) of f32, an even width";
        let [t] = args(Self::NAME, want, x)?;
        let fits = t.dtype == DType::F32 && t.shape.len() == 1 && self.width % 2 == 0 && self.width > 0;
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![Spec::new(self.dtype, [t.shape[0], self.width])])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let half = self.width / 2;
        vec![Array::from_fn([x[0].shape[0], self.width], |i| {
            let angle = (x[0].data[i[0]] as f32 * self.frequency(i[1] % half)) as f64;
            if (i[1] < half) == self.flip { angle.cos() } else { angle.sin() }
        })]
    }

    /// sin and cos are sums of terms of size 1.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        vec![Array::from_fn([x[0].shape[0], self.width], |_| 1.0)]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (t, half) = (io.f32(0), self.width / 2);
        io.rows(0, self.width, |first, y| {
            for (i, y) in y.iter_mut().enumerate() {
                let (b, c) = (first + i / self.width, i % self.width);
                let angle = (t[b] * self.frequency(c % half)) as f64;
                *y = if (c < half) == self.flip { angle.cos() } else { angle.sin() } as f32;
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let n = io.y_spec(0).shape.numel();
        let p = k::TimestepFwd {
            y: io.y(0),
            t: io.x(0),
            n: io.int(n)?,
            width: io.int(self.width)?,
            flip: self.flip as i32,
            shift: self.shift,
        };
        io.launch(k::TIMESTEP_FWD, self.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(4 * y[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let mut all = Vec::new();
        for (dtype, only) in super::case::SINGLE {
            let mut add = |width, flip, shift, steps: &[f64]| {
                let t = f32s([steps.len()]).values(steps.to_vec());
                all.push(Case::new(Timestep { width, flip, shift, dtype }, [t]).only(only));
            };
            add(2, true, 0.0, &[0.0]);
            add(8, true, 0.0, &[1.0, 999.0, 0.0]);
            add(32, true, 0.0, &[481.0]);
            add(320, true, 0.0, &[981.0]);
            add(320, false, 0.0, &[1.0]);
            add(64, false, 1.0, &[17.0, 500.0]);
            add(6, true, 1.0, &[3.25]);
            add(256, true, 0.0, &[411.415, 69.403]);
        }
        all
    }

    fn random(r: &mut Small) -> Case {
        let steps: Vec<f64> = (0..r.below(4) + 1).map(|_| r.range(0.0, 999.0) as f32 as f64).collect();
        let (dtype, only) = super::case::SINGLE[r.below(3)];
        let op = Timestep { width: 2 * (r.below(200) + 2), flip: r.below(2) == 0, shift: r.below(2) as f32, dtype };
        Case::new(op, [f32s([steps.len()]).values(steps)]).only(only)
    }
}
