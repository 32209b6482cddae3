//! Conditions of diffusion models, from a run to a picture: trained, killed and taken up, exported, sampled.

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
use ldm::io::{Checkpoint, ModelFolder, png::read_rgb8};
use ldm::pipeline::{Pipeline, Request};
use ldm::train::Kind;
use program::{Outcome, ldm, text};
use runs::{check_kills, curve, diffusion, first_stage, losses, near, same_steps};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

fn sample(model: &Path, out: &Path, more: &[&str]) -> Outcome {
    let start = ["sample", "-m", text(model), "-o", text(out), "--steps", "2", "-s", "3", "--device", "cpu"];
    ldm(&[&start[..], more].concat())
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

const CLASSES: &[&str] = &["conditioning.kind=class", "data.objects=1", "model.class_embedder.embed_dim=16"];

#[test]
fn a_model_of_classes_learns_is_exported_and_samples() {
    let f = Folder::new();
    let (first, run) = (first_stage(&f), f.path("run"));
    let own = ["steps=30", "data.count=12", "sample.every=30", "sample.steps=2", "conditioning.drop=0.5"];
    let o = diffusion(&first, &run, &[CLASSES, &own].concat());
    assert!(o.code == 0 && o.err.contains("; 38 classes"), "{}", o.err);
    assert!(run.join("samples/step-00000030.png").is_file() && !o.err.contains("no pictures"), "{}", o.err);
    let all = losses(&run);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&all[20..]) < 0.95 * mean(&all[..5]), "{all:?}");

    let export = run.join("export");
    let index = read(&export.join("model_index.json"));
    assert_eq!(index["class_embedder"], json!(["ldm", "ClassEmbedder"]));
    assert_eq!(
        index["id2label"].as_object().unwrap().len(),
        38,
        "the pairs that training never shows have no name"
    );
    assert_eq!(index["id2label"]["0"], "red circle");
    let config = read(&export.join("class_embedder/config.json"));
    assert_eq!(
        (&config["n_classes"], &config["embed_dim"]),
        (&json!(43), &json!(16)),
        "42, and the null class"
    );

    let (a, b) = (f.path("a.png"), f.path("b.png"));
    for (out, class) in [(&a, "blue ring"), (&b, "16")] {
        let o = sample(&export, out, &["--class", class]);
        assert_eq!(o.code, 0, "{}", o.err);
    }
    assert!(read_rgb8(&a).unwrap().pixels == read_rgb8(&b).unwrap().pixels, "blue ring is class 16");
    let o = sample(&export, &b, &["--class", "red ring"]);
    assert_eq!(o.code, 0, "{}", o.err);
    assert!(read_rgb8(&a).unwrap().pixels != read_rgb8(&b).unwrap().pixels);
    // A list of classes; the folder is one that `ldm eval` reads.
    let (list, many) = (f.write("classes.txt", "a red circle\nblue ring\n"), f.path("many"));
    let from_list = ["--from-file", text(&list), "-s", "2"];
    let start = ["sample", "-m", text(&export), "-o", text(&many), "--steps", "2", "--device", "cpu"];
    let o = ldm(&[&start[..], &from_list].concat());
    assert_eq!(o.code, 0, "{}", o.err);
    assert!(read_rgb8(many.join("0001.png")).unwrap().pixels == read_rgb8(&a).unwrap().pixels);

    for (more, say) in [
        (&["--class", "blue rign"][..], "did you mean `blue ring`"),
        (&["--class", "purple triangle"], "got `purple triangle`; did you mean `purple"),
        (&["--class", "43"], "by name or number (0 to 41)"),
        (&["-p", "a blue ring"], "this model draws classes, not texts: want --class"),
    ] {
        let o = sample(&export, &b, more);
        assert!(o.code == 2 && o.err.contains(say), "{more:?}: {}", o.err);
    }
    let o = ldm(&["sample", "-m", text(&folder::golden("sd15-tiny")), "--class", "ring", "-o", text(&b)]);
    assert!(o.code == 2 && o.err.contains("this model draws texts"), "{}", o.err);
    let o = ldm(&[&start[..], &["--from-file", text(&f.write("bad.txt", "red ring\nred rign\n"))]].concat());
    assert!(o.code == 2 && o.err.contains("line 2: class: ") && o.err.contains("`red ring`"), "{}", o.err);
}

