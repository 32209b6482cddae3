//! What a measurement leaves behind: one JSON file that later ones are compared with.

use crate::error::{Error, Result};
use crate::io::atomic;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Version of the file's form.
const FORMAT: u32 = 1;

/// A measurement. What only a whole record has is optional: a record of counts has settings and counts alone.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) format: u32,
    pub(super) settings: Settings,
    pub(super) counts: Counts,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) machine: Option<Machine>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) time: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<Memory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ceilings: Option<Ceilings>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) per_op: Option<PerOp>,
}

/// What was measured. Records with other settings are not comparable.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Settings {
    /// A preset, or the last part of a folder's path.
    pub(super) model: String,
    /// `random` for a preset's, `file` for a folder's.
    pub(super) weights: String,
    pub(super) component: String,
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) batch_size: usize,
    pub(super) cfg_scale: f64,
    /// Sampler and steps, where the component has them.
    pub(super) sampler: Option<String>,
    pub(super) steps: Option<usize>,
    pub(super) dtype: String,
    pub(super) device: String,
    pub(super) threads: usize,
}

/// What one evaluation is made of: the same on every run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Counts {
    pub(super) nodes: u64,
    pub(super) flops: f64,
    /// Bytes that the nodes must read and write.
    pub(super) bytes: f64,
    pub(super) weight_bytes: u64,
    pub(super) arena_bytes: u64,
    pub(super) state_bytes: u64,
    /// Of the arena: the largest working memory of a node.
    pub(super) scratch_bytes: u64,
    /// Heap allocations of an evaluation in the steady state.
    pub(super) allocations: f64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Machine {
    pub(super) cpu: String,
    pub(super) cores: usize,
    pub(super) instruction_sets: Vec<String>,
    pub(super) gpu: Option<String>,
    /// Mean clock of the cores right after the measurement, where the system says.
    pub(super) clock_mhz: Option<f64>,
    pub(super) memory_bytes: Option<u64>,
    /// Threads that wanted to run in the minute before the measurement, on average: other work disturbs it.
    pub(super) load_before: Option<f64>,
    pub(super) os: String,
    pub(super) version: String,
    pub(super) commit: String,
    /// Seconds since 1970.
    pub(super) unix_time: u64,
}

/// Seconds per evaluation.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Time {
    pub(super) warmup: usize,
    /// Kernels (and fills) of an evaluation, each program of which is one recorded launch: on a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) kernels: Option<u64>,
    /// Those that may start before the one before them has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) early_kernels: Option<u64>,
    pub(super) evaluations: Vec<f64>,
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) p99: f64,
    pub(super) images_per_second: f64,
    pub(super) gflops: f64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Memory {
    /// Most that the process has had in memory.
    pub(super) process_peak_bytes: Option<u64>,
    /// Working memory of the CPU's threads at the neediest node, by the plan; on a GPU it is a part of the arena.
    #[serde(default)]
    pub(super) working_bytes: u64,
    /// On the heap; weights, arena, states and working memory are mapped beside it.
    pub(super) other_heap_bytes: u64,
    /// Bytes that an evaluation asks the heap for, in the steady state.
    pub(super) allocated_bytes: f64,
}

/// What the machine can do at most.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Ceilings {
    pub(super) copy: Vec<CopyRate>,
    pub(super) multiply: Vec<MultiplyRate>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct CopyRate {
    /// Bytes that are touched over and over.
    pub(super) set_bytes: u64,
    /// Bytes read and written per second.
    pub(super) bytes_per_second: f64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct MultiplyRate {
    pub(super) name: String,
    pub(super) instruction_set: String,
    /// Types that are computed in this way.
    pub(super) dtypes: Vec<String>,
    pub(super) flops_per_second: f64,
}

/// Where the time goes: rows add up, with what lies outside of nodes, to the total.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct PerOp {
    /// Seconds of an evaluation, averaged over the middle half.
    pub(super) total: f64,
    /// Seconds between nodes.
    pub(super) outside: f64,
    pub(super) rows: Vec<Row>,
}

/// One node: all its runs in one evaluation together.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Row {
    /// The program that it belongs to.
    pub(super) stage: String,
    pub(super) node: String,
    pub(super) op: String,
    /// Types and axes: inputs, an arrow, outputs.
    pub(super) shape: String,
    pub(super) variant: String,
    pub(super) runs: u64,
    pub(super) seconds: f64,
    /// The least of any evaluation: what comparisons look at.
    pub(super) fastest: f64,
    pub(super) flops: f64,
    pub(super) bytes: f64,
}

impl Record {
    pub(super) fn new(settings: Settings, counts: Counts) -> Record {
        let (machine, time, memory, ceilings, per_op) = (None, None, None, None, None);
        Record { format: FORMAT, settings, counts, machine, time, memory, ceilings, per_op }
    }

    /// Only what is the same on every run and every machine of a kind: fit for a repository.
    pub(super) fn counts_only(&self) -> Record {
        Record::new(self.settings.clone(), self.counts.clone())
    }

    pub(super) fn read(path: &Path) -> Result<Record> {
        let text =
            std::fs::read_to_string(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
        let record: Record = serde_json::from_str(&text).map_err(|e| {
            Error::file(path, format!("want a record that `ldm bench --json` wrote; {e}; measure it again"))
        })?;
        if record.format != FORMAT {
            let got = record.format;
            return Err(Error::file(
                path,
                format!("want a record of form {FORMAT}; got form {got}; measure it again"),
            ));
        }
        Ok(record)
    }

    /// Through a temporary file: the old record or the whole new one.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self).map_err(|e| Error::file(path, e))?;
        text.push('\n');
        atomic::write(path, text.as_bytes())
    }
}

impl Settings {
    /// Names and values that differ, of those that matter: `want` is the other's.
    pub(super) fn differences(&self, want: &Settings, counts_only: bool) -> Vec<String> {
        let object = |s: &Settings| serde_json::to_value(s).unwrap_or_default();
        let (ours, theirs) = (object(self), object(want));
        let shown = |v: &serde_json::Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
        let keys = theirs.as_object().into_iter().flatten().map(|(key, _)| key.as_str());
        keys.filter(|&key| !(counts_only && key == "threads") && ours[key] != theirs[key])
            .map(|key| format!("{key}: {} there, {} here", shown(&theirs[key]), shown(&ours[key])))
            .collect()
    }
}
