//! Models that are given pictures beside the latents, as their users meet them: what is not masked stays, what is masked is not
//! looked at, and what does not go together is refused. `tests/pictures.rs` has the pictures of diffusers.

mod common;
#[path = "common/folder.rs"]
mod folder;
#[path = "common/program.rs"]
mod program;

use folder::{Folder, copy, golden, joined, tensors};
use ldm::backend::Device;
use ldm::io::{ModelFolder, Rgb8, png};
use ldm::pipeline::{Init, Mask, Pipeline, Request};
use ldm::tensor::DType;
use program::{Outcome, ldm, refused, text};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// A picture of 32×32 and, of the same size, a mask with a square that is drawn anew.
const SIDE: usize = 32;

fn inside(i: usize) -> bool {
    (8..24).contains(&(i % SIDE)) && (10..28).contains(&(i / SIDE))
}

/// Two waves; `inside` and `outside` are added to what lies there.
fn picture(add_inside: u8, add_outside: u8) -> Vec<u8> {
    let pixel = |i: usize| {
        let (x, y) = ((i % SIDE) as f64, (i / SIDE) as f64);
        let add = if inside(i) { add_inside } else { add_outside };
        [x / 5.0, y / 4.0, (x + y) / 7.0].map(|v| (100.0 + 80.0 * v.sin()) as u8 + add)
    };
    (0..SIDE * SIDE).flat_map(pixel).collect()
}

fn gray() -> Vec<u8> {
    // Just on the two sides of a half.
    (0..SIDE * SIDE).map(|i| if inside(i) { 128 } else { 127 }).collect()
}

fn request(add_inside: u8, add_outside: u8, strength: f64) -> Request {
    let (width, height) = (SIDE, SIDE);
    Request {
        prompt: "a red circle".into(),
        init: Some(Init { width, height, rgb: picture(add_inside, add_outside), strength }),
        mask: Some(Mask { width, height, gray: gray(), composite: false }),
        steps: 3,
        seed: 4,
        ..Request::default()
    }
}

fn open(model: &Path, device: &Device) -> Pipeline {
    Pipeline::open(&ModelFolder::open(model).unwrap(), device, Some(DType::F32)).unwrap()
}

/// Picture and mask as files.
fn files(f: &Folder) -> [String; 2] {
    let three = |v: Vec<u8>| v.into_iter().flat_map(|v| [v; 3]).collect::<Vec<u8>>();
    [("picture.png", picture(0, 0)), ("mask.png", three(gray()))].map(|(name, rgb)| {
        let path = f.path(name);
        png::write_rgb8(&path, SIDE, SIDE, &rgb, None).unwrap();
        text(&path).to_string()
    })
}

fn sample(model: &Path, out: &Path, more: &[&str]) -> Outcome {
    let mut args = vec!["sample", "-m", text(model), "-o", text(out), "--steps", "2", "--device", "cpu"];
    if !more.contains(&"-s") {
        args.extend(["-s", "5"]);
    }
    ldm(&[&args, more].concat())
}

fn pixels(path: &Path) -> Rgb8 {
    png::read_rgb8(path).unwrap()
}

/// Where the mask is black the picture's bytes come back, unless the whole result is asked for; each picture of a batch is
/// that of its seed.
#[test]
fn what_is_not_masked_stays_byte_for_byte() {
    let f = Folder::new();
    let [init, mask] = files(&f);
    let before = pixels(Path::new(&init)).pixels;
    for model in ["inpaint-tiny", "sd15-tiny"].map(golden) {
        let given = ["-p", "a red circle", "-i", &*init, "--mask", &*mask, "--sampling-method", "ddim"];
        let [out, whole] = ["out.png", "whole.png"].map(|name| f.path(name));
        let o = sample(&model, &out, &given);
        assert_eq!((o.code, o.out.trim()), (0, text(&out)), "{}", o.err);
        assert_eq!(sample(&model, &whole, &[&given[..], &["--no-composite"]].concat()).code, 0);
        let (out, whole) = (pixels(&out), pixels(&whole));
        assert!(out.parameters.unwrap().contains("Denoising strength: 1,"));
        let rgb = |v: &[u8], i: usize| [v[3 * i], v[3 * i + 1], v[3 * i + 2]];
        let mut changed = 0;
        for i in 0..SIDE * SIDE {
            let want = if inside(i) { &whole.pixels } else { &before };
            assert_eq!(rgb(&out.pixels, i), rgb(want, i), "pixel {i}");
            changed += usize::from(rgb(&whole.pixels, i) != rgb(&before, i));
        }
        assert!(changed > SIDE * SIDE / 2, "the whole result is the autoencoder's");

        let given = [&given[..], &["--eta", "0.5", "--strength", "0.6"]].concat();
        for (name, more) in [("b.png", ["--batch-size", "2"]), ("one.png", ["-s", "6"])] {
            assert_eq!(sample(&model, &f.path(name), &[&given[..], &more].concat()).code, 0);
        }
        assert!(fs::read(f.path("b_1.png")).unwrap() == fs::read(f.path("one.png")).unwrap(), "seed + 1");
    }
}

