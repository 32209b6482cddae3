//! When the nodes of runs began and ended: by the clock on a CPU, by events in the stream on a GPU.

use super::{Device, Hook};
use crate::backend::cuda::Event;
use crate::error::Result;
use crate::graph::Node;
use crate::tensor::HostTensor;
use std::time::Instant;

/// A point in the work of a device.
pub enum Mark {
    /// By the host's clock.
    Host(Instant),
    /// In the stream of a GPU.
    Device(Event),
}

impl Mark {
    /// After all that the device was asked for.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn now(device: &Device) -> Result<Mark> {
        match device {
            Device::Cpu => Ok(Mark::Host(Instant::now())),
            Device::Cuda(c) => c.record().map(Mark::Device),
        }
    }

    /// Waits until the device has come this far.
    ///
    /// # Errors
    /// When work before it failed.
    pub fn wait(&self) -> Result<()> {
        match self {
            Mark::Host(_) => Ok(()),
            Mark::Device(event) => event.wait(),
        }
    }

    /// Seconds from this mark to a later one of the same device; on a GPU waits for that.
    fn until(&self, later: &Mark) -> Result<f64> {
        match (self, later) {
            (Mark::Host(a), Mark::Host(b)) => Ok(b.duration_since(*a).as_secs_f64()),
            (Mark::Device(a), Mark::Device(b)) => Ok(a.elapsed(b)? / 1e3),
            _ => Ok(0.0),
        }
    }
}

/// One run of one node.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Span {
    /// Which program of the evaluation; what [`Recorder::program`] was told.
    pub program: usize,
    /// Which node of that program's graph.
    pub step: usize,
    /// Seconds from the start of the evaluation.
    pub start: f64,
    /// Seconds that the node took.
    pub seconds: f64,
}

/// A hook that records when nodes run, evaluation by evaluation.
///
/// On a CPU it reads the clock twice per node. On a GPU it puts two events around each node into the stream, and nothing
/// waits before [`Recorder::end`]; events cost the device a little, so take totals with [`Recorder::detail`] off.
/// Evaluations and nodes are also NVTX ranges, on the host's timeline, where that library is installed.
pub struct Recorder {
    device: Device,
    detail: bool,
    program: usize,
    origin: Option<Mark>,
    opened: Option<Mark>,
    marks: Vec<(usize, usize, Mark, Mark)>,
    spans: Vec<Span>,
}

impl Recorder {
    /// A recorder for one device. With `detail` it records every node, else whole evaluations only.
    pub fn new(device: &Device, detail: bool) -> Recorder {
        let (origin, opened) = (None, None);
        let (marks, spans) = (Vec::new(), Vec::new());
        Recorder { device: device.clone(), detail, program: 0, origin, opened, marks, spans }
    }

    /// Whether it records every node.
    pub fn detail(&self) -> bool {
        self.detail
    }

    /// An evaluation begins. What was recorded before is forgotten; its memory is kept.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn begin(&mut self) -> Result<()> {
        self.marks.clear();
        self.spans.clear();
        self.program = 0;
        self.push("evaluation");
        self.origin = Some(Mark::now(&self.device)?);
        Ok(())
    }

    /// The nodes that follow belong to this program.
    pub fn program(&mut self, program: usize) {
        self.program = program;
    }

    /// The evaluation is over: its seconds. On a GPU waits for it.
    ///
    /// # Errors
    /// When the driver fails, or work on the device has failed.
    pub fn end(&mut self) -> Result<f64> {
        let end = Mark::now(&self.device)?;
        let Some(origin) = self.origin.take() else { return Ok(0.0) };
        let total = origin.until(&end)?;
        self.pop();
        for (program, step, from, to) in &self.marks {
            let (start, seconds) = (origin.until(from)?, from.until(to)?);
            self.spans.push(Span { program: *program, step: *step, start, seconds });
        }
        Ok(total)
    }

    fn push(&self, name: &str) {
        if let Device::Cuda(c) = &self.device {
            c.range_push(name);
        }
    }

    fn pop(&self) {
        if let Device::Cuda(c) = &self.device {
            c.range_pop();
        }
    }

    /// The nodes of the evaluation that ended last, in the order in which they ran.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }
}

impl Hook for Recorder {
    fn watches(&self) -> bool {
        self.detail
    }

    fn before(&mut self, _step: usize, node: &Node) -> Result<()> {
        if self.detail {
            self.push(&node.label);
            self.opened = Some(Mark::now(&self.device)?);
        }
        Ok(())
    }

    fn after(
        &mut self,
        step: usize,
        _node: &Node,
        _outputs: &dyn Fn(usize) -> Result<HostTensor>,
    ) -> Result<()> {
        if let Some(from) = self.opened.take() {
            self.marks.push((self.program, step, from, Mark::now(&self.device)?));
            self.pop();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::{Graph, Program, Weights};
    use crate::ops::{Act, Activation};
    use crate::tensor::DType;

    #[test]
    fn nodes_lie_inside_their_evaluation_and_do_not_overlap() {
        let mut g = Graph::new();
        let mut x = g.input("x", DType::F32, [64, 64]);
        for i in 0..3 {
            x = g.push(&format!("silu.{i}"), Activation(Act::Silu), &[x]).unwrap();
        }
        g.output("y", x);
        let device = Device::Cpu;
        let mut program = Program::new(g, &Weights::new(&device), &device).unwrap();
        let mut r = Recorder::new(&device, true);
        for _ in 0..2 {
            r.begin().unwrap();
            r.program(4);
            program.run(&mut r).unwrap();
            let total = r.end().unwrap();
            assert_eq!(
                r.spans().iter().map(|s| (s.program, s.step)).collect::<Vec<_>>(),
                [(4, 0), (4, 1), (4, 2)]
            );
            let mut last = 0.0;
            for s in r.spans() {
                assert!(s.start >= last && s.seconds >= 0.0, "{:?}", r.spans());
                last = s.start + s.seconds;
            }
            assert!(last <= total);
        }
        let mut r = Recorder::new(&device, false);
        r.begin().unwrap();
        program.run(&mut r).unwrap();
        assert!(r.end().unwrap() > 0.0 && r.spans().is_empty());
    }
}
