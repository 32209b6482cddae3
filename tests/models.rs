//! Whole models against tensors recorded from diffusers (`tests/golden`, made by `tools/`): part by part and, for the
//! pipelines, after every step of the sampler.

mod common;

use ldm::backend::Device;
use ldm::diffusion::{Sampling, Settings};
use ldm::exec::Hook;
use ldm::graph::Node;
use ldm::io::ModelFolder;
use ldm::models::{Inventory, Model};
use ldm::pipeline::verify::{Options, Report, verify};
use ldm::pipeline::{Blueprint, Request, load};
use ldm::rng::Generator;
use ldm::tensor::{DType, HostTensor};
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
    ("film-tiny", "film-tiny.mod", &["unet"], 1, 1),
    ("vq4-tiny", "vq4-tiny.mod", &["vq"], 4, 2),
    ("kl-attn-tiny", "kl-attn-tiny.mod", &[], 2, 2),
    ("sd15-tiny", "sd15-tiny.pipe-ddim", &[], 12, 12),
    ("sd15-tiny", "sd15-tiny.pipe-pndm", &[], 14, 14),
    ("sd15-tiny", "sd15-tiny.pipe-euler", &[], 12, 12),
    ("sd15-tiny", "sd15-tiny.pipe-heun", &[], 18, 18),
    ("sd15-tiny", "sd15-tiny.pipe-dpmpp_2m", &[], 12, 12),
    ("sd15-tiny", "sd15-tiny.pipe-img2img", &[], 10, 10),
    ("sd2-tiny", "sd2-tiny.pipe", &[], 12, 12),
    ("inpaint-tiny", "inpaint-tiny.pipe", &[], 16, 16),
    ("upscale-tiny", "upscale-tiny.pipe", &[], 12, 12),
    ("ldm-tiny", "ldm-tiny.mod", &[], 7, 7),
    ("ldm-tiny", "ldm-tiny.pipe", &[], 12, 12),
    ("class-tiny", "class-tiny.pipe", &[], 12, 12),
    ("uncond-ldm-tiny", "uncond-ldm-tiny.pipe", &[], 11, 11),
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
    common::in_processes(RECORDS.len(), |record| {
        common::on_cuda_with(&common::SCHEDULES[record % 3..][..1], |device| check(record, device));
    });
}

/// Labels of the nodes that run.
struct Labels(Vec<String>);

impl Hook for Labels {
    fn before(&mut self, _: usize, node: &Node) -> ldm::Result<()> {
        self.0.push(node.label.clone());
        Ok(())
    }
}

/// Keys and values of the prompt, and nothing else, are computed once: again only for another prompt, whose results
/// are then those of a run that began with it.
#[test]
fn what_depends_on_prompt_and_schedule_alone_is_computed_once() {
    let folder = ModelFolder::open(golden("sd15-tiny")).unwrap();
    let blueprint = Blueprint::read(&folder).unwrap();
    let (unet, device) = (&blueprint.unet, Device::Cpu);
    let inventory = Inventory::of(&unet.inventory(DType::F32).unwrap());
    let weights = load(folder.checkpoint("unet").unwrap(), &inventory, &device).unwrap();
    let (method, schedule) = blueprint.choose(&Request::default()).unwrap();
    let ladder = method.ladder(&schedule, 4, 0).unwrap();
    let settings =
        Settings { batch: 1, size: [8, 8], tokens: 7, guidance: 3.0, known: false, dtype: DType::F32 };
    let tensor = |shape: &[usize], seed| {
        HostTensor::f32(shape, Generator::new(seed).randn(shape.iter().product())).unwrap()
    };
    let contexts = [1, 2].map(|seed| tensor(&[2, 7, unet.context], seed));
    let run = |prompts: &[usize]| {
        let mut run = Sampling::new(unet, &weights, &device, (method, &ladder), settings.clone()).unwrap();
        let mut ran = vec![];
        for &prompt in prompts {
            run.set_context(&contexts[prompt]).unwrap();
            run.start(&tensor(&[1, 8, 8, unet.out_channels], 3)).unwrap();
            for _ in 0..2 {
                let mut labels = Labels(vec![]);
                run.step_with(&mut labels).unwrap();
                ran.push(labels.0);
            }
        }
        (ran, run.state().unwrap())
    };
    let (ran, state) = run(&[0, 1]);
    let once: Vec<&String> = ran[0].iter().filter(|label| !ran[1].contains(label)).collect();
    let of_the_prompt = |l: &str| l == "context" || l.ends_with("attn2.to_k") || l.ends_with("attn2.to_v");
    let of_the_times =
        |l: &str| l == "time_proj" || l.starts_with("time_embedding.") || l.ends_with("time_emb_proj");
    let steady = |l: &str| of_the_prompt(l) || of_the_times(l);
    assert!(once.iter().any(|l| of_the_prompt(l)) && once.iter().any(|l| of_the_times(l)), "{once:?}");
    assert!(once.iter().all(|label| steady(label)), "{once:?}");
    assert_eq!(once.len(), ran[0].iter().filter(|label| steady(label)).count());
    assert_eq!(ran[0].len(), ran[1].len() + once.len());
    assert_eq!((&ran[2], &ran[3]), (&ran[0], &ran[1]), "another prompt runs everything once");
    assert_eq!(state, run(&[1]).1, "the second prompt alone");
    assert_ne!(state, run(&[0]).1, "the first prompt");
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
