//! The text encoder of the text-to-image model of 2022: Rombach et al. 2022, appendix E.2.1, CompVis `BERTEmbedder`.
//!
//! Token and position embeddings, pre-norm transformer layers in which every token attends to every other one (padding too:
//! there is no mask), a last layer norm. Heads have a width of their own. diffusers `LDMBertModel`.

use super::{MAX_LAYERS, Model};
use crate::error::Result;
use crate::graph::{Graph, Layout, Var};
use crate::io::Config;
use crate::io::config::TRANSFORMERS_KEYS;
use crate::nn::{add, attention, cast, join, layer_norm, linear};
use crate::ops::{Act, Embedding};
use crate::tensor::DType;

/// A text encoder of that form.
#[derive(Clone, PartialEq, Debug)]
pub struct LdmBert {
    /// Width of the tokens.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Longest prompt, in tokens.
    pub positions: usize,
    /// Tokens that it knows.
    pub vocabulary: usize,
    heads: usize,
    head: usize,
    feed_forward: usize,
    act: Act,
}

/// Of its layer norms: PyTorch's own.
const EPS: f64 = 1e-5;

impl Model for LdmBert {
    const CLASSES: &'static [&'static str] = &["LDMBertModel"];

    fn from_config(c: &Config) -> Result<LdmBert> {
        let own = [
            "vocab_size",
            "max_position_embeddings",
            "encoder_layers",
            "num_hidden_layers",
            "encoder_ffn_dim",
            "encoder_attention_heads",
            "head_dim",
            "d_model",
            "activation_function",
            "scale_embedding",
            "model_type",
            // Of training.
            "encoder_layerdrop",
            "activation_dropout",
            "classifier_dropout",
            "init_std",
        ];
        c.only(&[&own[..], TRANSFORMERS_KEYS].concat())?;
        // diffusers reads it and does nothing with it.
        c.neutral("scale_embedding", &[false])?;
        let act = match c.one_of("activation_function", &["gelu", "gelu_new"], "gelu")? {
            "gelu" => Act::Gelu,
            _ => Act::GeluTanh,
        };
        let model = LdmBert {
            hidden: c.usize_or("d_model", 1280)?,
            layers: c.usize_or("encoder_layers", 32)?,
            positions: c.usize_or("max_position_embeddings", 77)?,
            vocabulary: c.usize_or("vocab_size", 30522)?,
            heads: c.usize_or("encoder_attention_heads", 8)?,
            head: c.usize_or("head_dim", 64)?,
            feed_forward: c.usize_or("encoder_ffn_dim", 5120)?,
            act,
        };
        if model.layers > MAX_LAYERS {
            return Err(c.error("encoder_layers", format!("at most {MAX_LAYERS}")));
        }
        let sizes = [
            ("d_model", model.hidden),
            ("encoder_attention_heads", model.heads),
            ("head_dim", model.head),
            ("encoder_ffn_dim", model.feed_forward),
            ("max_position_embeddings", model.positions),
            ("vocab_size", model.vocabulary),
        ];
        match sizes.iter().find(|(_, n)| *n == 0) {
            Some((key, _)) => Err(c.error(key, "at least 1")),
            None => Ok(model),
        }
    }

    fn inventory(&self, dtype: DType) -> Result<Vec<Graph>> {
        let mut g = Graph::new();
        let ids = g.input("ids", DType::I32, [1, 1]);
        self.build(&mut g, ids, dtype)?;
        Ok(vec![g])
    }
}

impl LdmBert {
    /// ids (B,T) i32 to the embeddings and the output of each layer, and what the last layer norm makes of the last: (B,T,E) each.
    ///
    /// # Errors
    /// When T is longer than the position table.
    pub fn build(&self, g: &mut Graph, ids: Var, dtype: DType) -> Result<(Vec<Var>, Var)> {
        let at = |name: &str| join("model", name);
        let table = [self.vocabulary, self.hidden];
        let tokens = g.weight(&at("embed_tokens.weight"), Layout::Same, dtype, table)?;
        let places = [self.positions, self.hidden];
        let positions = g.weight(&at("embed_positions.weight"), Layout::Same, dtype, places)?;
        let mut x = g.push(&at("embeddings"), Embedding { positions: true }, &[ids, tokens, positions])?;
        let mut states = vec![x];
        for i in 0..self.layers {
            x = self.layer(g, &at(&format!("layers.{i}")), x)?;
            states.push(x);
        }
        let last = layer_norm(g, &at("layer_norm"), x, EPS)?;
        Ok((states, last))
    }

    /// ids (B,T) i32 to `hidden_00` … and `last`, (B,T,E) f32 each: for comparison with other engines.
    ///
    /// # Errors
    /// When T is longer than the position table.
    pub fn states_graph(&self, b: usize, t: usize, dtype: DType) -> Result<Graph> {
        let mut g = Graph::new();
        let ids = g.input("ids", DType::I32, [b, t]);
        let (states, last) = self.build(&mut g, ids, dtype)?;
        let named = states.into_iter().enumerate().map(|(i, state)| (format!("hidden_{i:02}"), state));
        for (name, state) in named.chain([("last".to_string(), last)]) {
            let state = cast(&mut g, &name, state, DType::F32, 1.0)?;
            g.output(&name, state);
        }
        Ok(g)
    }

    fn layer(&self, g: &mut Graph, at: &str, x: Var) -> Result<Var> {
        let at = |name: &str| join(at, name);
        let inner = self.heads * self.head;
        let n = layer_norm(g, &at("self_attn_layer_norm"), x, EPS)?;
        let mut project = |name: &str| linear(g, &at(name), n, inner, false, Act::None);
        let qkv = [project("self_attn.q_proj")?, project("self_attn.k_proj")?, project("self_attn.v_proj")?];
        let h = attention(g, &at("self_attn.attention"), qkv, self.heads, false)?;
        let h = linear(g, &at("self_attn.out_proj"), h, self.hidden, true, Act::None)?;
        let x = add(g, &at("self_attn.residual"), x, h)?;
        let n = layer_norm(g, &at("final_layer_norm"), x, EPS)?;
        let h = linear(g, &at("fc1"), n, self.feed_forward, true, self.act)?;
        let h = linear(g, &at("fc2"), h, self.hidden, true, Act::None)?;
        add(g, &at("residual"), x, h)
    }
}
