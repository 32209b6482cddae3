//! Every sampler of the list against closed forms, against its own table, and against recorded diffusers
//! runs.

use super::schedule::{karras, windows};
use super::*;
use crate::rng::Small;
use std::path::Path;

/// A network in f64: what it answers to (its input, the point), and noises from a list.
struct Toy<'a, F> {
    ladder: &'a Ladder,
    raw: F,
    noises: Vec<f64>,
    drawn: usize,
}

impl<F: FnMut(f64, &Point) -> f64> Model<f64> for Toy<'_, F> {
    fn predict(&mut self, x: &f64, at: &Point) -> Result<Prediction<f64>> {
        let c = at.conversion(self.ladder.output)?;
        let m = (self.raw)(at.scale_in * x, at);
        let bound = self.ladder.clip.unwrap_or(f64::INFINITY);
        let denoised = (c.dx * x + c.dm * m).clamp(-bound, bound);
        Ok(Prediction { denoised, noise: c.nx * x + c.nm * m, output: m })
    }
    fn noise(&mut self) -> Result<f64> {
        self.drawn += 1;
        Ok(self.noises[self.drawn - 1])
    }
}

fn direct(
    m: Method,
    x: f64,
    ladder: &Ladder,
    raw: impl FnMut(f64, &Point) -> f64,
    noises: Vec<f64>,
) -> (f64, usize) {
    let mut toy = Toy { ladder, raw, noises, drawn: 0 };
    (m.walk(x, ladder, &mut toy).unwrap(), toy.drawn)
}

/// Data N(MEAN, STD^2): the ideal network is linear, and (x - alpha MEAN) / sqrt(alpha^2 STD^2 + sigma^2)
/// stays constant along the exact way.
const MEAN: f64 = 0.7;
const STD: f64 = 0.4;

fn spread(p: &Point) -> f64 {
    ((p.alpha * STD).powi(2) + p.sigma.powi(2)).sqrt()
}

fn ideal(x_in: f64, p: &Point, output: Output) -> f64 {
    let x = x_in / p.scale_in;
    let surprise = (x - p.alpha * MEAN) / spread(p).powi(2);
    let (clean, noise) = (MEAN + p.alpha * STD * STD * surprise, p.sigma * surprise);
    match output {
        Output::Epsilon => noise,
        Output::Sample => clean,
        Output::V => p.scale_in * (p.alpha * noise - p.sigma * clean),
    }
}

/// `n` steps, even in ln sigma, from e^2.5 to e^-2.
fn smooth(m: Method, n: usize, output: Output) -> (Ladder, Point) {
    let ratio = |i: usize| (2.5 - 4.5 * i as f64 / n as f64).exp();
    let grid: Vec<Point> = (0..=n).map(|i| m.point(1000.0 * (1.0 - i as f64 / n as f64), ratio(i))).collect();
    (Ladder::new(m.over(&grid), output), grid[n])
}

/// The end of a run from `sigmas` standard deviations above the mean, as so many at the end, and the noises
/// drawn.
fn end(m: Method, n: usize, output: Output, eta: f64, sigmas: f64, noises: Vec<f64>) -> (f64, usize) {
    let (ladder, end) = smooth(m, n, output);
    let ladder = Ladder { eta, ..ladder };
    let start = ladder.steps[0].at;
    let x = start.alpha * MEAN + sigmas * spread(&start);
    let (x, drawn) = direct(m, x, &ladder, |x, p| ideal(x, p, output), noises);
    ((x - end.alpha * MEAN) / spread(&end), drawn)
}

