//! `ldm data`: data sets to train on.

use super::print;
use crate::data::shapes::{Scene, Split, World};
use crate::error::{Error, Result};
use crate::io::{atomic, png};
use clap::{Args, Subcommand};
use rayon::prelude::*;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Which data set.
#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Draw scenes of the shapes world, with captions: a folder of PNG files and metadata.jsonl
    Shapes(Shapes),
}

#[derive(Args, Debug)]
struct Shapes {
    /// How many pictures
    #[arg(short = 'n', long, value_name = "N")]
    count: usize,
    /// Where they go; made if it is not there
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// The same seed draws the same scenes
    #[arg(short, long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Side of the pictures, 32 to 2048
    #[arg(long, default_value_t = 64, value_name = "PIXELS")]
    size: usize,
    /// Stream of scenes: train; test (other scenes of the same kind); unseen (each with a pair of colour and shape that the
    /// others never have)
    #[arg(long, default_value = "train", value_name = "NAME")]
    split: String,
    /// Objects in each picture, 1 or 2 [default: either]
    #[arg(long, value_name = "N")]
    objects: Option<usize>,
    /// Number of the first scene
    #[arg(long, default_value_t = 0, value_name = "N")]
    first: u64,
    /// Write into a folder that is not empty; files of the same names are replaced
    #[arg(long)]
    force: bool,
}

pub(super) fn run(a: Arguments) -> Result<ExitCode> {
    match a.what {
        What::Shapes(a) => shapes(a),
    }
}

fn shapes(a: Shapes) -> Result<ExitCode> {
    let flag = |name: &str, e: Error| Error::invalid(format!("{name}: {e}"));
    let split: Split = a.split.parse().map_err(|e| flag("--split", e))?;
    let mut world = World::new(a.seed, a.size, split).map_err(|e| flag("--size", e))?;
    if let Some(n) = a.objects {
        world = world.objects(n).map_err(|e| flag("--objects", e))?;
    }
    if a.count == 0 || a.first.checked_add(a.count as u64).is_none() {
        let last = u64::MAX - a.first;
        return Err(Error::invalid(format!(
            "--count: from scene {} on want 1 to {last}; got {}",
            a.first, a.count
        )));
    }
    open_folder(&a.output, a.force)?;
    let digits = (a.count - 1).to_string().len().max(4);
    let name = |i: usize| format!("{i:0digits$}.png");
    // Waiting for the disk is most of it: each file is on it when it has its name.
    let lines = (0..a.count).into_par_iter().map(|i| {
        let scene = world.scene(a.first + i as u64);
        png::write_rgb8(a.output.join(name(i)), a.size, a.size, &scene.draw(), None)?;
        Ok(line(&name(i), &scene))
    });
    let lines = lines.collect::<Result<Vec<String>>>()?;
    atomic::write(a.output.join("metadata.jsonl"), lines.concat().as_bytes())?;
    let s = if a.count == 1 { "" } else { "s" };
    print(&format!("{}: {} picture{s} of {2}x{2}\n", a.output.display(), a.count, a.size))?;
    Ok(ExitCode::SUCCESS)
}

/// The scene's line of `metadata.jsonl`. Boxes are left, top, right, bottom as shares of the picture.
fn line(name: &str, scene: &Scene) -> String {
    let short = |v: f32| (f64::from(v) * 1e4).round() / 1e4;
    let boxes = scene.boxes().into_iter().map(|b| json!({"label": b.class, "box": b.bounds.map(short)}));
    let boxes: Vec<_> = boxes.collect();
    let line = json!({
        "file_name": name, "text": scene.caption(), "label": scene.class(), "objects": boxes,
        "background": scene.background.name(),
    });
    format!("{line}\n")
}

/// Makes the folder, or checks that it is empty.
fn open_folder(path: &Path, force: bool) -> Result<()> {
    let invalid = |what: String| Error::invalid(format!("{}: {what}", path.display()));
    match fs::read_dir(path) {
        Ok(mut entries) => match entries.next() {
            Some(_) if !force => {
                Err(invalid("is not empty; choose another folder, or write into it with --force".into()))
            }
            _ => Ok(()),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            fs::create_dir_all(path).map_err(|e| invalid(format!("cannot be made: {e}")))
        }
        Err(e) => Err(invalid(format!("want a folder: {e}"))),
    }
}
