//! Static graphs: a model is a function that builds one for a batch, a size and an element type.

mod autodiff;
mod fuse;
mod gather;
mod plan;
mod show;
mod stats;

pub use autodiff::gradients;
pub use fuse::{Rewrite, fuse};
pub use plan::{Life, Place, Plan, offsets};
pub use stats::GivenStats;

use crate::backend::Device;
use crate::error::{Error, Result};
use crate::ops::{Cost, Op, cast};
use crate::tensor::{DType, Shape, Spec};

/// A value of a graph.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Var(pub(crate) u32);

impl Var {
    /// Position among the graph's values.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a graph is to run on: rooms may offer a rewrite, and need memory, for one of them alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// The host's cores.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl From<&Device> for Target {
    fn from(device: &Device) -> Target {
        match device {
            Device::Cpu => Target::Cpu,
            Device::Cuda(_) => Target::Cuda,
        }
    }
}

/// How a checkpoint stores a weight, compared with how the engine holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// The same axes.
    Same,
    /// Stored (O,I,KH,KW), held (O,KH,KW,I).
    Conv,
    /// Held (O,I); stored so, or as a convolution (O,I,1,1).
    Linear,
}

/// Where a value comes from.
#[derive(Clone, PartialEq, Debug)]
pub enum Origin {
    /// Written by the caller before a run; keeps its contents from run to run.
    Input,
    /// Read from a checkpoint once; shared by programs, never written.
    Weight(Layout),
    /// Lives in memory of its own and is updated by the graph.
    State,
    /// Output number `.1` of node `.0`.
    Node(usize, usize),
}

/// When a node has to run: what it makes depends on nothing that changes more often.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Due {
    /// Once: on weights alone, such as those of a convolution behind an upsampling, which are added up for its four phases.
    Once,
    /// After an input was written, in a graph with states, which is run again and again: such as keys and values of a prompt.
    Input,
    /// In each run.
    Always,
}

/// A value: what is known about it before it exists.
#[derive(Clone, PartialEq, Debug)]
pub struct Value {
    /// Type and axes.
    pub spec: Spec,
    /// Name of an input, weight or state; empty for node outputs.
    pub name: String,
    /// Where it comes from.
    pub origin: Origin,
}

/// One operation with its inputs and outputs.
#[derive(Clone, PartialEq, Debug)]
pub struct Node {
    /// The operation.
    pub op: Op,
    /// Inputs.
    pub x: Vec<Var>,
    /// Outputs.
    pub y: Vec<Var>,
    /// Where in the model it stands, such as `unet.mid_block.resnets.0.conv1`.
    pub label: String,
}

/// A weight of a graph that trains.
#[derive(Clone, PartialEq, Debug)]
pub struct Parameter {
    /// Its name in the checkpoint.
    pub name: String,
    /// How a checkpoint stores it.
    pub layout: Layout,
    /// The state that holds it, f32: the master weight.
    pub state: Var,
    /// What the model computes with: the state itself, or the state in the model's type. Gradients are taken of it.
    pub used: Var,
}

/// A graph: values, and nodes in the order in which they run.
#[derive(Clone, Default, Debug)]
pub struct Graph {
    values: Vec<Value>,
    nodes: Vec<Node>,
    outputs: Vec<(String, Var)>,
    updates: Vec<(Var, Var)>,
    trains: bool,
    part: String,
    parameters: Vec<Parameter>,
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Graph {
        Graph::default()
    }

    fn value(&mut self, name: &str, spec: Spec, origin: Origin) -> Var {
        self.values.push(Value { spec, name: name.into(), origin });
        Var(self.values.len() as u32 - 1)
    }

    /// A graph with the leaves of this one alone, and by this one's values those of the new one, as far as they are there.
    fn leaves(&self) -> (Graph, Vec<Var>) {
        let (mut out, mut map) = (Graph::new(), vec![Var(u32::MAX); self.values.len()]);
        for (i, v) in self.values.iter().enumerate().filter(|(_, v)| !matches!(v.origin, Origin::Node(..))) {
            map[i] = out.value(&v.name, v.spec, v.origin.clone());
        }
        (out, map)
    }

