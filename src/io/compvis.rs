//! The names that tensors have in a checkpoint in one file: those of the original code (Rombach et al. 2022, CompVis), in which Stable
//! Diffusion is handed on too. A folder of diffusers has others; the rules between the two follow from a part's configuration.
//!
//! UNet, autoencoder and BERT are named after the original's modules; CLIP is named as transformers names it, or as OpenCLIP does (Stable
//! Diffusion 2).

use super::config::Config;
use super::weights::{Alias, Entry, Rows};
use crate::error::{Error, Result};
use std::collections::HashMap;

/// Where the parts stand in the file of a whole model.
pub(crate) const UNET: &str = "model.diffusion_model.";
/// As [`UNET`].
pub(crate) const FIRST_STAGE: &str = "first_stage_model.";
/// As [`UNET`].
pub(crate) const CONDITION: &str = "cond_stage_model.";
/// As [`UNET`]: CLIP by its names in OpenCLIP.
pub(crate) const OPEN_CLIP: &str = "cond_stage_model.model.";

/// How the file holds what one name of diffusers stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Form {
    /// Axes of length 1 that a matrix has behind its own: 1 as a convolution of a sequence, 2 as one of pictures. `None`: as it is.
    pub(crate) ones: Option<usize>,
    /// Which rows of the file's tensor it is.
    pub(crate) rows: Option<Rows>,
}

const SAME: Form = Form { ones: None, rows: None };

/// A name of the file for a name of diffusers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Theirs {
    pub(crate) name: String,
    pub(crate) form: Form,
}

impl Theirs {
    /// The axes in the file of a tensor, or of all those that lie in it, from the axes of one in the folder.
    pub(crate) fn shape(&self, ours: &[usize]) -> Vec<usize> {
        let mut shape = match (self.form.ones, ours) {
            (Some(ones), [o, i, rest @ ..]) if rest.iter().all(|&d| d == 1) => {
                [vec![*o, *i], vec![1; ones]].concat()
            }
            _ => ours.to_vec(),
        };
        if let (Some(rows), Some(first)) = (self.form.rows, shape.first_mut()) {
            *first *= rows.of;
        }
        shape
    }
}

/// The names of one part of a model.
#[derive(Debug)]
pub(crate) struct Names {
    prefix: &'static str,
    /// From a module, or a whole name, of diffusers to the file's.
    to: HashMap<String, (String, Form)>,
    /// And back: of the file's tensor one or more.
    from: HashMap<String, Vec<(String, Form)>>,
    /// Beginnings of names that stand under `prefix` and are no weights of the model.
    ignored: Vec<String>,
}

/// Most layers in a row, and greatest width: beyond any model. A configuration may be anybody's.
const MOST: usize = 256;
/// As [`MOST`].
const WIDEST: usize = 1 << 20;

/// A number of a configuration, from 1 to `most`.
fn within(c: &Config, key: &str, n: usize, most: usize) -> Result<usize> {
    if (1..=most).contains(&n) { Ok(n) } else { Err(c.error(key, format!("1 to {most}"))) }
}

/// Parts of a name from the longest on: the whole of it, then without its last word, …, with what was left off.
fn stems(name: &str) -> impl Iterator<Item = (&str, &str)> {
    let dots = name.rmatch_indices('.').map(|(i, _)| (&name[..i], &name[i..]));
    std::iter::once((name, "")).chain(dots)
}

