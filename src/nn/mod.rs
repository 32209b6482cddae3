//! Layers over [`Graph`]: what the models are made of, with the names that checkpoints give their weights.
//!
//! Every layer takes the graph, its own name in the checkpoint and its input; the element type is the input's.

mod transformer;

pub use crate::ops::cast;
pub use transformer::{SpatialTransformer, self_attention, spatial_transformer};

use crate::error::Result;
use crate::graph::{Graph, Layout, Var};
use crate::ops::{Act, Add, Attention, Conv2d, Epi, GroupNorm, LayerNorm, Linear};

/// `at.name`, or `name` where `at` is empty.
pub fn join(at: &str, name: &str) -> String {
    if at.is_empty() { name.into() } else { format!("{at}.{name}") }
}

/// Convolution with bias: x (B,H,W,C) to (B,H',W',O), weights `at.weight`, `at.bias`.
///
/// # Errors
/// When x does not fit.
pub fn conv(g: &mut Graph, at: &str, x: Var, o: usize, kernel: usize, op: Conv2d) -> Result<Var> {
    conv_with(g, at, x, o, kernel, op, None)
}

/// A time embedding: rows, and with a counter (4) i32 the one of them that serves every image (see [`Epi`]).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Time {
    /// (B or 1,E), or with a counter (R,E).
    pub rows: Var,
    /// Whose first element is the row.
    pub counter: Option<Var>,
}

/// [`conv`], with a time embedding of O channels that is added to every pixel.
fn conv_with(
    g: &mut Graph,
    at: &str,
    x: Var,
    o: usize,
    kernel: usize,
    mut op: Conv2d,
    time: Option<Time>,
) -> Result<Var> {
    let (c, dtype) = (g.shape(x).last(), g.spec(x).dtype);
    let w = g.weight(&join(at, "weight"), Layout::Conv, dtype, [o, kernel, kernel, c])?;
    let b = g.weight(&join(at, "bias"), Layout::Same, dtype, [o])?;
    op.epi.bias = true;
    let counter = time.and_then(|t| t.counter);
    (op.epi.time, op.epi.step) = (time.is_some(), counter.is_some());
    let inputs: Vec<Var> = [x, w, b].into_iter().chain(time.map(|t| t.rows)).chain(counter).collect();
    g.push(at, op, &inputs)
}

/// A 3×3 convolution that keeps the size.
///
/// # Errors
/// When x does not fit.
pub fn conv3x3(g: &mut Graph, at: &str, x: Var, o: usize) -> Result<Var> {
    conv(g, at, x, o, 3, Conv2d::same(3))
}

/// A 1×1 convolution, or a linear layer over the last axis: x (…,C) to (…,O).
///
/// # Errors
/// When x does not fit.
pub fn linear(g: &mut Graph, at: &str, x: Var, o: usize, bias: bool, act: Act) -> Result<Var> {
    let (c, dtype) = (g.shape(x).last(), g.spec(x).dtype);
    let mut inputs = vec![x, g.weight(&join(at, "weight"), Layout::Linear, dtype, [o, c])?];
    if bias {
        inputs.push(g.weight(&join(at, "bias"), Layout::Same, dtype, [o])?);
    }
    g.push(at, Linear { epi: Epi { bias, act, ..Epi::default() }, ..Linear::default() }, &inputs)
}

/// Group normalisation with an activation.
///
/// # Errors
/// When the channels do not divide into the groups.
pub fn group_norm(g: &mut Graph, at: &str, x: Var, groups: usize, eps: f64, act: Act) -> Result<Var> {
    norm_with(g, at, x, groups, eps, act, None)
}

/// [`group_norm`], with a time embedding of 2·C channels that scales and shifts its result before the activation.
fn norm_with(
    g: &mut Graph,
    at: &str,
    x: Var,
    groups: usize,
    eps: f64,
    act: Act,
    film: Option<Time>,
) -> Result<Var> {
    let (c, dtype) = (g.shape(x).last(), g.spec(x).dtype);
    let w = g.weight(&join(at, "weight"), Layout::Same, dtype, [c])?;
    let b = g.weight(&join(at, "bias"), Layout::Same, dtype, [c])?;
    let counter = film.and_then(|t| t.counter);
    let op = GroupNorm {
        film: film.is_some(),
        step: counter.is_some(),
        ..GroupNorm::new(groups, eps as f32, act)
    };
    let inputs: Vec<Var> = [x, w, b].into_iter().chain(film.map(|t| t.rows)).chain(counter).collect();
    g.push(at, op, &inputs)
}

