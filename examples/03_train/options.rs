//! The command line.

use ldm::exec::DeviceName;
use ldm::io::Config;
use ldm::models::{AnyModel, UNet2DCondition};
use ldm::presets::Preset;
use ldm::tensor::DType;
use ldm::{Error, Result};
use std::path::PathBuf;
use std::str::FromStr;

pub struct Options {
    /// What it is called in the report, and the UNet.
    pub name: String,
    pub unet: UNet2DCondition,
    /// Of the latents.
    pub side: usize,
    pub batch: usize,
    /// Steps that count, after those that warm up.
    pub steps: usize,
    pub device: DeviceName,
    pub dtype: DType,
    /// Blocks are made again in the backward pass in place of being kept.
    pub recompute: bool,
    /// An average of the weights is kept.
    pub ema: bool,
    /// Only say what memory the step takes.
    pub plan: bool,
    pub per_op: bool,
    pub json: Option<PathBuf>,
}

impl Options {
    pub fn read(args: impl Iterator<Item = String>) -> Result<Options> {
        let (mut preset, mut device, mut dtype, mut json) = (None, DeviceName::Cpu, DType::F32, None);
        let (mut set, mut words) = (vec![], vec![]);
        let mut args = args.peekable();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| Error::invalid(format!("{arg}: want a value")));
            match &*arg {
                "--preset" => preset = Some(value()?),
                "--device" => device = value()?.parse()?,
                "--dtype" => dtype = value()?.parse()?,
                "--json" => json = Some(PathBuf::from(value()?)),
                "--recompute" | "--ema" | "--plan" | "--per-op" => set.push(arg),
                _ if arg.starts_with('-') => {
                    let all = "--preset, --device, --dtype, --json, --recompute, --ema, --plan and --per-op";
                    return Err(Error::invalid(format!("{arg}: no such flag: there are {all}")));
                }
                _ => words.push(arg),
            }
        }
        let (name, config, usual) = match preset {
            Some(name) => {
                let unet = Preset::find(&name)?.part("unet")?;
                let (_, config) =
                    unet.ok_or_else(|| Error::invalid(format!("preset {name}: it has no UNet")))?;
                (name, config, None)
            }
            None if words.is_empty() => {
                return Err(Error::invalid("want the config.json of a UNet, or --preset NAME"));
            }
            None => {
                let file = words.remove(0);
                let config = Config::read(&file)?;
                (file, config, Some(32))
            }
        };
        let unet = match AnyModel::read(config.str("_class_name")?, &config)? {
            Some(AnyModel::UNet2D(unet)) => unet.into(),
            Some(AnyModel::UNet2DCondition(unet)) => unet,
            _ => return Err(config.error("_class_name", "UNet2DModel or UNet2DConditionModel")),
        };
        let side = usual.unwrap_or(unet.sample_size);
        let [side, batch, steps] = [("side", side), ("batch", 8), ("steps", 5)].map(|(what, default)| {
            let word = if words.is_empty() { return Ok(default) } else { words.remove(0) };
            let number = usize::from_str(&word).ok().filter(|n| (1..=1 << 16).contains(n));
            number
                .ok_or_else(|| Error::invalid(format!("{what}: want a number from 1 to 65536; got `{word}`")))
        });
        if let Some(word) = words.first() {
            return Err(Error::invalid(format!("want: [side] [batch] [steps]; got `{word}` beyond them")));
        }
        let is = |flag: &str| set.iter().any(|f| f == flag);
        let (recompute, ema, plan, per_op) = (is("--recompute"), is("--ema"), is("--plan"), is("--per-op"));
        let (side, batch, steps) = (side?, batch?, steps?);
        Ok(Options { name, unet, side, batch, steps, device, dtype, recompute, ema, plan, per_op, json })
    }
}
