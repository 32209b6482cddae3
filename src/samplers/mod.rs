//! Samplers: how a latent goes from noise to picture, written once for every device.
//!
//! A sampler may do one thing to a latent: mix ([`Latent`]). It asks a [`Model`] for a [`Prediction`] at each
//! [`Point`] of its [`Ladder`]. Run over a recording latent it becomes a [`Table`] that a device executes,
//! one row per evaluation; run over `f64` it is compared with closed forms.
//!
//! Adding a sampler: one file with an `impl Sampler`, one line in the list below.

mod config;
#[cfg(test)]
mod golden;
pub mod record;
pub mod schedule;
#[cfg(test)]
mod tests;

use crate::error::{Error, Result};
pub use config::{BetaSchedule, FinalSigmas, Output, ScheduleConfig, Spacing};
pub use record::{Row, Table};
pub use schedule::{Ladder, Point, Step};
use std::{fmt, str::FromStr};

/// A latent, or anything else that can be mixed linearly.
pub trait Latent: Clone {
    /// The sum of weight times latent; at least one term, all of one shape.
    fn mix(terms: &[(f64, &Self)]) -> Self;
}

impl Latent for f64 {
    fn mix(terms: &[(f64, &f64)]) -> f64 {
        terms.iter().map(|(w, x)| w * **x).sum()
    }
}

/// One evaluation's answer.
#[derive(Clone, Debug)]
pub struct Prediction<L> {
    /// The clean latent, clipped where the ladder says so.
    pub denoised: L,
    /// The unit noise that the raw output implies, without clipping.
    pub noise: L,
    /// The raw output.
    pub output: L,
}

/// The network, with guidance, as a sampler sees it.
pub trait Model<L: Latent> {
    /// Evaluates at the state `x`; the network itself sees `at.scale_in * x` at `at.timestep`.
    fn predict(&mut self, x: &L, at: &Point) -> Result<Prediction<L>>;
    /// Fresh unit normal noise, the next in order.
    fn noise(&mut self) -> Result<L>;
}

/// Settings of a file with the values that a sampler can honour.
pub type Reads = &'static [(&'static str, &'static [&'static str])];

/// One sampler: names, schedule, and the way itself.
pub trait Sampler {
    /// Name in flags, as stable-diffusion.cpp has it where it has one.
    const NAME: &'static str;
    /// Name in A1111's picture parameters.
    const LABEL: &'static str;
    /// Name of diffusers' class.
    const CLASS: &'static str;
    /// Further names. Case, spaces, `-` and `_` do not count, and `++` is `pp`; the file's stem is known
    /// anyway.
    const ALIASES: &'static [&'static str];
    /// Order of convergence in the number of steps, for a smooth deterministic problem.
    const ORDER: u32;
    /// Settings that diffusers' class reads from its file and that are implemented only in part: key, known
    /// values.
    const READS: Reads;

    /// The level at which noise is `ratio` times the signal, in this sampler's space.
    fn point(timestep: f64, ratio: f64) -> Point;

    /// The steps along a grid of levels, the last of which is where the way ends.
    fn over(grid: &[Point]) -> Vec<Step> {
        schedule::windows(grid)
    }

    /// The ladder of `steps` steps of which the first `skip` are left out. `skip < steps`, both checked.
    fn ladder(cfg: &ScheduleConfig, steps: usize, skip: usize) -> Result<Ladder>;

    /// From the state at the ladder's first point to the latent at its end.
    fn walk<L: Latent>(x: L, ladder: &Ladder, model: &mut impl Model<L>) -> Result<L>;
}

/// Every sampler: file, type. One line each.
#[macro_export]
macro_rules! samplers {
    ($then:ident) => {
        $then! {
            ddim: Ddim;
            pndm: Pndm;
            euler: Euler;
            heun: Heun;
            dpmpp_2m: DpmPp2M;
        }
    };
}

