//! The two ends of a model evaluation: state to model input, and model output to next state.
//!
//! A sampler is a table with one row per evaluation (see [`TABLE`]); a counter on the device picks the row, so the same
//! graph serves every evaluation. With X = slots\[x_slot\]:
//!
//! * [`Prepare`]: x = scale_in · X, once per half of the batch.
//! * [`Advance`]: m = u + guidance · (c − u); d = clamp(dx · X + dm · m); next = Σ c_s · slots_s + cm · m + cd · d +
//!   cz · noise; then slots\[keep_m\] = m, slots\[keep_d\] = d, slots\[next_slot\] = next. A slot whose c_s is 0 is not read.
//!
//! Classifier-free guidance: Ho and Salimans 2022. Kernel: `kernels/sampler.cu`.
use super::case::SINGLE;
use super::prelude::*;
use crate::kernels::sampler as k;

/// Columns of the table, f32: timestep, scale_in, dx, dm, clip (0: none), cm, cd, cz, c\[8\], x_slot, next_slot, keep_m,
/// keep_d, noise (−1: none for each), guidance, and for [`super::Blend`] alpha and sigma of the next evaluation.
pub const TABLE: usize = 24;

/// slots (S,B,H,W,C) f32, table (R,24) f32, counter (4) i32 to x (copies·B,H,W,C), counter.
#[derive(Clone, PartialEq, Debug)]
pub struct Prepare {
    /// 2 with guidance (unconditional half first), else 1.
    pub copies: usize,
    /// Type of the model's input.
    pub dtype: DType,
}

/// slots, model output (copies·B,H,W,C), table, counter, noise (Z,B,H,W,C) f32 to slots, counter, m (B,H,W,C) f32.
///
/// The counter holds the current row, the next row, and 1 + the first row whose m was not finite, or 0. After such a row
/// slots and counter stay as it left them, so that whoever looks evaluations later can repeat it: a row never writes a slot
/// that it reads.
#[derive(Clone, PartialEq, Debug)]
pub struct Advance {
    /// 2 with guidance (unconditional half first), else 1.
    pub copies: usize,
}

/// A row of the table.
pub(super) struct Row<'a, V>(&'a [V]);

impl<'a, V: Copy + Into<f64>> Row<'a, V> {
    pub(super) fn at(table: &'a [V], k: usize) -> Row<'a, V> {
        Row(&table[k * TABLE..][..TABLE])
    }
    pub(super) fn f(&self, i: usize) -> f64 {
        self.0[i].into()
    }
    pub(super) fn slot(&self, i: usize) -> Option<usize> {
        let s = self.f(i);
        (s >= 0.0).then_some(s as usize)
    }
}

const SCALE_IN: usize = 1;
const DX: usize = 2;
const DM: usize = 3;
const CLIP: usize = 4;
const CM: usize = 5;
const CD: usize = 6;
const CZ: usize = 7;
const C: usize = 8;
const X_SLOT: usize = 16;
pub(super) const NEXT: usize = 17;
const KEEP_M: usize = 18;
const KEEP_D: usize = 19;
const NOISE: usize = 20;
const GUIDANCE: usize = 21;
pub(super) const ALPHA: usize = 22;
pub(super) const SIGMA: usize = 23;

pub(super) fn is_table(s: Spec) -> bool {
    s.dtype == DType::F32 && s.shape.len() == 2 && s.shape[1] == TABLE
}

impl Operation for Prepare {
    const NAME: &'static str = "prepare";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "slots (S,B,H,W,C) f32, table (R,24) f32, counter (4) i32";
        let [slots, table, counter] = args(Self::NAME, want, x)?;
        let fits = slots.dtype == DType::F32
            && slots.shape.len() == 5
            && is_table(table)
            && counter == Spec::new(DType::I32, [4])
            && DType::FLOATS.contains(&self.dtype)
            && [1, 2].contains(&self.copies);
        ensure!(fits, Self::NAME, want, x);
        let s = slots.shape;
        let model = Spec::new(self.dtype, [self.copies * s[1], s[2], s[3], s[4]]);
        Ok(vec![model, counter])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let k = x[2].data[1];
        let row = Row::at(&x[1].data, k as usize);
        let n = x[0].data.len() / x[0].shape[0];
        let from = &x[0].data[row.slot(X_SLOT).unwrap_or(0) * n..][..n];
        let mut shape = Shape::new(&x[0].shape[1..]).to_vec();
        shape[0] *= self.copies;
        let data = (0..self.copies).flat_map(|_| from.iter().map(|v| v * row.f(SCALE_IN))).collect();
        let mut counter = x[2].clone();
        counter.data[0] = k;
        vec![Array { shape: Shape::new(&shape), data }, counter]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (slots, table) = (io.f32(0), io.f32(1));
        let k = checked_row(io.i32_at(2, 1), io.x[1].shape[0])?;
        let row = Row::at(&table, k);
        let n = slots.len() / io.x[0].shape[0];
        let from = &slots[row.slot(X_SLOT).unwrap_or(0) * n..][..n];
        let scale = row.f(SCALE_IN) as f32;
        let width = io.y[0].shape.last();
        io.rows(0, width, |first, y| {
            let at = |i: usize| (first * width + i) % n;
            y.iter_mut().enumerate().for_each(|(i, y)| *y = from[at(i)] * scale);
        });
        io.i32_mut(1)[0] = k as i32;
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let s = io.x_spec(0).shape;
        let n = s.numel() / s[0];
        let p = k::PrepareFwd {
            x: io.y(0),
            slots: io.x(0),
            table: io.x(1),
            counter: io.y(1),
            n: n as i64,
            copies: io.int(self.copies)?,
        };
        io.launch(k::PREPARE_FWD, self.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, _x: &[Spec], y: &[Spec]) -> Cost {
        Cost { flops: y[0].shape.numel() as f64, bytes: (y[0].bytes() + 4 * y[0].shape.numel()) as f64 }
    }

