//! The CLIP text encoder: Radford et al. 2021, as Stable Diffusion uses it (section 3.3 of Rombach et al. 2022).
//!
//! Token and position embeddings, pre-norm transformer layers with causal attention, a last layer norm.
//! transformers `CLIPTextModel`.

use super::{MAX_LAYERS, Model};
use crate::error::{Error, Result};
use crate::graph::{Graph, Layout, Var};
use crate::io::Config;
use crate::io::config::TRANSFORMERS_KEYS;
use crate::nn::{add, attention, cast, join, layer_norm, linear};
use crate::ops::{Act, Embedding};
use crate::tensor::DType;

/// A CLIP text encoder.
#[derive(Clone, PartialEq, Debug)]
pub struct ClipText {
    /// Width of the tokens.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Longest prompt, in tokens.
    pub positions: usize,
    /// Tokens that it knows.
    pub vocabulary: usize,
    heads: usize,
    intermediate: usize,
    act: Act,
    eps: f64,
    eos: usize,
}

/// What one run of the encoder makes.
pub struct Hidden {
    /// Embeddings, then the output of each layer: (B,T,E) each.
    pub states: Vec<Var>,
    /// After the last layer norm.
    pub last: Var,
}

impl Model for ClipText {
    const CLASSES: &'static [&'static str] = &["CLIPTextModel"];

    fn from_config(c: &Config) -> Result<ClipText> {
        let own = [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "hidden_act",
            "layer_norm_eps",
            "model_type",
        ];
        c.only(&[&own[..], TRANSFORMERS_KEYS].concat())?;
        let act = match c.str_or("hidden_act", "quick_gelu")? {
            "quick_gelu" => Act::QuickGelu,
            "gelu" => Act::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Act::GeluTanh,
            _ => return Err(c.error("hidden_act", "quick_gelu, gelu, gelu_new or gelu_pytorch_tanh")),
        };
        let model = ClipText {
            hidden: c.usize("hidden_size")?,
            layers: c.usize("num_hidden_layers")?,
            positions: c.usize_or("max_position_embeddings", 77)?,
            vocabulary: c.usize("vocab_size")?,
            heads: c.usize("num_attention_heads")?,
            intermediate: c.usize("intermediate_size")?,
            act,
            eps: c.f64_or("layer_norm_eps", 1e-5)?,
            eos: c.usize_or("eos_token_id", 49407)?,
        };
        if model.layers > MAX_LAYERS {
            return Err(c.error("num_hidden_layers", format!("at most {MAX_LAYERS}")));
        }
        if model.heads == 0 || model.hidden % model.heads != 0 {
            return Err(c.error("num_attention_heads", format!("a divisor of hidden_size {}", model.hidden)));
        }
        Ok(model)
    }

    fn inventory(&self, dtype: DType) -> Result<Vec<Graph>> {
        let mut g = Graph::new();
        let ids = g.input("ids", DType::I32, [1, 1]);
        self.build(&mut g, ids, dtype)?;
        Ok(vec![g])
    }
}

impl ClipText {
    /// ids (B,T) i32 to the hidden states.
    ///
    /// # Errors
    /// When T is longer than the position table.
    pub fn build(&self, g: &mut Graph, ids: Var, dtype: DType) -> Result<Hidden> {
        let base = "text_model";
        let at = |name: &str| join(base, name);
        let table = [self.vocabulary, self.hidden];
        let tokens = g.weight(&at("embeddings.token_embedding.weight"), Layout::Same, dtype, table)?;
        let places = [self.positions, self.hidden];
        let positions = g.weight(&at("embeddings.position_embedding.weight"), Layout::Same, dtype, places)?;
        let mut x = g.push(&at("embeddings"), Embedding { positions: true }, &[ids, tokens, positions])?;
        let mut states = vec![x];
        for i in 0..self.layers {
            x = self.layer(g, &at(&format!("encoder.layers.{i}")), x)?;
            states.push(x);
        }
        let last = self.final_norm(g, x)?;
        Ok(Hidden { states, last })
    }

