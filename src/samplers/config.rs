//! A model's noise schedule as its files and the user state it (diffusers' `scheduler_config.json`).

use super::distance;
use crate::error::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The keys of a `scheduler_config.json` that [`ScheduleConfig::from_json`] reads.
const KEYS: &[&str] = &[
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "clip_sample",
    "clip_sample_range",
    "use_karras_sigmas",
    "rescale_betas_zero_snr",
    "final_sigmas_type",
    "lower_order_final",
    "euler_at_final",
    "lambda_min_clipped",
    "skip_prk_steps",
];

/// How the betas run over the training timesteps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BetaSchedule {
    /// Evenly spaced.
    Linear,
    /// Square roots evenly spaced: latent diffusion's own, called "linear" in CompVis' files.
    ScaledLinear,
    /// From the squared cosine of Nichol and Dhariwal 2021, each at most 0.999.
    SquaredCos,
}

/// What the network's output means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    /// The noise.
    Epsilon,
    /// v = alpha * noise - sigma * clean latent (Salimans and Ho 2022).
    V,
    /// The clean latent itself.
    Sample,
}

/// How a few timesteps are picked from all (Lin et al. 2023, table 2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spacing {
    /// Multiples of the stride from 0 up, plus `steps_offset`.
    Leading,
    /// Multiples of the stride from the end down.
    Trailing,
    /// Evenly from the first to the last.
    Linspace,
}

/// Where a ladder of sigmas ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FinalSigmas {
    /// At no noise at all.
    Zero,
    /// At the sigma of training timestep 0.
    SigmaMin,
}

/// A model's schedule and the user's wishes. `None` stands for the default of the sampler that is chosen,
/// which differ as diffusers' scheduler classes differ.
#[derive(Clone, PartialEq, Debug)]
pub struct ScheduleConfig {
    /// Timesteps that the network was trained on.
    pub train_steps: usize,
    /// First beta.
    pub beta_start: f64,
    /// Last beta.
    pub beta_end: f64,
    /// How betas run between the two.
    pub betas: BetaSchedule,
    /// Betas given one by one; the three fields above are then unused.
    pub trained_betas: Option<Vec<f32>>,
    /// What the network's output means.
    pub output: Output,
    /// How timesteps are picked. Default: leading (DDIM, PLMS), linspace (Euler, DPM++).
    pub spacing: Option<Spacing>,
    /// Added to leading timesteps. Default 0; Stable Diffusion 1.x has 1.
    pub steps_offset: Option<i64>,
    /// DDIM, PLMS: the level after the last step is the clean latent, not that of timestep 0. Default: yes
    /// for DDIM, no for PLMS.
    pub set_alpha_to_one: Option<bool>,
    /// DDIM: the denoised latent is clipped. Default yes: files of latent models say no.
    pub clip_sample: Option<bool>,
    /// Bound of the clipped latent. Default 1.
    pub clip_range: Option<f64>,
    /// Euler, DPM++: sigmas after Karras et al. 2022.
    pub karras: bool,
    /// Betas rescaled so that the last timestep is pure noise.
    pub rescale_zero_snr: bool,
    /// Euler, DPM++: where the ladder ends. Default zero.
    pub final_sigmas: Option<FinalSigmas>,
    /// DPM++: first order in the last of fewer than 15 steps. Default yes.
    pub lower_order_final: Option<bool>,
    /// DPM++: first order in the last step always.
    pub euler_at_final: bool,
    /// DPM++: the schedule is used only where ln(alpha/sigma) is at least this.
    pub lambda_min: Option<f64>,
    /// PLMS: the first steps are done without Runge-Kutta. Default yes; no is not implemented.
    pub skip_prk: Option<bool>,
    /// DDIM: share of fresh noise, 0 to 1.
    pub eta: f64,
    /// The file and all that it says, for samplers that must refuse a part of it.
    pub source: Option<(PathBuf, Value)>,
}

impl Default for ScheduleConfig {
    /// Stable Diffusion 1.x's betas and nothing else said.
    fn default() -> ScheduleConfig {
        ScheduleConfig {
            train_steps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            betas: BetaSchedule::ScaledLinear,
            trained_betas: None,
            output: Output::Epsilon,
            spacing: None,
            steps_offset: None,
            set_alpha_to_one: None,
            clip_sample: None,
            clip_range: None,
            karras: false,
            rescale_zero_snr: false,
            final_sigmas: None,
            lower_order_final: None,
            euler_at_final: false,
            lambda_min: None,
            skip_prk: None,
            eta: 0.0,
            source: None,
        }
    }
}

impl ScheduleConfig {
    /// Reads the text of a `scheduler_config.json`; `file` is named in errors. See
    /// [`ScheduleConfig::from_json`].
    ///
    /// diffusers writes an infinite `lambda_min_clipped` as a bare `-Infinity`, which is not JSON; it is
    /// taken here.
    pub fn from_text(text: &str, file: &Path) -> Result<ScheduleConfig> {
        let json = serde_json::from_str(&quote_infinities(text))
            .map_err(|e| Error::file(file, format!("want a scheduler configuration in JSON; {e}")))?;
        ScheduleConfig::from_json(&json, file)
    }

