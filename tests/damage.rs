//! Damaged checkpoints: whatever stands in a file, opening it is an error or works, and never a panic, an abort, or an
//! endless loop.

#[path = "common/folder.rs"]
mod folder;

use folder::{Folder, golden, joined, tensors};
use ldm::backend::Device;
use ldm::graph::Target;
use ldm::io::ModelFolder;
use ldm::pipeline::{Blueprint, Pipeline, Request, Residency, convert};
use ldm::rng::Small;
use ldm::tensor::DType;
use serde_json::{Value, json};
use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

/// Opens a model and plans a picture; an error is as good as success.
fn open(model: &Path) -> bool {
    let Ok(folder) = ModelFolder::open(model) else { return false };
    // Each by itself too, before any configuration has been found sound.
    folder.components().iter().for_each(|c| drop(folder.checkpoint(&c.name)));
    let planned = Blueprint::read(&folder)
        .and_then(|b| b.estimate(&Request::default(), DType::F32, Residency::Always, Target::Cpu));
    planned.is_ok() & Pipeline::open(&folder, &Device::Cpu, None).is_ok()
}

#[track_caller]
fn survives(model: &Path, what: &str) {
    catch_unwind(|| open(model)).unwrap_or_else(|_| panic!("a panic on {what}"));
}

/// What is damaged: whole files, and of safetensors the headers.
const FILES: [&str; 11] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
];

#[test]
fn a_damaged_byte_or_a_cut_never_panics() {
    std::thread::scope(|s| {
        for (n, name) in FILES.iter().enumerate() {
            s.spawn(move || damage(name, Small::new(n as u64)));
        }
    });
}

/// The same in one file, whose header has the configurations too.
#[test]
fn a_damaged_single_file_never_panics() {
    std::thread::scope(|s| {
        for (n, name) in ["sd15-tiny", "uncond-ldm-tiny", "sd2-tiny"].into_iter().enumerate() {
            s.spawn(move || {
                let (f, mut r) = (Folder::new(), Small::new(n as u64));
                let whole = f.path("whole.safetensors");
                convert(&golden(name), &whole, None, None).unwrap();
                assert!(open(&whole));
                let bytes = fs::read(&whole).unwrap();
                let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                for _ in 0..200 {
                    let (mut bytes, at) = (bytes.clone(), r.below(header));
                    match r.below(3) {
                        0 => bytes.truncate(at),
                        1 => bytes[at] = b"0123456789eE.-+\",:[]{}x \n"[r.below(25)],
                        // A number in the header or a name: it is still JSON.
                        _ => match bytes[..header].iter().skip(at).position(u8::is_ascii_alphanumeric) {
                            Some(i) => bytes[at + i] = b"0123456789"[r.below(10)],
                            None => continue,
                        },
                    }
                    let file = f.write("m.safetensors", &bytes);
                    survives(&file, &format!("{name}: byte {at}"));
                }
            });
        }
    });
}

/// Every value of every configuration inside a file.
#[test]
fn a_strange_value_in_a_single_file_never_panics() {
    let f = Folder::new();
    for (name, part) in [("ldm-tiny", ""), ("uncond-ldm-tiny", ""), ("sd2-tiny", "text_encoder")] {
        let whole = f.path("whole.safetensors");
        convert(&golden(name), &whole, None, None).unwrap();
        let (header, data) = tensors(&whole);
        let notes = header["__metadata__"].as_object().unwrap();
        let wanted = |k: &str| k.contains(part) && k.ends_with("/config.json");
        for (note, text) in notes.iter().filter(|(k, _)| wanted(k)) {
            let text = text.as_str().unwrap();
            let value: Value = serde_json::from_str(text).unwrap();
            for key in value.as_object().unwrap().keys() {
                for other in [
                    json!(null),
                    json!(0),
                    json!(-1),
                    json!(3),
                    json!(u64::MAX),
                    json!([]),
                    json!([0, 0]),
                    json!("x"),
                ] {
                    let (mut header, mut value) = (header.clone(), value.clone());
                    value[key] = other.clone();
                    header["__metadata__"][note] = json!(value.to_string());
                    let file = f.write("m.safetensors", joined(&Value::Object(header).to_string(), &data));
                    survives(&file, &format!("{name}: {note}: `{key}` {other}"));
                }
            }
        }
    }
}

fn damage(name: &str, mut r: Small) {
    let f = Folder::with_model();
    let model = f.path("model");
    assert!(open(&model));
    let whole = fs::read(golden("sd15-tiny").join(name)).unwrap();
    let damaged = match name.ends_with(".safetensors") {
        true => 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize,
        false => whole.len(),
    };
    for _ in 0..300 {
        let mut bytes = whole.clone();
        let at = r.below(damaged);
        match r.below(4) {
            0 => bytes.truncate(at),
            1 => bytes[at] = r.below(256) as u8,
            2 => bytes[at] ^= 1 << r.below(8),
            // What is still JSON gets further.
            _ => bytes[at] = b"0123456789eE.-+\",:[]{}x \n"[r.below(25)],
        }
        f.write(&format!("model/{name}"), &bytes);
        let how = bytes.get(at).map_or("a cut".into(), |b| format!("{b} in its place"));
        survives(&model, &format!("{name}: byte {at}, {how}"));
    }
}

/// Every value of every configuration replaced by values that no model has.
#[test]
fn a_strange_value_never_panics() {
    let f = Folder::with_model();
    let model = f.path("model");
    let strange = [
        json!(null),
        json!("word"),
        json!(0),
        json!(-1),
        json!(0.5),
        json!(2147483647),
        json!(9007199254740993_u64),
        json!(u64::MAX),
        json!(1e300),
        json!([]),
        json!([0]),
        json!([2147483647, 2147483647]),
        json!(vec![1; 70]),
        json!({}),
    ];
    for name in FILES.iter().filter(|n| n.ends_with(".json") && !n.ends_with("vocab.json")) {
        let path = format!("model/{name}");
        let whole = fs::read(f.path(&path)).unwrap();
        let value: Value = serde_json::from_slice(&whole).unwrap();
        for key in value.as_object().unwrap().keys() {
            for other in &strange {
                f.edit(&path, |v| drop(v.insert(key.clone(), other.clone())));
                survives(&model, &format!("{name}: `{key}` {other}"));
                f.write(&path, &whole);
            }
        }
    }
}
