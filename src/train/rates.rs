//! How learning rate and average change from step to step.

use crate::error::{Error, Result};
use std::f64::consts::PI;

/// A learning rate over the steps 0, 1, …, as a factor of the base rate.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Schedule {
    /// 1 after a linear start over `warmup` steps; the step n of the start has n / warmup (diffusers `constant_with_warmup`).
    Constant {
        /// Steps of the start.
        warmup: usize,
    },
    /// A linear start, then half a cosine down to 0 at step `steps` (diffusers `cosine`).
    Cosine {
        /// Steps of the start.
        warmup: usize,
        /// Length of the run.
        steps: usize,
    },
    /// CompVis `LambdaLinearScheduler`, one cycle: from `start` linearly to `most` over `warmup` steps, then linearly to
    /// `least` at step `steps`.
    LambdaLinear {
        /// Steps of the start.
        warmup: usize,
        /// Length of the cycle.
        steps: usize,
        /// Factor of step 0.
        start: f64,
        /// Factor at the end of the start.
        most: f64,
        /// Factor at the end of the cycle.
        least: f64,
    },
    /// CompVis `LambdaWarmUpCosineScheduler`: as [`Schedule::LambdaLinear`], but half a cosine down.
    WarmUpCosine {
        /// Steps of the start.
        warmup: usize,
        /// Length of the decline, start included.
        steps: usize,
        /// Factor of step 0.
        start: f64,
        /// Factor at the end of the start.
        most: f64,
        /// Factor at the end.
        least: f64,
    },
}

impl Schedule {
    /// Refuses a start that is longer than the run.
    ///
    /// # Errors
    /// [`Error::Invalid`] with both.
    pub fn check(&self) -> Result<()> {
        let (warmup, steps) = match *self {
            Schedule::Constant { .. } => return Ok(()),
            Schedule::Cosine { warmup, steps }
            | Schedule::LambdaLinear { warmup, steps, .. }
            | Schedule::WarmUpCosine { warmup, steps, .. } => (warmup, steps),
        };
        if warmup < steps {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "learning rate: want a warm-up shorter than the run, {steps} steps; got {warmup}"
        )))
    }

    /// The factor of step n = 0, 1, ….
    pub fn factor(&self, n: usize) -> f64 {
        let share = |from: usize, to: usize| (n as f64 - from as f64) / (to as f64 - from as f64).max(1.0);
        match *self {
            Schedule::Constant { warmup } | Schedule::Cosine { warmup, .. } if n < warmup => share(0, warmup),
            Schedule::Constant { .. } => 1.0,
            Schedule::Cosine { warmup, steps } => (0.5 * (1.0 + (PI * share(warmup, steps)).cos())).max(0.0),
            Schedule::LambdaLinear { warmup, start, most, .. }
            | Schedule::WarmUpCosine { warmup, start, most, .. }
                if n < warmup =>
            {
                (most - start) / warmup as f64 * n as f64 + start
            }
            Schedule::LambdaLinear { steps, most, least, .. } => {
                least + (most - least) * (steps as f64 - n as f64).max(0.0) / steps as f64
            }
            Schedule::WarmUpCosine { warmup, steps, most, least, .. } => {
                least + 0.5 * (most - least) * (1.0 + (PI * share(warmup, steps).min(1.0)).cos())
            }
        }
    }
}

/// What the average of the weights keeps of itself at update n = 1, 2, …: min(decay, (1 + n) / (10 + n)), as CompVis
/// `LitEma`, so that a young average forgets the first weights.
pub fn average_decay(decay: f64, n: usize) -> f64 {
    decay.min((1.0 + n as f64) / (10.0 + n as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_points() {
        let near =
            |s: Schedule, n: usize, want: f64| assert!((s.factor(n) - want).abs() < 1e-12, "{s:?} {n}");
        near(Schedule::Constant { warmup: 10 }, 5, 0.5);
        near(Schedule::Constant { warmup: 10 }, 10, 1.0);
        near(Schedule::Cosine { warmup: 10, steps: 110 }, 60, 0.5);
        near(Schedule::Cosine { warmup: 10, steps: 110 }, 110, 0.0);
        let linear = Schedule::LambdaLinear { warmup: 10, steps: 100, start: 1e-6, most: 1.0, least: 0.1 };
        near(linear, 0, 1e-6);
        near(linear, 10, 0.1 + 0.9 * 0.9);
        near(linear, 100, 0.1);
        let cosine = Schedule::WarmUpCosine { warmup: 10, steps: 110, start: 0.0, most: 1.0, least: 0.2 };
        near(cosine, 5, 0.5);
        near(cosine, 60, 0.6);
        near(cosine, 500, 0.2);
        assert_eq!(average_decay(0.9999, 1), 2.0 / 11.0);
        assert_eq!(average_decay(0.9999, 1_000_000), 0.9999);
        assert!(Schedule::Cosine { warmup: 10, steps: 10 }.check().is_err());
    }
}
