//! The program as its users meet it: each command once, and every kind of bad input. What cannot be done is refused with
//! a message that says what, where and what to do; the exit code is 2 for a request, 1 for a file; nothing is written.

#[path = "common/folder.rs"]
mod folder;
#[path = "common/program.rs"]
mod program;

use folder::{Folder, golden, joined, remove, tensors};
use ldm::io::png::read_rgb8;
use program::{Outcome, ldm, refused, run, text};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// `ldm sample` on a model, into `out.png` of the folder. Later flags overrule: none is given twice here.
fn sample(model: &Path, out: &Path, more: &[&str]) -> Outcome {
    let mut args = vec!["sample", "-m", text(model), "-o", text(out)];
    let set = |flag: &str| more.contains(&flag);
    for (flag, value) in [
        ("-p", "a red circle"),
        ("--steps", "2"),
        ("-s", "5"),
        ("-W", "64"),
        ("-H", "64"),
        ("--device", "cpu"),
    ] {
        if !set(flag) {
            args.extend([flag, value]);
        }
    }
    ldm(&[&args, more].concat())
}

/// A request to the sound model that must be refused with code 2; an old picture must survive.
#[track_caller]
fn bad_request(more: &[&str], say: &[&str]) {
    let f = Folder::new();
    let out = f.write("out.png", "old");
    refused(&f, 2, say, || sample(&golden("sd15-tiny"), &out, more));
}

/// A damaged model that must be refused; an old picture must survive.
#[track_caller]
fn bad_model(code: i32, say: &[&str], damage: impl FnOnce(&Folder)) {
    let f = Folder::with_model();
    let out = f.write("out.png", "old");
    damage(&f);
    refused(&f, code, say, || sample(&f.path("model"), &out, &[]));
}

const UNET: &str = "model/unet/diffusion_pytorch_model.safetensors";
const UNET_CONFIG: &str = "model/unet/config.json";
const VAE: &str = "model/vae/diffusion_pytorch_model.safetensors";
const TEXT: &str = "model/text_encoder/model.safetensors";

#[test]
fn every_command_has_help_and_the_program_a_version() {
    let o = ldm(&["--help"]);
    for command in ["sample", "verify", "info", "convert", "bench", "data", "eval", "train", "plot"] {
        assert!(o.out.contains(command), "{}", o.out);
        let o = ldm(&[command, "--help"]);
        assert!(o.code == 0 && o.out.contains("Usage: ldm ") && o.err.is_empty(), "{}{}", o.out, o.err);
        let o = ldm(&[command, "--no-such-flag"]);
        assert!(o.code == 2 && o.err.contains("--no-such-flag"), "{}", o.err);
    }
    // What belongs to the other kind of run is not offered.
    let offered = |kind| ldm(&["train", kind, "--help"]).out.contains("--first-stage");
    assert_eq!([offered("autoencoder"), offered("diffusion")], [false, true]);
    let o = ldm(&["--version"]);
    assert_eq!((o.code, o.out.trim()), (0, concat!("ldm ", env!("CARGO_PKG_VERSION"))));
    assert_eq!((ldm(&[]).code, ldm(&["smaple"]).code), (2, 2));
}

#[test]
fn a_picture_is_made_the_same_each_time_and_says_how() {
    let f = Folder::new();
    let model = golden("sd15-tiny");
    let [a, b] = ["a.png", "b.png"].map(|n| f.path(n));
    let o = sample(&model, &a, &["-n", "blurry", "--cfg-scale", "5"]);
    assert_eq!((o.code, o.out.trim()), (0, text(&a)), "{}", o.err);
    for threads in ["1", "2"] {
        assert_eq!(sample(&model, &b, &["-n", "blurry", "--cfg-scale", "5", "-t", threads, "-q"]).code, 0);
        assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap(), "other bytes with {threads} threads");
    }
    let picture = read_rgb8(&a).unwrap();
    assert_eq!((picture.width, picture.height), (64, 64));
    let parameters = picture.parameters.unwrap();
    for word in
        ["a red circle\n", "Negative prompt: blurry\n", "Steps: 2", "CFG scale: 5", "Seed: 5", "Size: 64x64"]
    {
        assert!(parameters.contains(word), "want `{word}` in: {parameters}");
    }
    assert_eq!(sample(&model, &b, &["--disable-image-metadata"]).code, 0);
    assert_eq!(read_rgb8(&b).unwrap().parameters, None);
    assert_eq!(f.contents().len(), 2, "no other file is left");
}

