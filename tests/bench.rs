//! `ldm bench` as its users meet it: tables that add up, records that can be compared, requests that are refused.

mod common;
#[path = "common/folder.rs"]
mod folder;

use folder::{Folder, golden};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

struct Outcome {
    code: i32,
    out: String,
    err: String,
}

/// Runs `ldm bench` on the small checkpoint's text encoder, the quickest part, unless told otherwise.
fn bench(more: &[&str]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ldm"));
    command.args(["bench", "--device", "cpu", "-t", "2"]);
    if !more.iter().any(|a| *a == "-m" || *a == "--preset") {
        command.arg("-m").arg(golden("sd15-tiny"));
    }
    if !more.contains(&"--component") {
        command.args(["--component", "text"]);
    }
    let run = command.args(more).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let o = Outcome { code: run.status.code().unwrap_or(-1), out: text(&run.stdout), err: text(&run.stderr) };
    assert!(!o.err.contains("panicked") && (0..3).contains(&o.code), "{more:?}: {}: {}", o.code, o.err);
    o
}

#[track_caller]
fn good(more: &[&str]) -> String {
    let o = bench(more);
    assert_eq!((o.code, &*o.err), (0, ""), "{more:?}: {}", o.out);
    o.out
}

#[track_caller]
fn refused(more: &[&str], code: i32, say: &[&str]) {
    let o = bench(more);
    assert_eq!((o.code, &*o.out), (code, ""), "{more:?}: {}", o.err);
    for word in say {
        assert!(o.err.contains(word), "want `{word}` in: {}", o.err);
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn every_part_is_measured_and_lines_fit() {
    for part in ["text", "unet", "step", "vae-encoder", "vae-decoder", "pipeline"] {
        let out =
            good(&["--component", part, "--iterations", "1", "--warmup", "0", "--steps", "2", "--per-op"]);
        for word in
            [&*format!("sd15-tiny (file weights), {part}"), "p50", "GFLOP/s", "arena", "per evaluation"]
        {
            assert!(out.contains(word), "want `{word}` in: {out}");
        }
        let long = out.lines().find(|l| l.chars().count() > 100);
        assert_eq!(long, None, "a line beyond 100 columns");
    }
}

/// The number at the start of the line that ends in `what`.
#[track_caller]
fn number(out: &str, what: &str) -> f64 {
    let line =
        out.lines().find(|l| l.trim_end().ends_with(what)).unwrap_or_else(|| panic!("no `{what}` in: {out}"));
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn tables_add_up_to_the_evaluation() {
    let f = Folder::new();
    let file = f.path("record.json");
    let out = good(&[
        "--component",
        "vae-decoder",
        "--per-op",
        "--top",
        "3",
        "--iterations",
        "4",
        "--json",
        text(&file),
    ]);
    let (inside, outside, whole) =
        (number(&out, "in all 36 nodes"), number(&out, "outside of nodes"), number(&out, "an evaluation"));
    assert!((inside + outside - whole).abs() < 0.01, "{inside} + {outside} is not {whole}");
    // Three nodes are shown, the rest is one line.
    assert!(out.contains("in 33 more nodes"), "{out}");

    let record = read(&file);
    let rows = record["per_op"]["rows"].as_array().unwrap();
    let sum = |key: &str| rows.iter().map(|r| r[key].as_f64().unwrap()).sum::<f64>();
    let get = |a: &str, b: &str| record[a][b].as_f64().unwrap();
    assert_eq!(rows.len(), 36);
    let total = get("per_op", "total");
    assert!((sum("seconds") + get("per_op", "outside") - total).abs() < 1e-9 * total.max(1.0));
    assert!((sum("flops") / get("counts", "flops") - 1.0).abs() < 1e-9);
    assert!((sum("bytes") / get("counts", "bytes") - 1.0).abs() < 1e-9);
    assert!(sum("fastest") <= sum("seconds") && get("time", "p50") <= get("time", "p99"));
    assert_eq!(record["time"]["evaluations"].as_array().unwrap().len(), 4);
    assert!(get("counts", "allocations") >= 0.0 && get("memory", "process_peak_bytes") > 1e6);
    for key in ["cpu", "instruction_sets", "commit", "version"] {
        assert!(!record["machine"][key].is_null(), "{key}: {record}");
    }
}

/// The whole of an evaluation, and each operation, against the same record and against ones that were faster and slower:
/// by so much that other work on the machine cannot turn it around.
#[test]
fn a_slower_record_is_flagged_and_a_faster_one_is_not() {
    let f = Folder::new();
    let file = f.path("record.json");
    let args = |file: &Path, more: &[&str]| -> Outcome {
        let mut all = vec!["--iterations", "5", "--compare", text(file)];
        all.extend(more);
        bench(&all)
    };
    good(&["--iterations", "5", "--json", text(&file)]);
    let record = read(&file);
    // An older record of a machine `by` times as slow.
    let scaled = |by: f64, only: Option<&str>| {
        let mut r = record.clone();
        let scale = |v: &mut Value| *v = json!(v.as_f64().unwrap() * by);
        if only.is_none() {
            ["p50", "p95", "p99"].iter().for_each(|key| scale(&mut r["time"][key]));
            r["time"]["evaluations"].as_array_mut().unwrap().iter_mut().for_each(scale);
        }
        for row in r["per_op"]["rows"].as_array_mut().unwrap() {
            if only.is_none_or(|op| row["op"] == op) {
                scale(&mut row["seconds"]);
                scale(&mut row["fastest"]);
            }
        }
        f.write("other.json", r.to_string())
    };
    let o = args(&scaled(1e4, None), &[]);
    assert!(o.code == 0 && o.out.contains("no regression") && o.out.contains("faster"), "{}{}", o.out, o.err);

    let o = args(&scaled(1e-4, None), &["--threshold", "20%"]);
    assert!(o.code == 1 && o.out.contains("REGRESSION"), "{}{}", o.out, o.err);
    let whole = o.out.lines().find(|l| l.trim_start().starts_with("an evaluation  ")).unwrap();
    assert!(whole.contains("SLOWER"), "{whole}");

    // A median that other work has moved is shown, and is no regression by itself.
    let mut disturbed = record.clone();
    disturbed["time"]["p50"] = json!(1e-9);
    let o = args(&f.write("median.json", disturbed.to_string()), &["--threshold", "10000%"]);
    assert!(o.code == 0 && o.out.contains("an evaluation, p50"), "{}", o.out);

    let o = args(&scaled(1e-4, None), &["--threshold", "20%"]);
    assert!(o.out.contains("nodes that moved") && o.out.contains("text_model.encoder.layers."), "{}", o.out);

    // One kind of operation alone is enough; it is named.
    let o = args(&scaled(1.0, None), &["--threshold", "10000%"]);
    assert_eq!(o.code, 0, "{}", o.out);
    let o = args(&scaled(1e-4, Some("linear")), &["--threshold", "10000%"]);
    let line = o.out.lines().find(|l| l.trim_start().starts_with("linear ")).unwrap();
    assert!(o.code == 1 && line.contains("SLOWER"), "{}", o.out);

    // A kind that the older record does not have is shown, and judged by the evaluation.
    let mut other = record.clone();
    for row in other["per_op"]["rows"].as_array_mut().unwrap() {
        if row["op"] == "linear" {
            row["op"] = json!("embedding");
        }
    }
    let o = args(&f.write("kinds.json", other.to_string()), &["--threshold", "10000%"]);
    let line = o.out.lines().find(|l| l.trim_start().starts_with("linear ")).unwrap();
    assert!(o.code == 0 && !line.contains("SLOWER"), "{}", o.out);
}

#[test]
fn counts_are_compared_without_the_clock_and_none_may_grow() {
    let f = Folder::new();
    let file = f.path("counts.json");
    good(&["--iterations", "2", "--counts-only", "--json", text(&file)]);
    let record = read(&file);
    let keys: Vec<&String> = record.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["format", "settings", "counts"], "nothing that depends on the clock");
    let compare = |key: &str, by: f64, code: i32| {
        let mut r = record.clone();
        let v = r["counts"][key].as_f64().unwrap() + by;
        r["counts"][key] = if key == "flops" { json!(v) } else { json!(v as u64) };
        let o = bench(&[
            "--iterations",
            "2",
            "--counts-only",
            "--compare",
            text(&f.write("other.json", r.to_string())),
        ]);
        assert_eq!(o.code, code, "{key} {by}: {}{}", o.out, o.err);
        assert_eq!(o.out.contains("MORE"), code == 1, "{}", o.out);
    };
    compare("nodes", 0.0, 0);
    for key in ["nodes", "flops", "weight_bytes", "arena_bytes"] {
        compare(key, -1.0, 1);
        compare(key, 1.0, 0);
    }
    // Threads change no count of work.
    let other = Command::new(env!("CARGO_BIN_EXE_ldm"))
        .args([
            "bench",
            "--device",
            "cpu",
            "-t",
            "1",
            "--component",
            "text",
            "--iterations",
            "2",
            "--counts-only",
        ])
        .arg("-m")
        .arg(golden("sd15-tiny"))
        .arg("--compare")
        .arg(&file)
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&other.stdout).into_owned();
    assert!(out.contains("compared with the older record"), "{out}");
    refused(&["--compare", text(&file)], 2, &["counts alone", "--counts-only"]);
}

#[test]
fn other_work_is_not_compared() {
    let f = Folder::new();
    let file = f.path("record.json");
    good(&["--iterations", "1", "--json", text(&file)]);
    refused(
        &["--compare", text(&file), "--batch-size", "2"],
        2,
        &["settings differ", "batch_size: 1 there, 2 here"],
    );
    refused(&["--compare", text(&file), "--component", "unet"], 2, &["component: text there, unet here"]);
    refused(&["--compare", text(&file), "--dtype", "bf16"], 2, &["dtype: f32 there, bf16 here"]);
    refused(&["--compare", text(&f.path("none.json"))], 2, &["none.json", "nothing at this path"]);
    refused(
        &["--compare", text(&f.write("bad.json", "{}"))],
        1,
        &["bad.json", "ldm bench --json", "measure it again"],
    );
    let newer =
        f.write("newer.json", fs::read_to_string(&file).unwrap().replace("\"format\": 1", "\"format\": 9"));
    refused(&["--compare", text(&newer)], 1, &["form 1", "got form 9"]);
}

#[test]
fn a_trace_is_what_perfetto_reads() {
    let f = Folder::new();
    let file = f.path("trace.json");
    good(&["--iterations", "2", "--trace", text(&file)]);
    let trace = read(&file);
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |cat: &str| events.iter().filter(|e| e["cat"] == cat).collect::<Vec<_>>();
    let (evaluations, nodes) = (of("evaluation"), of("text"));
    assert_eq!((evaluations.len(), nodes.len()), (2, 2 * 47));
    let get = |e: &Value, key: &str| e[key].as_f64().unwrap();
    for e in evaluations.iter().chain(&nodes) {
        assert!(e["ph"] == "X" && get(e, "dur") >= 0.0 && get(e, "ts") >= 0.0, "{e}");
    }
    // A node lies inside one evaluation, to the nanosecond that times are rounded to.
    for n in &nodes {
        let inside = |e: &&&Value| {
            get(e, "ts") <= get(n, "ts") + 0.002
                && get(n, "ts") + get(n, "dur") <= get(e, "ts") + get(e, "dur") + 0.004
        };
        assert!(evaluations.iter().any(|e| inside(&e)), "{n}");
        assert!(
            n["args"]["node"].as_str().is_some_and(|s| s.starts_with("text_model") || s == "context"),
            "{n}"
        );
    }
}

#[test]
fn a_preset_runs_without_a_checkpoint_and_ceilings_are_measured() {
    let small = ["--preset", "vq-f4-noattn", "--component", "vae-encoder", "-W", "16", "-H", "16"];
    let out = good(&[&small[..], &["--iterations", "1", "--per-op", "--roofline"]].concat());
    for word in
        ["vq-f4-noattn (random weights)", "multiply  f32 fma", "copy      within", "Portable", "%  conv2d x "]
    {
        assert!(out.contains(word), "want `{word}` in: {out}");
    }
    let share = out.lines().find(|l| l.contains("  conv2d x ")).unwrap().split_whitespace().nth(6).unwrap();
    assert!(share.ends_with('%') && share != "0%", "share of the ceiling: {share}");
}

/// Through events of the CUDA driver: the emulator's, or a card's.
#[test]
fn a_gpu_is_measured_by_its_own_events() {
    let environment = match common::emulator::start() {
        Ok(emulator) => emulator.map_or(vec![], |e| e.environment().to_vec()),
        Err(why) => return common::skipped(&format!("no emulator: {why}")),
    };
    let f = Folder::new();
    let (file, trace) = (f.path("record.json"), f.path("trace.json"));
    let run = Command::new(env!("CARGO_BIN_EXE_ldm"))
        .args(["bench", "--device", "cuda", "--component", "text", "--warmup", "1", "--iterations", "2"])
        .args(["--per-op", "--roofline", "--json", text(&file), "--trace", text(&trace), "-m"])
        .arg(golden("sd15-tiny"))
        .envs(environment)
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success() && err.is_empty(), "{out}{err}");
    let record = read(&file);
    assert_eq!(record["settings"]["device"], "cuda");
    assert_eq!(record["time"]["warmup"], 2, "the first evaluations are no replays");
    let kernels = record["time"]["kernels"].as_u64().unwrap();
    assert!(kernels >= 47 && out.contains(&format!("{kernels} kernels, recorded as CUDA graphs")), "{out}");
    assert!(record["machine"]["gpu"].is_string(), "{out}");
    let rates = record["ceilings"]["multiply"].as_array().unwrap();
    let of =
        |t: &str| rates.iter().any(|r| r["dtypes"][0] == t && r["flops_per_second"].as_f64().unwrap() > 0.0);
    assert!(
        ["f32", "f16", "bf16"].into_iter().all(of) && out.contains("product 256×256×256"),
        "{out}{record}"
    );
    let rows = record["per_op"]["rows"].as_array().unwrap();
    let sum: f64 = rows.iter().map(|r| r["seconds"].as_f64().unwrap()).sum();
    let get = |key: &str| record["per_op"][key].as_f64().unwrap();
    assert!(rows.len() == 47 && (sum + get("outside") - get("total")).abs() < 1e-6, "{record}");
    assert!(rows.iter().any(|r| r["variant"] != ""), "attention has variants");
    assert!(read(&trace)["traceEvents"].as_array().unwrap().len() > 2 * 47);
}