/// Layer normalisation over the last axis.
///
/// # Errors
/// None that a built graph can have.
pub fn layer_norm(g: &mut Graph, at: &str, x: Var, eps: f64) -> Result<Var> {
    let (c, dtype) = (g.shape(x).last(), g.spec(x).dtype);
    let w = g.weight(&join(at, "weight"), Layout::Same, dtype, [c])?;
    let b = g.weight(&join(at, "bias"), Layout::Same, dtype, [c])?;
    g.push(at, LayerNorm { eps: eps as f32 }, &[x, w, b])
}

/// a + b.
///
/// # Errors
/// When the shapes differ.
pub fn add(g: &mut Graph, at: &str, a: Var, b: Var) -> Result<Var> {
    g.push(at, Add, &[a, b])
}

/// softmax(q kᵀ / √D) v over `heads`.
///
/// # Errors
/// When the widths do not fit the heads.
pub fn attention(g: &mut Graph, at: &str, qkv: [Var; 3], heads: usize, causal: bool) -> Result<Var> {
    g.push(at, Attention { heads, causal, joined: false }, &qkv)
}

/// How the residual blocks of one model are made.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ResBlock {
    /// Groups of the norms.
    pub groups: usize,
    /// Epsilon of the norms: 1e-5 in the UNet, 1e-6 in the autoencoders.
    pub eps: f64,
    /// The time scales and shifts what the second norm gives, instead of being added before it.
    pub film: bool,
}

impl ResBlock {
    /// Norm, SiLU, 3×3, plus time; norm, SiLU, 3×3; plus x, through a 1×1 where the channels change.
    /// x (B,H,W,C) to (B,H,W,O); time of E channels, with SiLU applied already. diffusers `ResnetBlock2D`, with `film` as by
    /// `time_embedding_norm="scale_shift"`.
    ///
    /// # Errors
    /// When x does not fit.
    pub fn build(&self, g: &mut Graph, at: &str, x: Var, o: usize, time: Option<Time>) -> Result<Var> {
        let at = |name: &str| join(at, name);
        let h = group_norm(g, &at("norm1"), x, self.groups, self.eps, Act::Silu)?;
        let time = match time {
            Some(t) => {
                let width = if self.film { 2 * o } else { o };
                Some(Time { rows: linear(g, &at("time_emb_proj"), t.rows, width, true, Act::None)?, ..t })
            }
            None => None,
        };
        let (added, film) = if self.film { (None, time) } else { (time, None) };
        let h = conv_with(g, &at("conv1"), h, o, 3, Conv2d::same(3), added)?;
        let h = norm_with(g, &at("norm2"), h, self.groups, self.eps, Act::Silu, film)?;
        let shortcut =
            if g.shape(x).last() == o { x } else { linear(g, &at("conv_shortcut"), x, o, true, Act::None)? };
        let h = conv3x3(g, &at("conv2"), h, o)?;
        add(g, &at("residual"), shortcut, h)
    }
}

/// Nearest ×2, then 3×3: `at.conv`.
///
/// # Errors
/// When x does not fit.
pub fn upsample(g: &mut Graph, at: &str, x: Var) -> Result<Var> {
    let c = g.shape(x).last();
    conv(g, &join(at, "conv"), x, c, 3, Conv2d { upsample: true, ..Conv2d::same(3) })
}

/// 3×3 with stride 2: `at.conv`. The UNet pads all sides by one, the autoencoders only bottom and right.
///
/// # Errors
/// When x does not fit.
pub fn downsample(g: &mut Graph, at: &str, x: Var, pad: [usize; 4]) -> Result<Var> {
    let c = g.shape(x).last();
    conv(g, &join(at, "conv"), x, c, 3, Conv2d { stride: 2, pad, ..Conv2d::same(3) })
}
