//! Runs as their users start them: `ldm train autoencoder`, `ldm train diffusion`, killed and taken up, exported and sampled.

#[path = "common/folder.rs"]
mod folder;
#[path = "common/program.rs"]
mod program;
#[path = "common/runs.rs"]
mod runs;

mod common;

use common::on_cuda_with;
use folder::{Folder, golden};
use ldm::exec::Device;
use ldm::io::{Checkpoint, png::read_rgb8};
use ldm::tensor::DType;
use ldm::train::Kind;
use program::{Outcome, ldm, text};
use runs::{curve, near, same_steps};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// A model that takes a moment on two cores.
const AUTOENCODER: &[&str] = &[
    "data.size=32",
    "batch_size=2",
    "model.block_out_channels=[8,8]",
    "model.norm_num_groups=4",
    "model.mid_block_add_attention=false",
    "optimiser.warmup=0",
    "optimiser.rate=3e-3",
    "log_every=2",
    "sample.every=0",
];

/// A codebook, and a discriminator that starts in between.
const ADVERSARIAL: &[&str] = &[
    "model._class_name=VQModel",
    "model.num_vq_embeddings=32",
    "loss.discriminator={kind=\"hinge\", weight=0.8, width=4, layers=2, start=4}",
];

const DIFFUSION: &[&str] = &[
    "data.size=32",
    "batch_size=2",
    "model.unet.block_out_channels=[8,16]",
    "model.unet.norm_num_groups=4",
    "model.unet.attention_head_dim=2",
    "model.text_encoder.hidden_size=16",
    "model.text_encoder.intermediate_size=32",
    "model.text_encoder.num_hidden_layers=1",
    "model.text_encoder.max_position_embeddings=12",
    "optimiser.warmup=0",
    "optimiser.rate=1e-3",
    "average.decay=0.9",
    "log_every=2",
    "sample.every=0",
];

fn train(kind: &str, out: &Path, more: &[&str]) -> Outcome {
    let base = if kind == "autoencoder" { AUTOENCODER } else { DIFFUSION };
    let start = ["train", kind, "-o", text(out), "--device", "cpu", "-t", "1"];
    ldm(&[&start[..], base, more].concat())
}

fn autoencoder(out: &Path, more: &[&str]) {
    let o = train("autoencoder", out, more);
    assert_eq!(o.code, 0, "{}", o.err);
}

