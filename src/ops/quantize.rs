//! The nearest code: k = argmin |z − e_k|², the lowest k where several are nearest; y = e_k.
//!
//! van den Oord et al. 2017; Rombach et al. 2022, section 3.1. PyTorch: `torch.cdist(z, e).argmin(-1)`.
//! Kernels: `kernels/quantize.cu`, `kernels/quantize_usage.cu`. Distances are summed in f32 from differences, so near ties are decided as finely as
//! the type of z allows. A row with no finite distance gives NaN, so that it is found later.
use super::prelude::*;
use crate::kernels::quantize as k;
use crate::kernels::quantize_usage as usage;
use rayon::prelude::*;

/// z (…,C) and codebook (V,C) to the quantised latent (…,C) and the codes (…) i32.
#[derive(Clone, PartialEq, Debug)]
pub struct Quantize;

impl Operation for Quantize {
    const NAME: &'static str = "quantize";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "z (…,C), codebook (V,C) of one float type, V > 0";
        let [z, codes] = args(Self::NAME, want, x)?;
        let fits = z.dtype == codes.dtype
            && DType::FLOATS.contains(&z.dtype)
            && codes.shape.len() == 2
            && codes.shape[0] > 0
            && !z.shape.is_empty()
            && z.shape.last() == codes.shape[1];
        ensure!(fits, Self::NAME, want, x);
        let lead = &z.shape[..z.shape.len() - 1];
        Ok(vec![z, Spec::new(DType::I32, lead)])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let c = x[0].shape.last();
        let mut y = x[0].clone();
        let lead = &x[0].shape[..x[0].shape.len() - 1];
        let mut codes = Array::zeros(lead);
        for (row, code) in y.data.chunks_mut(c).zip(&mut codes.data) {
            let mut best = (f64::INFINITY, 0);
            for (i, e) in x[1].data.chunks(c).enumerate() {
                let d: f64 = row.iter().zip(e).map(|(a, b)| (a - b) * (a - b)).sum();
                if d < best.0 {
                    best = (d, i);
                }
            }
            *code = best.1 as f64;
            match best.0.is_finite() {
                true => row.copy_from_slice(&x[1].data[best.1 * c..][..c]),
                false => row.fill(f64::NAN),
            }
        }
        vec![y, codes]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let [y, codes] = &self.spec(x)[..] else { return vec![] };
        vec![y.map(f64::abs), codes.map(|_| 0.0)]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (z, codes) = (io.f32(0), io.f32(1));
        let c = io.x[1].shape[1];
        let nearest: Vec<i32> = z
            .par_chunks(c)
            .map(|z| {
                let mut best = (f32::INFINITY, 0);
                for (i, e) in codes.chunks(c).enumerate() {
                    let d = z.iter().zip(e).fold(0.0f32, |d, (a, b)| (a - b).mul_add(a - b, d));
                    if d < best.0 {
                        best = (d, i as i32);
                    }
                }
                if best.0.is_finite() { best.1 } else { -1 }
            })
            .collect();
        io.i32_mut(1).iter_mut().zip(&nearest).for_each(|(code, &i)| *code = i.max(0));
        io.write(0, |y| {
            for (row, &i) in y.chunks_mut(c).zip(&nearest) {
                match usize::try_from(i) {
                    Ok(i) => row.copy_from_slice(&codes[i * c..][..c]),
                    Err(_) => row.fill(f32::NAN),
                }
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let (rows, codes) = (io.x_spec(0).shape.rows(), io.x_spec(1).shape);
        let p = k::QuantizeFwd {
            y: io.y(0),
            codes: io.y(1),
            z: io.x(0),
            book: io.x(1),
            rows: io.int(rows)?,
            v: io.int(codes[0])?,
            c: io.int(codes[1])?,
        };
        io.launch(k::QUANTIZE_FWD, io.x_spec(0).dtype, "", [rows.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    /// The straight-through estimator (van den Oord et al. 2017): what reaches y is what reaches z. The codebook learns
    /// from a loss of its own.
    fn grad(&self, _g: &mut Graph, _x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        Ok(vec![dy[0], None])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(x[0].shape.rows().saturating_mul(3 * x[1].shape.numel()), x, y)
    }

    fn cases() -> Vec<Case> {
        let q = |z: &[usize], v: usize| Case::new(Quantize, [t(z), t([v, z[z.len() - 1]])]);
        let mut tie = q(&[4, 2], 6);
        tie.args[1] = t([6, 2]).values(vec![9.0, 9.0, 1.0, 0.0, 1.0, 0.0, 9.0, 9.0, 1.0, 0.0, 9.0, 9.0]);
        tie.args[0] = t([4, 2]).values(vec![1.0, 0.0, 0.5, 0.0, 8.0, 9.0, 1.0, 1.0]);
        vec![
            q(&[1, 1], 1),
            q(&[1, 3], 2),
            q(&[2, 8, 8, 3], 256),
            q(&[3, 5, 7, 4], 100),
            q(&[129, 3], 33),
            q(&[2, 3, 3, 8], 64),
            q(&[9, 256], 17),
            tie,
            q(&[1, 64, 64, 3], 8192).weights(1..2).bench(),
        ]
    }

    fn random(r: &mut Small) -> Case {
        let c = r.below(9) + 1;
        Case::new(Quantize, [t([r.below(100) + 1, c]), t([r.below(60) + 1, c])])
    }
}

/// Codes (…) i32, at least one, below V, to the perplexity of their distribution, exp(−Σ p ln(p + 1e-10)), and the number of
/// codes that are used, both (1) f32.
#[derive(Clone, PartialEq, Debug)]
pub struct CodeUsage {
    /// V, at most 2²⁴, so that the number is exact.
    pub codes: usize,
}

impl CodeUsage {
    /// Σ p ln(p + 1e-10), and how many p are not 0; codes that are out of range count for nothing.
    fn of(&self, codes: impl ExactSizeIterator<Item = usize>) -> [f64; 2] {
        let (mut counts, n) = (vec![0u32; self.codes], codes.len() as f64);
        codes.for_each(|code| counts.get_mut(code).into_iter().for_each(|c| *c += 1));
        counts.iter().filter(|&&c| c > 0).fold([0.0, 0.0], |[sum, used], &c| {
            let p = f64::from(c) / n;
            [sum + p * (p + 1e-10).ln(), used + 1.0]
        })
    }
}

impl Operation for CodeUsage {
    const NAME: &'static str = "code_usage";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "codes (…) of i32, not empty; a codebook of 1 to 2^24 entries";
        let [codes] = args(Self::NAME, want, x)?;
        let fits =
            codes.dtype == DType::I32 && codes.shape.numel() > 0 && (1..=1 << 24).contains(&self.codes);
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![Spec::new(DType::F32, [1]); 2])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let [sum, used] = self.of(x[0].data.iter().map(|&v| v as usize));
        [(-sum).exp(), used].map(|v| Array { shape: [1].into(), data: vec![v] }).into()
    }

    /// A relative error of the exponential is an absolute one of the sum.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let [sum, used] = self.of(x[0].data.iter().map(|&v| v as usize));
        [(-sum).exp() * (1.0 + sum.abs()), used].map(|v| Array { shape: [1].into(), data: vec![v] }).into()
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let codes = io.i32(0);
        let [sum, used] = self.of(codes.iter().map(|&v| usize::try_from(v).unwrap_or(usize::MAX)));
        io.write(0, |y| y[0] = (-sum).exp() as f32);
        io.write(1, |y| y[0] = used as f32);
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let (n, v) = (io.int(io.x_spec(0).shape.numel())?, io.int(self.codes)?);
        let parts = self.codes.div_ceil(usage::BLOCK);
        let p = usage::CodeUsageFwd { partial: io.scratch, codes: io.x(0), n, v };
        io.launch(usage::CODE_USAGE_FWD, DType::F32, "", [parts, 1, 1], usage::BLOCK, p)?;
        let parts = io.int(parts)?;
        let p = usage::CodeUsageTotal { perplexity: io.y(0), used: io.y(1), partial: io.scratch, parts };
        io.launch(usage::CODE_USAGE_TOTAL, DType::F32, "", [1, 1, 1], usage::BLOCK, p)
    }

    fn scratch(&self, _x: &[Spec], _y: &[Spec]) -> usize {
        self.codes.div_ceil(usage::BLOCK) * 2 * size_of::<f32>()
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes: [(&[usize], usize); 8] = [
            (&[1], 1),
            (&[1], 300),
            (&[3, 5], 7),
            (&[2, 8, 8], 256),
            (&[2, 8, 8], 257),
            (&[100], 2),
            (&[1000], 40),
            (&[4, 16, 16], 1500),
        ];
        shapes.into_iter().map(|(x, v)| usage_of(x, v)).collect()
    }

    fn random(r: &mut Small) -> Case {
        usage_of(&[r.below(3) + 1, r.below(200) + 1], r.below(600) + 1)
    }
}

fn usage_of(x: &[usize], codes: usize) -> Case {
    Case::new(CodeUsage { codes }, [ids(x, codes)]).only(&[DType::F32])
}
