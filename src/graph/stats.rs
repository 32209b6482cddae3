//! Who tells a group norm the statistics of its input: the op that made it, where it can; else a pass of its own.

use super::{Graph, Var};
use crate::error::Result;
use crate::ops::{GroupStats, Op};
use std::collections::{HashMap, HashSet};

/// An offer: compute the same from statistics that are given.
#[derive(Clone, PartialEq, Debug)]
pub struct GivenStats {
    /// The op that takes over.
    pub op: Op,
    /// Its inputs before the statistics.
    pub x: Vec<Var>,
    /// Whose [`channel_stats`](crate::ops::channel_stats) follow as its last inputs.
    pub of: Vec<Var>,
}

/// The same graph, where every op that can be given statistics is. An op that makes a value and can emit its statistics
/// does so, once for all that read them; of any other value one [`GroupStats`] computes them.
///
/// # Errors
/// When an op refuses the inputs that it has offered to take: a fault of its room.
pub(super) fn give_stats(g: &Graph) -> Result<Graph> {
    let offers: Vec<_> = g.nodes.iter().map(|node| node.op.given_stats(g, &node.x)).collect();
    let wanted: HashSet<Var> = offers.iter().flatten().flat_map(|offer| offer.of.iter().copied()).collect();
    let (mut out, mut map) = g.leaves();
    let mut stats: HashMap<Var, Var> = HashMap::new();
    for (node, offer) in g.nodes.iter().zip(offers) {
        let (mut op, mut x, of) = match offer {
            Some(offer) => (offer.op, offer.x, offer.of),
            None => (node.op.clone(), node.x.clone(), vec![]),
        };
        x.iter_mut().for_each(|v| *v = map[v.index()]);
        for v in of {
            let made = match stats.get(&v) {
                Some(&made) => made,
                None => out.push(&format!("{}.stats", node.label), GroupStats, &[map[v.index()]])?,
            };
            stats.insert(v, made);
            x.push(made);
        }
        let specs: Vec<_> = x.iter().map(|&v| out.spec(v)).collect();
        if let Some((form, input, first)) = op.prepared(&specs) {
            x[input] = out.push(&format!("{}.{}", node.label, first.name()), first, &[x[input]])?;
            op = form;
        }
        let asked = node.y.first().filter(|y| wanted.contains(y));
        let specs: Vec<_> = x.iter().map(|&v| out.spec(v)).collect();
        let emits = asked.and_then(|&y| Some((y, op.with_stats(&specs)?)));
        if let Some((_, emitting)) = &emits {
            op = emitting.clone();
        }
        let y = out.push_all(&node.label, op, &x)?;
        node.y.iter().zip(&y).for_each(|(old, &new)| map[old.index()] = new);
        if let Some((of, _)) = emits {
            stats.extend(y.last().map(|&made| (of, made)));
        }
    }
    out.ends(g, &map);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use crate::error::Result;
    use crate::graph::{Graph, Layout, Node, Target, Var, fuse};
    use crate::ops::{Act, Activation, Concat, Conv2d, Given, GroupNorm, Op};
    use crate::tensor::DType;

    fn norm(g: &mut Graph, x: Var, groups: usize) -> Result<Var> {
        let c = g.shape(x).last();
        let [w, b] = ["w", "b"].map(|name| g.weight(&format!("{name}{c}"), Layout::Same, DType::F16, [c]));
        g.push("norm", GroupNorm::new(groups, 1e-5, Act::Silu), &[x, w?, b?])
    }

    fn given(g: &Graph) -> Vec<Given> {
        let form = |n: &Node| if let Op::GroupNorm(norm) = &n.op { Some(norm.given) } else { None };
        g.nodes().iter().filter_map(form).collect()
    }

    fn count(g: &Graph, name: &str) -> usize {
        g.nodes().iter().filter(|n| n.op.name() == name).count()
    }

    /// silu(x), two norms of it; a norm of [silu(x) | x].
    fn graph(side: usize) -> Result<Graph> {
        let mut g = Graph::new();
        let x = g.input("x", DType::F16, [2, side, side, 24]);
        let a = g.push("a", Activation(Act::Silu), &[x])?;
        for groups in [2, 3] {
            let y = norm(&mut g, a, groups)?;
            g.output(&format!("y{groups}"), y);
        }
        let both = g.push("both", Concat, &[a, x])?;
        let y = norm(&mut g, both, 4)?;
        g.output("both", y);
        Ok(g)
    }

    #[test]
    fn norms_share_statistics_and_need_no_concatenation() {
        let g = fuse(&graph(8).unwrap(), Target::Cuda).unwrap();
        assert_eq!(given(&g), [Given::Stats, Given::Stats, Given::Halves]);
        assert_eq!(count(&g, "group_stats"), 2, "of a and of x, each once\n{}", g.show(None));
        assert_eq!(count(&g, "concat"), 0, "{}", g.show(None));
    }

    #[test]
    fn the_cpu_and_images_without_slabs_keep_the_plain_norm() {
        for (side, target) in [(8, Target::Cpu), (4, Target::Cuda)] {
            let g = fuse(&graph(side).unwrap(), target).unwrap();
            assert_eq!(given(&g), [Given::Input; 3]);
            assert_eq!((count(&g, "group_stats"), count(&g, "concat")), (0, 1));
        }
    }

    #[test]
    fn a_maker_that_can_emit_statistics_is_asked_to() {
        let mut g = Graph::new();
        let x = g.input("x", DType::F16, [1, 16, 16, 32]);
        let w = g.weight("w", Layout::Conv, DType::F16, [64, 3, 3, 32]).unwrap();
        let b = g.weight("b", Layout::Same, DType::F16, [64]).unwrap();
        let h = g.push("conv", Conv2d::same(3), &[x, w, b]).unwrap();
        for groups in [8, 32] {
            let y = norm(&mut g, h, groups).unwrap();
            g.output(&format!("y{groups}"), y);
        }
        let emits = g.nodes()[0].op.with_stats(&[g.spec(x), g.spec(w), g.spec(b)]).is_some();
        let g = fuse(&g, Target::Cuda).unwrap();
        let conv = &g.nodes()[0];
        assert_eq!(given(&g), [Given::Stats; 2]);
        assert_eq!((count(&g, "group_stats"), conv.y.len()), if emits { (0, 2) } else { (1, 1) });
        let made = if emits { conv.y[1] } else { g.nodes()[1].y[0] };
        let norms = g.nodes().iter().filter(|n| n.op.name() == "group_norm");
        assert!(norms.map(|n| n.x.last()).all(|stats| stats == Some(&made)), "{}", g.show(None));
    }
}
