//! A model in one safetensors file, with the names of the original code ([`super::compvis`]): what it says of its parts.
//!
//! A file that `ldm` wrote carries the small files of its folder in its header, so nothing has to be guessed. Files of Stable Diffusion
//! carry nothing; what they are is told by a few axes, and then every tensor is checked against that.

use super::compvis::{CONDITION, FIRST_STAGE, Names, OPEN_CLIP, UNET};
use super::texts::Texts;
use super::weights::Checkpoint;
use super::{Config, ModelFolder, clip_vocabulary};
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// What Stable Diffusion's versions are: the presets' data.
const SD15: &str = include_str!("../presets/sd15.json");
const SD21: &str = include_str!("../presets/sd21.json");
const SD21_BASE: &str = include_str!("../presets/sd21-base.json");

/// Before the path of a small file, in the notes of a file that `ldm` wrote.
pub(crate) const NOTE: &str = "ldm.file:";

/// The small files of a component, as diffusers and transformers call them.
pub(crate) const SMALL: [&str; 9] = [
    "config.json",
    "scheduler_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];

/// Which answer of a UNet means what, where a file does not say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// v = alpha * noise - sigma * clean latent (Salimans and Ho 2022).
    V,
}

impl std::str::FromStr for Prediction {
    type Err = Error;
    fn from_str(s: &str) -> Result<Prediction> {
        match &*s.to_ascii_lowercase() {
            "eps" | "epsilon" => Ok(Prediction::Epsilon),
            "v" | "v_prediction" => Ok(Prediction::V),
            _ => Err(Error::invalid(format!("prediction: want eps or v; got `{s}`"))),
        }
    }
}

/// The small files of a folder (`model_index.json`, `unet/config.json`, …), by path, for the model or the autoencoder in a file.
///
/// # Errors
/// [`Error::File`] when it is neither, or of a kind that the engine does not know; as [`Checkpoint::open`].
pub(crate) fn texts(path: &Path, prediction: Option<Prediction>) -> Result<BTreeMap<String, String>> {
    let file = Checkpoint::open(path)?;
    let notes = file.metadata().iter().filter_map(|(k, v)| Some((k.strip_prefix(NOTE)?, v)));
    let held: BTreeMap<String, String> = notes.map(|(k, v)| (k.to_string(), v.clone())).collect();
    if let Some(bad) = held.keys().find(|name| !is_small(name)) {
        let want = "its notes to hold small files such as `unet/config.json`";
        return Err(Error::file(path, format!("want {want}; got `{NOTE}{bad}`: the file is not from ldm")));
    }
    if !held.is_empty() {
        if prediction.is_some() {
            return Err(said_already(path));
        }
        return Ok(held);
    }
    guess(&file, prediction)
}

/// The error for `--prediction` where the model says it.
pub(crate) fn said_already(path: &Path) -> Error {
    let what = "says itself what its UNet predicts: want no --prediction";
    Error::invalid(format!("{}: {what}", path.display()))
}

/// Whether a note is one of a folder's small files: only such may be written to a disk.
fn is_small(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    match name.split_once('/') {
        Some((folder, file)) => !folder.is_empty() && folder.chars().all(plain) && SMALL.contains(&file),
        None => ["model_index.json", "config.json"].contains(&name),
    }
}

const ENCODER: &str = "encoder.conv_in.weight";

/// Whether a file holds an autoencoder and nothing else, with or without the prefix that it has in a whole model.
pub(crate) fn is_autoencoder(file: &Checkpoint) -> bool {
    let has = |prefix: &str| file.entry(&format!("{prefix}{ENCODER}")).is_some();
    let more = file.names().any(|name| name.starts_with(UNET) || name.starts_with(CONDITION));
    (has("") || has(FIRST_STAGE)) && !more && file.entry("conv_in.weight").is_none()
}

/// Without it.
fn is_bare(file: &Checkpoint) -> bool {
    file.entry(ENCODER).is_some()
}

/// Class and configuration of the autoencoder in a file: alone there, or a part of a whole model.
///
/// # Errors
/// As [`ModelFolder::open`], and when the model has none.
pub(crate) fn autoencoder(path: &Path) -> Result<(String, Config)> {
    if is_autoencoder(&Checkpoint::open(path)?) {
        let config = Texts::held(path, Arc::new(texts(path, None)?)).config("config.json")?;
        let class = config.one_of("_class_name", &["AutoencoderKL", "VQModel"], "AutoencoderKL")?.into();
        return Ok((class, config));
    }
    // What the UNet predicts is of no matter here.
    let folder = ModelFolder::open(path)
        .or_else(|e| ModelFolder::open_as(path, Some(Prediction::Epsilon)).map_err(|_| e))?;
    let name = if folder.has("vqvae") { "vqvae" } else { "vae" };
    Ok((folder.component(name)?.class.clone(), folder.config(name)?))
}

/// Its weights, by diffusers' names.
///
/// # Errors
/// As [`autoencoder`].
pub(crate) fn autoencoder_weights(path: &Path) -> Result<Checkpoint> {
    let file = Checkpoint::open(path)?;
    let (class, config) = autoencoder(path)?;
    let names = Names::of(&class, &config, is_bare(&file))?;
    file.renamed(names)
}

fn axis(file: &Checkpoint, name: &str, i: usize) -> Option<usize> {
    file.entry(name)?.shape.get(i).copied()
}

