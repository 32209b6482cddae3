//! y = act((x − mean) · rstd · w + bias), mean and variance over the pixels and channels of a group; with `film`
//! y = act(((x − mean) · rstd · w + bias) · (1 + scale) + shift), scale and shift of an image and channel (Perez et al. 2018,
//! as diffusers' `time_embedding_norm="scale_shift"`).
//!
//! PyTorch: `F.silu(F.group_norm(x, groups, w, b, eps))`. Kernels: `kernels/group_norm.cu`, which computes the statistics
//! itself and takes any shape; and `kernels/group_norm_apply.cu`, which is given them by channel and slab of pixels
//! ([`channel_stats`]); where there are many slabs, `kernels/group_norm_merge.cu` makes them fewer first.
mod blocks;
mod cases;
mod grad;

pub use grad::GroupNormGrad;

use blocks::{rows_per_block, slabs_kept, team, variant};

use super::Op;
use super::activation::{Act, code};
use super::group_stats::{SLAB, VECTOR, channel_stats};
use super::prelude::*;
use super::sampler::checked_row;
use crate::graph::GivenStats;
use crate::kernels::group_norm as k;
use crate::kernels::group_norm_apply as apply;
use crate::kernels::group_norm_merge as merge;

/// What a group norm has as inputs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Given {
    /// x (B,…,C), w, bias.
    #[default]
    Input,
    /// x (B,…,C), w, bias, and the [`channel_stats`] of x.
    Stats,
    /// x as two tensors side by side, x0 (B,…,C0) and x1 (B,…,C1) with C = C0 + C1, w, bias, and the [`channel_stats`] of
    /// each.
    Halves,
}

impl Given {
    /// How many tensors x comes in.
    fn sources(self) -> usize {
        if self == Given::Halves { 2 } else { 1 }
    }
}

/// Group normalisation of x (B,…,C) with w, bias (C), and an activation after it.
#[derive(Clone, PartialEq, Debug)]
pub struct GroupNorm {
    /// Number of groups; divides C.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Applied to the result; none or SiLU where statistics are given.
    pub act: Act,
    /// The inputs.
    pub given: Given,
    /// Behind bias: input film (R,2·C), the scales and then the shifts of an image, R = B, or 1 for all.
    pub film: bool,
    /// With `film`, behind it: input counter (4) i32; film has a row for each evaluation, and row counter\[0\] serves every image.
    pub step: bool,
}

/// Statistics of a group in f64: mean, mean of absolute values, reciprocal deviation.
#[derive(Clone, Copy)]
struct Stats {
    mean: f64,
    size: f64,
    rstd: f64,
}

/// Statistics of group `g` of image `b`.
fn moments(x: &Array, groups: usize, eps: f64, b: usize, g: usize) -> Stats {
    let c = x.shape.last();
    let per_image = x.data.len() / x.shape[0].max(1);
    let image = &x.data[b * per_image..][..per_image];
    let cpg = c / groups;
    let members = || image.chunks(c).flat_map(|pixel| &pixel[g * cpg..][..cpg]);
    let n = (per_image / c * cpg) as f64;
    let mean = members().sum::<f64>() / n;
    let var = members().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    let size = members().map(|v| v.abs()).sum::<f64>() / n;
    Stats { mean, size, rstd: 1.0 / (var + eps).sqrt() }
}

/// Mean and variance of some channels of one image from their statistics, `[mean, sum of squares]` for each channel and
/// slab.
fn merged(entries: impl Iterator<Item = [f64; 2]> + Clone) -> [f64; 2] {
    let n = entries.clone().count() as f64;
    let mean = entries.clone().map(|[mean, _]| mean).sum::<f64>() / n;
    let squares = entries.map(|[m, m2]| m2 + SLAB as f64 * (m - mean) * (m - mean)).sum::<f64>();
    [mean, squares / (n * SLAB as f64)]
}

/// [a | b] on the last axis.
fn side_by_side(a: &Array, b: &Array) -> Array {
    let (na, nb) = (a.shape.last(), b.shape.last());
    let rows = a.data.chunks(na).zip(b.data.chunks(nb));
    Array { shape: a.shape.with_last(na + nb), data: rows.flat_map(|(a, b)| [a, b].concat()).collect() }
}

