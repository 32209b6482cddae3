//! The autoencoders, KL- and VQ-regularised: Rombach et al. 2022, section 3.1; diffusers `AutoencoderKL`, `VQModel`.

use super::{MAX_LAYERS, MAX_LEVELS, Model};
use crate::error::{Error, Result};
use crate::graph::{Graph, Layout, Var};
use crate::io::Config;
use crate::nn::{ResBlock, cast, conv3x3, downsample, group_norm, join, linear, self_attention, upsample};
use crate::ops::{Act, Gaussian, Quantize};
use crate::tensor::DType;

/// Encoder and decoder, which both kinds share.
#[derive(Clone, PartialEq, Debug)]
pub struct Codec {
    /// Channels of pictures.
    pub in_channels: usize,
    /// Channels of reconstructions.
    pub out_channels: usize,
    /// Channels of latents.
    pub latent_channels: usize,
    /// Side of the pictures that the model was made for.
    pub sample_size: usize,
    /// Latents are multiplied with this before diffusion.
    pub scaling_factor: f64,
    channels: Vec<usize>,
    layers: usize,
    groups: usize,
    mid_attention: bool,
    /// By level, in the order of `channels`: whether attention follows each of the encoder's residual blocks, and the decoder's.
    attention: Vec<[bool; 2]>,
}

const KEYS: &[&str] = &[
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "latent_channels",
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
    "force_upcast",
    "mid_block_add_attention",
];

const EPS: f64 = 1e-6;

impl Codec {
    fn from_config(c: &Config, default_channels: usize) -> Result<Codec> {
        c.neutral("act_fn", &["silu", "swish"])?;
        let channels = c.usize_list("block_out_channels")?;
        if channels.is_empty() || channels.len() > MAX_LEVELS || channels.contains(&0) {
            return Err(c.error("block_out_channels", format!("1 to {MAX_LEVELS} levels of at least one channel")));
        }
        let down = blocks(c, "down_block_types", "DownEncoderBlock2D", &channels)?;
        let up = blocks(c, "up_block_types", "UpDecoderBlock2D", &channels)?;
        let attention = down.into_iter().zip(up.into_iter().rev()).map(|(down, up)| [down, up]).collect();
        let groups = c.usize_or("norm_num_groups", 32)?;
        if groups == 0 || channels.iter().any(|c| c % groups != 0) {
            return Err(c.error("norm_num_groups", format!("a divisor of every one of {channels:?}")));
        }
        let layers = c.usize_or("layers_per_block", 1)?;
        if layers > MAX_LAYERS {
            return Err(c.error("layers_per_block", format!("at most {MAX_LAYERS} layers in each level")));
        }
        let scaling_factor = c.f64_or("scaling_factor", 0.18215)?;
        if !(scaling_factor > 0.0) {
            return Err(c.error("scaling_factor", "a number above 0"));
        }
        Ok(Codec {
            in_channels: c.usize_or("in_channels", 3)?,
            out_channels: c.usize_or("out_channels", 3)?,
            latent_channels: c.usize_or("latent_channels", default_channels)?,
            sample_size: c.usize_or("sample_size", 32)?,
            scaling_factor,
            layers,
            mid_attention: c.bool_or("mid_block_add_attention", true)?,
            attention,
            channels,
            groups,
        })
    }

    /// Pixels per latent, on each axis.
    pub fn factor(&self) -> usize {
        1 << (self.channels.len() - 1)
    }

    fn res(&self) -> ResBlock {
        ResBlock { groups: self.groups, eps: EPS, film: false }
    }

    /// A residual block of a level, with attention behind it (one head over all channels) where the level has that.
    fn layer(&self, g: &mut Graph, at: &str, j: usize, x: Var, channels: usize, attention: bool) -> Result<Var> {
        let h = self.res().build(g, &join(at, &format!("resnets.{j}")), x, channels, None)?;
        if !attention {
            return Ok(h);
        }
        self_attention(g, &join(at, &format!("attentions.{j}")), h, 1, self.groups, EPS)
    }

