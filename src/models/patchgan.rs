//! The discriminator of patches that first stages are trained against: Isola et al. 2017, as in the CompVis code
//! (`NLayerDiscriminator`, names `main.0.weight`, …).

use super::{MAX_LAYERS, Model};
use crate::error::Result;
use crate::graph::{Graph, Layout, Var};
use crate::io::Config;
use crate::nn::join;
use crate::ops::{Act, ActNorm, Activation, BatchNorm, Conv2d, Epi, Running};
use crate::tensor::DType;

/// What stands between two convolutions of a discriminator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PatchNorm {
    /// Batch norm: `weight`, `bias`, running statistics. The convolution before it has no bias.
    Batch,
    /// Shifts `loc` and scales `scale` by channel that are trained (`use_actnorm`). They start as those that give the channels of
    /// the first batch mean 0 and deviation 1: see [`NLayerDiscriminator::observe`]. The convolution before it has a bias.
    Act,
}

/// Convolutions of 4×4 with norms and leaky ReLU, from pictures to one logit for each of some overlapping patches.
#[derive(Clone, PartialEq, Debug)]
pub struct NLayerDiscriminator {
    /// Channels of pictures.
    pub in_channels: usize,
    /// Channels of the first layer; each layer doubles them, up to eight times as many.
    pub width: usize,
    /// Layers of stride 2: 3 see patches of 70².
    pub layers: usize,
    /// Behind each convolution but the first and the last.
    pub norm: PatchNorm,
}

/// What a norm saw of a batch.
#[derive(Clone, PartialEq, Debug)]
pub struct Statistics {
    /// The norm.
    pub name: String,
    /// Means (C) f32.
    pub mean: Var,
    /// Biased variances (C) f32.
    pub var: Var,
    /// Rows that they are of.
    pub rows: usize,
}

const EPS: f32 = 1e-5;
const MOMENTUM: f32 = 0.1;

impl Default for NLayerDiscriminator {
    /// Three layers, 64 channels, batch norms: that of all first stages of Rombach et al. 2022.
    fn default() -> NLayerDiscriminator {
        NLayerDiscriminator { in_channels: 3, width: 64, layers: 3, norm: PatchNorm::Batch }
    }
}

impl Model for NLayerDiscriminator {
    const CLASSES: &'static [&'static str] = &["NLayerDiscriminator"];

    fn from_config(c: &Config) -> Result<NLayerDiscriminator> {
        c.only(&["input_nc", "ndf", "n_layers", "use_actnorm"])?;
        let model = NLayerDiscriminator {
            in_channels: c.usize_or("input_nc", 3)?,
            width: c.usize_or("ndf", 64)?,
            layers: c.usize_or("n_layers", 3)?,
            norm: if c.bool_or("use_actnorm", false)? { PatchNorm::Act } else { PatchNorm::Batch },
        };
        if !(1..=MAX_LAYERS).contains(&model.layers) {
            return Err(c.error("n_layers", format!("1 to {MAX_LAYERS} layers")));
        }
        if !(1..=1 << 16).contains(&model.width) {
            return Err(c.error("ndf", "1 to 65536 channels"));
        }
        Ok(model)
    }

    fn inventory(&self, dtype: DType) -> Result<Vec<Graph>> {
        let mut g = Graph::new();
        // The smallest picture: a patch of one logit.
        let side = 3 << self.layers;
        let x = g.input("x", dtype, [1, side, side, self.in_channels]);
        self.evaluate(&mut g, "", x)?;
        Ok(vec![g])
    }
}

impl NLayerDiscriminator {
    /// x (B,H,W,C) in −1…1 to logits (B,h,w,1), with the statistics of this batch that batch norms have seen. `at` stands before
    /// the names.
    ///
    /// # Errors
    /// When x is too small.
    pub fn train(&self, g: &mut Graph, at: &str, x: Var) -> Result<(Var, Vec<Statistics>)> {
        let mut seen = vec![];
        let logits = self.build(g, at, x, |g, name, x, w, bias| {
            let y = g.push_all(name, BatchNorm { eps: EPS, given: false }, &[x, w, bias])?;
            let rows = g.shape(x).rows();
            seen.push(Statistics { name: name.into(), mean: y[1], var: y[2], rows });
            Ok(y[0])
        })?;
        Ok((logits, seen))
    }

    /// The same with the running statistics of the checkpoint.
    ///
    /// # Errors
    /// As [`NLayerDiscriminator::train`].
    pub fn evaluate(&self, g: &mut Graph, at: &str, x: Var) -> Result<Var> {
        self.build(g, at, x, |g, name, x, w, bias| {
            let c = g.shape(x).last();
            let [mean, var] = ["running_mean", "running_var"]
                .map(|kind| g.weight(&join(name, kind), Layout::Same, DType::F32, [c]));
            g.push(name, BatchNorm { eps: EPS, given: true }, &[x, w, bias, mean?, var?])
        })
    }