impl GroupNorm {
    /// A norm that computes its statistics.
    pub fn new(groups: usize, eps: f32, act: Act) -> GroupNorm {
        GroupNorm { groups, eps, act, given: Given::Input, film: false, step: false }
    }

    /// Which input is the first one with statistics.
    fn stats(&self) -> usize {
        self.given.sources() + 2 + self.film as usize + self.step as usize
    }

    /// Each element through `f(x, statistics, w, b)`.
    fn each(&self, x: &[Array], f: impl Fn(f64, Stats, [f64; 2], [f64; 2]) -> f64) -> Vec<Array> {
        let n = self.given.sources();
        let mut y = if n == 2 { side_by_side(&x[0], &x[1]) } else { x[0].clone() };
        let (c, batch, eps) = (y.shape.last(), y.shape[0], self.eps as f64);
        let per_image = y.data.len() / batch.max(1);
        let given = |b: usize, g: usize| {
            let (cpg, slabs, c0) = (c / self.groups, per_image / c / SLAB, x[0].shape.last());
            let entries =
                (b * slabs..(b + 1) * slabs).flat_map(|s| (g * cpg..(g + 1) * cpg).map(move |c| (s, c)));
            let entries = entries.map(|(s, c)| {
                let first = self.stats();
                let (stats, c) = if c < c0 { (&x[first], c) } else { (&x[first + 1], c - c0) };
                [stats.at(&[s, c, 0]), stats.at(&[s, c, 1])]
            });
            let [mean, var] = merged(entries.clone());
            // The mean of |x| is at most that of |mean| and the deviation.
            let size =
                entries.clone().map(|[m, _]| m.abs()).sum::<f64>() / entries.count() as f64 + var.sqrt();
            Stats { mean, size, rstd: 1.0 / (var + eps).sqrt() }
        };
        for b in 0..batch {
            let stats = (0..self.groups).map(|g| match self.given {
                Given::Input => moments(&y, self.groups, eps, b, g),
                _ => given(b, g),
            });
            let stats: Vec<_> = stats.collect();
            let row = match self.film {
                true if self.step => x[n + 3].data[0] as usize,
                true if x[n + 2].shape[0] > 1 => b,
                _ => 0,
            };
            for (i, v) in y.data[b * per_image..][..per_image].iter_mut().enumerate() {
                let (c0, wb) = (i % c, [x[n].data[i % c], x[n + 1].data[i % c]]);
                let film = self.film.then(|| [x[n + 2].at(&[row, c0]), x[n + 2].at(&[row, c + c0])]);
                *v = f(*v, stats[c0 / (c / self.groups)], wb, film.unwrap_or_default());
            }
        }
        vec![y]
    }

    /// Pixels of one image, whose groups have these means and variances.
    fn normalise(
        &self,
        x: &[f32],
        stats: &[[f64; 2]],
        cpg: usize,
        (w, bias): (&[f32], &[f32]),
        y: &mut [f32],
    ) {
        let c = w.len();
        // a·x + b cancels where |mean| ≫ deviation; the pivot keeps the digits.
        if stats.iter().any(|[mean, var]| mean * mean > 1e4 * var) {
            for (i, (y, &x)) in y.iter_mut().zip(x).enumerate() {
                let [mean, var] = stats[i % c / cpg];
                let (high, a) = (mean as f32, w[i % c] as f64 / (var + self.eps as f64).sqrt());
                *y = ((x - high) - (mean - high as f64) as f32) * a as f32 + bias[i % c];
            }
            return cpu::math::activate_in_place(self.act, y);
        }
        cpu::with_scratch(2 * c, |factors| {
            let (scale, shift) = factors.split_at_mut(c);
            for i in 0..c {
                let [mean, var] = stats[i / cpg];
                let a = w[i] as f64 / (var + self.eps as f64).sqrt();
                (scale[i], shift[i]) = (a as f32, (bias[i] as f64 - mean * a) as f32);
            }
            cpu::math::scale_shift_act(x, scale, shift, self.act, y);
        });
    }
}