    fn middle(&self, g: &mut Graph, at: &str, x: Var) -> Result<Var> {
        let c = g.shape(x).last();
        let mut h = self.res().build(g, &join(at, "resnets.0"), x, c, None)?;
        if self.mid_attention {
            h = self_attention(g, &join(at, "attentions.0"), h, 1, self.groups, EPS)?;
        }
        self.res().build(g, &join(at, "resnets.1"), h, c, None)
    }

    /// x (B,H,W,C) to (B,H/f,W/f,`out`).
    fn encoder(&self, g: &mut Graph, x: Var, out: usize) -> Result<Var> {
        let (shape, f) = (g.shape(x), self.factor());
        if shape.len() != 4 || shape[1] % f != 0 || shape[2] % f != 0 {
            let want = format!("a picture (B,H,W,C) with H and W multiples of {f}");
            return Err(Error::invalid(format!("autoencoder: want {want}; got {shape}")));
        }
        let mut h = conv3x3(g, "encoder.conv_in", x, self.channels[0])?;
        for (i, &channels) in self.channels.iter().enumerate() {
            let at = format!("encoder.down_blocks.{i}");
            for j in 0..self.layers {
                h = self.layer(g, &at, j, h, channels, self.attention[i][0])?;
            }
            if i + 1 < self.channels.len() {
                h = downsample(g, &join(&at, "downsamplers.0"), h, [0, 0, 1, 1])?;
            }
        }
        h = self.middle(g, "encoder.mid_block", h)?;
        let h = group_norm(g, "encoder.conv_norm_out", h, self.groups, EPS, Act::Silu)?;
        conv3x3(g, "encoder.conv_out", h, out)
    }

    /// z (B,h,w,Z) to (B,h·f,w·f,C).
    fn decoder(&self, g: &mut Graph, z: Var) -> Result<Var> {
        let last = self.channels[self.channels.len() - 1];
        let mut h = conv3x3(g, "decoder.conv_in", z, last)?;
        h = self.middle(g, "decoder.mid_block", h)?;
        for (i, (&channels, attention)) in self.channels.iter().zip(&self.attention).rev().enumerate() {
            let at = format!("decoder.up_blocks.{i}");
            for j in 0..self.layers + 1 {
                h = self.layer(g, &at, j, h, channels, attention[1])?;
            }
            if i + 1 < self.channels.len() {
                h = upsample(g, &join(&at, "upsamplers.0"), h)?;
            }
        }
        let h = group_norm(g, "decoder.conv_norm_out", h, self.groups, EPS, Act::Silu)?;
        conv3x3(g, "decoder.conv_out", h, self.out_channels)
    }
}

/// Whether each block of a list of diffusers' has attention: `Attn` before the name of the plain one.
fn blocks(c: &Config, key: &str, plain: &str, channels: &[usize]) -> Result<Vec<bool>> {
    let named = c.str_list(key)?;
    let one = |name: &String| match name.strip_prefix("Attn").unwrap_or(name) == plain {
        true => Some(name != plain),
        false => None,
    };
    let known: Option<Vec<bool>> = named.iter().map(one).collect();
    known.filter(|known| known.len() == channels.len()).ok_or_else(|| {
        c.error(key, format!("{plain} or Attn{plain} for each of block_out_channels {channels:?}"))
    })
}

/// A graph from one f32 input to one f32 output, computed in another type.
fn between(
    (from, to): (&str, &str),
    shape: [usize; 4],
    dtype: DType,
    build: impl FnOnce(&mut Graph, Var) -> Result<Var>,
) -> Result<Graph> {
    let mut g = Graph::new();
    let x = g.input(from, DType::F32, shape);
    let x = cast(&mut g, from, x, dtype, 1.0)?;
    let y = build(&mut g, x)?;
    let y = cast(&mut g, to, y, DType::F32, 1.0)?;
    g.output(to, y);
    Ok(g)
}

/// An autoencoder whose latents are drawn from a normal distribution that the encoder predicts.
#[derive(Clone, PartialEq, Debug)]
pub struct AutoencoderKL {
    /// Encoder and decoder.
    pub codec: Codec,
    quant_conv: bool,
    post_quant_conv: bool,
}