/// `LDM_CUDA_GRAPH` is a switch, and nothing else.
#[test]
fn graphs_can_be_switched_off() {
    let environment = match common::emulator::start() {
        Ok(emulator) => emulator.map_or(vec![], |e| e.environment().to_vec()),
        Err(why) => return common::skipped(&format!("no emulator: {why}")),
    };
    let run = |switch: &str| {
        Command::new(env!("CARGO_BIN_EXE_ldm"))
            .args(["bench", "--device", "cuda", "--component", "text", "--iterations", "1", "-m"])
            .arg(golden("sd15-tiny"))
            .envs(environment.clone())
            .env("LDM_CUDA_GRAPH", switch)
            .output()
            .unwrap()
    };
    for (switch, recorded) in [("on", true), ("off", false)] {
        let o = run(switch);
        let out = String::from_utf8_lossy(&o.stdout);
        assert!(o.status.success() && out.contains("recorded as CUDA graphs") == recorded, "{switch}: {out}");
    }
    let o = run("maybe");
    let err = String::from_utf8_lossy(&o.stderr);
    assert!(
        o.status.code() == Some(2) && err.contains("LDM_CUDA_GRAPH: want on or off; got `maybe`"),
        "{err}"
    );
}

/// Unless `LDM_CUDA_OVERLAP` is off the record says how many kernels may start early: all but the first of each graph.
#[test]
fn kernels_that_may_start_early_are_counted() {
    let environment = match common::emulator::start() {
        Ok(emulator) => emulator.map_or(vec![], |e| e.environment().to_vec()),
        Err(why) => return common::skipped(&format!("no emulator: {why}")),
    };
    let f = Folder::new();
    for (switch, overlaps) in [("off", false), ("", true)] {
        let file = f.path("record.json");
        let o = Command::new(env!("CARGO_BIN_EXE_ldm"))
            .args(["bench", "--device", "cuda", "--component", "text", "--iterations", "1"])
            .args(["-m", text(&golden("sd15-tiny")), "--json", text(&file)])
            .envs(environment.clone())
            .env("LDM_CUDA_OVERLAP", switch)
            .output()
            .unwrap();
        let out = String::from_utf8_lossy(&o.stdout);
        let (time, err) = (&read(&file)["time"], String::from_utf8_lossy(&o.stderr));
        assert!(o.status.success() && out.contains("may start before") == overlaps, "{out}{err}");
        let kernels = time["kernels"].as_u64().unwrap();
        assert_eq!(time["early_kernels"].as_u64(), overlaps.then(|| kernels - 1), "{time}");
    }
}

