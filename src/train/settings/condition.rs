//! What a diffusion run is conditioned on.

use super::{DataSettings, completed, in_section, section};
use crate::error::Result;
use crate::io::{Config, wordpiece};
use crate::models::{ClipText, Conditioner, LdmBert, Model};
use crate::train::Concatenated;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Which text encoder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TextKind {
    /// CLIP's, with a byte-level vocabulary.
    Clip,
    /// The one of Rombach et al. 2022, with BERT's vocabulary.
    Bert,
}

impl TextKind {
    /// The model of a configuration.
    ///
    /// # Errors
    /// When it is not understood.
    pub(in crate::train) fn model(self, config: &Config) -> Result<Conditioner> {
        Ok(match self {
            TextKind::Clip => Conditioner::Clip(ClipText::from_config(config)?),
            TextKind::Bert => Conditioner::Bert(LdmBert::from_config(config)?),
        })
    }

    /// What a configuration of such a model has beside the settings.
    fn defaults(self) -> Value {
        match self {
            TextKind::Clip => json!({
                "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 64,
                "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                "max_position_embeddings": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
            }),
            // diffusers' pipeline gives it 77 tokens always.
            TextKind::Bert => json!({
                "architectures": ["LDMBertModel"], "model_type": "ldmbert", "d_model": 64,
                "encoder_layers": 2, "encoder_attention_heads": 4, "head_dim": 16, "encoder_ffn_dim": 256,
                "max_position_embeddings": 77, "activation_function": "gelu",
            }),
        }
    }

    /// Fewest tokens of a vocabulary, and why.
    fn least(self) -> (usize, &'static str) {
        match self {
            TextKind::Clip => (514, "256 bytes, each inside and at the end of a word, and two more"),
            TextKind::Bert => (wordpiece::LEAST, "the characters of ASCII, and five with a task"),
        }
    }
}

/// A text encoder that has been trained before.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GivenEncoder {
    /// The folder of its weights.
    pub path: PathBuf,
    /// That of its tokenizer.
    pub tokenizer: PathBuf,
    /// Whether it is trained further; else it stays as it is.
    pub train: bool,
}

/// What a diffusion model is conditioned on.
#[derive(Clone, PartialEq, Debug)]
pub enum Conditioned {
    /// Captions.
    Captions {
        /// The text encoder's kind.
        kind: TextKind,
        /// Its `config.json`; of one that begins anew, without what the tokenizer says.
        config: Value,
        /// Most tokens of a vocabulary that is learnt.
        vocabulary: usize,
        /// A text encoder to begin with.
        given: Option<GivenEncoder>,
    },
    /// Nothing.
    Nothing,
    /// Classes, with a null class.
    Classes {
        /// Of a row of the table.
        width: usize,
    },
}

/// The condition, the width of its context, and the setting that says this width.
pub(super) fn read(
    c: &Config,
    conditioning: &Config,
    data: &DataSettings,
) -> Result<(Conditioned, usize, String)> {
    let kind = conditioning.one_of("kind", &["text", "bert", "class", "none"], "text")?;
    let part = match kind {
        "class" => "class_embedder",
        "none" => "unet",
        _ => "text_encoder",
    };
    // Settings of the other kinds would have no effect.
    let models = section(c, "model", &["unet", part])?;
    if ["class", "none"].contains(&kind) && c.has("tokenizer") {
        return Err(c.error("tokenizer", format!("no such section where conditioning.kind is {kind}")));
    }
    match kind {
        "class" => return classes(&models, conditioning, data),
        "none" if conditioning.has("drop") => {
            return Err(conditioning.error("drop", "no such key without a condition to leave out"));
        }
        "none" => return Ok((Conditioned::Nothing, 0, String::new())),
        _ => {}
    }
    let kind = if kind == "bert" { TextKind::Bert } else { TextKind::Clip };
    if let Some(own) = models.section(part)?.filter(|own| own.has("path")) {
        if c.has("tokenizer") {
            return Err(c.error("tokenizer", "no such section where model.text_encoder.path brings its own"));
        }
        return given(&own, kind);
    }
    let config = completed(&models, part, kind.defaults())?;
    if config.get("vocab_size").is_some() {
        return Err(
            models.error(part, "no vocab_size: it is that of the tokenizer (see tokenizer.vocab_size)")
        );
    }
    let mut tried = config.clone();
    tried["vocab_size"] = json!(1000);
    let text = in_section(kind.model(&Config::from_value(c.file(), tried)?), "model.text_encoder")?;
    if text.tokens() < 3 {
        return Err(models.error(part, "max_position_embeddings of at least 3"));
    }
    let tokenizer = section(c, "tokenizer", &["vocab_size"])?;
    let vocabulary = tokenizer.usize_or("vocab_size", 1000)?;
    let (least, why) = kind.least();
    if vocabulary < least {
        return Err(tokenizer.error("vocab_size", format!("at least {least}: {why}")));
    }
    let (width, key) = text.width();
    Ok((
        Conditioned::Captions { kind, config, vocabulary, given: None },
        width,
        format!("model.text_encoder.{key}"),
    ))
}

