//! Models in one file: from a folder and back without a loss, drawn from as from the folder, and told apart from what only looks so.
//! That the names are those of the original code is the business of `io::compvis`.

#[path = "common/folder.rs"]
mod folder;
#[path = "common/program.rs"]
mod program;
#[path = "common/runs.rs"]
mod runs;

use folder::{Folder, copy, golden, joined, tensors};
use half::bf16;
use ldm::exec::Device;
use ldm::io::{Checkpoint, ModelFolder, Prediction};
use ldm::models::{Inventory, Model, Source};
use ldm::pipeline::verify::{Options, verify};
use ldm::pipeline::{Pipeline, Request};
use ldm::tensor::DType;
use program::{ldm, refused, text};
use runs::{autoencoder_arguments, diffusion, first_stage};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

fn convert(from: &Path, to: &Path, more: &[&str]) {
    let o = ldm(&[&["convert", text(from), "-o", text(to)], more].concat());
    assert!(o.code == 0 && o.err.is_empty(), "{}{}", o.out, o.err);
    assert!(o.out.contains("tensors"), "{}", o.out);
}

/// Files of a folder and of the folders in it, by their path inside.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let inner = |p: PathBuf| if p.is_dir() { files(&p) } else { vec![p] };
    let mut all: Vec<PathBuf> = entries.flat_map(inner).collect();
    all.sort();
    all
}

/// Every tensor of one component is in the other, the same bytes, and no other is there.
#[track_caller]
fn same_tensors(a: &Path, b: &Path) {
    let [(a_header, a_data), (b_header, b_data)] = [a, b].map(tensors);
    let names = |h: &serde_json::Map<String, Value>| -> Vec<String> {
        let mut names: Vec<String> = h.keys().filter(|k| *k != "__metadata__").cloned().collect();
        names.sort();
        names
    };
    assert_eq!(names(&a_header), names(&b_header), "{}", b.display());
    for name in names(&a_header) {
        let [x, y] = [(&a_header, &a_data), (&b_header, &b_data)].map(|(header, data)| {
            let at = |i: usize| header[&name]["data_offsets"][i].as_u64().unwrap() as usize;
            (header[&name]["dtype"].clone(), header[&name]["shape"].clone(), &data[at(0)..at(1)])
        });
        assert!(x == y, "{name} of {}", b.display());
    }
}

/// A picture's bytes.
fn drawn(model: &Path, class: bool) -> Vec<u8> {
    let pipeline = Pipeline::open(&ModelFolder::open(model).unwrap(), &Device::Cpu, None).unwrap();
    let mut r = Request { steps: 2, seed: 3, ..Request::default() };
    match class {
        true => r.class = Some("ring".into()),
        false if pipeline.blueprint().unet.context > 0 => r.prompt = "a red circle".into(),
        false => {}
    }
    pipeline.generate(&r, &mut ()).unwrap().remove(0).rgb
}

/// Every kind of model: to a file, and back to a folder that is as the first one was.
#[test]
fn a_model_goes_to_a_file_and_back() {
    let f = Folder::new();
    for name in
        ["sd15-tiny", "sd2-tiny", "ldm-tiny", "class-tiny", "inpaint-tiny", "upscale-tiny", "uncond-ldm-tiny"]
    {
        let (from, file, back) = (golden(name), f.path(&format!("{name}.safetensors")), f.path(name));
        convert(&from, &file, &[]);
        convert(&file, &back, &[]);
        let inside = |all: Vec<PathBuf>, root: &Path| -> Vec<PathBuf> {
            all.into_iter().map(|p| p.strip_prefix(root).unwrap().to_path_buf()).collect()
        };
        let (own, others) = (inside(files(&from), &from), inside(files(&back), &back));
        assert_eq!(own, others, "{name}");
        for path in own {
            let (a, b) = (from.join(&path), back.join(&path));
            match path.extension().and_then(|e| e.to_str()) {
                Some("safetensors") => same_tensors(&a, &b),
                Some("json") => {
                    let [a, b] =
                        [&a, &b].map(|p| serde_json::from_slice::<Value>(&fs::read(p).unwrap()).unwrap());
                    assert_eq!(a, b, "{name}/{}", path.display());
                }
                _ => assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap(), "{name}/{}", path.display()),
            }
        }
        // Neither needs the other.
        let again = f.path(&format!("again/{name}.safetensors"));
        fs::create_dir_all(again.parent().unwrap()).unwrap();
        convert(&back, &again, &[]);
        assert!(fs::read(&file).unwrap() == fs::read(&again).unwrap(), "{name}");
        if !["inpaint-tiny", "upscale-tiny"].contains(&name) {
            assert!(drawn(&from, name == "class-tiny") == drawn(&file, name == "class-tiny"), "{name}");
        }
    }
}

