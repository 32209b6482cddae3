//! `scheduler_config.json`: how the model was trained, and how its pictures are to be sampled.
//!
//! A user may sample with another class than the file names. diffusers (0.37.1) then takes every key that the file
//! has, and the *sampling* class's own default for every key that it lacks. So what the classes disagree about is kept
//! unset here, and is asked for with the class that samples: [`SchedulerConfig::timestep_spacing`] and its neighbours.

use super::config::Config;
use super::words::words;
use crate::error::Result;
use std::path::Path;

words! {
    /// The classes of diffusers whose files are understood.
    SchedulerClass {
        /// Denoising diffusion implicit models.
        Ddim = "DDIMScheduler",
        /// The ancestral sampler of denoising diffusion probabilistic models.
        Ddpm = "DDPMScheduler",
        /// Pseudo numerical methods; with `skip_prk_steps`, PLMS.
        Pndm = "PNDMScheduler",
        /// Euler's method over sigmas.
        Euler = "EulerDiscreteScheduler",
        /// Euler's method with fresh noise after each step.
        EulerAncestral = "EulerAncestralDiscreteScheduler",
        /// DPM-Solver and DPM-Solver++, multistep.
        DpmSolverMultistep = "DPMSolverMultistepScheduler",
        /// Linear multistep over sigmas.
        Lms = "LMSDiscreteScheduler",
        /// Heun's method over sigmas.
        Heun = "HeunDiscreteScheduler",
        /// UniPC, multistep.
        UniPc = "UniPCMultistepScheduler",
    }
}

words! {
    /// How beta grows over the training steps.
    BetaSchedule {
        /// Linear in beta.
        Linear = "linear",
        /// Linear in the root of beta: what CompVis calls linear.
        ScaledLinear = "scaled_linear",
        /// The cosine schedule of Nichol and Dhariwal.
        SquaredCosine = "squaredcos_cap_v2",
    }
}

words! {
    /// What the model's output is an estimate of.
    PredictionType {
        /// The noise.
        Epsilon = "epsilon",
        /// The velocity.
        Velocity = "v_prediction",
        /// The clean latent.
        Sample = "sample",
    }
}

words! {
    /// How sampling steps are spread over the training steps.
    TimestepSpacing {
        /// Multiples of a whole stride, from 0 (plus `steps_offset`).
        Leading = "leading",
        /// Counted down from the last training step.
        Trailing = "trailing",
        /// Evenly from the first to the last training step, both included.
        Linspace = "linspace",
    }
}

words! {
    /// The noise level after the last step.
    FinalSigmas {
        /// None.
        Zero = "zero",
        /// That of the first training step.
        SigmaMin = "sigma_min",
    }
}

words! {
    /// Which of the DPM-Solver family.
    AlgorithmType {
        /// DPM-Solver++: solves for the clean latent.
        DpmSolverPlusPlus = "dpmsolver++",
        /// DPM-Solver++ with fresh noise.
        SdeDpmSolverPlusPlus = "sde-dpmsolver++",
        /// DPM-Solver: solves for the noise.
        DpmSolver = "dpmsolver",
        /// DPM-Solver with fresh noise.
        SdeDpmSolver = "sde-dpmsolver",
    }
}

words! {
    /// The form of the second-order step: `midpoint` and `heun` of DPM-Solver, `bh1` and `bh2` of UniPC.
    SolverType {
        /// DPM-Solver, default.
        Midpoint = "midpoint",
        /// DPM-Solver.
        Heun = "heun",
        /// An old name that stands for the default of either class.
        LogRho = "logrho",
        /// UniPC.
        Bh1 = "bh1",
        /// UniPC, default.
        Bh2 = "bh2",
    }
}

words! {
    /// How Euler's sigmas are read off between training steps.
    InterpolationType {
        /// Linear in sigma.
        Linear = "linear",
        /// Linear in the logarithm of sigma.
        LogLinear = "log_linear",
    }
}

words! {
    /// What Euler tells the model about the noise level.
    TimestepType {
        /// The training step.
        Discrete = "discrete",
        /// A quarter of the logarithm of sigma.
        Continuous = "continuous",
    }
}

