//! The measurement itself: warm up, repeat, and put the numbers together.

use super::record::{PerOp, Row};
use super::subject::Subject;
use crate::cli::{Heap, heap};
use crate::error::Result;
use crate::exec::Device;
use crate::exec::timing::{Recorder, Span};

/// One evaluation: its seconds, and its nodes with the rows that they belong to.
pub(super) struct Evaluation {
    pub(super) seconds: f64,
    pub(super) spans: Vec<(usize, Span)>,
}

/// All evaluations, and what the heap was asked for in the steady state.
pub(super) struct Measured {
    /// Seconds of each evaluation, in order.
    pub(super) seconds: Vec<f64>,
    /// With their nodes, where those were asked for.
    pub(super) evaluations: Vec<Evaluation>,
    /// Blocks per evaluation: the fewest of any, since a pool may still grow now and then.
    pub(super) allocations: f64,
    /// Bytes per evaluation.
    pub(super) allocated: f64,
    /// Bytes on the heap that nothing has given back.
    pub(super) live: u64,
}

/// How often.
#[derive(Clone, Copy)]
pub(super) struct Repeats {
    pub(super) warmup: usize,
    pub(super) iterations: usize,
}

impl Repeats {
    /// Evaluations that do not count. On a GPU the first runs node by node, and the second records it: their times are
    /// those of no other.
    pub(super) fn warmup(&self, device: &Device) -> usize {
        self.warmup.max(if matches!(device, Device::Cpu) { 0 } else { 2 })
    }
}

/// Runs the subject. With `detail` every node is timed: on a CPU in the same evaluations, where that costs nothing that
/// could be seen; on a GPU in further ones.
pub(super) fn measure(subject: &mut Subject, device: &Device, n: Repeats, detail: bool) -> Result<Measured> {
    let offsets = offsets(subject);
    let together = detail && matches!(device, Device::Cpu);
    let mut recorder = Recorder::new(device, together);
    let mut m = Measured {
        seconds: Vec::with_capacity(n.iterations),
        evaluations: Vec::new(),
        allocations: f64::INFINITY,
        allocated: f64::INFINITY,
        live: 0,
    };
    let warmup = n.warmup(device);
    for i in 0..warmup + n.iterations {
        subject.prepare()?;
        let before = heap().unwrap_or_default();
        let seconds = once(subject, &mut recorder)?;
        let after = heap().unwrap_or_default();
        if i < warmup {
            continue;
        }
        m.seconds.push(seconds);
        m.allocations = m.allocations.min((after.allocations - before.allocations) as f64);
        m.allocated = m.allocated.min((after.allocated - before.allocated) as f64);
        m.live = live(after);
        if together {
            m.evaluations.push(Evaluation { seconds, spans: located(&recorder, &offsets) });
        }
    }
    if detail && !together {
        let mut recorder = Recorder::new(device, true);
        for _ in 0..n.iterations {
            subject.prepare()?;
            let seconds = once(subject, &mut recorder)?;
            m.evaluations.push(Evaluation { seconds, spans: located(&recorder, &offsets) });
        }
    }
    subject.check()?;
    Ok(m)
}

fn once(subject: &mut Subject, recorder: &mut Recorder) -> Result<f64> {
    recorder.begin()?;
    subject.evaluate(recorder)?;
    recorder.end()
}

fn live(heap: Heap) -> u64 {
    heap.allocated.saturating_sub(heap.freed) as u64
}

/// The first row of each stage.
fn offsets(subject: &Subject) -> Vec<usize> {
    let nodes = subject.stages.iter().map(|s| s.program().graph().nodes().len());
    nodes.scan(0, |sum, n| Some(std::mem::replace(sum, *sum + n))).collect()
}

fn located(recorder: &Recorder, offsets: &[usize]) -> Vec<(usize, Span)> {
    recorder.spans().iter().map(|s| (offsets[s.program] + s.step, *s)).collect()
}