#[test]
fn measured_order_is_the_declared_one() {
    for &m in Method::ALL {
        if end(m, 8, Output::Epsilon, 0.0, 1.0, vec![0.0; 64]).1 > 0 {
            continue; // draws noise whatever eta: the next test's
        }
        for output in [Output::Epsilon, Output::V, Output::Sample] {
            let error = |n: usize| (end(m, n, output, 0.0, 1.3, vec![]).0 - 1.3).abs();
            let (coarse, fine) = (error(128), error(256));
            let order = (coarse / fine).log2();
            println!("{m} {output:?}: order {order:.3}, error {fine:.2e}");
            assert!(fine < 0.02, "{m} {output:?}: error {fine}");
            // Declared is the order for predicted noise. PLMS mixes old outputs as they come, as diffusers
            // does, and for v that is of first order only.
            let want = m.order() as f64;
            let want = if output == Output::Epsilon { want } else { order.clamp(1.0, want) };
            let off = (order - want).abs();
            assert!(off < 0.15, "{m} {output:?}: measured order {order:.3}, declared {}", m.order());
        }
    }
}

#[test]
fn fresh_noise_leaves_mean_and_variance_right() {
    // All is linear: the weight of each noise in the end is found by setting it to 1 and the others to 0.
    let variance = |m: Method, n: usize, eta: f64| {
        let run = |sigmas: f64, noises: Vec<f64>| end(m, n, Output::Epsilon, eta, sigmas, noises).0;
        let drawn = end(m, n, Output::Epsilon, eta, 0.0, vec![0.0; 4 * n]).1;
        let mean = run(0.0, vec![0.0; drawn]);
        assert!(mean.abs() < 1e-9, "{m}: the mean moves by {mean}");
        let one = |k: usize| (0..drawn).map(|i| f64::from(u8::from(i == k))).collect();
        (0..drawn).map(|k| run(0.0, one(k)).powi(2)).sum::<f64>() + run(1.0, vec![0.0; drawn]).powi(2)
    };
    let mut checked = 0;
    for &m in Method::ALL {
        for eta in [0.0, 0.5, 1.0] {
            if end(m, 8, Output::Epsilon, eta, 0.0, vec![0.0; 64]).1 > 0 {
                let (coarse, fine) = (variance(m, 64, eta) - 1.0, variance(m, 256, eta) - 1.0);
                assert!(
                    fine.abs() < 0.05 && fine.abs() < coarse.abs() / 3.0,
                    "{m}, eta {eta}: {coarse}, {fine}"
                );
                checked += 1;
            }
        }
    }
    assert!(checked >= 2);
}

fn configs() -> Vec<ScheduleConfig> {
    let base = ScheduleConfig { clip_sample: Some(false), steps_offset: Some(1), ..Default::default() };
    let mut all = vec![];
    for spacing in [None, Some(Spacing::Leading), Some(Spacing::Trailing), Some(Spacing::Linspace)] {
        for output in [Output::Epsilon, Output::V, Output::Sample] {
            all.push(ScheduleConfig { spacing, output, ..base.clone() });
        }
    }
    for betas in [BetaSchedule::Linear, BetaSchedule::SquaredCos] {
        all.push(ScheduleConfig { betas, beta_start: 0.0001, beta_end: 0.02, ..base.clone() });
    }
    all.push(ScheduleConfig { clip_sample: Some(true), clip_range: Some(0.8), ..base.clone() });
    all.push(ScheduleConfig { clip_sample: Some(true), eta: 1.0, ..base.clone() });
    all.push(ScheduleConfig { eta: 0.5, ..base.clone() });
    all.push(ScheduleConfig { karras: true, ..base.clone() });
    all.push(ScheduleConfig { final_sigmas: Some(FinalSigmas::SigmaMin), ..base.clone() });
    all.push(ScheduleConfig { train_steps: 40, beta_end: 0.3, ..base });
    all
}

