//! `ldm eval`: scores of pictures.

use super::{check_input, print};
use crate::data::folder::{Folder, pictures};
use crate::data::prompt::Prompt;
use crate::data::quality::{psnr, ssim};
use crate::data::recognise::{Found, Seen, recognise};
use crate::data::score::{CRITERIA, Tally, Verdict, judge};
use crate::error::{Error, Result};
use crate::exec::Device;
use crate::io::picture;
use crate::io::png::Rgb8;
use crate::train::{FirstStage, PerceptualDistance};
use clap::{Args, Subcommand};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Which score.
#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Whether pictures show what captions of the shapes world asked for, read from their pixels
    Shapes(Shapes),
    /// How near pictures are to others, such as an autoencoder's to what it was given: PSNR, SSIM, and LPIPS
    Reconstruction(Reconstruction),
}

#[derive(Args, Debug)]
struct Shapes {
    /// Square pictures with their prompts: metadata.jsonl, or prompts.txt with a line per picture in order of name, or
    /// 0000.txt beside 0000.png
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// Print JSON, with a line for each picture, instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct Reconstruction {
    /// A picture, or a folder of them
    #[arg(value_name = "A")]
    first: PathBuf,
    /// The other picture, or a folder with pictures of the same names (extensions may differ)
    #[arg(value_name = "B", required_unless_present = "model")]
    second: Option<PathBuf>,
    /// In place of B: A as this autoencoder gives it back (a run of `ldm train autoencoder`, a diffusers folder, its vae, or a single file)
    #[arg(short, long, value_name = "MODEL", conflicts_with = "second")]
    model: Option<PathBuf>,
    /// Measure LPIPS too, with these weights: a safetensors file with torchvision's VGG16 and the heads of the lpips package
    #[arg(long, value_name = "FILE")]
    lpips: Option<PathBuf>,
    /// Print JSON, with a line for each picture, instead of a summary
    #[arg(long)]
    json: bool,
}

pub(super) fn run(a: Arguments) -> Result<ExitCode> {
    match a.what {
        What::Shapes(a) => shapes(a),
        What::Reconstruction(a) => reconstruction(a),
    }
}

/// A picture, what was asked, what is there.
struct Judged {
    file: String,
    prompt: Prompt,
    seen: Seen,
    verdict: Verdict,
}

