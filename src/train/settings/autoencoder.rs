//! The sections that only runs of an autoencoder have.

use super::{AutoencoderSettings, completed, distance, in_section, levels, section, within};
use crate::error::Result;
use crate::io::Config;
use crate::models::{AutoencoderKL, Model};
use serde_json::json;

pub(super) fn read(c: &Config, size: usize) -> Result<AutoencoderSettings> {
    let channels = levels(c, "model", &[32, 64, 64])?;
    let n = channels.len();
    let config = completed(
        c,
        "model",
        json!({
            "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
            "down_block_types": vec!["DownEncoderBlock2D"; n], "up_block_types": vec!["UpDecoderBlock2D"; n],
            "block_out_channels": channels, "layers_per_block": 1, "act_fn": "silu", "latent_channels": 4,
            "norm_num_groups": 32, "sample_size": size, "scaling_factor": 1.0, "force_upcast": false,
        }),
    )?;
    let read = Config::from_value(c.file(), config.clone())?;
    let model = in_section(AutoencoderKL::from_config(&read), "model")?;
    if (model.codec.in_channels, model.codec.out_channels) != (3, 3) {
        return Err(in_section::<()>(Err(read.error("in_channels", "3, for RGB, as out_channels")), "model")
            .unwrap_err());
    }
    let f = model.codec.factor();
    if size % f != 0 {
        return Err(c.error(
            "data",
            format!("a size that is a multiple of {f}, by model.block_out_channels; it is {size}"),
        ));
    }
    let loss = section(c, "loss", &["distance", "huber_delta", "kl_weight", "initial_deviation"])?;
    let initial_deviation = loss.opt_f64("initial_deviation")?;
    if initial_deviation.is_some_and(|d| !(1e-6..=1e3).contains(&d)) {
        return Err(loss.error("initial_deviation", "a number from 1e-6 to 1000, or no such key"));
    }
    if initial_deviation.is_some() && !read.bool_or("use_quant_conv", true)? {
        return Err(
            loss.error("initial_deviation", "a model with use_quant_conv = true, whose layer says it")
        );
    }
    Ok(AutoencoderSettings {
        model,
        config,
        distance: distance(&loss, "l1")?,
        kl_weight: within(&loss, "kl_weight", 1e-6, 0.0, 1e6)?,
        initial_deviation,
    })
}