#[test]
fn table_does_what_the_sampler_does() {
    let mut tables = 0;
    for &m in Method::ALL {
        for (c, cfg) in configs().iter().enumerate() {
            for (steps, skip) in [(1, 0), (2, 0), (3, 1), (7, 0), (12, 5), (30, 0)] {
                let Ok(ladder) = m.ladder(cfg, steps, skip) else { continue };
                let table = m.table(&ladder).unwrap();
                let raw = |x: f64, t: f64| (3.0 * x + 0.01 * t).sin() + 0.2 * x;
                let mut random = Small::new(steps as u64);
                let noises: Vec<f64> = (0..40).map(|_| random.normal()).collect();
                let x = random.normal();
                let (want, drawn) = direct(m, x, &ladder, |x, p| raw(x, p.timestep), noises.clone());
                assert_eq!(table.noises, drawn);
                assert_eq!(table.rows.len(), ladder.steps.len());

                let mut slots = vec![vec![f64::NAN]; table.slots];
                slots[table.first_slot] = vec![x];
                let noises: Vec<Vec<f64>> = noises.iter().map(|z| vec![*z]).collect();
                for (k, (row, packed)) in table.exact.iter().zip(&table.rows).enumerate() {
                    let m_out = raw(row.prepare(&slots)[0], row.timestep);
                    row.advance(&mut slots, &[m_out], &noises);
                    let (reads, writes): (Vec<_>, Vec<_>) = (row.reads().collect(), row.writes().collect());
                    assert!(
                        writes.iter().all(|w| !reads.contains(w)),
                        "{m}: row {k} reads {reads:?}, writes {writes:?}"
                    );
                    assert!(
                        (1..writes.len()).all(|i| !writes[..i].contains(&writes[i])),
                        "{m}: row {k}: {writes:?}"
                    );
                    assert!(reads.iter().chain(&writes).all(|s| *s < table.slots));
                    assert_eq!(packed.noise < 0, packed.cz == 0.0);
                    assert_eq!(packed.widen().pack(), *packed);
                }
                let got = slots[table.last_slot][0];
                let scale = want.abs().max(1.0);
                assert!(
                    (got - want).abs() < 1e-12 * scale,
                    "{m}, config {c}, {steps} steps: {got} is not {want}"
                );
                tables += 1;
            }
        }
    }
    assert!(tables > 300, "only {tables} tables");
}

#[test]
fn slots_stay_few() {
    // X and its successor; PLMS keeps three outputs and writes a fourth; 2M keeps one state and two outputs.
    let want = [(Method::Ddim, 2), (Method::Pndm, 6), (Method::Euler, 2), (Method::DpmPp2M, 5)];
    for (m, slots) in want {
        let table = m.table(&m.ladder(&configs()[0], 20, 0).unwrap()).unwrap();
        assert_eq!(table.slots, slots, "{m}");
    }
}

/// Mixes as many old outputs as it is asked to: what a row can hold has an end, and the end is an error.
#[test]
fn too_long_a_memory_is_an_error() {
    struct Hoarder;
    impl Hoarder {
        fn walk<L: Latent>(mut x: L, ladder: &Ladder, model: &mut impl Model<L>) -> Result<L> {
            let mut kept = vec![];
            for s in &ladder.steps {
                kept.push(model.predict(&x, &s.at)?.output);
                x = L::mix(&kept.iter().map(|k| (1.0, k)).collect::<Vec<_>>());
            }
            Ok(x)
        }
    }
    let short = smooth(Method::Euler, 6, Output::Epsilon).0;
    assert!(record::record("hoarder", &short, |x, l, r| Hoarder::walk(x, l, r)).is_ok());
    let long = smooth(Method::Euler, 12, Output::Epsilon).0;
    let error = record::record("hoarder", &long, |x, l, r| Hoarder::walk(x, l, r)).unwrap_err().to_string();
    assert!(error.contains("hoarder") && error.contains("8 state slots"), "{error}");
}