/// Without a condition there is nothing to guide by: the UNet gets one row for each picture.
#[test]
fn a_unet_without_a_condition_is_measured() {
    let (model, f) = (golden("uncond-ldm-tiny"), Folder::new());
    let counts = |part: &str, more: &[&str]| {
        let file = f.path("record.json");
        let own = ["-m", text(&model), "--component", part, "--iterations", "1", "--warmup", "0"];
        let out = good(&[&own[..], &["--steps", "2", "--json", text(&file)], more].concat());
        assert!(out.contains(&format!("uncond-ldm-tiny (file weights), {part}, ")), "{out}");
        let record = read(&file);
        assert_eq!(record["settings"]["cfg_scale"], 1.0, "{part}");
        (record["counts"]["flops"].as_f64().unwrap(), record["counts"]["weight_bytes"].as_u64().unwrap())
    };
    let [unet, step, decoder, whole] =
        ["unet", "step", "vae-decoder", "pipeline"].map(|part| counts(part, &[]));
    // Two pictures take twice as much, but for the timestep, which they share.
    let twice = counts("unet", &["--batch-size", "2"]).0 / unet.0;
    assert!((1.99..=2.0).contains(&twice), "{twice}");
    assert!(step.0 > unet.0 && step.1 == unet.1, "{step:?}, {unet:?}");
    assert_eq!(
        whole,
        (2.0 * step.0 + decoder.0, step.1 + decoder.1),
        "two steps, one decoder, no text encoder"
    );
    refused(&["-m", text(&model)], 2, &["no text_encoder", "unet (UNet2DModel)"]);
}