/// Numbers of classes are their ranks among the folders of the pictures.
#[test]
fn classes_come_from_folders_too() {
    let f = Folder::new();
    let (first, run) = (first_stage(&f), f.path("run"));
    let (drawn, pictures) = (f.path("drawn"), f.path("pictures"));
    let o = ldm(&["data", "shapes", "-n", "4", "--size", "32", "-o", text(&drawn)]);
    assert_eq!(o.code, 0, "{}", o.err);
    let files = fs::read_dir(&drawn).unwrap().map(|e| e.unwrap().path());
    for (i, file) in files.filter(|p| p.extension().is_some_and(|e| e == "png")).enumerate() {
        let class = pictures.join(["cat", "dog"][i % 2]);
        fs::create_dir_all(&class).unwrap();
        fs::rename(&file, class.join(file.file_name().unwrap())).unwrap();
    }
    let source = format!("data.source={}", text(&pictures));
    let own = [&source, "conditioning.kind=class", "steps=2", "checkpoint.every=1"];
    let o = diffusion(&first, &run, &own);
    assert!(o.code == 0 && o.err.contains("; 2 classes"), "{}", o.err);
    let index = read(&run.join("export/model_index.json"));
    assert_eq!(index["id2label"], json!({"0": "cat", "1": "dog"}));
    let table = Checkpoint::open(run.join("export/class_embedder")).unwrap();
    assert_eq!(table.entry("embedding.weight").unwrap().shape, [3, 64]);
    let o = diffusion(&first, &f.path("other"), &[&own[..], &["sample.prompts=[\"dgo\"]"]].concat());
    assert!(o.code == 2 && o.err.contains("sample.prompts: class: ") && o.err.contains("`dog`"), "{}", o.err);
    // Other classes are another run.
    fs::rename(pictures.join("cat"), pictures.join("elk")).unwrap();
    let o = diffusion(&first, &run, &[&own[..], &["steps=3", "--resume"]].concat());
    assert!(o.code == 2 && o.err.contains("classes: want those that the run began with"), "{}", o.err);
    let plain = f.path("plain");
    fs::rename(pictures.join("dog"), &plain).unwrap();
    let o = diffusion(&first, &f.path("none"), &[&format!("data.source={}", text(&plain)), own[1]]);
    assert!(o.code == 1 && o.err.contains("its pictures have no class"), "{}", o.err);
}

const BERT: &[&str] = &[
    "conditioning.kind=bert",
    "model.text_encoder.d_model=16",
    "model.text_encoder.encoder_layers=1",
    "model.text_encoder.encoder_attention_heads=3",
    "model.text_encoder.head_dim=8",
    "model.text_encoder.encoder_ffn_dim=24",
    "model.text_encoder.max_position_embeddings=12",
    "tokenizer.vocab_size=150",
];

/// A run that came to no checkpoint is none, and its vocabulary is not another one's.
#[test]
fn a_new_run_learns_its_own_vocabulary() {
    let f = Folder::new();
    let (first, run) = (first_stage(&f), f.path("run"));
    let words = |size: &str| {
        let o =
            diffusion(&first, &run, &[BERT, &["steps=1", "data.count=6", "sample.every=0", size]].concat());
        assert_eq!(o.code, 0, "{}", o.err);
        let words = fs::read_to_string(run.join("export/tokenizer/vocab.txt")).unwrap();
        fs::remove_dir_all(run.join("checkpoints")).unwrap();
        words.lines().count()
    };
    let sizes = ["tokenizer.vocab_size=150", "tokenizer.vocab_size=110", "tokenizer.vocab_size=130"];
    assert_eq!(sizes.map(words), [150, 110, 130]);
}