    /// Reads diffusers' `scheduler_config.json`; `file` is named in errors.
    ///
    /// A key that is missing or `null` leaves its field `None` (or diffusers' common default), whatever class
    /// the file was written by: as with diffusers' `from_config`, the sampler that is chosen supplies the
    /// default. Keys that no implemented sampler reads are ignored, unless one is a misspelling of a key that is
    /// read: its value would otherwise be lost in silence.
    pub fn from_json(json: &Value, file: &Path) -> Result<ScheduleConfig> {
        let read = Reader { json, file };
        let Some(object) = json.as_object() else {
            return Err(Error::file(file, format!("want a JSON object {{…}}; got {json}")));
        };
        for key in object.keys().filter(|k| !KEYS.contains(&k.as_str())) {
            if let Some(near) = KEYS.iter().find(|known| distance(known, key) == 1) {
                let want = format!("a key that the engine knows; did the writer mean `{near}`?");
                return Err(read.wrong(key, &want, &object[key]));
            }
        }
        let betas = [
            ("linear", BetaSchedule::Linear),
            ("scaled_linear", BetaSchedule::ScaledLinear),
            ("squaredcos_cap_v2", BetaSchedule::SquaredCos),
        ];
        let outputs = [("epsilon", Output::Epsilon), ("v_prediction", Output::V), ("sample", Output::Sample)];
        let spacings =
            [("leading", Spacing::Leading), ("trailing", Spacing::Trailing), ("linspace", Spacing::Linspace)];
        let finals = [("zero", FinalSigmas::Zero), ("sigma_min", FinalSigmas::SigmaMin)];
        let train_steps = read.read("num_train_timesteps", "a whole number from 1 to 1000000", |v| {
            v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=1_000_000).contains(n))
        })?;
        Ok(ScheduleConfig {
            train_steps: train_steps.unwrap_or(1000),
            beta_start: read.number("beta_start")?.unwrap_or(0.0001),
            beta_end: read.number("beta_end")?.unwrap_or(0.02),
            betas: read.word("beta_schedule", &betas)?.unwrap_or(BetaSchedule::Linear),
            trained_betas: read.numbers("trained_betas")?,
            output: read.word("prediction_type", &outputs)?.unwrap_or(Output::Epsilon),
            spacing: read.word("timestep_spacing", &spacings)?,
            steps_offset: read.integer("steps_offset")?,
            set_alpha_to_one: read.flag("set_alpha_to_one")?,
            clip_sample: read.flag("clip_sample")?,
            clip_range: read.number("clip_sample_range")?,
            karras: read.flag("use_karras_sigmas")?.unwrap_or(false),
            rescale_zero_snr: read.flag("rescale_betas_zero_snr")?.unwrap_or(false),
            final_sigmas: read.word("final_sigmas_type", &finals)?,
            lower_order_final: read.flag("lower_order_final")?,
            euler_at_final: read.flag("euler_at_final")?.unwrap_or(false),
            lambda_min: read.number_or_infinity("lambda_min_clipped")?,
            skip_prk: read.flag("skip_prk_steps")?,
            eta: 0.0,
            source: Some((file.into(), json.clone())),
        })
    }

    /// Fails if the file gives one of these keys another value than those listed. A key that is missing or
    /// `null` says nothing.
    pub(super) fn refuse(&self, reads: &[(&str, &[&str])]) -> Result<()> {
        let Some((file, json)) = &self.source else { return Ok(()) };
        for (key, known) in reads {
            let got = match json.get(key) {
                None | Some(Value::Null) => continue,
                Some(Value::String(word)) => word.clone(),
                Some(other) => other.to_string(),
            };
            if !known.contains(&got.as_str()) {
                let known = if known.is_empty() { "null".into() } else { known.join(", ") };
                let want = format!("{known} (nothing else is implemented; or choose another sampler)");
                return Err(Error::Config { file: file.clone(), key: (*key).into(), want, got });
            }
        }
        Ok(())
    }
}

/// Puts Python's bare `Infinity`, `-Infinity` and `NaN` between quotes; what stands between quotes stays.
fn quote_infinities(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let word = ["-Infinity", "Infinity", "NaN"].into_iter().find(|w| rest.starts_with(w));
        let taken = if let Some(word) = word {
            out.extend(["\"", word, "\""]);
            word.len()
        } else {
            let len = if c == '"' { quoted(rest) } else { c.len_utf8() };
            out.push_str(&rest[..len]);
            len
        };
        rest = &rest[taken..];
    }
    out
}

/// Length of the string literal that `text` starts with, or of all of it where that does not end.
fn quoted(text: &str) -> usize {
    let mut escaped = false;
    for (i, c) in text.char_indices().skip(1) {
        match c {
            '"' if !escaped => return i + 1,
            _ => escaped = c == '\\' && !escaped,
        }
    }
    text.len()
}

struct Reader<'a> {
    json: &'a Value,
    file: &'a Path,
}

impl Reader<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    fn wrong(&self, key: &str, want: &str, got: &Value) -> Error {
        Error::Config { file: self.file.into(), key: key.into(), want: want.into(), got: got.to_string() }
    }

    fn read<T>(&self, key: &str, want: &str, f: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        self.get(key).map(|v| f(v).ok_or_else(|| self.wrong(key, want, v))).transpose()
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    fn integer(&self, key: &str) -> Result<Option<i64>> {
        self.read(key, "a whole number", Value::as_i64)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    /// An infinite number is a word.
    fn number_or_infinity(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number or \"-Infinity\"", |v| match v.as_str() {
            Some(word) => word.to_ascii_lowercase().parse().ok().filter(|x: &f64| !x.is_nan()),
            None => v.as_f64(),
        })
    }

    fn numbers(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.read(key, "a list of numbers", |v| {
            v.as_array()?.iter().map(|x| x.as_f64().map(|x| x as f32)).collect()
        })
    }

    fn word<T: Copy>(&self, key: &str, words: &[(&str, T)]) -> Result<Option<T>> {
        let want: Vec<&str> = words.iter().map(|w| w.0).collect();
        self.read(key, &want.join(", "), |v| words.iter().find(|w| v.as_str() == Some(w.0)).map(|w| w.1))
    }
}