#[test]
fn schedules_are_schedules() {
    for cfg in configs() {
        let (betas, bars) = (cfg.train_betas().unwrap(), cfg.alphas_cumprod().unwrap());
        assert_eq!(betas.len(), cfg.train_steps);
        assert!(betas.iter().all(|b| *b > 0.0 && *b < 1.0));
        assert!(bars.windows(2).all(|w| w[1] < w[0]) && bars[0] < 1.0 && bars[bars.len() - 1] > 0.0);
        for &m in Method::ALL {
            for steps in [1, 2, 5, 10, 25] {
                let Ok(ladder) = m.ladder(&cfg, steps, 0) else { continue };
                for s in &ladder.steps {
                    let unit = |p: &Point| p.scale_in * (p.alpha.powi(2) + p.sigma.powi(2)).sqrt();
                    assert!(
                        (unit(&s.at) - 1.0).abs() < 1e-12 && (unit(&s.to) - 1.0).abs() < 1e-12,
                        "{m}: {s:?}"
                    );
                    assert!(
                        s.to.sigma / s.to.alpha <= s.from.sigma / s.from.alpha,
                        "{m}: noise rises in {s:?}"
                    );
                }
                let end = ladder.steps[ladder.steps.len() - 1].to;
                let least = ((1.0 - bars[0]) / bars[0]).sqrt() as f64;
                assert!(end.sigma / end.alpha <= least * 1.000001, "{m}: ends at {end:?}");
            }
        }
    }
    let zero = ScheduleConfig { rescale_zero_snr: true, ..Default::default() };
    let bars = zero.alphas_cumprod().unwrap();
    assert!(bars[999] == 0.0 && (bars[0] - 0.99915).abs() < 1e-6 && bars.windows(2).all(|w| w[1] < w[0]));
    let ladder = karras(14.6, 0.03, 10);
    assert!((ladder[0] - 14.6).abs() < 1e-9 && (ladder[9] - 0.03).abs() < 1e-9);
    assert!(ladder.windows(2).all(|w| w[1] < w[0]));
}

/// Computed in float64 for 1000 steps, alpha-bar at timesteps 0, 1, 249, 499, 749, 999. Ours are float32's,
/// whose alphas are off by up to 3e-8 each: a thousand of them make some 1e-6.
#[test]
fn schedules_of_the_paper() {
    let rows = [
        (0.0015, 0.0195, [0.9985, 0.9969944271, 0.5105143008, 0.1158444908, 0.0084448305, 0.0001423040]),
        (0.0015, 0.0155, [0.9985, 0.9969956023, 0.5374232296, 0.1510774233, 0.0175814343, 0.0006686652]),
        (0.0015, 0.0205, [0.9985, 0.9969941526, 0.5042534410, 0.1085759962, 0.0070483938, 0.0000969109]),
        (0.00085, 0.012, [0.99915, 0.9982960278, 0.6754324137, 0.2776696505, 0.0566234916, 0.0046600985]),
        (0.0015, 0.0150, [0.9985, 0.9969957594, 0.5410280769, 0.1563070943, 0.0192954036, 0.0008125185]),
    ];
    for (beta_start, beta_end, want) in rows {
        let bars = ScheduleConfig { beta_start, beta_end, ..Default::default() }.alphas_cumprod().unwrap();
        for (t, want) in [0, 1, 249, 499, 749, 999].into_iter().zip(want) {
            let off = (bars[t] as f64 / want - 1.0).abs();
            assert!(off < 3e-6, "{beta_start}..{beta_end}, timestep {t}: {} is not {want}", bars[t]);
        }
    }
    // DDIM with eta 1 and 50 steps, which are 1, 21, .., 981: the weight of the fresh noise.
    let cfg = ScheduleConfig {
        beta_start: 0.0015,
        beta_end: 0.0195,
        steps_offset: Some(1),
        set_alpha_to_one: Some(false),
        clip_sample: Some(false),
        eta: 1.0,
        ..Default::default()
    };
    let ladder = Method::Ddim.ladder(&cfg, 50, 0).unwrap();
    let table = Method::Ddim.table(&ladder).unwrap();
    let times: Vec<f64> = ladder.steps.iter().map(|s| s.at.timestep).collect();
    assert_eq!((times[0], times[1], times[49]), (981.0, 961.0, 1.0));
    for (row, want) in [(0, 0.56113832), (24, 0.37680532), (49, 0.02743205)] {
        assert!(
            (table.exact[row].cz / want - 1.0).abs() < 1e-5,
            "row {row}: {} is not {want}",
            table.exact[row].cz
        );
    }
}