/// A text encoder from a folder: its own, that of a pipeline, or that of a run.
fn given(own: &Config, kind: TextKind) -> Result<(Conditioned, usize, String)> {
    own.only(&["path", "train"])?;
    let given = Path::new(own.str("path")?);
    let places = ["text_encoder", "bert", "export/text_encoder", "export/bert"].map(|p| given.join(p));
    let found = places.into_iter().chain([given.into()]).find(|p| p.join("config.json").is_file());
    let words =
        |p: &PathBuf| ["vocab.json", "vocab.txt", "tokenizer.json"].iter().any(|f| p.join(f).is_file());
    let beside = |p: &PathBuf| [p.with_file_name("tokenizer"), p.clone()].into_iter().find(words);
    let Some((path, tokenizer)) = found.and_then(|p| Some((p.clone(), beside(&p)?))) else {
        return Err(own.error(
            "path",
            "the folder of a text encoder with its tokenizer in it or beside it, of a pipeline, or of a run (of a single file, ldm convert makes one)",
        ));
    };
    let config = Config::read(path.join("config.json"))?;
    let class = config.get("architectures").and_then(|v| v.get(0)?.as_str()).unwrap_or("");
    let (classes, setting) = match kind {
        TextKind::Clip => (ClipText::CLASSES, "text"),
        TextKind::Bert => (LdmBert::CLASSES, "bert"),
    };
    if !classes.contains(&class) {
        let want = format!("{}, as conditioning.kind is {setting}", classes.join(" or "));
        return Err(config.error("architectures", want));
    }
    let model = kind.model(&config)?;
    let all = config.keys().map(|k| (k.to_string(), config.get(k).cloned().unwrap_or(Value::Null)));
    let (config, train) = (Value::Object(all.collect()), own.bool_or("train", false)?);
    let given = Some(GivenEncoder { path, tokenizer, train });
    let (width, key) = model.width();
    Ok((
        Conditioned::Captions { kind, config, vocabulary: 0, given },
        width,
        format!("the text encoder's {key}"),
    ))
}

/// What stands beside the noisy latents, where there is a pipeline for both; or as in the paper's inpainting, masks alone.
pub(super) fn concatenated(conditioning: &Config, condition: &Conditioned) -> Result<Option<Concatenated>> {
    if !conditioning.has("concat") {
        return Ok(None);
    }
    let kind = match condition {
        Conditioned::Captions { kind: TextKind::Clip, .. } => "text",
        Conditioned::Captions { kind: TextKind::Bert, .. } => "bert",
        Conditioned::Classes { .. } => "class",
        Conditioned::Nothing => "none",
    };
    let (found, with) = match conditioning.one_of("concat", &["mask", "low_res"], "mask")? {
        "low_res" => (Concatenated::LowResolution, &["none"][..]),
        _ => (Concatenated::Mask, &["text", "class", "none"][..]),
    };
    if with.contains(&kind) {
        return Ok(Some(found));
    }
    Err(conditioning.error(
        "concat",
        format!(
            "no such value where conditioning.kind is {kind}, as no pipeline takes both: mask goes with text, class or none, low_res with none"
        ),
    ))
}

fn classes(
    models: &Config,
    conditioning: &Config,
    data: &DataSettings,
) -> Result<(Conditioned, usize, String)> {
    if data.folder.is_none() && data.objects != Some(1) {
        return Err(conditioning.error(
            "kind",
            "scenes of one object, so that one class can stand for the whole picture (data.objects=1)",
        ));
    }
    let table = match models.section("class_embedder")? {
        Some(table) => table,
        None => Config::from_value(models.file(), json!({}))?,
    };
    table.only(&["embed_dim"])?;
    let width = table.usize_or("embed_dim", 64)?;
    if width == 0 {
        return Err(table.error("embed_dim", "at least 1"));
    }
    Ok((Conditioned::Classes { width }, width, "model.class_embedder.embed_dim".into()))
}
