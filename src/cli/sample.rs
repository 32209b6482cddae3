//! `ldm sample`: pictures from a prompt, of a class, or from another picture.

use super::progress::Progress;
use super::{DeviceFlags, PredictionFlag, SizeFlags, check_input, check_output, check_png, print, whole};
use crate::error::{Error, Result};
use crate::exec::{Device, peak};
use crate::io::{ModelFolder, atomic, picture, png};
use crate::models::Conditioner;
use crate::pipeline::{Beside, Blueprint, Init, Mask, Picture, Pipeline, Request, Residency};
use crate::rng::fresh_seed;
use crate::samplers::Choice;
use clap::Args;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The model that comes with the sources: `recipes/` says how it was made.
const OWN_MODEL: &str = "assets/shapes-64";

/// Prompts of a file that are made into pictures together, unless told.
const TOGETHER: usize = 8;

/// What `--seed` says; none for a random one.
#[derive(Clone, Copy, Debug)]
struct Seed(Option<u64>);

impl std::str::FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Seed, String> {
        match text.parse() {
            _ if text == "-1" => Ok(Seed(None)),
            Ok(seed) => Ok(Seed(Some(seed))),
            Err(_) => Err(format!("want 0 to {}, or -1 for a random one", u64::MAX)),
        }
    }
}

/// Flags are those of stable-diffusion.cpp and diffusers.
#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// A checkpoint: a diffusers folder (with model_index.json), or one .safetensors file with a whole model
    /// [default: assets/shapes-64, a small model of the shapes world]
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,
    #[command(flatten)]
    predicts: PredictionFlag,
    /// What the picture shows; models without a condition take none
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// What the picture shows, for models that draw classes: a name, or a number
    #[arg(long, value_name = "NAME|N", conflicts_with_all = ["prompt", "negative_prompt"])]
    class: Option<String>,
    /// A file with a prompt (or a class) a line, or a metadata.jsonl with captions: a picture of each, 0000.png, 0001.png, …,
    /// in the folder --output; picture i has seed + i, and --batch-size of them are made together [default: 8, or fewer where
    /// memory is short]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "class", "init_img"])]
    from_file: Option<PathBuf>,
    /// What the picture does not show
    #[arg(
        short,
        long,
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true,
        value_name = "TEXT"
    )]
    negative_prompt: String,
    /// Where the picture goes; several are numbered: out_0.png, out_1.png, …
    #[arg(short, long, default_value = "out.png", value_name = "FILE")]
    output: PathBuf,
    /// Steps of the sampler
    #[arg(long, default_value_t = 30, value_parser = whole, allow_negative_numbers = true, value_name = "N")]
    steps: usize,
    #[arg(long, value_name = "NAME", help = super::sampler_help())]
    sampling_method: Option<Choice>,
    /// How strongly the prompt guides; 1 for not at all
    #[arg(
        long,
        alias = "guidance-scale",
        default_value_t = 7.5,
        allow_negative_numbers = true,
        value_name = "X"
    )]
    cfg_scale: f64,
    /// The same seed makes the same picture; -1 for a random one [default: random]
    #[arg(
        short,
        long,
        default_value = "-1",
        hide_default_value = true,
        allow_negative_numbers = true,
        value_name = "N"
    )]
    seed: Seed,
    #[command(flatten)]
    size: SizeFlags,
    /// Pictures that are made together; picture i has seed + i [default: 1]
    #[arg(long, value_parser = whole, allow_negative_numbers = true, value_name = "N")]
    batch_size: Option<usize>,
    /// Share of fresh noise in the steps of ddim, 0 to 1
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, value_name = "X")]
    eta: f64,
    /// Text layer that is used, counted from the end: 1 the last, 2 the one before
    #[arg(long, default_value_t = 1, value_parser = whole, allow_negative_numbers = true, value_name = "N")]
    clip_skip: usize,
    /// A picture to start from, to draw anew in part (--mask) or, by a model for that, to enlarge (PNG, JPEG or WebP)
    #[arg(short, long, value_name = "FILE")]
    init_img: Option<PathBuf>,
    /// How much of the initial picture is given up, 0 to 1 [default: 0.75; with --mask 1]
    #[arg(long, allow_negative_numbers = true, value_name = "X", requires = "init_img")]
    strength: Option<f64>,
    /// Where the initial picture is drawn anew: a picture of its size, white there and black elsewhere (inpainting)
    #[arg(long, value_name = "FILE", requires = "init_img")]
    mask: Option<PathBuf>,
    /// Do not put the initial picture's pixels back where the mask is black: all comes out of the autoencoder, as in diffusers
    #[arg(long, requires = "mask")]
    no_composite: bool,
    /// Take the picture through the autoencoder in tiles that overlap: less memory for large ones
    #[arg(long)]
    vae_tiling: bool,
    /// Side of a tile in latents [default: what the autoencoder was made for]
    #[arg(long, value_name = "N", requires = "vae_tiling")]
    vae_tile_size: Option<usize>,
    /// Leave the settings out of the PNG
    #[arg(long)]
    disable_image_metadata: bool,
    /// Say nothing but warnings and errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    device: DeviceFlags,
}