    /// Gives a graph that was made of the old one's [`Graph::leaves`] its outputs and updates.
    fn ends(&mut self, old: &Graph, map: &[Var]) {
        self.outputs = old.outputs.iter().map(|(name, v)| (name.clone(), map[v.index()])).collect();
        self.updates = old.updates.iter().map(|(s, v)| (map[s.index()], map[v.index()])).collect();
    }

    fn named(&self, name: &str) -> Option<Var> {
        let at = self.values.iter().position(|v| v.name == name && !matches!(v.origin, Origin::Node(..)))?;
        Some(Var(at as u32))
    }

    /// An input that the caller writes.
    pub fn input(&mut self, name: &str, dtype: DType, shape: impl Into<Shape>) -> Var {
        self.value(name, Spec::new(dtype, shape), Origin::Input)
    }

    /// From now on, weights are parameters (or not): each is a state in f32 that this graph may update, see [`Parameter`].
    pub fn train(&mut self, on: bool) {
        self.trains = on;
    }

    /// From now on, names of weights begin with `part` and a dot, so that several models fit into one graph; with an empty
    /// `part` no longer.
    pub fn part(&mut self, part: &str) {
        self.part = part.into();
    }

    /// The weights that were asked for while the graph trained, in that order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// A weight, by its name in the checkpoint. The same name twice is the same value. In a graph that trains, a parameter.
    ///
    /// # Errors
    /// When the name is there already with another shape, type or layout.
    pub fn weight(
        &mut self,
        name: &str,
        layout: Layout,
        dtype: DType,
        shape: impl Into<Shape>,
    ) -> Result<Var> {
        let spec = Spec::new(dtype, shape);
        let full = format!("{}.{name}", self.part);
        let name = if self.part.is_empty() { name } else { &full };
        if let Some(p) = self.parameters.iter().find(|p| p.name == name) {
            let old = self.spec(p.used);
            if old == spec && p.layout == layout {
                return Ok(p.used);
            }
            return Err(Error::invalid(format!("parameter `{name}` is used as {old} and as {spec}")));
        }
        if self.trains {
            let state = self.state(name, DType::F32, spec.shape);
            let used = cast(self, name, state, dtype, 1.0)?;
            self.parameters.push(Parameter { name: name.into(), layout, state, used });
            return Ok(used);
        }
        if let Some(v) = self.named(name) {
            let old = &self.values[v.index()];
            if old.spec == spec && old.origin == Origin::Weight(layout) {
                return Ok(v);
            }
            return Err(Error::invalid(format!("weight `{name}` is used as {} and as {spec}", old.spec)));
        }
        Ok(self.value(name, spec, Origin::Weight(layout)))
    }

    /// A state: memory that outlives a run. Give it a new value with [`Graph::update`].
    pub fn state(&mut self, name: &str, dtype: DType, shape: impl Into<Shape>) -> Var {
        self.value(name, Spec::new(dtype, shape), Origin::State)
    }

    /// `new` is what `state` holds from now on. `new` must be made by an op that updates in place.
    pub fn update(&mut self, state: Var, new: Var) {
        self.updates.push((state, new));
    }

    /// Names a value that the caller reads after a run.
    pub fn output(&mut self, name: &str, v: Var) {
        self.outputs.push((name.into(), v));
    }

    /// Appends an operation and returns all of its outputs.
    ///
    /// # Errors
    /// The operation's own judgement of its inputs, with the label.
    pub fn push_all(&mut self, label: &str, op: impl Into<Op>, x: &[Var]) -> Result<Vec<Var>> {
        let op = op.into();
        let specs: Vec<Spec> = x.iter().map(|&v| self.spec(v)).collect();
        let out = op.infer(&specs).map_err(|e| e.at_node(label))?;
        let node = self.nodes.len();
        let y: Vec<Var> =
            out.into_iter().enumerate().map(|(i, s)| self.value("", s, Origin::Node(node, i))).collect();
        self.nodes.push(Node { op, x: x.to_vec(), y: y.clone(), label: label.into() });
        Ok(y)
    }