/// The folder is one of diffusers' `LDMTextToImagePipeline`; `tests/models.rs` compares such a one with it.
#[test]
fn a_model_with_the_text_encoder_of_2022_learns_is_exported_and_samples() {
    let f = Folder::new();
    let (first, run) = (first_stage(&f), f.path("run"));
    let own = ["steps=30", "data.count=6", "sample.every=30", "sample.steps=2"];
    let o = diffusion(&first, &run, &[BERT, &own].concat());
    assert_eq!(o.code, 0, "{}", o.err);
    assert!(run.join("samples/step-00000030.png").is_file() && !o.err.contains("no pictures"), "{}", o.err);
    let all = losses(&run);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&all[20..]) < 0.95 * mean(&all[..5]), "{all:?}");

    let export = run.join("export");
    let index = read(&export.join("model_index.json"));
    assert_eq!(index["_class_name"], "LDMTextToImagePipeline");
    assert_eq!(index["bert"], json!(["latent_diffusion", "LDMBertModel"]));
    assert_eq!(index["vqvae"], json!(["diffusers", "AutoencoderKL"]));
    let words = fs::read_to_string(export.join("tokenizer/vocab.txt")).unwrap();
    let words: Vec<&str> = words.lines().collect();
    assert_eq!(words[..4], ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]);
    assert!(words.contains(&"circle") || words.contains(&"red") || words.contains(&"a"), "{words:?}");
    assert_eq!(read(&export.join("bert/config.json"))["vocab_size"], words.len());

    let (a, b) = (f.path("a.png"), f.path("b.png"));
    for (out, prompt) in [(&a, "A large red  circle"), (&b, "a large red circle")] {
        let o = sample(&export, out, &["-p", prompt]);
        assert_eq!(o.code, 0, "{}", o.err);
    }
    assert!(read_rgb8(&a).unwrap().pixels == read_rgb8(&b).unwrap().pixels);
    let o = sample(&export, &b, &["-p", "a small blue square", "-n", "red"]);
    assert_eq!(o.code, 0, "{}", o.err);
    assert!(read_rgb8(&a).unwrap().pixels != read_rgb8(&b).unwrap().pixels);
    let o = sample(&export, &b, &["-p", "a circle", "--clip-skip", "2"]);
    assert!(o.code == 2 && o.err.contains("clip skip: want 1 to 1"), "{}", o.err);
}

const NONE: &[&str] = &["conditioning.kind=none", "model.unet.attention_head_dim=8"];

/// The folder is one of diffusers' `LDMPipeline`; `tests/models.rs` compares such a one with it.
#[test]
fn a_model_without_a_condition_learns_is_exported_and_samples() {
    let f = Folder::new();
    let (first, run) = (first_stage(&f), f.path("run"));
    let own = ["steps=30", "data.count=6", "sample.every=30", "sample.steps=2"];
    let o = diffusion(&first, &run, &[NONE, &own].concat());
    assert!(o.code == 0 && o.err.contains("; no condition"), "{}", o.err);
    assert!(run.join("samples/step-00000030.png").is_file() && !o.err.contains("no pictures"), "{}", o.err);
    let all = losses(&run);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&all[20..]) < 0.95 * mean(&all[..5]), "{all:?}");
    let export = run.join("export");
    let index = read(&export.join("model_index.json"));
    assert_eq!(index["_class_name"], "LDMPipeline");
    assert_eq!(index["unet"], json!(["diffusers", "UNet2DModel"]));
    let (a, b) = (f.path("a.png"), f.path("b.png"));
    let o = sample(&export, &a, &[]);
    assert_eq!(o.code, 0, "{}", o.err);
    let o = sample(&export, &b, &["--cfg-scale", "1"]);
    assert_eq!(o.code, 0, "{}", o.err);
    assert!(read_rgb8(&a).unwrap().pixels == read_rgb8(&b).unwrap().pixels, "there is nothing to guide");
    for more in [["-p", "a ring"], ["--class", "ring"], ["-n", "a ring"]] {
        let o = sample(&export, &b, &more);
        assert!(o.code == 2 && o.err.contains("this model has no condition"), "{more:?}: {}", o.err);
    }
    let o = sample(&folder::golden("sd15-tiny"), &b, &[]);
    assert!(o.code == 2 && o.err.contains("want --prompt TEXT"), "{}", o.err);
    let o = ldm(&["info", text(&export)]);
    assert!(
        o.code == 0 && o.out.contains("UNet2DModel") && !o.out.contains("does not sample"),
        "{}{}",
        o.out,
        o.err
    );
}

