//! Noise schedules and ladders: from training betas to the points at which a sampler evaluates the model.
//!
//! Numbers follow diffusers 0.37.1 to the last bit of float32 where it computes in float32: betas, their
//! running product, the sigmas of a ladder. Everything that a sampler derives from them is f64.

use super::config::{BetaSchedule, FinalSigmas, Output, ScheduleConfig, Spacing};
use crate::error::{Error, Result};

/// One noise level, in the sampler's own space: its state is `x = alpha * x0 + sigma * eps`.
///
/// `scale_in * x` is what the network sees; it has unit variance for data of unit variance, so
/// `(scale_in * alpha)^2 + (scale_in * sigma)^2 = 1`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Point {
    /// Training timestep, whole or not, as the network's time embedding takes it.
    pub timestep: f64,
    /// Weight of the clean latent.
    pub alpha: f64,
    /// Weight of the unit noise.
    pub sigma: f64,
    /// Factor between the state and the network's input.
    pub scale_in: f64,
}

/// How a network's raw output m becomes a clean latent and a noise, both linear in the state x:
/// `denoised = dx * x + dm * m`, `noise = nx * x + nm * m`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Conversion {
    /// Weight of the state in the clean latent.
    pub dx: f64,
    /// Weight of the output in the clean latent.
    pub dm: f64,
    /// Weight of the state in the noise.
    pub nx: f64,
    /// Weight of the output in the noise.
    pub nm: f64,
}

impl Point {
    /// A variance-preserving point (DDPM, DDIM): alpha^2 is `alpha_bar`, sigma^2 the rest.
    pub fn preserving(timestep: f64, alpha_bar: f64) -> Point {
        Point { timestep, alpha: alpha_bar.sqrt(), sigma: (1.0 - alpha_bar).sqrt(), scale_in: 1.0 }
    }

    /// The variance-preserving point whose ratio of noise to signal is `sigma`.
    pub fn preserving_ratio(timestep: f64, sigma: f64) -> Point {
        let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
        Point { timestep, alpha, sigma: sigma * alpha, scale_in: 1.0 }
    }

    /// A variance-exploding point (Karras et al. 2022): noise of standard deviation `sigma` on the latent
    /// itself.
    pub fn exploding(timestep: f64, sigma: f64) -> Point {
        Point { timestep, alpha: 1.0, sigma, scale_in: 1.0 / (sigma * sigma + 1.0).sqrt() }
    }

    /// The conversion of a raw output at this point.
    ///
    /// Fails where the output says nothing about the clean latent: noise predicted at alpha = 0.
    pub fn conversion(&self, output: Output) -> Result<Conversion> {
        let Point { alpha, sigma, scale_in, .. } = *self;
        let c = match output {
            Output::Epsilon if alpha == 0.0 => {
                return Err(Error::invalid(format!(
                    "sampler: timestep {}: the schedule ends in pure noise (rescale_betas_zero_snr), where a \
                     network that predicts noise knows nothing of the picture; this needs prediction_type \
                     v_prediction or sample",
                    self.timestep
                )));
            }
            Output::Epsilon => Conversion { dx: 1.0 / alpha, dm: -sigma / alpha, nx: 0.0, nm: 1.0 },
            Output::Sample => Conversion { dx: 0.0, dm: 1.0, nx: 1.0 / sigma, nm: -alpha / sigma },
            // v = a eps - s x0 with a^2 + s^2 = 1 is defined on the network's input, a x0 + s eps.
            Output::V => {
                let (a, s) = (scale_in * alpha, scale_in * sigma);
                Conversion { dx: a * scale_in, dm: -s, nx: s * scale_in, nm: a }
            }
        };
        Ok(c)
    }
}

/// One evaluation of the model and the update that follows it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Step {
    /// Where the model is evaluated.
    pub at: Point,
    /// Where the update starts: `at`, except where a sampler does a step over again.
    pub from: Point,
    /// Where the update leads.
    pub to: Point,
}

/// A sampler's whole way: one step per evaluation, and what else it needs to know.
#[derive(Clone, PartialEq, Debug)]
pub struct Ladder {
    /// One per evaluation, in order.
    pub steps: Vec<Step>,
    /// Standard deviation of the state that pure noise starts from: `x = noise_scale * unit noise`.
    pub noise_scale: f64,
    /// Bound of the denoised latent, where the sampler clips it.
    pub clip: Option<f64>,
    /// What the network's output means.
    pub output: Output,
    /// DDIM's share of fresh noise: 0 none, 1 as much as DDPM.
    pub eta: f64,
    /// The last update is of first order whatever the sampler's own order.
    pub first_order_end: bool,
}

impl Ladder {
    /// A ladder over the given steps, without clipping or fresh noise, that starts from unit noise.
    pub fn new(steps: Vec<Step>, output: Output) -> Ladder {
        Ladder { steps, noise_scale: 1.0, clip: None, output, eta: 0.0, first_order_end: false }
    }
}