/// A folder of which only the autoencoder is there.
#[test]
fn the_parts_of_an_incomplete_model_are_measured() {
    let vq = golden("vq4-tiny");
    let out = good(&["-m", text(&vq), "--component", "vae-decoder", "--iterations", "1"]);
    assert!(out.contains("vq4-tiny (file weights), vae-decoder, 64x64"), "{out}");
    refused(&["-m", text(&vq), "--component", "unet"], 2, &["no unet", "UNet2DModel", "vqvae (VQModel)"]);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    refused(&["--preset", "sd16"], 2, &["want one of sd15, ", "got `sd16`"]);
    refused(&["--preset", "vq-f4"], 2, &["no text_encoder", "CLIPTextModel", "vae (VQModel)"]);
    refused(
        &["--preset", "kl-f8", "--component", "vae-decoder", "-W", "30"],
        2,
        &["-W", "multiple of 8", "32"],
    );
    refused(
        &["-m", text(&golden("film-tiny")), "--component", "unet", "-W", "64"],
        2,
        &["no autoencoder", "leave out"],
    );
    refused(&["--component", "unet", "-W", "130048", "-H", "130048"], 2, &["needs", "are free", "smaller"]);
    refused(&["--batch-size", "0"], 2, &["--batch-size", "got 0"]);
    refused(&["--iterations", "0"], 2, &["--iterations", "got 0"]);
    refused(&["--threshold", "fast"], 2, &["--threshold", "5%", "got `fast`"]);
    refused(&["--cfg-scale", "nan"], 2, &["--cfg-scale"]);
    refused(&["--json", "/no/such/folder/x.json"], 2, &["/no/such/folder", "does not exist"]);
    refused(&["-m", "/no/such/model"], 2, &["/no/such/model"]);
    refused(&["-m", "x", "--preset", "sd15"], 2, &["--preset"]);
    let o = Command::new(env!("CARGO_BIN_EXE_ldm")).arg("bench").output().unwrap();
    assert_eq!(o.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&o.stderr).contains("either -m FOLDER or --preset NAME"));
}