/// Picture i of a batch has seed + i, and is that picture bit for bit.
#[test]
fn a_picture_does_not_depend_on_its_batch() {
    let f = Folder::new();
    let model = golden("sd15-tiny");
    for more in [
        &["--sampling-method", "euler"][..],
        &["--sampling-method", "ddim", "--eta", "1"],
        &["--cfg-scale", "1"],
    ] {
        let batch = sample(&model, &f.path("x.png"), &[more, &["--batch-size", "3"]].concat());
        assert_eq!(batch.code, 0, "{}", batch.err);
        assert_eq!(batch.out.lines().count(), 3);
        for (i, seed) in ["5", "6", "7"].into_iter().enumerate() {
            assert_eq!(sample(&model, &f.path("one.png"), &[more, &["-s", seed]].concat()).code, 0);
            let bytes = |name: &str| fs::read(f.path(name)).unwrap();
            assert!(
                bytes(&format!("x_{i}.png")) == bytes("one.png"),
                "{more:?}: picture {i} differs from seed {seed}"
            );
        }
    }
}

#[test]
fn verify_and_info_tell_what_they_should() {
    let model = golden("sd15-tiny");
    for name in ["sd15-tiny.mod", "sd15-tiny.pipe-ddim"] {
        let reference = golden(&format!("{name}.safetensors"));
        let args = ["verify", "-m", text(&model), "--reference", text(&reference), "--device", "cpu"];
        let o = ldm(&args);
        assert!(o.code == 0 && o.out.contains("\nok: "), "{}{}", o.out, o.err);
        let o = ldm(&[&args[..], &["--json"]].concat());
        assert_eq!(serde_json::from_str::<Value>(&o.out).unwrap()["ok"], json!(true));
    }
    let o = ldm(&["info", text(&model), "-W", "64", "-H", "128", "--graph"]);
    assert!(o.code == 0 && o.out.contains("64x128") && o.out.contains("UNet2DConditionModel"), "{}", o.out);
    let o = ldm(&["info", text(&golden("vq4-tiny"))]);
    assert!(
        o.code == 0 && o.out.contains("VQModel") && o.out.contains("does not sample"),
        "{}{}",
        o.out,
        o.err
    );
    for (more, say) in
        [(["-W", "66"], "the nearest is 68x"), (["--batch-size", "0"], "batch size: want 1 to")]
    {
        let o = ldm(&[&["info", text(&model)][..], &more].concat());
        assert!(o.code == 2 && o.err.contains(say), "{}", o.err);
    }
}

#[test]
fn a_prompt_that_is_too_long_is_cut_with_a_warning() {
    let f = Folder::new();
    let prompt = format!("{} the end", "red ".repeat(200));
    let o = sample(&golden("sd15-tiny"), &f.path("x.png"), &["-p", &prompt]);
    assert_eq!(o.code, 0, "{}", o.err);
    for word in ["warning: the prompt has ", "the model takes 75", "this was cut off: ", "the end\n"] {
        assert!(o.err.contains(word), "want `{word}` in: {}", o.err);
    }
}

