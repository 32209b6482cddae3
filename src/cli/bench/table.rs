//! Measurements for people: tables of at most 100 columns.

use super::measure::Measured;
use super::record::{Ceilings, PerOp, Record, Row};
use crate::exec::human_bytes;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Columns of a table.
const WIDTH: usize = 100;

/// Load per core from which on times are said to be disturbed.
const BUSY: f64 = 0.5;

/// Seconds in a unit that reads well, four digits or so.
pub(super) fn seconds(s: f64) -> String {
    match s {
        s if s >= 10.0 => format!("{s:.2} s"),
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 0.1 => format!("{:.1} ms", s * 1e3),
        s if s >= 0.001 => format!("{:.3} ms", s * 1e3),
        s => format!("{:.2} us", s * 1e6),
    }
}

fn rate(x: f64) -> String {
    match x {
        x if x >= 100.0 => format!("{x:.0}"),
        x if x >= 10.0 => format!("{x:.1}"),
        x if x >= 0.1 => format!("{x:.2}"),
        x => format!("{x:.5}"),
    }
}

/// What was measured, and the numbers of whole evaluations.
pub(super) fn summary(record: &Record, m: &Measured) -> String {
    let (s, c) = (&record.settings, &record.counts);
    let mut out = String::new();
    let mut what = format!("{} ({} weights), {}", s.model, s.weights, s.component);
    if s.component != "text" {
        let _ = write!(what, ", {}x{}", s.width, s.height);
    }
    let _ = write!(what, ", batch {}", s.batch_size);
    if matches!(&*s.component, "unet" | "step" | "pipeline") {
        let _ = write!(what, ", guidance {}", s.cfg_scale);
    }
    if let (Some(sampler), Some(steps)) = (&s.sampler, s.steps) {
        let _ = write!(what, ", {sampler}, {steps} steps");
    }
    let _ = writeln!(out, "{what}, {}", s.dtype);
    if let Some(machine) = &record.machine {
        let on = machine.gpu.as_ref().unwrap_or(&machine.cpu);
        let clock = machine.clock_mhz.map_or(String::new(), |mhz| format!(" at {mhz:.0} MHz"));
        let best = machine.instruction_sets.last().map_or("", String::as_str);
        let _ = writeln!(
            out,
            "{on}{clock}, {} threads, {best}; ldm {}, commit {}",
            s.threads, machine.version, machine.commit
        );
        if let Some(load) = machine.load_before.filter(|l| *l > BUSY * machine.cores as f64) {
            let cores = machine.cores;
            let _ = writeln!(
                out,
                "note: the machine was busy before ({load:.1} threads on {cores} cores): its times are not its best"
            );
        }
    }
    out.push('\n');
    let mut line = |name: &str, text: String| out += &format!("{name:<12} {text}\n");
    if let Some(t) = &record.time {
        let n = t.evaluations.len();
        line(
            "evaluation",
            format!(
                "p50 {}   p95 {}   p99 {}   ({n} after {} to warm up)",
                seconds(t.p50),
                seconds(t.p95),
                seconds(t.p99),
                t.warmup
            ),
        );
        if let Some(kernels) = t.kernels {
            let early =
                t.early_kernels.map(|n| format!("; {n} may start before the one before them has ended"));
            let early = early.unwrap_or_default();
            line("", format!("{kernels} kernels, recorded as CUDA graphs{early}"));
        }
        let unit = if s.component == "text" { "prompts" } else { "images" };
        let of = match &*s.component {
            "unet" | "step" => {
                format!(" at {} evaluations per picture, nothing else counted", s.steps.unwrap_or(1))
            }
            _ => String::new(),
        };
        line("rate", format!("{} {unit}/s{of}", rate(t.images_per_second)));
        line("", format!("{} GFLOP/s, {} GB/s", rate(t.gflops), rate(c.bytes / t.p50 / 1e9)));
    }
    line("work", format!("{:.3} GFLOP, {:.3} GB in {} nodes", c.flops / 1e9, c.bytes / 1e9, c.nodes));
    let bytes = |b: u64| human_bytes(b as usize);
    let scratch = format!("of which scratch {}", bytes(c.scratch_bytes));
    line(
        "memory",
        format!(
            "weights {}, arena {} ({scratch}), states {}",
            bytes(c.weight_bytes),
            bytes(c.arena_bytes),
            bytes(c.state_bytes)
        ),
    );
    if let Some(mem) = &record.memory {
        let peak = mem.process_peak_bytes.map_or("unknown".into(), bytes);
        let (working, heap) = (bytes(mem.working_bytes), bytes(mem.other_heap_bytes));
        line("", format!("working memory of threads {working}, heap {heap}; process at its peak {peak}"));
    }
    line("allocations", format!("{:.0} per evaluation, {}", c.allocations, bytes(m.allocated as u64)));
    out
}

/// The ceilings as they were measured.
pub(super) fn ceilings(c: &Ceilings) -> String {
    let mut out = String::from("\nceilings\n");
    for r in &c.multiply {
        let dtypes = r.dtypes.join(", ");
        let _ = writeln!(
            out,
            "  multiply  {:<12} {:<10} {:>9} GFLOP/s   for {dtypes}",
            r.name,
            r.instruction_set,
            rate(r.flops_per_second / 1e9)
        );
    }
    for r in &c.copy {
        let set = human_bytes(r.set_bytes as usize);
        let _ = writeln!(
            out,
            "  copy      within {set:<12}    {:>12} GB/s, read and written",
            rate(r.bytes_per_second / 1e9)
        );
    }
    out
}