/// A text encoder that is given stays as it is, bit for bit, or is trained from there.
#[test]
fn a_text_encoder_may_be_given() {
    let f = Folder::new();
    let first = first_stage(&f);
    for (kind, model, part) in [("text", "sd15-tiny", "text_encoder"), ("bert", "ldm-tiny", "bert")] {
        let from = folder::golden(model);
        let (kind, path) =
            (format!("conditioning.kind={kind}"), format!("model.text_encoder.path={}", text(&from)));
        let (frozen, trained) = (f.path(&format!("{part}-frozen")), f.path(&format!("{part}-trained")));
        let own = [&kind, &path, "steps=2", "average.decay=0", "optimiser.rate=1e-3"];
        let o = diffusion(&first, &frozen, &own);
        assert_eq!(o.code, 0, "{}", o.err);
        let o = diffusion(&first, &trained, &[&own[..], &["model.text_encoder.train=true"]].concat());
        assert_eq!(o.code, 0, "{}", o.err);
        let given = Checkpoint::open(from.join(part)).unwrap();
        let [kept, moved] =
            [&frozen, &trained].map(|run| Checkpoint::open(run.join("export").join(part)).unwrap());
        let (mut same, mut other) = (0, 0);
        for name in moved.names() {
            let [was, kept, moved] = [&given, &kept, &moved].map(|c| c.read_f32(name).unwrap());
            assert!(was == kept, "{name} has changed in a frozen {part}");
            let far = was.iter().zip(&moved).fold(0.0f32, |far, (a, b)| far.max((a - b).abs()));
            assert!(far < 4e-3, "{name} of {part} does not begin as it was: {far}");
            if was == moved { same += 1 } else { other += 1 }
        }
        assert!(other > 0 && same < other, "{part}: {other} tensors trained, {same} not");
        for run in [&frozen, &trained] {
            let o = sample(&run.join("export"), &f.path("a.png"), &["-p", "a sea"]);
            assert_eq!(o.code, 0, "{}", o.err);
        }
        // Its tokenizer goes with it.
        let file = if part == "bert" { "vocab.txt" } else { "vocab.json" };
        let [a, b] =
            [&from, &frozen.join("export")].map(|m| fs::read(m.join("tokenizer").join(file)).unwrap());
        assert!(a == b);
        assert!(frozen.join("checkpoints/step-00000002.safetensors").is_file());
        let o = diffusion(&first, &frozen, &[&own[..], &["steps=4", "--resume"]].concat());
        assert_eq!(o.code, 0, "{}", o.err);
        // Another one in its place is none to go on with.
        let (name, tensor) = match part {
            "bert" => ("bert/model.safetensors", "model.layer_norm.bias"),
            _ => ("text_encoder/model.safetensors", "text_model.final_layer_norm.bias"),
        };
        for entry in [part, "tokenizer"] {
            fs::create_dir_all(f.path(entry)).unwrap();
            for file in fs::read_dir(from.join(entry)).unwrap().map(|e| e.unwrap()) {
                fs::copy(file.path(), f.path(entry).join(file.file_name())).unwrap();
            }
        }
        let copied = format!("model.text_encoder.path={}", text(&f.path(part)));
        let (run, own) =
            (f.path(&format!("{part}-copied")), [&kind, &copied, "average.decay=0", "accumulate=2"]);
        let o = diffusion(&first, &run, &[&own[..], &["steps=1"]].concat());
        assert_eq!(o.code, 0, "{}", o.err);
        f.fill(name, tensor, 0.5);
        let o = diffusion(&first, &run, &[&own[..], &["steps=2", "--resume"]].concat());
        let say = format!("{}: want the text encoder that the run began with", f.path(part).display());
        assert!(o.code == 2 && o.err.contains(&say), "{}", o.err);
    }
    let path = format!("model.text_encoder.path={}", text(&folder::golden("ldm-tiny")));
    for (more, say) in [
        (
            &[&*path][..],
            "`architectures`: want CLIPTextModel, as conditioning.kind is text; got [\"LDMBertModel\"]",
        ),
        (&[&path, "conditioning.kind=bert", "tokenizer.vocab_size=600"], "brings its own"),
        (&[&path, "conditioning.kind=bert", "model.text_encoder.d_model=8"], "`model.text_encoder.d_model`"),
        (
            &["model.text_encoder.path=/no/such"],
            "`model.text_encoder.path`: want the folder of a text encoder",
        ),
    ] {
        let o = diffusion(&first, &f.path("none"), more);
        assert!(o.code == 2 && o.err.contains(say), "{more:?}: {}", o.err);
    }
}