/// The contents of a `scheduler_config.json`. Fields that are `Option` without a method of the same name are really
/// optional.
#[derive(Clone, PartialEq, Debug)]
pub struct SchedulerConfig {
    /// The class that the file names.
    pub class: SchedulerClass,
    /// Number of training steps.
    pub num_train_timesteps: usize,
    /// First beta, if the file has one.
    pub beta_start: Option<f64>,
    /// Last beta, if the file has one.
    pub beta_end: Option<f64>,
    /// The way from the first to the last.
    pub beta_schedule: BetaSchedule,
    /// All betas, in place of the three above.
    pub trained_betas: Option<Vec<f64>>,
    /// What the model predicts.
    pub prediction_type: PredictionType,
    /// Spread of the sampling steps, if the file says.
    pub timestep_spacing: Option<TimestepSpacing>,
    /// Added to each step of the leading spacing.
    pub steps_offset: usize,
    /// Whether the step after the last has no noise at all, or that of training step 0; if the file says.
    pub set_alpha_to_one: Option<bool>,
    /// Whether the estimate of the clean latent is clipped; if the file says.
    pub clip_sample: Option<bool>,
    /// Clipped to plus and minus this.
    pub clip_sample_range: f64,
    /// Whether sigmas are spread as Karras et al. 2022 do.
    pub use_karras_sigmas: bool,
    /// Whether PNDM goes without its Runge-Kutta start.
    pub skip_prk_steps: bool,
    /// Whether betas are rescaled so that the last step is pure noise.
    pub rescale_betas_zero_snr: bool,
    /// The noise level after the last step.
    pub final_sigmas_type: FinalSigmas,
    /// Order of a multistep solver, 1 to 3.
    pub solver_order: usize,
    /// Form of the second-order step, if the file says.
    pub solver_type: Option<SolverType>,
    /// Which of the DPM-Solver family.
    pub algorithm_type: AlgorithmType,
    /// Whether the last steps of a short walk are of lower order.
    pub lower_order_final: bool,
    /// Whether the last step is Euler's.
    pub euler_at_final: bool,
    /// How Euler's sigmas are interpolated.
    pub interpolation_type: InterpolationType,
    /// What Euler tells the model.
    pub timestep_type: TimestepType,
    /// Least sigma of a Karras spread, in place of the schedule's own.
    pub sigma_min: Option<f64>,
    /// Greatest sigma of a Karras spread, in place of the schedule's own.
    pub sigma_max: Option<f64>,
}

/// Every key that the classes above write. Those that are read by no line below are without effect as long as the
/// switches that `unsupported` checks are off.
const KEYS: &[&str] = &[
    "algorithm_type",
    "beta_end",
    "beta_schedule",
    "beta_start",
    "clip_sample",
    "clip_sample_range",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "num_train_timesteps",
    "predict_x0",
    "prediction_type",
    "rescale_betas_zero_snr",
    "sample_max_value",
    "set_alpha_to_one",
    "shift_terminal",
    "sigma_max",
    "sigma_min",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "steps_offset",
    "tensor_format",
    "thresholding",
    "time_shift_type",
    "timestep_spacing",
    "timestep_type",
    "trained_betas",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_flow_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
];

impl SchedulerConfig {
    /// Reads a `scheduler_config.json`.
    ///
    /// # Errors
    /// As [`Config::read`] and [`SchedulerConfig::from_config`].
    pub fn read(path: impl AsRef<Path>) -> Result<SchedulerConfig> {
        SchedulerConfig::from_config(&Config::read(path)?)
    }

