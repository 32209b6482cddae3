//! What the measurement ran on.

use super::record::Machine;
use crate::backend::cpu::simd::Isa;
use crate::exec::Device;
use std::path::PathBuf;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// Threads that wanted to run in the last minute, on average.
pub(super) fn load() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// The machine; `load_before` is its [`load`] before the measurement.
pub(super) fn describe(device: &Device, load_before: Option<f64>) -> Machine {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |key: &str| {
        let lines = text.lines().filter(|l| l.split(':').next().is_some_and(|k| k.trim() == key));
        lines.filter_map(|l| l.split_once(':')).map(|(_, v)| v.trim().to_string()).collect::<Vec<_>>()
    };
    let clocks: Vec<f64> = field("cpu MHz").iter().filter_map(|v| v.parse().ok()).collect();
    Machine {
        cpu: field("model name").into_iter().next().unwrap_or_else(|| std::env::consts::ARCH.into()),
        cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        instruction_sets: Isa::available().iter().map(|i| format!("{i:?}")).collect(),
        gpu: match device {
            Device::Cpu => None,
            Device::Cuda(c) => Some(c.name().to_string()),
        },
        clock_mhz: (!clocks.is_empty()).then(|| clocks.iter().sum::<f64>() / clocks.len() as f64),
        memory_bytes: kib("/proc/meminfo", "MemTotal"),
        load_before,
        os: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        version: env!("CARGO_PKG_VERSION").into(),
        commit: commit(),
        unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
    }
}

/// Lets [`process_peak`] begin anew, where the system can: measuring ceilings is no part of it.
pub(super) fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Most bytes that the process has had in memory.
pub(super) fn process_peak() -> Option<u64> {
    kib("/proc/self/status", "VmHWM")
}

/// A line `key: N kB` of a file of the system, in bytes.
fn kib(path: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|n| n * 1024)
}

/// The commit of the checkout that the program or the shell stands in, with `+` where files differ from it.
fn commit() -> String {
    let places = [
        std::env::current_exe().ok().and_then(|p| p.parent().map(PathBuf::from)),
        std::env::current_dir().ok(),
    ];
    let found = places.into_iter().flatten().find_map(|place| {
        let git = |args: &[&str]| -> Option<String> {
            let o = Command::new("git").arg("-C").arg(&place).args(args).output().ok()?;
            o.status.success().then(|| String::from_utf8_lossy(&o.stdout).trim().to_string())
        };
        // Any repository may surround a program: only its own says something about it.
        let root = PathBuf::from(git(&["rev-parse", "--show-toplevel"])?);
        let manifest = std::fs::read_to_string(root.join("Cargo.toml")).ok()?;
        manifest.lines().any(|l| l.trim() == "name = \"ldm\"").then_some(())?;
        let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty());
        Some(git(&["rev-parse", "--short=12", "HEAD"])? + if changed { "+" } else { "" })
    });
    found.unwrap_or_else(|| "unknown".into())
}
