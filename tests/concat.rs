//! Diffusion models that are conditioned by channels beside their latents: masks and smaller pictures, from a run to its export.

#[path = "common/folder.rs"]
mod folder;
#[path = "common/program.rs"]
mod program;
#[path = "common/runs.rs"]
mod runs;

mod common;

use common::on_cuda_with;
use folder::Folder;
use ldm::exec::Device;
use ldm::io::{Checkpoint, png::read_rgb8};
use ldm::train::Kind;
use program::{ldm, text};
use runs::{check_kills, curve, diffusion, first_stage, losses, near};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

const TEXT: &[&str] = &[
    "model.text_encoder.hidden_size=16",
    "model.text_encoder.intermediate_size=32",
    "model.text_encoder.num_hidden_layers=1",
    "model.text_encoder.max_position_embeddings=12",
];
const MASK: &str = "conditioning.concat=mask";
const NONE: &[&str] = &["conditioning.kind=none", "model.unet.attention_head_dim=8"];
const SMALL: &[&str] = &[NONE[0], NONE[1], "conditioning.concat=low_res"];

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn learnt(run: &Path) {
    let all = losses(run);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&all[20..]) < 0.95 * mean(&all[..5]), "{all:?}");
}

/// Conditions, pictures that were made, pictures of the data: of `n` pictures.
fn rows_of_a_grid(file: &Path, n: usize) -> [Vec<u8>; 3] {
    let grid = read_rgb8(file).unwrap();
    assert_eq!((grid.width, grid.height), (34 * n + 2, 3 * 34 + 2));
    [0, 1, 2].map(|row| {
        let lines = grid.pixels.chunks(3 * grid.width).skip(2 + 34 * row).take(32);
        lines.flatten().copied().collect()
    })
}

#[test]
fn a_model_that_paints_learns_and_is_exported() {
    let f = Folder::new();
    let (first, run) = (first_stage(&f), f.path("run"));
    let own = [MASK, "steps=30", "data.count=6", "sample.every=30", "sample.steps=2"];
    let o = diffusion(&first, &run, &[TEXT, &own].concat());
    assert!(o.code == 0 && o.err.contains(", and masks: ") && !o.err.contains("no pictures"), "{}", o.err);
    assert!(!run.join("latents.safetensors").exists(), "what a mask leaves is another picture each time");
    learnt(&run);
    let [conditions, made, data] = rows_of_a_grid(&run.join("samples/step-00000030.png"), 4);
    let holes = |x: &[u8]| x.chunks(3).filter(|p| [[96; 3], [160; 3]].contains(&[p[0], p[1], p[2]])).count();
    assert!(holes(&conditions) > 100 && holes(&data) == 0 && made != data);
    // Outside of the holes a condition is the picture.
    let same = conditions.chunks(3).zip(data.chunks(3)).filter(|(a, b)| a == b).count();
    assert_eq!(same, data.len() / 3 - holes(&conditions));
    let export = run.join("export");
    let index = read(&export.join("model_index.json"));
    assert_eq!(index["_class_name"], "StableDiffusionInpaintPipeline");
    assert!(index["_diffusers_version"].is_string(), "diffusers loads no such pipeline without");
    assert!(!o.err.contains("will not run the export"), "{}", o.err);
    let config = read(&export.join("unet/config.json"));
    assert_eq!((&config["in_channels"], &config["out_channels"]), (&json!(9), &json!(4)));
    let unet = Checkpoint::open(export.join("unet")).unwrap();
    assert_eq!(unet.entry("conv_in.weight").unwrap().shape, [8, 9, 3, 3]);
    // All channels have a say: mask and masked latents too.
    let moved = Checkpoint::open(run.join("checkpoints/step-00000030.safetensors")).unwrap();
    let moments = moved.read_f32("m.unet.conv_in.weight").unwrap();
    for channel in 0..9 {
        let sum: f32 = moments.iter().skip(channel).step_by(9).map(|v| v.abs()).sum();
        assert!(sum > 0.0, "channel {channel} has no gradient");
    }
}