    /// Reads the keys of a configuration.
    ///
    /// # Errors
    /// [`crate::error::Error::Config`] for an unknown class, key or word, for a number out of its range, and for
    /// something that the engine does not have, such as `thresholding`.
    pub fn from_config(c: &Config) -> Result<SchedulerConfig> {
        let Some(class) = c.word("_class_name")? else {
            return Err(c.error("_class_name", "the class of the scheduler, such as DDIMScheduler"));
        };
        c.only(KEYS)?;
        unsupported(c)?;
        let s = SchedulerConfig {
            class,
            num_train_timesteps: c.usize_or("num_train_timesteps", 1000)?,
            beta_start: c.opt_f64("beta_start")?,
            beta_end: c.opt_f64("beta_end")?,
            beta_schedule: c.word("beta_schedule")?.unwrap_or(BetaSchedule::Linear),
            trained_betas: c.opt_f64_list("trained_betas")?,
            prediction_type: c.word("prediction_type")?.unwrap_or(PredictionType::Epsilon),
            timestep_spacing: c.word("timestep_spacing")?,
            steps_offset: c.usize_or("steps_offset", 0)?,
            set_alpha_to_one: c.opt_bool("set_alpha_to_one")?,
            clip_sample: c.opt_bool("clip_sample")?,
            clip_sample_range: c.f64_or("clip_sample_range", 1.0)?,
            use_karras_sigmas: c.bool_or("use_karras_sigmas", false)?,
            skip_prk_steps: c.bool_or("skip_prk_steps", false)?,
            rescale_betas_zero_snr: c.bool_or("rescale_betas_zero_snr", false)?,
            final_sigmas_type: c.word("final_sigmas_type")?.unwrap_or(FinalSigmas::Zero),
            solver_order: c.usize_or("solver_order", 2)?,
            solver_type: c.word("solver_type")?,
            algorithm_type: c.word("algorithm_type")?.unwrap_or(AlgorithmType::DpmSolverPlusPlus),
            lower_order_final: c.bool_or("lower_order_final", true)?,
            euler_at_final: c.bool_or("euler_at_final", false)?,
            interpolation_type: c.word("interpolation_type")?.unwrap_or(InterpolationType::Linear),
            timestep_type: c.word("timestep_type")?.unwrap_or(TimestepType::Discrete),
            sigma_min: c.opt_f64("sigma_min")?,
            sigma_max: c.opt_f64("sigma_max")?,
        };
        s.check(c)?;
        Ok(s)
    }

    /// Ranges, beyond which a schedule would be empty or not a number.
    fn check(&self, c: &Config) -> Result<()> {
        let is = |ok: bool, key: &str, want: &str| if ok { Ok(()) } else { Err(c.error(key, want)) };
        let beta = |b: f64| 0.0 < b && b < 1.0;
        // More would be a mistake, and would have a table of that length made.
        is((1..=1_000_000).contains(&self.num_train_timesteps), "num_train_timesteps", "1 to 1000000")?;
        is(self.beta_start.is_none_or(beta), "beta_start", "a number between 0 and 1")?;
        is(self.beta_end.is_none_or(beta), "beta_end", "a number between 0 and 1")?;
        is(self.beta_start(self.class) <= self.beta_end(self.class), "beta_end", "no less than beta_start")?;
        if let Some(all) = &self.trained_betas {
            let want = format!("{} numbers between 0 and 1", self.num_train_timesteps);
            let right = all.len() == self.num_train_timesteps && all.iter().all(|&b| 0.0 < b && b <= 1.0);
            is(right, "trained_betas", &want)?;
        }
        is(self.steps_offset < self.num_train_timesteps, "steps_offset", "less than num_train_timesteps")?;
        is(self.clip_sample_range > 0.0, "clip_sample_range", "a number above 0")?;
        is((1..=3).contains(&self.solver_order), "solver_order", "1, 2 or 3")?;
        is(self.sigma_min.is_none_or(|s| s >= 0.0), "sigma_min", "a number of at least 0")?;
        let least = self.sigma_min.unwrap_or(0.0);
        is(self.sigma_max.is_none_or(|s| s > least), "sigma_max", "a number above sigma_min")
    }

    /// First beta: the file's, or that of the class that samples.
    pub fn beta_start(&self, sampling: SchedulerClass) -> f64 {
        self.beta_start.unwrap_or(if sampling == SchedulerClass::Heun { 0.00085 } else { 0.0001 })
    }

