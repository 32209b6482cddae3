//! Where each value lives: lifetimes to offsets in one arena. A pure function, known before anything runs.

use super::{Due, Graph, Origin, Target, Var};
use crate::error::{Error, Result};
use std::ops::Range;

/// Alignment of every value in the arena, in bytes: a cache line on the CPU, and enough for any vector access.
pub const ALIGN: usize = 256;

/// A value above this, 256 TiB, fits into no memory. Refusing it keeps every sum of sizes below 2^64.
const MAX_BYTES: usize = 1 << 48;

/// A block that must be there from step `first` to step `last`, inclusive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Life {
    /// Size in bytes.
    pub bytes: usize,
    /// First step.
    pub first: usize,
    /// Last step.
    pub last: usize,
}

/// Offsets for blocks such that no two that live at the same time overlap, and the bytes that this takes.
///
/// Largest first, each into the lowest gap that holds it: within a few per cent of the lower bound on these models.
pub fn offsets(lives: &[Life]) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lives[i].bytes), lives[i].first, i));
    let mut at = vec![0; lives.len()];
    let mut placed: Vec<usize> = Vec::new();
    let mut total = 0;
    for i in order {
        let life = lives[i];
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&j| lives[j].first <= life.last && life.first <= lives[j].last)
            .map(|&j| (at[j], at[j] + lives[j].bytes))
            .collect();
        taken.sort_unstable();
        let mut offset = 0usize;
        for (start, end) in taken {
            if offset + life.bytes <= start {
                break;
            }
            offset = offset.max(end.next_multiple_of(ALIGN));
        }
        at[i] = offset;
        total = total.max(offset + life.bytes);
        placed.push(i);
    }
    (at, total.next_multiple_of(ALIGN))
}

/// Where a value is found.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Place {
    /// Offset in the arena, in bytes.
    Arena(usize),
    /// The weight of this value.
    Weight(Var),
    /// The state of this value.
    State(Var),
    /// Nowhere: nothing uses it.
    Unused,
}

/// A planned graph: a place for every value, and the memory that a run takes.
#[derive(Clone, Debug)]
pub struct Plan {
    /// By value.
    pub places: Vec<Place>,
    /// Bytes of the arena: inputs, outputs, intermediate values and scratch.
    pub arena: usize,
    /// By node: the bytes of the arena that are its scratch; none on a CPU, whose code takes its own.
    pub scratch: Vec<Range<usize>>,
    /// Bytes of weights.
    pub weights: usize,
    /// Bytes of states.
    pub states: usize,
}

