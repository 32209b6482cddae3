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

/// Runs a test on the emulator under every schedule, or once on the card that `LDM_TEST_DEVICE=cuda` asks for. Says so
/// loudly where there is no compiler to build the emulator with.
pub fn on_cuda(test: impl Fn(&Device)) {
    on_cuda_with(&SCHEDULES, test);
}

/// [`on_cuda`] with schedules of one's own.
pub fn on_cuda_with(schedules: &[&str], test: impl Fn(&Device)) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let emulator = match emulator::start() {
        Ok(emulator) => emulator,
        Err(why) => {
            eprintln!("SKIPPED: no emulator: {why}");
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
