//! Is every barrier of a kernel needed; and in kernels with asynchronous copies or matrices, do accesses to shared memory meet in a bank?
//! Which kernels have them is found by what their files contain.
//!
//! Mutants: each barrier, wait, commit and fence is made to do nothing, in turn. What `LDM_CUDA_WGMMA` chooses runs too.
//! Some case of the room must then break a rule or give another result, in some schedule; where none does, the site is
//! redundant, and [`REDUNDANT`] says why, or the cases are too weak.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::emulator::{self, Emulator};
use ldm::backend::cuda::Wgmma;
use ldm::backend::{Device, DeviceName};
use ldm::exec;
use ldm::ops::{Case, Op, ROOMS};
use ldm::tensor::{DType, HostTensor};

/// Sites that no case misses, as `KIND:STEM:LINE`, each with the proof that it is redundant.
const REDUNDANT: &[(&str, &str)] = &[];

/// Kernels and kinds of access that take more than the wavefronts of an access without conflicts: how many times as many, at
/// any line, and why that may be.
const CONFLICTS: &[(&str, &str, f64, &str)] = &[
    (
        "conv2d_mma",
        "load_shared",
        1.5,
        "at the end, once per element of the result: rows of 80 and of 160 columns end among eight lanes, of which one then meets \
         one of the next row",
    ),
    ("conv2d_mma", "cp_async", 1.8, "the residual, at the end: as above"),
    ("conv2d_wgmma", "load_shared", 1.5, "the end is that of conv2d_mma"),
    ("conv2d_wgmma", "cp_async", 1.8, "as there"),
    ("conv2d_tma", "load_shared", 1.5, "and here"),
    ("conv2d_tma", "cp_async", 1.8, "as there"),
];

/// Those first that miss most.
const SCHEDULES: [&str; 5] = [
    "order=forward;async=late",
    "order=reverse;async=late",
    "order=random:7;async=random:3",
    "order=reverse;async=early",
    "order=forward;async=early",
];

/// One case in one type: what it is given, the sites that it reaches, what one run takes, and its result per schedule.
struct Subject {
    name: String,
    op: Op,
    /// With these kernels of warpgroups.
    wgmma: Wgmma,
    inputs: Vec<HostTensor>,
    sites: Vec<String>,
    cost: Duration,
    right: [Option<Vec<Vec<u8>>>; SCHEDULES.len()],
}

impl Subject {
    /// The bytes of the outputs, or what was broken.
    fn run(&self, emulator: &Emulator, settings: &str) -> Result<Vec<Vec<u8>>, String> {
        emulator.reset();
        emulator.configure(&format!("threads=1;{settings}"));
        let open = |device| match device {
            Device::Cuda(cuda) => Device::Cuda(cuda.with_wgmma(self.wgmma)),
            other => other,
        };
        let outputs = Device::open(DeviceName::Cuda(0))
            .and_then(|device| exec::run_op(&open(device), &self.op, &self.inputs))
            .map_err(|e| e.to_string());
        let report = emulator.report();
        emulator.configure("drop=none");
        if !report.is_empty() {
            emulator.reset();
            return Err(report);
        }
        Ok(outputs?.iter().map(|y| y.bytes().to_vec()).collect())
    }

    /// Does dropping the site change anything under this schedule?
    fn notices(&mut self, emulator: &Emulator, schedule: usize, site: &str) -> bool {
        let settings = SCHEDULES[schedule];
        if self.right[schedule].is_none() {
            let right = self.run(emulator, settings);
            self.right[schedule] =
                Some(right.unwrap_or_else(|e| panic!("{}, nothing dropped, {settings}: {e}", self.name)));
        }
        self.run(emulator, &format!("{settings};drop={site}")).ok() != self.right[schedule]
    }
}

/// The emulator, for one test at a time.
fn start() -> Option<(Emulator, MutexGuard<'static, ()>)> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    match emulator::start() {
        Ok(Some(emulator)) => Some((emulator, turn)),
        Ok(None) => {
            println!("SKIPPED: LDM_TEST_DEVICE=cuda, and this is about the emulator");
            None
        }
        Err(why) => {
            common::skipped(&format!("no emulator: {why}"));
            None
        }
    }
}

/// In files of kernels that use asynchronous copies, by threads or of boxes, or read matrices from shared memory.
const PIPELINED: &[&str] = &["cp_async", "ldmatrix(", "tma_load("];

/// In files of kernels whose threads wait for each other, or for copies.
const WAITING: &[&str] = &["sync_block(", "sync_warp(", "cp_async", "fence_gpu(", "mbarrier_"];

/// The stems of the kernel files that contain one of these.
fn files_with(words: &[&str]) -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|e| e == "cu"));
    let mut stems: Vec<String> = files
        .filter(|path| {
            let text = std::fs::read_to_string(path).unwrap();
            words.iter().any(|word| text.contains(word))
        })
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_string())
        .collect();
    stems.sort();
    stems
}

