//! Attention blocks: the spatial transformer of the UNet and the single-head attention of the autoencoders.

use super::{add, attention, group_norm, join, layer_norm, linear};
use crate::error::Result;
use crate::graph::{Graph, Var};
use crate::ops::{Act, Geglu};

/// How the transformers of one level are made.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SpatialTransformer {
    /// Heads.
    pub heads: usize,
    /// Blocks, one after the other.
    pub depth: usize,
    /// Groups of the norm in front.
    pub groups: usize,
}

/// Group norm (eps 1e-6), projection in, blocks of self-attention, cross-attention and gated feed-forward, projection
/// out, plus x. x (B,H,W,C), context (B,S,E). The projections are stored as 1×1 convolutions (SD 1.x) or as linear
/// layers (SD 2.x); the sums are the same. Rombach et al. 2022, appendix E.2; diffusers `Transformer2DModel`.
///
/// # Errors
/// When x or context do not fit.
pub fn spatial_transformer(
    g: &mut Graph,
    at: &str,
    x: Var,
    context: Var,
    how: SpatialTransformer,
) -> Result<Var> {
    let at = |name: &str| join(at, name);
    let c = g.shape(x).last();
    let h = group_norm(g, &at("norm"), x, how.groups, 1e-6, Act::None)?;
    let mut h = linear(g, &at("proj_in"), h, c, true, Act::None)?;
    for i in 0..how.depth {
        h = block(g, &at(&format!("transformer_blocks.{i}")), h, context, how.heads)?;
    }
    let h = linear(g, &at("proj_out"), h, c, true, Act::None)?;
    add(g, &at("residual"), x, h)
}

/// diffusers `BasicTransformerBlock`.
fn block(g: &mut Graph, at: &str, x: Var, context: Var, heads: usize) -> Result<Var> {
    let at = |name: &str| join(at, name);
    let c = g.shape(x).last();
    let n = layer_norm(g, &at("norm1"), x, 1e-5)?;
    let x = cross(g, &at("attn1"), x, n, n, heads)?;
    let n = layer_norm(g, &at("norm2"), x, 1e-5)?;
    let x = cross(g, &at("attn2"), x, n, context, heads)?;
    let n = layer_norm(g, &at("norm3"), x, 1e-5)?;
    let h = linear(g, &at("ff.net.0.proj"), n, 8 * c, true, Act::None)?;
    let h = g.push(&at("ff.net.0"), Geglu, &[h])?;
    let h = linear(g, &at("ff.net.2"), h, c, true, Act::None)?;
    add(g, &at("ff.residual"), x, h)
}

/// residual + attention of q's tokens over `context`, without biases on the way in.
fn cross(g: &mut Graph, at: &str, residual: Var, q: Var, context: Var, heads: usize) -> Result<Var> {
    let at = |name: &str| join(at, name);
    let c = g.shape(q).last();
    let q = linear(g, &at("to_q"), q, c, false, Act::None)?;
    let k = linear(g, &at("to_k"), context, c, false, Act::None)?;
    let v = linear(g, &at("to_v"), context, c, false, Act::None)?;
    let h = attention(g, &at("attention"), [q, k, v], heads, false)?;
    let h = linear(g, &at("to_out.0"), h, c, true, Act::None)?;
    add(g, &at("residual"), residual, h)
}

/// Group norm, attention of the pixels to each other, plus x: with one head that of the autoencoders' middle. diffusers
/// `Attention`.
///
/// # Errors
/// When x does not fit, or the heads do not divide its channels.
pub fn self_attention(g: &mut Graph, at: &str, x: Var, heads: usize, groups: usize, eps: f64) -> Result<Var> {
    let at = |name: &str| join(at, name);
    let c = g.shape(x).last();
    let n = group_norm(g, &at("group_norm"), x, groups, eps, Act::None)?;
    let q = linear(g, &at("to_q"), n, c, true, Act::None)?;
    let k = linear(g, &at("to_k"), n, c, true, Act::None)?;
    let v = linear(g, &at("to_v"), n, c, true, Act::None)?;
    let h = attention(g, &at("attention"), [q, k, v], heads, false)?;
    let h = linear(g, &at("to_out.0"), h, c, true, Act::None)?;
    add(g, &at("residual"), x, h)
}