/// `f` of the factors and biases that scale and shift of an image leave: w · (1 + scale), bias · (1 + scale) + shift.
fn with_film((w, bias): (&[f32], &[f32]), film: Option<&[f32]>, f: impl FnOnce((&[f32], &[f32]))) {
    let Some((scale, shift)) = film.map(|film| film.split_at(w.len())) else { return f((w, bias)) };
    cpu::with_scratch(2 * w.len(), |both| {
        let (own_w, own_bias) = both.split_at_mut(w.len());
        for i in 0..w.len() {
            own_w[i] = w[i] * (1.0 + scale[i]);
            own_bias[i] = bias[i] * (1.0 + scale[i]) + shift[i];
        }
        f((own_w, own_bias));
    });
}

impl GroupNorm {
    /// Computes y on the CPU where the groups have these means and variances (B,G).
    fn with_moments(&self, io: &mut cpu::Call, stats: &[[f64; 2]], step: usize) {
        let n = self.given.sources();
        let (x, w, bias) = ([io.slice(0), io.slice(n - 1)], io.slice(n), io.slice(n + 1));
        let (c0, c, batch) = (io.x[0].shape.last(), io.y[0].shape.last(), io.y[0].shape[0]);
        let (pixels, cpg, groups) = (io.y[0].shape.rows() / batch.max(1), c / self.groups, self.groups);
        let (table, rows) = match self.film {
            true => (io.f32(n + 2), io.x[n + 2].shape.rows()),
            false => (vec![].into(), 1),
        };
        let row = |image: usize| {
            if self.step {
                step
            } else if rows > 1 {
                image
            } else {
                0
            }
        };
        let film = |image| self.film.then(|| &table[row(image) * 2 * c..][..2 * c]);
        w.with_all(|w| {
            bias.with_all(|bias| {
                io.rows(0, c, |first, y| {
                    // The rows of each image that these are.
                    let (mut p, mut rest) = (first, y);
                    while !rest.is_empty() {
                        let count = (pixels - p % pixels).min(rest.len() / c);
                        let (y, tail) = rest.split_at_mut(count * c);
                        let stats = &stats[p / pixels * groups..][..groups];
                        if n == 1 {
                            x[0].with(p * c..p * c + y.len(), |x| {
                                with_film((w, bias), film(p / pixels), |wb| {
                                    self.normalise(x, stats, cpg, wb, y)
                                });
                            });
                        } else {
                            cpu::with_scratch(y.len(), |both| {
                                for (i, row) in both.chunks_mut(c).enumerate() {
                                    x[0].read((p + i) * c0, &mut row[..c0]);
                                    x[1].read((p + i) * (c - c0), &mut row[c0..]);
                                }
                                with_film((w, bias), film(p / pixels), |wb| {
                                    self.normalise(both, stats, cpg, wb, y)
                                });
                            });
                        }
                        (p, rest) = (p + count, tail);
                    }
                });
            });
        });
    }

    /// Means and variances (B,G) from the statistics that are given.
    fn given_moments(&self, io: &cpu::Call) -> Vec<[f64; 2]> {
        let n = self.given.sources();
        let (c0, c, batch) = (io.x[0].shape.last(), io.y[0].shape.last(), io.y[0].shape[0]);
        let (slabs, cpg) = (io.y[0].shape.rows() / batch.max(1) / SLAB, c / self.groups);
        let stats = [io.f32(self.stats()), io.f32(self.stats() + n - 1)];
        let entry = |s: usize, c1: usize| {
            let (stats, at) =
                if c1 < c0 { (&stats[0], s * c0 + c1) } else { (&stats[1], s * (c - c0) + c1 - c0) };
            [stats[2 * at] as f64, stats[2 * at + 1] as f64]
        };
        let group = |i: usize| {
            let (b, g) = (i / self.groups, i % self.groups);
            let slabs = b * slabs..(b + 1) * slabs;
            merged(slabs.flat_map(|s| (g * cpg..(g + 1) * cpg).map(move |c| entry(s, c))))
        };
        (0..batch * self.groups).map(group).collect()
    }

