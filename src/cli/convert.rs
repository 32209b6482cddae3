//! `ldm convert`: a model from a folder to one file, and back.

use super::{PredictionFlag, check_output, print};
use crate::error::{Error, Result};
use crate::exec::human_bytes;
use crate::pipeline::convert;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// What is converted, and to what.
#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// A model: a diffusers folder, a run, a file with all of it (.safetensors), or an autoencoder alone as any of these
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Where to write: a file that ends in .safetensors, in CompVis's names; else a new folder, in diffusers'
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Type of the weights: f32, f16 or bf16 [default: as they are stored]
    #[arg(long, alias = "type", value_name = "TYPE")]
    dtype: Option<String>,
    #[command(flatten)]
    predicts: PredictionFlag,
}

pub(super) fn run(a: Arguments) -> Result<ExitCode> {
    let dtype = a.dtype.as_deref().map(str::parse).transpose()?;
    if a.output.is_file() {
        let why = "is there already: want a new file";
        return Err(Error::invalid(format!("{}: {why}", a.output.display())));
    }
    // What stands there already is the conversion's own to judge.
    if !a.output.is_dir() {
        check_output(&a.output.components().collect::<PathBuf>())?;
    }
    let done = convert(&a.model, &a.output, dtype, a.predicts.prediction)?;
    let mut text = format!("{}: {} tensors, {}\n", a.output.display(), done.tensors, human_bytes(done.bytes));
    for (name, class) in done.left_out {
        text += &format!("left out: {name} ({class}), which nothing here runs\n");
    }
    for why in done.own {
        text += &format!("not as in CompVis's models, which other tools take for granted: {why}\n");
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