    fn updates(&self) -> &'static [(usize, usize)] {
        &[(1, 2)]
    }

    fn cases() -> Vec<Case> {
        let mut all = Vec::new();
        for (dtype, only) in SINGLE {
            for (copies, size, row) in [(2, [3, 1, 2, 2, 4], 0), (1, [2, 3, 5, 3, 3], 2), (2, [1, 2, 8, 8, 4], 1)] {
                let args = [f32s(size), table(3, size[0]), f32s([4]).values(vec![0.0, row as f64, 0.0, 0.0])];
                all.push(Case::new(Prepare { copies, dtype }, counter(args)).only(only));
            }
        }
        all
    }

    fn random(r: &mut Small) -> Case {
        let (dtype, only) = SINGLE[r.below(3)];
        let size = [r.below(4) + 1, r.below(3) + 1, r.below(9) + 1, r.below(9) + 1, r.below(5) + 1];
        let rows = r.below(4) + 1;
        let row = vec![0.0, r.below(rows) as f64, 0.0, 0.0];
        let args = [f32s(size), table(rows, size[0]), f32s([4]).values(row)];
        Case::new(Prepare { copies: r.below(2) + 1, dtype }, counter(args)).only(only)
    }
}

impl Operation for Advance {
    const NAME: &'static str = "advance";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = format!(
            "slots (S,B,H,W,C) f32, model output ({}B,H,W,C), table (R,24) f32, counter (4) i32, noise (Z,B,H,W,C) f32, Z > 0",
            self.copies
        );
        let [slots, model, table, counter, noise] = args(Self::NAME, &want, x)?;
        let fits = slots.dtype == DType::F32
            && slots.shape.len() == 5
            && model.shape.len() == 4
            && is_table(table)
            && counter == Spec::new(DType::I32, [4])
            && noise.dtype == DType::F32
            && noise.shape.len() == 5
            && noise.shape[0] > 0
            && noise.shape[1..] == slots.shape[1..]
            && DType::FLOATS.contains(&model.dtype)
            && [1, 2].contains(&self.copies)
            && model.shape[0] == self.copies * slots.shape[1]
            && model.shape[1..] == slots.shape[2..];
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![slots, counter, Spec::new(DType::F32, &slots.shape[1..])])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        self.run(x, |u, c, g| u + g * (c - u), |v| v)
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let mut x = x.to_vec();
        for i in [0, 1, 4] {
            x[i] = x[i].map(f64::abs);
        }
        // Coefficients by size; indices and the counter as they are.
        for (i, v) in x[2].data.iter_mut().enumerate() {
            if (DX..=DM).contains(&(i % TABLE)) || (CM..X_SLOT).contains(&(i % TABLE)) {
                *v = v.abs();
            }
        }
        let mut y = self.run(&x, |u, c, g| u + g.abs() * (c + u), |v| v);
        y[1] = y[1].map(|_| 0.0);
        y
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (model, table, noise) = (io.slice(1), io.f32(2), io.f32(4));
        let k = checked_row(io.i32_at(3, 0), io.x[2].shape[0])?;
        let row = Row::at(&table, k);
        let count = io.x[0].shape[0];
        let n = io.x[0].shape.numel() / count;
        let stopped = io.i32_at(3, 2) != 0;
        let coefficient = |i| row.f(i) as f32;
        let (g, clip) = (coefficient(GUIDANCE), coefficient(CLIP));
        let bad = cpu::with_scratch(4 * n, |buffer| {
            let (guided, buffer) = buffer.split_at_mut(n);
            let (conditional, buffer) = buffer.split_at_mut(n);
            let (clean, next) = buffer.split_at_mut(n);
            model.read(0, guided);
            if self.copies == 2 {
                model.read(n, conditional);
                guided.iter_mut().zip(conditional).for_each(|(u, c)| *u = g.mul_add(*c - *u, *u));
            }
            io.write(2, |y| y.copy_from_slice(guided));
            if stopped {
                return false;
            }
            // The slots' new value is in their own memory.
            io.write(0, |slots| {
                let from = row.slot(X_SLOT).unwrap_or(0) * n;
                for i in 0..n {
                    let m = guided[i];
                    let mut d = coefficient(DX) * slots[from + i] + coefficient(DM) * m;
                    if clip > 0.0 {
                        d = d.clamp(-clip, clip);
                    }
                    let mut sum = coefficient(CM) * m + coefficient(CD) * d;
                    for s in (0..count.min(8)).filter(|&s| coefficient(C + s) != 0.0) {
                        sum += coefficient(C + s) * slots[s * n + i];
                    }
                    if let Some(z) = row.slot(NOISE) {
                        sum += coefficient(CZ) * noise[z * n + i];
                    }
                    (next[i], clean[i]) = (sum, d);
                }
                for (slot, value) in [(KEEP_M, &*guided), (KEEP_D, clean), (NEXT, next)] {
                    if let Some(s) = row.slot(slot) {
                        slots[s * n..][..n].copy_from_slice(value);
                    }
                }
            });
            guided.iter().any(|v| !v.is_finite())
        });
        if !stopped {
            let counter = io.i32_mut(1);
            counter[1] = k as i32 + 1;
            counter[2] = if bad { k as i32 + 1 } else { 0 };
        }
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let s = io.x_spec(0).shape;
        let n = s.numel() / s[0];
        let p = k::AdvanceFwd {
            slots: io.y(0),
            counter: io.y(1),
            guided: io.y(2),
            model: io.x(1),
            table: io.x(2),
            noise: io.x(4),
            n: n as i64,
            copies: io.int(self.copies)?,
            count: io.int(s[0].min(8))?,
        };
        io.launch(k::ADVANCE_FWD, io.x_spec(1).dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let n = y[2].shape.numel();
        Cost { flops: (12 * n) as f64, bytes: (x[1].bytes() + 16 * n) as f64 }
    }

    fn updates(&self) -> &'static [(usize, usize)] {
        &[(0, 0), (1, 3)]
    }

    fn cases() -> Vec<Case> {
        [(2, [3, 1, 2, 2, 4], 0), (1, [4, 3, 5, 3, 3], 2), (2, [8, 2, 8, 8, 4], 1), (1, [2, 1, 1, 1, 1], 0)]
            .into_iter()
            .flat_map(|(copies, size, row)| {
                // The last of each: an earlier row was not finite, if there is one.
                [(0.0, 0), (0.5, 0), (0.0, row)].map(|(clip, bad)| advance_case(copies, size, 3, [row, bad], clip))
            })
            .collect()
    }

    fn random(r: &mut Small) -> Case {
        let size = [r.below(7) + 2, r.below(3) + 1, r.below(9) + 1, r.below(9) + 1, r.below(5) + 1];
        let rows = r.below(4) + 1;
        let clip = [0.0, 0.7][r.below(2)];
        advance_case(r.below(2) + 1, size, rows, [r.below(rows), 0], clip)
    }
}