#[test]
fn an_autoencoder_alone_has_a_file_of_its_own() {
    let f = Folder::new();
    for (name, config) in [("vq4-tiny/vqvae", "VQModel"), ("kl-attn-tiny/vae", "AutoencoderKL")] {
        let (file, back) = (f.path(&format!("{config}.safetensors")), f.path(config));
        convert(&golden(name), &file, &[]);
        let names: Vec<String> = tensors(&file).0.keys().cloned().collect();
        assert!(names.iter().any(|n| n == "decoder.mid.attn_1.q.weight"), "{names:?}");
        convert(&file, &back, &[]);
        let weights = "diffusion_pytorch_model.safetensors";
        same_tensors(&golden(name).join(weights), &back.join(weights));
        // It is no model to sample from.
        refused(&f, 2, &["autoencoder alone", text(&file)], || ldm(&["info", text(&file)]));
    }
}

#[test]
fn another_type_is_rounded_once_and_the_schedule_stays() {
    let f = Folder::new();
    let (from, file) = (golden("uncond-ldm-tiny"), f.path("half.safetensors"));
    convert(&from, &file, &["--dtype", "bf16"]);
    let folder = ModelFolder::open(&file).unwrap();
    let there = Checkpoint::open(from.join("unet")).unwrap();
    let unet = folder.checkpoint("unet").unwrap();
    assert_eq!(unet.len(), there.len());
    for name in there.names() {
        assert_eq!(unet.entry(name).unwrap().dtype.to_string(), "BF16");
        let want: Vec<f32> =
            there.read_f32(name).unwrap().iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
        assert_eq!(unet.read_f32(name).unwrap(), want, "{name}");
        assert_eq!(unet.read(name, DType::F32).unwrap().to_f32(), want, "{name}");
    }
    // The original's buffers (Ho et al. 2020): the running product, and the variance of what lies between two steps.
    let raw = Checkpoint::open(&file).unwrap();
    let [betas, bars, before, variance] =
        ["betas", "alphas_cumprod", "alphas_cumprod_prev", "posterior_variance"]
            .map(|n| raw.read_f32(n).unwrap());
    assert_eq!((betas.len(), before[0], variance[0]), (1000, 1.0, 0.0));
    for t in 1..1000 {
        assert!((bars[t] - before[t] * (1.0 - betas[t])).abs() < 1e-6 && before[t] == bars[t - 1]);
        let want = betas[t] * (1.0 - before[t]) / (1.0 - bars[t]);
        assert!((variance[t] - want).abs() < 1e-6, "{t}: {} {want}", variance[t]);
    }
    assert_eq!(raw.read_f32("scale_factor").unwrap().len(), 1);
}

/// Reading by rows, from several threads, what lies in turns with other matrices.
#[test]
fn weights_inside_another_tensor_are_read_as_those_of_their_own() {
    let f = Folder::new();
    let (from, file) = (golden("uncond-ldm-tiny"), f.path("m.safetensors"));
    convert(&from, &file, &[]);
    let (raw, folder) = (Checkpoint::open(&file).unwrap(), ModelFolder::open(&file).unwrap());
    let qkv = raw.entry("model.diffusion_model.middle_block.1.qkv.weight").unwrap();
    assert_eq!(qkv.shape, [96, 32, 1]);
    let unet = folder.checkpoint("unet").unwrap();
    let there = Checkpoint::open(from.join("unet")).unwrap();
    for part in ["to_q", "to_k", "to_v"] {
        let name = format!("mid_block.attentions.0.{part}.weight");
        let want = there.read_f32(&name).unwrap();
        assert_eq!(unet.read_f32(&name).unwrap(), want);
        let tensor = unet.tensor(&name).unwrap();
        let mut rows = vec![0.0f32; 5 * 32];
        tensor.rows(9..14, DType::F32, ldm::io::Order::Stored, bytemuck::cast_slice_mut(&mut rows)).unwrap();
        assert_eq!(rows, want[9 * 32..14 * 32]);
    }
}