/// Steps along a grid of levels, each evaluated where it starts.
pub fn windows(grid: &[Point]) -> Vec<Step> {
    grid.windows(2).map(|w| Step { at: w[0], from: w[0], to: w[1] }).collect()
}

impl ScheduleConfig {
    /// Betas in float32, one per training timestep (`torch.linspace`, squared where `scaled_linear` says so).
    pub fn train_betas(&self) -> Result<Vec<f32>> {
        let n = self.train_steps;
        let betas = match (&self.trained_betas, self.betas) {
            (Some(betas), _) => betas.clone(),
            (None, BetaSchedule::Linear) => linspace_f32(self.beta_start, self.beta_end, n),
            (None, BetaSchedule::ScaledLinear) => {
                linspace_f32(self.beta_start.sqrt(), self.beta_end.sqrt(), n).iter().map(|b| b * b).collect()
            }
            (None, BetaSchedule::SquaredCos) => {
                let bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2);
                let at = |i: usize| bar(i as f64 / n as f64);
                (0..n).map(|i| (1.0 - at(i + 1) / at(i)).min(0.999) as f32).collect()
            }
        };
        if betas.len() != n || betas.is_empty() {
            return Err(Error::invalid(format!(
                "scheduler: want a beta for each of num_train_timesteps = {n} timesteps, at least one; got {}",
                betas.len()
            )));
        }
        if let Some(t) = betas.iter().position(|b| !(*b > 0.0 && *b < 1.0)) {
            return Err(Error::invalid(format!(
                "scheduler: want betas between 0 and 1; got {} at timestep {t} (beta_start {}, beta_end {})",
                betas[t], self.beta_start, self.beta_end
            )));
        }
        Ok(if self.rescale_zero_snr { rescale_to_zero_snr(&betas) } else { betas })
    }

    /// [`ScheduleConfig::train_betas`] in float64, as the original code has them (CompVis, `make_beta_schedule`); those of cosine,
    /// those that are given one by one, and rescaled ones are float32 here too.
    pub(crate) fn train_betas_f64(&self) -> Result<Vec<f64>> {
        let rounded = self.train_betas()?;
        let (n, start, end) = (self.train_steps, self.beta_start, self.beta_end);
        let exact = self.trained_betas.is_none() && !self.rescale_zero_snr;
        Ok(match self.betas {
            BetaSchedule::Linear if exact => linspace(start, end, n),
            BetaSchedule::ScaledLinear if exact => {
                linspace(start.sqrt(), end.sqrt(), n).into_iter().map(|b| b * b).collect()
            }
            _ => rounded.into_iter().map(f64::from).collect(),
        })
    }

    /// The running product of 1 - beta in float32, one per training timestep; strictly falling, and zero at
    /// the end where `rescale_zero_snr` asks for that. torch keeps the product in float64 and rounds each
    /// entry.
    pub fn alphas_cumprod(&self) -> Result<Vec<f32>> {
        Ok(running_product(&self.train_betas()?))
    }

    /// `alphas_cumprod` with an end that a ratio of noise to signal can be taken of.
    pub(super) fn alphas_cumprod_positive(&self) -> Result<Vec<f32>> {
        let mut bars = self.alphas_cumprod()?;
        if let (true, Some(last)) = (self.rescale_zero_snr, bars.last_mut()) {
            *last = 2f32.powi(-24); // diffusers' choice: the smallest subnormal of float16
        }
        Ok(bars)
    }

    /// `n` timesteps in falling order: the upper `n` of `divisions` marks over `0..last`.
    ///
    /// Linspace marks come unrounded. With trailing spacing diffusers sometimes appends a timestep -1
    /// (61 of 1000, for one) because its float range overshoots; here there are always `n`.
    pub(super) fn timesteps(&self, spacing: Spacing, last: usize, divisions: usize, n: usize) -> Vec<f64> {
        let offset = self.steps_offset.unwrap_or(0) as f64;
        match spacing {
            Spacing::Linspace => {
                let marks = linspace(0.0, last as f64 - 1.0, divisions);
                marks.into_iter().rev().take(n).collect()
            }
            Spacing::Leading => {
                let stride = last / divisions;
                (divisions - n..divisions).rev().map(|i| (i * stride) as f64 + offset).collect()
            }
            Spacing::Trailing => {
                let last = last as f64;
                let stride = (last - self.train_steps as f64 / n as f64) - last;
                (0..n).map(|i| (last + i as f64 * stride).round_ties_even() - 1.0).collect()
            }
        }
    }

    /// Whole steps, at least one and no more than there are training timesteps.
    pub(super) fn check_steps(&self, name: &str, steps: usize, skip: usize) -> Result<()> {
        if steps == 0 || steps > self.train_steps {
            return Err(Error::invalid(format!("{name}: want 1 to {} steps; got {steps}", self.train_steps)));
        }
        if skip >= steps {
            return Err(Error::invalid(format!(
                "{name}: want at least one step to run; got {steps} steps of which the first {skip} are \
                 skipped (raise the strength or the steps)"
            )));
        }
        Ok(())
    }

    /// A ladder of sigmas is nothing that this sampler has.
    pub(super) fn refuse_sigma_options(&self, name: &str) -> Result<()> {
        if self.karras {
            return Err(Error::invalid(format!(
                "{name}: has no Karras ladder; use euler or dpm++2m, or the scheduler `discrete`"
            )));
        }
        Ok(())
    }

    /// Sigma after the last step.
    pub(super) fn final_sigma(&self, bars: &[f32]) -> f64 {
        match self.final_sigmas.unwrap_or(FinalSigmas::Zero) {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin => ratio(bars[0]) as f64,
        }
    }
}

