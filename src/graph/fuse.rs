//! Fusion: each room may offer a cheaper way to compute what it made; offers are taken until none is left.

use super::gather::gather;
use super::stats::give_stats;
use super::{Graph, Node, Origin, Target, Value, Var};
use crate::error::Result;
use crate::ops::Op;

/// An offer: compute the same value by another op from other inputs.
#[derive(Clone, PartialEq, Debug)]
pub struct Rewrite {
    /// The op that takes over.
    pub op: Op,
    /// Its inputs. All must exist before the node that is replaced.
    pub x: Vec<Var>,
    /// Values among the inputs that are made in another way from now on, and how. Nothing else may read them.
    pub made: Vec<(Var, Op, Vec<Var>)>,
}

/// The same graph with every offer for a target taken, and what nothing uses any more left out; on a GPU also with norms given
/// their statistics and, unless it trains, products of one value in one launch.
///
/// # Errors
/// When an offer has inputs that its op refuses: a fault of the room.
pub fn fuse(g: &Graph, target: Target) -> Result<Graph> {
    let mut g = g.clone();
    for at in 0..g.nodes.len() {
        let offer = |g: &Graph| {
            let rewrite = g.nodes[at].op.fuse(g, *g.nodes[at].y.first()?, target)?;
            exists(g, &rewrite, at).then_some(rewrite)
        };
        while let Some(rewrite) = offer(&g) {
            for (v, op, x) in rewrite.made {
                let Origin::Node(maker, _) = g.values[v.index()].origin else { continue };
                let specs: Vec<_> = x.iter().map(|&v| g.spec(v)).collect();
                g.values[v.index()].spec = op.infer(&specs).map_err(|e| e.at_node(&g.nodes[maker].label))?[0];
                (g.nodes[maker].op, g.nodes[maker].x) = (op, x);
            }
            let specs: Vec<_> = rewrite.x.iter().map(|&v| g.spec(v)).collect();
            rewrite.op.infer(&specs).map_err(|e| e.at_node(&g.nodes[at].label))?;
            g.nodes[at].op = rewrite.op;
            g.nodes[at].x = rewrite.x;
        }
    }
    match target {
        Target::Cpu => Ok(prune(&g)),
        // Where blocks are made again for their gradients, a product that joins an earlier one would be made long before, and held.
        Target::Cuda if g.parameters.is_empty() => Ok(prune(&give_stats(&gather(&prune(&g))?)?)),
        Target::Cuda => Ok(prune(&give_stats(&g)?)),
    }
}

/// Whether all that an offer for a node takes is made before it is used. Of a graph that trains, weights in a 16-bit type are nodes too,
/// cast where they are first asked for: that may be behind a product that would be joined with theirs.
fn exists(g: &Graph, offer: &Rewrite, at: usize) -> bool {
    let maker = |v: Var| match g.values[v.index()].origin {
        Origin::Node(maker, _) => Some(maker),
        _ => None,
    };
    let before = |x: &[Var], at: usize| x.iter().all(|&v| maker(v).is_none_or(|n| n < at));
    before(&offer.x, at) && offer.made.iter().all(|(v, _, x)| maker(*v).is_none_or(|at| before(x, at)))
}

/// Leaves out nodes whose outputs nothing uses.
fn prune(g: &Graph) -> Graph {
    let mut needed = vec![false; g.values.len()];
    g.outputs.iter().for_each(|(_, v)| needed[v.index()] = true);
    g.updates.iter().for_each(|(_, v)| needed[v.index()] = true);
    let mut keep = vec![false; g.nodes.len()];
    for (i, node) in g.nodes.iter().enumerate().rev() {
        keep[i] = node.y.iter().any(|v| needed[v.index()]);
        if keep[i] {
            node.x.iter().for_each(|v| needed[v.index()] = true);
        }
    }
    let mut map: Vec<Var> = vec![Var(u32::MAX); g.values.len()];
    let mut out = Graph::new();
    let add = |out: &mut Graph, v: Value| {
        out.values.push(v);
        Var(out.values.len() as u32 - 1)
    };
    for (i, v) in g.values.iter().enumerate() {
        // Inputs and states keep their place even if unused: the caller knows them by name.
        let leaf = matches!(v.origin, Origin::Input | Origin::State);
        if leaf || (matches!(v.origin, Origin::Weight(_)) && needed[i]) {
            map[i] = add(&mut out, v.clone());
        }
    }
    for (node, _) in g.nodes.iter().zip(keep).filter(|(_, keep)| *keep) {
        let n = out.nodes.len();
        for (k, y) in node.y.iter().enumerate() {
            let value = Value { origin: Origin::Node(n, k), ..g.values[y.index()].clone() };
            map[y.index()] = add(&mut out, value);
        }
        let mapped = |vars: &[Var]| vars.iter().map(|v| map[v.index()]).collect::<Vec<_>>();
        let (x, y) = (mapped(&node.x), mapped(&node.y));
        out.nodes.push(Node { op: node.op.clone(), x, y, label: node.label.clone() });
    }
    out.ends(g, &map);
    out
}
