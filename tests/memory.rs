//! Memory: what a run takes is what was said before it, and nothing is held twice.
#![cfg(target_os = "linux")]

#[path = "common/folder.rs"]
mod folder;

use folder::{Folder, golden, joined};
use ldm::exec::{Device, Graph, peak};
use ldm::graph::Layout;
use ldm::io::Checkpoint;
use ldm::models::Inventory;
use ldm::pipeline::load;
use ldm::tensor::DType;
use serde_json::json;
use std::fs::OpenOptions;
use std::process::Command;

/// Of two hundred megabytes of weights, only what threads convert at a moment is there twice: less than the smaller of the
/// two tensors in 16 bits (which pages of the file are still there at the peak is a matter of time). The other tests of this file look at other processes, so that the peak is that of this one.
#[test]
fn weights_are_never_held_twice() {
    let f = Folder::new();
    let (o, i, wide) = (1024, 1536, 6000);
    let (conv, linear) = (o * i * 9 * 4, wide * wide * 4);
    let header = json!({
        "conv.weight": {"dtype": "F32", "shape": [o, i, 3, 3], "data_offsets": [0, conv]},
        "linear.weight": {"dtype": "F32", "shape": [wide, wide], "data_offsets": [conv, conv + linear]},
    });
    // Zeros that take no room on the disk.
    let path = f.write("w.safetensors", joined(&header.to_string(), &[]));
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() + (conv + linear) as u64).unwrap();
    for dtype in [DType::BF16, DType::F32] {
        let mut g = Graph::new();
        g.weight("conv.weight", Layout::Conv, dtype, [o, 3, 3, i]).unwrap();
        g.weight("linear.weight", Layout::Linear, dtype, [wide, wide]).unwrap();
        let before = peak().unwrap();
        let weights = load(Checkpoint::open(&path).unwrap(), &Inventory::of(&[g]), &Device::Cpu).unwrap();
        let most = match dtype {
            // The peak so far is that of the process alone; then that of the first turn.
            DType::BF16 => before + weights.bytes(),
            _ => before + weights.bytes() / 2,
        };
        let extra = peak().unwrap().saturating_sub(most);
        assert!(extra < o * i * 9 * 2, "{dtype}: {extra} bytes beside {} of weights", weights.bytes());
    }
}