#[test]
fn classes_paint_too_and_prompts_are_drawn_where_they_are_told() {
    let f = Folder::new();
    let (first, run) = (first_stage(&f), f.path("run"));
    let own = ["conditioning.kind=class", "data.objects=1", "steps=2", "sample.every=2", "sample.steps=2"];
    let told = "sample.prompts=[\"blue ring\", \"3\", \"red cross\"]";
    let o = diffusion(&first, &run, &[&own[..], &[MASK, told]].concat());
    assert!(o.code == 0 && !o.err.contains("no pictures"), "{}", o.err);
    rows_of_a_grid(&run.join("samples/step-00000002.png"), 3);
    let index = read(&run.join("export/model_index.json"));
    assert_eq!(index["_class_name"], "StableDiffusionInpaintPipeline");
    assert_eq!(index["class_embedder"], json!(["ldm", "ClassEmbedder"]));
}

/// The inpainting of Rombach et al. 2022: the picture around is all that it is told.
#[test]
fn a_mask_may_be_the_only_condition() {
    let f = Folder::new();
    let (first, run) = (first_stage(&f), f.path("run"));
    let own = [NONE[0], NONE[1], MASK, "steps=30", "data.count=6", "sample.every=30", "sample.steps=2"];
    let o = diffusion(&first, &run, &own);
    assert!(o.code == 0 && !o.err.contains("no pictures"), "{}", o.err);
    assert!(o.err.contains("it has no pipeline with a mask and no other condition"), "{}", o.err);
    learnt(&run);
    rows_of_a_grid(&run.join("samples/step-00000030.png"), 4);
    let export = run.join("export");
    let index = read(&export.join("model_index.json"));
    assert_eq!(
        (&index["_class_name"], &index["unet"]),
        (&json!("LDMPipeline"), &json!(["diffusers", "UNet2DModel"]))
    );
    assert_eq!(read(&export.join("unet/config.json"))["in_channels"], 9);
    let scale = &read(&export.join("vqvae/config.json"))["scaling_factor"];
    assert!(scale.as_f64().unwrap() != 1.0, "{scale}: that pipeline knows the factor");
}

/// diffusers' own pipeline wants latents of three channels; these have four.
#[test]
fn a_model_that_enlarges_learns_and_is_exported() {
    let f = Folder::new();
    let (first, run) = (first_stage(&f), f.path("run"));
    let own = ["steps=30", "data.count=6", "sample.every=30", "sample.steps=2"];
    let o = diffusion(&first, &run, &[SMALL, &own].concat());
    assert!(
        o.code == 0 && o.err.contains("no condition but the picture") && !o.err.contains("no pictures"),
        "{}",
        o.err
    );
    assert!(
        o.err.contains("LDMSuperResolutionPipeline wants latents of 3 channels, these have 4"),
        "{}",
        o.err
    );
    learnt(&run);
    let [conditions, _, data] = rows_of_a_grid(&run.join("samples/step-00000030.png"), 4);
    let off: u64 = conditions.iter().zip(&data).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    assert!(conditions != data && off / (data.len() as u64) < 12, "{off}: large pixels of the same picture");
    let kept = Checkpoint::open(run.join("latents.safetensors")).unwrap();
    assert_eq!(kept.entry("low_res").unwrap().shape, [6, 16 * 16 * 3]);
    let export = run.join("export");
    let index = read(&export.join("model_index.json"));
    assert_eq!(index["_class_name"], "LDMSuperResolutionPipeline");
    assert_eq!(index["unet"], json!(["diffusers", "UNet2DModel"]));
    assert_eq!(index["vqvae"], json!(["diffusers", "AutoencoderKL"]));
    assert!(index.get("text_encoder").is_none() && index.get("bert").is_none());
    assert_eq!(read(&export.join("unet/config.json"))["in_channels"], 7);
    // The factor of the latents is in the autoencoder's weights.
    assert_eq!(read(&export.join("vqvae/config.json"))["scaling_factor"], 1.0);
    let notes = Checkpoint::open(run.join("checkpoints/step-00000030.safetensors")).unwrap();
    let scale: f32 = notes.metadata()["scaling_factor"].parse().unwrap();
    let [own, theirs] = [first.join("export/vae"), export.join("vqvae")]
        .map(|vae| Checkpoint::open(vae).unwrap().read_f32("post_quant_conv.weight").unwrap());
    assert!(scale != 1.0 && own.iter().zip(&theirs).all(|(a, b)| (a / scale - b).abs() <= 1e-6 * a.abs()));
    // With pictures that are encoded as they come.
    let o = diffusion(&first, &f.path("live"), &[SMALL, &["steps=2", "first_stage.cache=false"]].concat());
    assert_eq!(o.code, 0, "{}", o.err);
}

