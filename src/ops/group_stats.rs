//! Mean, and sum of squares about it, of each channel over slabs of 64 pixels: what a group norm needs to know of x.
//!
//! For what is not made by an op that emits its statistics itself ([`Operation::with_stats`]). PyTorch (channels last):
//! `s = x.reshape(-1, 64, C); m = s.mean(1); torch.stack([m, ((s - m[:, None]) ** 2).sum(1)], -1)`.
//! Kernel: `kernels/group_stats.cu`.
use super::prelude::*;
use crate::kernels::group_stats as k;

/// Pixels of a slab.
pub(super) const SLAB: usize = k::ROWS;

/// Channels that the kernels move together.
pub(super) const VECTOR: usize = 8;

/// Type and axes of the channel statistics of x (B,…,C): f32 (B·HW/64, C, 2), for each slab of 64 consecutive pixels and
/// each channel the mean of its values as stored, and the sum of their squared differences from it. `None` where there are
/// none: HW is no multiple of 64 (a slab would hold pixels of two images), or C is none of 8.
pub fn channel_stats(x: Spec) -> Option<Spec> {
    let (rows, c) = (x.shape.rows(), x.shape.last());
    let fits = x.shape.len() >= 2 && rows > 0 && c > 0 && DType::FLOATS.contains(&x.dtype);
    let whole = fits && (rows / x.shape[0]).is_multiple_of(SLAB) && c.is_multiple_of(VECTOR);
    whole.then(|| Spec::new(DType::F32, [rows / SLAB, c, 2]))
}

/// The [`channel_stats`] of x (B,…,C).
#[derive(Clone, PartialEq, Debug)]
pub struct GroupStats;

impl GroupStats {
    /// `f` of each slab's values of each channel, as the two elements of y.
    fn each(x: &Array, f: impl Fn(&[f64]) -> [f64; 2]) -> Vec<Array> {
        let c = x.shape.last();
        let slab = |s: &[f64]| {
            (0..c).flat_map(|i| f(&s.iter().skip(i).step_by(c).copied().collect::<Vec<_>>())).collect()
        };
        let data: Vec<Vec<f64>> = x.data.chunks(SLAB * c).map(slab).collect();
        vec![Array { shape: [x.shape.rows() / SLAB, c, 2].into(), data: data.concat() }]
    }
}

/// Mean, and sum of squares about it.
fn moments(v: &[f64]) -> [f64; 2] {
    let mean = v.iter().sum::<f64>() / v.len() as f64;
    [mean, v.iter().map(|v| (v - mean) * (v - mean)).sum()]
}

impl Operation for GroupStats {
    const NAME: &'static str = "group_stats";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = format!("x (B,…,C) of a float type, HW % {SLAB} == 0, C % {VECTOR} == 0");
        let [x0] = args(Self::NAME, &want, x)?;
        let y = channel_stats(x0);
        ensure!(y.is_some(), Self::NAME, want, x);
        Ok(y.into_iter().collect())
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        GroupStats::each(&x[0], moments)
    }

    /// The squares are of differences, which are exact where the mean is far from zero: their sum is of its own size.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        GroupStats::each(&x[0], |v| [v.iter().map(|v| v.abs()).sum::<f64>() / v.len() as f64, moments(v)[1]])
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, c) = (io.slice(0), io.x[0].shape.last());
        io.rows(0, 2 * c, |first, y| {
            for (i, y) in y.chunks_mut(2 * c).enumerate() {
                let start = (first + i) * SLAB * c;
                x.with(start..start + SLAB * c, |x| {
                    for (channel, y) in y.chunks_mut(2).enumerate() {
                        let v = || x.iter().skip(channel).step_by(c).map(|&v| v as f64);
                        let mean = v().sum::<f64>() / SLAB as f64;
                        y[0] = mean as f32;
                        y[1] = v().map(|v| (v - mean) * (v - mean)).sum::<f64>() as f32;
                    }
                });
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let x = io.x_spec(0);
        let (slabs, c) = (x.shape.rows() / SLAB, x.shape.last());
        let p = k::GroupStatsFwd { y: io.y(0), x: io.x(0), c: io.int(c)? };
        io.launch(k::GROUP_STATS_FWD, x.dtype, "", [slabs * c.div_ceil(k::STRIP), 1, 1], k::BLOCK, p)
    }

    fn launches(&self, x: &[Spec]) -> Vec<LaunchPlan> {
        let blocks = x[0].shape.rows() / SLAB * x[0].shape.last().div_ceil(k::STRIP);
        let time = launch::streaming(x[0].bytes() as f64, blocks);
        vec![LaunchPlan::new(k::GROUP_STATS_FWD, x[0].dtype, "", [blocks, 1, 1], k::BLOCK, time)]
    }

    fn cpu_scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        cpu::working_bytes(SLAB * x[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(4 * x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let stats = |x: &[usize]| Case::new(GroupStats, [t(x)]);
        let mut far = stats(&[2, 16, 8, 72]);
        far.args[0] = t([2, 16, 8, 72]).normal(100.0, 0.01);
        let mut small = vec![
            stats(&[1, 8, 8, 8]),
            stats(&[3, 64, 16]),
            stats(&[2, 8, 8, 64]),
            stats(&[1, 16, 12, 56]),
            stats(&[2, 8, 24, 72]),
            stats(&[1, 4, 16, 128]),
            stats(&[1, 8, 8, 1280]),
            stats(&[3, 8, 16, 136]),
            // The mean is exact to a rounding of f32, so is what is summed of its differences.
            far.only(&[DType::F32]),
        ];
        let real = [[2, 64, 320], [2, 32, 640], [2, 16, 1280], [2, 8, 1280], [1, 64, 512], [1, 512, 128]];
        small.extend(real.map(|[b, side, c]| stats(&[b, side, side, c]).bench()));
        small
    }

    fn random(r: &mut Small) -> Case {
        let x = [r.below(3) + 1, 8, 8 * (r.below(3) + 1), 8 * (r.below(20) + 1)];
        Case::new(GroupStats, [t(x).normal(0.5, 2.0)])
    }
}