impl Plan {
    /// Plans a graph for a target.
    ///
    /// # Errors
    /// When a value is larger than any memory, or a state is updated by a value that is not made in place of it.
    pub fn new(g: &Graph, target: Target) -> Result<Plan> {
        let values = g.values();
        if let Some(v) = values.iter().find(|v| v.spec.bytes() > MAX_BYTES) {
            let spec = v.spec;
            return Err(Error::invalid(format!(
                "a value {spec} of the graph fits into no memory: ask for less"
            )));
        }
        let end = g.nodes().len();
        let uses = g.uses();
        // A block is a set of values that share memory; `block[v]` is its first value.
        let mut block: Vec<usize> = (0..values.len()).collect();
        let mut last: Vec<usize> = vec![0; values.len()];
        let mut pinned = vec![false; values.len()];
        for (step, node) in g.nodes().iter().enumerate() {
            node.x.iter().for_each(|v| last[v.index()] = step);
            node.y.iter().for_each(|v| last[v.index()] = last[v.index()].max(step));
        }
        for (_, v) in g.outputs() {
            last[v.index()] = end;
            pinned[v.index()] = true;
        }
        for (i, v) in values.iter().enumerate() {
            pinned[i] |= v.origin == Origin::Input;
        }
        // What a node makes stays in its place for nodes that run more often, as inputs do.
        let due = g.due();
        let before = |i: usize, other: Due| matches!(values[i].origin, Origin::Node(n, _) if due[n] < other);
        let mut kept: Vec<bool> = (0..values.len()).map(|i| before(i, Due::Always) && pinned[i]).collect();
        for (node, own) in g.nodes().iter().zip(&due) {
            node.x.iter().filter(|x| before(x.index(), *own)).for_each(|x| kept[x.index()] = true);
        }
        for i in (0..values.len()).filter(|&i| kept[i]) {
            (pinned[i], last[i]) = (true, end);
        }
        for (step, node) in g.nodes().iter().enumerate() {
            for &(output, input) in node.op.updates() {
                let (from, to) = (node.x[input].index(), node.y[output].index());
                let root = block[from];
                if values[root].origin != Origin::State || last[from] != step {
                    let name = format!("{} \"{}\": input {input}", node.op.name(), node.label);
                    return Err(Error::invalid(format!(
                        "{name} must be a state that nothing reads afterwards"
                    )));
                }
                block[to] = root;
            }
            for &(output, input) in node.op.in_place() {
                let (from, to) = (node.x[input].index(), node.y[output].index());
                let root = block[from];
                let fits = values[from].spec.bytes() == values[to].spec.bytes();
                let dies = last[from] == step
                    && !pinned[root]
                    && !pinned[from]
                    && node.x.iter().filter(|&&v| block[v.index()] == root).count() == 1;
                if fits && dies && matches!(values[root].origin, Origin::Node(..)) {
                    block[to] = root;
                }
            }
        }
        for &(state, new) in g.updates() {
            if block[new.index()] != state.index() {
                return Err(Error::invalid(format!(
                    "state `{}`: its new value is not computed in place; update it with an op that does",
                    values[state.index()].name
                )));
            }
        }
        let mut places = vec![Place::Unused; values.len()];
        let mut lives: Vec<Life> = Vec::new();
        let mut life_of = vec![usize::MAX; values.len()];
        let (mut weights, mut states) = (0, 0);
        for (i, v) in values.iter().enumerate() {
            let var = Var(i as u32);
            match v.origin {
                Origin::Weight(_) => {
                    weights += v.spec.bytes();
                    places[i] = Place::Weight(var);
                }
                Origin::State => {
                    states += v.spec.bytes();
                    places[i] = Place::State(var);
                }
                Origin::Input => {
                    life_of[i] = lives.len();
                    lives.push(Life { bytes: v.spec.bytes(), first: 0, last: end });
                }
                Origin::Node(step, _) => {
                    let root = block[i];
                    if values[root].origin == Origin::State {
                        places[i] = Place::State(Var(root as u32));
                    } else if root != i {
                        let life: &mut Life = &mut lives[life_of[root]];
                        life.last = life.last.max(last[i]);
                        life.first = if kept[i] { 0 } else { life.first };
                        life_of[i] = life_of[root];
                    } else {
                        // An output that nothing reads still needs a place while its node runs.
                        let last = if uses[i] == 0 { step } else { last[i] };
                        life_of[i] = lives.len();
                        let first = if kept[i] { 0 } else { step };
                        lives.push(Life { bytes: v.spec.bytes(), first, last });
                    }
                }
            }
        }
        let mut scratch_life = Vec::new();
        for (step, node) in g.nodes().iter().enumerate() {
            let specs = |vars: &[Var]| vars.iter().map(|&v| g.spec(v)).collect::<Vec<_>>();
            let bytes = match target {
                Target::Cpu => 0,
                Target::Cuda => node.op.scratch(&specs(&node.x), &specs(&node.y)),
            };
            scratch_life.push(lives.len());
            lives.push(Life { bytes, first: step, last: step });
        }
        let (at, arena) = offsets(&lives);
        for (i, place) in places.iter_mut().enumerate() {
            if life_of[i] != usize::MAX {
                *place = Place::Arena(at[life_of[i]]);
            }
        }
        let scratch = scratch_life.iter().map(|&l| at[l]..at[l] + lives[l].bytes).collect();
        Ok(Plan { places, arena, scratch, weights, states })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Act, Activation, Add};
    use crate::rng::Small;
    use crate::tensor::DType;

    #[test]
    fn blocks_that_live_together_never_overlap() {
        let mut r = Small::new(7);
        for _ in 0..200 {
            let lives: Vec<Life> = (0..r.below(40) + 1)
                .map(|_| {
                    let first = r.below(20);
                    Life { bytes: r.below(5000), first, last: first + r.below(6) }
                })
                .collect();
            let (at, total) = offsets(&lives);
            for i in 0..lives.len() {
                assert!(at[i] % ALIGN == 0 && at[i] + lives[i].bytes <= total);
                for j in 0..i {
                    let together = lives[i].first <= lives[j].last && lives[j].first <= lives[i].last;
                    let apart = at[i] + lives[i].bytes <= at[j] || at[j] + lives[j].bytes <= at[i];
                    assert!(!together || apart || lives[i].bytes == 0 || lives[j].bytes == 0);
                }
            }
        }
    }

    #[test]
    fn a_chain_needs_two_blocks_and_an_elementwise_one_a_single_block() {
        let mut g = Graph::new();
        let x = g.input("x", DType::F32, [1024]);
        let mut v = g.push("first", Add, &[x, x]).unwrap();
        for i in 0..8 {
            v = g.push(&format!("silu.{i}"), Activation(Act::Silu), &[v]).unwrap();
        }
        g.output("y", v);
        let plan = Plan::new(&g, Target::Cpu).unwrap();
        assert_eq!(plan.arena, 2 * 4096, "x, and one block that every result takes over");
    }

    #[test]
    fn an_input_is_never_overwritten() {
        let mut g = Graph::new();
        let x = g.input("x", DType::F32, [64]);
        let y = g.push("silu", Activation(Act::Silu), &[x]).unwrap();
        g.output("y", y);
        let plan = Plan::new(&g, Target::Cpu).unwrap();
        assert_ne!(plan.places[x.index()], plan.places[y.index()]);
    }
}