/// An `attention_head_dim` of null means one head to diffusers, whose tensors these are; the file has queries, keys and values in one turn then.
#[test]
fn null_is_one_head_in_a_folder_and_in_its_file() {
    let f = Folder::new();
    copy(&golden("uncond-ldm-tiny"), &f.path("model"));
    f.edit("model/unet/config.json", |c| c["attention_head_dim"] = Value::Null);
    let (model, file) = (f.path("model"), f.path("m.safetensors"));
    convert(&model, &file, &[]);
    let options = Options { dtype: Some(DType::F32), ..Options::default() };
    for path in [&model, &file] {
        let (folder, reference) =
            (ModelFolder::open(path).unwrap(), golden("uncond-one-head.pipe.safetensors"));
        let report = verify(&folder, &reference, &Device::Cpu, &options).unwrap();
        let failed = report.first_failure().map(|line| line.name.clone());
        assert!(report.lines.len() > 4 && failed.is_none(), "{}: {failed:?}", path.display());
    }
    let (raw, unet) = (Checkpoint::open(&file).unwrap(), Checkpoint::open(model.join("unet")).unwrap());
    let at = "mid_block.attentions.0";
    let all = ["to_q", "to_k", "to_v"].map(|part| unet.read_f32(&format!("{at}.{part}.bias")).unwrap());
    assert_eq!(raw.read_f32("model.diffusion_model.middle_block.1.qkv.bias").unwrap(), all.concat());
}

#[test]
fn parts_that_nothing_runs_are_left_out_and_named() {
    let f = Folder::with_model();
    f.edit("model/model_index.json", |v| {
        v["safety_checker"] = json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
        v["requires_safety_checker"] = json!(true);
    });
    let file = f.path("m.safetensors");
    let o = ldm(&["convert", text(&f.path("model")), "-o", text(&file)]);
    assert!(o.code == 0, "{}", o.err);
    assert!(o.out.contains("left out: safety_checker (StableDiffusionSafetyChecker)"), "{}", o.out);
    let folder = ModelFolder::open(&file).unwrap();
    assert!(!folder.has("safety_checker") && folder.index().bool("requires_safety_checker").unwrap());
}

/// A header over nothing: what a file is, is said before a value is read.
fn header(names: &[(&str, &[usize])], notes: Value) -> Vec<u8> {
    let (mut all, mut end) = (serde_json::Map::new(), 0);
    all.insert("__metadata__".into(), notes);
    for (name, shape) in names {
        let bytes = 2 * shape.iter().product::<usize>();
        all.insert(
            name.to_string(),
            json!({"dtype": "F16", "shape": shape, "data_offsets": [end, end + bytes]}),
        );
        end += bytes;
    }
    joined(&Value::Object(all).to_string(), &vec![0; end])
}

