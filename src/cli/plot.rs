//! `ldm plot`: the course of a run as a picture.

use super::{check_output, check_png, print};
use crate::error::{Error, Result};
use crate::io::chart::{Chart, Line};
use clap::Args;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// The folder of a run
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Where the picture goes [default: RUN/loss.png]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Which number of metrics.jsonl: loss, norm, rate, seconds_per_step, waited, or a part of the loss such as kl
    #[arg(long, default_value = "loss", value_name = "NAME")]
    metric: String,
}

pub(super) fn run(a: Arguments) -> Result<ExitCode> {
    let file = a.run.join("metrics.jsonl");
    let text = fs::read_to_string(&file)
        .map_err(|e| Error::invalid(format!("{}: {e}; want the folder of a run", file.display())))?;
    let lines: Vec<Value> = text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let point = |v: &Value| Some((v["step"].as_f64()?, v[&a.metric].as_f64()?));
    let points: Vec<(f64, f64)> = lines.iter().filter_map(point).collect();
    if points.len() < 2 {
        let names = lines
            .first()
            .and_then(Value::as_object)
            .map(|o| o.keys().cloned().collect::<Vec<_>>().join(", "));
        let has = names.map_or("nothing".into(), |n| format!("{} lines of {n}", lines.len()));
        let (file, name) = (file.display(), &a.metric);
        return Err(Error::invalid(format!("{file}: want at least two lines with `{name}`; it has {has}")));
    }
    let output = a.output.unwrap_or_else(|| a.run.join(format!("{}.png", a.metric)));
    check_output(&output)?;
    check_png(&output)?;
    let smooth = smoothed(&points);
    let names = ["step".into(), a.metric];
    let mut chart = Chart { names, lines: vec![Line { points, colour: [170, 190, 220] }] };
    chart.lines.push(Line { points: smooth, colour: [30, 80, 160] });
    chart.write(&output)?;
    print(&format!("{}\n", output.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// The mean over the last twentieth of the line, at each point.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let width = (points.len() / 20).max(1);
    let mean = |i: usize| {
        let part = &points[(i + 1).saturating_sub(width)..=i];
        part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64
    };
    (0..points.len()).map(|i| (points[i].0, mean(i))).collect()
}
