//! The conditioned UNet: Rombach et al. 2022, section 3.2 and 3.3; diffusers `UNet2DConditionModel`.
//!
//! Residual blocks with a time embedding, spatial transformers that attend to the context, and skip connections from
//! every block of the way down to the way up.

use super::{MAX_LAYERS, MAX_LEVELS, Model};
use crate::error::{Error, Result};
use crate::graph::{Graph, Var};
use crate::io::Config;
use crate::nn::{
    ResBlock, SpatialTransformer, Time, cast, conv3x3, downsample, group_norm, join, linear, self_attention,
    spatial_transformer, upsample,
};
use crate::ops::{Act, Concat, Timestep};
use crate::tensor::DType;

/// A conditioned UNet.
#[derive(Clone, PartialEq, Debug)]
pub struct UNet2DCondition {
    /// Channels of the input: 4, or 9 with mask and masked image.
    pub in_channels: usize,
    /// Channels of the result.
    pub out_channels: usize,
    /// Width of the context; 0 for a UNet without one, [`super::UNet2D`].
    pub context: usize,
    /// Side of the latents that the model was made for.
    pub sample_size: usize,
    pub(super) levels: Vec<Level>,
    pub(super) res: ResBlock,
    pub(super) time_width: usize,
    pub(super) flip: bool,
    pub(super) shift: f64,
    /// Heads in the middle; 0 where there is no attention.
    pub(super) mid: usize,
    pub(super) mid_depth: usize,
}

/// One resolution.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Level {
    pub(super) channels: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    /// Depth of the transformers.
    pub(super) depth: usize,
    pub(super) down_attention: bool,
    pub(super) up_attention: bool,
}

const KEYS: &[&str] = &[
    "sample_size",
    "in_channels",
    "out_channels",
    "center_input_sample",
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "only_cross_attention",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "mid_block_scale_factor",
    "dropout",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "attention_head_dim",
    "num_attention_heads",
    "dual_cross_attention",
    "use_linear_projection",
    "class_embed_type",
    "addition_embed_type",
    "addition_time_embed_dim",
    "num_class_embeds",
    "upcast_attention",
    "resnet_time_scale_shift",
    "resnet_skip_time_act",
    "resnet_out_scale_factor",
    "time_embedding_type",
    "time_embedding_dim",
    "time_embedding_act_fn",
    "timestep_post_act",
    "time_cond_proj_dim",
    "conv_in_kernel",
    "conv_out_kernel",
    "projection_class_embeddings_input_dim",
    "attention_type",
    "class_embeddings_concat",
    "mid_block_only_cross_attention",
    "cross_attention_norm",
    "addition_embed_type_num_heads",
];

/// Keys that must be absent, or have the value that changes nothing.
fn only_neutral(c: &Config) -> Result<()> {
    for key in [
        "center_input_sample",
        "only_cross_attention",
        "dual_cross_attention",
        "resnet_skip_time_act",
        "class_embeddings_concat",
        "mid_block_only_cross_attention",
    ] {
        c.neutral(key, &[false])?;
    }
    for key in [
        "reverse_transformer_layers_per_block",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "class_embed_type",
        "addition_embed_type",
        "addition_time_embed_dim",
        "num_class_embeds",
        "time_embedding_act_fn",
        "timestep_post_act",
        "time_cond_proj_dim",
        "projection_class_embeddings_input_dim",
        "cross_attention_norm",
    ] {
        c.neutral::<bool>(key, &[])?;
    }
    c.neutral("mid_block_type", &["UNetMidBlock2DCrossAttn"])?;
    c.neutral("time_embedding_type", &["positional"])?;
    c.neutral("attention_type", &["default"])?;
    c.neutral("act_fn", &["silu", "swish"])?;
    c.neutral("conv_in_kernel", &[3])?;
    c.neutral("conv_out_kernel", &[3])?;
    c.neutral("downsample_padding", &[1])?;
    c.neutral("mid_block_scale_factor", &[1.0])?;
    c.neutral("resnet_out_scale_factor", &[1.0])
}

/// Which levels have attention, by the names of their blocks.
pub(super) fn attention(c: &Config, key: &str, n: usize, plain: &str, cross: &str) -> Result<Vec<bool>> {
    let blocks = c.str_list(key)?;
    if blocks.len() != n || blocks.iter().any(|b| b != plain && b != cross) {
        return Err(c.error(key, format!("{n} of {plain}, {cross}")));
    }
    Ok(blocks.iter().map(|b| b == cross).collect())
}

