//! Whole models against tensors recorded from diffusers (`tests/golden`, made by `tools/`): part by part and, for the
//! pipelines, after every step of the sampler.

mod common;

use ldm::backend::Device;
use ldm::io::ModelFolder;
use ldm::pipeline::verify::{Options, Report, verify};
use ldm::tensor::DType;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn run(model: &str, reference: &str, device: &Device, dtype: DType, parts: &[&str]) -> Report {
    let folder = ModelFolder::open(golden(model)).unwrap();
    let options = Options { dtype: Some(dtype), parts: parts.iter().map(|p| p.to_string()).collect() };
    verify(&folder, &golden(reference), device, &options).unwrap()
}

/// Every tensor within its bound, and at least `judged` of them with one.
fn check(model: &str, reference: &str, device: &Device, dtype: DType, parts: &[&str], judged: usize) {
    let report = run(model, reference, device, dtype, parts);
    if let Some(line) = report.first_failure() {
        panic!("{reference} in {dtype}: {} diverges: {:?}", line.name, line.failed);
    }
    let bounded = report.lines.iter().filter(|l| l.bound.is_some()).count();
    assert!(bounded >= judged, "{reference} in {dtype}: {bounded} tensors have a bound, want {judged}");
}

const PIPELINES: [&str; 6] = ["ddim", "pndm", "euler", "heun", "dpmpp_2m", "img2img"];

#[test]
fn parts_on_the_cpu() {
    for dtype in DType::FLOATS {
        let judged = if dtype == DType::F32 { 11 } else { 4 };
        check("sd15-tiny", "sd15-tiny.mod.safetensors", &Device::Cpu, dtype, &[], judged);
        check("vq4-tiny", "vq4-tiny.mod.safetensors", &Device::Cpu, dtype, &["vq"], 2);
    }
}

#[test]
fn pipelines_on_the_cpu() {
    for name in PIPELINES {
        for dtype in DType::FLOATS {
            let reference = format!("sd15-tiny.pipe-{name}.safetensors");
            check("sd15-tiny", &reference, &Device::Cpu, dtype, &[], 7);
        }
    }
}

#[test]
fn parts_on_cuda() {
    common::on_cuda_with(&common::SCHEDULES[..1], |device| {
        for dtype in DType::FLOATS {
            let judged = if dtype == DType::F32 { 11 } else { 4 };
            check("sd15-tiny", "sd15-tiny.mod.safetensors", device, dtype, &[], judged);
            check("vq4-tiny", "vq4-tiny.mod.safetensors", device, dtype, &["vq"], 2);
        }
    });
}

#[test]
fn pipelines_on_cuda() {
    // Each kernel runs under every schedule in tests/ops.rs; here they take turns.
    for (i, name) in PIPELINES.iter().enumerate() {
        common::on_cuda_with(&common::SCHEDULES[i % 3..][..1], |device| {
            for dtype in DType::FLOATS {
                let reference = format!("sd15-tiny.pipe-{name}.safetensors");
                check("sd15-tiny", &reference, device, dtype, &[], 7);
            }
        });
    }
}

#[test]
fn a_changed_weight_is_found_at_the_first_tensor_that_it_touches() {
    let dir = std::env::temp_dir().join(format!("ldm-models-{}", std::process::id()));
    copy(&golden("sd15-tiny"), &dir);
    let file = dir.join("text_encoder/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    // The header's length, the header, the data: one bit of an exponent in the layer norm of layer 2.
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let at = header["text_model.encoder.layers.2.layer_norm1.weight"]["data_offsets"][0].as_u64().unwrap()
        as usize;
    bytes[8 + n + at + 3] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let folder = ModelFolder::open(&dir).unwrap();
    let report =
        verify(&folder, &golden("sd15-tiny.mod.safetensors"), &Device::Cpu, &Options::default()).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(report.first_failure().unwrap().name, "text.hidden_03");
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
