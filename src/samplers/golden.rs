//! Tables and betas against what diffusers 0.37.1 and torch do, as `tools/golden_samplers.py` recorded it.

use super::*;
use serde::Deserialize;
use std::path::Path;

#[derive(Deserialize)]
struct Run {
    sampler: String,
    name: String,
    config: serde_json::Value,
    steps: usize,
    skip: usize,
    eta: f64,
    timesteps: Vec<f64>,
    start: Vec<f64>,
    /// The network's input at the first element, per evaluation; none for recorded pipelines.
    #[serde(default)]
    inputs: Vec<f64>,
    /// Guided outputs per evaluation; none where they are made up.
    #[serde(default)]
    outputs: Vec<Vec<f64>>,
    latents: Vec<Vec<f64>>,
}

/// The made-up numbers of tools/golden_samplers.py.
fn made_up(i: usize, (a, b, c): (usize, usize, usize), n: usize) -> Vec<f64> {
    (0..n).map(|j| ((i * a + j * b + c) % 257) as f64 / 64.0 - 2.0).collect()
}

/// The largest element, at least 1.
fn size(x: &[f64]) -> f64 {
    x.iter().fold(1.0, |a, b| b.abs().max(a))
}

/// The largest deviation of a row's state from the recorded latents, relative to the largest element of the
/// states before and after. Each row starts from the recorded state, so that no row's error hides in
/// another's.
fn replay(run: &Run) -> f64 {
    let label = format!("{} {}", run.sampler, run.name);
    let mut cfg = ScheduleConfig::from_json(&run.config, Path::new(&run.name)).unwrap();
    cfg.eta = run.eta;
    let method: Method = run.sampler.parse().unwrap();
    let ladder = method.ladder(&cfg, run.steps, run.skip).unwrap();
    let table = method.table(&ladder).unwrap();
    assert_eq!(table.rows.len(), run.timesteps.len(), "{label}: evaluations");
    let n = run.start.len();
    if run.skip == 0 && run.outputs.is_empty() {
        let unit = made_up(0, (0, 53, 7), n);
        for (x, z) in run.start.iter().zip(&unit) {
            assert!((x - z * table.noise_scale).abs() <= 2e-7 * x.abs(), "{label}: start {x}, noise {z}");
        }
    } else if run.outputs.is_empty() {
        let (clean, at) = (made_up(0, (0, 19, 91), n), ladder.steps[0].at);
        for ((x, z), c) in run.start.iter().zip(made_up(0, (0, 53, 7), n)).zip(clean) {
            let ours = at.alpha * c / 2.0 + at.sigma * z;
            assert!((x - ours).abs() <= 1e-6 * at.sigma.max(1.0), "{label}: start {x}, ours {ours}");
        }
    }
    let noises: Vec<Vec<f64>> = (0..table.noises).map(|k| made_up(k, (71, 29, 3), n)).collect();
    let mut worst = 0f64;
    for rows in [table.exact.clone(), table.rows.iter().map(Row::widen).collect()] {
        let mut slots = vec![vec![f64::NAN; n]; table.slots];
        slots[table.first_slot] = run.start.clone();
        for (k, row) in rows.iter().enumerate() {
            let after = rows.get(k + 1).map_or(table.last_slot, |next| next.x_slot);
            let late = (row.timestep - run.timesteps[k]).abs();
            assert!(
                late <= if cfg.karras { 1e-3 } else { 1e-6 }, // Karras' come through a float32 logarithm
                "{label}: evaluation {k} at {}",
                row.timestep
            );
            let before = size(&slots[row.x_slot]);
            if let Some(want) = run.inputs.get(k) {
                let input = row.prepare(&slots)[0];
                let bound = 3e-7 * row.scale_in * before;
                assert!((input - want).abs() <= bound, "{label}: input {k}: {input} is not {want}");
            }
            let m = run.outputs.get(k).cloned().unwrap_or_else(|| made_up(k, (37, 101, 13), n));
            row.advance(&mut slots, &m, &noises);
            let want = &run.latents[k];
            for (a, b) in slots[after].iter().zip(want) {
                assert!(a.is_finite(), "{label}: evaluation {k}");
                worst = worst.max((a - b).abs() / before.max(size(want)));
            }
            slots[after].clone_from(want);
        }
    }
    worst
}

#[test]
fn equals_diffusers() {
    let schedulers = include_str!("../../tests/golden/samplers/schedulers.json");
    let pipelines = include_str!("../../tests/golden/samplers/pipelines.json");
    let mut runs = 0;
    let mut worst = (0.0, String::new());
    for text in [schedulers, pipelines] {
        for run in serde_json::from_str::<Vec<Run>>(text).unwrap() {
            let off = replay(&run);
            println!("{off:.1e} {} {}", run.sampler, run.name);
            if off > worst.0 {
                worst = (off, format!("{} {}", run.sampler, run.name));
            }
            runs += 1;
        }
    }
    assert!(runs >= 98, "only {runs} recorded runs");
    assert!(worst.0 < 1e-6, "{}: off by {:.1e}", worst.1, worst.0);
}

#[derive(Deserialize)]
struct Betas {
    name: String,
    config: serde_json::Value,
    betas: u64,
    bars: u64,
    first: Vec<f32>,
    last: Vec<f32>,
}

#[test]
fn betas_equal_torch_bit_for_bit() {
    let hash = |values: &[f32]| {
        values.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, v| {
            (h ^ v.to_bits() as u64).wrapping_mul(0x0000_0100_0000_01b3)
        })
    };
    for want in
        serde_json::from_str::<Vec<Betas>>(include_str!("../../tests/golden/samplers/betas.json")).unwrap()
    {
        let cfg = ScheduleConfig::from_json(&want.config, Path::new(&want.name)).unwrap();
        let (betas, bars) = (cfg.train_betas().unwrap(), cfg.alphas_cumprod().unwrap());
        let ends = bars[..3].iter().chain(&bars[bars.len() - 3..]);
        for (ours, theirs) in ends.zip(want.first.iter().chain(&want.last)) {
            assert!((ours - theirs).abs() <= 3e-7 * theirs, "{}: {ours} is not {theirs}", want.name);
        }
        if cfg.rescale_zero_snr {
            continue; // through torch's square root, which rounds one value in six the other way
        }
        assert_eq!((hash(&betas), hash(&bars)), (want.betas, want.bars), "{}", want.name);
    }
}
