//! Heun's method on the noise-level ODE (Karras et al. 2022, algorithm 1 without churn); diffusers'
//! `HeunDiscreteScheduler`, A1111's "Heun".
//!
//! Each step looks at the noise at both of its ends and goes by their mean; the last one, into a clean latent, is
//! Euler's. Two evaluations per step, one for the last.

use super::euler::grid;
use super::schedule::{Ladder, Point, Step};
use super::{Latent, Model, Reads, Sampler, ScheduleConfig};
use crate::error::Result;

/// Second order, deterministic.
pub struct Heun;

impl Sampler for Heun {
    const NAME: &'static str = "heun";
    const LABEL: &'static str = "Heun";
    const CLASS: &'static str = "HeunDiscreteScheduler";
    const ALIASES: &'static [&'static str] = &["k_heun"];
    const ORDER: u32 = 2;
    const READS: Reads = &[("use_exponential_sigmas", &["false"]), ("use_beta_sigmas", &["false"])];

    fn point(timestep: f64, ratio: f64) -> Point {
        Point::exploding(timestep, ratio)
    }

    fn over(grid: &[Point]) -> Vec<Step> {
        let ends = grid.windows(2).map(|w| (w[0], w[1]));
        ends.flat_map(|(from, to)| {
            let corrected = (to.sigma > 0.0).then_some(Step { at: to, from, to });
            [Some(Step { at: from, from, to }), corrected]
        })
        .flatten()
        .collect()
    }

    fn ladder(cfg: &ScheduleConfig, steps: usize, skip: usize) -> Result<Ladder> {
        let (grid, noise_scale) = grid(cfg, steps)?;
        Ok(Ladder { noise_scale, ..Ladder::new(Self::over(&grid[skip..]), cfg.output) })
    }

    fn walk<L: Latent>(mut x: L, ladder: &Ladder, model: &mut impl Model<L>) -> Result<L> {
        let mut steps = ladder.steps.iter().peekable();
        while let Some(first) = steps.next() {
            let dt = first.to.sigma - first.from.sigma;
            let noise = model.predict(&x, &first.at)?.noise;
            let probe = L::mix(&[(1.0, &x), (dt, &noise)]);
            x = match steps.next_if(|s| s.from.sigma == first.from.sigma) {
                None => probe,
                Some(second) => {
                    let ahead = model.predict(&probe, &second.at)?.noise;
                    L::mix(&[(1.0, &x), (dt / 2.0, &noise), (dt / 2.0, &ahead)])
                }
            };
        }
        Ok(x)
    }
}
