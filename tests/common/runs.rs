//! Small training runs as processes, whole and killed.
#![allow(dead_code)]

use super::folder::Folder;
use super::program::{Outcome, ldm, text};
use ldm::exec::Device;
use ldm::io::Checkpoint;
use ldm::rng::Small;
use ldm::train::{Kind, Settings, Standing, Watch};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What all runs here have in common: they take a moment on two cores.
const SMALL: &[&str] = &[
    "data.size=32",
    "batch_size=2",
    "optimiser.warmup=0",
    "optimiser.rate=3e-3",
    "log_every=1",
    "sample.every=0",
    "--device",
    "cpu",
    "-t",
    "1",
];
const UNET: &[&str] = &[
    "model.unet.block_out_channels=[8,16]",
    "model.unet.norm_num_groups=4",
    "model.unet.attention_head_dim=2",
];

/// A first stage with factor 2, hardly trained.
pub fn first_stage(f: &Folder) -> PathBuf {
    let out = f.path("first");
    let own = ["steps=2", "model.block_out_channels=[8,8]", "model.norm_num_groups=4"];
    let start = ["train", "autoencoder", "-o", text(&out), "model.mid_block_add_attention=false"];
    let o = ldm(&[&start[..], SMALL, &own].concat());
    assert_eq!(o.code, 0, "{}", o.err);
    out
}

/// The arguments of a diffusion run on a first stage.
fn arguments<'a>(first: &'a Path, run: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let start = ["train", "diffusion", "--first-stage", text(first), "-o", text(run)];
    [&start[..], SMALL, UNET, &["average.decay=0.9"], more].concat()
}

/// A diffusion run on a first stage.
pub fn diffusion(first: &Path, run: &Path, more: &[&str]) -> Outcome {
    ldm(&arguments(first, run, more))
}

/// Losses by step.
pub fn losses(run: &Path) -> Vec<f64> {
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    lines.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["loss"].as_f64().unwrap()).collect()
}

/// The losses of two steps, and the gradients of the first, of two runs that take the same pictures in other batches: within rounding.
pub fn same_steps(name: &str, whole: &Path, parts: &Path) {
    let [a, b] = [whole, parts].map(losses);
    let near = |a: f64, b: f64| (a - b).abs() <= 2e-5 * a.abs();
    assert!(a.len() == 2 && a.iter().zip(&b).all(|(a, b)| near(*a, *b)), "{name}: {a:?}, {b:?}");
    // The first moments are the gradient of the first step, but for a factor.
    let [a, b] = [whole, parts]
        .map(|run| Checkpoint::open(run.join("checkpoints/step-00000001.safetensors")).unwrap());
    assert_eq!(a.names().collect::<Vec<_>>(), b.names().collect::<Vec<_>>(), "{name}");
    let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let moments = || a.names().filter(|n| n.starts_with("m.")).map(|n| (n, a.read_f32(n).unwrap()));
    let all = moments().map(|(_, m)| norm(&m).powi(2)).sum::<f64>().sqrt();
    for (tensor, x) in moments() {
        let y = b.read_f32(tensor).unwrap();
        let off = norm(&x.iter().zip(&y).map(|(x, y)| x - y).collect::<Vec<_>>());
        let most = 1e-4 * (norm(&x) + 1e-3 * all);
        assert!(off <= most, "{name}: {tensor}: off by {off:e} of {:e}", norm(&x));
    }
}

/// All files below a folder with their bytes.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = vec![];
    let mut waiting = vec![folder.to_path_buf()];
    while let Some(at) = waiting.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => waiting.push(path),
                false => found.push((path.strip_prefix(folder).unwrap().into(), fs::read(&path).unwrap())),
            }
        }
    }
    found.sort();
    found
}

/// The arguments of an autoencoder run.
pub fn autoencoder_arguments<'a>(run: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let start = ["train", "autoencoder", "-o", text(run), "model.mid_block_add_attention=false"];
    let model = ["model.block_out_channels=[8,8]", "model.norm_num_groups=4"];
    [&start[..], SMALL, &model, more].concat()
}

/// A diffusion run on a first stage, killed: see [`goes_on`].
pub fn check_kills(f: &Folder, first: &Path, more: &[&str]) {
    let more = [more, &["steps=12", "checkpoint.every=3", "checkpoint.newest=2"]].concat();
    goes_on(f, 12, |run| arguments(first, run, &more).into_iter().map(String::from).collect());
}

/// A run of `steps` steps that is killed with its first checkpoint, of step 3, and then at random moments ends with the bytes of
/// one that is not: last checkpoint, losses, export. Again until there were as many kills as `LDM_KILLS` says.
pub fn goes_on(f: &Folder, steps: usize, arguments: impl Fn(&Path) -> Vec<String>) {
    let want = std::env::var("LDM_KILLS").map_or(1, |n| n.parse().unwrap());
    let whole = f.path("whole");
    let start = Instant::now();
    let o = ldm(&arguments(&whole).iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(o.code, 0, "{}", o.err);
    let time = start.elapsed();
    let seed = u64::from(std::process::id());
    let (mut draw, mut all) = (Small::new(seed), 0);
    while all < want {
        let broken = f.path(&format!("broken-{all}"));
        let kills =
            killed(&arguments(&broken), &broken, |k| time.mul_f64(draw.range(0.1, 0.5 + 0.2 * k as f64)));
        println!("{kills} kills, seed {seed}");
        assert!(kills > 0, "the first one comes with the first checkpoint");
        let last =
            |run: &Path| fs::read(run.join(format!("checkpoints/step-{steps:08}.safetensors"))).unwrap();
        assert!(last(&whole) == last(&broken), "other weights after {kills} kills, seed {seed}");
        assert_eq!(losses(&whole), losses(&broken), "{kills} kills, seed {seed}");
        let [a, b] = [&whole, &broken].map(|run| files(&run.join("export")));
        assert!(a == b, "another export after {kills} kills, seed {seed}");
        let kept: Vec<_> =
            fs::read_dir(broken.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
        let whole_files = kept.iter().all(|n| n.to_string_lossy().ends_with(".safetensors"));
        assert!(whole_files && kept.len() <= 3, "{kept:?}");
        all += kills;
    }
}

/// Starts a run and kills it until it has ended; how often.
fn killed(arguments: &[String], run: &Path, mut wait: impl FnMut(usize) -> Duration) -> usize {
    let first = run.join("checkpoints/step-00000003.safetensors");
    for kills in 0.. {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ldm"))
            .args(arguments)
            .arg("--resume")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Later ones live longer, so that the run ends.
        let (start, limit) = (Instant::now(), wait(kills));
        while if kills == 0 { !first.is_file() } else { start.elapsed() < limit } {
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success());
                return kills;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    unreachable!()
}

struct Losses(Vec<f64>);

impl Watch for Losses {
    fn step(&mut self, s: &Standing) -> ldm::Result<()> {
        self.0.push(s.loss);
        Ok(())
    }
    fn say(&mut self, _: &str) {}
}

/// The losses of a run in this process.
pub fn curve(kind: Kind, settings: &Value, run: &Path, device: &Device) -> Vec<f64> {
    let settings = Settings::read(kind, settings.clone(), "settings").unwrap();
    let mut losses = Losses(vec![]);
    ldm::train::run(&settings, run, false, device, &mut losses).unwrap();
    losses.0
}

/// Two courses of the same run, on different devices.
#[track_caller]
pub fn near(a: &[f64], b: &[f64]) {
    let close = a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-3 * a.abs());
    assert!(close && a.len() == b.len(), "{a:?}, {b:?}");
}