/// A case in one type, if it reaches a site in one of these kernel files.
fn subject(
    emulator: &Emulator,
    stems: &[String],
    case: &Case,
    t: DType,
    wgmma: Wgmma,
    seed: u64,
) -> Option<Subject> {
    let arrays = case.inputs(t, seed);
    let mut subject = Subject {
        name: format!("{}, {wgmma:?}", case.name(t)),
        op: case.op.clone(),
        wgmma,
        inputs: arrays.iter().zip(case.specs(t)).map(|(a, s)| a.to_tensor(s).unwrap()).collect(),
        sites: vec![],
        cost: Duration::ZERO,
        right: [const { None }; SCHEDULES.len()],
    };
    let start = Instant::now();
    let right = subject.run(emulator, SCHEDULES[0]);
    subject.cost = start.elapsed();
    subject.right[0] = Some(right.unwrap_or_else(|e| panic!("{}: {e}", subject.name)));
    subject.sites = emulator.sites();
    subject.sites.retain(|site| {
        let (_, rest) = site.split_once(':').expect("KIND:STEM:LINE");
        stems.iter().any(|s| rest.starts_with(&format!("{s}:")))
    });
    (!subject.sites.is_empty()).then_some(subject)
}

/// Every listed case of the rooms of these kernel files that reaches a site in one of them, cheapest first.
fn subjects(emulator: &Emulator, stems: &[String]) -> Vec<Subject> {
    let of_room = |room: &str| {
        stems.iter().any(|stem| stem.strip_prefix(room).is_some_and(|r| r.is_empty() || r.starts_with('_')))
    };
    let mut all = Vec::new();
    for room in ROOMS.iter().filter(|room| of_room(room.stem)) {
        for (i, case) in (room.cases)().into_iter().filter(|case| !case.bench).enumerate() {
            // f32, for which there are kernels of its own, and one of the others in turn.
            let (floats, others): (Vec<DType>, Vec<DType>) =
                case.types.iter().partition(|t| **t == DType::F32);
            let other = others.get(i % others.len().max(1));
            for t in floats.into_iter().chain(other.copied()) {
                all.extend(subject(emulator, stems, &case, t, Wgmma::Off, i as u64));
                // And where another kernel computes it with the switch on.
                for (wgmma, twin) in [(Wgmma::Threads, "wgmma"), (Wgmma::Tma, "tma")] {
                    let twin = format!("{}_{twin}", room.stem);
                    if t != DType::F32 && stems.contains(&twin) {
                        let other = subject(emulator, stems, &case, t, wgmma, i as u64);
                        let own = format!(":{twin}:");
                        all.extend(other.filter(|s| s.sites.iter().any(|site| site.contains(&own))));
                    }
                }
            }
        }
    }
    all.sort_by_key(|subject| subject.cost);
    all
}

#[test]
fn every_barrier_wait_commit_and_fence_is_needed() {
    common::in_processes(1, |_| drop_each_site());
}

fn drop_each_site() {
    let Some((emulator, _turn)) = start() else { return };
    let stems = files_with(WAITING);
    let mut subjects = subjects(&emulator, &stems);
    let all: BTreeSet<String> = subjects.iter().flat_map(|s| s.sites.iter().cloned()).collect();
    for stem in &stems {
        assert!(all.iter().any(|site| site.contains(&format!(":{stem}:"))), "no listed case runs {stem}.cu");
    }
    for (site, _) in REDUNDANT {
        assert!(all.contains(*site), "{site} is listed as redundant, and there is no such site");
    }
    let mut wrong = Vec::new();
    for site in &all {
        let mut noticed = None;
        'search: for schedule in 0..SCHEDULES.len() {
            for subject in subjects.iter_mut().filter(|s| s.sites.contains(site)) {
                if subject.notices(&emulator, schedule, site) {
                    noticed = Some(format!("{}, {}", SCHEDULES[schedule], subject.name));
                    break 'search;
                }
            }
        }
        println!("{site}: {}", noticed.as_deref().unwrap_or("no one notices"));
        let redundant = REDUNDANT.iter().find(|(listed, _)| listed == site);
        match (noticed, redundant) {
            (None, None) => wrong.push(format!("{site} can be dropped, and no case in any schedule notices")),
            (Some(by), Some(_)) => wrong.push(format!("{site} is listed as redundant, and is needed: {by}")),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn shared_memory_is_read_and_written_without_bank_conflicts() {
    common::in_processes(1, |_| count_conflicts());
}

fn count_conflicts() {
    let Some((emulator, _turn)) = start() else { return };
    let stems = files_with(PIPELINED);
    let mut lines: BTreeMap<(String, u32, String), (u64, u64)> = BTreeMap::new();
    for subject in subjects(&emulator, &stems) {
        subject.run(&emulator, "banks=count").unwrap();
        for row in emulator.banks() {
            let stem = row.unit.split('.').next().unwrap().to_string();
            let (ideal, actual) = lines.entry((stem, row.line, row.access)).or_default();
            *ideal += row.ideal;
            *actual += row.actual;
        }
    }
    emulator.configure("banks=off");
    let mut wrong = Vec::new();
    for ((stem, line, access), (ideal, actual)) in &lines {
        let row = format!("{stem}.cu:{line}: {access}: {actual} wavefronts, {ideal} without conflicts");
        println!("{row}");
        let listed = CONFLICTS.iter().find(|c| c.0 == stem && c.1 == access);
        if *actual as f64 > *ideal as f64 * listed.map_or(1.0, |c| c.2) {
            wrong.push(row);
        }
    }
    for stem in &stems {
        assert!(lines.keys().any(|key| key.0 == *stem), "no listed case runs {stem}.cu");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