/// A row for each node, without times: all its runs in an evaluation together.
pub(super) fn rows(subject: &Subject, device: &Device) -> Vec<Row> {
    let mut rows = Vec::new();
    for stage in &subject.stages {
        let graph = stage.program().graph();
        for node in graph.nodes() {
            let specs: Vec<_> = node.x.iter().map(|&v| graph.spec(v)).collect();
            let cost = graph.cost(node);
            let list = |specs: &mut dyn Iterator<Item = String>| specs.collect::<Vec<_>>().join(" ");
            let x = list(&mut specs.iter().map(|s| s.to_string()));
            let y = list(&mut node.y.iter().map(|&v| graph.spec(v).to_string()));
            let runs = stage.runs as f64;
            rows.push(Row {
                stage: stage.name.into(),
                node: node.label.clone(),
                op: node.op.name().into(),
                shape: format!("{x} -> {y}"),
                // Variants are those of kernels.
                variant: if matches!(device, Device::Cpu) { "" } else { node.op.variant(&specs) }.into(),
                runs: stage.runs as u64,
                seconds: 0.0,
                fastest: 0.0,
                flops: cost.flops * runs,
                bytes: cost.bytes * runs,
            });
        }
    }
    rows
}

/// The middle half of the evaluations, averaged: sums stay sums, and a disturbed evaluation does not count.
pub(super) fn per_op(mut rows: Vec<Row>, evaluations: &[Evaluation]) -> PerOp {
    let mut order: Vec<&Evaluation> = evaluations.iter().collect();
    order.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let quarter = order.len() / 4;
    let kept = &order[quarter..order.len() - quarter];
    let share = 1.0 / kept.len().max(1) as f64;
    let mut total = 0.0;
    for e in kept {
        total += e.seconds * share;
        for (row, span) in &e.spans {
            rows[*row].seconds += span.seconds * share;
        }
    }
    let mut fastest = vec![f64::INFINITY; rows.len()];
    for e in evaluations {
        let mut sums = vec![0.0; rows.len()];
        e.spans.iter().for_each(|(row, span)| sums[*row] += span.seconds);
        fastest.iter_mut().zip(sums).for_each(|(least, s)| *least = least.min(s));
    }
    rows.iter_mut()
        .zip(fastest)
        .for_each(|(row, least)| row.fastest = if least.is_finite() { least } else { 0.0 });
    let inside: f64 = rows.iter().map(|r| r.seconds).sum();
    PerOp { total, outside: total - inside, rows }
}

/// The value below which this share of the sorted numbers lies, interpolated.
pub(super) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let at = share * sorted.len().saturating_sub(1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    match (sorted.get(low), sorted.get(high)) {
        (Some(a), Some(b)) => a + (b - a) * (at - low as f64),
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_interpolated() {
        let v = [1.0, 2.0, 3.0, 4.0, 5.0];
        assert_eq!([0.0, 0.5, 0.9, 1.0].map(|p| percentile(&v, p)), [1.0, 3.0, 4.6, 5.0]);
        assert_eq!((percentile(&[7.0], 0.99), percentile(&[], 0.5)), (7.0, 0.0));
    }

    #[test]
    fn a_disturbed_evaluation_does_not_count_and_sums_stay_sums() {
        let text = String::new;
        let row = Row {
            stage: text(),
            node: text(),
            op: text(),
            shape: text(),
            variant: text(),
            runs: 1,
            seconds: 0.0,
            fastest: 0.0,
            flops: 0.0,
            bytes: 0.0,
        };
        let evaluation = |seconds: f64| {
            let span = Span { program: 0, step: 0, start: 0.0, seconds: seconds / 2.0 };
            Evaluation {
                seconds,
                spans: vec![(0, span), (1, Span { step: 1, seconds: seconds / 4.0, ..span })],
            }
        };
        let all: Vec<_> = [1.0, 2.0, 3.0, 90.0].map(evaluation).into();
        let p = per_op(vec![row.clone(), row], &all);
        assert_eq!((p.total, p.rows[0].seconds, p.rows[1].seconds, p.outside), (2.5, 1.25, 0.625, 0.625));
        assert_eq!(p.rows.iter().map(|r| r.fastest).collect::<Vec<_>>(), [0.5, 0.25]);
    }
}