#[test]
fn numbers_that_cannot_be_are_refused() {
    bad_request(&["--steps", "0"], &["--steps", "at least 1"]);
    bad_request(&["--steps", "1001"], &["1 to 1000 steps", "1001"]);
    bad_request(&["--batch-size", "0"], &["--batch-size", "at least 1"]);
    bad_request(&["--cfg-scale", "NaN"], &["--cfg-scale", "NaN"]);
    bad_request(&["--cfg-scale", "inf"], &["--cfg-scale", "inf"]);
    bad_request(&["--eta", "1.5"], &["--eta", "from 0 to 1", "1.5"]);
    bad_request(&["--clip-skip", "7"], &["clip skip", "1 to 6", "7"]);
    bad_request(&["--threads", "0"], &["--threads", "1 to", "0"]);
    bad_request(&["--threads", "1000000"], &["--threads", "1 to", "1000000"]);
    for seed in ["lucky", "-2", "18446744073709551616"] {
        bad_request(&["-s", seed], &["--seed", seed, "want 0 to 18446744073709551615, or -1"]);
    }
    bad_request(
        &["-s", "18446744073709551615", "--batch-size", "2"],
        &["--seed", "want at most 18446744073709551614"],
    );
    for flag in ["--steps", "-W", "-H", "-t", "--batch-size", "--clip-skip"] {
        bad_request(&[flag, "-1"], &["-1", "want a whole number"]);
    }
    bad_request(&["--cfg-scale", "-1"], &["--cfg-scale", "from 0 to 1000", "-1"]);
    bad_request(&["--eta", "-1"], &["--eta", "from 0 to 1", "-1"]);
    bad_request(&["--steps", "99999999999999999999"], &["--steps", "want at most 18446744073709551615"]);
}

#[test]
fn words_that_are_unknown_are_refused() {
    bad_request(&["--dtype", "f8"], &["dtype", "f32, f16 or bf16", "f8"]);
    bad_request(&["--device", "nonsense"], &["device", "cuda:N", "nonsense"]);
    bad_request(&["--sampling-method", "eulre"], &["eulre", "did you mean `euler`?"]);
    bad_request(&["--sampling-method", "mystery"], &["mystery", "want one of", "dpm++2m"]);
}

#[test]
fn a_gpu_that_is_not_there_is_refused() {
    if Path::new("/dev/nvidiactl").exists() || env::var_os("LDM_TEST_DEVICE").is_some_and(|d| d == "cuda") {
        eprintln!("SKIPPED: a_gpu_that_is_not_there_is_refused: this machine has an NVIDIA driver");
        return;
    }
    bad_request(&["--device", "cuda"], &["driver", "Install", "--device cpu"]);
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    bad_request(&["-W", "66"], &["66x64", "multiples of 4", "the nearest is 68x64"]);
    bad_request(&["-H", "65"], &["64x65", "the nearest is 64x64"]);
    bad_request(&["-W", "0"], &["0x64", "the nearest is 4x64"]);
    for width in ["1000000000", "18446744073709551612"] {
        bad_request(&["-W", width], &[width, "want at most 131072 pixels"]);
    }
    bad_request(&["-W", "18446744073709551616"], &["18446744073709551616"]);
    bad_request(&["--batch-size", "1000000000"], &["batch size: want 1 to 65536", "1000000000"]);
    bad_request(&["-W", "131072", "-H", "131072", "--batch-size", "65536"], &["fits into no memory"]);
}

/// What a picture needs is compared with what there is before anything is loaded.
#[cfg(target_os = "linux")]
#[test]
fn a_picture_that_does_not_fit_into_memory_is_refused_at_once() {
    let start = std::time::Instant::now();
    for more in [&["-W", "65536", "-H", "65536"][..], &["-W", "4096", "-H", "4096", "--batch-size", "4096"]] {
        bad_request(more, &[" needs ", " bytes (", "are free", "smaller size or batch"]);
    }
    let once = sample(&golden("sd15-tiny"), Path::new("none/x.png"), &["-W", "65536", "-H", "65536"]);
    assert!(!once.err.contains("loading"), "{}", once.err);
    assert!(start.elapsed().as_secs() < 20, "refusing took {:?}", start.elapsed());
}

/// Memory that the system counts as free and then does not give is an error too, never an abort.
#[cfg(target_os = "linux")]
#[test]
fn memory_that_is_not_given_is_an_error() {
    let f = Folder::new();
    let (model, out) = (golden("sd15-tiny"), f.path("x.png"));
    let limited = "ulimit -v 1000000; exec \"$0\" \"$@\"";
    let args = ["sample", "-m", text(&model), "-o", text(&out), "-p", "x", "--device", "cpu", "-t", "1"];
    let size = ["--steps", "1", "-W", "1536", "-H", "1536"];
    refused(&f, 2, &["bytes", "smaller", "batch"], || {
        run(Command::new("sh").args(["-c", limited, env!("CARGO_BIN_EXE_ldm")]).args(args).args(size))
    });
}