    /// Appends an operation and returns its first output.
    ///
    /// # Errors
    /// As [`Graph::push_all`].
    pub fn push(&mut self, label: &str, op: impl Into<Op>, x: &[Var]) -> Result<Var> {
        Ok(self.push_all(label, op, x)?[0])
    }

    /// Type and axes of a value.
    pub fn spec(&self, v: Var) -> Spec {
        self.values[v.index()].spec
    }

    /// Axes of a value.
    pub fn shape(&self, v: Var) -> Shape {
        self.spec(v).shape
    }

    /// All values.
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// All nodes, in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Named outputs.
    pub fn outputs(&self) -> &[(String, Var)] {
        &self.outputs
    }

    /// Pairs (state, value that it takes).
    pub fn updates(&self) -> &[(Var, Var)] {
        &self.updates
    }

    /// The weights, in order of first use.
    pub fn weights(&self) -> impl Iterator<Item = (Var, &Value, Layout)> {
        self.values.iter().enumerate().filter_map(|(i, v)| match v.origin {
            Origin::Weight(layout) => Some((Var(i as u32), v, layout)),
            _ => None,
        })
    }

    /// Work of one node.
    pub fn cost(&self, node: &Node) -> Cost {
        let specs = |vars: &[Var]| vars.iter().map(|&v| self.spec(v)).collect::<Vec<_>>();
        node.op.cost(&specs(&node.x), &specs(&node.y))
    }

    /// Work of one run.
    pub fn total_cost(&self) -> Cost {
        self.nodes.iter().fold(Cost::default(), |mut sum, n| {
            sum += self.cost(n);
            sum
        })
    }

    /// How often each value is used, as an input, an output of the graph or a state's new value.
    pub(crate) fn uses(&self) -> Vec<usize> {
        let mut uses = vec![0; self.values.len()];
        let read = self.nodes.iter().flat_map(|n| &n.x);
        let kept = self.outputs.iter().map(|(_, v)| v).chain(self.updates.iter().map(|(_, v)| v));
        read.chain(kept).for_each(|v| uses[v.index()] += 1);
        uses
    }

    /// By node: when it has to run.
    pub fn due(&self) -> Vec<Due> {
        // A graph without states is run for its inputs.
        let input = if self.updates.is_empty() { Due::Always } else { Due::Input };
        let mut due: Vec<Due> = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let of = |x: &Var| match self.values[x.index()].origin {
                Origin::Weight(_) => Due::Once,
                Origin::Input => input,
                Origin::State => Due::Always,
                Origin::Node(maker, _) => due[maker],
            };
            let own = if node.op.updates().is_empty() { Due::Once } else { Due::Always };
            due.push(node.x.iter().map(of).fold(own, Due::max));
        }
        due
    }

    /// The node that made a value.
    pub fn maker(&self, v: Var) -> Option<&Node> {
        match self.values[v.index()].origin {
            Origin::Node(n, _) => Some(&self.nodes[n]),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Add;

    #[test]
    fn a_wrong_shape_names_the_node() {
        let mut g = Graph::new();
        let a = g.input("a", DType::F32, [2, 3]);
        let b = g.input("b", DType::F32, [3, 2]);
        let e = g.push("mid.add", Add, &[a, b]).unwrap_err().to_string();
        assert!(e.contains("add \"mid.add\"") && e.contains("f32(2,3), f32(3,2)"), "{e}");
    }

    #[test]
    fn a_weight_is_one_value() {
        let mut g = Graph::new();
        let a = g.weight("w", Layout::Same, DType::F32, [4]).unwrap();
        assert_eq!(g.weight("w", Layout::Same, DType::F32, [4]).unwrap(), a);
        assert!(g.weight("w", Layout::Same, DType::F32, [5]).is_err());
        g.part("other");
        let b = g.weight("w", Layout::Same, DType::F32, [5]).unwrap();
        assert_eq!(g.values()[b.index()].name, "other.w");
        g.part("");
        assert_eq!(g.weight("w", Layout::Same, DType::F32, [4]).unwrap(), a);
    }
}
