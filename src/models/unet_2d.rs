//! The UNet without a condition: Rombach et al. 2022, section 4.1 (CelebA, FFHQ, LSUN); diffusers `UNet2DModel`.
//!
//! As the conditioned one, with attention of the pixels to each other in place of transformers.

use super::unet_2d_condition::{Level, UNet2DCondition, attention};
use super::{MAX_LAYERS, MAX_LEVELS, Model};
use crate::error::Result;
use crate::graph::{Graph, Var};
use crate::io::Config;
use crate::nn::{ResBlock, cast};
use crate::tensor::DType;

/// A UNet without a condition.
#[derive(Clone, PartialEq, Debug)]
pub struct UNet2D {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the result.
    pub out_channels: usize,
    /// Side of the latents that the model was made for.
    pub sample_size: usize,
    body: UNet2DCondition,
}

const KEYS: &[&str] = &[
    "sample_size",
    "in_channels",
    "out_channels",
    "center_input_sample",
    "time_embedding_type",
    "time_embedding_dim",
    "freq_shift",
    "flip_sin_to_cos",
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "mid_block_scale_factor",
    "downsample_padding",
    "downsample_type",
    "upsample_type",
    "dropout",
    "act_fn",
    "attention_head_dim",
    "norm_num_groups",
    "attn_norm_num_groups",
    "norm_eps",
    "resnet_time_scale_shift",
    "add_attention",
    "class_embed_type",
    "num_class_embeds",
    "num_train_timesteps",
];

/// Keys that must be absent, or have the value that changes nothing.
fn only_neutral(c: &Config) -> Result<()> {
    c.neutral("center_input_sample", &[false])?;
    for key in ["attn_norm_num_groups", "class_embed_type", "num_class_embeds"] {
        c.neutral::<bool>(key, &[])?;
    }
    c.neutral("time_embedding_type", &["positional"])?;
    c.neutral("mid_block_type", &["UNetMidBlock2D"])?;
    c.neutral("downsample_type", &["conv"])?;
    c.neutral("upsample_type", &["conv"])?;
    c.neutral("act_fn", &["silu", "swish"])?;
    c.neutral("downsample_padding", &[1])?;
    c.neutral("mid_block_scale_factor", &[1.0])
}

impl Model for UNet2D {
    const CLASSES: &'static [&'static str] = &["UNet2DModel"];

    fn from_config(c: &Config) -> Result<UNet2D> {
        c.only(KEYS)?;
        only_neutral(c)?;
        let channels = c.usize_list("block_out_channels")?;
        let n = channels.len();
        if n == 0 || n > MAX_LEVELS || channels.contains(&0) {
            let want = format!("1 to {MAX_LEVELS} levels of at least one channel");
            return Err(c.error("block_out_channels", want));
        }
        let down = attention(c, "down_block_types", n, "DownBlock2D", "AttnDownBlock2D")?;
        let up = attention(c, "up_block_types", n, "UpBlock2D", "AttnUpBlock2D")?;
        let layers = c.usize_or("layers_per_block", 2)?;
        if layers == 0 || layers > MAX_LAYERS {
            return Err(c.error("layers_per_block", format!("1 to {MAX_LAYERS} layers in each level")));
        }
        let groups = c.usize_or("norm_num_groups", 32)?;
        if groups == 0 || channels.iter().any(|c| c % groups != 0) {
            return Err(c.error("norm_num_groups", format!("a divisor of every one of {channels:?}")));
        }
        // Here it is what it says: the width of a head. Null means one head.
        let head = c.usize_unless_null("attention_head_dim", 8)?;
        let heads = |channels: usize| channels / head.unwrap_or(channels).max(1);
        if channels.iter().any(|&c| heads(c) == 0 || c % heads(c) != 0 || head == Some(0)) {
            return Err(c.error("attention_head_dim", format!("a divisor of every one of {channels:?}")));
        }
        let film = c.one_of("resnet_time_scale_shift", &["default", "scale_shift"], "default")? == "scale_shift";
        let level = |i: usize| Level {
            channels: channels[i],
            layers,
            heads: heads(channels[i]),
            depth: 1,
            down_attention: down[i],
            up_attention: up[n - 1 - i],
        };
        let body = UNet2DCondition {
            in_channels: c.usize_or("in_channels", 3)?,
            out_channels: c.usize_or("out_channels", 3)?,
            context: 0,
            sample_size: c.usize_or("sample_size", 32)?,
            res: ResBlock { groups, eps: c.f64_or("norm_eps", 1e-5)?, film },
            time_width: c.usize_or("time_embedding_dim", 4 * channels[0])?,
            flip: c.bool_or("flip_sin_to_cos", true)?,
            shift: c.f64_or("freq_shift", 0.0)?,
            mid: if c.bool_or("add_attention", true)? { heads(channels[n - 1]) } else { 0 },
            mid_depth: 1,
            levels: (0..n).map(level).collect(),
        };
        let (in_channels, out_channels, sample_size) = (body.in_channels, body.out_channels, body.sample_size);
        Ok(UNet2D { in_channels, out_channels, sample_size, body })
    }

    fn inventory(&self, dtype: DType) -> Result<Vec<Graph>> {
        let mut g = Graph::new();
        let side = self.multiple();
        let x = g.input("x", dtype, [1, side, side, self.in_channels]);
        let t = g.input("t", DType::F32, [1]);
        self.build(&mut g, x, (t, None))?;
        Ok(vec![g])
    }
}

impl From<UNet2D> for UNet2DCondition {
    /// The same with a context of width 0: what samples and trains it need tell no further difference.
    fn from(unet: UNet2D) -> UNet2DCondition {
        unet.body
    }
}

impl UNet2D {
    /// Height and width of the latents must be multiples of this.
    pub fn multiple(&self) -> usize {
        self.body.multiple()
    }

    /// Noisy latents x (B,H,W,C) and timestep t (B or 1) f32 to the prediction (B,H,W,O). With a counter, as
    /// [`UNet2DCondition::build`].
    ///
    /// # Errors
    /// As there.
    pub fn build(&self, g: &mut Graph, x: Var, t: (Var, Option<Var>)) -> Result<Var> {
        self.body.body(g, x, t, None)
    }

    /// One forward pass: `sample` (B,H,W,C), `timestep` (1), f32, to `out` (B,H,W,O) f32.
    ///
    /// # Errors
    /// As [`UNet2D::build`].
    pub fn graph(&self, [b, h, w]: [usize; 3], dtype: DType) -> Result<Graph> {
        let mut g = Graph::new();
        let x = g.input("sample", DType::F32, [b, h, w, self.in_channels]);
        let t = g.input("timestep", DType::F32, [1]);
        let x = cast(&mut g, "sample", x, dtype, 1.0)?;
        let y = self.build(&mut g, x, (t, None))?;
        let y = cast(&mut g, "out", y, DType::F32, 1.0)?;
        g.output("out", y);
        Ok(g)
    }
}