#[test]
fn a_place_that_takes_no_picture_is_refused() {
    let f = Folder::new();
    let (file, model) = (f.write("file", "x"), golden("sd15-tiny"));
    let [lost, link] = ["no/such/x.png", "link.png"].map(|n| f.path(n));
    let go = |out: &Path, more: &[&str], say: &[&str]| {
        refused(&f, 2, &[say, &[text(out)]].concat(), || sample(&model, out, more));
    };
    go(&lost, &[], &["does not exist", "mkdir -p"]);
    go(&f.path("."), &[], &["is a folder", "out.png"]);
    go(&f.path("new/"), &["--batch-size", "2"], &["is a folder"]);
    go(&file.join("x.png"), &[], &["is a file, not a folder"]);
    go(&f.path("x.jpg"), &[], &["ends in .png"]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(f.path("nowhere"), &link).unwrap();
        go(&link, &[], &["link to a file that does not exist"]);
    }
    // Not even root may create a file there.
    #[cfg(target_os = "linux")]
    {
        go(Path::new("/proc/x.png"), &[], &["no file can be created"]);
        let o = sample(&model, Path::new("/dev/full"), &[]);
        assert!(o.code == 1 && o.err.contains("/dev/full: cannot be written"), "{}", o.err);
    }
    let mut mode = fs::metadata(&file).unwrap().permissions();
    mode.set_readonly(true);
    fs::set_permissions(&file, mode).unwrap();
    go(&file, &[], &["read-only"]);
    let shut = f.path("shut");
    fs::create_dir(&shut).unwrap();
    let mut mode = fs::metadata(&shut).unwrap().permissions();
    mode.set_readonly(true);
    fs::set_permissions(&shut, mode).unwrap();
    if fs::write(shut.join("probe"), "").is_ok() {
        eprintln!("SKIPPED: a folder without write permission: this user may write anywhere");
        return;
    }
    go(&shut.join("x.png"), &[], &["no file can be created"]);
}

