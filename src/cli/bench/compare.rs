//! A measurement beside an older one: what became slower, and whether that is a regression.

use super::record::{Counts, PerOp, Record, Settings, Time};
use super::table::{cut, kinds, seconds};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

// Evaluations, operations and nodes are compared by the fastest of their runs, which other work on the machine disturbs least. The
// median of the evaluations, which is what a user gets, is shown beside it.

/// A change of an operation or a node counts when it is at least this share of all nodes: below is noise.
const LEAST: f64 = 0.01;
/// Nodes that are named, at most.
const NAMED: usize = 12;

/// Refuses records that are not of the same work, before anything runs.
pub(super) fn check(new: &Settings, old: &Record, file: &Path, counts_only: bool) -> Result<()> {
    let differences = new.differences(&old.settings, counts_only);
    if !differences.is_empty() {
        return Err(Error::invalid(format!(
            "--compare {}: settings differ ({}): measure both with the same",
            file.display(),
            differences.join("; ")
        )));
    }
    if !counts_only && (old.time.is_none() || old.per_op.is_none()) {
        return Err(Error::invalid(format!(
            "--compare {}: this record holds counts alone: compare with --counts-only, or measure it again without",
            file.display()
        )));
    }
    Ok(())
}

/// The comparison as text, and whether something became worse.
pub(super) fn compare(new: &Record, old: &Record, threshold: f64, counts_only: bool) -> (String, bool) {
    let mut out = String::from("\ncompared with the older record\n");
    let mut worse = counts(&mut out, &new.counts, &old.counts) && counts_only;
    if !counts_only {
        if let (Some(a), Some(b)) = (&old.machine, &new.machine) {
            for (what, a, b) in [("cpu", &a.cpu, &b.cpu), ("gpu", &gpu(&a.gpu), &gpu(&b.gpu))] {
                if a != b {
                    let _ = writeln!(out, "  note: another {what}: {a} there, {b} here");
                }
            }
        }
        worse |= times(&mut out, new, old, threshold);
    }
    let verdict = if worse { "REGRESSION" } else { "no regression" };
    let _ = writeln!(out, "{verdict}{}", if counts_only { " in counts" } else { "" });
    (out, worse)
}

fn gpu(name: &Option<String>) -> String {
    name.clone().unwrap_or_else(|| "none".into())
}

/// Counts side by side; whether one has grown.
fn counts(out: &mut String, new: &Counts, old: &Counts) -> bool {
    let mut grown = false;
    let _ = writeln!(out, "  {:<16} {:>18} {:>18}", "count", "older", "now");
    for (name, old, new) in [
        ("nodes", old.nodes as f64, new.nodes as f64),
        ("flops", old.flops, new.flops),
        ("bytes", old.bytes, new.bytes),
        ("weight bytes", old.weight_bytes as f64, new.weight_bytes as f64),
        ("arena bytes", old.arena_bytes as f64, new.arena_bytes as f64),
        ("state bytes", old.state_bytes as f64, new.state_bytes as f64),
        ("scratch bytes", old.scratch_bytes as f64, new.scratch_bytes as f64),
        ("allocations", old.allocations, new.allocations),
    ] {
        let verdict = match new {
            new if new > old => "MORE",
            new if new < old => "less",
            _ => "",
        };
        grown |= new > old;
        let _ = writeln!(out, "  {name:<16} {old:>18.0} {new:>18.0}  {verdict}");
    }
    grown
}