impl Names {
    /// The names of a part of this class. `bare`: an autoencoder's without their prefix, as in a file with nothing else.
    ///
    /// # Errors
    /// [`Error::Config`] for a model that the original code cannot express, [`Error::Invalid`] for a class that it does not know.
    pub(crate) fn of(class: &str, c: &Config, bare: bool) -> Result<Names> {
        let prefix = match class {
            "UNet2DConditionModel" | "UNet2DModel" => UNET,
            "AutoencoderKL" | "VQModel" if bare => "",
            "AutoencoderKL" | "VQModel" => FIRST_STAGE,
            "CLIPTextModel" | "LDMBertModel" => "cond_stage_model.transformer.",
            "ClassEmbedder" => CONDITION,
            _ => {
                return Err(Error::invalid(format!("{class}: the layout of a single file has no such part")));
            }
        };
        let mut names = Names { prefix, to: HashMap::new(), from: HashMap::new(), ignored: vec![] };
        match class {
            "UNet2DConditionModel" | "UNet2DModel" => names.unet(c, class == "UNet2DModel")?,
            "AutoencoderKL" | "VQModel" => names.autoencoder(c)?,
            "LDMBertModel" => names.bert(c)?,
            "CLIPTextModel" => names.clip(),
            _ => names.add("embedding", "embedding"),
        }
        Ok(names)
    }

