//! Reverse-mode differentiation as a pass over a graph: gradients are nodes like all others, planned and fused with them.
//!
//! The vector-Jacobian product of each node is its room's [`Operation::grad`](crate::ops::Operation::grad); this file only
//! walks backwards, adds up what reaches a value on several ways (in the order of the walk, so that the bits are always
//! the same), and makes blocks that were not kept once more before they are differentiated (Chen et al. 2016).

use super::{Graph, Origin, Var};
use crate::error::{Error, Result};
use crate::ops::{Add, cast};
use crate::tensor::DType;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Appends to `g` the gradients of Σ ⟨dy, y⟩ over `seeds` (y, dy) with respect to `wrt`, in that order; `None` for a value
/// that no y depends on.
///
/// A gradient has the shape of its value. Its type is that of the value, or f32: weights get theirs in f32, whatever they are
/// multiplied in.
///
/// `again` are ranges of nodes, in order and apart from each other, whose inner values are computed a second time where the
/// backward pass needs them, instead of being kept for it.
///
/// # Errors
/// [`Error::NoGradient`] where a node has no rule; [`Error::Invalid`] where seeds or ranges do not fit the graph.
pub fn gradients(
    g: &mut Graph,
    seeds: &[(Var, Var)],
    wrt: &[Var],
    again: &[Range<usize>],
) -> Result<Vec<Option<Var>>> {
    let end = g.nodes.len();
    let apart = again.windows(2).all(|w| w[0].end <= w[1].start);
    if !apart || again.iter().any(|r| r.is_empty() || r.end > end) {
        return Err(Error::invalid(format!(
            "gradients: want ranges of nodes, in order, below {end}; got {again:?}"
        )));
    }
    let mut walk = Walk { depends: depends(g, wrt), sums: BTreeMap::new(), remade: BTreeMap::new() };
    for &(y, dy) in seeds {
        walk.reach(g, y, dy)?;
    }
    for at in (0..end).rev() {
        let node = g.nodes[at].clone();
        let dy: Vec<Option<Var>> = node.y.iter().map(|y| walk.sums.get(y).copied()).collect();
        if dy.iter().all(Option::is_none) || !node.x.iter().any(|x| walk.depends[x.index()]) {
            continue;
        }
        if let Some(range) = again.iter().find(|r| r.contains(&at)) {
            walk.remake(g, range, &node.x, &node.y)?;
        }
        let (x, y) = (walk.found(&node.x), walk.found(&node.y));
        let first = g.nodes.len();
        let dx = node.op.grad(g, &x, &y, &dy).map_err(|e| e.at_node(&node.label))?;
        for new in &mut g.nodes[first..] {
            new.label = format!("{}.{}", node.label, new.label);
        }
        if dx.len() != node.x.len() {
            return Err(Error::invalid(format!(
                "{} \"{}\": its gradient rule gives {} of {} gradients",
                node.op.name(),
                node.label,
                dx.len(),
                node.x.len()
            )));
        }
        for (&x, dx) in node.x.iter().zip(dx) {
            if let Some(dx) = dx.filter(|_| walk.depends[x.index()]) {
                walk.reach(g, x, dx)?;
            }
        }
    }
    Ok(wrt.iter().map(|v| walk.sums.get(v).copied()).collect())
}

/// By value: whether it is one of `wrt`, or made from one.
fn depends(g: &Graph, wrt: &[Var]) -> Vec<bool> {
    let mut depends = vec![false; g.values.len()];
    wrt.iter().for_each(|v| depends[v.index()] = true);
    for node in &g.nodes {
        if node.x.iter().any(|x| depends[x.index()]) {
            node.y.iter().for_each(|y| depends[y.index()] = true);
        }
    }
    depends
}

struct Walk {
    depends: Vec<bool>,
    /// What has reached each value so far.
    sums: BTreeMap<Var, Var>,
    /// Inner values of blocks that were made again.
    remade: BTreeMap<Var, Var>,
}

impl Walk {
    /// Adds a gradient to what has reached a value.
    fn reach(&mut self, g: &mut Graph, v: Var, d: Var) -> Result<()> {
        let (value, got) = (g.spec(v), g.spec(d));
        if value.shape != got.shape || (got.dtype != value.dtype && got.dtype != DType::F32) {
            let of = g.maker(v).map_or(g.values[v.index()].name.clone(), |n| n.label.clone());
            return Err(Error::invalid(format!("gradient of `{of}`: want the shape of {value}; got {got}")));
        }
        let sum = match self.sums.get(&v).copied() {
            None => d,
            Some(sum) => {
                // A value of a 16-bit type that is both a weight and an activation: in f32.
                let wide = if g.spec(sum).dtype == got.dtype { got.dtype } else { DType::F32 };
                let label = g.maker(v).map_or(g.values[v.index()].name.clone(), |n| n.label.clone());
                let sum = cast(g, &format!("{label}.sum.wide"), sum, wide, 1.0)?;
                let d = cast(g, &format!("{label}.sum.wide"), d, wide, 1.0)?;
                g.push(&format!("{label}.sum"), Add, &[sum, d])?
            }
        };
        self.sums.insert(v, sum);
        Ok(())
    }

    /// The values that stand for these in the backward pass.
    fn found(&self, vars: &[Var]) -> Vec<Var> {
        vars.iter().map(|v| self.remade.get(v).copied().unwrap_or(*v)).collect()
    }

    /// Makes the nodes of `range` once more, unless the walk has done it before. Values that are read outside stay what they
    /// are: they are kept anyway.
    fn remake(&mut self, g: &mut Graph, range: &Range<usize>, x: &[Var], y: &[Var]) -> Result<()> {
        let inner = |v: &Var| matches!(g.values[v.index()].origin, Origin::Node(n, _) if range.contains(&n));
        if x.iter().chain(y).filter(|v| inner(v)).any(|v| self.remade.contains_key(v)) {
            return Ok(());
        }
        let outside = |n: &usize| !range.contains(n);
        let read: BTreeSet<Var> = (0..g.nodes.len())
            .filter(outside)
            .flat_map(|n| g.nodes[n].x.clone())
            .chain(g.outputs.iter().map(|(_, v)| *v))
            .chain(g.updates.iter().map(|(_, v)| *v))
            .collect();
        // Weights in the type that is computed in are kept: forward and backward pass read them.
        let weights: BTreeSet<Var> = g.parameters.iter().map(|p| p.used).collect();
        let mut map: BTreeMap<Var, Var> = BTreeMap::new();
        for n in range.clone() {
            let node = g.nodes[n].clone();
            if node.y.iter().any(|y| weights.contains(y)) {
                continue;
            }
            let x: Vec<Var> = node.x.iter().map(|v| map.get(v).copied().unwrap_or(*v)).collect();
            let y = g.push_all(&format!("{}.again", node.label), node.op, &x)?;
            for (old, new) in node.y.into_iter().zip(y) {
                // Also in the map of what others in the block read: a value that is kept needs no second making.
                let kept = if read.contains(&old) { old } else { new };
                map.insert(old, kept);
                self.remade.insert(old, kept);
            }
        }
        Ok(())
    }
}