    /// The kernel that computes the statistics itself.
    fn launch_whole(&self, io: &cuda::Call) -> Result<()> {
        let s = io.x_spec(0).shape;
        let (b, c) = (s[0], s.last());
        let input = |there: bool, i: usize| if there { io.x(i) } else { Default::default() };
        let p = k::GroupNormFwd {
            y: io.y(0),
            x: io.x(0),
            w: io.x(1),
            bias: io.x(2),
            film: input(self.film, 3),
            counter: input(self.step, 4),
            film_rows: if self.film { io.int(io.x_spec(3).shape.rows())? } else { 1 },
            hw: io.int(s.rows() / b.max(1) * (c / self.groups)).and(io.int(s.rows() / b.max(1)))?,
            c: io.int(c)?,
            groups: io.int(self.groups)?,
            eps: self.eps,
            act: code(self.act),
        };
        io.launch(k::GROUP_NORM_FWD, io.x_spec(0).dtype, "", [self.groups, b, 1], k::BLOCK, p)
    }

    /// The kernel that is given statistics.
    fn launch_given(&self, io: &cuda::Call) -> Result<()> {
        let n = self.given.sources();
        let y = *io.y_spec(0);
        let (b, c, c0) = (y.shape[0], y.shape.last(), io.x_spec(0).shape.last());
        let hw = y.shape.rows() / b.max(1);
        let (slabs, count) = (hw / SLAB, slabs_kept(hw / SLAB));
        let input = |there: bool, i: usize| if there { io.x(i) } else { Default::default() };
        let second = |i: usize| input(n == 2, i);
        let (mut stats0, mut stats1) = (io.x(self.stats()), second(self.stats() + 1));
        if count < slabs {
            let (from0, from1) = (stats0, stats1);
            (stats0, stats1) = (io.scratch, io.scratch.offset(b * count * c0 * 2 * size_of::<f32>()));
            let p = merge::GroupNormMerge {
                y0: stats0,
                y1: stats1,
                x0: from0,
                x1: from1,
                c0: io.int(c0)?,
                c1: io.int(c - c0)?,
                fan: io.int(slabs / count)?,
                each: SLAB as i32,
            };
            let grid = [c.div_ceil(32), count, b];
            io.launch(merge::GROUP_NORM_MERGE, DType::F32, "", grid, merge::BLOCK, p)?;
        }
        let variant = variant(slabs);
        let strip = apply::STRIP.of(variant);
        let strips = c.div_ceil(strip);
        let (rows, cpg) = (rows_per_block(hw, b * strips), c / self.groups);
        let (warps, phases) = team(strip, c, cpg, count);
        // The kernel divides by cpg with a product; it is exact below this.
        io.int(cpg.saturating_mul(c + apply::BLOCK))?;
        let p = apply::GroupNormApply {
            y: io.y(0),
            x0: io.x(0),
            x1: second(1),
            w: io.x(n),
            bias: io.x(n + 1),
            film: input(self.film, n + 2),
            counter: input(self.step, n + 3),
            film_rows: if self.film { io.int(io.x_spec(n + 2).shape.rows())? } else { 1 },
            stats0,
            stats1,
            hw: io.int(hw)?,
            c0: io.int(c0)?,
            c1: io.int(c - c0)?,
            cpg: io.int(cpg)?,
            reciprocal: (1u32 << 31).div_ceil(cpg as u32),
            warps: io.int(warps)?,
            phases: io.int(phases)?,
            rows: io.int(rows)?,
            count: io.int(count)?,
            each: io.int(hw / count.max(1))?,
            eps: self.eps,
            silu: (self.act == Act::Silu) as i32,
        };
        io.launch(apply::GROUP_NORM_APPLY, y.dtype, variant, [strips, hw.div_ceil(rows), b], apply::BLOCK, p)
    }
}

