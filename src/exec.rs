//! Runs a planned graph on a device: one loop.

pub mod timing;
mod weights;

use crate::backend::cpu::{self, In, gemm::Packed};
use crate::backend::cuda;
use crate::error::{Error, Result};
use crate::graph::{Due, Node, Origin, Place, Plan, Value, Var, fuse};
use crate::ops::Op;
use crate::tensor::{HostTensor, Spec};
use std::borrow::Cow;
use std::sync::Arc;
use weights::Store;

pub use crate::backend::{Device, DeviceName, peak};
pub use crate::graph::{Graph, Target};
pub use weights::{Made, Weights};

/// What happens during a run, for progress, traces and checks.
pub trait Hook: Send {
    /// Whether it wants to be told of every node. If not, it is told of some or none: a program on a GPU may run all of
    /// them as one recorded launch.
    fn watches(&self) -> bool {
        true
    }
    /// A node is about to run.
    ///
    /// # Errors
    /// Stops the run.
    fn before(&mut self, _step: usize, _node: &Node) -> Result<()> {
        Ok(())
    }
    /// A node has run (on a GPU: has been launched).
    ///
    /// # Errors
    /// Stops the run.
    fn after(
        &mut self,
        _step: usize,
        _node: &Node,
        _outputs: &dyn Fn(usize) -> Result<HostTensor>,
    ) -> Result<()> {
        Ok(())
    }
}

/// Nothing happens.
impl Hook for () {
    fn watches(&self) -> bool {
        false
    }
}

/// Reads every output of every node and stops at the first that is not finite.
pub struct CheckFinite;

impl Hook for CheckFinite {
    fn after(
        &mut self,
        _step: usize,
        node: &Node,
        outputs: &dyn Fn(usize) -> Result<HostTensor>,
    ) -> Result<()> {
        for i in 0..node.y.len() {
            let which = if node.y.len() > 1 { format!(", output {i}") } else { String::new() };
            check_finite(&outputs(i)?, node.op.name(), &(node.label.clone() + &which))?;
        }
        Ok(())
    }
}

/// [`Error::NonFinite`] naming the first NaN or infinity of a tensor.
///
/// # Errors
/// When there is one.
pub fn check_finite(x: &HostTensor, op: &str, label: &str) -> Result<()> {
    let values = x.as_f32().map_or_else(|| Cow::Owned(x.to_f32()), Cow::Borrowed);
    let Some((i, v)) = values.iter().enumerate().find(|(_, v)| !v.is_finite()) else {
        return Ok(());
    };
    let what = format!("{v} at element {i} of {}", x.spec());
    Err(Error::NonFinite { op: op.into(), node: label.into(), what })
}

/// The memory of a program, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Measure {
    /// Weights, as a device holds them.
    pub weights: usize,
    /// Arena: inputs, outputs, intermediate values.
    pub arena: usize,
    /// States.
    pub states: usize,
    /// What the CPU's code of the neediest node takes beside these.
    pub scratch: usize,
}

/// How a program runs the nodes that are due in each run.
enum Mode {
    /// Node by node, always: on a CPU, and where nothing is to be recorded.
    Nodes,
    /// Node by node this time: the first run loads modules, and makes what the device makes on first use.
    First,
    /// The next run that nobody watches records them.
    Record,
    /// In one launch. What was recorded stays valid: no memory of a program ever moves.
    Replay(cuda::Graph),
}

/// A graph with its plan and its memory on a device.
///
/// On a GPU the second run records its kernels as a CUDA graph, and each run from then on is one launch, unless its hook
/// watches the nodes. A program has one such graph, so there are at most as many as programs.
pub struct Program {
    /// Before the memory, and so dropped first: a recorded launch points to it.
    mode: Mode,
    graph: Graph,
    plan: Plan,
    device: Device,
    arena: Store,
    weights: Vec<Option<Arc<(Spec, Store)>>>,
    states: Vec<Option<Store>>,
    steps: Vec<Step>,
    /// By node.
    due: Vec<Due>,
    /// The nodes that need not run: those that are due before. An input that is written makes all but [`Due::Once`] due again.
    settled: Due,
}

