//! DDIM (Song, Meng, Ermon 2020, equations 12 and 16); diffusers' `DDIMScheduler`, A1111's "DDIM".
//!
//! x' = alpha' * denoised + sqrt(sigma'^2 - s^2) * noise + s * z,
//! s = eta * sigma'/sigma * sqrt(1 - alpha^2/alpha'^2), z fresh unit noise.

use super::schedule::{Ladder, Point, Step, level};
use super::{Latent, Model, Reads, Sampler, ScheduleConfig, Spacing};
use crate::error::{Error, Result};

/// First order, deterministic at eta = 0, ancestral at eta = 1.
pub struct Ddim;

impl Sampler for Ddim {
    const NAME: &'static str = "ddim";
    const LABEL: &'static str = "DDIM";
    const CLASS: &'static str = "DDIMScheduler";
    const ALIASES: &'static [&'static str] = &[];
    const ORDER: u32 = 1;
    const READS: Reads = &[("thresholding", &["false"])];

    fn point(timestep: f64, ratio: f64) -> Point {
        Point::preserving_ratio(timestep, ratio)
    }

    fn ladder(cfg: &ScheduleConfig, steps: usize, skip: usize) -> Result<Ladder> {
        cfg.refuse_sigma_options(Self::NAME)?;
        if !(0.0..=1.0).contains(&cfg.eta) {
            return Err(Error::invalid(format!("ddim: want eta from 0 to 1; got {}", cfg.eta)));
        }
        let bars = cfg.alphas_cumprod()?;
        let spacing = cfg.spacing.unwrap_or(Spacing::Leading);
        // A step leads one stride down whatever the spacing, also where the next evaluation lies elsewhere.
        let stride = (cfg.train_steps / steps) as f64;
        let end = if cfg.set_alpha_to_one.unwrap_or(true) { 1.0 } else { bars[0] as f64 };
        let step = |t: f64| {
            let at = level(Self::NAME, &bars, t.round_ties_even())?;
            let next = at.timestep - stride;
            let to = if next < 0.0 { Point::preserving(next, end) } else { level(Self::NAME, &bars, next)? };
            Ok(Step { at, from: at, to })
        };
        let marks = cfg.timesteps(spacing, cfg.train_steps, steps, steps);
        let steps = marks.into_iter().skip(skip).map(step).collect::<Result<_>>()?;
        let clip = cfg.clip_sample.unwrap_or(true).then(|| cfg.clip_range.unwrap_or(1.0));
        Ok(Ladder { clip, eta: cfg.eta, ..Ladder::new(steps, cfg.output) })
    }

    fn walk<L: Latent>(mut x: L, ladder: &Ladder, model: &mut impl Model<L>) -> Result<L> {
        for Step { at, from, to } in &ladder.steps {
            let p = model.predict(&x, at)?;
            let share = (1.0 - (from.alpha / to.alpha).powi(2)).max(0.0).sqrt();
            let fresh = ladder.eta * to.sigma / from.sigma * share;
            let kept = (to.sigma * to.sigma - fresh * fresh).max(0.0).sqrt();
            x = L::mix(&[(to.alpha, &p.denoised), (kept, &p.noise)]);
            if fresh > 0.0 {
                x = L::mix(&[(1.0, &x), (fresh, &model.noise()?)]);
            }
        }
        Ok(x)
    }
}
