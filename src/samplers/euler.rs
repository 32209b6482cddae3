//! Euler's method on the noise-level ODE (Karras et al. 2022, algorithm 1 without its correction); diffusers'
//! `EulerDiscreteScheduler`, A1111's "Euler".
//!
//! x' = x + (sigma' - sigma) * noise, where the state is the latent plus sigma times unit noise.

use super::schedule::{Ladder, Point, Step, interpolate, karras, log_sigmas, ratio, timestep_of};
use super::{Latent, Model, Reads, Sampler, ScheduleConfig, Spacing};
use crate::error::Result;

/// First order, deterministic.
pub struct Euler;

/// Noise levels from the highest to the end, in the space where the signal keeps its size, and the deviation that the
/// initial noise has there.
pub(super) fn grid(cfg: &ScheduleConfig, steps: usize) -> Result<(Vec<Point>, f64)> {
    let bars = cfg.alphas_cumprod_positive()?;
    let table: Vec<f32> = bars.iter().map(|b| ratio(*b)).collect();
    let spacing = cfg.spacing.unwrap_or(Spacing::Linspace);
    // Timesteps may be fractions here: float32, as the network gets them.
    let mut marks = cfg.timesteps(spacing, cfg.train_steps, steps, steps);
    marks.iter_mut().for_each(|t| *t = *t as f32 as f64);
    let mut sigmas: Vec<f64> = marks.iter().map(|t| interpolate(&table, *t)).collect();
    if cfg.karras {
        sigmas = karras(sigmas[0], sigmas[steps - 1], steps);
        let logs = log_sigmas(&table);
        marks = sigmas.iter().map(|s| timestep_of(*s, &logs) as f32 as f64).collect();
    }
    sigmas.push(cfg.final_sigma(&bars));
    marks.push(0.0);
    let levels = marks.iter().zip(&sigmas).map(|(t, s)| Point::exploding(*t, *s as f32 as f64));
    let grid: Vec<Point> = levels.collect();
    let top = grid[0].sigma;
    Ok((grid, if spacing == Spacing::Leading { (top * top + 1.0).sqrt() } else { top }))
}

impl Sampler for Euler {
    const NAME: &'static str = "euler";
    const LABEL: &'static str = "Euler";
    const CLASS: &'static str = "EulerDiscreteScheduler";
    const ALIASES: &'static [&'static str] = &["k_euler"];
    const ORDER: u32 = 1;
    const READS: Reads = &[
        ("interpolation_type", &["linear"]),
        ("timestep_type", &["discrete"]),
        ("use_exponential_sigmas", &["false"]),
        ("use_beta_sigmas", &["false"]),
        ("sigma_min", &[]),
        ("sigma_max", &[]),
    ];

    fn point(timestep: f64, ratio: f64) -> Point {
        Point::exploding(timestep, ratio)
    }

    fn ladder(cfg: &ScheduleConfig, steps: usize, skip: usize) -> Result<Ladder> {
        let (grid, noise_scale) = grid(cfg, steps)?;
        Ok(Ladder { noise_scale, ..Ladder::new(Self::over(&grid[skip..]), cfg.output) })
    }

    fn walk<L: Latent>(mut x: L, ladder: &Ladder, model: &mut impl Model<L>) -> Result<L> {
        for Step { at, from, to } in &ladder.steps {
            let p = model.predict(&x, at)?;
            x = L::mix(&[(1.0, &x), (to.sigma - from.sigma, &p.noise)]);
        }
        Ok(x)
    }
}