impl Program {
    /// Fuses and plans the graph, takes the memory, binds the weights.
    ///
    /// # Errors
    /// When a weight is missing or has another shape or type, or memory runs out.
    pub fn new(graph: Graph, weights: &Weights, device: &Device) -> Result<Program> {
        let target = Target::from(device);
        let graph = fuse(&graph, target)?;
        let plan = Plan::new(&graph, target)?;
        let arena = Store::new(device, plan.arena)?;
        let mut bound = Vec::with_capacity(graph.values().len());
        let mut states = Vec::with_capacity(graph.values().len());
        for value in graph.values() {
            bound.push(match value.origin {
                Origin::Weight(_) => {
                    let w = weights.get(&value.name);
                    let w = w.filter(|w| w.0 == value.spec).ok_or_else(|| {
                        let got = w.map_or("nothing".into(), |w| w.0.to_string());
                        Error::invalid(format!("weight `{}`: want {}; got {got}", value.name, value.spec))
                    })?;
                    Some(w.clone())
                }
                _ => None,
            });
            states.push(match value.origin {
                Origin::State => {
                    let mut store = Store::new(device, value.spec.bytes())?;
                    store.write(device, 0, &vec![0; value.spec.bytes()])?;
                    Some(store)
                }
                _ => None,
            });
        }
        for node in graph.nodes() {
            for (i, x) in node.x.iter().enumerate() {
                let packed = matches!(bound[x.index()].as_deref(), Some((_, Store::Packed(..))));
                if packed && node.op.packed() != Some(i) {
                    let name = &graph.values()[x.index()].name;
                    return Err(Error::invalid(format!(
                        "weight `{name}` of {} `{}` was packed for products; load it with the layout Same",
                        node.op.name(),
                        node.label
                    )));
                }
            }
        }
        let steps = graph.nodes().iter().map(|node| Step::new(&graph, &plan, node)).collect::<Result<_>>()?;
        let due = graph.due();
        let device = device.clone();
        let mode = match &device {
            Device::Cuda(c) if c.records_graphs() => Mode::First,
            _ => Mode::Nodes,
        };
        let settled = Due::Once;
        Ok(Program { mode, graph, plan, device, arena, weights: bound, states, steps, due, settled })
    }

