//! Progress: a bar with rate and time left on a terminal, plain lines otherwise.

use crate::error::Result;
use crate::pipeline::Observer;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::Instant;

/// Writes to standard error.
pub(super) struct Progress {
    terminal: bool,
    quiet: bool,
    bar: Option<ProgressBar>,
    stage: String,
    since: Instant,
    printed: Instant,
}

impl Progress {
    pub(super) fn new(quiet: bool) -> Progress {
        let now = Instant::now();
        let terminal = std::io::stderr().is_terminal();
        Progress { terminal, quiet, bar: None, stage: String::new(), since: now, printed: now }
    }

    /// Ends the stage that is under way.
    pub(super) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
        if !self.stage.is_empty() && !self.quiet {
            eprintln!("{}: {:.2} s", self.stage, self.since.elapsed().as_secs_f64());
        }
        self.stage.clear();
    }
}

impl Observer for Progress {
    fn stage(&mut self, name: &str) -> Result<()> {
        self.finish();
        self.stage = name.into();
        self.since = Instant::now();
        self.printed = self.since;
        Ok(())
    }

    fn step(&mut self, done: usize, of: usize) -> Result<()> {
        if self.quiet {
            return Ok(());
        }
        let seconds = self.since.elapsed().as_secs_f64();
        let rate = done as f64 / seconds.max(1e-9);
        let left = (of - done) as f64 / rate.max(1e-9);
        if self.terminal {
            let bar = self.bar.get_or_insert_with(|| {
                let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}");
                ProgressBar::new(of as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
            });
            bar.set_position(done as u64);
            bar.set_message(format!("{}, {left:.0} s left", speed(rate)));
        } else if done == of || self.printed.elapsed().as_secs() >= 5 {
            eprintln!("step {done}/{of}, {}, {left:.0} s left", speed(rate));
            self.printed = Instant::now();
        }
        Ok(())
    }

    fn warning(&mut self, what: &str) {
        eprintln!("warning: {what}");
    }
}

/// Iterations per second, or seconds per iteration where that reads better.
fn speed(rate: f64) -> String {
    if rate >= 1.0 { format!("{rate:.2} it/s") } else { format!("{:.2} s/it", 1.0 / rate.max(1e-9)) }
}