impl Arguments {
    /// The checkpoint: the one that is named, or the one that comes with the sources, here or where this was built.
    fn model(&self) -> Result<PathBuf> {
        if let Some(model) = &self.model {
            return Ok(model.clone());
        }
        let places = [Path::new(""), Path::new(env!("CARGO_MANIFEST_DIR"))].map(|p| p.join(OWN_MODEL));
        let found = places.iter().find(|p| p.join("model_index.json").is_file());
        found.cloned().ok_or_else(|| {
            let own = places[1].display();
            Error::invalid(format!(
                "no model: there is none at {OWN_MODEL} or {own}; name one with -m FOLDER"
            ))
        })
    }

    /// What to draw is the prompt or the class, or with --from-file those of the pictures that are made together.
    fn request(&self, each: &[&str], seed: u64) -> Result<Request> {
        let batch = match (self.batch_size, &self.from_file) {
            (Some(0), _) => return Err(Error::invalid("--batch-size: want at least 1; got 0")),
            (n, None) => n.unwrap_or(1),
            (_, Some(_)) => each.len(),
        };
        let finite = |name: &str, v: f64, low: f64, high: f64| {
            if v.is_finite() && (low..=high).contains(&v) {
                return Ok(());
            }
            Err(Error::invalid(format!("{name}: want a number from {low} to {high}; got {v}")))
        };
        finite("--cfg-scale", self.cfg_scale, 0.0, 1000.0)?;
        finite("--eta", self.eta, 0.0, 1.0)?;
        for (name, n) in [("--steps", self.steps), ("--clip-skip", self.clip_skip)] {
            if n == 0 {
                return Err(Error::invalid(format!("{name}: want at least 1; got 0")));
            }
        }
        let init = match &self.init_img {
            None => None,
            Some(path) => {
                let strength = self.strength.unwrap_or(if self.mask.is_some() { 1.0 } else { 0.75 });
                finite("--strength", strength, 0.0, 1.0)?;
                check_input(path, "a picture (-i)")?;
                let picture = picture::read(path)?;
                let (width, height, rgb) = (picture.width, picture.height, picture.pixels);
                Some(Init { width, height, rgb, strength })
            }
        };
        let mask = match &self.mask {
            None => None,
            Some(path) => {
                check_input(path, "a picture (--mask)")?;
                let picture = picture::read(path)?;
                let gray = picture.pixels.as_chunks().0.iter().map(|&rgb| gray(rgb)).collect();
                let (width, height, composite) = (picture.width, picture.height, !self.no_composite);
                Some(Mask { width, height, gray, composite })
            }
        };
        Ok(Request {
            init,
            mask,
            prompt: self.prompt.clone().unwrap_or_default(),
            class: self.class.clone(),
            prompts: each.iter().map(|words| words.to_string()).collect(),
            negative: self.negative_prompt.clone(),
            width: self.size.width,
            height: self.size.height,
            steps: self.steps,
            method: self.sampling_method,
            cfg_scale: self.cfg_scale,
            seed,
            batch,
            clip_skip: self.clip_skip - 1,
            eta: self.eta,
            vae_tiling: self.vae_tiling,
            vae_tile_size: self.vae_tile_size,
        })
    }
}

/// Luma of ITU-R 601-2 in 16 bits after the point, as Pillow rounds it.
fn gray([r, g, b]: [u8; 3]) -> u8 {
    ((19595 * u32::from(r) + 38470 * u32::from(g) + 7471 * u32::from(b) + (1 << 15)) >> 16) as u8
}