    /// The memory that [`Program::new`] and [`Program::run`] would take on a target, without taking it.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn measure(graph: &Graph, target: Target) -> Result<Measure> {
        let graph = fuse(graph, target)?;
        let plan = Plan::new(&graph, target)?;
        let specs = |vars: &[Var]| vars.iter().map(|&v| graph.spec(v)).collect::<Vec<_>>();
        let weight = |(_, v, layout): (_, &Value, _)| Weights::measure(target, v.spec, layout);
        let scratch = |n: &Node| n.op.cpu_scratch(&specs(&n.x), &specs(&n.y));
        Ok(Measure {
            weights: graph.weights().map(weight).fold(0, usize::saturating_add),
            arena: plan.arena,
            states: plan.states,
            scratch: graph.nodes().iter().map(scratch).max().unwrap_or(0),
        })
    }

    /// The graph as it would run on a target, as text.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn show(graph: &Graph, target: Target) -> Result<String> {
        let graph = fuse(graph, target)?;
        Ok(graph.show(Some(&Plan::new(&graph, target)?)))
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    fn leaf(&self, name: &str) -> Result<Var> {
        let values = self.graph.values().iter();
        let is = |o: &Origin| matches!(o, Origin::Input | Origin::State);
        let at =
            values.enumerate().find(|(_, v)| v.name == name && is(&v.origin)).map(|(i, _)| Var(i as u32));
        at.ok_or_else(|| Error::invalid(format!("this program has no input or state `{name}`")))
    }

    /// Whether there is an input or state of this name.
    pub fn has(&self, name: &str) -> bool {
        self.leaf(name).is_ok()
    }

    /// Type and axes of an input or state.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn spec(&self, name: &str) -> Result<Spec> {
        Ok(self.graph.spec(self.leaf(name)?))
    }

    /// Writes an input or a state. It keeps its value until it is written again (or updated by the graph).
    ///
    /// # Errors
    /// When there is none of that name, or type or axes differ.
    pub fn write(&mut self, name: &str, x: &HostTensor) -> Result<()> {
        let v = self.leaf(name)?;
        let want = self.graph.spec(v);
        if x.spec() != want {
            return Err(Error::invalid(format!("input `{name}`: want {want}; got {}", x.spec())));
        }
        if !matches!(self.graph.values()[v.index()].origin, Origin::State) {
            self.settled = self.settled.min(Due::Input);
        }
        match (self.plan.places[v.index()], &mut self.states[v.index()]) {
            (Place::Arena(offset), _) => self.arena.write(&self.device, offset, x.bytes()),
            (Place::State(_), Some(store)) => store.write(&self.device, 0, x.bytes()),
            _ => Err(Error::invalid(format!("input `{name}` has no place"))),
        }
    }

    /// Reads an output or a state.
    ///
    /// # Errors
    /// When there is none of that name, or the device failed.
    pub fn read(&self, name: &str) -> Result<HostTensor> {
        let output = self.graph.outputs().iter().find(|(n, _)| n == name).map(|(_, v)| *v);
        self.value(output.map_or_else(|| self.leaf(name), Ok)?)
    }

    /// Reads the first integers of a state of integers; allocates nothing on a CPU.
    ///
    /// # Errors
    /// When there is no such state, or it is shorter.
    pub fn read_i32(&self, state: &str, to: &mut [i32]) -> Result<()> {
        let store = self.states[self.leaf(state)?.index()].as_ref();
        let to: &mut [u8] = bytemuck::cast_slice_mut(to);
        match (store, &self.device) {
            (Some(Store::Host(m)), _) if m.bytes().len() >= to.len() => {
                to.copy_from_slice(&m.bytes()[..to.len()]);
                Ok(())
            }
            (Some(Store::Cuda(b)), Device::Cuda(c)) => c.download(b, 0, to),
            _ => Err(Error::invalid(format!("this program has no state `{state}` of {} bytes", to.len()))),
        }
    }

    fn value(&self, v: Var) -> Result<HostTensor> {
        let spec = self.graph.spec(v);
        match self.plan.places[v.index()] {
            Place::Arena(offset) => self.arena.read(&self.device, offset, spec),
            Place::State(s) => match &self.states[s.index()] {
                Some(store) => store.read(&self.device, 0, spec),
                None => Err(Error::invalid("a state without memory")),
            },
            Place::Weight(w) => match &self.weights[w.index()] {
                Some(w) => w.1.read(&self.device, 0, spec),
                None => Err(Error::invalid("a weight without memory")),
            },
            Place::Unused => Err(Error::invalid("a value without a place")),
        }
    }

    /// Lets the next run compute every node, though no input was written.
    pub fn unsettle(&mut self) {
        self.settled = Due::Once;
    }

    /// Runs the graph once. What cannot have changed since the last run, see [`Graph::due`], is not run again.
    ///
    /// # Errors
    /// From a room or the device, with the node's label; or from the hook.
    pub fn run(&mut self, hook: &mut impl Hook) -> Result<()> {
        // On a CPU from within the thread pool: work that comes from outside is handed over, node by node.
        match (&self.device, rayon::current_thread_index()) {
            (Device::Cpu, None) => rayon::scope(|_| self.run_here(hook)),
            _ => self.run_here(hook),
        }
    }

    fn run_here(&mut self, hook: &mut impl Hook) -> Result<()> {
        let settled = std::mem::replace(&mut self.settled, Due::Once);
        let recorded = !hook.watches() && matches!(self.mode, Mode::Record | Mode::Replay(_));
        for step in 0..self.graph.nodes().len() {
            let due = self.due[step];
            if due < settled || (due == Due::Always && recorded) {
                continue;
            }
            hook.before(step, &self.graph.nodes()[step])?;
            self.step(step).map_err(|e| e.at_node(&self.graph.nodes()[step].label))?;
            let node = &self.graph.nodes()[step];
            hook.after(step, node, &|i| self.value(node.y[i]))?;
        }
        if recorded {
            // After the other nodes, which depend on none of these.
            self.replay()?;
        } else if matches!(self.mode, Mode::First) {
            self.mode = Mode::Record;
        }
        self.settled = Due::Always;
        Ok(())
    }

    /// Runs all nodes that are due in each run as one launch, recorded when there is none yet.
    fn replay(&mut self) -> Result<()> {
        if let (Mode::Record, Device::Cuda(c)) = (&self.mode, &self.device) {
            let nodes =
                self.graph.nodes().iter().enumerate().filter(|(step, _)| self.due[*step] == Due::Always);
            self.mode = Mode::Replay(c.record_graph(|c| {
                let mut each =
                    nodes.map(|(step, n)| self.step_cuda(step, c).map_err(|e| e.at_node(&n.label)));
                each.try_for_each(|done| done)
            })?);
        }
        match &self.mode {
            Mode::Replay(graph) => graph.launch(),
            _ => Ok(()),
        }
    }

    /// Kernels (and fills) of a run that is one launch; `None` where none has been recorded.
    pub fn launches(&self) -> Option<usize> {
        match &self.mode {
            Mode::Replay(graph) => Some(graph.nodes()),
            _ => None,
        }
    }

    /// Those of the kernels of [`Program::launches`] that may start before the one before them has ended.
    pub fn early_launches(&self) -> usize {
        match &self.mode {
            Mode::Replay(graph) => graph.early(),
            _ => 0,
        }
    }

    fn step(&mut self, step: usize) -> Result<()> {
        match self.device.clone() {
            Device::Cpu => self.step_cpu(step),
            Device::Cuda(c) => self.step_cuda(step, &c),
        }
    }

    fn step_cuda(&self, step: usize, device: &cuda::Cuda) -> Result<()> {
        let node = &self.graph.nodes()[step];
        let operand = |v: &Var| -> Result<cuda::Operand> {
            let buffer = |s: &Store| match s {
                Store::Cuda(b) => Ok(b.ptr()),
                _ => Err(Error::Device("a value on the host in a CUDA program".into())),
            };
            let ptr = match self.plan.places[v.index()] {
                Place::Arena(offset) => buffer(&self.arena)?.offset(offset),
                Place::Weight(w) => {
                    self.weights[w.index()].as_ref().map_or(Ok(Default::default()), |w| buffer(&w.1))?
                }
                Place::State(s) => self.states[s.index()].as_ref().map_or(Ok(Default::default()), buffer)?,
                Place::Unused => Default::default(),
            };
            Ok(cuda::Operand { spec: self.graph.spec(*v), ptr })
        };
        let x = node.x.iter().map(operand).collect::<Result<Vec<_>>>()?;
        let y = node.y.iter().map(operand).collect::<Result<Vec<_>>>()?;
        let arena = match &self.arena {
            Store::Cuda(b) => b.ptr(),
            _ => return Err(Error::Device("an arena on the host in a CUDA program".into())),
        };
        let part = &self.plan.scratch[step];
        let (scratch, scratch_bytes) = (arena.offset(part.start), part.len());
        node.op.cuda(&cuda::Call { device, node: &node.label, x: &x, y: &y, scratch, scratch_bytes })
    }

    fn step_cpu(&mut self, step: usize) -> Result<()> {
        match self.steps[step].operands() {
            ..=FEW => self.borrow_and_run::<FEW>(step),
            _ => self.borrow_and_run::<MOST>(step),
        }
    }

    /// Borrows the memory of all operands, at most `N`: disjoint pieces of the arena by splitting it in order of offset. Allocates
    /// nothing.
    fn borrow_and_run<const N: usize>(&mut self, step: usize) -> Result<()> {
        let (node, step) = (&self.graph.nodes()[step], &self.steps[step]);
        let Store::Host(arena) = &mut self.arena else {
            return Err(Error::Device("an arena on a GPU in a CPU program".into()));
        };
        let mut pieces: [Option<&mut [u8]>; N] = [const { None }; N];
        let (mut rest, mut start) = (arena.bytes_mut(), 0);
        let mut states = self.states.iter_mut().enumerate();
        for (piece, &place) in pieces.iter_mut().zip(&step.pieces) {
            *piece = match place {
                Piece::Arena(offset, bytes) => {
                    let (_, tail) = rest.split_at_mut(offset - start);
                    let (piece, tail) = tail.split_at_mut(bytes);
                    (rest, start) = (tail, offset + bytes);
                    Some(piece)
                }
                Piece::State(index, bytes) => match states.find(|(i, _)| *i == index) {
                    Some((_, Some(Store::Host(m)))) => Some(&mut m.bytes_mut()[..bytes]),
                    _ => None,
                },
            };
        }
        let mut outputs: [&mut [u8]; N] = std::array::from_fn(|_| Default::default());
        for (output, &piece) in outputs.iter_mut().zip(&step.outputs) {
            let piece = pieces[piece].take();
            *output = piece.ok_or_else(|| Error::invalid("two outputs in one place"))?;
        }
        let pieces = pieces.map(|piece| piece.map(|piece| &*piece));
        let mut inputs = [const { In::Shared(&[]) }; N];
        for (input, source) in inputs.iter_mut().zip(&step.inputs) {
            *input = match *source {
                Source::Output(j) => In::Output(j),
                Source::Piece(i) => {
                    In::Shared(pieces[i].ok_or_else(|| Error::invalid("an input without a place"))?)
                }
                Source::Weight(w) => match self.weights[w].as_deref() {
                    Some((spec, Store::Host(m))) => In::Shared(&m.bytes()[..spec.bytes()]),
                    Some((_, Store::Packed(layout, m))) => {
                        In::Packed(Packed::new(*layout, &m.bytes()[..layout.bytes()]))
                    }
                    _ => return Err(Error::Device("a weight on a GPU in a CPU program".into())),
                },
            };
        }
        let (inputs, outputs) = (&inputs[..step.inputs.len()], &mut outputs[..step.outputs.len()]);
        node.op.cpu(&mut cpu::Call::new(&step.x, &step.y, inputs, outputs))
    }
}