/// A table's entry at a whole timestep.
pub(super) fn level(name: &str, bars: &[f32], timestep: f64) -> Result<Point> {
    let bar = (timestep >= 0.0).then(|| bars.get(timestep as usize)).flatten();
    let bar = bar.ok_or_else(|| {
        Error::invalid(format!(
            "{name}: timestep {timestep} lies outside 0..{}: with this number of steps the spacing or \
             steps_offset leaves the schedule; use other steps or timestep_spacing trailing",
            bars.len()
        ))
    })?;
    Ok(Point::preserving(timestep, *bar as f64))
}

/// sqrt((1 - abar) / abar), in float32 throughout.
pub(super) fn ratio(bar: f32) -> f32 {
    ((1.0 - bar) / bar).sqrt()
}

/// The value of `table` at a fractional index, as `numpy.interp`: linear, clamped at the ends.
pub(super) fn interpolate(table: &[f32], at: f64) -> f64 {
    let low = at.floor().clamp(0.0, table.len() as f64 - 1.0) as usize;
    let (a, b) = (table[low] as f64, table[(low + 1).min(table.len() - 1)] as f64);
    (b - a) * (at - low as f64).clamp(0.0, 1.0) + a
}

/// `n` sigmas from `high` to `low`, evenly spaced in sigma^(1/7) (Karras et al. 2022, equation 5).
pub(super) fn karras(high: f64, low: f64, n: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (high, low) = (high.powf(1.0 / RHO), low.powf(1.0 / RHO));
    linspace(0.0, 1.0, n).into_iter().map(|r| (high + r * (low - high)).powf(RHO)).collect()
}

/// The fractional timestep at which the training schedule, given as ln sigma, has this sigma.
pub(super) fn timestep_of(sigma: f64, log_sigmas: &[f32]) -> f64 {
    let want = sigma.max(1e-10).ln();
    let below = log_sigmas.partition_point(|&l| l as f64 <= want);
    let i = below.saturating_sub(1).min(log_sigmas.len().saturating_sub(2));
    let (low, high) = (log_sigmas[i], log_sigmas[(i + 1).min(log_sigmas.len() - 1)]);
    let w = ((low as f64 - want) / (low - high) as f64).clamp(0.0, 1.0);
    (1.0 - w) * i as f64 + w * (i + 1) as f64
}

/// ln sigma of every training timestep, rounded to float32 as numpy's.
pub(super) fn log_sigmas(sigmas: &[f32]) -> Vec<f32> {
    sigmas.iter().map(|s| (*s as f64).ln() as f32).collect()
}

fn linspace(start: f64, end: f64, n: usize) -> Vec<f64> {
    let step = if n > 1 { (end - start) / (n - 1) as f64 } else { 0.0 };
    (0..n).map(|i| if i > 0 && i == n - 1 { end } else { i as f64 * step + start }).collect()
}

/// `torch.linspace` in float32: from both ends to the middle, each value with one rounding.
fn linspace_f32(start: f64, end: f64, n: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (n.max(2) - 1) as f32;
    let value = |i: usize| match i < n / 2 || n == 1 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((n - i - 1) as f32, end),
    };
    (0..n).map(value).collect()
}

fn running_product(betas: &[f32]) -> Vec<f32> {
    let mut product = 1f64;
    let mut next = |b: &f32| {
        product *= (1.0 - b) as f64;
        product as f32
    };
    betas.iter().map(&mut next).collect()
}

/// Betas shifted and scaled so that nothing of the picture is left at the last timestep (Lin et al. 2023,
/// algorithm 1).
fn rescale_to_zero_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = running_product(betas).iter().map(|b| b.sqrt()).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let factor = first / (first - last);
    let bars: Vec<f32> = roots.iter().map(|r| (r - last) * factor).map(|r| r * r).collect();
    let alpha = |i: usize| if i == 0 { bars[0] } else { bars[i] / bars[i - 1] };
    (0..bars.len()).map(|i| 1.0 - alpha(i)).collect()
}