/// The numbers of a row, or of several rows together.
fn numbers(time: f64, total: f64, flops: f64, bytes: f64, least: Option<f64>) -> String {
    let share = least.map_or("-".into(), |l| format!("{:.0}%", 100.0 * l / time.max(1e-12)));
    let per = |work: f64| if time > 0.0 { work / time / 1e9 } else { 0.0 };
    format!(
        "{:>11.3} {:>6.1}% {:>9.3} {:>9.3} {:>9.2} {:>8.2} {share:>6}",
        time * 1e3,
        100.0 * time / total.max(1e-12),
        flops / 1e9,
        bytes / 1e6,
        per(flops),
        per(bytes),
    )
}

const HEAD: &str = "         ms       %     GFLOP        MB   GFLOP/s     GB/s   roof";

/// The nodes, the slowest first, and what lies between them: the whole evaluation.
pub(super) fn nodes(p: &PerOp, c: Option<&Ceilings>, dtype: &str, top: usize) -> String {
    let mut order: Vec<&Row> = p.rows.iter().collect();
    order.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let shown = if top == 0 { order.len() } else { top.min(order.len()) };
    let mut out = format!("\n{HEAD}  op, runs\n{:>14}node: inputs -> outputs\n", "");
    for r in &order[..shown] {
        let least = c.map(|c| c.least(r, dtype));
        let runs = if r.runs > 1 { format!(" x {}", r.runs) } else { String::new() };
        let variant = if r.variant.is_empty() { String::new() } else { format!(" [{}]", r.variant) };
        let _ = writeln!(
            out,
            "{}  {}{variant}{runs}",
            numbers(r.seconds, p.total, r.flops, r.bytes, least),
            r.op
        );
        // The type that all have is left out.
        let shape = r.shape.replace(&format!("{dtype}("), "(");
        let line = format!("{:>14}{}: {shape}", "", r.node);
        let _ = writeln!(out, "{}", cut(&line));
    }
    let sum = |rows: &[&Row]| rows.iter().map(|r| r.seconds).sum::<f64>();
    let mut total = |seconds: f64, what: String| {
        let _ =
            writeln!(out, "{:>11.3} {:>6.1}%  {what}", seconds * 1e3, 100.0 * seconds / p.total.max(1e-12));
    };
    if shown < order.len() {
        total(sum(&order[shown..]), format!("in {} more nodes (--top 0 shows all)", order.len() - shown));
    }
    total(sum(&order), format!("in all {} nodes", order.len()));
    total(p.outside, "outside of nodes".into());
    total(p.total, "an evaluation".into());
    out
}

/// Rows of one kind of operation, added up.
#[derive(Clone, Copy, Default)]
pub(super) struct Kind {
    pub(super) nodes: usize,
    pub(super) seconds: f64,
    pub(super) fastest: f64,
    pub(super) flops: f64,
    pub(super) bytes: f64,
    pub(super) least: f64,
}

/// Sums by operation.
pub(super) fn kinds(p: &PerOp, c: Option<&Ceilings>, dtype: &str) -> BTreeMap<String, Kind> {
    let mut all: BTreeMap<String, Kind> = BTreeMap::new();
    for r in &p.rows {
        let k = all.entry(r.op.clone()).or_default();
        k.nodes += 1;
        k.seconds += r.seconds;
        k.fastest += r.fastest;
        k.flops += r.flops;
        k.bytes += r.bytes;
        k.least += c.map_or(0.0, |c| c.least(r, dtype));
    }
    all
}

/// The table by operation.
pub(super) fn by_op(p: &PerOp, c: Option<&Ceilings>, dtype: &str) -> String {
    let kinds = kinds(p, c, dtype);
    let mut order: Vec<_> = kinds.iter().collect();
    order.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
    let mut out = format!("\n{HEAD}  op, nodes\n");
    for (op, k) in order {
        let least = c.map(|_| k.least);
        let _ = writeln!(out, "{}  {op} x {}", numbers(k.seconds, p.total, k.flops, k.bytes, least), k.nodes);
    }
    let _ = writeln!(
        out,
        "{:>11.3} {:>6.1}%  outside of nodes",
        p.outside * 1e3,
        100.0 * p.outside / p.total.max(1e-12)
    );
    let _ = writeln!(out, "{:>11.3} {:>6.1}%  an evaluation", p.total * 1e3, 100.0);
    out
}

/// A line that fits.
pub(super) fn cut(line: &str) -> String {
    match line.char_indices().nth(WIDTH - 1) {
        Some((at, _)) if line.chars().count() > WIDTH => format!("{}…", &line[..at]),
        _ => line.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fit_and_units_read_well() {
        assert_eq!(cut(&"é".repeat(200)).chars().count(), WIDTH);
        assert_eq!(cut("short"), "short");
        let shown = [12.345, 1.2345, 0.12345, 0.0012345, 0.0000012345].map(seconds);
        assert_eq!(shown, ["12.35 s", "1.234 s", "123.5 ms", "1.234 ms", "1.23 us"]);
    }
}