    /// ids (B,T) i32 to `context` (B,T,E) f32, what the UNet attends to. `skip` leaves out that many of the last layers
    /// (the last layer norm stays).
    ///
    /// # Errors
    /// When the prompt is longer than the position table, or there are fewer layers than are skipped.
    pub fn context_graph(&self, b: usize, t: usize, dtype: DType, skip: usize) -> Result<Graph> {
        let mut g = Graph::new();
        let ids = g.input("ids", DType::I32, [b, t]);
        let hidden = self.build(&mut g, ids, dtype)?;
        let context = match skip {
            0 => hidden.last,
            _ => {
                let at = (self.layers.checked_sub(skip)).ok_or_else(|| {
                    Error::invalid(format!("clip skip: want fewer than {} layers; got {skip}", self.layers + 1))
                })?;
                self.final_norm(&mut g, hidden.states[at])?
            }
        };
        let context = cast(&mut g, "context", context, DType::F32, 1.0)?;
        g.output("context", context);
        Ok(g)
    }

    /// ids (B,T) i32 to `hidden_00` … and `last`, (B,T,E) f32 each: for comparison with other engines.
    ///
    /// # Errors
    /// When the prompt is longer than the position table.
    pub fn states_graph(&self, b: usize, t: usize, dtype: DType) -> Result<Graph> {
        let mut g = Graph::new();
        let ids = g.input("ids", DType::I32, [b, t]);
        let hidden = self.build(&mut g, ids, dtype)?;
        for (i, &state) in hidden.states.iter().enumerate() {
            let name = format!("hidden_{i:02}");
            let state = cast(&mut g, &name, state, DType::F32, 1.0)?;
            g.output(&name, state);
        }
        let last = cast(&mut g, "last", hidden.last, DType::F32, 1.0)?;
        g.output("last", last);
        Ok(g)
    }

    /// The layer norm after the last layer, over any hidden state: what `clip skip` feeds to the UNet.
    ///
    /// # Errors
    /// None that a built graph can have.
    pub fn final_norm(&self, g: &mut Graph, x: Var) -> Result<Var> {
        layer_norm(g, "text_model.final_layer_norm", x, self.eps)
    }

    fn layer(&self, g: &mut Graph, at: &str, x: Var) -> Result<Var> {
        let at = |name: &str| join(at, name);
        let n = layer_norm(g, &at("layer_norm1"), x, self.eps)?;
        let mut project = |name: &str, from: Var| linear(g, &at(name), from, self.hidden, true, Act::None);
        let q = project("self_attn.q_proj", n)?;
        let k = project("self_attn.k_proj", n)?;
        let v = project("self_attn.v_proj", n)?;
        let h = attention(g, &at("self_attn.attention"), [q, k, v], self.heads, true)?;
        let h = linear(g, &at("self_attn.out_proj"), h, self.hidden, true, Act::None)?;
        let x = add(g, &at("self_attn.residual"), x, h)?;
        let n = layer_norm(g, &at("layer_norm2"), x, self.eps)?;
        let h = linear(g, &at("mlp.fc1"), n, self.intermediate, true, self.act)?;
        let h = linear(g, &at("mlp.fc2"), h, self.hidden, true, Act::None)?;
        add(g, &at("mlp.residual"), x, h)
    }

    /// Which token of a prompt stands for the whole: the first end of text (in old configurations, which say 2, the
    /// largest id).
    pub fn pooled_token(&self, ids: &[i32]) -> usize {
        let largest = || ids.iter().enumerate().rev().max_by_key(|(_, id)| **id).map_or(0, |(i, _)| i);
        if self.eos == 2 {
            return largest();
        }
        ids.iter().position(|&id| id == self.eos as i32).unwrap_or(0)
    }
}