impl Operation for GroupNorm {
    const NAME: &'static str = "group_norm";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let (g, n) = (self.groups, self.given.sources());
        let want = match self.given {
            Given::Input => format!("x (B,…,C), w (C), bias (C) of one float type, C % {g} == 0"),
            Given::Stats => format!(
                "x (B,…,C), w (C), bias (C) of one float type, stats f32 (B·HW/{SLAB},C,2), C % {g} == 0, \
                 C % {VECTOR} == 0, HW % {SLAB} == 0, no activation or SiLU"
            ),
            Given::Halves => format!(
                "x0 (B,…,C0), x1 (B,…,C1), w (C), bias (C) of one float type, C = C0 + C1, C % {g} == 0, \
                 stats0 f32 (B·HW/{SLAB},C0,2), stats1 f32 (B·HW/{SLAB},C1,2), C0 and C1 % {VECTOR} == 0, \
                 HW % {SLAB} == 0, no activation or SiLU"
            ),
        };
        let want = if self.film {
            format!("{want}; behind bias film (B or 1,2·C)[, counter (4) i32]")
        } else {
            want
        };
        let inputs = self.stats() + if self.given == Given::Input { 0 } else { n };
        ensure!(x.len() == inputs && (self.film || !self.step), Self::NAME, want, x);
        let (x0, w, b) = (x[0], x[n], x[n + 1]);
        let c: usize = x[..n].iter().map(|s| s.shape.last()).sum();
        let fits = x0.shape.len() >= 2 && g > 0 && c.is_multiple_of(g) && *w.shape == [c] && w == b;
        ensure!(fits && w.dtype == x0.dtype && DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        if self.film {
            let film = x[n + 2];
            let rows = self.step || [1, x0.shape[0]].contains(&film.shape.rows());
            let counter = !self.step || x[n + 3] == Spec::new(DType::I32, [4]);
            let fits = film.dtype == x0.dtype && film.shape.len() == 2 && film.shape.last() == 2 * c;
            ensure!(fits && rows && counter, Self::NAME, want, x);
        }
        if self.given != Given::Input {
            let stats =
                x[..n].iter().zip(&x[self.stats()..]).all(|(x, stats)| channel_stats(*x) == Some(*stats));
            let alike = x[n - 1] == Spec::new(x0.dtype, x0.shape.with_last(x[n - 1].shape.last()));
            ensure!(stats && alike && [Act::None, Act::Silu].contains(&self.act), Self::NAME, want, x);
        }
        Ok(vec![Spec::new(x0.dtype, x0.shape.with_last(c))])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |v, s, [w, b], [scale, shift]| {
            self.act.apply_f64(((v - s.mean) * s.rstd * w + b) * (1.0 + scale) + shift)
        })
    }

    /// What is summed: x, and the group's values into its mean, both amplified by rstd.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.each(x, |v, s, [w, b], [scale, shift]| {
            ((v.abs() + s.size) * s.rstd * w.abs() + b.abs()) * (1.0 + scale.abs()) + shift.abs()
        })
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let film = self.given.sources() + 2;
        let step = if self.step { checked_row(io.i32_at(film + 1, 0), io.x[film].shape.rows())? } else { 0 };
        if self.given != Given::Input {
            let stats = self.given_moments(io);
            self.with_moments(io, &stats, step);
            return Ok(());
        }
        let (x, c, batch) = (io.slice(0), io.x[0].shape.last(), io.x[0].shape[0]);
        cpu::math::group_stats(x, batch, c, self.groups, |stats| self.with_moments(io, stats, step));
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        match self.given {
            Given::Input => self.launch_whole(io),
            Given::Stats | Given::Halves => self.launch_given(io),
        }
    }

    fn variant(&self, x: &[Spec]) -> &'static str {
        let images = x[0].shape[0].max(1);
        if self.given == Given::Input { "" } else { variant(x[0].shape.rows() / images / SLAB) }
    }

    fn launches(&self, x: &[Spec]) -> Vec<LaunchPlan> {
        let n = self.given.sources();
        let (b, c) = (x[0].shape[0], x[..n].iter().map(|s| s.shape.last()).sum::<usize>());
        let (dtype, hw, bytes) =
            (x[0].dtype, x[0].shape.rows() / b.max(1), x[..n].iter().map(Spec::bytes).sum::<usize>());
        let time = |bytes: usize, grid: [usize; 3]| launch::streaming(bytes as f64, grid.iter().product());
        if self.given == Given::Input {
            let grid = [self.groups, b, 1];
            return vec![LaunchPlan::new(
                k::GROUP_NORM_FWD,
                dtype,
                "",
                grid,
                k::BLOCK,
                time(3 * bytes, grid),
            )];
        }
        let (slabs, count) = (hw / SLAB, slabs_kept(hw / SLAB));
        let (entry, mut all) = (b * c * 2 * size_of::<f32>(), vec![]);
        if count < slabs {
            let grid = [c.div_ceil(32), count, b];
            let time = time(entry * (slabs + count), grid);
            all.push(LaunchPlan::new(merge::GROUP_NORM_MERGE, DType::F32, "", grid, merge::BLOCK, time));
        }
        let strips = c.div_ceil(apply::STRIP.of(variant(slabs)));
        let grid = [strips, hw.div_ceil(rows_per_block(hw, b * strips)), b];
        // Measured on an H100, in strips of 32: 2.1 TB/s, read and written, and 3 µs for the statistics, which come first.
        let time =
            f64::max((2 * bytes) as f64 / 2.1e6 + 3.0, time(2 * bytes + entry * count * grid[1], grid));
        all.push(LaunchPlan::new(apply::GROUP_NORM_APPLY, dtype, variant(slabs), grid, apply::BLOCK, time));
        all
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let by_image = || g.shape(x[3]).rows() == g.shape(x[0])[0];
        if self.given != Given::Input || self.step || (self.film && !by_image()) {
            return Err(Error::NoGradient(Self::NAME));
        }
        let [Some(dy)] = dy else { return Ok(vec![None; x.len()]) };
        let &GroupNorm { groups, eps, act, film, .. } = self;
        let inputs = [&x[..3], &[*dy], &x[3..]].concat();
        Ok(g.push_all("grad", GroupNormGrad { groups, eps, act, film }, &inputs)?
            .into_iter()
            .map(Some)
            .collect())
    }

    fn scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        let b = y[0].shape[0].max(1);
        let slabs = y[0].shape.rows() / b / SLAB;
        if self.given == Given::Input || slabs_kept(slabs) == slabs {
            return 0;
        }
        b * slabs_kept(slabs) * y[0].shape.last() * 2 * size_of::<f32>()
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last()) + cpu::math::stats_bytes(y[0].shape.rows(), y[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let per_element = if self.given == Given::Input { 10 } else { 5 };
        Cost::streaming(per_element * y[0].shape.numel(), x, y)
    }

    /// Statistics of x, or of what x was concatenated from: then nothing needs to be concatenated for the norm.
    fn given_stats(&self, g: &Graph, x: &[Var]) -> Option<GivenStats> {
        if self.given != Given::Input || ![Act::None, Act::Silu].contains(&self.act) {
            return None;
        }
        let all = |of: &[Var]| of.iter().all(|&v| channel_stats(g.spec(v)).is_some());
        let form = |given, of: Vec<Var>| {
            let op = GroupNorm { given, ..self.clone() }.into();
            GivenStats { op, x: of.iter().chain(&x[1..]).copied().collect(), of }
        };
        let halves = g.maker(x[0]).filter(|node| matches!(node.op, Op::Concat(_)) && all(&node.x));
        match halves {
            Some(concat) => Some(form(Given::Halves, concat.x.clone())),
            None => all(&x[..1]).then(|| form(Given::Stats, vec![x[0]])),
        }
    }

    fn cases() -> Vec<Case> {
        cases::listed()
    }

    fn random(r: &mut Small) -> Case {
        cases::random(r)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Concat, GroupStats};
    use super::*;

    #[test]
    fn from_true_statistics_the_specification_is_the_same() {
        let halves =
            Case::new(Concat, [t([2, 8, 16, 24]).normal(3.0, 0.5), t([2, 8, 16, 16]).normal(-1.0, 2.0)]);
        let mut x = halves.inputs(DType::F32, 3);
        let wb = Case::new(Concat, [t([40]), t([40])]).inputs(DType::F32, 4);
        let whole = Concat.spec(&x).remove(0);
        let norm = GroupNorm::new(4, 1e-5, Act::Silu);
        let want = norm.spec(&[whole.clone(), wb[0].clone(), wb[1].clone()]).remove(0);
        let given = |given, x: Vec<Array>| {
            let stats: Vec<_> = x.iter().flat_map(|x| GroupStats.spec(std::slice::from_ref(x))).collect();
            let inputs = [x, wb.clone(), stats].concat();
            GroupNorm { given, ..norm.clone() }.spec(&inputs).remove(0)
        };
        for got in [given(Given::Stats, vec![whole]), given(Given::Halves, std::mem::take(&mut x))] {
            let off = got.zip(&want, |a, b| (a - b).abs()).data.into_iter().fold(0.0, f64::max);
            assert!(got.shape == want.shape && off < 1e-12, "{off}");
        }
    }
}
