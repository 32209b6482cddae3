//! Tiles and splits of the heaviest products of Stable Diffusion 1.5 (30 steps at 512×512 with guidance, and the decoder), each
//! measured on a card (`LDM_BENCH_DEVICE`, `cuda` by default): `cargo bench --bench sweep -- --out sweep.jsonl`.
//!
//! One JSON line for each; what is in the file already is not measured again. `--dtype f32`; `--shapes N` of them, 30 by
//! default; `--near X`: what the model puts at more than X times the time of its choice is left out, 3 by default;
//! `--seconds N`: ends then with exit code 3 where something is left.

#[path = "common/sweep.rs"]
mod sweep;

use ldm::Result;
use ldm::backend::Device;
use ldm::tensor::DType;
use serde_json::Value;
use std::fs::{File, read_to_string};
use std::io::Write;
use std::process::exit;
use std::time::{Duration, Instant};
use sweep::{Effort, graphs, heaviest};

fn main() {
    let began = Instant::now();
    let (mut out, mut dtype, mut shapes, mut near, mut seconds) = (None, DType::BF16, 30, 3.0, 540);
    let mut words = std::env::args().skip(1).filter(|w| w != "--bench");
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_else(|| fail(&format!("{word}: a value is missing")));
        let wrong = || -> String { format!("{word}: want a number; got `{value}`") };
        let number = || value.parse().unwrap_or_else(|_| fail(&wrong()));
        match word.as_str() {
            "--out" => out = Some(value),
            "--dtype" => dtype = ok(value.parse()),
            "--shapes" => shapes = number() as usize,
            "--near" => near = value.parse().unwrap_or_else(|_| fail(&wrong())),
            "--seconds" => seconds = number(),
            _ => fail(&format!("{word}: want --out, --dtype, --shapes, --near, --seconds")),
        }
    }
    let out = out.unwrap_or_else(|| fail("--out FILE is missing"));
    let subjects = ok(graphs(dtype).and_then(|graphs| heaviest(&graphs, shapes)));
    let done: Vec<Value> = read_to_string(&out)
        .unwrap_or_default()
        .lines()
        .map_while(|l| serde_json::from_str(l).ok())
        .collect();
    let mut file =
        File::options().create(true).append(true).open(&out).unwrap_or_else(|e| fail(&e.to_string()));
    let name = std::env::var("LDM_BENCH_DEVICE").unwrap_or_else(|_| "cuda".into());
    let device = ok(name.parse().and_then(Device::open));
    let effort = Effort { slice: Duration::from_millis(20), tries: 5 };
    let until = began + Duration::from_secs(seconds);
    let all = sweep::sweep(&device, &subjects, near, effort, &done, until, |row| {
        println!("{row}");
        // One write: a file that ends within a line would not be read to its end.
        file.write_all(format!("{row}\n").as_bytes()).map_err(|e| ldm::Error::invalid(format!("{out}: {e}")))
    });
    if !ok(all) {
        eprintln!("out of time: some are left");
        exit(3);
    }
}

fn ok<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|e| fail(&e.to_string()))
}

fn fail(why: &str) -> ! {
    eprintln!("error: {why}");
    exit(2)
}