/// A batch of several prompts or classes has the picture of each, with guidance and without.
#[test]
fn each_picture_of_a_batch_may_have_its_own_prompt() {
    let cases = [
        ("sd15-tiny", ["a red circle", "the sea at night"]),
        ("ldm-tiny", ["a red circle", "the sea at night"]),
        ("class-tiny", ["0", "2"]),
    ];
    for (model, words) in cases {
        let folder = ModelFolder::open(folder::golden(model)).unwrap();
        let pipeline = Pipeline::open(&folder, &Device::Cpu, None).unwrap();
        let request = |prompts: &[&str], cfg_scale: f64, seed: u64| Request {
            prompts: prompts.iter().map(|p| p.to_string()).collect(),
            batch: 2,
            steps: 2,
            cfg_scale,
            seed,
            ..Request::default()
        };
        for guidance in [1.0, 3.0] {
            let make = |r: &Request| pipeline.generate(r, &mut ()).unwrap();
            let both = make(&request(&words, guidance, 5));
            // What one picture is given must not reach the other: each as it is made alone.
            let alone = [0, 1].map(|i| {
                let own = Request { batch: 1, ..request(&words[i..=i], guidance, 5 + i as u64) };
                make(&own).remove(0)
            });
            for (i, (a, b)) in both.iter().zip(&alone).enumerate() {
                let off = a.rgb.iter().zip(&b.rgb).map(|(a, b)| a.abs_diff(*b)).max();
                assert!(
                    off <= Some(1) && a.seed == b.seed,
                    "{model}, guidance {guidance}, {i}: off by {off:?}"
                );
            }
            let turned = make(&request(&[words[1], words[0]], guidance, 5));
            assert!(
                both[0].rgb != turned[0].rgb && both[1].rgb != turned[1].rgb,
                "{model}: the words do nothing"
            );
        }
        for wrong in [&[words[0]][..], &[words[0], words[1], words[0]]] {
            for guidance in [1.0, 3.0] {
                let e = pipeline.generate(&request(wrong, guidance, 5), &mut ()).unwrap_err().to_string();
                let say =
                    format!("prompts: want one for each of the 2 pictures, or none; got {}", wrong.len());
                assert!(e.contains(&say), "{model}: {e}");
            }
        }
    }
}

#[test]
fn settings_that_do_not_go_together_are_refused() {
    let f = Folder::new();
    let first = first_stage(&f);
    for (more, say) in [
        (&["conditioning.kind=class"][..], "`conditioning.kind`: want scenes of one object"),
        (&["conditioning.kind=clas", "data.objects=1"], "want one of text, bert, class, none"),
        (
            &["conditioning.kind=class", "data.objects=1", "tokenizer.vocab_size=600"],
            "no such section where conditioning.kind is class",
        ),
        (
            &["conditioning.kind=class", "data.objects=1", "model.text_encoder.hidden_size=8"],
            "`model.text_encoder`",
        ),
        (
            &["conditioning.kind=class", "data.objects=1", "model.class_embedder.embed_dim=0"],
            "`model.class_embedder.embed_dim`: want at least 1",
        ),
        (
            &["conditioning.kind=class", "data.objects=1", "model.unet.cross_attention_dim=9"],
            "`model.unet.cross_attention_dim`: want model.class_embedder.embed_dim 64",
        ),
        (&["model.class_embedder.embed_dim=8"], "`model.class_embedder`"),
        (&["conditioning.kind=none", "conditioning.drop=0.5"], "`conditioning.drop`"),
        (&["conditioning.kind=none", "model.unet.cross_attention_dim=8"], "`model.unet.cross_attention_dim`"),
        (&["conditioning.kind=bert", "model.text_encoder.hidden_size=8"], "`model.text_encoder.hidden_size`"),
        (&["conditioning.kind=bert", "tokenizer.vocab_size=99"], "`tokenizer.vocab_size`: want at least 109"),
    ] {
        let o = diffusion(&first, &f.path("run"), more);
        assert!(o.code == 2 && o.err.contains(say), "{more:?}: {}", o.err);
        assert!(!f.path("run").exists(), "{more:?}");
    }
}

