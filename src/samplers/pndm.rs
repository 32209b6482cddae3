//! PLMS, the pseudo linear multistep method (Liu et al. 2022, equations 9, 12); diffusers' `PNDMScheduler`
//! with `skip_prk_steps`, A1111's "PLMS".
//!
//! DDIM's update with an Adams-Bashforth mean of the last raw outputs. The first step is probed and done over
//! with the mean of its two ends, so S steps cost S + 1 evaluations.

use super::schedule::{Ladder, Point, Step, level, windows};
use super::{Latent, Model, Output, Reads, Sampler, ScheduleConfig, Spacing};
use crate::error::{Error, Result};

/// Second order: the outputs are extrapolated in time, and the update is not linear in time.
pub struct Pndm;

/// Adams-Bashforth weights, the newest output first, by how many outputs there are.
const WEIGHTS: [&[f64]; 4] = [
    &[1.0],
    &[3.0 / 2.0, -1.0 / 2.0],
    &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
    &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
];

impl Sampler for Pndm {
    const NAME: &'static str = "plms";
    const LABEL: &'static str = "PLMS";
    const CLASS: &'static str = "PNDMScheduler";
    const ALIASES: &'static [&'static str] = &["pndm"];
    const ORDER: u32 = 2;
    const READS: Reads = &[];

    fn point(timestep: f64, ratio: f64) -> Point {
        Point::preserving_ratio(timestep, ratio)
    }

    fn over(grid: &[Point]) -> Vec<Step> {
        let mut steps = windows(grid);
        if steps.len() > 1 {
            steps.insert(1, Step { at: grid[1], from: grid[0], to: grid[1] });
        }
        steps
    }

    fn ladder(cfg: &ScheduleConfig, steps: usize, skip: usize) -> Result<Ladder> {
        cfg.refuse_sigma_options(Self::NAME)?;
        let refused =
            |what: &str| Err(Error::invalid(format!("plms: {what}; use another sampler, such as ddim")));
        if cfg.skip_prk == Some(false) {
            return refused(
                "the scheduler's file says skip_prk_steps false, and Runge-Kutta steps are not implemented",
            );
        }
        if cfg.rescale_zero_snr {
            return refused("is not defined for a schedule rescaled to zero signal (rescale_betas_zero_snr)");
        }
        if cfg.output == Output::Sample {
            return refused("takes a network that predicts noise or v, and this one predicts the sample");
        }
        let bars = cfg.alphas_cumprod()?;
        let spacing = cfg.spacing.unwrap_or(Spacing::Leading);
        let stride = (cfg.train_steps / steps) as f64;
        let end = if cfg.set_alpha_to_one.unwrap_or(false) { 1.0 } else { bars[0] as f64 };
        let step = |t: f64| {
            let at = level(Self::NAME, &bars, t.round_ties_even())?;
            let next = at.timestep - stride;
            let to = if next < 0.0 { Point::preserving(next, end) } else { level(Self::NAME, &bars, next)? };
            Ok(Step { at, from: at, to })
        };
        let marks = cfg.timesteps(spacing, cfg.train_steps, steps, steps);
        let mut steps = marks.into_iter().skip(skip).map(step).collect::<Result<Vec<_>>>()?;
        if let Some(second) = steps.get(1).copied() {
            // Done over from one stride above the second mark: with leading spacing, that is the first.
            let from = level(Self::NAME, &bars, second.at.timestep + stride)?;
            steps.insert(1, Step { at: second.at, from, to: second.at });
        }
        Ok(Ladder::new(steps, cfg.output))
    }

    fn walk<L: Latent>(mut x: L, ladder: &Ladder, model: &mut impl Model<L>) -> Result<L> {
        let start = x.clone();
        let mut outputs: Vec<L> = Vec::new(); // newest first
        for (i, Step { at, from, to }) in ladder.steps.iter().enumerate() {
            let output = model.predict(&x, at)?.output;
            let mean = if i == 1 {
                x = start.clone();
                L::mix(&[(0.5, &output), (0.5, &outputs[0])])
            } else {
                outputs.insert(0, output);
                outputs.truncate(WEIGHTS.len());
                let weights = WEIGHTS[outputs.len() - 1];
                L::mix(&weights.iter().copied().zip(&outputs).collect::<Vec<_>>())
            };
            let c = from.conversion(ladder.output)?;
            let noise = L::mix(&[(c.nx, &x), (c.nm, &mean)]);
            let shrink = to.alpha / from.alpha;
            x = L::mix(&[(shrink, &x), (to.sigma - shrink * from.sigma, &noise)]);
        }
        Ok(x)
    }
}