/// Most operands of a node, and most places that they lie in: of nearly every node, and of any.
const FEW: usize = 12;
const MOST: usize = 128;

/// What a node needs on the CPU, worked out once.
struct Step {
    x: Vec<Spec>,
    y: Vec<Spec>,
    /// Memory that the node borrows: parts of the arena by offset, then states by number.
    pieces: Vec<Piece>,
    inputs: Vec<Source>,
    /// Pieces.
    outputs: Vec<usize>,
}

/// A part of the arena (offset, bytes) or a state (number, bytes).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Piece {
    Arena(usize, usize),
    State(usize, usize),
}

/// Where an input is: a weight, a piece, or the memory of an output.
enum Source {
    Weight(usize),
    Piece(usize),
    Output(usize),
}

impl Step {
    /// As many as its inputs, its outputs or their places are.
    fn operands(&self) -> usize {
        self.inputs.len().max(self.outputs.len()).max(self.pieces.len())
    }

    fn new(graph: &Graph, plan: &Plan, node: &Node) -> Result<Step> {
        let specs = |vars: &[Var]| vars.iter().map(|&v| graph.spec(v)).collect::<Vec<_>>();
        let wrong = |what: &str| Error::invalid(format!("node `{}`: {what}", node.label));
        let piece = |v: Var| match plan.places[v.index()] {
            Place::Arena(offset) => Some(Piece::Arena(offset, graph.spec(v).bytes())),
            Place::State(s) => Some(Piece::State(s.index(), graph.spec(s).bytes())),
            _ => None,
        };
        let mut pieces: Vec<Piece> = node.x.iter().chain(&node.y).filter_map(|&v| piece(v)).collect();
        pieces.sort_unstable();
        pieces.dedup();
        if node.x.len().max(node.y.len()).max(pieces.len()) > MOST {
            return Err(wrong(&format!("want at most {MOST} operands")));
        }
        let find = |v: Var| piece(v).and_then(|p| pieces.binary_search(&p).ok());
        let outputs = node.y.iter().map(|&v| find(v).ok_or_else(|| wrong("an output without a place")));
        let outputs = outputs.collect::<Result<Vec<_>>>()?;
        let mut inputs = Vec::with_capacity(node.x.len());
        for &v in &node.x {
            inputs.push(match (plan.places[v.index()], find(v)) {
                (Place::Weight(w), _) => Source::Weight(w.index()),
                (_, Some(i)) => outputs.iter().position(|&o| o == i).map_or(Source::Piece(i), Source::Output),
                _ => return Err(wrong("an input without a place")),
            });
        }
        Ok(Step { x: specs(&node.x), y: specs(&node.y), pieces, inputs, outputs })
    }
}