/// Each batch of a step has its own classes or captions.
#[test]
fn a_step_of_two_batches_has_the_conditions_of_one_that_is_twice_as_large() {
    let f = Folder::new();
    let first = first_stage(&f);
    for (name, kind) in [("class", CLASSES), ("bert", BERT)] {
        let [whole, parts] = ["whole", "parts"].map(|half| f.path(&format!("{name}-{half}")));
        let own = ["steps=2", "checkpoint.every=1", "conditioning.drop=0.5"];
        for (run, how) in
            [(&whole, ["batch_size=4", "accumulate=1"]), (&parts, ["batch_size=2", "accumulate=2"])]
        {
            let o = diffusion(&first, run, &[kind, &own, &how].concat());
            assert_eq!(o.code, 0, "{name}: {}", o.err);
        }
        same_steps(name, &whole, &parts);
    }
}

fn goes_on_bit_for_bit(more: &[&str]) {
    let f = Folder::new();
    check_kills(&f, &first_stage(&f), more);
}

#[test]
fn a_killed_run_of_classes_goes_on_bit_for_bit() {
    goes_on_bit_for_bit(CLASSES);
}

#[test]
fn a_killed_run_with_the_text_encoder_of_2022_goes_on_bit_for_bit() {
    goes_on_bit_for_bit(BERT);
}

#[test]
fn a_killed_run_without_a_condition_goes_on_bit_for_bit() {
    goes_on_bit_for_bit(NONE);
}

#[test]
fn a_killed_run_with_a_frozen_text_encoder_goes_on_bit_for_bit() {
    goes_on_bit_for_bit(&[&format!("model.text_encoder.path={}", text(&folder::golden("sd15-tiny")))]);
}

/// The settings of a run of a moment on an emulated card.
fn settings(first: &Path, more: Value) -> Value {
    let mut all = json!({
        "steps": 3, "batch_size": 1, "log_every": 1, "sample": {"every": 0}, "data": {"size": 32},
        "optimiser": {"warmup": 0, "rate": 1e-3}, "first_stage": {"path": text(first)},
        "model": {"unet": {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 2}},
    });
    for (section, values) in more.as_object().unwrap() {
        for (key, value) in values.as_object().unwrap() {
            all[section][key] = value.clone();
        }
    }
    all
}

/// The emulated card takes the same steps as the CPU.
#[test]
fn conditions_on_cuda() {
    let f = Folder::new();
    let first = first_stage(&f);
    let bert = json!({
        "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 3, "head_dim": 8, "encoder_ffn_dim": 24,
        "max_position_embeddings": 12,
    });
    let given = json!({"path": text(&folder::golden("ldm-tiny"))});
    let all = [
        (
            "bert",
            settings(&first, json!({"conditioning": {"kind": "bert"}, "model": {"text_encoder": bert}})),
        ),
        (
            "given",
            settings(&first, json!({"conditioning": {"kind": "bert"}, "model": {"text_encoder": given}})),
        ),
        (
            "none",
            settings(
                &first,
                json!({"conditioning": {"kind": "none"}, "model": {"unet": {
                    "block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8,
                }}}),
            ),
        ),
        (
            "class",
            settings(
                &first,
                json!({
                    "data": {"objects": 1}, "conditioning": {"kind": "class"}, "model": {"class_embedder": {"embed_dim": 16}},
                }),
            ),
        ),
    ];
    let cpu = all
        .each_ref()
        .map(|(name, own)| curve(Kind::Diffusion, own, &f.path(&format!("{name}-cpu")), &Device::Cpu));
    on_cuda_with(&["order=forward;async=late"], |device| {
        for ((name, own), cpu) in all.iter().zip(&cpu) {
            near(cpu, &curve(Kind::Diffusion, own, &f.path(&format!("{name}-cuda")), device));
        }
    });
}
