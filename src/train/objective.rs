//! What a diffusion model is asked for at a timestep, and what a miss costs.

use crate::error::Result;
use crate::ops::Distance;
use crate::samplers::{Output, ScheduleConfig};

/// Loss and noise of diffusion training.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Objective {
    /// What the model predicts: the noise, the clean latent, or v (Salimans and Ho 2022).
    pub output: Output,
    /// Of a prediction.
    pub distance: Distance,
    /// γ of min-SNR-γ weights (Hang et al. 2023).
    pub snr_gamma: Option<f64>,
    /// Deviation of noise that is the same all over a channel of a picture (Guttenberg 2023).
    pub noise_offset: f64,
}

/// Signal and noise shares √ᾱ, √(1 − ᾱ) of every training timestep.
#[derive(Clone, PartialEq, Debug)]
pub struct Levels(Vec<[f64; 2]>);

impl Levels {
    /// Those of a schedule.
    ///
    /// # Errors
    /// When its betas are not between 0 and 1.
    pub fn new(schedule: &ScheduleConfig) -> Result<Levels> {
        let shares = |bar: f32| [f64::from(bar).sqrt(), (1.0 - f64::from(bar)).sqrt()];
        Ok(Levels(schedule.alphas_cumprod()?.into_iter().map(shares).collect()))
    }

    /// How many timesteps there are, at least one.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl Objective {
    /// A noisy latent and what the model should predict from it at a timestep.
    pub fn pair(&self, levels: &Levels, t: usize, z: &[f32], noise: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let [a, s] = levels.0[t].map(|v| v as f32);
        let mix =
            |f: &dyn Fn(f32, f32) -> f32| z.iter().zip(noise).map(|(z, n)| f(*z, *n)).collect::<Vec<_>>();
        let x = mix(&|z, n| a * z + s * n);
        let target = match self.output {
            Output::Epsilon => noise.to_vec(),
            Output::Sample => z.to_vec(),
            Output::V => mix(&|z, n| a * n - s * z),
        };
        (x, target)
    }

    /// The weight of a timestep: min(SNR, γ) of the clean latent's error, in terms of what is predicted.
    pub fn weight(&self, levels: &Levels, t: usize) -> f64 {
        let Some(gamma) = self.snr_gamma else { return 1.0 };
        let [a, s] = levels.0[t];
        let snr = (a / s).powi(2);
        match self.output {
            // With no signal at all min(SNR, γ) / SNR is 1.
            Output::Epsilon => (gamma / snr).min(1.0),
            Output::V => snr.min(gamma) / (snr + 1.0),
            Output::Sample => snr.min(gamma),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_and_weights() {
        let levels = Levels(vec![[0.8, 0.6]]);
        let of =
            |output| Objective { output, distance: Distance::L2, snr_gamma: Some(1.0), noise_offset: 0.0 };
        let pair = |output| of(output).pair(&levels, 0, &[1.0], &[2.0]);
        let near = |got: f32, want: f32| assert!((got - want).abs() < 1e-6, "{got}, want {want}");
        near(pair(Output::Epsilon).0[0], 2.0);
        near(pair(Output::Epsilon).1[0], 2.0);
        near(pair(Output::Sample).1[0], 1.0);
        near(pair(Output::V).1[0], 1.0);
        let snr = 16.0 / 9.0;
        let weight = |output| of(output).weight(&levels, 0) as f32;
        near(weight(Output::Epsilon), 1.0 / snr);
        near(weight(Output::V), 1.0 / (snr + 1.0));
        near(weight(Output::Sample), 1.0);
        let plain = Objective { snr_gamma: None, ..of(Output::V) };
        assert_eq!(plain.weight(&levels, 0), 1.0);
    }
}