/// What Stable Diffusion's files are, by the width of the context and the channels that the UNet takes.
fn guess(file: &Checkpoint, prediction: Option<Prediction>) -> Result<BTreeMap<String, String>> {
    let path = file.path();
    let wrong = |got: &str| {
        let want = "want a file that ldm wrote, or one of Stable Diffusion 1 or 2";
        Error::file(path, format!("{want}; got {got}; make a folder of it with diffusers, which is read too"))
    };
    let has = |start: &str| file.names().any(|name| name.starts_with(start));
    if ["decoder.up_blocks.", "conv_in.", "text_model."].iter().any(|start| has(start)) {
        return Err(wrong("the weights of one part of a folder: give the folder"));
    }
    let note = |key: &str| file.metadata().get(key).map(String::as_str).unwrap_or_default();
    let architecture = note("modelspec.architecture");
    if is_autoencoder(file) {
        let at = if is_bare(file) { "" } else { FIRST_STAGE };
        let there = |name: &str| file.entry(&format!("{at}{name}")).is_some();
        let is_sd = axis(file, &format!("{at}post_quant_conv.weight"), 0) == Some(4)
            && there("decoder.up.3.upsample.conv.weight")
            && !there("quantize.embedding.weight");
        // Its shapes are the same, its scale is not.
        if !is_sd || architecture.contains("-xl-") {
            return Err(wrong("an autoencoder that is not Stable Diffusion's, without its configuration"));
        }
        return Ok(BTreeMap::from([("config.json".into(), pretty(&version(path, SD15)?["vae"]))]));
    }
    if has("conditioner.embedders.") {
        return Err(wrong("a model of SDXL's kind"));
    }
    if has("model.diffusion_model.double_blocks.") || has("model.diffusion_model.joint_blocks.") {
        return Err(wrong("a transformer in place of the UNet (Flux or Stable Diffusion 3)"));
    }
    if has("lora_") || file.names().any(|n| n.contains(".lora_")) {
        return Err(wrong("a LoRA, which is no model by itself"));
    }
    let first = format!("{UNET}input_blocks.0.0.weight");
    let Some(channels) = axis(file, &first, 1) else {
        return Err(wrong(&format!("{} tensors, but no `{first}`", file.len())));
    };
    for (start, what) in [(FIRST_STAGE, "an autoencoder"), (CONDITION, "a text encoder")] {
        if !has(start) {
            let whole = "want a file with a whole model";
            return Err(Error::file(
                path,
                format!("{whole}; got one without {what} (`{start}…`): take the full file"),
            ));
        }
    }
    let context = axis(file, &format!("{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"), 1);
    if file.entry("ztsnr").is_some() {
        return Err(wrong("a model for a noise schedule that ends in pure noise (`ztsnr`)"));
    }
    let said = prediction.or_else(|| {
        let words = [note("modelspec.prediction_type"), note("modelspec.predict_key")];
        let said = words.iter().find_map(|word| word.parse().ok());
        said.or(match (note("ss_v_parameterization"), architecture) {
            _ if file.entry("v_pred").is_some() => Some(Prediction::V),
            ("True", _) | (_, "stable-diffusion-v2-768-v") => Some(Prediction::V),
            ("False", _) | (_, "stable-diffusion-v2-512") => Some(Prediction::Epsilon),
            // The only one that there is.
            _ if channels == 9 => Some(Prediction::Epsilon),
            _ => None,
        })
    });
    let text = match (context, said) {
        (Some(768), _) => SD15,
        (Some(1024), Some(Prediction::V)) => SD21,
        (Some(1024), Some(Prediction::Epsilon)) => SD21_BASE,
        (Some(1024), None) => {
            let why = "its shapes are those of Stable Diffusion 2, and nothing in it says whether the UNet predicts v (768 pixels) or noise (512 pixels)";
            let how = "say it: --prediction v, or --prediction eps (`ldm convert` takes it too, and what it writes says it)";
            return Err(Error::file(path, format!("{why}; {how}")));
        }
        (Some(n), _) => return Err(wrong(&format!("a UNet with a context of width {n} (want 768 or 1024)"))),
        (None, _) => return Err(wrong("a UNet without a context, and without its configuration")),
    };
    let mut parts = version(path, text)?;
    if text == SD21 {
        // In f16 others have black pictures without.
        parts["unet"]["upcast_attention"] = json!(true);
    }
    let class = match channels {
        4 => "StableDiffusionPipeline",
        9 => "StableDiffusionInpaintPipeline",
        n => return Err(wrong(&format!("a UNet that takes {n} channels (want 4 or 9)"))),
    };
    let open_clip = has(OPEN_CLIP);
    if open_clip != (context == Some(1024)) {
        return Err(wrong("a text encoder of another version than the UNet"));
    }

    if said == Some(Prediction::V) {
        parts["scheduler"]["prediction_type"] = json!("v_prediction");
    }
    parts["unet"]["in_channels"] = json!(channels);
    let index = json!({
        "_class_name": class,
        // diffusers loads no inpainting pipeline without.
        "_diffusers_version": "0.37.1",
        "scheduler": ["diffusers", parts["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    });
    let mut all = BTreeMap::from([("model_index.json".to_string(), pretty(&index))]);
    for (name, config) in [
        ("scheduler", "scheduler_config.json"),
        ("text_encoder", "config.json"),
        ("unet", "config.json"),
        ("vae", "config.json"),
    ] {
        all.insert(format!("{name}/{config}"), pretty(&parts[name]));
    }
    let pad = if open_clip { "!" } else { "<|endoftext|>" };
    all.extend(
        clip_vocabulary::texts(pad).into_iter().map(|(name, text)| (format!("tokenizer/{name}"), text)),
    );
    Ok(all)
}

/// JSON as it is written to files.
pub(crate) fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}

/// The parts of a version of Stable Diffusion.
fn version(path: &Path, text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|e| Error::file(path, e))
}