/// A number after a word of a program's output.
fn number(text: &str, after: &str) -> usize {
    let rest = text.split_once(after).unwrap_or_else(|| panic!("no `{after}` in {text}")).1;
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

fn ldm(args: &[&str]) -> String {
    let done = Command::new(env!("CARGO_BIN_EXE_ldm")).args(args).output().unwrap();
    let text = [done.stdout, done.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    assert!(done.status.success(), "{text}");
    text
}

#[test]
fn a_run_takes_what_info_says() {
    let f = Folder::new();
    let (model, out) = (golden("sd15-tiny"), f.path("x.png"));
    let (model, out) = (model.to_str().unwrap(), out.to_str().unwrap());
    let size = ["-W", "256", "-H", "256", "--steps", "1"];
    for more in [&[][..], &["--vae-tiling"]] {
        let info = ldm(&[&["info", model], &size[..], more].concat());
        let sample = ["sample", "-m", model, "-p", "x", "-s", "1", "-o", out, "--device", "cpu"];
        let run = ldm(&[&sample, &size[..], more].concat());
        let (said, real) = (number(&info, "peak: "), number(&run, "memory: "));
        assert_eq!(said, number(&run, "at the peak, "));
        // Two per cent, and what this build's own code and its threads' buffers may add to so small a model.
        let bound = real / 50 + (12 << 20);
        assert!(
            said.abs_diff(real) <= bound,
            "{more:?}: {said} bytes were said and {real} taken\n{info}{run}"
        );
    }
}

/// Each phase of a run but the step, to which a checkpoint adds, is the largest of some run here: the run takes what was said
/// before it, and not much less.
#[test]
fn a_training_run_takes_no_more_than_it_says() {
    let f = Folder::new();
    let run = |kind: &str, name: &str, most: &str, more: &[&str]| {
        let out = f.path(name);
        let start = ["train", kind, "-o", out.to_str().unwrap(), "--device", "cpu", "-t", "2", "steps=2"];
        let text = ldm(&[&start[..], &["optimiser.warmup=0", "log_every=1"], more].concat());
        let (real, said) = (number(&text, "memory: "), number(&text, "at the peak, "));
        println!("{name}: {real} bytes taken, {said} said\n{text}");
        assert!(text.contains(&format!("at the most, for {most}: ")), "{name}: {text}");
        assert!(said >= real, "{name}: {said} bytes were said and {real} taken\n{text}");
        // What the process takes for itself is said for larger ones than this.
        assert!(
            said <= real + real / 4 + (24 << 20),
            "{name}: {said} bytes were said and {real} taken\n{text}"
        );
    };
    let vae = [
        "model.block_out_channels=[16,32]",
        "model.norm_num_groups=4",
        "model.mid_block_add_attention=false",
    ];
    let autoencoder = |name: &str, most: &str, more: &[&str]| {
        run("autoencoder", name, most, &[&vae[..], more].concat());
    };
    autoencoder("first", "a checkpoint", &["data.size=64", "batch_size=8", "sample.every=0"]);
    autoencoder("shown", "pictures", &["data.size=64", "batch_size=1", "sample={every=2, count=64}"]);
    let wide = ["data.size=32", "batch_size=1", "sample.every=0", "model.block_out_channels=[64,64]"];
    autoencoder("stage", "a checkpoint", &wide);
    let stage = |name: &str| format!("first_stage.path={}", f.path(name).display());
    let given = format!("model.text_encoder.path={}", golden("sd15-tiny").display());
    let diffusion = |name: &str, most: &str, more: &[&str]| {
        let unet = ["model.unet.norm_num_groups=4", "model.unet.attention_head_dim=2"];
        run("diffusion", name, most, &[&unet[..], more].concat());
    };
    let (first, stage, small) = (stage("first"), stage("stage"), "model.unet.block_out_channels=[8,16]");
    // The UNet with its moments, and a copy of them all; pictures far larger than a step's; and the encoder, which sees whole
    // batches of pictures, once, or each time.
    let plain = ["data.size=32", "batch_size=1", "sample.every=0", &first, &given];
    diffusion("wide", "a checkpoint", &[&plain[..], &["model.unet.block_out_channels=[128,256]"]].concat());
    diffusion(
        "drawn",
        "pictures",
        &["data.size=128", "batch_size=1", "sample={every=2, steps=1}", small, &first],
    );
    let large = ["data.size=64", "batch_size=8", "sample.every=0", small, &stage];
    let none = ["data.count=8", "conditioning.kind=none", "model.unet.attention_head_dim=8"];
    diffusion("kept", "the latents of all pictures", &[&large[..], &none].concat());
    diffusion("live", "the first stage", &[&large[..], &[&*given]].concat());
}

#[test]
fn what_would_fit_is_named() {
    let f = Folder::new();
    let (model, out) = (golden("sd15-tiny"), f.path("x.png"));
    let args =
        ["sample", "-m", model.to_str().unwrap(), "-p", "x", "-o", out.to_str().unwrap(), "--device", "cpu"];
    let size = ["-W", "65536", "-H", "32768", "--batch-size", "2"];
    let done = Command::new(env!("CARGO_BIN_EXE_ldm")).args(args).args(size).output().unwrap();
    let err = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(2), "{err}");
    let (_, fits) = err.split_once("what fits: ").unwrap();
    let fits: &str = fits.split_whitespace().next().unwrap();
    let (w, h) = fits.split_once('x').unwrap();
    let (w, h): (usize, usize) = (w.parse().unwrap(), h.parse().unwrap());
    assert!((256..65536).contains(&w) && w.abs_diff(2 * h) <= 16, "{fits}: the shape is kept");
    // It does fit, and the next larger one does not.
    let planned = |w: usize| {
        let (w, h) = (w.to_string(), (w / 2 / 4 * 4).to_string());
        number(&ldm(&["info", args[2], "-W", &w, "-H", &h, "--batch-size", "2"]), "peak: ")
    };
    let have = number(&err, "its weights; ");
    assert!(planned(w) <= have && planned(w + 256) > have, "{fits}: {} of {have}", planned(w));
}