fn metrics(run: &Path) -> Vec<Value> {
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn losses(run: &Path) -> Vec<(u64, f64)> {
    metrics(run).iter().map(|m| (m["step"].as_u64().unwrap(), m["loss"].as_f64().unwrap())).collect()
}

fn last(run: &Path, step: usize) -> Vec<u8> {
    fs::read(run.join(format!("checkpoints/step-{step:08}.safetensors"))).unwrap()
}

#[test]
fn an_autoencoder_learns_and_is_exported() {
    let f = Folder::new();
    let run = f.path("run");
    let own = ["steps=30", "sample.every=15", "sample.count=2", "checkpoint.every=10", "data.count=2"];
    let o = train("autoencoder", &run, &own);
    assert_eq!((o.code, o.out.trim()), (0, text(&run.join("export"))), "{}", o.err);
    for word in ["parameters", "planned", "30/30", "s/step", "waiting for data"] {
        assert!(o.err.contains(word), "want `{word}` in: {}", o.err);
    }
    let all = losses(&run);
    assert_eq!(all.len(), 15);
    assert!(all[14].1 < 0.8 * all[0].1, "{all:?}");
    let grid = read_rgb8(run.join("samples/step-00000030.png")).unwrap();
    assert_eq!((grid.width, grid.height), (2 * 34 + 2, 2 * 34 + 2));
    let vae = Checkpoint::open(run.join("export/vae")).unwrap();
    assert_eq!(vae.entry("quant_conv.weight").unwrap().shape, [8, 8, 1, 1]);
    assert_eq!(vae.entry("encoder.conv_in.weight").unwrap().shape, [8, 3, 3, 3]);
    let config: Value =
        serde_json::from_slice(&fs::read(run.join("export/vae/config.json")).unwrap()).unwrap();
    assert_eq!(config["down_block_types"], json!(["DownEncoderBlock2D", "DownEncoderBlock2D"]));
    let o = ldm(&["plot", text(&run)]);
    assert_eq!((o.code, o.out.trim()), (0, text(&run.join("loss.png"))), "{}", o.err);
    assert_eq!(read_rgb8(run.join("loss.png")).unwrap().width, 960);
    assert!(ldm(&["plot", text(&run), "--metric", "los"]).err.contains("loss"));
    // The folder is taken; a run that goes on has the settings that it had.
    assert!(train("autoencoder", &run, &own).err.contains("--resume"));
    let o = train("autoencoder", &run, &["steps=32", "batch_size=3", "data.count=2", "--resume"]);
    assert!(o.code == 2 && o.err.contains("`batch_size` = 2; got 3"), "{}", o.err);
    // What a killed run was writing goes away.
    let left = ["checkpoints", "export/vae", "samples"].map(|part| run.join(part).join(".ldm-1-0.tmp"));
    left.iter().for_each(|path| fs::write(path, "half").unwrap());
    let o = train("autoencoder", &run, &["steps=32", "data.count=2", "--resume"]);
    assert!(o.code == 0 && o.err.contains("goes on after step 30"), "{}", o.err);
    assert!(left.iter().all(|path| !path.exists()));
    assert_eq!(losses(&run).last().unwrap().0, 32);
}

/// Perceptual weights of a narrow network.
fn lpips() -> String {
    format!("loss.lpips={{file=\"{}\", weight=0.5}}", text(&golden("train/vq-hinge.safetensors")))
}

#[test]
fn a_vq_autoencoder_with_a_discriminator_learns_and_is_a_first_stage() {
    let f = Folder::new();
    let (first, run) = (f.path("first"), f.path("run"));
    let own = ["steps=30", "sample.every=15", "sample.count=2", "data.count=2", &lpips()];
    let o = train("autoencoder", &first, &[ADVERSARIAL, &own].concat());
    assert_eq!(o.code, 0, "{}", o.err);
    for word in ["of them the discriminator's", "perplexity ", "adaptive_weight ", "discriminator.loss "] {
        assert!(o.err.contains(word), "want `{word}` in: {}", o.err);
    }
    assert!(!o.err.contains("no LPIPS") && !o.err.contains("no pictures"), "{}", o.err);
    let all = metrics(&first);
    let part = |i: usize, name: &str| all[i][name].as_f64().unwrap_or_else(|| panic!("{name}: {}", all[i]));
    let last = all.len() - 1;
    // This perceptual distance is most of the loss.
    assert!(part(last, "perceptual") < 0.8 * part(0, "perceptual"), "{all:?}");
    assert!(part(last, "reconstruction") < part(0, "reconstruction"), "{all:?}");
    assert!((1.0..=32.0).contains(&part(last, "perplexity")) && part(last, "used") >= 1.0);
    assert_eq!((part(0, "discriminator.loss"), part(1, "discriminator.norm")), (0.0, 0.0), "starts at 4");
    assert!(part(last, "discriminator.loss") > 0.0 && part(last, "discriminator.norm") > 0.0);
    // The parts make the loss, in the mean over the steps of a line before the start.
    let sum = part(0, "reconstruction") + 0.5 * part(0, "perceptual") + part(0, "codebook");
    assert!((part(0, "loss") - sum).abs() < 1e-5 * sum, "{}", all[0]);
    let grid = read_rgb8(first.join("samples/step-00000030.png")).unwrap();
    assert_eq!((grid.width, grid.height), (2 * 34 + 2, 2 * 34 + 2));
    // The export is the autoencoder alone; the checkpoint has all that a run needs.
    let vae = Checkpoint::open(first.join("export/vae")).unwrap();
    assert_eq!(vae.entry("quantize.embedding.weight").unwrap().shape, [32, 3]);
    assert!(vae.names().all(|name| !name.contains("discriminator") && !name.contains("perceptual")));
    let file = first.join("checkpoints/step-00000030.safetensors");
    let checkpoint = Checkpoint::open(&file).unwrap();
    for name in ["main.3.running_var", "main.3.weight"] {
        assert!(checkpoint.entry(&format!("discriminator.{name}")).is_some(), "{name}");
    }
    assert!(checkpoint.entry("v.discriminator.main.0.bias").is_some());
    assert!(checkpoint.metadata().contains_key("lpips"));
    let own = ["--first-stage", text(&first), "steps=4", "data.count=6", "sample.every=4", "sample.steps=2"];
    let o = train("diffusion", &run, &own);
    assert!(o.code == 0 && !o.err.contains("no pictures"), "{}", o.err);
    assert!(run.join("samples/step-00000004.png").is_file());
}

/// Without a file, LPIPS is off and the run says so; with another file than it began with, a run does not go on.
#[test]
fn perceptual_weights_are_those_that_a_run_began_with() {
    let f = Folder::new();
    let (plain, run) = (f.path("plain"), f.path("run"));
    let o = train("autoencoder", &plain, &["steps=2"]);
    assert!(o.code == 0 && o.err.contains("no LPIPS: loss.lpips.file"), "{}", o.err);
    assert!(metrics(&plain)[0].get("perceptual").is_none());
    let file = f.write("lpips.safetensors", fs::read(golden("train/vq-hinge.safetensors")).unwrap());
    let own = format!("loss.lpips.file={}", text(&file));
    let more = |steps: &'static str| train("autoencoder", &run, &[&own, steps, "--resume"]);
    assert_eq!(more("steps=2").code, 0);
    assert!(metrics(&run)[0]["perceptual"].as_f64().unwrap() > 0.0);
    let o = more("steps=4");
    assert!(o.code == 0 && o.err.contains("goes on after step 2"), "{}", o.err);
    f.fill("lpips.safetensors", "lpips.lin0.model.1.weight", 0.5);
    let o = more("steps=6");
    assert!(o.code == 1 && o.err.contains("they have changed since"), "{}: {}", o.code, o.err);
}

/// The norms of the discriminator start with the first batch, whose data the first step takes again.
#[test]
fn a_run_with_actnorm_goes_on_where_it_stopped() {
    let f = Folder::new();
    let (whole, parts) = (f.path("whole"), f.path("parts"));
    let judge = "loss.discriminator={kind=\"vanilla\", width=4, layers=2, norm=\"actnorm\"}";
    let own = [judge, "accumulate=2", "checkpoint.every=1", "checkpoint.newest=9"];
    autoencoder(&whole, &[&own[..], &["steps=4"]].concat());
    autoencoder(&parts, &[&own[..], &["steps=2"]].concat());
    autoencoder(&parts, &[&own[..], &["steps=4", "--resume"]].concat());
    assert!(last(&whole, 4) == last(&parts, 4));
    let read = |step: usize, name: &str| {
        let file = whole.join(format!("checkpoints/step-{step:08}.safetensors"));
        Checkpoint::open(file).unwrap().read_f32(name).unwrap()
    };
    let scale = "discriminator.main.3.scale";
    assert!(read(1, scale).iter().all(|v| *v > 0.0 && *v != 1.0), "{:?}", read(1, scale));
    assert!(read(1, scale) != read(4, scale));
}

/// Batches whose gradients are added up make the step that one batch of all their pictures makes, within rounding.
#[test]
fn a_step_of_two_batches_is_a_step_of_one_that_is_twice_as_large() {
    let f = Folder::new();
    let first = f.path("first");
    autoencoder(&first, &["steps=2"]);
    let path = format!("first_stage.path={}", text(&first));
    let vq = &ADVERSARIAL[..2];
    let cases: [(&str, &str, &[&str]); 4] = [
        ("kl", "autoencoder", &[]),
        ("vq", "autoencoder", vq),
        ("live", "diffusion", &[&path]),
        ("kept", "diffusion", &[&path, "data.count=7", "loss.snr_gamma=5", "loss.noise_offset=0.1"]),
    ];
    for (name, kind, own) in cases {
        let [whole, parts] = ["whole", "parts"].map(|half| f.path(&format!("{name}-{half}")));
        let steps = ["steps=2", "checkpoint.every=1", "log_every=1"];
        for (run, how) in
            [(&whole, ["batch_size=4", "accumulate=1"]), (&parts, ["batch_size=2", "accumulate=2"])]
        {
            let o = train(kind, run, &[own, &steps, &how].concat());
            assert_eq!(o.code, 0, "{name}: {}", o.err);
        }
        same_steps(name, &whole, &parts);
    }
}

#[test]
fn blocks_that_are_made_again_change_no_bit_and_f16_little() {
    let f = Folder::new();
    let runs = [("kept", "recompute=false"), ("again", "recompute=true"), ("half", "dtype=f16")];
    for (name, setting) in runs {
        autoencoder(&f.path(name), &["steps=6", "data.count=2", setting]);
    }
    let [kept, again, half] = runs.map(|(name, _)| {
        Checkpoint::open(f.path(name).join("checkpoints/step-00000006.safetensors")).unwrap()
    });
    for name in kept.names() {
        let [a, b] = [&kept, &again].map(|c| c.read_f32(name).unwrap());
        assert!(a == b, "{name} differs");
    }
    assert!(half.entry("loss_scale").is_some() && kept.entry("loss_scale").is_none());
    let [a, b] = ["kept", "half"].map(|name| losses(&f.path(name)));
    assert!(a.iter().zip(&b).all(|(a, b)| (a.1 - b.1).abs() < 0.02 * a.1), "{a:?}, {b:?}");
}

#[test]
fn settings_are_checked_before_anything_is_made() {
    let f = Folder::new();
    for (kind, setting, say) in [
        (
            "autoencoder",
            "optimiser.rte=1",
            "`optimiser.rte`: want a key that the engine knows; did the writer mean `rate`?",
        ),
        ("autoencoder", "model.latnt_channels=4", "did the writer mean `latent_channels`?"),
        (
            "autoencoder",
            "optimiser={schedule=\"cosine\", least=0.1}",
            "`optimiser.least`: want no such key: the schedule is cosine",
        ),
        (
            "autoencoder",
            "optimiser={schedule=\"linear\", warmup=2000}",
            "fewer steps than the run, which has 1000",
        ),
        ("autoencoder", "optimiser.rate=fast", "`optimiser.rate`: want a number; got \"fast\""),
        ("autoencoder", "batch_size=0", "`batch_size`: want at least 1; got 0"),
        ("autoencoder", "data.source=/no/such", "a folder of pictures; there is none at /no/such"),
        ("autoencoder", "data.size=33", "a size that is a multiple of 2"),
        ("autoencoder", "dtype=f8", "`dtype`"),
        ("autoencoder", "loss.distance=l3", "`loss.distance`"),
        ("autoencoder", "scheduler.beta_end=0.1", "`scheduler`"),
        ("autoencoder", "optimiser", "want KEY=VALUE"),
        ("autoencoder", "steps.more=1", "`steps`"),
        ("autoencoder", "model._class_name=VQGAN", "`model._class_name`: want one of AutoencoderKL, VQModel"),
        ("autoencoder", "loss.codebook.beta=1", "`loss.codebook`: want no such key: an AutoencoderKL"),
        (
            "autoencoder",
            "loss.discriminator.kind=wgan",
            "`loss.discriminator.kind`: want one of hinge, vanilla",
        ),
        ("autoencoder", "loss.discriminator.wieght=1", "did the writer mean `weight`?"),
        ("autoencoder", "loss.discriminator.layers=4", "n layers want 3 · 2^n of them"),
        ("autoencoder", "loss.lpips.weight=1", "`loss.lpips.file`"),
        ("autoencoder", "loss.lpips.file=/no/such", "a safetensors file with the weights of LPIPS"),
        ("autoencoder", "accumulate=0", "`accumulate`: want at least 1; got 0"),
        ("diffusion", "seed=1", "`first_stage.path`"),
        ("diffusion", "first_stage.path=/no/such", "`first_stage.path`"),
    ] {
        let o = train(kind, &f.path("run"), &[setting]);
        assert!(o.code == 2 && o.err.contains(say), "{setting}: {}: {}", o.code, o.err);
        assert!(!f.path("run").exists(), "{setting}");
    }
    let o = train("autoencoder", &f.path("run"), &["--config", text(&f.write("run.toml", "steps = = 3"))]);
    assert!(o.code == 2 && o.err.contains("run.toml: not TOML"), "{}", o.err);
    let config = f.write("run.toml", "steps = 2\n[loss]\ndistance = \"l2\"\nkl_wieght = 1\n");
    let o = train("autoencoder", &f.path("run"), &["--config", text(&config)]);
    assert!(
        o.code == 2 && o.err.contains("run.toml: `loss.kl_wieght`") && o.err.contains("`kl_weight`"),
        "{}",
        o.err
    );
}

#[test]
fn a_diffusion_model_learns_is_exported_and_samples() {
    let f = Folder::new();
    let (first, run) = (f.path("first"), f.path("run"));
    autoencoder(&first, &["steps=4"]);
    let stage = ["--first-stage", text(&first), "data.count=6"];
    let own = ["steps=40", "batch_size=8", "optimiser.rate=3e-3", "sample.every=40", "sample.steps=2"];
    let o = train("diffusion", &run, &[&stage[..], &own].concat());
    assert_eq!(o.code, 0, "{}", o.err);
    let all = losses(&run);
    let mean = |part: &[(u64, f64)]| part.iter().map(|l| l.1).sum::<f64>() / part.len() as f64;
    assert!(mean(&all[15..]) < 0.95 * mean(&all[..3]), "{all:?}");
    assert!(run.join("samples/step-00000040.png").is_file());
    let picture = f.path("a.png");
    let export = run.join("export");
    let prompt = ["sample", "-m", text(&export), "-p", "a large red circle", "-o", text(&picture)];
    let o = ldm(&[&prompt[..], &["--steps", "2", "--device", "cpu"]].concat());
    assert_eq!(o.code, 0, "{}", o.err);
    assert_eq!(read_rgb8(&picture).unwrap().width, 32);
    // A list of prompts gives the pictures of each by itself.
    let list = f.write("prompts.txt", "a small blue square\n a large red circle \n");
    let (many, device) = (f.path("many"), ["-s", "6", "--steps", "2", "--device", "cpu"]);
    let from_list = ["sample", "-m", text(&export), "--from-file", text(&list)];
    let o = ldm(&[&from_list[..], &["-o", text(&many)], &device].concat());
    assert_eq!((o.code, o.out.lines().count()), (0, 2), "{}", o.err);
    let o = ldm(&[&prompt[..], &["-s", "7"], &device[2..]].concat());
    assert_eq!(o.code, 0, "{}", o.err);
    assert!(fs::read(many.join("0001.png")).unwrap() == fs::read(&picture).unwrap());
    assert_eq!(
        fs::read_to_string(many.join("prompts.txt")).unwrap(),
        "a small blue square\na large red circle\n"
    );
    let o = ldm(&[&from_list[..], &device].concat());
    assert!(o.code == 2 && o.err.contains("want a folder"), "{}", o.err);
    // The captions of a data set do as well.
    let data = f.write("metadata.jsonl", "{\"file_name\": \"0.png\", \"text\": \"a large red circle\"}\n\n");
    let (again, seven) = (f.path("again"), ["-s", "7"]);
    let from_data = ["sample", "-m", text(&export), "--from-file", text(&data), "-o", text(&again)];
    let o = ldm(&[&from_data[..], &seven, &device[2..]].concat());
    assert_eq!(o.code, 0, "{}", o.err);
    assert!(fs::read(again.join("0000.png")).unwrap() == fs::read(&picture).unwrap());
    f.write("metadata.jsonl", "{\"file_name\": \"0.png\"}\n");
    let o = ldm(&[&from_data[..], &seven, &device[2..]].concat());
    assert!(o.code == 2 && o.err.contains("line 1: want a key `text`"), "{}", o.err);
    let vae: Value = serde_json::from_slice(&fs::read(export.join("vae/config.json")).unwrap()).unwrap();
    let file = run.join("checkpoints/step-00000040.safetensors");
    let checkpoint = Checkpoint::open(file).unwrap();
    assert_eq!(vae["scaling_factor"].to_string(), checkpoint.metadata()["scaling_factor"]);
    // Averages are what is exported.
    let unet = Checkpoint::open(export.join("unet")).unwrap();
    let name = "time_embedding.linear_1.weight";
    let read = |c: &Checkpoint, name: &str| c.read(name, DType::F32).unwrap().to_f32();
    assert_eq!(read(&unet, name), read(&checkpoint, &format!("ema.unet.{name}")));
    assert_ne!(read(&unet, name), read(&checkpoint, &format!("unet.{name}")));
}

/// Every objective takes steps, on latents that are kept and on such that are made for each step.
#[test]
fn other_objectives() {
    let f = Folder::new();
    let first = f.path("first");
    autoencoder(&first, &["steps=2", "loss.distance=l2", "average.decay=0.9", "export.dtype=bf16"]);
    let stage = ["--first-stage", text(&first), "steps=2"];
    for (i, more) in [
        &["scheduler.prediction_type=v_prediction", "loss.snr_gamma=5", "loss.noise_offset=0.1"][..],
        &["scheduler.prediction_type=sample", "loss.distance=huber", "loss.snr_gamma=5", "data.count=3"],
        &["loss.distance=l1", "conditioning.drop=1", "average.decay=0", "dtype=bf16", "export.dtype=bf16"],
    ]
    .into_iter()
    .enumerate()
    {
        let run = f.path(&format!("run{i}"));
        let o = train("diffusion", &run, &[&stage[..], more].concat());
        assert_eq!(o.code, 0, "{more:?}: {}", o.err);
        assert!(losses(&run)[0].1.is_finite());
        let (export, out) = (run.join("export"), f.path("a.png"));
        let o = ldm(&[
            "sample",
            "-m",
            text(&export),
            "-p",
            "x",
            "-o",
            text(&out),
            "--steps",
            "1",
            "--device",
            "cpu",
        ]);
        assert_eq!(o.code, 0, "{more:?}: {}", o.err);
    }
}

#[test]
fn another_first_stage_in_the_same_place_is_none_to_go_on_with() {
    let f = Folder::new();
    let first = f.path("first");
    autoencoder(&first, &["steps=2"]);
    let path = format!("first_stage.path={}", text(&first));
    let run = f.path("run");
    assert_eq!(train("diffusion", &run, &[&path, "steps=1"]).code, 0);
    autoencoder(&first, &["steps=3", "--resume"]);
    let o = train("diffusion", &run, &[&path, "steps=2", "--resume"]);
    assert!(o.code == 2 && o.err.contains("its weights have changed"), "{}", o.err);
}

/// Gradients beyond f16 in the first step: it is taken again on the same data, and data go on in order.
#[test]
fn a_step_that_was_left_out_loses_no_data() {
    let f = Folder::new();
    for accumulate in ["accumulate=1", "accumulate=2"] {
        let [whole, parts] = ["whole", "parts"].map(|half| f.path(&format!("{half}-{accumulate}")));
        let own = ["dtype=f16", "loss.kl_weight=20000", "checkpoint.every=2", accumulate];
        let o = train("autoencoder", &whole, &[&own[..], &["steps=6"]].concat());
        assert_eq!(o.code, 0, "{}", o.err);
        assert!(o.err.contains("step 0: gradients beyond f16"), "{}", o.err);
        autoencoder(&parts, &[&own[..], &["steps=2"]].concat());
        autoencoder(&parts, &[&own[..], &["steps=6", "--resume"]].concat());
        let [a, b] = [&whole, &parts]
            .map(|run| Checkpoint::open(run.join("checkpoints/step-00000006.safetensors")).unwrap());
        for name in a.names() {
            assert!(a.read_f32(name).unwrap() == b.read_f32(name).unwrap(), "{name} differs");
        }
    }
}

/// A folder of pictures with captions, one of which cannot be read: runs leave it out, name it, and go on.
#[test]
fn a_picture_that_cannot_be_read_ends_no_run() {
    let f = Folder::new();
    let pictures = f.path("pictures");
    let o = ldm(&["data", "shapes", "-n", "5", "--size", "32", "-o", text(&pictures)]);
    assert_eq!(o.code, 0, "{}", o.err);
    let files = fs::read_dir(&pictures).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<_> = files.filter(|p| p.extension().is_some_and(|e| e == "png")).collect();
    files.sort();
    let damaged = files[1].file_name().unwrap().to_string_lossy().into_owned();
    let bytes = fs::read(&files[1]).unwrap();
    fs::write(&files[1], &bytes[..bytes.len() / 2]).unwrap();
    let data = format!("data.source={}", text(&pictures));
    let first = f.path("first");
    let o = train("autoencoder", &first, &[&data, "steps=4", "sample.every=4"]);
    assert!(o.code == 0 && o.err.contains("left out: ") && o.err.contains(&damaged), "{}", o.err);
    assert!(first.join("samples/step-00000004.png").is_file() && !o.err.contains("no pictures"), "{}", o.err);
    let (path, run) = (format!("first_stage.path={}", text(&first)), f.path("run"));
    let o = train("diffusion", &run, &[&data, &path, "steps=4"]);
    assert!(o.code == 0 && o.err.contains("left out: ") && o.err.contains(&damaged), "{}", o.err);
    assert!(run.join("latents.safetensors").is_file(), "the moments are kept");
}

/// The emulated card takes the same steps as the CPU.
#[test]
fn runs_on_cuda() {
    let f = Folder::new();
    let first = json!({
        "steps": 3, "batch_size": 1, "log_every": 1, "sample": {"every": 0}, "data": {"size": 32},
        "optimiser": {"warmup": 0, "rate": 3e-3},
        "model": {"block_out_channels": [8, 8, 8], "norm_num_groups": 4, "mid_block_add_attention": false},
    });
    let adversarial = json!({
        "steps": 2, "batch_size": 1, "accumulate": 2, "log_every": 1, "sample": {"every": 0}, "data": {"size": 32},
        "optimiser": {"warmup": 0, "rate": 3e-3},
        "model": {
            "_class_name": "VQModel", "block_out_channels": [8, 8, 8], "norm_num_groups": 4,
            "mid_block_add_attention": false,
        },
        "loss": {"discriminator": {"width": 4, "layers": 1}},
    });
    let second = json!({
        "steps": 3, "batch_size": 1, "log_every": 1, "sample": {"every": 0}, "data": {"size": 32},
        "optimiser": {"warmup": 0, "rate": 1e-3}, "first_stage": {"path": f.path("cpu").to_str()},
        "model": {
            "unet": {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 2},
            "text_encoder": {
                "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "max_position_embeddings": 12,
            },
        },
    });
    let cpu = curve(Kind::Autoencoder, &first, &f.path("cpu"), &Device::Cpu);
    let cpu1 = curve(Kind::Autoencoder, &adversarial, &f.path("cpu1"), &Device::Cpu);
    let cpu2 = curve(Kind::Diffusion, &second, &f.path("cpu2"), &Device::Cpu);
    on_cuda_with(&["order=forward;async=late"], |device| {
        near(&cpu, &curve(Kind::Autoencoder, &first, &f.path("cuda"), device));
        near(&cpu1, &curve(Kind::Autoencoder, &adversarial, &f.path("cuda1"), device));
        near(&cpu2, &curve(Kind::Diffusion, &second, &f.path("cuda2"), device));
    });
}
