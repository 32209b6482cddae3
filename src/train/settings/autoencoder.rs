//! The sections that only runs of an autoencoder have.

use super::{AutoencoderSettings, completed, distance, in_section, levels, section, within};
use crate::error::Result;
use crate::io::{Checkpoint, Config};
use crate::models::{AutoencoderKL, Model, NLayerDiscriminator, PatchNorm, VQModel};
use crate::pipeline::Vae;
use crate::train::{Adversary, Codebook, FirstStageLoss, Gan, PerceptualTerm};
use serde_json::{Value, json};
use std::path::PathBuf;

pub(super) fn read(c: &Config, size: usize) -> Result<AutoencoderSettings> {
    let (model, config) = model(c, size)?;
    let codec = model.codec();
    if (codec.in_channels, codec.out_channels) != (3, 3) {
        let read = Config::from_value(c.file(), config)?;
        return in_section(Err(read.error("in_channels", "3, for RGB, as out_channels")), "model");
    }
    let f = codec.factor();
    if size % f != 0 {
        return Err(c.error(
            "data",
            format!("a size that is a multiple of {f}, by model.block_out_channels; it is {size}"),
        ));
    }
    let initial_deviation = initial_deviation(c, &model, &config)?;
    let (loss, lpips) = loss(c, &model, size)?;
    Ok(AutoencoderSettings { model, config, initial_deviation, loss, lpips })
}

/// The model, and its configuration with what was left out.
fn model(c: &Config, size: usize) -> Result<(Vae, Value)> {
    let channels = levels(c, "model", &[32, 64, 64])?;
    let n = channels.len();
    let class = match c.section("model")? {
        Some(m) => m.one_of("_class_name", &["AutoencoderKL", "VQModel"], "AutoencoderKL")?,
        None => "AutoencoderKL",
    };
    let mut defaults = json!({
        "_class_name": class, "in_channels": 3, "out_channels": 3,
        "down_block_types": vec!["DownEncoderBlock2D"; n], "up_block_types": vec!["UpDecoderBlock2D"; n],
        "block_out_channels": channels, "layers_per_block": 1, "act_fn": "silu", "latent_channels": 4,
        "norm_num_groups": groups(&channels), "sample_size": size, "scaling_factor": 1.0, "force_upcast": false,
    });
    if class == "VQModel" {
        defaults["latent_channels"] = json!(3);
        defaults["num_vq_embeddings"] = json!(256);
        defaults["norm_type"] = json!("group");
    }
    let mut config = completed(c, "model", defaults)?;
    if class == "VQModel" && config.get("vq_embed_dim").is_none() {
        config["vq_embed_dim"] = config["latent_channels"].clone();
    }
    let read = Config::from_value(c.file(), config.clone())?;
    let model = match class {
        "VQModel" => Vae::Vq(in_section(VQModel::from_config(&read), "model")?),
        _ => Vae::Kl(in_section(AutoencoderKL::from_config(&read), "model")?),
    };
    Ok((model, config))
}

/// The deviation of draws at the start, where one is asked for.
fn initial_deviation(c: &Config, model: &Vae, config: &Value) -> Result<Option<f64>> {
    let Some(loss) = c.section("loss")? else { return Ok(None) };
    let deviation = loss.opt_f64("initial_deviation")?;
    if deviation.is_some_and(|d| !(1e-6..=1e3).contains(&d)) {
        return Err(loss.error("initial_deviation", "a number from 1e-6 to 1000, or no such key"));
    }
    let drawn = matches!(model, Vae::Kl(_)) && config["use_quant_conv"] != false;
    if deviation.is_some() && !drawn {
        let want = "an AutoencoderKL with use_quant_conv, whose layer says the deviation of its draws";
        return Err(loss.error("initial_deviation", want));
    }
    Ok(deviation)
}

/// Groups of the norms: at most 32, and at least 4 channels in each where widths allow it. Of single channels a norm would take
/// how bright a picture is.
fn groups(channels: &[usize]) -> usize {
    let fits = |g: &usize| channels.iter().all(|c| c % g == 0 && c / g >= 4);
    (1..=32).rev().find(fits).unwrap_or(1)
}

/// The loss, and the file with the weights of its perceptual term.
fn loss(c: &Config, model: &Vae, size: usize) -> Result<(FirstStageLoss, Option<PathBuf>)> {
    let keys =
        ["distance", "huber_delta", "kl_weight", "initial_deviation", "codebook", "lpips", "discriminator"];
    let loss = section(c, "loss", &keys)?;
    let (key, none) = match model {
        Vae::Kl(_) => ("codebook", "no such key: an AutoencoderKL has no codebook"),
        Vae::Vq(_) => ("kl_weight", "no such key: the code of a VQModel has no divergence"),
    };
    if loss.has(key) {
        return Err(loss.error(key, none));
    }
    let lpips = section(&loss, "lpips", &["file", "weight"])?;
    let file = if loss.has("lpips") { Some(PathBuf::from(lpips.str("file")?)) } else { None };
    let weight = within(&lpips, "weight", 1.0, 0.0, 1e6)?;
    let perceptual = file.as_ref().map(|file| {
        let term = Checkpoint::open(file).and_then(|file| PerceptualTerm::of(&file, weight));
        term.map_err(|e| lpips.error("file", format!("a safetensors file with the weights of LPIPS ({e})")))
    });
    let book = section(&loss, "codebook", &["weight", "beta", "legacy"])?;
    let loss = FirstStageLoss {
        distance: distance(&loss, "l1")?,
        kl_weight: within(&loss, "kl_weight", 1e-6, 0.0, 1e6)?,
        means: true,
        perceptual: perceptual.transpose()?,
        codebook: Codebook {
            weight: within(&book, "weight", 1.0, 0.0, 1e6)?,
            beta: within(&book, "beta", 0.25, 0.0, 1e6)?,
            legacy: book.bool_or("legacy", true)?,
        },
        adversary: if loss.has("discriminator") { Some(adversary(&loss, size)?) } else { None },
    };
    Ok((loss, file))
}

fn adversary(loss: &Config, size: usize) -> Result<Adversary> {
    let d =
        section(loss, "discriminator", &["kind", "weight", "factor", "start", "width", "layers", "norm"])?;
    let (default, whole) = (NLayerDiscriminator::default(), 1..=1 << 12);
    let (width, layers) = (d.usize_or("width", default.width)?, d.usize_or("layers", default.layers)?);
    if !whole.contains(&width) {
        return Err(d.error("width", "1 to 4096 channels"));
    }
    // The side of the smallest patch that is judged.
    let least = 3usize.checked_shl(layers.min(63) as u32).unwrap_or(usize::MAX);
    if layers == 0 || least > size {
        let want = format!(
            "at least 1, and few enough for pictures of {size} pixels: n layers want 3 · 2^n of them"
        );
        return Err(d.error("layers", want));
    }
    Ok(Adversary {
        model: NLayerDiscriminator {
            width,
            layers,
            norm: match d.one_of("norm", &["batch", "actnorm"], "batch")? {
                "actnorm" => PatchNorm::Act,
                _ => PatchNorm::Batch,
            },
            ..default
        },
        kind: match d.one_of("kind", &["hinge", "vanilla"], "hinge")? {
            "vanilla" => Gan::Vanilla,
            _ => Gan::Hinge,
        },
        weight: within(&d, "weight", 0.5, 0.0, 1e6)?,
        factor: within(&d, "factor", 1.0, 0.0, 1e6)?,
        start: d.usize_or("start", 0)?,
    })
}