    /// What the norms of [`PatchNorm::Act`] see of x (B,H,W,C), in order. A program that is run once for each, and each time is
    /// given what the next of them starts with, `loc` = −mean and `scale` = 1 / (deviation + 1e-6), finds them as CompVis code does.
    ///
    /// # Errors
    /// As [`NLayerDiscriminator::train`].
    pub fn observe(&self, g: &mut Graph, at: &str, x: Var) -> Result<Vec<Statistics>> {
        let mut seen = vec![];
        self.layers(g, at, x, |g, name, x| {
            let (c, dtype, rows) = (g.shape(x).last(), g.spec(x).dtype, g.shape(x).rows());
            // Of a batch norm, the statistics alone.
            let [w, bias] =
                ["scale", "loc"].map(|kind| g.weight(&join(name, kind), Layout::Same, dtype, [c]));
            let y = g.push_all(&join(name, "seen"), BatchNorm { eps: EPS, given: false }, &[x, w?, bias?])?;
            seen.push(Statistics { name: name.into(), mean: y[1], var: y[2], rows });
            act_norm(g, name, x)
        })?;
        Ok(seen)
    }

    /// Moves the running statistics, states `….running_mean` and `….running_var`, towards those of batches, in that order.
    ///
    /// # Errors
    /// When the batches are of discriminators of other widths.
    pub fn follow(g: &mut Graph, batches: &[Vec<Statistics>]) -> Result<()> {
        let Some(first) = batches.first() else { return Ok(()) };
        for (i, norm) in first.iter().enumerate() {
            for var in [false, true] {
                let name = join(&norm.name, if var { "running_var" } else { "running_mean" });
                let state = g.state(&name, DType::F32, g.shape(norm.mean));
                let mut new = state;
                for seen in batches.iter().filter_map(|b| b.get(i)) {
                    let n = seen.rows as f32;
                    let (value, factor) = if var { (seen.var, n / (n - 1.0)) } else { (seen.mean, 1.0) };
                    new = g.push(&name, Running { momentum: MOMENTUM, factor }, &[new, value])?;
                }
                g.update(state, new);
            }
        }
        Ok(())
    }

    /// `batch` is what a batch norm does with x, its scales and shifts.
    fn build(
        &self,
        g: &mut Graph,
        at: &str,
        x: Var,
        mut batch: impl FnMut(&mut Graph, &str, Var, Var, Var) -> Result<Var>,
    ) -> Result<Var> {
        self.layers(g, at, x, |g, name, x| {
            if self.norm == PatchNorm::Act {
                return act_norm(g, name, x);
            }
            let (c, dtype) = (g.shape(x).last(), g.spec(x).dtype);
            let [w, bias] =
                ["weight", "bias"].map(|kind| g.weight(&join(name, kind), Layout::Same, dtype, [c]));
            batch(g, name, x, w?, bias?)
        })
    }

    fn layers(
        &self,
        g: &mut Graph,
        at: &str,
        x: Var,
        mut norm: impl FnMut(&mut Graph, &str, Var) -> Result<Var>,
    ) -> Result<Var> {
        let main = |i: usize| join(at, &format!("main.{i}"));
        let h = conv(g, &main(0), x, (self.width, 2), true)?;
        let mut h = g.push(&main(1), Activation(Act::LeakyRelu), &[h])?;
        for n in 1..=self.layers {
            let channels = self.width * (1 << n.min(3));
            let stride = if n < self.layers { 2 } else { 1 };
            h = conv(g, &main(3 * n - 1), h, (channels, stride), self.norm == PatchNorm::Act)?;
            h = norm(g, &main(3 * n), h)?;
            h = g.push(&main(3 * n + 1), Activation(Act::LeakyRelu), &[h])?;
        }
        conv(g, &main(3 * self.layers + 2), h, (1, 1), true)
    }
}

fn act_norm(g: &mut Graph, name: &str, x: Var) -> Result<Var> {
    let (c, dtype) = (g.shape(x).last(), g.spec(x).dtype);
    let [loc, scale] = ["loc", "scale"].map(|kind| g.weight(&join(name, kind), Layout::Same, dtype, [c]));
    g.push(name, ActNorm, &[x, loc?, scale?])
}

/// 4×4, one zero on each side.
fn conv(g: &mut Graph, at: &str, x: Var, (o, stride): (usize, usize), bias: bool) -> Result<Var> {
    let (c, dtype) = (g.shape(x).last(), g.spec(x).dtype);
    let mut inputs = vec![x, g.weight(&join(at, "weight"), Layout::Conv, dtype, [o, 4, 4, c])?];
    if bias {
        inputs.push(g.weight(&join(at, "bias"), Layout::Same, dtype, [o])?);
    }
    let op = Conv2d { stride, pad: [1; 4], epi: Epi { bias, ..Epi::default() }, ..Conv2d::same(4) };
    g.push(at, op, &inputs)
}
