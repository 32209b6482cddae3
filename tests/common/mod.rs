//! What test binaries share.
#![allow(dead_code)]

pub mod emulator;

use ldm::backend::{Device, DeviceName};
use std::sync::{Mutex, PoisonError};

/// The emulator's settings belong to the process: one test at a time.
static TURN: Mutex<()> = Mutex::new(());

/// Fiber orders and ways in which asynchronous work lands, under which every kernel test runs.
pub const SCHEDULES: [&str; 3] =
    ["order=forward;async=late", "order=reverse;async=early", "order=random:7;async=random"];

/// Says that a test is left out, past the test harness, which keeps what passing tests print to itself. Where
/// `LDM_REQUIRE_EMULATOR` is set, as in CI, that is a failure.
pub fn skipped(why: &str) {
    use std::io::Write;
    assert!(std::env::var_os("LDM_REQUIRE_EMULATOR").is_none(), "a test would be skipped: {why}");
    let name = std::thread::current().name().unwrap_or("a test").to_string();
    let _ = writeln!(std::io::stderr(), "SKIPPED: {name}: {why}");
}

/// [`SCHEDULES`], or with `LDM_SOAK=1` sixteen: seeded orders and landings beside the plain ones.
fn schedules() -> Vec<String> {
    let mut all: Vec<String> = SCHEDULES.map(String::from).into();
    if std::env::var_os("LDM_SOAK").is_some() {
        all.extend(["order=forward;async=early", "order=reverse;async=late"].map(String::from));
        all.extend((all.len()..16).map(|seed| format!("order=random:{seed};async=random:{}", 100 + seed)));
    }
    all
}

/// Runs a test on the emulator under every schedule, or once on the card that `LDM_TEST_DEVICE=cuda` asks for. Says so
/// loudly where there is no compiler to build the emulator with.
pub fn on_cuda(test: impl Fn(&Device)) {
    let schedules = schedules();
    on_cuda_with(&schedules.iter().map(String::as_str).collect::<Vec<_>>(), test);
}

/// [`on_cuda`] with schedules of one's own.
pub fn on_cuda_with(schedules: &[&str], test: impl Fn(&Device)) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let emulator = match emulator::start() {
        Ok(emulator) => emulator,
        Err(why) => {
            skipped(&format!("no emulator: {why}"));
            return;
        }
    };
    let open = || Device::open(DeviceName::Cuda(0)).expect("the device of the tests");
    match emulator {
        None => test(&open()),
        Some(emulator) => {
            for schedule in schedules {
                emulator.reset();
                emulator.configure(schedule);
                test(&open());
                let report = emulator.report();
                assert!(report.is_empty(), "under {schedule}: {report}");
            }
        }
    }
}