impl Model for UNet2DCondition {
    const CLASSES: &'static [&'static str] = &["UNet2DConditionModel"];

    fn from_config(c: &Config) -> Result<UNet2DCondition> {
        c.only(KEYS)?;
        only_neutral(c)?;
        let channels = c.usize_list("block_out_channels")?;
        let n = channels.len();
        if n == 0 || n > MAX_LEVELS || channels.contains(&0) {
            return Err(c.error("block_out_channels", format!("1 to {MAX_LEVELS} levels of at least one channel")));
        }
        let down = attention(c, "down_block_types", n, "DownBlock2D", "CrossAttnDownBlock2D")?;
        let up = attention(c, "up_block_types", n, "UpBlock2D", "CrossAttnUpBlock2D")?;
        let layers = c.per_level_or("layers_per_block", n, 2)?;
        // What `attention_head_dim` says is the number of heads: a misnomer that configurations keep.
        let key = if c.has("num_attention_heads") { "num_attention_heads" } else { "attention_head_dim" };
        let heads = c.per_level_or(key, n, 8)?;
        let depth = c.per_level_or("transformer_layers_per_block", n, 1)?;
        let groups = c.usize_or("norm_num_groups", 32)?;
        for i in 0..n {
            if groups == 0 || channels[i] % groups != 0 {
                return Err(c.error("norm_num_groups", format!("a divisor of every one of {channels:?}")));
            }
            if heads[i] == 0 || channels[i] % heads[i] != 0 {
                return Err(c.error(key, format!("divisors of {channels:?}")));
            }
            if layers[i] == 0 || layers[i] > MAX_LAYERS {
                return Err(c.error("layers_per_block", format!("1 to {MAX_LAYERS} layers in each level")));
            }
            if depth[i] > MAX_LAYERS {
                return Err(c.error("transformer_layers_per_block", format!("at most {MAX_LAYERS}")));
            }
        }
        let film = match c.opt_str("resnet_time_scale_shift")? {
            None | Some("default") => false,
            Some("scale_shift") => true,
            Some(_) => return Err(c.error("resnet_time_scale_shift", "default or scale_shift")),
        };
        let level = |i: usize| Level {
            channels: channels[i],
            layers: layers[i],
            heads: heads[i],
            depth: depth[i],
            down_attention: down[i],
            up_attention: up[n - 1 - i],
        };
        Ok(UNet2DCondition {
            in_channels: c.usize_or("in_channels", 4)?,
            out_channels: c.usize_or("out_channels", 4)?,
            context: match c.usize_or("cross_attention_dim", 1280)? {
                0 => return Err(c.error("cross_attention_dim", "at least 1")),
                width => width,
            },
            sample_size: c.usize_or("sample_size", 64)?,
            res: ResBlock { groups, eps: c.f64_or("norm_eps", 1e-5)?, film },
            time_width: c.usize_or("time_embedding_dim", 4 * channels[0])?,
            flip: c.bool_or("flip_sin_to_cos", true)?,
            shift: c.f64_or("freq_shift", 0.0)?,
            mid: heads[n - 1],
            mid_depth: depth[n - 1],
            levels: (0..n).map(level).collect(),
        })
    }

    fn inventory(&self, dtype: DType) -> Result<Vec<Graph>> {
        let mut g = Graph::new();
        let side = self.multiple();
        let x = g.input("x", dtype, [1, side, side, self.in_channels]);
        let t = g.input("t", DType::F32, [1]);
        let context = (self.context > 0).then(|| g.input("context", dtype, [1, 1, self.context]));
        self.body(&mut g, x, (t, None), context)?;
        Ok(vec![g])
    }
}

impl UNet2DCondition {
    /// Height and width of the latents must be multiples of this.
    pub fn multiple(&self) -> usize {
        1 << (self.levels.len() - 1)
    }

    /// Noisy latents x (B,H,W,C), timestep t (1) f32, context (B,S,E) to the prediction (B,H,W,O). With a counter (4) i32, t
    /// (R) holds the timesteps of all evaluations, and counter\[0\] says which one this is.
    ///
    /// # Errors
    /// When H or W is no multiple of [`UNet2DCondition::multiple`], or an input does not fit.
    pub fn build(&self, g: &mut Graph, x: Var, t: (Var, Option<Var>), context: Var) -> Result<Var> {
        self.body(g, x, t, Some(context))
    }