/// A folder for inpainting without a condition, on the latents of a VQ autoencoder: the super-resolution checkpoint with one
/// more input channel.
fn without_condition(f: &Folder) -> std::path::PathBuf {
    copy(&golden("upscale-tiny"), &f.path("model"));
    f.edit("model/model_index.json", |index| index["_class_name"] = json!("LDMPipeline"));
    f.edit("model/unet/config.json", |config| config["in_channels"] = json!(7));
    let file = f.path("model/unet/diffusion_pytorch_model.safetensors");
    let (mut header, mut data) = tensors(&file);
    // (8,6,3,3) becomes (8,7,3,3), at the end of the file.
    let at = header["conv_in.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    let wide: Vec<u8> = (0..8)
        .flat_map(|o| {
            let row = &data[at + o * 6 * 36..][..6 * 36];
            [row, &row[36..72]].concat()
        })
        .collect();
    header["conv_in.weight"] =
        json!({"dtype": "F32", "shape": [8, 7, 3, 3], "data_offsets": [data.len(), data.len() + wide.len()]});
    // What stood there before belongs to nobody: a tensor of its own would be one too many, so it goes.
    let cut = 6 * 36 * 8;
    data.drain(at..at + cut);
    data.extend(wide);
    for (_, entry) in header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
        let offsets = entry["data_offsets"].as_array_mut().unwrap();
        for v in offsets {
            let old = v.as_u64().unwrap() as usize;
            if old > at {
                *v = json!(old - cut);
            }
        }
    }
    f.write(
        "model/unet/diffusion_pytorch_model.safetensors",
        joined(&Value::Object(header).to_string(), &data),
    );
    f.path("model")
}

/// With noise alone to begin with, what is drawn anew does not depend on what was there, and does on what is beside it.
#[test]
fn what_is_masked_is_not_looked_at() {
    let f = Folder::new();
    for (model, prompt) in [(golden("inpaint-tiny"), "a red circle"), (without_condition(&f), "")] {
        let pipeline = open(&model, &Device::Cpu);
        let make = |add_inside, add_outside, strength| {
            let r = Request { prompt: prompt.into(), ..request(add_inside, add_outside, strength) };
            pipeline.generate(&r, &mut ()).unwrap().remove(0).rgb
        };
        let first = make(0, 0, 1.0);
        assert!(first == make(60, 0, 1.0), "{}: the masked part is looked at", model.display());
        assert!(first != make(0, 60, 1.0), "{}: the rest is not looked at", model.display());
        assert!(
            make(0, 0, 0.7) != make(60, 0, 0.7),
            "{}: a weaker change begins with the picture",
            model.display()
        );
    }
}