/// Pictures of a folder, cropped by chance, one of which cannot be read.
#[test]
fn folders_of_pictures_are_masked_and_made_smaller() {
    let f = Folder::new();
    let (first, pictures) = (first_stage(&f), f.path("pictures"));
    let o = ldm(&["data", "shapes", "-n", "5", "--size", "40", "-o", text(&pictures)]);
    assert_eq!(o.code, 0, "{}", o.err);
    let files = fs::read_dir(&pictures).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<_> = files.filter(|p| p.extension().is_some_and(|e| e == "png")).collect();
    files.sort();
    fs::write(&files[1], &fs::read(&files[1]).unwrap()[..99]).unwrap();
    let data = format!("data.source={}", text(&pictures));
    for (name, own) in [("mask", &[TEXT, &[MASK, "data.crop=random"]].concat()[..]), ("small", SMALL)] {
        let [whole, parts] = ["whole", "parts"].map(|half| f.path(&format!("{name}-{half}")));
        let own = [own, &[&*data, "checkpoint.every=2", "sample.every=4", "sample.steps=1"]].concat();
        for (run, more) in
            [(&whole, &["steps=4"][..]), (&parts, &["steps=2"]), (&parts, &["steps=4", "--resume"])]
        {
            let o = diffusion(&first, run, &[&own[..], more].concat());
            assert!(o.code == 0 && !o.err.contains("no pictures"), "{name}: {}", o.err);
        }
        let last = |run: &Path| fs::read(run.join("checkpoints/step-00000004.safetensors")).unwrap();
        assert!(last(&whole) == last(&parts), "{name}: other weights after a pause");
    }
}

/// Gradients of several batches added up are those of one batch, and blocks that are made again change no bit.
#[test]
fn batches_are_added_up_and_blocks_made_again() {
    let f = Folder::new();
    let first = first_stage(&f);
    for (name, own) in
        [("mask", &[TEXT, &[MASK]].concat()[..]), ("small", &[SMALL, &["data.count=7"]].concat())]
    {
        let runs = [
            ("whole", ["batch_size=4", "accumulate=1"]),
            ("parts", ["batch_size=2", "accumulate=2"]),
            ("again", ["batch_size=4", "recompute=true"]),
        ];
        let [whole, parts, again] = runs.map(|(half, how)| {
            let run = f.path(&format!("{name}-{half}"));
            let o = diffusion(&first, &run, &[own, &["steps=2"], &how].concat());
            assert_eq!(o.code, 0, "{name}: {}", o.err);
            run
        });
        let [a, b] = [&whole, &parts].map(|run| losses(run));
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 2e-5 * a), "{name}: {a:?}, {b:?}");
        let [a, b] = [&whole, &again]
            .map(|run| Checkpoint::open(run.join("checkpoints/step-00000002.safetensors")).unwrap());
        assert!(a.names().all(|n| a.read_f32(n).unwrap() == b.read_f32(n).unwrap()), "{name}");
    }
}

