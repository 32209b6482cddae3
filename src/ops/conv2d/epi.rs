//! What follows a product before it is stored.

use super::super::activation::Act;
use super::super::prelude::*;

/// Rows that one entry of a product's statistics covers.
pub const SLAB: usize = 64;

/// What is added to a product before it is stored; absent parts take no input.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Epi {
    /// Input bias (O).
    pub bias: bool,
    /// Input time (B,O) or (1,O): added to every pixel of an image.
    pub time: bool,
    /// Input counter (4) i32: time has a row for each evaluation, (R,O), and row counter\[0\] serves every image.
    pub step: bool,
    /// Applied to the sum.
    pub act: Act,
    /// Input residual of y's shape, added last.
    pub residual: bool,
    /// w and bias have 2·O rows, values and then gates, and y = value · GELU(gate). Takes no time, activation, residual.
    pub glu: bool,
    /// A second output, f32 (rows / 64,O,2): mean and sum of squared deviations of 64 stored rows of y, per channel
    /// (behind an upsampling in phases: of 64 pixels of one phase).
    pub stats: bool,
}

/// Which input holds what; 0 stands for none, since input 0 is always x.
#[derive(Clone, Copy, Default)]
pub(super) struct Inputs {
    pub bias: usize,
    pub time: usize,
    pub step: usize,
    pub residual: usize,
    /// The first one after those.
    pub end: usize,
}

impl Epi {
    pub(super) fn inputs(&self) -> Inputs {
        let mut next = 2;
        let mut take = |there: bool| {
            next += there as usize;
            if there { next - 1 } else { 0 }
        };
        let (bias, time, step) = (take(self.bias), take(self.time), take(self.time && self.step));
        Inputs { bias, time, step, residual: take(self.residual), end: next }
    }

    /// Channels of y, from rows of w.
    pub(super) fn columns(&self, rows: usize) -> usize {
        if self.glu { rows / 2 } else { rows }
    }

    /// Whether it is more than the plain kernel and the CPU's products do in one pass.
    pub(super) fn fused(&self) -> bool {
        self.glu || self.stats
    }

    /// Whether inputs and the first output fit each other. `rows` are those of w.
    pub(super) fn fits(&self, x: &[Spec], rows: usize, y: Spec) -> bool {
        let (at, o) = (self.inputs(), y.shape.last());
        let time = |s: Spec| s.shape.last() == o && (self.step || [1, y.shape[0]].contains(&s.shape.rows()));
        let counter = Spec::new(DType::I32, [4]);
        // Slabs of rows belong to one image each.
        let image = y.shape.rows() / if y.shape.len() == 4 { y.shape[0].max(1) } else { 1 };
        x.iter().enumerate().all(|(i, s)| s.dtype == x[0].dtype || i == at.step)
            && (at.step == 0 || x[at.step] == counter)
            && (self.time || !self.step)
            && (!self.bias || *x[at.bias].shape == [rows])
            && (!self.time || (time(x[at.time]) && y.shape.len() == 4))
            && (!self.residual || x[at.residual] == y)
            && (!self.glu || (!self.time && !self.residual && self.act == Act::None && rows % 16 == 0))
            && (!self.stats || (image % SLAB == 0 && !self.glu && o % 4 == 0))
            && (!self.fused() || x[0].dtype != DType::F32)
    }

    /// The outputs, from the first.
    pub(super) fn outputs(&self, y: Spec) -> Vec<Spec> {
        let stats = Spec::new(DType::F32, [y.shape.rows() / SLAB, y.shape.last(), 2]);
        [y].into_iter().chain(self.stats.then_some(stats)).collect()
    }

    /// The row of `time` for an image.
    fn time_row(&self, x: &[Array], at: Inputs, image: usize) -> usize {
        match x[at.time].shape.rows() {
            _ if self.step => x[at.step].data[0] as usize,
            1 => 0,
            _ => image,
        }
    }

    /// The rest of the specification, from the sums.
    pub(super) fn finish(&self, x: &[Array], mut y: Array) -> Vec<Array> {
        let (at, o) = (self.inputs(), y.shape.last());
        let per_image = y.data.len() / y.shape[0].max(1);
        for (i, v) in y.data.iter_mut().enumerate() {
            if self.bias {
                *v += x[at.bias].data[i % o];
            }
            if self.time {
                *v += x[at.time].data[self.time_row(x, at, i / per_image) * o + i % o];
            }
            *v = self.act.apply_f64(*v);
            if self.residual {
                *v += x[at.residual].data[i];
            }
        }
        if self.glu {
            let gate = |row: &[f64], i| row[i] * Act::Gelu.apply_f64(row[o / 2 + i]);
            let data = y
                .data
                .chunks(o)
                .flat_map(|row| (0..o / 2).map(|i| gate(row, i)).collect::<Vec<_>>())
                .collect();
            y = Array { shape: y.shape.with_last(o / 2), data };
        }
        let stats = self.stats.then(|| moments(&y, |v, mean| v - mean));
        [y].into_iter().chain(stats).collect()
    }

    /// The sizes of the outputs from those of the operation on absolute values: a sum of squared deviations is off by what
    /// its summands are off, each a share of its own size.
    pub(super) fn magnitude(&self, mut y: Vec<Array>) -> Vec<Array> {
        if self.stats {
            y[1] = moments(&y[0], |v, _| v);
        }
        y
    }
}

/// Per slab and channel: the mean, and Σ f(v, mean)².
pub(super) fn moments(y: &Array, f: impl Fn(f64, f64) -> f64) -> Array {
    let c = y.shape.last();
    let mut stats = Array::zeros([y.shape.rows() / SLAB, c, 2]);
    for (slab, stats) in y.data.chunks(SLAB * c).zip(stats.data.chunks_mut(2 * c)) {
        for i in 0..c {
            let column = || slab[i..].iter().step_by(c);
            let mean = column().sum::<f64>() / SLAB as f64;
            stats[2 * i] = mean;
            stats[2 * i + 1] = column().map(|&v| f(v, mean) * f(v, mean)).sum();
        }
    }
    stats
}