    /// Last beta: the file's, or that of the class that samples.
    pub fn beta_end(&self, sampling: SchedulerClass) -> f64 {
        self.beta_end.unwrap_or(if sampling == SchedulerClass::Heun { 0.012 } else { 0.02 })
    }

    /// Spread of the sampling steps: the file's, or that of the class that samples.
    pub fn timestep_spacing(&self, sampling: SchedulerClass) -> TimestepSpacing {
        use SchedulerClass::{Ddim, Ddpm, Pndm};
        let leading = matches!(sampling, Ddim | Ddpm | Pndm);
        self.timestep_spacing.unwrap_or(if leading {
            TimestepSpacing::Leading
        } else {
            TimestepSpacing::Linspace
        })
    }

    /// Whether the step after the last has no noise at all: the file's word, or that of the class that samples. The
    /// sigma-space classes have no such key; for them it is without meaning.
    pub fn set_alpha_to_one(&self, sampling: SchedulerClass) -> bool {
        self.set_alpha_to_one.unwrap_or(sampling != SchedulerClass::Pndm)
    }

    /// Whether the clean latent is clipped: never by a class that has no such key, else the file's word, else the
    /// class's.
    pub fn clip_sample(&self, sampling: SchedulerClass) -> bool {
        match sampling {
            SchedulerClass::Ddim | SchedulerClass::Ddpm => self.clip_sample.unwrap_or(true),
            SchedulerClass::Heun => self.clip_sample.unwrap_or(false),
            _ => false,
        }
    }

    /// Form of the second-order step. Either class reads the other's words as its own default.
    pub fn solver_type(&self, sampling: SchedulerClass) -> SolverType {
        use SolverType::{Bh1, Bh2, Heun, Midpoint};
        match (sampling, self.solver_type) {
            (SchedulerClass::UniPc, Some(Bh1)) => Bh1,
            (SchedulerClass::UniPc, _) => Bh2,
            (_, Some(Heun)) => Heun,
            _ => Midpoint,
        }
    }
}

