//! What a run has made as the parts of a diffusers folder.

use super::first_stage::DISCRIMINATOR;
use super::settings::Settings;
use super::step::Trainer;
use crate::error::{Error, Result};
use crate::io::{Checkpoint, atomic, weights};
use crate::models::load::is_convolution;
use crate::tensor::{DType, HostTensor};
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// Makes a folder.
pub(super) fn folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::file(path, format!("cannot be made: {e}")))
}

/// Writes a JSON file.
pub(super) fn json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::file(path, e))? + "\n";
    atomic::write(path, text.as_bytes())
}

/// What transformers wants to read in a file of weights.
fn notes() -> Option<HashMap<String, String>> {
    Some(HashMap::from([("format".to_string(), "pt".to_string())]))
}

/// Writes configuration and weights of a part of the graph ("" for all of it but a discriminator): the average where one is
/// kept.
pub(super) fn component(
    path: &Path,
    stem: &str,
    config: &Value,
    trainer: &Trainer,
    part: &str,
    s: &Settings,
) -> Result<()> {
    folder(path)?;
    let prefix = if part.is_empty() { String::new() } else { format!("{part}.") };
    let linear = config["use_linear_projection"] == true;
    let mut own = vec![];
    let judge = format!("{DISCRIMINATOR}.");
    let all = trainer.export(s.average.is_some())?;
    for (name, value) in all.into_iter().filter(|(name, _)| !name.starts_with(&judge)) {
        let Some(name) = name.strip_prefix(&prefix) else { continue };
        let shape = value.shape();
        let value = match shape[..] {
            [o, i] if is_convolution(name, linear) => value.reshape([o, i, 1, 1])?,
            _ => value,
        };
        own.push((name.to_string(), value.to(s.export)));
    }
    weights::save(path.join(format!("{stem}.safetensors")), &own, notes())?;
    json(&path.join("config.json"), config)
}

/// Writes a component that is not trained, with another configuration, and each tensor (f32) as `change` makes it by its name.
pub(super) fn copied(
    checkpoint: &Checkpoint,
    (to, stem): (&Path, &str),
    config: &Value,
    dtype: DType,
    change: impl Fn(&str, HostTensor) -> Result<HostTensor>,
) -> Result<()> {
    folder(to)?;
    let file = to.join(format!("{stem}.safetensors"));
    // Whole numbers are constants that older versions stored.
    let all = checkpoint
        .names()
        .filter(|name| !checkpoint.is_integer(name))
        .map(|name| Ok((name.to_string(), change(name, checkpoint.read(name, DType::F32)?)?.to(dtype))));
    weights::save(&file, &all.collect::<Result<Vec<_>>>()?, notes())?;
    json(&to.join("config.json"), config)
}