impl Model for AutoencoderKL {
    const CLASSES: &'static [&'static str] = &["AutoencoderKL"];

    fn from_config(c: &Config) -> Result<AutoencoderKL> {
        let own = ["latents_mean", "latents_std", "shift_factor", "use_quant_conv", "use_post_quant_conv"];
        c.only(&[KEYS, &own].concat())?;
        c.neutral::<bool>("latents_mean", &[])?;
        c.neutral::<bool>("latents_std", &[])?;
        c.neutral("shift_factor", &[0.0])?;
        Ok(AutoencoderKL {
            codec: Codec::from_config(c, 4)?,
            quant_conv: c.bool_or("use_quant_conv", true)?,
            post_quant_conv: c.bool_or("use_post_quant_conv", true)?,
        })
    }

    fn inventory(&self, dtype: DType) -> Result<Vec<Graph>> {
        let (mut e, mut d, f) = (Graph::new(), Graph::new(), self.codec.factor());
        let x = e.input("x", dtype, [1, f, f, self.codec.in_channels]);
        self.encode(&mut e, x)?;
        let z = d.input("z", dtype, [1, 1, 1, self.codec.latent_channels]);
        self.decode(&mut d, z)?;
        Ok(vec![e, d])
    }
}

impl AutoencoderKL {
    /// x (B,H,W,C) in −1…1 to moments (B,h,w,2Z): mean, then log-variance.
    ///
    /// # Errors
    /// When H or W is no multiple of the factor.
    pub fn encode(&self, g: &mut Graph, x: Var) -> Result<Var> {
        let moments = 2 * self.codec.latent_channels;
        let h = self.codec.encoder(g, x, moments)?;
        if self.quant_conv { linear(g, "quant_conv", h, moments, true, Act::None) } else { Ok(h) }
    }

    /// z (B,h,w,Z), already divided by the scaling factor, to x (B,H,W,C) in −1…1.
    ///
    /// # Errors
    /// When z has other channels.
    pub fn decode(&self, g: &mut Graph, z: Var) -> Result<Var> {
        let z = if self.post_quant_conv {
            linear(g, "post_quant_conv", z, self.codec.latent_channels, true, Act::None)?
        } else {
            z
        };
        self.codec.decoder(g, z)
    }

    /// [`AutoencoderKL::encode`] from `image` to `moments`, f32.
    ///
    /// # Errors
    /// As there.
    pub fn encode_graph(&self, [b, h, w]: [usize; 3], dtype: DType) -> Result<Graph> {
        let shape = [b, h, w, self.codec.in_channels];
        between(("image", "moments"), shape, dtype, |g, x| self.encode(g, x))
    }

    /// `image` (B,H,W,C) and `noise` (B,h,w,Z) to `latents` (B,h,w,Z), all f32: a draw, times the scaling factor.
    ///
    /// # Errors
    /// As [`AutoencoderKL::encode`].
    pub fn sample_graph(&self, [b, h, w]: [usize; 3], dtype: DType) -> Result<Graph> {
        let (shape, f) = ([b, h, w, self.codec.in_channels], self.codec.factor());
        between(("image", "latents"), shape, dtype, |g, x| {
            let moments = self.encode(g, x)?;
            let noise = g.input("noise", DType::F32, [b, h / f, w / f, self.codec.latent_channels]);
            g.push("draw", Gaussian { scale: self.codec.scaling_factor as f32 }, &[moments, noise])
        })
    }

    /// [`AutoencoderKL::decode`] from `latents` to `image`, f32.
    ///
    /// # Errors
    /// As there.
    pub fn decode_graph(&self, [b, h, w]: [usize; 3], dtype: DType) -> Result<Graph> {
        let shape = [b, h, w, self.codec.latent_channels];
        between(("latents", "image"), shape, dtype, |g, z| self.decode(g, z))
    }
}

/// An autoencoder whose latents are replaced by the nearest entries of a codebook when they are decoded.
#[derive(Clone, PartialEq, Debug)]
pub struct VQModel {
    /// Encoder and decoder.
    pub codec: Codec,
    /// Entries of the codebook, V.
    pub codes: usize,
    /// Width of an entry.
    pub code_width: usize,
}

/// A quantised latent.
pub struct Encoded {
    /// The nearest entries (B,h,w,Z).
    pub quantized: Var,
    /// Their numbers (B,h,w) i32.
    pub codes: Var,
}