impl Advance {
    fn run(&self, x: &[Array], guide: impl Fn(f64, f64, f64) -> f64, store: impl Fn(f64) -> f64) -> Vec<Array> {
        let k = x[3].data[0];
        let row = Row::at(&x[2].data, k as usize);
        let n = x[0].data.len() / x[0].shape[0];
        let (mut slots, mut counter) = (x[0].clone(), x[3].clone());
        let mut guided = Array::zeros(&x[0].shape[1..]);
        for i in 0..n {
            let (u, c) = (x[1].data[i], x[1].data[(self.copies - 1) * n + i]);
            let m = if self.copies == 2 { guide(u, c, row.f(GUIDANCE)) } else { u };
            let old = |s: usize| x[0].data[s * n + i];
            let mut d = row.f(DX) * old(row.slot(X_SLOT).unwrap_or(0)) + row.f(DM) * m;
            if row.f(CLIP) > 0.0 {
                d = d.clamp(-row.f(CLIP), row.f(CLIP));
            }
            let mut next = row.f(CM) * m + row.f(CD) * d;
            next += (0..x[0].shape[0].min(8)).map(|s| row.f(C + s) * old(s)).sum::<f64>();
            next += row.slot(NOISE).map_or(0.0, |z| row.f(CZ) * x[4].data[z * n + i]);
            for (slot, value) in [(KEEP_M, m), (KEEP_D, d), (NEXT, next)] {
                if let Some(s) = row.slot(slot) {
                    slots.data[s * n + i] = store(value);
                }
            }
            guided.data[i] = m;
        }
        if x[3].data[2] != 0.0 {
            return vec![x[0].clone(), counter, guided];
        }
        counter.data[1] = k + 1.0;
        vec![slots, counter, guided]
    }
}

