//! Known parts of a picture put back after a sampler's step, for inpainting with any model: with X = slots\[next_slot\],
//! X = mask · X + (1 − mask) · (alpha · clean + sigma · noise), where alpha and sigma are those of the next evaluation.
//!
//! diffusers' `StableDiffusionInpaintPipeline` with a UNet of the latents alone; CompVis `p_sample_loop` with a mask. Kernel:
//! `kernels/blend.cu`.
use super::prelude::*;
use super::sampler::{ALPHA, NEXT, Row, SIGMA, checked_row, is_table, table};
use crate::kernels::blend as k;

/// slots (S,B,H,W,C), table (R,24), counter (4) i32, mask (B,H,W,1), clean (B,H,W,C), noise (B,H,W,C), f32, to slots. The counter is
/// that of after [`super::Advance`]: after a row that was not finite, nothing changes.
#[derive(Clone, PartialEq, Debug)]
pub struct Blend;

impl Operation for Blend {
    const NAME: &'static str = "blend";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "slots (S,B,H,W,C), table (R,24), counter (4) i32, mask (B,H,W,1), clean and noise (B,H,W,C), f32";
        let [slots, table, counter, mask, clean, noise] = args(Self::NAME, want, x)?;
        let fits = slots.shape.len() == 5
            && [slots, mask, clean].iter().all(|s| s.dtype == DType::F32)
            && is_table(table)
            && counter == Spec::new(DType::I32, [4])
            && clean.shape[..] == slots.shape[1..]
            && noise == clean
            && mask.shape.len() == 4
            && mask.shape[..3] == clean.shape[..3]
            && mask.shape[3] == 1;
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![slots])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let mut slots = x[0].clone();
        if x[2].data[2] != 0.0 {
            return vec![slots];
        }
        let row = Row::at(&x[1].data, x[2].data[0] as usize);
        let (n, c) = (x[4].data.len(), x[4].shape.last());
        let next = &mut slots.data[row.slot(NEXT).unwrap_or(0) * n..][..n];
        for (i, next) in next.iter_mut().enumerate() {
            let known = row.f(ALPHA) * x[4].data[i] + row.f(SIGMA) * x[5].data[i];
            let mask = x[3].data[i / c];
            *next = mask * *next + (1.0 - mask) * known;
        }
        vec![slots]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        if io.i32_at(2, 2) != 0 {
            return Ok(());
        }
        let (table, mask, clean, noise) = (io.f32(1), io.f32(3), io.f32(4), io.f32(5));
        let row = Row::at(&table, checked_row(io.i32_at(2, 0), io.x[1].shape[0])?);
        let (alpha, sigma) = (row.f(ALPHA) as f32, row.f(SIGMA) as f32);
        let (n, c) = (clean.len(), io.x[4].shape.last());
        // The slots' new value is in their own memory.
        io.write(0, |slots| {
            let next = &mut slots[row.slot(NEXT).unwrap_or(0) * n..][..n];
            for (i, next) in next.iter_mut().enumerate() {
                let (mask, known) = (mask[i / c], alpha * clean[i] + sigma * noise[i]);
                *next = mask * *next + (1.0 - mask) * known;
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let shape = io.x_spec(4).shape;
        let n = shape.numel();
        let p = k::BlendFwd {
            slots: io.y(0),
            table: io.x(1),
            counter: io.x(2),
            mask: io.x(3),
            clean: io.x(4),
            noise: io.x(5),
            n: n as i64,
            c: io.int(shape.last())?,
        };
        io.launch(k::BLEND_FWD, DType::F32, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], _y: &[Spec]) -> Cost {
        let n = x[4].shape.numel();
        Cost { flops: (7 * n) as f64, bytes: (x[3].bytes() + 16 * n) as f64 }
    }

    fn updates(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn cases() -> Vec<Case> {
        let sizes = [[3, 1, 2, 2, 4], [4, 3, 5, 3, 3], [8, 2, 8, 8, 4], [2, 1, 1, 1, 1]];
        let each = |size: [usize; 5]| [[0, 0], [2, 0], [1, 1]].map(|rows| case(size, 3, rows));
        sizes.into_iter().flat_map(each).collect()
    }

    fn random(r: &mut Small) -> Case {
        let size = [r.below(7) + 1, r.below(3) + 1, r.below(9) + 1, r.below(9) + 1, r.below(5) + 1];
        let rows = r.below(4) + 1;
        case(size, rows, [r.below(rows), 0])
    }
}

/// A mask with 0, 1 and what lies between, as diffusers never has it.
fn case(size: [usize; 5], rows: usize, [row, bad]: [usize; 2]) -> Case {
    let [_, b, h, w, c] = size;
    let mask = (0..b * h * w).map(|i| [1.0, 0.0, 0.75][i % 3]).collect();
    let counter = vec![row as f64, row as f64 + 1.0, bad as f64, 0.0];
    let counter = super::Arg { ty: super::Ty::I32, ..f32s([4]).values(counter) };
    let latents = || f32s([b, h, w, c]);
    let args = [f32s(size), table(rows, size[0]), counter, f32s([b, h, w, 1]).values(mask), latents(), latents()];
    Case::new(Blend, args)
}