#[test]
fn a_path_that_is_no_model_is_refused() {
    let f = Folder::new();
    let file = f.write("file.safetensors", "x");
    fs::create_dir(f.path("empty")).unwrap();
    let component = golden("sd15-tiny/unet");
    for (path, say) in [
        (f.path("none"), "there is nothing at this path"),
        (f.path("empty"), "model_index.json"),
        (component, "give the folder above it"),
    ] {
        refused(&f, 2, &[say, text(&path)], || sample(&path, &f.path("x.png"), &[]));
        refused(&f, 2, &[say, text(&path)], || ldm(&["info", text(&path)]));
    }
    refused(&f, 1, &["not a whole safetensors file", text(&file)], || sample(&file, &f.path("x.png"), &[]));
    // A pipeline of another kind.
    fs::create_dir(f.path("pixels")).unwrap();
    let pixels = f.write("pixels/model_index.json", r#"{"_class_name": "DDPMPipeline"}"#);
    refused(&f, 2, &["model_index.json", "_class_name", "StableDiffusionPipeline"], || {
        sample(pixels.parent().unwrap(), &f.path("x.png"), &[])
    });
}

#[test]
fn a_missing_part_is_named() {
    for part in ["unet", "vae", "text_encoder", "tokenizer", "scheduler"] {
        bad_model(1, &[part, "not found", "download"], |f| {
            fs::remove_dir_all(f.path("model").join(part)).unwrap()
        });
    }
    for (part, say) in [
        ("unet/config.json", "not found"),
        ("scheduler/scheduler_config.json", "cannot be read"),
        ("tokenizer/vocab.json", "holds no tokenizer"),
        ("vae/diffusion_pytorch_model.safetensors", "holds no weights"),
    ] {
        let folder = part.split('/').next().unwrap();
        bad_model(1, &[folder, say], |f| fs::remove_file(f.path("model").join(part)).unwrap());
    }
    bad_model(2, &["model_index.json", "`unet`", "want this component"], |f| {
        f.edit("model/model_index.json", |v| v["unet"] = json!([null, null]));
    });
    bad_model(2, &["model_index.json", "`unet`", "UNet2DConditionModel", "FluxTransformer"], |f| {
        f.edit("model/model_index.json", |v| v["unet"] = json!(["diffusers", "FluxTransformer"]));
    });
}

#[test]
fn configurations_that_are_not_understood_are_refused() {
    for file in [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
    ] {
        for bad in ["{\"a\": ", "", "[1]", "\u{0}\u{1}"] {
            bad_model(1, &[file, "JSON"], |f| drop(f.write(&format!("model/{file}"), bad)));
        }
    }
    bad_model(1, &["merges.txt", "line 2"], |f| {
        drop(f.write("model/tokenizer/merges.txt", "#version: 1\nabc\n"))
    });
    let wrong: &[(&str, &str, Value, &str)] = &[
        ("unet", "act_fn", json!("mish"), "silu"),
        ("unet", "act_fun", json!("silu"), "did the writer mean `act_fn`"),
        ("unet", "quantum_attention", json!(true), "something newer"),
        ("unet", "time_cond_proj_dim", json!(256), "null"),
        ("unet", "down_block_types", json!(["DownBlock2D", "StrangeBlock2D"]), "CrossAttnDownBlock2D"),
        ("unet", "block_out_channels", json!([1e15, 1e15]), "a list of whole numbers"),
        ("unet", "block_out_channels", json!(vec![32; 40]), "levels"),
        ("unet", "layers_per_block", json!(1_000_000_000), "1 to 256 layers"),
        ("unet", "norm_num_groups", json!(0), "divisor"),
        ("unet", "attention_head_dim", json!("8"), "a whole number"),
        ("unet", "sample_size", json!(-1), "a whole number"),
        ("unet", "cross_attention_dim", json!(64), ""),
        ("vae", "latent_channels", json!(16), "latent_channels 16"),
        ("vae", "scaling_factor", json!(0), "above 0"),
        ("vae", "layers_per_block", json!(1_000_000_000), "at most 256 layers"),
        ("vae", "latents_mean", json!(vec![0.0; 4]), "null"),
        ("text_encoder", "hidden_act", json!("relu"), "quick_gelu"),
        ("text_encoder", "num_attention_heads", json!(5), "a divisor of hidden_size 32"),
        ("text_encoder", "num_hidden_layers", json!(1e12), "a whole number"),
        ("text_encoder", "vocab_size", json!(999), "vocabulary"),
        ("text_encoder", "max_position_embeddings", json!(64), "model_max_length"),
    ];
    for (part, key, value, say) in wrong {
        let blamed = match *key {
            "cross_attention_dim" => "hidden_size",
            "latent_channels" => "out_channels",
            "vocab_size" => "vocabulary",
            "max_position_embeddings" => "model_max_length",
            key => key,
        };
        bad_model(2, &[&format!("`{blamed}`"), say], |f| {
            f.edit(&format!("model/{part}/config.json"), |v| drop(v.insert((*key).into(), value.clone())));
        });
    }
    for (key, value, say) in [
        ("prediction_type", json!("flow"), "epsilon"),
        ("num_train_timesteps", json!(1_000_000_000_000_u64), "from 1 to 1000000"),
        ("num_train_timesteps", json!(0), "from 1 to 1000000"),
        ("beta_end", json!("x"), "a number"),
        ("beta_stat", json!(0.1), "did the writer mean `beta_start`"),
        ("timestep_spacing", json!("random"), "leading"),
    ] {
        bad_model(2, &["scheduler_config.json", key, say], |f| {
            f.edit("model/scheduler/scheduler_config.json", |v| drop(v.insert(key.into(), value)));
        });
    }
    bad_model(2, &["scheduler DiceScheduler is not supported", "--sampling-method"], |f| {
        f.edit("model/model_index.json", |v| v["scheduler"] = json!(["diffusers", "DiceScheduler"]));
    });
}

#[test]
fn damaged_safetensors_are_named() {
    let (header, data) = tensors(&golden("sd15-tiny/unet/diffusion_pytorch_model.safetensors"));
    let whole = joined(&Value::Object(header.clone()).to_string(), &data);
    let file = "unet/diffusion_pytorch_model.safetensors";
    for n in [0, 1, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        bad_model(1, &[file, "download it again"], |f| drop(f.write(UNET, &whole[..n])));
    }
    for length in [0, 3, whole.len() as u64, 1 << 40, u64::MAX] {
        bad_model(1, &[file, "header"], |f| {
            drop(f.write(UNET, [&length.to_le_bytes()[..], &whole[8..]].concat()))
        });
    }
    bad_model(1, &[file, "PyTorch checkpoint", "convert it"], |f| {
        drop(f.write(UNET, b"PK\x03\x04and so on"))
    });
    bad_model(1, &[file, "followed by other data"], |f| drop(f.write(UNET, [&whole[..], &[0; 4]].concat())));

    let name = "conv_in.weight";
    let [start, end] = [0, 1].map(|i| header[name]["data_offsets"][i].as_u64().unwrap());
    for (key, value, say) in [
        ("data_offsets", json!([start, end + (1 << 40)]), "want "),
        ("data_offsets", json!([start + (1 << 40), end + (1 << 40)]), ""),
        ("data_offsets", json!([start + 4, end + 4]), ""),
        ("data_offsets", json!([end, start]), "data_offsets"),
        ("dtype", json!("F16"), " bytes for F16"),
        ("dtype", json!("F7"), "dtype"),
        ("shape", json!([32, 4, 3, 4]), " bytes for F32"),
        ("shape", json!([u64::MAX, u64::MAX]), "fits into memory"),
        ("shape", json!([-1]), "dtype, shape and data_offsets"),
    ] {
        bad_model(1, &[file, say], |f| f.edit_tensors(UNET, |h, _| h[name][key] = value));
    }
}

#[test]
fn tensors_that_the_model_does_not_have_are_named() {
    let (file, name) = ("unet/diffusion_pytorch_model.safetensors", "conv_in.weight");
    bad_model(1, &["unet", name, "want (32,4,3,3)", "no such tensor"], |f| {
        f.edit_tensors(UNET, |h, data| remove(h, data, name));
    });
    bad_model(1, &[file, "`surplus.weight`", "want no tensor of this name", "got (2,1)"], |f| {
        f.edit_tensors(UNET, |h, data| {
            let n = data.len();
            data.extend([0; 8]);
            h.insert(
                "surplus.weight".into(),
                json!({"dtype": "F32", "shape": [2, 1], "data_offsets": [n, n + 8]}),
            );
        });
    });
    bad_model(1, &[file, name, "want (32,4,3,3)", "got (4,32,3,3)"], |f| {
        f.edit_tensors(UNET, |h, _| h[name]["shape"] = json!([4, 32, 3, 3]));
    });
    bad_model(1, &[file, name, "got I32"], |f| f.edit_tensors(UNET, |h, _| h[name]["dtype"] = json!("I32")));
    bad_model(1, &[file, "conv_in.bias", "want (64)", "got (32)"], |f| {
        f.edit(UNET_CONFIG, |v| v["block_out_channels"] = json!([64, 64]))
    });
}

#[test]
fn values_that_are_not_finite_make_no_picture() {
    for (file, tensor) in
        [(UNET, "conv_in.weight"), (VAE, "decoder.conv_out.bias"), (TEXT, "text_model.final_layer_norm.bias")]
    {
        for (value, say) in [(f32::NAN, "NaN at [0"), (f32::NEG_INFINITY, "-inf at [0")] {
            bad_model(1, &[file.trim_start_matches("model/"), tensor, "finite", say], |f| {
                f.fill(file, tensor, value)
            });
        }
    }
    // Finite on disk, and too large when multiplied: the first node that overflows is named.
    for (file, node) in [
        (UNET, "conv_in"),
        (UNET, "mid_block.resnets.0.conv1"),
        (VAE, "decoder.conv_out"),
        (TEXT, "text_model.final_layer_norm"),
    ] {
        bad_model(1, &["non-finite value", &format!("\"{node}\""), "no picture was written"], |f| {
            f.fill(file, &format!("{node}.weight"), 3e38);
        });
    }
    // What a narrow type cannot hold is refused when it is loaded.
    let f = Folder::with_model();
    f.fill(UNET, "conv_in.weight", 7e4);
    refused(&f, 1, &["conv_in.weight", "values that f16 can hold", "70000"], || {
        sample(&f.path("model"), &f.path("x.png"), &["--dtype", "f16"])
    });
}

#[test]
fn references_that_do_not_fit_are_refused() {
    let f = Folder::new();
    let model = golden("sd15-tiny");
    let verify = |reference: &Path, more: &[&str]| {
        let save = f.path("ours.safetensors");
        let args = [
            "verify",
            "-m",
            text(&model),
            "--reference",
            text(reference),
            "--device",
            "cpu",
            "--save",
            text(&save),
        ];
        ldm(&[&args[..], more].concat())
    };
    refused(&f, 2, &["none.safetensors", "--reference"], || verify(&f.path("none.safetensors"), &[]));
    refused(&f, 2, &["--reference"], || verify(&model, &[]));
    let plain = f.write("plain.safetensors", "this is no such file, whatever its name says");
    refused(&f, 1, &["plain.safetensors", "download it again"], || verify(&plain, &[]));
    refused(&f, 1, &["diffusion_pytorch_model.safetensors", "`reference`", "metadata"], || {
        verify(&golden("sd15-tiny/unet/diffusion_pytorch_model.safetensors"), &[])
    });
    refused(&f, 2, &["VQModel", "AutoencoderKL"], || {
        verify(&golden("vq4-tiny.mod.safetensors"), &["--part", "vq"])
    });
    let nine = golden("inpaint-tiny.mod.safetensors");
    let why = ["inpaint-tiny.mod.safetensors", "unet.sample", "want (B,4,H,W)", "got [1, 9, 16, 16]"];
    refused(&f, 1, &why, || verify(&nine, &["--part", "unet"]));
    let parts = golden("sd15-tiny.mod.safetensors");
    refused(&f, 2, &["--part hands", "text, unet, vae"], || verify(&parts, &["--part", "hands"]));

    let changed = |from: &str, name: &str, shape: Option<Value>| {
        let (mut header, mut data) = tensors(&golden(&format!("{from}.safetensors")));
        match shape {
            Some(shape) => header[name]["shape"] = shape,
            None => remove(&mut header, &mut data, name),
        }
        let reference = f.write("changed.safetensors", joined(&Value::Object(header).to_string(), &data));
        refused(&f, 1, &["changed.safetensors", &format!("`{name}`"), "want ", "got "], || {
            verify(&reference, &[])
        });
    };
    for name in
        ["text.ids", "text.last", "unet.context", "unet.timestep", "unet.out", "vae.latents", "vae.decoded"]
    {
        changed("sd15-tiny.mod", name, None);
    }
    for (name, shape) in [
        ("text.ids", json!([154])),
        ("text.ids", json!([1, 154])),
        ("unet.sample", json!([4096])),
        ("unet.sample", json!([1, 4, 1024, 1])),
        ("unet.context", json!([77, 32])),
        ("unet.context", json!([1, 32, 77])),
        ("unet.timestep", json!([])),
        ("unet.out", json!([4, 32, 32])),
        ("vae.image", json!([1, 1, 192, 64])),
        ("vae.image", json!([1, 3, 4096, 1])),
        ("vae.latents", json!([4, 1, 32, 32])),
    ] {
        changed("sd15-tiny.mod", name, Some(shape));
    }
    for name in ["prompt_ids", "context", "latents_001", "decoder_input", "timesteps"] {
        changed("sd15-tiny.pipe-ddim", name, None);
    }
    for (name, shape) in [
        ("prompt_ids", json!([77])),
        ("prompt_ids", json!([7, 11])),
        ("initial_latents", json!([2, 2, 32, 32])),
        ("initial_latents", json!([1, 4, 1024, 1])),
    ] {
        changed("sd15-tiny.pipe-ddim", name, Some(shape));
    }
    // A tensor that differs is no error of the file: a report, and exit code 1.
    let f = Folder::with_model();
    f.fill(UNET, "conv_out.bias", 0.5);
    let o = ldm(&["verify", "-m", text(&f.path("model")), "--reference", text(&parts), "--device", "cpu"]);
    assert!(o.code == 1 && o.out.contains("DIVERGES: the first is unet.out"), "{}{}", o.out, o.err);
}
