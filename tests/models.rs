//! Whole models against tensors recorded from diffusers (`tests/golden`, made by `tools/`): part by part and, for the
//! pipelines, after every step of the sampler.

mod common;

use ldm::backend::Device;
use ldm::io::ModelFolder;
use ldm::pipeline::verify::{Options, Report, verify};
use ldm::tensor::DType;
use std::path::{Path, PathBuf};

/// The folder is looked up when the test runs: on another machine (tools/gpu.sh) it is elsewhere.
fn golden(name: &str) -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join("tests/golden").join(name)
}

fn run(model: &str, reference: &str, device: &Device, dtype: DType, parts: &[&str]) -> Report {
    let folder = ModelFolder::open(golden(model)).unwrap();
    let options = Options { dtype: Some(dtype), parts: parts.iter().map(|p| p.to_string()).collect() };
    verify(&folder, &golden(reference), device, &options).unwrap()
}

/// Model, reference, part; tensors that are compared, and how many of them have a bound in the 16-bit types (in f32 all
/// but the codes of a quantiser have).
const RECORDS: &[(&str, &str, &[&str], usize, usize)] = &[
    ("sd15-tiny", "sd15-tiny.mod", &[], 11, 11),
    ("sd2-tiny", "sd2-tiny.mod", &[], 10, 10),
    ("inpaint-tiny", "inpaint-tiny.mod", &[], 11, 11),
    ("vq4-tiny", "vq4-tiny.mod", &["vq"], 4, 2),
    ("sd15-tiny", "sd15-tiny.pipe-ddim", &[], 12, 12),
    ("sd15-tiny", "sd15-tiny.pipe-pndm", &[], 14, 14),
    ("sd15-tiny", "sd15-tiny.pipe-euler", &[], 12, 12),
    ("sd15-tiny", "sd15-tiny.pipe-heun", &[], 18, 18),
    ("sd15-tiny", "sd15-tiny.pipe-dpmpp_2m", &[], 12, 12),
    ("sd15-tiny", "sd15-tiny.pipe-img2img", &[], 10, 10),
    ("sd2-tiny", "sd2-tiny.pipe", &[], 12, 12),
    ("inpaint-tiny", "inpaint-tiny.pipe", &[], 14, 14),
];

/// Every tensor of a record within its bound, in every type.
fn check(record: usize, device: &Device) {
    let (model, reference, parts, tensors, judged) = RECORDS[record];
    for dtype in DType::FLOATS {
        let report = run(model, &format!("{reference}.safetensors"), device, dtype, parts);
        if let Some(line) = report.first_failure() {
            panic!("{reference} in {dtype}: {} diverges: {:?}", line.name, line.failed);
        }
        let bounded = report.lines.iter().filter(|l| l.bound.is_some()).count();
        let codes = report.lines.iter().filter(|l| l.name == "vq.indices").count();
        let want = if dtype == DType::F32 { tensors - codes } else { judged };
        assert_eq!((report.lines.len(), bounded), (tensors, want), "{reference} in {dtype}");
    }
}

#[test]
fn on_the_cpu() {
    (0..RECORDS.len()).for_each(|record| check(record, &Device::Cpu));
}

#[test]
fn on_cuda() {
    // Each kernel runs under every schedule in tests/ops.rs; here they take turns.
    for record in 0..RECORDS.len() {
        common::on_cuda_with(&common::SCHEDULES[record % 3..][..1], |device| check(record, device));
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