pub(super) fn checked_row(k: i32, rows: usize) -> Result<usize> {
    usize::try_from(k).ok().filter(|&k| k < rows).ok_or_else(|| {
        Error::invalid(format!("sampler: evaluation {k} of a table with {rows} rows; write the counter before a run"))
    })
}

/// A table with sensible numbers: slots in range, a row never writes what it reads.
pub(super) fn table(rows: usize, slots: usize) -> super::Arg {
    let mut v = Vec::new();
    for r in 0..rows {
        let f = |i: usize| 0.3 + 0.1 * ((r * 7 + i * 3) % 11) as f64;
        let mut row = vec![f(0) * 900.0, f(1), f(2), -f(3), 0.0, f(5), -f(6), f(7)];
        row.extend((0..8).map(|s| if s + 1 < slots && s % 3 != 1 { f(8 + s) } else { 0.0 }));
        row.extend([0.0, slots as f64 - 1.0, -1.0, -1.0, (r % 2) as f64, 7.5, f(1), f(2)]);
        v.extend(row.into_iter().map(|v| v as f32 as f64));
    }
    f32s([rows, TABLE]).values(v)
}

fn counter(mut args: [super::Arg; 3]) -> Vec<super::Arg> {
    args[2].ty = super::Ty::I32;
    args.to_vec()
}

fn advance_case(copies: usize, size: [usize; 5], rows: usize, [row, bad]: [usize; 2], clip: f64) -> Case {
    let [_, b, h, w, c] = size;
    let mut table = table(rows, size[0]);
    if let super::Fill::Values(v) = &mut table.fill {
        v.chunks_mut(TABLE).for_each(|r| r[CLIP] = clip);
    }
    let counter = super::Arg { ty: super::Ty::I32, ..f32s([4]).values(vec![row as f64, 0.0, bad as f64, 0.0]) };
    Case::new(Advance { copies }, [f32s(size), t([copies * b, h, w, c]), table, counter, f32s([2, b, h, w, c])])
}