fn shapes(a: Shapes) -> Result<ExitCode> {
    check_input(&a.folder, "a folder of pictures with prompts")?;
    let folder = Folder::open(&a.folder)?;
    let judged = folder.items().par_iter().map(|item| {
        let Some(caption) = &item.caption else {
            let what =
                "no prompts here; want metadata.jsonl, prompts.txt, or a .txt file beside each picture";
            return Err(Error::file(folder.path(), what));
        };
        let prompt: Prompt = caption.parse().map_err(|e| Error::file(&item.path, e))?;
        let picture = picture::read(&item.path)?;
        if picture.width != picture.height {
            let (w, h) = (picture.width, picture.height);
            return Err(Error::file(&item.path, format!("want a square picture; got {w}x{h}")));
        }
        let seen = recognise(picture.width, &picture.pixels).map_err(|e| Error::file(&item.path, e))?;
        let file = item.path.strip_prefix(folder.path()).unwrap_or(&item.path).display().to_string();
        Ok(Judged { file, verdict: judge(&prompt, &seen), prompt, seen })
    });
    let judged = judged.collect::<Result<Vec<Judged>>>()?;
    let tally = |keep: &dyn Fn(&Judged) -> bool| {
        let mut tally = Tally::default();
        judged.iter().filter(|j| keep(j)).for_each(|j| tally.add(&j.verdict));
        tally
    };
    let groups = [
        ("pictures", tally(&|_| true)),
        ("trained pairs", tally(&|j| !j.prompt.is_unseen())),
        ("unseen pairs", tally(&|j| j.prompt.is_unseen())),
    ];
    let text = if a.json { format!("{:#}\n", as_json(&groups, &judged)) } else { as_table(&groups) };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Percent, and how many of how many. Where all pictures are of one kind, one column says it.
fn as_table(groups: &[(&str, Tally); 3]) -> String {
    let mixed = groups[1..].iter().all(|(_, t)| t.pictures > 0);
    let shown = if mixed { &groups[..] } else { &groups[..1] };
    let mut text = format!("{:12}", "");
    shown.iter().for_each(|(name, t)| text += &format!("{:>22}", format!("{} {name}", t.pictures)));
    for (i, criterion) in CRITERIA.iter().enumerate() {
        text += &format!("\n{criterion:12}");
        for (_, t) in shown {
            let (right, asked) = t.counts[i];
            let cell = match asked {
                0 => "-".into(),
                n => format!("{:.1} %  {right:>6}/{n:<6}", 100.0 * right as f64 / n as f64),
            };
            text += &format!("{cell:>22}");
        }
    }
    text.lines().map(|l| l.trim_end().to_string() + "\n").collect()
}

fn as_json(groups: &[(&str, Tally); 3], judged: &[Judged]) -> Value {
    let named = |v: &dyn Fn(usize) -> Value| -> Value {
        CRITERIA.iter().enumerate().map(|(i, c)| (c.to_string(), v(i))).collect::<Map<_, _>>().into()
    };
    let score = |t: &Tally| {
        let one = |i: usize| {
            let (right, asked) = t.counts[i];
            let share = (asked > 0).then(|| right as f64 / asked as f64);
            json!({"right": right, "asked": asked, "share": share})
        };
        json!({"pictures": t.pictures, "scores": named(&one)})
    };
    let name = |v: Option<&'static str>| json!(v);
    let found = |f: &Found| {
        json!({
            "colour": name(f.colour.map(|v| v.name())), "shape": name(f.shape.map(|v| v.name())),
            "size": name(f.size.map(|v| v.name())), "centre": f.centre, "width": f.width,
        })
    };
    let each = |j: &Judged| {
        json!({
            "file": j.file, "prompt": j.prompt.to_string(),
            "right": named(&|i| json!(j.verdict[i])),
            "seen": {
                "background": name(j.seen.background.map(|v| v.name())),
                "objects": j.seen.objects.iter().map(found).collect::<Vec<_>>(),
            },
        })
    };
    json!({
        "all": score(&groups[0].1), "trained_pairs": score(&groups[1].1), "unseen_pairs": score(&groups[2].1),
        "each": judged.iter().map(each).collect::<Vec<_>>(),
    })
}

/// A pair of pictures, and how near they are.
struct Near {
    file: String,
    psnr: f64,
    ssim: f64,
    lpips: Option<f64>,
}

fn reconstruction(a: Reconstruction) -> Result<ExitCode> {
    let pairs = match &a.second {
        Some(second) => pairs(&a.first, second)?,
        None => pairs(&a.first, &a.first)?,
    };
    let made = a.model.as_ref().map(|model| given_back(&pairs, model)).transpose()?;
    let read = |i: usize| {
        let second = || made.as_ref().map_or_else(|| picture::read(&pairs[i].2), |made| Ok(made[i].clone()));
        Ok::<_, Error>((picture::read(&pairs[i].1)?, second()?))
    };
    let beside =
        |e: Error, (_, first, second): &Pair| Error::file(first, format!("beside {}: {e}", second.display()));
    let near = pairs.par_iter().enumerate().map(|(i, pair)| {
        let (x, y) = read(i)?;
        let (psnr, ssim) = psnr(&x, &y).and_then(|v| Ok((v, ssim(&x, &y)?))).map_err(|e| beside(e, pair))?;
        Ok(Near { file: pair.0.clone(), psnr, ssim, lpips: None })
    });
    let mut near = near.collect::<Result<Vec<Near>>>()?;
    if let Some(file) = &a.lpips {
        let mut distance = PerceptualDistance::open(file, &Device::Cpu)?;
        for (i, (near, pair)) in near.iter_mut().zip(&pairs).enumerate() {
            let (x, y) = read(i)?;
            let lpips = distance.between([x.width, x.height], &x.pixels, &y.pixels);
            near.lpips = Some(lpips.map_err(|e| beside(e, pair))?);
        }
    }
    let mean = |of: &dyn Fn(&Near) -> f64| near.iter().map(of).sum::<f64>() / near.len() as f64;
    let (psnr, ssim) = (mean(&|n| n.psnr), mean(&|n| n.ssim));
    let lpips = a.lpips.is_some().then(|| mean(&|n| n.lpips.unwrap_or(0.0)));
    if a.json {
        // JSON has no infinity: pictures that are the same have a PSNR of null.
        let with = |mut line: Value, lpips: Option<f64>| {
            lpips.into_iter().for_each(|v| line["lpips"] = json!(v));
            line
        };
        let each = |n: &Near| with(json!({"file": n.file, "psnr": n.psnr, "ssim": n.ssim}), n.lpips);
        let each: Vec<Value> = near.iter().map(each).collect();
        let all = with(json!({"pictures": near.len(), "psnr": psnr, "ssim": ssim, "each": each}), lpips);
        print(&format!("{all:#}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let lowest = |of: &dyn Fn(&Near) -> f64| near.iter().min_by(|x, y| of(x).total_cmp(&of(y)));
    let (count, s) = (near.len(), if near.len() == 1 { "" } else { "s" });
    let mut text = format!("{:8}{:>10}{:>10}  {count} picture{s}\n", "", "mean", "worst");
    if let Some(n) = lowest(&|n| n.psnr) {
        text += &format!("{:8}{psnr:>10.2}{:>10.2}  {}\n", "PSNR dB", n.psnr, n.file);
    }
    if let Some(n) = lowest(&|n| n.ssim) {
        text += &format!("{:8}{ssim:>10.4}{:>10.4}  {}\n", "SSIM", n.ssim, n.file);
    }
    if let (Some(mean), Some(n)) = (lpips, lowest(&|n| -n.lpips.unwrap_or(0.0))) {
        text += &format!("{:8}{mean:>10.4}{:>10.4}  {}\n", "LPIPS", n.lpips.unwrap_or(0.0), n.file);
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// The first pictures of pairs as an autoencoder gives them back.
fn given_back(pairs: &[Pair], model: &Path) -> Result<Vec<Rgb8>> {
    let mut autoencoder = FirstStage::open(model)?.reconstruction(&Device::Cpu)?;
    let each = pairs.iter().map(|(_, path, _)| {
        let x = picture::read(path)?;
        let pixels =
            autoencoder.of([x.width, x.height], &x.pixels).map_err(|e| Error::file(path, e.to_string()))?;
        Ok(Rgb8 { pixels, ..x })
    });
    each.collect()
}

/// Name, first and second file.
type Pair = (String, PathBuf, PathBuf);

/// Two pictures, or those of two folders that have the same names.
fn pairs(first: &Path, second: &Path) -> Result<Vec<Pair>> {
    if first.is_file() && second.is_file() {
        return Ok(vec![(first.display().to_string(), first.into(), second.into())]);
    }
    for path in [first, second] {
        check_input(path, "a picture or a folder of pictures")?;
    }
    if !(first.is_dir() && second.is_dir()) {
        let (a, b) = (first.display(), second.display());
        return Err(Error::invalid(format!("want two pictures or two folders; got {a} and {b}")));
    }
    let named = |root: &Path| {
        let mut names = BTreeMap::new();
        for path in pictures(root)? {
            let name = path.strip_prefix(root).unwrap_or(&path).with_extension("");
            if let Some(other) = names.insert(name, path.clone()) {
                let other = other.display();
                return Err(Error::file(&path, format!("has the name of {other}; want one of each name")));
            }
        }
        if names.is_empty() {
            return Err(Error::file(root, "want a folder of pictures; there are none here"));
        }
        Ok(names)
    };
    let (a, mut b) = (named(first)?, named(second)?);
    let mut pairs = vec![];
    for (name, path) in a {
        let Some(other) = b.remove(&name) else {
            return Err(Error::file(
                &path,
                format!("there is no picture of this name in {}", second.display()),
            ));
        };
        pairs.push((name.display().to_string(), path, other));
    }
    match b.into_values().next() {
        Some(path) => {
            Err(Error::file(&path, format!("there is no picture of this name in {}", first.display())))
        }
        None => Ok(pairs),
    }
}
