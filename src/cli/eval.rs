//! `ldm eval`: scores of pictures.

use super::print;
use crate::data::folder::Folder;
use crate::data::prompt::Prompt;
use crate::data::recognise::{Found, Seen, recognise};
use crate::data::score::{CRITERIA, Tally, Verdict, judge};
use crate::error::{Error, Result};
use crate::io::picture;
use clap::{Args, Subcommand};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
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

pub(super) fn run(a: Arguments) -> Result<ExitCode> {
    match a.what {
        What::Shapes(a) => shapes(a),
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