#[test]
fn settings_that_do_not_go_together_are_refused() {
    let f = Folder::new();
    let first = first_stage(&f);
    let bert = "conditioning.kind=bert";
    let low = "conditioning.concat=low_res";
    for (more, say) in [
        (
            &["conditioning.concat=masks"][..],
            "`conditioning.concat`: want one of mask, low_res; got \"masks\"",
        ),
        (
            &["conditioning.conct=mask"],
            "`conditioning.conct`: want a key that the engine knows; did the writer mean `concat`?",
        ),
        (&[MASK, bert], "`conditioning.concat`: want no such value where conditioning.kind is bert"),
        (&[MASK, bert], "mask goes with text, class or none, low_res with none; got \"mask\""),
        (&[low], "`conditioning.concat`: want no such value where conditioning.kind is text"),
        (&[MASK, "first_stage.cache=true"], "`first_stage.cache`: want false, or no such key: with masks"),
        (
            &[MASK, "model.unet.in_channels=4"],
            "`model.unet.in_channels`: want 9: the first stage's 4 channels, and 5 more",
        ),
        (
            &[low, NONE[0], "model.unet.in_channels=4"],
            "`model.unet.in_channels`: want 7: the first stage's 4 channels, and 3 more",
        ),
        (&["model.unet.in_channels=9"], "`model.unet.in_channels`: want the first stage's 4 channels"),
        (
            &[MASK, "model.unet.out_channels=9"],
            "`model.unet.out_channels`: want the first stage's 4 channels",
        ),
    ] {
        let o = diffusion(&first, &f.path("run"), more);
        assert!(o.code == 2 && o.err.contains(say), "{more:?}: {}", o.err);
        assert!(!f.path("run").exists(), "{more:?}");
    }
    // The condition belongs to a run.
    let run = f.path("other");
    assert_eq!(diffusion(&first, &run, &[TEXT, &[MASK, "steps=1"]].concat()).code, 0);
    let o = diffusion(
        &first,
        &run,
        &[TEXT, &["steps=2", "--config", text(&f.write("a.toml", "")), "--resume"]].concat(),
    );
    assert!(o.code == 2 && o.err.contains("conditioning"), "{}", o.err);
}

#[test]
fn a_killed_run_with_masks_goes_on_bit_for_bit() {
    let f = Folder::new();
    check_kills(&f, &first_stage(&f), &[TEXT, &[MASK, "accumulate=2"]].concat());
}

#[test]
fn a_killed_run_with_smaller_pictures_goes_on_bit_for_bit() {
    let f = Folder::new();
    check_kills(&f, &first_stage(&f), &[SMALL, &["data.count=7"]].concat());
}

/// The emulated card takes the same steps as the CPU.
#[test]
fn channels_on_cuda() {
    let f = Folder::new();
    let first = first_stage(&f);
    let settings = |conditioning: Value, heads: usize| {
        json!({
            "steps": 3, "batch_size": 1, "log_every": 1, "sample": {"every": 3, "steps": 1, "prompts": []}, "data": {"size": 32, "count": 1},
            "optimiser": {"warmup": 0, "rate": 1e-3}, "first_stage": {"path": text(&first)}, "conditioning": conditioning,
            "model": {"unet": {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": heads}},
        })
    };
    let mut mask = settings(json!({"concat": "mask"}), 2);
    mask["model"]["text_encoder"] = json!({"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 12});
    let small = settings(json!({"kind": "none", "concat": "low_res"}), 8);
    let all = [("mask", mask), ("small", small)];
    let grid = |run: &Path| rows_of_a_grid(&run.join("samples/step-00000003.png"), 1);
    let cpu = all.each_ref().map(|(name, own)| {
        let run = f.path(&format!("{name}-cpu"));
        (curve(Kind::Diffusion, own, &run, &Device::Cpu), grid(&run))
    });
    on_cuda_with(&["order=forward;async=late"], |device| {
        for ((name, own), (losses, seen)) in all.iter().zip(&cpu) {
            let run = f.path(&format!("{name}-cuda"));
            near(losses, &curve(Kind::Diffusion, own, &run, device));
            let theirs = grid(&run);
            assert!(seen[0] == theirs[0] && seen[2] == theirs[2], "{name}: other data");
            let off = seen[1].iter().zip(&theirs[1]).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            assert!(off <= 2, "{name}: pictures differ by {off} of 255");
        }
    });
}