#[test]
fn files_that_are_no_model_are_told_apart() {
    let f = Folder::new();
    let conv = ("model.diffusion_model.input_blocks.0.0.weight", &[4, 4, 3, 3][..]);
    let five = (conv.0, &[4, 5, 3, 3][..]);
    let key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight";
    let [small, sd1, sd2] = [32, 768, 1024].map(|n| (key, vec![1, n]));
    let [small, sd1, sd2] = [&small, &sd1, &sd2].map(|(k, v)| (*k, &v[..]));
    let vae = ("first_stage_model.encoder.conv_in.weight", &[1][..]);
    let clip = ("cond_stage_model.transformer.text_model.final_layer_norm.weight", &[1][..]);
    let open = ("cond_stage_model.model.ln_final.weight", &[1][..]);
    type Tensors<'a> = &'a [(&'a str, &'a [usize])];
    let cases: &[(Tensors, &str)] = &[
        (&[("conditioner.embedders.0.x", &[1])], "a model of SDXL's kind"),
        (&[("model.diffusion_model.double_blocks.0.x", &[1])], "a transformer in place of the UNet"),
        (&[("lora_unet_x.lora_up.weight", &[1])], "a LoRA"),
        (&[("conv_in.weight", &[1])], "one part of a folder"),
        (&[("x", &[1])], "but no `model.diffusion_model.input_blocks.0.0.weight`"),
        (&[conv, sd1, clip], "without an autoencoder"),
        (&[conv, sd1, vae], "without a text encoder"),
        (&[conv, small, vae, clip], "a context of width 32 (want 768 or 1024)"),
        (&[conv, vae, clip], "without a context"),
        (&[five, sd1, vae, clip], "takes 5 channels"),
        (&[conv, sd1, vae, open], "a text encoder of another version"),
        (&[conv, sd2, vae, open], "--prediction v, or --prediction eps"),
        (
            &[("encoder.conv_in.weight", &[1]), ("decoder.conv_in.weight", &[1])],
            "that is not Stable Diffusion's",
        ),
    ];
    for (names, say) in cases {
        let path = f.write("m.safetensors", header(names, json!({})));
        refused(&f, 1, &[say, text(&path)], || ldm(&["info", text(&path)]));
    }
    // The layers are then looked for: it is not only a few names that make a model.
    let path = f.write("m.safetensors", header(&[conv, sd1, vae, clip], json!({})));
    let unet = ModelFolder::open(&path).unwrap().checkpoint("unet").unwrap();
    assert_eq!(
        unet.names().collect::<Vec<_>>(),
        ["conv_in.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    );
    refused(&f, 1, &["text_model.", "no such tensor"], || {
        ldm(&["sample", "-m", text(&path), "-p", "x", "--device", "cpu", "-o", text(&f.path("o.png"))])
    });
    // Another noise schedule than Stable Diffusion's is no matter of taste.
    let path =
        f.write("m.safetensors", header(&[conv, sd1, vae, clip, ("alphas_cumprod", &[1000])], json!({})));
    refused(&f, 1, &["alphas_cumprod", "noise schedule"], || {
        ldm(&["sample", "-m", text(&path), "-p", "x", "-o", text(&f.path("o.png"))])
    });
    // What it says of itself counts; and it says no more than it may.
    let v = json!({"modelspec.prediction_type": "v"});
    let path = f.write("m.safetensors", header(&[conv, sd2, vae, open], v));
    let schedule =
        ldm::pipeline::Parts::read(&ModelFolder::open(&path).unwrap()).unwrap().schedule.unwrap().1;
    assert_eq!(schedule.output, ldm::samplers::Output::V);
    for bad in [
        "../config.json",
        "/config.json",
        "a/b/config.json",
        "unet/run.py",
        "unet/diffusion_pytorch_model.safetensors",
        ".x/config.json",
        "unet/",
    ] {
        let path = f.write("m.safetensors", header(&[conv], json!({(format!("ldm.file:{bad}")): "{}"})));
        refused(&f, 1, &["the file is not from ldm", bad], || ldm(&["info", text(&path)]));
    }
}

/// What says that Stable Diffusion 2 predicts v, or noise: notes of several tools, an empty tensor, the user.
#[test]
fn what_a_unet_predicts_is_read_from_whatever_says_it() {
    use ldm::samplers::Output::{self, Epsilon, V};
    let f = Folder::new();
    let attention = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight";
    let file = |channels: usize, width: usize, more: &[(&str, &[usize])], notes: Value| {
        let conv = ("model.diffusion_model.input_blocks.0.0.weight", &[1, channels, 1, 1][..]);
        let key = (attention, &[1, width][..]);
        let (vae, clip) =
            ("first_stage_model.encoder.conv_in.weight", "cond_stage_model.transformer.text_model.x");
        let text = if width == 768 { clip } else { "cond_stage_model.model.ln_final.weight" };
        let all = [&[conv, key, (vae, &[1][..]), (text, &[1][..])], more].concat();
        f.write("m.safetensors", header(&all, notes))
    };
    let output = |path: &Path, told: Option<Prediction>| -> ldm::Result<Output> {
        let parts = ldm::pipeline::Parts::read(&ModelFolder::open_as(path, told)?)?;
        Ok(parts.schedule.unwrap().1.output)
    };
    for (notes, want) in [
        (json!({"modelspec.architecture": "stable-diffusion-v2-768-v"}), V),
        (json!({"modelspec.architecture": "stable-diffusion-v2-512"}), Epsilon),
        (json!({"modelspec.predict_key": "v"}), V),
        (json!({"ss_v_parameterization": "True"}), V),
        (json!({"ss_v_parameterization": "False"}), Epsilon),
        (json!({"modelspec.prediction_type": "Epsilon"}), Epsilon),
    ] {
        assert_eq!(output(&file(4, 1024, &[], notes.clone()), None).unwrap(), want, "{notes}");
    }
    assert_eq!(output(&file(9, 1024, &[], json!({})), None).unwrap(), Epsilon, "there is one such model");
    assert_eq!(output(&file(4, 768, &[("v_pred", &[0])], json!({})), None).unwrap(), V);
    // A note that says nothing is none.
    let strange = json!({"modelspec.prediction_type": "velocity"});
    assert_eq!(output(&file(4, 768, &[], strange.clone()), None).unwrap(), Epsilon);
    let path = file(4, 1024, &[], strange);
    assert!(output(&path, None).unwrap_err().to_string().contains("nothing in it says"));
    assert_eq!(output(&path, Some(Prediction::V)).unwrap(), V);
    let o = ldm(&["info", text(&path), "--prediction", "eps"]);
    assert!(o.out.contains("StableDiffusionPipeline"), "{}", o.err);
    // That far, and no further: it has a header alone.
    let bench = ["bench", "--component", "text", "--device", "cpu", "-m", text(&path)];
    refused(&f, 1, &["nothing in it says"], || ldm(&bench));
    refused(&f, 1, &["tensor `cond_stage_model."], || ldm(&[&bench[..], &["--prediction", "v"]].concat()));
    let reference = golden("sd2-tiny.mod.safetensors");
    let check = ["verify", "--device", "cpu", "-m", text(&path), "--reference", text(&reference)];
    refused(&f, 1, &["nothing in it says"], || ldm(&check));
    refused(&f, 1, &["no such tensor"], || ldm(&[&check[..], &["--prediction", "v"]].concat()));
    let preset = ["bench", "--preset", "sd15", "--prediction", "v"];
    refused(&f, 2, &["a preset says itself"], || ldm(&preset));
    let zero = file(4, 768, &[("ztsnr", &[0])], json!({}));
    assert!(output(&zero, None).unwrap_err().to_string().contains("ztsnr"));
    // A model that says it itself is not overruled.
    let whole = f.path("whole.safetensors");
    convert(&golden("sd2-tiny"), &whole, &[]);
    for model in [&whole, &golden("sd2-tiny")] {
        refused(&f, 2, &["says itself what its UNet predicts"], || {
            ldm(&["info", text(model), "--prediction", "v"])
        });
    }
}

/// Names that folders and files of other versions have.
#[test]
fn older_and_other_names_are_understood() {
    let f = Folder::new();
    // Text encoders with positions among their tensors, and without their outer module.
    copy(&golden("sd2-tiny"), &f.path("model"));
    let (weights, ids) = ("model/text_encoder/model.safetensors", "text_model.embeddings.position_ids");
    f.edit_tensors(weights, |header, data| {
        let end = data.len();
        header.insert(ids.into(), json!({"dtype": "I16", "shape": [1, 4], "data_offsets": [end, end + 8]}));
        data.extend([0u8; 8]);
    });
    let file = f.path("a.safetensors");
    convert(&f.path("model"), &file, &["--dtype", "bf16"]);
    f.edit_tensors(weights, |header, _| {
        let names: Vec<String> = header.keys().filter(|k| *k != "__metadata__").cloned().collect();
        for name in names {
            let entry = header.remove(&name).unwrap();
            header.insert(name.strip_prefix("text_model.").unwrap().into(), entry);
        }
    });
    let other = f.path("b.safetensors");
    convert(&f.path("model"), &other, &["--dtype", "bf16"]);
    let [(mut a, a_data), (mut b, b_data)] = [&file, &other].map(|p| tensors(p));
    assert!(a.remove("__metadata__").is_some() && b.remove("__metadata__").is_some());
    assert!(a == b && a_data == b_data && a.keys().any(|k| k.ends_with(".attn.in_proj_weight")));

    // Attention of an autoencoder with diffusers' words inside the original's names, under the prefix of a whole model, and a counter.
    let vae = f.path("vae.safetensors");
    convert(&golden("kl-attn-tiny/vae"), &vae, &[]);
    f.edit_tensors("vae.safetensors", |header, data| {
        let names: Vec<String> = header.keys().filter(|k| *k != "__metadata__").cloned().collect();
        for name in names {
            let entry = header.remove(&name).unwrap();
            let mut new = name.clone();
            for (old, own) in
                [(".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0.")]
            {
                new = if name.contains("attn") { new.replace(old, own) } else { new };
            }
            header.insert(format!("first_stage_model.{new}"), entry);
        }
        let end = data.len();
        header.insert("epoch".into(), json!({"dtype": "I64", "shape": [], "data_offsets": [end, end + 8]}));
        data.extend([0u8; 8]);
    });
    let back = f.path("back");
    convert(&vae, &back, &[]);
    let weights = "diffusion_pytorch_model.safetensors";
    same_tensors(&golden("kl-attn-tiny/vae").join(weights), &back.join(weights));
}

/// A file of Stable Diffusion as others hand it on: names and shapes as the original code states them, and no notes. Its values are a hole
/// in a file.
#[test]
fn the_original_codes_own_file_is_known() {
    let f = Folder::new();
    let (mut all, mut end) = (serde_json::Map::new(), 0);
    let table = fs::read_to_string(golden("compvis/sd15.tsv")).unwrap();
    for (name, shape) in table.lines().map(|l| l.split_once('\t').unwrap()) {
        let shape: Vec<usize> = shape.split(',').map(|d| d.parse().unwrap()).collect();
        // Only the noise schedule is read.
        if name.starts_with("alphas_cumprod") {
            continue;
        }
        let bytes = 2 * shape.iter().product::<usize>();
        all.insert(name.into(), json!({"dtype": "F16", "shape": shape, "data_offsets": [end, end + bytes]}));
        end += bytes;
    }
    let header = joined(&Value::Object(all).to_string(), &[]);
    let path = f.write("v1-5-pruned-emaonly.safetensors", &header);
    fs::File::options().write(true).open(&path).unwrap().set_len((header.len() + end) as u64).unwrap();
    let folder = ModelFolder::open(&path).unwrap();
    let blueprint = ldm::pipeline::Blueprint::read(&folder).unwrap();
    assert_eq!(blueprint.size(&Request::default()).unwrap(), (512, 512));
    let (unet, text) =
        (blueprint.unet.inventory(DType::F16).unwrap(), blueprint.condition.inventory(DType::F16).unwrap());
    let vae = blueprint.vae.inventory(DType::F16).unwrap();
    for (part, inventory) in
        [("unet", Inventory::of(&unet)), ("text_encoder", Inventory::of(&text)), ("vae", vae)]
    {
        Source::new(folder.checkpoint(part).unwrap(), &inventory).unwrap();
    }
    let ids = folder
        .tokenizer("tokenizer")
        .unwrap()
        .encode("a photo of an astronaut riding a horse on mars")
        .unwrap()
        .ids;
    assert_eq!(ids[..13], [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407, 49407]);
}

#[test]
fn what_stands_in_the_way_stays() {
    let f = Folder::with_model();
    fs::create_dir(f.path("full")).unwrap();
    f.write("full/x", "mine");
    f.write("plain", "mine");
    f.write("plain.safetensors", "mine");
    std::os::unix::fs::symlink(f.path("nowhere"), f.path("link")).unwrap();
    let model = f.path("model");
    for (to, code, say) in [
        ("full", 2, "is there already"),
        ("plain", 2, "is there already"),
        ("plain.safetensors", 2, "is there already"),
        ("link", 2, "is a link to a file that does not exist"),
        ("m.ckpt", 2, "ends in .safetensors"),
        ("none/m.safetensors", 2, "none does not exist; create it"),
        ("none/m", 2, "none does not exist; create it"),
    ] {
        refused(&f, code, &[say], || ldm(&["convert", text(&model), "-o", text(&f.path(to))]));
    }
    refused(&f, 2, &["want eps or v"], || {
        ldm(&["convert", text(&model), "-o", text(&f.path("m")), "--prediction", "x"])
    });
    // A value that the type cannot hold: neither half a file nor half a folder.
    f.fill("model/unet/diffusion_pytorch_model.safetensors", "conv_in.weight", 1e6);
    for to in ["m.safetensors", "m"] {
        refused(&f, 1, &["conv_in.weight", "values that f16 can hold"], || {
            ldm(&["convert", text(&model), "-o", text(&f.path(to)), "--dtype", "f16"])
        });
    }
    // A model that the original code cannot express.
    f.edit("model/unet/config.json", |c| c["freq_shift"] = json!(1));
    refused(&f, 2, &["freq_shift", "a single file cannot say"], || {
        ldm(&["convert", text(&model), "-o", text(&f.path("m.safetensors"))])
    });
}

/// Both kinds of run leave a file that holds what the folder does, and a first stage may be read from either file.
#[test]
fn a_run_exports_one_file_too() {
    let f = Folder::new();
    let first = first_stage(&f);
    let (alone, run) = (f.path("vae.safetensors"), f.path("run"));
    convert(&first.join("export/vae"), &alone, &[]);
    let own = [
        "steps=2",
        "export.single_file=true",
        "sample.every=0",
        "conditioning.kind=none",
        "model.unet.attention_head_dim=8",
    ];
    let o = diffusion(&alone, &run, &own);
    assert!(o.code == 0 && o.out.contains("export.safetensors"), "{}{}", o.out, o.err);
    let (file, folder) = (run.join("export.safetensors"), run.join("export"));
    assert!(drawn(&file, false) == drawn(&folder, false));
    // The autoencoder of a whole model.
    let other = f.path("other");
    let o = diffusion(&file, &other, &own);
    assert!(o.code == 0, "{}", o.err);
    same_tensors(
        &folder.join("vqvae/diffusion_pytorch_model.safetensors"),
        &other.join("export/vqvae/diffusion_pytorch_model.safetensors"),
    );
    // An autoencoder's own run.
    let trained = f.path("trained");
    let args = autoencoder_arguments(&trained, &["steps=2", "export.single_file=true"]);
    let o = ldm(&args);
    assert!(o.code == 0, "{}", o.err);
    let back = f.path("back");
    convert(&trained.join("export.safetensors"), &back, &[]);
    let weights = "diffusion_pytorch_model.safetensors";
    same_tensors(&trained.join("export/vae").join(weights), &back.join(weights));
    // A run is as good as its export; and other tools are said to need 32 groups.
    let o = ldm(&["convert", text(&trained), "-o", text(&f.path("again.safetensors"))]);
    assert!(
        o.code == 0
            && o.out.contains("not as in CompVis's models")
            && o.out.contains("norm_num_groups 4 (theirs is 32)"),
        "{}{}",
        o.out,
        o.err
    );
    // Said before the run.
    let never = f.path("never");
    let o = diffusion(&first, &never, &[&own[..], &["model.unet.freq_shift=1"]].concat());
    assert!(o.code == 2 && o.err.contains("model.unet.freq_shift") && !never.exists(), "{}", o.err);
}

/// Also where a weight lies among others in one tensor.
#[test]
fn a_file_with_a_fault_names_its_own_tensor() {
    let f = Folder::new();
    copy(&golden("uncond-ldm-tiny"), &f.path("model"));
    let weights = "model/unet/diffusion_pytorch_model.safetensors";
    f.fill(weights, "mid_block.attentions.0.to_k.weight", f32::NAN);
    let file = f.path("m.safetensors");
    convert(&f.path("model"), &file, &[]);
    refused(
        &f,
        1,
        &[
            "model.diffusion_model.middle_block.1.qkv.weight",
            "finite values",
            "NaN at [0, 0] of the rows that are `mid_block.attentions.0.to_k.weight`",
        ],
        || ldm(&["sample", "-m", text(&file), "--device", "cpu", "-o", text(&f.path("o.png"))]),
    );
}