#[test]
fn names_are_unique_and_understood() {
    let mut all: Vec<String> = vec![];
    for &m in Method::ALL {
        let mut own: Vec<String> = m.names().iter().map(|n| plain(n)).collect();
        own.sort();
        own.dedup();
        all.extend(own);
        for name in m.names() {
            assert_eq!(name.parse::<Method>().unwrap(), m, "{name}");
            assert_eq!(name.to_uppercase().parse::<Method>().unwrap(), m, "{name}");
        }
        assert_eq!(m.to_string().parse::<Method>().unwrap(), m);
    }
    let count = all.len();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), count, "a name belongs to two samplers: {all:?}");
}

#[test]
fn names_as_other_programs_write_them() {
    let choice = |s: &str| s.parse::<Choice>().unwrap();
    let plain = |method| Choice { method, karras: false, spacing: None };
    assert_eq!(choice("DPM++ 2M Karras"), Choice { karras: true, ..plain(Method::DpmPp2M) });
    assert_eq!(choice("dpmpp_2m"), plain(Method::DpmPp2M));
    assert_eq!(choice("DPMSolverMultistepScheduler"), plain(Method::DpmPp2M));
    assert_eq!(choice("ddim_trailing"), Choice { spacing: Some(Spacing::Trailing), ..plain(Method::Ddim) });
    assert_eq!(choice("PNDM"), plain(Method::Pndm));
    assert_eq!(choice("EulerDiscrete"), plain(Method::Euler));
    let mut cfg = ScheduleConfig { spacing: Some(Spacing::Leading), ..Default::default() };
    choice("Euler Karras").apply(&mut cfg);
    assert_eq!((cfg.karras, cfg.spacing), (true, Some(Spacing::Leading)));

    let error = |s: &str| s.parse::<Choice>().unwrap_err().to_string();
    assert!(error("eular").ends_with("got `eular`; did you mean `euler`?"), "{}", error("eular"));
    assert!(error("dpmpp2").contains("did you mean `dpm++2m`?"), "{}", error("dpmpp2"));
    assert!(
        Method::ALL.iter().all(|m| error("nonesuch").contains(m.name()))
            && !error("nonesuch").contains("mean")
    );
    assert!(!error("").contains("mean"));

    assert_eq!([(6, 0.6), (50, 0.8), (50, 1.0), (10, 0.05)].map(|(n, s)| skipped(n, s)), [3, 10, 0, 10]);
}

#[test]
fn what_cannot_be_honoured_is_an_error() {
    let cfg = ScheduleConfig::default();
    let fails = |m: Method, cfg: &ScheduleConfig, steps, skip, part: &str| {
        let error = m.ladder(cfg, steps, skip).and_then(|l| m.table(&l)).unwrap_err().to_string();
        assert!(error.contains(part), "{m}: {error}");
    };
    for &m in Method::ALL {
        fails(m, &cfg, 0, 0, "want 1 to 1000 steps; got 0");
        fails(m, &cfg, 1001, 0, "got 1001");
        fails(m, &cfg, 5, 5, "at least one step to run");
        fails(m, &ScheduleConfig { trained_betas: Some(vec![0.1; 3]), ..cfg.clone() }, 5, 0, "got 3");
        fails(m, &ScheduleConfig { beta_end: 1.5, ..cfg.clone() }, 5, 0, "between 0 and 1");
        fails(m, &ScheduleConfig { train_steps: 0, ..cfg.clone() }, 5, 0, "steps; got 5");
    }
    let karras = ScheduleConfig { karras: true, ..cfg.clone() };
    fails(Method::Ddim, &karras, 5, 0, "no Karras ladder");
    fails(Method::Pndm, &karras, 5, 0, "no Karras ladder");
    fails(Method::Ddim, &ScheduleConfig { eta: 1.5, ..cfg.clone() }, 5, 0, "eta from 0 to 1");
    fails(Method::Ddim, &ScheduleConfig { steps_offset: Some(1), ..cfg.clone() }, 1000, 0, "outside 0..1000");
    fails(Method::Pndm, &ScheduleConfig { skip_prk: Some(false), ..cfg.clone() }, 5, 0, "skip_prk_steps");
    fails(
        Method::Pndm,
        &ScheduleConfig { output: Output::Sample, ..cfg.clone() },
        5,
        0,
        "predicts the sample",
    );
    fails(Method::Pndm, &ScheduleConfig { rescale_zero_snr: true, ..cfg.clone() }, 5, 0, "zero signal");
    let zero = ScheduleConfig { rescale_zero_snr: true, spacing: Some(Spacing::Trailing), ..cfg };
    fails(Method::Ddim, &zero, 5, 0, "needs prediction_type v_prediction");
}

