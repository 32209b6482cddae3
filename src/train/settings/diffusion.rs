//! The sections that only runs of a diffusion model have.

use super::{
    DataSettings, DiffusionSettings, completed, condition, distance, in_section, levels, section, within,
};
use crate::error::Result;
use crate::io::Config;
use crate::models::{Model, UNet2D, UNet2DCondition};
use crate::samplers::ScheduleConfig;
use crate::train::frozen::FirstStage;
use crate::train::{Concatenated, Conditioned, Objective};
use serde_json::json;

pub(super) fn read(c: &Config, data: &DataSettings) -> Result<DiffusionSettings> {
    let size = data.size;
    let conditioning = section(c, "conditioning", &["kind", "drop", "concat"])?;
    let (condition, width, setting) = condition::read(c, &conditioning, data)?;
    let concat = condition::concatenated(&conditioning, &condition)?;
    let models = section(c, "model", &["unet", "text_encoder", "class_embedder"])?;
    let stage = section(c, "first_stage", &["path", "cache", "scaling_factor"])?;
    let first = FirstStage::read(&stage)?;
    let (z, f) = (first.channels(), first.factor());
    if concat == Some(Concatenated::Mask) && stage.bool_or("cache", false)? {
        let want =
            "false, or no such key: with masks, pictures are other ones at each step, and are encoded then";
        return Err(stage.error("cache", want));
    }
    let (wide, channels_in) = match concat {
        None => (z, format!("the first stage's {z} channels")),
        Some(kind) => {
            let wide = z + kind.channels(z);
            (
                wide,
                format!(
                    "{wide}: the first stage's {z} channels, and {} more by conditioning.concat",
                    kind.channels(z)
                ),
            )
        }
    };
    if size % f != 0 {
        return Err(
            c.error("data", format!("a size that is a multiple of {f}, by the first stage; it is {size}"))
        );
    }
    let channels = levels(&models, "unet", &[64, 128])?;
    let n = channels.len();
    let attends = |i: usize| i + 1 == n || i > 0;
    // A UNet without a condition has other blocks, and is of another class.
    let (class, prefix) = match condition {
        Conditioned::Nothing => ("UNet2DModel", "Attn"),
        _ => ("UNet2DConditionModel", "CrossAttn"),
    };
    let block = |i: usize, way: &str| format!("{}{way}Block2D", if attends(i) { prefix } else { "" });
    let down: Vec<_> = (0..n).map(|i| block(i, "Down")).collect();
    let up: Vec<_> = (0..n).rev().map(|i| block(i, "Up")).collect();
    let mut defaults = json!({
        "_class_name": class, "sample_size": size / f, "in_channels": wide, "out_channels": z,
        "down_block_types": down, "up_block_types": up, "block_out_channels": channels, "layers_per_block": 1,
        "norm_num_groups": 32, "act_fn": "silu", "flip_sin_to_cos": true, "freq_shift": 0,
    });
    // The number of heads of the one, their width of the other.
    let heads = if width == 0 { 8 } else { 4 };
    defaults["attention_head_dim"] = json!(heads);
    if width > 0 {
        defaults["cross_attention_dim"] = json!(width);
    }
    let unet_config = completed(&models, "unet", defaults)?;
    let read = Config::from_value(c.file(), unet_config.clone())?;
    let unet = match condition {
        Conditioned::Nothing => UNet2D::from_config(&read).map(UNet2DCondition::from),
        _ => UNet2DCondition::from_config(&read),
    };
    let unet = in_section(unet, "model.unet")?;
    let wrong =
        |key: &str, want: String| in_section::<()>(Err(read.error(key, want)), "model.unet").unwrap_err();
    if unet.in_channels != wide {
        return Err(wrong("in_channels", channels_in));
    }
    if unet.out_channels != z {
        return Err(wrong("out_channels", format!("the first stage's {z} channels")));
    }
    if unet.context != width {
        return Err(wrong("cross_attention_dim", format!("{setting} {width}")));
    }
    let m = f * unet.multiple();
    if size % m != 0 {
        return Err(c.error(
            "data",
            format!("a size that is a multiple of {m}, by first stage and UNet; it is {size}"),
        ));
    }
    let loss = section(c, "loss", &["distance", "huber_delta", "snr_gamma", "noise_offset"])?;
    let schedule_config = completed(
        c,
        "scheduler",
        json!({
            "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
            "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon", "clip_sample": false,
            "set_alpha_to_one": false, "steps_offset": 1, "timestep_spacing": "leading",
        }),
    )?;
    let schedule = in_section(ScheduleConfig::from_json(&schedule_config, c.file()), "scheduler")?;
    schedule.alphas_cumprod()?;
    let snr_gamma = loss.opt_f64("snr_gamma")?;
    if snr_gamma.is_some_and(|g| !(g > 0.0)) {
        return Err(loss.error("snr_gamma", "a number above 0 (5 is usual), or no such key"));
    }
    let objective = Objective {
        output: schedule.output,
        distance: distance(&loss, "l2")?,
        snr_gamma,
        noise_offset: within(&loss, "noise_offset", 0.0, 0.0, 1.0)?,
    };
    let drop = within(&conditioning, "drop", 0.1, 0.0, 1.0)?;
    Ok(DiffusionSettings {
        unet,
        unet_config,
        condition,
        concat,
        first,
        cache: stage.bool_or("cache", concat != Some(Concatenated::Mask))?,
        schedule,
        schedule_config,
        objective,
        drop,
    })
}
