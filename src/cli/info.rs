//! `ldm info`: what a checkpoint is, and what a picture costs.

use super::print;
use crate::error::Result;
use crate::exec::human_bytes;
use crate::io::ModelFolder;
use crate::models::{AnyModel, CLASSES, Inventory};
use crate::pipeline::{Blueprint, Request};
use crate::samplers::Choice;
use crate::tensor::DType;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// A checkpoint, and the picture that is asked about.
#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// A checkpoint: a diffusers folder (with model_index.json)
    #[arg(value_name = "FOLDER")]
    model: PathBuf,
    /// Pixels [default: what the model was made for]
    #[arg(short = 'W', long, value_name = "PIXELS")]
    width: Option<usize>,
    /// Pixels [default: what the model was made for]
    #[arg(short = 'H', long, value_name = "PIXELS")]
    height: Option<usize>,
    /// Pictures that are made together
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch_size: usize,
    /// Guidance; at 1 or below only half of the work is done
    #[arg(long, alias = "guidance-scale", default_value_t = 7.5, value_name = "X")]
    cfg_scale: f64,
    /// Steps of the sampler
    #[arg(long, default_value_t = 30, value_name = "N")]
    steps: usize,
    #[arg(long, value_name = "NAME", help = super::sampler_help())]
    sampling_method: Option<Choice>,
    /// Type to compute in: f32, f16 or bf16
    #[arg(long, default_value = "f32", value_name = "TYPE")]
    dtype: String,
    /// Print the graph of one evaluation: nodes, shapes, offsets, work
    #[arg(long)]
    graph: bool,
}

pub(super) fn run(a: Arguments) -> Result<ExitCode> {
    let folder = ModelFolder::open(&a.model)?;
    let dtype: DType = a.dtype.parse()?;
    let mut text = format!("{}: {}\n\n", folder.path().display(), folder.class());
    text += &format!(
        "{:14} {:24} {:>10} {:>14}  {}\n",
        "component", "class", "tensors", "parameters", "stored as"
    );
    for c in folder.components() {
        let known = CLASSES.iter().any(|classes| classes.contains(&&*c.class));
        let model = if known { AnyModel::read(&c.class, &folder.config(&c.name)?)? } else { None };
        let row = match model {
            Some(model) => {
                let inventory = Inventory::of(&model.inventory(dtype)?);
                let checkpoint = folder.checkpoint(&c.name)?;
                let stored: Vec<String> = (checkpoint.dtypes().iter())
                    .map(|(t, total)| format!("{t} ({})", human_bytes(total.bytes)))
                    .collect();
                format!("{:>10} {:>14}  {}", inventory.tensors(), inventory.parameters(), stored.join(", "))
            }
            None => String::new(),
        };
        text += format!("{:14} {:24} {row}", c.name, c.class).trim_end();
        text += "\n";
    }
    print(&text)?;
    let request = Request {
        width: a.width,
        height: a.height,
        batch: a.batch_size,
        cfg_scale: a.cfg_scale,
        steps: a.steps,
        method: a.sampling_method,
        ..Request::default()
    };
    if !Blueprint::PIPELINES.contains(&folder.class()) {
        print("\nthis version does not sample from a pipeline of this class\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    let blueprint = Blueprint::read(&folder)?;
    let e = blueprint.estimate(&request, dtype)?;
    let (w, h) = blueprint.size(&request)?;
    print(&format!(
        "\n{w}x{h}, {} picture{}, {dtype}: {} row{} per evaluation\n\
         {:18} {:>12} {:>14}\n{:18} {:>12} {:>14}\n{:18} {:>12} {:>14}\n",
        a.batch_size,
        if a.batch_size == 1 { "" } else { "s" },
        e.rows,
        if e.rows == 1 { "" } else { "s" },
        "",
        "arena",
        "GFLOP",
        "UNet evaluation",
        human_bytes(e.unet_arena),
        format!("{:.1}", e.unet_flops / 1e9),
        "decoding, each",
        human_bytes(e.decoder_arena),
        format!("{:.1}", e.decoder_flops / 1e9),
    ))?;
    if a.graph {
        print(&format!("\n{}", blueprint.show(&request, dtype)?))?;
    }
    Ok(ExitCode::SUCCESS)
}