impl Model for VQModel {
    const CLASSES: &'static [&'static str] = &["VQModel"];

    fn from_config(c: &Config) -> Result<VQModel> {
        let own = ["num_vq_embeddings", "vq_embed_dim", "norm_type", "lookup_from_codebook"];
        c.only(&[KEYS, &own].concat())?;
        c.neutral("norm_type", &["group"])?;
        c.neutral("lookup_from_codebook", &[false])?;
        let codec = Codec::from_config(c, 3)?;
        let codes = c.usize_or("num_vq_embeddings", 256)?;
        if codes == 0 {
            return Err(c.error("num_vq_embeddings", "at least one entry"));
        }
        Ok(VQModel { code_width: c.usize_or("vq_embed_dim", codec.latent_channels)?, codes, codec })
    }

    fn inventory(&self, dtype: DType) -> Result<Vec<Graph>> {
        let (mut e, mut d, f) = (Graph::new(), Graph::new(), self.codec.factor());
        let x = e.input("x", dtype, [1, f, f, self.codec.in_channels]);
        self.encode(&mut e, x)?;
        let z = d.input("z", dtype, [1, 1, 1, self.code_width]);
        self.decode(&mut d, z)?;
        Ok(vec![e, d])
    }
}

impl VQModel {
    /// x (B,H,W,C) in −1…1 to latents (B,h,w,Z), before quantisation: what the diffusion model works on.
    ///
    /// # Errors
    /// When H or W is no multiple of the factor.
    pub fn encode(&self, g: &mut Graph, x: Var) -> Result<Var> {
        let h = self.codec.encoder(g, x, self.codec.latent_channels)?;
        linear(g, "quant_conv", h, self.code_width, true, Act::None)
    }

    /// z (B,h,w,Z) to its nearest codes.
    ///
    /// # Errors
    /// When z has other channels.
    pub fn quantize(&self, g: &mut Graph, z: Var) -> Result<Encoded> {
        let dtype = g.spec(z).dtype;
        let book =
            g.weight("quantize.embedding.weight", Layout::Same, dtype, [self.codes, self.code_width])?;
        let y = g.push_all("quantize", Quantize, &[z, book])?;
        Ok(Encoded { quantized: y[0], codes: y[1] })
    }

    /// z (B,h,w,Z) to x (B,H,W,C) in −1…1, through the codebook.
    ///
    /// # Errors
    /// When z has other channels.
    pub fn decode(&self, g: &mut Graph, z: Var) -> Result<Var> {
        let z = self.quantize(g, z)?.quantized;
        self.decode_quantized(g, z)
    }

    /// Entries of the codebook (B,h,w,Z) to x (B,H,W,C) in −1…1.
    ///
    /// # Errors
    /// When z has other channels.
    pub fn decode_quantized(&self, g: &mut Graph, z: Var) -> Result<Var> {
        let z = linear(g, "post_quant_conv", z, self.codec.latent_channels, true, Act::None)?;
        self.codec.decoder(g, z)
    }

    /// [`VQModel::encode`] from `image` to `latents`, f32.
    ///
    /// # Errors
    /// As there.
    pub fn encode_graph(&self, [b, h, w]: [usize; 3], dtype: DType) -> Result<Graph> {
        let shape = [b, h, w, self.codec.in_channels];
        between(("image", "latents"), shape, dtype, |g, x| self.encode(g, x))
    }

    /// [`VQModel::quantize`] from `latents` to `quantized`, f32, and `codes`, i32.
    ///
    /// # Errors
    /// As there.
    pub fn quantize_graph(&self, [b, h, w]: [usize; 3], dtype: DType) -> Result<Graph> {
        let mut codes = None;
        let mut g = between(("latents", "quantized"), [b, h, w, self.code_width], dtype, |g, z| {
            let encoded = self.quantize(g, z)?;
            codes = Some(encoded.codes);
            Ok(encoded.quantized)
        })?;
        codes.into_iter().for_each(|v| g.output("codes", v));
        Ok(g)
    }

    /// [`VQModel::decode`] from `latents` to `image`, f32.
    ///
    /// # Errors
    /// As there.
    pub fn decode_graph(&self, [b, h, w]: [usize; 3], dtype: DType) -> Result<Graph> {
        between(("latents", "image"), [b, h, w, self.code_width], dtype, |g, z| self.decode(g, z))
    }
}
