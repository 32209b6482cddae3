//! What test binaries share.
#![allow(dead_code)]

pub mod emulator;

use ldm::backend::{Device, DeviceName};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread;

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

/// Runs the parts `0..parts` of the test that calls it, each in a process of its own, as many at a time as there are cores: a
/// process has one emulator, and most launches of tests keep one core busy. In turn and in this process on a card, or
/// where the harness runs its tests on its main thread (`--test-threads=1`), as for a debugger.
pub fn in_processes(parts: usize, run: impl Fn(usize)) {
    /// Says to a process which part is its own.
    const PART: &str = "LDM_TEST_PART";
    if let Ok(part) = std::env::var(PART) {
        return run(part.parse().expect("a number that the process above has set"));
    }
    let test = thread::current().name().filter(|name| *name != "main").map(String::from);
    let (Some(test), Ok(Some(_))) = (test, emulator::start()) else { return (0..parts).for_each(run) };
    let program = std::env::current_exe().expect("the path of the test");
    let next = AtomicUsize::new(0);
    let worker = || {
        loop {
            let part = next.fetch_add(1, Relaxed);
            if part >= parts {
                return;
            }
            let mut child = Command::new(&program);
            let out = child.args(["--exact", &test, "--nocapture"]).env(PART, part.to_string()).output();
            let out = out.unwrap_or_else(|e| panic!("{}: {e}", program.display()));
            let [said, errors] = [&out.stdout, &out.stderr].map(|text| String::from_utf8_lossy(text));
            let ran = out.status.success() && said.contains("1 passed");
            assert!(ran, "{test}, part {part} of {parts}: {}\n{said}{errors}", out.status);
            print!("{said}");
            eprint!("{errors}");
        }
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|s| {
        let workers: Vec<_> = (0..cores.min(parts)).map(|_| s.spawn(worker)).collect();
        workers.into_iter().for_each(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    });
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