#[test]
fn files_are_read_with_care() {
    let read =
        |text: &str| ScheduleConfig::from_json(&serde_json::from_str(text).unwrap(), Path::new("s.json"));
    let fails = |text: &str, part: &str| {
        let error = read(text).unwrap_err().to_string();
        assert!(error.contains("s.json") && error.contains(part), "{error}");
    };
    fails(
        r#"{"beta_schedule": "sigmoid"}"#,
        "`beta_schedule`: want linear, scaled_linear, squaredcos_cap_v2",
    );
    fails(r#"{"prediction_type": "flow_prediction"}"#, "`prediction_type`");
    fails(r#"{"clip_sample": 1}"#, "want true or false; got 1");
    fails(r#"{"trained_betas": [0.1, "x"]}"#, "a list of numbers");
    fails("[]", "a JSON object");
    let text = r#"{"lambda_min_clipped": -Infinity, "name": "an \"Infinity\" NaN", "sigma_min": null}"#;
    let cfg = ScheduleConfig::from_text(text, Path::new("s.json")).unwrap();
    assert_eq!(cfg.lambda_min, Some(f64::NEG_INFINITY));
    let error = ScheduleConfig::from_text("{", Path::new("s.json")).unwrap_err().to_string();
    assert!(error.contains("s.json") && error.contains("JSON"), "{error}");
    let cfg = read(r#"{"lambda_min_clipped": "-Infinity", "algorithm_type": "sde-dpmsolver++", "other": 3}"#)
        .unwrap();
    assert_eq!(cfg.lambda_min, Some(f64::NEG_INFINITY));
    assert!(Method::Euler.ladder(&cfg, 5, 0).is_ok());
    let error = Method::DpmPp2M.ladder(&cfg, 5, 0).unwrap_err().to_string();
    assert!(error.contains("`algorithm_type`") && error.contains("sde-dpmsolver++"), "{error}");
}

#[test]
fn plms_equals_ddim_for_a_constant_noise() {
    let cfg =
        ScheduleConfig { clip_sample: Some(false), set_alpha_to_one: Some(false), ..Default::default() };
    let run = |m: Method| direct(m, 0.9, &m.ladder(&cfg, 20, 0).unwrap(), |_, _| 0.3, vec![]).0;
    assert!((run(Method::Ddim) - run(Method::Pndm)).abs() < 1e-12);
    let evaluations = Method::Pndm.ladder(&cfg, 20, 0).unwrap().steps.len();
    assert_eq!(evaluations, 21);
}

#[test]
fn plain_windows_are_consistent() {
    let grid: Vec<Point> = (0..4).map(|i| Point::exploding(0.0, 4.0 - i as f64)).collect();
    let steps = windows(&grid);
    assert!(steps.len() == 3 && steps.windows(2).all(|w| w[0].to == w[1].from && w[1].from == w[1].at));
}