macro_rules! define {
    ($($file:ident : $S:ident;)+) => {
        $(mod $file; pub use $file::$S;)+

        /// A sampler, by name.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[allow(missing_docs)]
        pub enum Method { $($S,)+ }

        impl Method {
            /// Every sampler, in the order of the list.
            pub const ALL: &'static [Method] = &[$(Method::$S,)+];

            /// Name in flags.
            pub fn name(self) -> &'static str {
                match self { $(Method::$S => $S::NAME,)+ }
            }

            /// Name in A1111's picture parameters.
            pub fn label(self) -> &'static str {
                match self { $(Method::$S => $S::LABEL,)+ }
            }

            /// Name of diffusers' class.
            pub fn class(self) -> &'static str {
                match self { $(Method::$S => $S::CLASS,)+ }
            }

            /// Order of convergence.
            pub fn order(self) -> u32 {
                match self { $(Method::$S => $S::ORDER,)+ }
            }

            /// Every name that is understood: flag, label, diffusers' class, file, aliases.
            pub fn names(self) -> Vec<&'static str> {
                let (own, more) = match self {
                    $(Method::$S => ([$S::NAME, $S::LABEL, $S::CLASS, stringify!($file)], $S::ALIASES),)+
                };
                own.iter().chain(more).copied().collect()
            }

            /// The level at which noise is `ratio` times the signal, in this sampler's space.
            pub fn point(self, timestep: f64, ratio: f64) -> Point {
                match self { $(Method::$S => $S::point(timestep, ratio),)+ }
            }

            /// The steps along a grid of levels of [`Method::point`].
            pub fn over(self, grid: &[Point]) -> Vec<Step> {
                match self { $(Method::$S => $S::over(grid),)+ }
            }

            /// The ladder of `steps` steps without the first `skip`: 0 for a picture from noise, for img2img
            /// [`skipped`].
            ///
            /// Fails on a number of steps that the schedule does not have, and on settings that this sampler
            /// cannot honour.
            pub fn ladder(self, cfg: &ScheduleConfig, steps: usize, skip: usize) -> Result<Ladder> {
                cfg.check_steps(self.name(), steps, skip)?;
                match self {
                    $(Method::$S => cfg.refuse($S::READS).and_then(|()| $S::ladder(cfg, steps, skip)),)+
                }
            }

            /// Runs the sampler over any latent.
            pub fn walk<L: Latent>(self, x: L, ladder: &Ladder, model: &mut impl Model<L>) -> Result<L> {
                match self { $(Method::$S => $S::walk(x, ladder, model),)+ }
            }
        }
    };
}
samplers!(define);

impl Method {
    /// The sampler over this ladder as a table of rows.
    pub fn table(self, ladder: &Ladder) -> Result<Table> {
        record::record(self.name(), ladder, |x, ladder, model| self.walk(x, ladder, model))
    }

    fn find(name: &str) -> Option<Method> {
        let name = plain(name);
        Method::ALL.iter().copied().find(|m| m.names().iter().any(|n| plain(n) == name))
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;
    fn from_str(text: &str) -> Result<Method> {
        Method::find(text).ok_or_else(|| unknown(text))
    }
}

/// How many of `steps` steps img2img leaves out at this strength (0 to 1), as diffusers rounds it.
pub fn skipped(steps: usize, strength: f64) -> usize {
    steps - ((steps as f64 * strength) as usize).min(steps)
}

/// A sampler with what A1111 and stable-diffusion.cpp put into its name: "DPM++ 2M Karras", "ddim_trailing".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    /// The sampler.
    pub method: Method,
    /// The name ends in "Karras".
    pub karras: bool,
    /// The name ends in a spacing.
    pub spacing: Option<Spacing>,
}

impl Choice {
    /// Writes what the name says into the configuration.
    pub fn apply(&self, cfg: &mut ScheduleConfig) {
        cfg.karras |= self.karras;
        cfg.spacing = self.spacing.or(cfg.spacing);
    }
}

impl FromStr for Choice {
    type Err = Error;
    fn from_str(text: &str) -> Result<Choice> {
        let name = plain(text);
        if let Some(method) = Method::find(&name) {
            return Ok(Choice { method, karras: false, spacing: None });
        }
        let endings = [
            ("karras", true, None),
            ("trailing", false, Some(Spacing::Trailing)),
            ("leading", false, Some(Spacing::Leading)),
            ("linspace", false, Some(Spacing::Linspace)),
        ];
        let split = |(end, karras, spacing): &(&str, bool, Option<Spacing>)| {
            let method = Method::find(name.strip_suffix(end)?)?;
            Some(Choice { method, karras: *karras, spacing: *spacing })
        };
        endings.iter().find_map(split).ok_or_else(|| unknown(text))
    }
}

/// A name without what does not count in it.
fn plain(name: &str) -> String {
    let name = name.to_lowercase().replace("++", "pp").replace([' ', '-', '_'], "");
    name.strip_suffix("scheduler").map(String::from).unwrap_or(name)
}

fn unknown(text: &str) -> Error {
    let known: Vec<&str> = Method::ALL.iter().map(|m| m.name()).collect();
    let want = format!("sampler: want one of {}; got `{text}`", known.join(", "));
    let asked = plain(text);
    let all = Method::ALL
        .iter()
        .flat_map(|m| m.names().into_iter().map(|n| (distance(&plain(n), &asked), m.name())));
    match all.min_by_key(|(d, _)| *d) {
        Some((d, name)) if d <= 2 && d < asked.len() => {
            Error::invalid(format!("{want}; did you mean `{name}`?"))
        }
        _ => Error::invalid(want),
    }
}

/// Edits (insert, delete, replace) between two words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