    /// CLIP's names in a file of OpenCLIP's.
    ///
    /// # Errors
    /// [`Error::Config`] for a width or a number of layers that no model has.
    pub(crate) fn open_clip(c: &Config) -> Result<Names> {
        let width = within(c, "hidden_size", c.usize("hidden_size")?, WIDEST)?;
        let layers = within(c, "num_hidden_layers", c.usize("num_hidden_layers")?, MOST)?;
        let mut names =
            Names { prefix: OPEN_CLIP, to: HashMap::new(), from: HashMap::new(), ignored: vec![] };
        let at = |rest: &str| format!("text_model.{rest}");
        names.add(&at("embeddings.token_embedding"), "token_embedding");
        names.add(&at("embeddings.position_embedding.weight"), "positional_embedding");
        names.add(&at("final_layer_norm"), "ln_final");
        for i in 0..layers {
            let (own, their) = (at(&format!("encoder.layers.{i}")), format!("transformer.resblocks.{i}"));
            for (ours, theirs) in [
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
                ("self_attn.out_proj", "attn.out_proj"),
            ] {
                names.add(&format!("{own}.{ours}"), &format!("{their}.{theirs}"));
            }
            for (part, word) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
                for kind in ["weight", "bias"] {
                    let form = Form { ones: None, rows: Some(Rows { part, of: 3, head: width }) };
                    let theirs = format!("{their}.attn.in_proj_{kind}");
                    names.put(format!("{own}.self_attn.{word}.{kind}"), theirs, form);
                }
            }
        }
        // The layer behind the one that Stable Diffusion 2 takes, and what compares texts with pictures.
        names.ignored = vec![
            format!("transformer.resblocks.{layers}."),
            "text_projection".into(),
            "logit_scale".into(),
            "attn_mask".into(),
        ];
        // Folders whose text encoder was saved without the outer module.
        let outer = names
            .to
            .iter()
            .filter_map(|(ours, to)| Some((ours.strip_prefix("text_model.")?.to_string(), to.clone())));
        let bare: Vec<_> = outer.collect();
        names.to.extend(bare);
        Ok(names)
    }

    fn put(&mut self, ours: String, theirs: String, form: Form) {
        self.from.entry(theirs.clone()).or_default().push((ours.clone(), form));
        self.to.insert(ours, (theirs, form));
    }

    fn add(&mut self, ours: &str, theirs: &str) {
        self.put(ours.into(), theirs.into(), SAME);
    }

    fn all(&mut self, ours: &str, theirs: &str, words: &[(&str, &str)]) {
        for (own, their) in words {
            self.add(&format!("{ours}.{own}"), &format!("{theirs}.{their}"));
        }
    }

    /// Attention of pixels to each other, with diffusers' older names of it; and files that were made of a folder with a few of its
    /// names left standing.
    fn attention(&mut self, ours: &str, theirs: &str, words: [(&str, &str, Form); 4]) {
        for ((new, their, form), old) in words.into_iter().zip(["query", "key", "value", "proj_attn"]) {
            self.put(format!("{ours}.{new}"), format!("{theirs}.{their}"), form);
            self.to.insert(format!("{ours}.{old}"), (format!("{theirs}.{their}"), form));
            if form.rows.is_none() {
                self.from.insert(format!("{theirs}.{new}"), vec![(format!("{ours}.{new}"), form)]);
            }
        }
    }

    fn unet(&mut self, c: &Config, plain: bool) -> Result<()> {
        const RES: &[(&str, &str)] = &[
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ];
        // What the names do not say, and the original code takes for granted.
        if c.opt_bool("flip_sin_to_cos")? == Some(false) {
            return Err(c.error("flip_sin_to_cos", "true, as a single file cannot say anything else"));
        }
        if c.opt_f64("freq_shift")?.is_some_and(|shift| shift != 0.0) {
            return Err(c.error("freq_shift", "0, as a single file cannot say anything else"));
        }
        if c.opt_bool("add_attention")? == Some(false) {
            return Err(c.error("add_attention", "true, as the middle block of a single file has attention"));
        }
        let channels = c.usize_list("block_out_channels")?;
        let n = channels.len();
        let layers = c.per_level_or("layers_per_block", n, 2)?;
        for layers in &layers {
            within(c, "layers_per_block", *layers, MOST)?;
        }
        within(c, "block_out_channels", n, MOST)?;
        let with = |key: &str| -> Result<Vec<bool>> {
            let blocks = c.str_list(key)?;
            if blocks.len() != n {
                return Err(c.error(key, format!("{n} blocks, one for each of {channels:?}")));
            }
            Ok(blocks.iter().map(|b| b.contains("Attn")).collect())
        };
        let (down, up) = (with("down_block_types")?, with("up_block_types")?);
        // The width of a head; null means one head.
        let key = "attention_head_dim";
        let head = if plain { c.usize_unless_null(key, 8)? } else { None };
        let head = head.map(|head| within(c, key, head, WIDEST)).transpose()?;
        for width in channels.iter().filter(|_| plain) {
            within(c, "block_out_channels", *width, WIDEST)?;
        }
        let attention = |names: &mut Names, ours: &str, theirs: &str, width: usize| {
            if !plain {
                // What is inside has the same names.
                return names.add(ours, theirs);
            }
            names.add(&format!("{ours}.group_norm"), &format!("{theirs}.norm"));
            // A head's queries, keys and values lie together.
            let third =
                |part| Form { ones: Some(1), rows: Some(Rows { part, of: 3, head: head.unwrap_or(width) }) };
            let last = Form { ones: Some(1), rows: None };
            names.attention(
                ours,
                theirs,
                [
                    ("to_q", "qkv", third(0)),
                    ("to_k", "qkv", third(1)),
                    ("to_v", "qkv", third(2)),
                    ("to_out.0", "proj_out", last),
                ],
            );
        };

        self.add("time_embedding.linear_1", "time_embed.0");
        self.add("time_embedding.linear_2", "time_embed.2");
        self.add("conv_in", "input_blocks.0.0");
        let mut at = 0;
        for i in 0..n {
            let own = format!("down_blocks.{i}");
            for j in 0..layers[i] {
                at += 1;
                self.all(&format!("{own}.resnets.{j}"), &format!("input_blocks.{at}.0"), RES);
                if down[i] {
                    let their = format!("input_blocks.{at}.1");
                    attention(self, &format!("{own}.attentions.{j}"), &their, channels[i]);
                }
            }
            if i + 1 < n {
                at += 1;
                self.add(&format!("{own}.downsamplers.0.conv"), &format!("input_blocks.{at}.0.op"));
            }
        }
        self.all("mid_block.resnets.0", "middle_block.0", RES);
        attention(self, "mid_block.attentions.0", "middle_block.1", channels.last().copied().unwrap_or(0));
        self.all("mid_block.resnets.1", "middle_block.2", RES);
        let mut at = 0;
        for (i, level) in (0..n).rev().enumerate() {
            let own = format!("up_blocks.{i}");
            for j in 0..=layers[level] {
                self.all(&format!("{own}.resnets.{j}"), &format!("output_blocks.{at}.0"), RES);
                if up[i] {
                    let their = format!("output_blocks.{at}.1");
                    attention(self, &format!("{own}.attentions.{j}"), &their, channels[level]);
                }
                if j == layers[level] && level > 0 {
                    let place = 1 + usize::from(up[i]);
                    let their = format!("output_blocks.{at}.{place}.conv");
                    self.add(&format!("{own}.upsamplers.0.conv"), &their);
                }
                at += 1;
            }
        }
        self.add("conv_norm_out", "out.0");
        self.add("conv_out", "out.2");
        Ok(())
    }

    fn autoencoder(&mut self, c: &Config) -> Result<()> {
        const RES: &[(&str, &str)] = &[
            ("norm1", "norm1"),
            ("conv1", "conv1"),
            ("norm2", "norm2"),
            ("conv2", "conv2"),
            ("conv_shortcut", "nin_shortcut"),
        ];
        let n = c.usize_list("block_out_channels")?.len();
        let layers = c.usize_or("layers_per_block", 1)?;
        if layers > MOST || n > MOST {
            return Err(
                c.error("layers_per_block", format!("at most {MOST} layers, in at most {MOST} levels"))
            );
        }
        let with = |key: &str| -> Result<Vec<bool>> {
            let blocks = c.str_list(key)?;
            if blocks.len() != n {
                return Err(c.error(key, format!("{n} blocks, one for each of block_out_channels")));
            }
            Ok(blocks.iter().map(|b| b.starts_with("Attn")).collect())
        };
        let (down, up) = (with("down_block_types")?, with("up_block_types")?);
        let attention = |names: &mut Names, ours: &str, theirs: &str| {
            names.add(&format!("{ours}.group_norm"), &format!("{theirs}.norm"));
            let pixel = Form { ones: Some(2), rows: None };
            let words = [("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")];
            names.attention(ours, theirs, words.map(|(own, their)| (own, their, pixel)));
        };
        for (side, blocks, their, kinds, resample) in [
            ("encoder", "down_blocks", "down", &down, ("downsamplers.0", "downsample")),
            ("decoder", "up_blocks", "up", &up, ("upsamplers.0", "upsample")),
        ] {
            self.add(&format!("{side}.conv_in"), &format!("{side}.conv_in"));
            self.add(&format!("{side}.conv_norm_out"), &format!("{side}.norm_out"));
            self.add(&format!("{side}.conv_out"), &format!("{side}.conv_out"));
            for (ours, theirs) in [("resnets.0", "block_1"), ("resnets.1", "block_2")] {
                self.all(&format!("{side}.mid_block.{ours}"), &format!("{side}.mid.{theirs}"), RES);
            }
            attention(self, &format!("{side}.mid_block.attentions.0"), &format!("{side}.mid.attn_1"));
            for i in 0..n {
                // The original counts resolutions from the picture's on, on the way up too.
                let (level, deeper) = if side == "decoder" { (n - 1 - i, 1) } else { (i, 0) };
                let (own, their) = (format!("{side}.{blocks}.{i}"), format!("{side}.{their}.{level}"));
                for j in 0..layers + deeper {
                    self.all(&format!("{own}.resnets.{j}"), &format!("{their}.block.{j}"), RES);
                    if kinds[i] {
                        attention(self, &format!("{own}.attentions.{j}"), &format!("{their}.attn.{j}"));
                    }
                }
                if i + 1 < n {
                    let (ours, theirs) = resample;
                    self.add(&format!("{own}.{ours}.conv"), &format!("{their}.{theirs}.conv"));
                }
            }
        }
        for name in ["quant_conv", "post_quant_conv", "quantize.embedding"] {
            self.add(name, name);
        }
        // Of training: discriminator and perceptual loss.
        self.ignored = vec!["loss.".into(), "model_ema.".into()];
        Ok(())
    }

    fn bert(&mut self, c: &Config) -> Result<()> {
        self.add("model.embed_tokens", "token_emb");
        self.add("model.embed_positions", "pos_emb.emb");
        self.add("model.layer_norm", "norm");
        self.add("to_logits", "to_logits");
        for i in 0..within(c, "encoder_layers", c.usize_or("encoder_layers", 32)?, MOST)? {
            // Attention and feed-forward network are layers of their own there.
            let own = format!("model.layers.{i}");
            let [first, second] = [2 * i, 2 * i + 1].map(|k| format!("attn_layers.layers.{k}"));
            self.all(
                &own,
                &first,
                &[
                    ("self_attn_layer_norm", "0"),
                    ("self_attn.q_proj", "1.to_q"),
                    ("self_attn.k_proj", "1.to_k"),
                    ("self_attn.v_proj", "1.to_v"),
                    ("self_attn.out_proj", "1.to_out"),
                ],
            );
            self.all(&own, &second, &[("final_layer_norm", "0"), ("fc1", "1.net.0.0"), ("fc2", "1.net.2")]);
        }
        Ok(())
    }

    fn clip(&mut self) {
        self.add("text_model", "text_model");
        // What CLIP compares texts and pictures with.
        self.ignored =
            ["vision_model.", "text_projection", "visual_projection", "logit_scale"].map(String::from).into();
        // Saved without the outer module, in a folder or in a file.
        for name in ["embeddings", "encoder", "final_layer_norm"] {
            self.to.insert(name.into(), (format!("text_model.{name}"), SAME));
            let ours = format!("text_model.{name}");
            self.from.insert(name.into(), vec![(ours, SAME)]);
        }
    }

    /// The file's name for one of diffusers; `None` for a tensor that the model does not have.
    pub(crate) fn theirs(&self, ours: &str) -> Option<Theirs> {
        let (found, rest) = stems(ours).find_map(|(stem, rest)| Some((self.to.get(stem)?, rest)))?;
        let (name, form) = found;
        // Only matrices have axes to add.
        let ones = form.ones.filter(|_| ours.ends_with(".weight"));
        Some(Theirs { name: format!("{}{name}{rest}", self.prefix), form: Form { ones, ..*form } })
    }

    /// What a tensor of the file is to the model: nothing, one tensor, or several that lie in it. One that stands among the part's and
    /// is unknown keeps its name, so that it is noticed.
    pub(crate) fn ours(&self, theirs: &str, entry: &Entry) -> Vec<Alias> {
        let Some(name) = theirs.strip_prefix(self.prefix) else { return vec![] };
        // Positions are numbers from 0 on; and beside a bare autoencoder may stand where its training was (`epoch`).
        let counts =
            name.ends_with("embeddings.position_ids") || self.prefix.is_empty() && !name.contains('.');
        if counts || self.ignored.iter().any(|word| name.starts_with(word)) {
            return vec![];
        }
        let Some((found, rest)) = stems(name).find_map(|(stem, rest)| Some((self.from.get(stem)?, rest)))
        else {
            return vec![Alias { name: theirs.into(), shape: entry.shape.clone(), rows: None }];
        };
        let one = |(ours, form): &(String, Form)| {
            let mut shape = entry.shape.clone();
            if let (Some(ones), true) = (form.ones, rest == ".weight")
                && shape.len() == 2 + ones
                && shape[2..].iter().all(|&d| d == 1)
            {
                shape.truncate(2);
            }
            if let (Some(rows), Some(first)) = (form.rows, shape.first_mut()) {
                *first /= rows.of;
            }
            Alias { name: format!("{ours}{rest}"), shape, rows: form.rows }
        };
        found.iter().map(one).collect()
    }
}