pub(super) fn run(a: Arguments) -> Result<ExitCode> {
    let seed = a.seed.0.unwrap_or_else(fresh_seed);
    if let Some(list) = &a.from_file {
        return from_file(&a, list, seed);
    }
    let what = a.class.as_ref().or(a.prompt.as_ref()).map_or("", String::as_str);
    let request = a.request(&[], seed)?;
    check_output(&a.output)?;
    check_png(&a.output)?;
    check_seeds(seed, request.batch)?;
    let dtype = a.device.dtype()?;
    let device = a.device.open()?;
    // Before any work: can the model do this, is there memory for it, and can the result be written?
    let folder = ModelFolder::open_as(a.model()?, a.predicts.prediction)?;
    let blueprint = Blueprint::read(&folder)?;
    blueprint.check_words(&request)?;
    blueprint.check_pictures(&request)?;
    let enlarges = blueprint.beside == Beside::Picture;
    if enlarges && a.strength.is_some() {
        return Err(Error::invalid(
            "--strength: this model enlarges a picture (super-resolution): want none",
        ));
    }
    if a.prompt.is_none() && matches!(blueprint.condition, Conditioner::Clip(_) | Conditioner::Bert(_)) {
        return Err(Error::invalid(
            "want --prompt TEXT, what the picture shows, or --from-file FILE with a prompt a line",
        ));
    }
    let staged = Residency::Staged;
    let compute = Pipeline::compute_type(&folder, &device, dtype)?;
    blueprint.check_memory(&request, compute, &device, staged, false)?;
    let method = blueprint.choose(&request)?.0;
    let files = names(&a.output, request.batch);
    files.iter().try_for_each(|f| check_output(f))?;
    let mut progress = Progress::new(a.quiet);
    let pipeline = Pipeline::open_with(&folder, &device, dtype, staged)?;
    if !a.quiet {
        eprintln!("{}; {}, seed {seed}", pipeline.describe(), method.label());
    }
    let pictures = pipeline.generate(&request, &mut progress)?;
    progress.finish();
    if let (false, Device::Cpu, Some(peak)) = (a.quiet, &device, peak()) {
        let planned = blueprint.estimate(&request, compute, staged, (&device).into())?.peak(&device);
        eprintln!("memory: {peak} bytes at the peak, {planned} planned");
    }
    for (picture, file) in pictures.iter().zip(&files) {
        let strength = request.init.as_ref().filter(|_| !enlarges).map(|init| init.strength);
        let text =
            (!a.disable_image_metadata).then(|| parameters(&a, what, picture, method.label(), strength));
        png::write_rgb8(file, picture.width, picture.height, &picture.rgb, text.as_deref())?;
        print(&format!("{}\n", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A picture of each line, with the weights loaded once; and the lines, as `ldm eval` wants them, in `prompts.txt`.
fn from_file(a: &Arguments, list: &Path, seed: u64) -> Result<ExitCode> {
    let invalid = |path: &Path, what: String| Error::invalid(format!("{}: {what}", path.display()));
    let text = fs::read_to_string(list)
        .map_err(|e| invalid(list, format!("want a text file (UTF-8) with a prompt a line: {e}")))?;
    let prompts = match list.extension() {
        Some(e) if e == "jsonl" => texts(&text).map_err(|what| invalid(list, what))?,
        _ => text.lines().enumerate().map(|(i, line)| (i, line.trim().to_string())).collect(),
    };
    let (lines, prompts): (Vec<usize>, Vec<&str>) = prompts.iter().map(|(i, text)| (*i, &**text)).unzip();
    if prompts.is_empty() {
        return Err(invalid(list, "want a prompt a line; it is empty".into()));
    }
    check_seeds(seed, prompts.len())?;
    if a.output.extension().is_some_and(|e| e == "png") {
        return Err(invalid(&a.output, "want a folder for the pictures of --from-file: -o FOLDER".into()));
    }
    if a.output.join("metadata.jsonl").exists() {
        let what =
            "holds a data set (metadata.jsonl), whose pictures would be replaced; choose another folder";
        return Err(invalid(&a.output, what.into()));
    }
    let dtype = a.device.dtype()?;
    let device = a.device.open()?;
    let folder = ModelFolder::open_as(a.model()?, a.predicts.prediction)?;
    let blueprint = Blueprint::read(&folder)?;
    for (i, words) in lines.iter().zip(&prompts) {
        let wrong = |e: Error| invalid(list, format!("line {}: {e}", i + 1));
        blueprint.check_words(&a.request(&[words], seed)?).map_err(wrong)?;
    }
    if blueprint.beside != Beside::Nothing {
        return Err(Error::invalid(
            "--from-file: this model takes a picture (-i FILE), which goes with one prompt",
        ));
    }
    let compute = Pipeline::compute_type(&folder, &device, dtype)?;
    let fits = |n: usize| {
        let request = a.request(&prompts[..n.min(prompts.len())], seed)?;
        blueprint.check_memory(&request, compute, &device, Residency::Always, false)
    };
    let mut together = a.batch_size.unwrap_or(TOGETHER).max(1);
    // Unasked, as many as there is memory for.
    while a.batch_size.is_none() && together > 1 && fits(together).is_err() {
        together /= 2;
    }
    fits(together)?;
    let method = blueprint.choose(&a.request(&prompts[..1], seed)?)?.0;
    fs::create_dir_all(&a.output).map_err(|e| invalid(&a.output, format!("cannot be made: {e}")))?;
    check_output(&a.output.join("prompts.txt"))?;
    let pipeline = Pipeline::open(&folder, &device, dtype)?;
    if !a.quiet {
        eprintln!("{}; {}, seed {seed}, {} prompts", pipeline.describe(), method.label(), prompts.len());
    }
    let digits = (prompts.len() - 1).to_string().len().max(4);
    let mut files = (0..).map(|i| a.output.join(format!("{i:0digits$}.png")));
    let mut made = 0;
    for prompts in prompts.chunks(together) {
        // Warnings alone: a bar of each would be too much.
        let request = a.request(prompts, seed.wrapping_add(made))?;
        let pictures = pipeline.generate(&request, &mut Progress::new(true))?;
        made += pictures.len() as u64;
        for ((picture, prompt), file) in pictures.iter().zip(prompts).zip(&mut files) {
            let text =
                (!a.disable_image_metadata).then(|| parameters(a, prompt, picture, method.label(), None));
            png::write_rgb8(&file, picture.width, picture.height, &picture.rgb, text.as_deref())?;
            print(&format!("{}\n", file.display()))?;
        }
    }
    atomic::write(a.output.join("prompts.txt"), (prompts.join("\n") + "\n").as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// The captions of a `metadata.jsonl`, as `ldm data` writes it, each as one line, with the number of its own.
fn texts(lines: &str) -> std::result::Result<Vec<(usize, String)>, String> {
    let text = |(i, line): (usize, &str)| {
        let value: Value =
            serde_json::from_str(line).map_err(|e| format!("line {}: not JSON: {e}", i + 1))?;
        let text = value["text"].as_str().map(|t| (i, t.split_whitespace().collect::<Vec<_>>().join(" ")));
        text.ok_or_else(|| format!("line {}: want a key `text`; got {line}", i + 1))
    };
    lines.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(text).collect()
}

/// Picture i has seed + i.
fn check_seeds(seed: u64, pictures: usize) -> Result<()> {
    let more = pictures.saturating_sub(1) as u64;
    match seed.checked_add(more) {
        Some(_) => Ok(()),
        None => Err(Error::invalid(format!(
            "--seed: for {pictures} pictures want at most {}; got {seed}",
            u64::MAX - more
        ))),
    }
}

/// `out.png`, or `out_0.png` … where there are several.
fn names(output: &Path, count: usize) -> Vec<PathBuf> {
    if count == 1 {
        return vec![output.into()];
    }
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    let extension = output.extension().map_or("png".into(), |e| e.to_string_lossy());
    (0..count).map(|i| output.with_file_name(format!("{stem}_{i}.{extension}"))).collect()
}

/// The text that other programs read settings from.
fn parameters(a: &Arguments, what: &str, picture: &Picture, sampler: &str, strength: Option<f64>) -> String {
    let mut text = what.to_string();
    if !a.negative_prompt.is_empty() {
        text += &format!("\nNegative prompt: {}", a.negative_prompt);
    }
    let model = a.model.as_deref().unwrap_or(Path::new(OWN_MODEL));
    let model = model.file_name().unwrap_or_default().to_string_lossy();
    let model = model.strip_suffix(".safetensors").unwrap_or(&model);
    let (w, h, version) = (picture.width, picture.height, env!("CARGO_PKG_VERSION"));
    text += &format!(
        "\nSteps: {}, Sampler: {sampler}, CFG scale: {}, Seed: {}, Size: {w}x{h}, Model: {model}",
        a.steps, a.cfg_scale, picture.seed
    );
    if let Some(choice) = a.sampling_method {
        let spacing = choice.spacing.map(|s| format!("{s:?}").to_lowercase());
        if let Some(schedule) = if choice.karras { Some("Karras".into()) } else { spacing } {
            text += &format!(", Schedule type: {schedule}");
        }
    }
    if a.eta != 0.0 {
        text += &format!(", Eta: {}", a.eta);
    }
    if let Some(strength) = strength {
        text += &format!(", Denoising strength: {strength}");
    }
    if a.clip_skip > 1 {
        text += &format!(", Clip skip: {}", a.clip_skip);
    }
    text + &format!(", RNG: CPU, Version: ldm {version}")
}