/// Runs one op on host tensors on a device: for tests and benches of single rooms.
///
/// # Errors
/// Those of the op and of the device.
pub fn run_op(device: &Device, op: &Op, x: &[HostTensor]) -> Result<Vec<HostTensor>> {
    let mut g = Graph::new();
    let updated = |i: usize| op.updates().iter().any(|&(_, input)| input == i);
    let vars: Vec<Var> = (x.iter().map(HostTensor::spec).enumerate())
        .map(|(i, s)| {
            let name = format!("x{i}");
            if updated(i) { g.state(&name, s.dtype, s.shape) } else { g.input(&name, s.dtype, s.shape) }
        })
        .collect();
    let y = g.push_all(op.name(), op.clone(), &vars)?;
    op.updates().iter().for_each(|&(output, input)| g.update(vars[input], y[output]));
    y.iter().enumerate().for_each(|(i, &v)| g.output(&format!("y{i}"), v));
    let mut program = Program::new(g, &Weights::new(device), device)?;
    for (i, t) in x.iter().enumerate() {
        program.write(&format!("x{i}"), t)?;
    }
    program.run(&mut ())?;
    (0..y.len()).map(|i| program.read(&format!("y{i}"))).collect()
}

/// Bytes of an element type's value, for messages.
pub fn human_bytes(bytes: usize) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    if mib >= 1024.0 { format!("{:.2} GiB", mib / 1024.0) } else { format!("{mib:.1} MiB") }
}