/// The same through the CUDA path, in pictures off by one at most.
#[test]
fn on_cuda() {
    let size = SIDE / 2;
    let small =
        Init { width: size, height: size, rgb: picture(0, 0)[..3 * size * size].to_vec(), strength: 1.0 };
    let upscale = Request { init: Some(small), steps: 2, seed: 3, ..Request::default() };
    let paint = |strength| Request { steps: 2, ..request(0, 0, strength) };
    let requests = [
        ("inpaint-tiny", paint(1.0)),
        ("inpaint-tiny", paint(0.5)),
        ("sd15-tiny", paint(1.0)),
        ("upscale-tiny", upscale),
    ];
    let run = |model: &str, r: &Request, device: &Device| {
        open(&golden(model), device).generate(r, &mut ()).unwrap().remove(0).rgb
    };
    for (i, (model, r)) in requests.iter().enumerate() {
        let want = run(model, r, &Device::Cpu);
        common::on_cuda_with(&common::SCHEDULES[i % 3..][..1], |device| {
            let off = run(model, r, device).iter().zip(&want).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(off <= Some(1), "{model}: off by {off:?}");
        });
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    let f = Folder::new();
    let [init, mask] = files(&f);
    let out = f.write("out.png", "old");
    let odd = f.path("odd.png");
    png::write_rgb8(&odd, 31, 30, &vec![9; 31 * 30 * 3], None).unwrap();
    let (odd, lines) = (text(&odd).to_string(), f.write("lines.txt", "a\nb\n"));
    let (init, mask, prompt) = (["-i", &*init], ["--mask", &*mask], ["-p", "x"]);
    let check = |model: &str, code: i32, more: &[&[&str]], say: &str| {
        refused(&f, code, &[say], || sample(&golden(model), &out, &more.concat()));
    };
    check("inpaint-tiny", 2, &[&prompt], "want the picture (-i FILE) and a mask of its size (--mask FILE)");
    check("inpaint-tiny", 2, &[&prompt, &init], "want a mask of the picture's size (--mask FILE)");
    check(
        "inpaint-tiny",
        2,
        &[&prompt, &init, &["--mask", &*odd]],
        "mask: want the picture's size 32x32; got 31x30",
    );
    check(
        "inpaint-tiny",
        2,
        &[&prompt, &["-i", &*odd, "--mask", &*odd]],
        "multiples of 4 for this model; the nearest is 32x32",
    );
    check("inpaint-tiny", 2, &[&prompt, &init, &mask, &["-W", "64"]], "the initial picture is 32x32");
    check(
        "inpaint-tiny",
        2,
        &[&prompt, &init, &mask, &["--strength", "0.1"]],
        "with 2 steps want at least 0.500",
    );
    check("inpaint-tiny", 2, &[&prompt, &init, &["--mask", "none.png"]], "none.png: want a picture (--mask)");
    let say = ["takes a picture (-i FILE), which goes with one prompt"];
    refused(&f, 2, &say, || sample(&golden("inpaint-tiny"), &f.path("made"), &["--from-file", text(&lines)]));
    check("sd15-tiny", 2, &[&prompt, &mask], "--init-img");
    check("upscale-tiny", 2, &[], "enlarges a picture (super-resolution): want one (-i FILE)");
    check("upscale-tiny", 2, &[&init, &mask], "mask: this model enlarges a picture");
    check("upscale-tiny", 2, &[&init, &["--strength", "0.5"]], "--strength: this model enlarges a picture");
    check("upscale-tiny", 2, &[&init, &prompt], "no condition");
    check("upscale-tiny", 2, &[&init, &["-W", "32"]], "size 32x64: the picture of 32x32 becomes 64x64");
    check("upscale-tiny", 2, &[&["-i", &*odd]], "picture 31x30: width and height must be multiples of 2");

    let pipeline = open(&golden("inpaint-tiny"), &Device::Cpu);
    let refused = |r: &Request, say: &str| {
        let said = pipeline.generate(r, &mut ()).unwrap_err().to_string();
        assert!(said.contains(say), "{said}");
    };
    let mut r = request(0, 0, 1.0);
    r.mask.as_mut().unwrap().gray.pop();
    refused(&r, "mask: want 32x32x1 bytes; got 1023");
    let mut r = request(0, 0, 1.5);
    refused(&r, "strength: want a number from 0 to 1");
    r.init.as_mut().unwrap().rgb.clear();
    refused(&r, "initial picture: want 32x32x3 bytes");
}

#[test]
fn channels_that_no_model_has_are_refused() {
    let f = Folder::new();
    for (model, say) in [
        ("inpaint-tiny", "`in_channels`: want latent_channels 4, or 9 for inpainting"),
        ("upscale-tiny", "`in_channels`: want 6: latent_channels 3 and the 3 of a picture"),
    ] {
        copy(&golden(model), &f.path("model"));
        f.edit("model/unet/config.json", |config| config["in_channels"] = json!(8));
        for command in ["sample", "info"] {
            let out = f.path("x.png");
            let o = match command {
                "sample" => sample(&f.path("model"), &out, &["-p", "x"]),
                _ => ldm(&["info", text(&f.path("model"))]),
            };
            assert!(o.code == 2 && o.err.contains(say), "{command}: {}", o.err);
        }
        fs::remove_dir_all(f.path("model")).unwrap();
    }
}

/// `info` says what a run takes, with the encoder where there is one to run.
#[test]
fn info_plans_what_a_run_takes() {
    let f = Folder::new();
    let side = 128;
    let file = |name: &str, side: usize| {
        let path = f.path(name);
        png::write_rgb8(&path, side, side, &vec![200; side * side * 3], None).unwrap();
        text(&path).to_string()
    };
    let (large, small) = (file("large.png", side), file("small.png", side / 2));
    let number = |text: &str, after: &str| -> usize {
        let rest = text.split_once(after).unwrap_or_else(|| panic!("no `{after}` in {text}")).1;
        rest.split_whitespace().next().unwrap().parse().unwrap()
    };
    let inpaint = ["-p", "x", "-i", &*large, "--mask", &*large];
    for (model, more, encodes) in
        [("inpaint-tiny", &inpaint[..], true), ("upscale-tiny", &["-i", &*small], false)]
    {
        let model = golden(model);
        let args = ["info", text(&model), "-W", "128", "-H", "128", "--steps", "2"];
        let info = ldm(&args);
        assert!(info.code == 0 && info.out.contains("\nencoding ") == encodes, "{}{}", info.out, info.err);
        let o = sample(&model, &f.path("x.png"), more);
        assert_eq!(o.code, 0, "{}", o.err);
        assert_eq!(number(&info.out, "peak: "), number(&o.err, "at the peak, "), "{}{}", info.out, o.err);
        if cfg!(target_os = "linux") {
            let (said, real) = (number(&info.out, "peak: "), number(&o.err, "memory: "));
            // As in tests/memory.rs.
            assert!(said.abs_diff(real) <= real / 50 + (12 << 20), "{}{}", info.out, o.err);
        }
    }
}

/// diffusers' pipeline for inpainting never begins with Runge-Kutta steps, whatever the scheduler's file says.
#[test]
fn an_old_scheduler_is_corrected_as_diffusers_does() {
    let f = Folder::new();
    let [init, mask] = files(&f);
    copy(&golden("inpaint-tiny"), &f.path("model"));
    f.edit("model/scheduler/scheduler_config.json", |config| {
        config.remove("skip_prk_steps").unwrap();
        config["steps_offset"] = json!(0);
    });
    let given = ["-p", "x", "-i", &*init, "--mask", &*mask, "--disable-image-metadata"];
    for (model, out) in [(golden("inpaint-tiny"), "a.png"), (f.path("model"), "b.png")] {
        let o = sample(&model, &f.path(out), &given);
        assert_eq!(o.code, 0, "{}", o.err);
    }
    assert!(fs::read(f.path("a.png")).unwrap() == fs::read(f.path("b.png")).unwrap());
}

#[test]
fn a_mask_without_white_draws_a_warning() {
    let f = Folder::new();
    let [init, _] = files(&f);
    let mask = f.path("black.png");
    png::write_rgb8(&mask, SIDE, SIDE, &[0; SIDE * SIDE * 3], None).unwrap();
    let o = sample(
        &golden("inpaint-tiny"),
        &f.path("out.png"),
        &["-p", "x", "-i", &*init, "--mask", text(&mask)],
    );
    assert!(o.code == 0 && o.err.contains("the mask has no white"), "{}", o.err);
    assert_eq!(pixels(&f.path("out.png")).pixels, pixels(Path::new(&init)).pixels);
}