/// Switches of features that the engine does not have must be off.
fn unsupported(c: &Config) -> Result<()> {
    const SWITCHES: [&str; 6] = [
        "thresholding",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_flow_sigmas",
        "use_lu_lambdas",
    ];
    SWITCHES.iter().try_for_each(|key| c.neutral(key, &[false]))?;
    c.neutral("predict_x0", &[true])?;
    c.neutral("disable_corrector", &[serde_json::json!([])])?;
    c.neutral("lambda_min_clipped", &["-Infinity"])?;
    c.neutral("variance_type", &["fixed_small"])?;
    c.neutral::<bool>("solver_p", &[])?;
    c.neutral::<bool>("shift_terminal", &[])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(mut v: Value) -> Result<SchedulerConfig> {
        if v.get("_class_name").is_none() {
            v["_class_name"] = json!("DDIMScheduler");
        }
        SchedulerConfig::from_config(&Config::from_value("scheduler_config.json", v).unwrap())
    }

    fn refused(v: Value) -> String {
        read(v.clone()).err().unwrap_or_else(|| panic!("accepted {v}")).to_string()
    }

    #[test]
    fn stable_diffusion_1_is_read() {
        let s = read(json!({
            "_class_name": "PNDMScheduler", "_diffusers_version": "0.37.1", "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false,
            "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": false,
            "skip_prk_steps": true, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": null,
        }))
        .unwrap();
        assert_eq!((s.class, s.beta_schedule), (SchedulerClass::Pndm, BetaSchedule::ScaledLinear));
        assert_eq!((s.beta_start, s.beta_end, s.steps_offset), (Some(0.00085), Some(0.012), 1));
        assert!(s.skip_prk_steps && s.trained_betas.is_none() && !s.set_alpha_to_one(SchedulerClass::Ddim));
        assert_eq!(s.timestep_spacing(SchedulerClass::Euler), TimestepSpacing::Leading);
    }

    #[test]
    fn what_is_unset_comes_from_the_class_that_samples() {
        use SchedulerClass::*;
        let s = read(json!({})).unwrap();
        for class in [Ddim, Ddpm, Pndm] {
            assert_eq!(s.timestep_spacing(class), TimestepSpacing::Leading);
        }
        for class in [Euler, EulerAncestral, DpmSolverMultistep, Lms, Heun, UniPc] {
            assert_eq!(s.timestep_spacing(class), TimestepSpacing::Linspace);
            assert!(!s.clip_sample(class));
        }
        assert!(s.clip_sample(Ddim) && s.clip_sample(Ddpm) && !s.clip_sample(Pndm));
        assert!(s.set_alpha_to_one(Ddim) && !s.set_alpha_to_one(Pndm));
        assert_eq!((s.beta_start(Ddim), s.beta_end(Ddim)), (0.0001, 0.02));
        assert_eq!((s.beta_start(Heun), s.beta_end(Heun)), (0.00085, 0.012));
        assert_eq!(
            (s.solver_type(DpmSolverMultistep), s.solver_type(UniPc)),
            (SolverType::Midpoint, SolverType::Bh2)
        );
        assert!(s.lower_order_final && !s.euler_at_final && !s.skip_prk_steps && !s.use_karras_sigmas);
        assert_eq!((s.solver_order, s.final_sigmas_type, s.steps_offset), (2, FinalSigmas::Zero, 0));

        let s = read(json!({"solver_type": "heun", "clip_sample": true})).unwrap();
        assert_eq!(
            (s.solver_type(DpmSolverMultistep), s.solver_type(UniPc)),
            (SolverType::Heun, SolverType::Bh2)
        );
        assert!(s.clip_sample(Heun) && !s.clip_sample(Pndm));
        let s = read(json!({"solver_type": "bh1"})).unwrap();
        assert_eq!(
            (s.solver_type(DpmSolverMultistep), s.solver_type(UniPc)),
            (SolverType::Midpoint, SolverType::Bh1)
        );
    }

    #[test]
    fn what_the_engine_does_not_have_is_refused_by_name() {
        for (key, value, say) in [
            ("_class_name", json!("LCMScheduler"), "one of DDIMScheduler, "),
            ("_class_name", Value::Null, "the class of the scheduler"),
            ("thresholding", json!(true), "want false or null (the engine has nothing else here); got true"),
            ("use_beta_sigmas", json!(true), "want false or null"),
            ("predict_x0", json!(false), "want true or null"),
            ("disable_corrector", json!([0]), "want [] or null; got [0]".split(';').next().unwrap()),
            ("lambda_min_clipped", json!(-5.1), "\"-Infinity\""),
            ("variance_type", json!("learned_range"), "fixed_small"),
            ("solver_p", json!("x"), "want null"),
            ("beta_schedule", json!("exp"), "one of linear, scaled_linear, squaredcos_cap_v2; got \"exp\""),
            ("timestep_spacing", json!("lead"), "one of leading"),
            ("prediction_type", json!(1), "one of epsilon"),
            ("stepsoffset", json!(1), "did the writer mean `steps_offset`?"),
            ("num_train_timesteps", json!(0), "1 to 1000000"),
            ("num_train_timesteps", json!(4_000_000_000u64), "1 to 1000000"),
            ("beta_start", json!(0.0), "between 0 and 1"),
            ("beta_end", json!(1.5), "between 0 and 1"),
            ("beta_end", json!(0.00001), "no less than beta_start"),
            ("trained_betas", json!([0.1]), "1000 numbers"),
            ("steps_offset", json!(1000), "less than num_train_timesteps"),
            ("clip_sample_range", json!(-1), "above 0"),
            ("solver_order", json!(4), "1, 2 or 3"),
            ("sigma_min", json!(-1), "at least 0"),
            ("sigma_max", json!(0), "above sigma_min"),
        ] {
            let e = refused(json!({key: value}));
            assert!(
                e.starts_with(&format!("scheduler_config.json: `{key}`: want")) && e.contains(say),
                "{e}"
            );
        }
        read(json!({"num_train_timesteps": 2, "trained_betas": [0.1, 1.0], "sigma_max": 14.6})).unwrap();
    }
}