/// Times side by side; whether the evaluation or an operation has become slower by more than the threshold.
fn times(out: &mut String, new: &Record, old: &Record, threshold: f64) -> bool {
    let (Some(t), Some(u), Some(p), Some(q)) = (&new.time, &old.time, &new.per_op, &old.per_op) else {
        return false;
    };
    let mut worse = false;
    let _ =
        writeln!(out, "\n  {:<24} {:>12} {:>12} {:>9}", "time (least, unless p50)", "older", "now", "change");
    let mut line = |name: &str, old: f64, new: f64, least: f64| {
        let slower = new > old * (1.0 + threshold) && new - old > least;
        let faster = old > new * (1.0 + threshold) && old - new > least;
        let verdict = if slower {
            "SLOWER"
        } else if faster {
            "faster"
        } else {
            ""
        };
        worse |= slower;
        let change = change(old, new);
        let _ =
            writeln!(out, "  {name:<24} {:>12} {:>12} {change:>9}  {verdict}", seconds(old), seconds(new));
    };
    let evaluation = |t: &Time| t.evaluations.iter().copied().fold(f64::INFINITY, f64::min);
    line("an evaluation", evaluation(u), evaluation(t), 0.0);
    // Shown only: other work on the machine moves it.
    line("an evaluation, p50", u.p50, t.p50, f64::INFINITY);
    let least = LEAST * fastest(q);
    let (ours, theirs) = (kinds(p, None, ""), kinds(q, None, ""));
    let mut names: Vec<&String> = ours.keys().chain(theirs.keys()).collect();
    names.sort();
    names.dedup();
    let of =
        |all: &BTreeMap<String, super::table::Kind>, name: &str| all.get(name).map_or(0.0, |k| k.fastest);
    names.sort_by(|a, b| of(&theirs, b).total_cmp(&of(&theirs, a)));
    for name in names {
        // A kind that only one of them has took over other work, or gave its own away: the evaluation tells what came of it.
        let both = ours.contains_key(name) && theirs.contains_key(name);
        line(name, of(&theirs, name), of(&ours, name), if both { least } else { f64::INFINITY });
    }
    // Shown only: no least of it is known.
    line("outside of nodes", q.outside, p.outside, f64::INFINITY);
    moved(out, p, q, threshold);
    worse
}

/// Seconds of all nodes, each at its fastest.
fn fastest(p: &PerOp) -> f64 {
    p.rows.iter().map(|r| r.fastest).sum()
}

fn change(old: f64, new: f64) -> String {
    match (old > 0.0, new > 0.0) {
        (true, _) => format!("{:+.1}%", 100.0 * (new / old - 1.0)),
        (false, true) => "new".into(),
        (false, false) => String::new(),
    }
}

/// Names the nodes whose time has changed by more than the threshold, the largest change first.
fn moved(out: &mut String, new: &PerOp, old: &PerOp, threshold: f64) {
    let key = |p: &PerOp| -> BTreeMap<(String, String), (String, f64)> {
        let all = p.rows.iter().map(|r| ((r.stage.clone(), r.node.clone()), (r.op.clone(), r.fastest)));
        all.fold(BTreeMap::new(), |mut map, (k, (op, s))| {
            map.entry(k).or_insert((op, 0.0)).1 += s;
            map
        })
    };
    let (ours, theirs) = (key(new), key(old));
    let mut all: Vec<(&String, &String, f64, f64)> = Vec::new();
    for (k, (op, seconds)) in &ours {
        all.push((&k.1, op, theirs.get(k).map_or(0.0, |t| t.1), *seconds));
    }
    for (k, (op, seconds)) in theirs.iter().filter(|(k, _)| !ours.contains_key(*k)) {
        all.push((&k.1, op, *seconds, 0.0));
    }
    all.retain(|(_, _, old_s, new_s)| {
        (new_s - old_s).abs() > threshold * old_s && (new_s - old_s).abs() > LEAST / 10.0 * fastest(old)
    });
    all.sort_by(|a, b| (b.3 - b.2).abs().total_cmp(&(a.3 - a.2).abs()));
    if all.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n  nodes that moved");
    for (node, op, old, new) in all.iter().take(NAMED) {
        let line = format!(
            "  {:>12} {:>12} {:>9}  {op:<11} {node}",
            seconds(*old),
            seconds(*new),
            change(*old, *new)
        );
        let _ = writeln!(out, "{}", cut(&line));
    }
    if all.len() > NAMED {
        let _ = writeln!(out, "  … and {} more", all.len() - NAMED);
    }
}