    /// [`UNet2DCondition::build`]; without a context, pixels attend to each other alone.
    ///
    /// # Errors
    /// As there.
    pub fn body(
        &self,
        g: &mut Graph,
        x: Var,
        t: (Var, Option<Var>),
        context: Option<Var>,
    ) -> Result<Var> {
        let (shape, dtype, m) = (g.shape(x), g.spec(x).dtype, self.multiple());
        if shape.len() != 4 || shape[1] % m != 0 || shape[2] % m != 0 || shape[3] != self.in_channels {
            let want = format!("latents (B,H,W,{}) with H and W multiples of {m}", self.in_channels);
            return Err(Error::invalid(format!("unet: want {want}; got {shape}")));
        }
        let first = self.levels[0].channels;
        let (flip, shift) = (self.flip, self.shift as f32);
        let (t, counter) = t;
        let time = g.push("time_proj", Timestep { width: first, flip, shift, dtype }, &[t])?;
        let time = linear(g, "time_embedding.linear_1", time, self.time_width, true, Act::Silu)?;
        // Every block applies SiLU to the embedding first; it is done once here.
        let rows = linear(g, "time_embedding.linear_2", time, self.time_width, true, Act::Silu)?;
        let time = Time { rows, counter };

        let mut h = conv3x3(g, "conv_in", x, first)?;
        let mut skips = vec![h];
        for (i, level) in self.levels.iter().enumerate() {
            let at = |name: String| join(&format!("down_blocks.{i}"), &name);
            for j in 0..level.layers {
                h = self.res.build(g, &at(format!("resnets.{j}")), h, level.channels, Some(time))?;
                if level.down_attention {
                    h = self.transformer(g, &at(format!("attentions.{j}")), h, context, level)?;
                }
                skips.push(h);
            }
            if i + 1 < self.levels.len() {
                h = downsample(g, &at("downsamplers.0".into()), h, [1; 4])?;
                skips.push(h);
            }
        }

        let last = &self.levels[self.levels.len() - 1];
        let mid = Level { heads: self.mid, depth: self.mid_depth, ..last.clone() };
        h = self.res.build(g, "mid_block.resnets.0", h, mid.channels, Some(time))?;
        if self.mid > 0 {
            h = self.transformer(g, "mid_block.attentions.0", h, context, &mid)?;
        }
        h = self.res.build(g, "mid_block.resnets.1", h, mid.channels, Some(time))?;

        for (i, level) in self.levels.iter().rev().enumerate() {
            let at = |name: String| join(&format!("up_blocks.{i}"), &name);
            for j in 0..level.layers + 1 {
                let skip = skips.pop().ok_or_else(|| Error::invalid("unet: fewer skips than blocks"))?;
                h = g.push(&at(format!("skip.{j}")), Concat, &[h, skip])?;
                h = self.res.build(g, &at(format!("resnets.{j}")), h, level.channels, Some(time))?;
                if level.up_attention {
                    h = self.transformer(g, &at(format!("attentions.{j}")), h, context, level)?;
                }
            }
            if i + 1 < self.levels.len() {
                h = upsample(g, &at("upsamplers.0".into()), h)?;
            }
        }
        let h = group_norm(g, "conv_norm_out", h, self.res.groups, self.res.eps, Act::Silu)?;
        conv3x3(g, "conv_out", h, self.out_channels)
    }

    /// One forward pass: `sample` (B,H,W,C), `timestep` (1), `context` (B,S,E) where the UNet has one, all f32, to `out`
    /// (B,H,W,O) f32.
    ///
    /// # Errors
    /// As [`UNet2DCondition::build`].
    pub fn graph(&self, [b, h, w]: [usize; 3], tokens: usize, dtype: DType) -> Result<Graph> {
        let mut g = Graph::new();
        let x = g.input("sample", DType::F32, [b, h, w, self.in_channels]);
        let t = g.input("timestep", DType::F32, [1]);
        let context = (self.context > 0).then(|| g.input("context", DType::F32, [b, tokens, self.context]));
        let x = cast(&mut g, "sample", x, dtype, 1.0)?;
        let context = context.map(|v| cast(&mut g, "context", v, dtype, 1.0)).transpose()?;
        let y = self.body(&mut g, x, (t, None), context)?;
        let y = cast(&mut g, "out", y, DType::F32, 1.0)?;
        g.output("out", y);
        Ok(g)
    }

    fn transformer(
        &self,
        g: &mut Graph,
        at: &str,
        x: Var,
        context: Option<Var>,
        level: &Level,
    ) -> Result<Var> {
        let Some(context) = context else {
            return self_attention(g, at, x, level.heads, self.res.groups, self.res.eps);
        };
        let how = SpatialTransformer { heads: level.heads, depth: level.depth, groups: self.res.groups };
        spatial_transformer(g, at, x, context, how)
    }
}
