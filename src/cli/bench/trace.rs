//! A timeline for Perfetto or `chrome://tracing`: Chrome's trace event format.

use super::measure::Evaluation;
use super::record::Row;
use crate::error::{Error, Result};
use crate::io::atomic;
use serde_json::{Value, json};
use std::path::Path;

/// Writes the evaluations one after the other; `rows` says what the nodes are, `index` finds a span's row.
pub(super) fn write(path: &Path, title: &str, rows: &[Row], evaluations: &[Evaluation]) -> Result<()> {
    let name =
        |what: &str, text: &str| json!({"ph": "M", "pid": 1, "tid": 1, "name": what, "args": {"name": text}});
    let mut events: Vec<Value> = vec![name("process_name", title), name("thread_name", "evaluations")];
    let mut origin = 0.0;
    let micros = |seconds: f64| (seconds * 1e9).round() / 1e3;
    for (i, e) in evaluations.iter().enumerate() {
        events.push(json!({
            "ph": "X", "pid": 1, "tid": 1, "cat": "evaluation", "name": format!("evaluation {i}"),
            "ts": micros(origin), "dur": micros(e.seconds),
        }));
        for (row, span) in &e.spans {
            let r = &rows[*row];
            let runs = r.runs.max(1) as f64;
            events.push(json!({
                "ph": "X", "pid": 1, "tid": 1, "cat": r.stage, "name": r.op,
                "ts": micros(origin + span.start), "dur": micros(span.seconds),
                "args": {"node": r.node, "shape": r.shape, "variant": r.variant, "flops": r.flops / runs, "bytes": r.bytes / runs},
            }));
        }
        origin += e.seconds;
    }
    let text = serde_json::to_vec(&json!({"displayTimeUnit": "ms", "traceEvents": events}))
        .map_err(|e| Error::file(path, e))?;
    atomic::write(path, &text)
}
