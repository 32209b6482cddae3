//! `ldm info`: what a checkpoint is, and what a picture costs.

use super::{PredictionFlag, SizeFlags, print};
use crate::error::Result;
use crate::exec::{Device, human_bytes};
use crate::graph::Target;
use crate::io::ModelFolder;
use crate::models::{AnyModel, CLASSES, Inventory};
use crate::pipeline::{Blueprint, Request, Residency};
use crate::samplers::Choice;
use crate::tensor::DType;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// A checkpoint, and the picture that is asked about.
#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// A checkpoint: a diffusers folder (with model_index.json), or one .safetensors file with a whole model
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    #[command(flatten)]
    predicts: PredictionFlag,
    #[command(flatten)]
    size: SizeFlags,
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
    /// With the autoencoder's tiles, as in `ldm sample`
    #[arg(long)]
    vae_tiling: bool,
    /// Side of a tile in latents [default: what the autoencoder was made for]
    #[arg(long, value_name = "N", requires = "vae_tiling")]
    vae_tile_size: Option<usize>,
    /// Print the graph of one evaluation: nodes, shapes, offsets, work
    #[arg(long)]
    graph: bool,
}

pub(super) fn run(a: Arguments) -> Result<ExitCode> {
    let folder = ModelFolder::open_as(&a.model, a.predicts.prediction)?;
    let dtype: DType = a.dtype.parse()?;
    let mut text = format!("{}: {}\n\n", folder.path().display(), folder.class());
    text += &format!(
        "{:14} {:24} {:>10} {:>14}  {}\n",
        "component", "class", "tensors", "parameters", "stored as"
    );
    for c in folder.components() {
        let known = CLASSES.iter().any(|classes| classes.contains(&&*c.class));
        // A part may be left out of a copy.
        let there = c.path.exists();
        let model = if known && there { AnyModel::read(&c.class, &folder.config(&c.name)?)? } else { None };
        let row = match model {
            None if known && !there => "its folder is not there".into(),
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
        width: a.size.width,
        height: a.size.height,
        batch: a.batch_size,
        cfg_scale: a.cfg_scale,
        steps: a.steps,
        method: a.sampling_method,
        vae_tiling: a.vae_tiling,
        vae_tile_size: a.vae_tile_size,
        ..Request::default()
    };
    if !Blueprint::PIPELINES.contains(&folder.class()) {
        print("\nthis version does not sample from a pipeline of this class\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    let used = ["text_encoder", "bert", "class_embedder", "tokenizer", "unet", "vae", "vqvae", "scheduler"];
    if folder.components().iter().any(|c| used.contains(&&*c.name) && !c.path.exists()) {
        print("\nthis version does not sample from it: parts are not there\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    let blueprint = Blueprint::read(&folder)?;
    let e = blueprint.estimate(&request, dtype, Residency::Staged, Target::Cpu)?;
    let (w, h) = blueprint.size(&request)?;
    let s = |n: usize| if n == 1 { "" } else { "s" };
    let (n, rows) = (a.batch_size, e.rows);
    let mut text = format!(
        "\n{w}x{h}, {n} picture{}, {dtype}: {rows} row{} per evaluation\n\
         {:18} {:>12} {:>14}\n{:18} {:>12} {:>14}\n{:18} {:>12} {:>14}\n",
        s(n),
        s(rows),
        "",
        "arena",
        "GFLOP",
        "UNet evaluation",
        human_bytes(e.unet_arena),
        format!("{:.1}", e.unet_flops / 1e9),
        "decoding, each",
        human_bytes(e.decoder_arena),
        format!("{:.1}", e.decoder_flops / 1e9),
    );
    text += &format!(
        "\n{:18} {:>12} {:>12} {:>12} {:>12}\n",
        "`sample` on a CPU", "weights", "arena", "scratch", "in and out"
    );
    for s in &e.stages {
        let [weights, arena, scratch, host] = [s.weights, s.arena, s.scratch, s.host].map(human_bytes);
        text += &format!("{:18} {weights:>12} {arena:>12} {scratch:>12} {host:>12}\n", s.name);
    }
    let (peak, process) = (e.peak(&Device::Cpu), human_bytes(e.process));
    let stage = e.peak_stage(&Device::Cpu).map_or("", |s| s.name);
    text += &format!(
        "peak: {peak} bytes ({}), while {stage}, {process} for the process itself among them\n",
        human_bytes(peak)
    );
    print(&text)?;
    if a.graph {
        print(&format!("\n{}", blueprint.show(&request, dtype, Target::Cpu)?))?;
    }
    Ok(ExitCode::SUCCESS)
}
