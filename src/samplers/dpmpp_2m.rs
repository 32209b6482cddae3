//! DPM-Solver++ (2M) (Lu et al. 2022b, algorithm 2); diffusers' `DPMSolverMultistepScheduler` with
//! dpmsolver++, order 2, midpoint; A1111's "DPM++ 2M".
//!
//! x' = sigma'/sigma * x + alpha' (1 - e^-h) * (d + h/(2 h0) * (d - d0)), with d the denoised latent, d0 the
//! one before, and h, h0 the steps in lambda = ln(alpha/sigma) after and before this evaluation.

use super::schedule::{Ladder, Point, Step, interpolate, karras, log_sigmas, ratio, timestep_of};
use super::{BetaSchedule, Latent, Model, Reads, Sampler, ScheduleConfig, Spacing};
use crate::error::{Error, Result};

/// Second order, deterministic; the first step, and the last one to sigma 0, are of first order.
pub struct DpmPp2M;

impl Sampler for DpmPp2M {
    const NAME: &'static str = "dpm++2m";
    const LABEL: &'static str = "DPM++ 2M";
    const CLASS: &'static str = "DPMSolverMultistepScheduler";
    const ALIASES: &'static [&'static str] = &["k_dpmpp_2m", "dpm_solver_multistep"];
    const ORDER: u32 = 2;
    const READS: Reads = &[
        ("thresholding", &["false"]),
        // diffusers takes other solvers' words for its own in these two
        ("algorithm_type", &["dpmsolver++", "deis"]),
        ("solver_type", &["midpoint", "logrho", "bh1", "bh2"]),
        ("solver_order", &["2"]),
        ("variance_type", &[]),
        ("use_exponential_sigmas", &["false"]),
        ("use_beta_sigmas", &["false"]),
        ("use_lu_lambdas", &["false"]),
        ("use_flow_sigmas", &["false"]),
        ("use_dynamic_shifting", &["false"]),
    ];

    fn point(timestep: f64, ratio: f64) -> Point {
        Point::preserving_ratio(timestep, ratio)
    }

    fn ladder(cfg: &ScheduleConfig, steps: usize, skip: usize) -> Result<Ladder> {
        let bars = cfg.alphas_cumprod_positive()?;
        let table: Vec<f32> = bars.iter().map(|b| ratio(*b)).collect();
        let floor = cfg.lambda_min.unwrap_or(f64::NEG_INFINITY);
        let last = table.iter().filter(|s| -(**s as f64).ln() >= floor).count();
        if last == 0 {
            return Err(Error::invalid(format!("dpm++2m: lambda_min_clipped {floor} leaves no timestep")));
        }
        let (mut marks, mut sigmas): (Vec<f64>, Vec<f64>);
        if cfg.karras {
            sigmas = karras(table[table.len() - 1] as f64, table[0] as f64, steps);
            let logs = log_sigmas(&table);
            let whole =
                |t: f64| if cfg.betas == BetaSchedule::SquaredCos { t.trunc() } else { t.round_ties_even() };
            marks = sigmas.iter().map(|s| whole(timestep_of(*s, &logs))).collect();
        } else {
            // One more mark than steps: the lowest is where the ladder ends instead.
            let spacing = cfg.spacing.unwrap_or(Spacing::Linspace);
            marks = cfg.timesteps(spacing, last, steps + 1, steps);
            marks.iter_mut().for_each(|t| *t = t.round_ties_even());
            sigmas = marks.iter().map(|t| interpolate(&table, *t)).collect();
        }
        sigmas.push(cfg.final_sigma(&bars));
        marks.push(0.0);
        let levels = marks.iter().zip(&sigmas).map(|(t, s)| Self::point(*t, *s as f32 as f64));
        let grid: Vec<Point> = levels.collect();
        let lower = cfg.lower_order_final.unwrap_or(true) && steps < 15;
        let first_order_end = cfg.euler_at_final || lower;
        Ok(Ladder { first_order_end, ..Ladder::new(Self::over(&grid[skip..]), cfg.output) })
    }

    fn walk<L: Latent>(mut x: L, ladder: &Ladder, model: &mut impl Model<L>) -> Result<L> {
        let lambda = |p: &Point| (p.alpha / p.sigma).ln();
        let mut before: Option<(L, f64)> = None;
        for (i, Step { at, from, to }) in ladder.steps.iter().enumerate() {
            let d = model.predict(&x, at)?.denoised;
            // e^-h, which is 0 on the way to sigma 0
            let decay = to.sigma / to.alpha * (from.alpha / from.sigma);
            let gain = to.alpha * (1.0 - decay);
            let first_order = to.sigma == 0.0 || (ladder.first_order_end && i + 1 == ladder.steps.len());
            let (w, older) = match &before {
                Some((older, at)) if !first_order => {
                    (0.5 * (lambda(to) - lambda(from)) / (lambda(from) - at), older)
                }
                _ => (0.0, &d),
            };
            x = L::mix(&[(to.sigma / from.sigma, &x), (gain * (1.0 + w), &d), (-gain * w, older)]);
            before = Some((d, lambda(from)));
        }
        Ok(x)
    }
}
