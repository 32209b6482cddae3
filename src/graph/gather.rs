//! Products of one value in one launch, where that is faster: keys and values of a prompt, embeddings of a timestep.

use super::{Graph, Origin, Var};
use crate::error::Result;
use crate::ops::launch::predict;
use crate::ops::{LinearGroup, Op};
use std::collections::HashMap;

/// What the predicted time of a group is at most of that of its products. The model knows the group's kernel less well than theirs.
const CLEARLY: f64 = 0.8;

/// The same graph, where [`LinearGroup`]s stand for plain products of one value, each in the place of its first. A product joins the
/// last group that has room, the same kind of inputs, and its first product behind all that the product reads. A group is made, as
/// a whole, if the model of [`crate::ops::launch`] says that it is clearly faster.
///
/// # Errors
/// When a group has inputs that its op refuses: a fault of its room.
pub(super) fn gather(g: &Graph) -> Result<Graph> {
    // By the value that they multiply, in the order of the graph.
    let mut groups: HashMap<Var, Vec<Vec<usize>>> = HashMap::new();
    let specs = |x: &[Var]| x.iter().map(|&v| g.spec(v)).collect::<Vec<_>>();
    let bias = |node: usize| LinearGroup::takes(&g.nodes[node].op, &specs(&g.nodes[node].x));
    for (i, node) in g.nodes.iter().enumerate() {
        let Some(own) = bias(i) else { continue };
        let there = |at: usize| {
            let made = |v: &Var| matches!(g.values[v.index()].origin, Origin::Node(maker, _) if maker >= at);
            !node.x.iter().any(made)
        };
        let all = groups.entry(node.x[0]).or_default();
        let fits = |group: &&mut Vec<usize>| {
            group.len() < crate::ops::MOST_PRODUCTS && bias(group[0]) == Some(own) && there(group[0])
        };
        match all.iter_mut().rev().find(fits) {
            Some(group) => group.push(i),
            None => all.push(vec![i]),
        }
    }

    // By the first node: the op of its group, its inputs, the nodes.
    let mut made: HashMap<usize, (Op, Vec<Var>, Vec<usize>)> = HashMap::new();
    let mut joined = vec![false; g.nodes.len()];
    for group in groups.into_values().flatten().filter(|group| group.len() > 1) {
        let bias = bias(group[0]) == Some(true);
        let op = Op::from(LinearGroup { products: group.len(), bias });
        let first = std::iter::once(g.nodes[group[0]].x[0]);
        let input = |i: usize| group.iter().map(move |&n| g.nodes[n].x[i]);
        let x: Vec<Var> =
            first.chain(input(1)).chain((1..1 + usize::from(bias)).flat_map(|_| input(2))).collect();
        let mut apart = 0.0;
        for &n in &group {
            apart += predict(&g.nodes[n].op, &specs(&g.nodes[n].x))?.1;
        }
        if predict(&op, &specs(&x))?.1 < CLEARLY * apart {
            group.iter().for_each(|&n| joined[n] = true);
            made.insert(group[0], (op, x, group));
        }
    }

    let (mut out, mut map) = g.leaves();
    for (i, node) in g.nodes.iter().enumerate() {
        if let Some((op, x, group)) = made.remove(&i) {
            let x: Vec<Var> = x.iter().map(|v| map[v.index()]).collect();
            let label = format!("{} and {} more", node.label, group.len() - 1);
            let y = out.push_all(&label, op, &x)?;
            group.iter().zip(y).for_each(|(&n, new)| map[g.nodes[n].y[0].index()] = new);
        } else if !joined[i] {
            let x: Vec<Var> = node.x.iter().map(|v| map[v.index()]).collect();
            let y = out.push_all(&node.label, node.op.clone(), &x)?;
            node.y.iter().zip(y).for_each(|(old, new)| map[old.index()] = new);
        }
    }
    out.ends(g, &map);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use crate::backend::Device;
    use crate::error::Result;
    use crate::exec::{Program, Weights};
    use crate::graph::{Graph, Layout, Node, Target, Var, fuse};
    use crate::ops::{Act, Activation, Cast, Linear, LinearGroup, Op};
    use crate::tensor::{DType, HostTensor, Spec};

    fn product(g: &mut Graph, x: Var, name: &str, o: usize, bias: bool) -> Result<Var> {
        let (c, mut linear) = (g.shape(x).last(), Linear::default());
        linear.epi.bias = bias;
        let t = g.spec(x).dtype;
        let mut inputs = vec![x, g.weight(name, Layout::Linear, t, [o, c])?];
        if bias {
            inputs.push(g.weight(&format!("{name}.bias"), Layout::Same, t, [o])?);
        }
        g.push(name, linear, &inputs)
    }

    fn groups(g: &Graph) -> Vec<(String, LinearGroup)> {
        let of = |n: &Node| match &n.op {
            Op::LinearGroup(group) => Some((n.label.clone(), group.clone())),
            _ => None,
        };
        g.nodes().iter().filter_map(of).collect()
    }

    /// Products a, b, c of x, with something between them; all are outputs.
    fn three(t: DType, rows: usize, bias: [bool; 3]) -> Result<Graph> {
        let mut g = Graph::new();
        let x = g.input("x", t, [rows, 64]);
        let a = product(&mut g, x, "a", 320, bias[0])?;
        let a = g.push("silu", Activation(Act::Silu), &[a])?;
        let b = product(&mut g, x, "b", 64, bias[1])?;
        let other = product(&mut g, b, "other", 64, true)?;
        let c = product(&mut g, x, "c", 8, bias[2])?;
        [a, b, other, c].into_iter().zip(["a", "b", "other", "c"]).for_each(|(v, name)| g.output(name, v));
        Ok(g)
    }

    #[test]
    fn products_of_one_value_are_one_launch_on_a_gpu() -> Result<()> {
        let g = three(DType::BF16, 10, [true; 3])?;
        let fused = fuse(&g, Target::Cuda)?;
        let want = LinearGroup { products: 3, bias: true };
        assert_eq!(groups(&fused), [("a and 2 more".into(), want)], "{}", fused.show(None));
        assert_eq!(fused.nodes().len(), 3);
        let specs =
            |g: &Graph| g.outputs().iter().map(|(name, v)| (name.clone(), g.spec(*v))).collect::<Vec<_>>();
        assert_eq!(specs(&fused), specs(&g));
        assert!(groups(&fuse(&g, Target::Cpu)?).is_empty());
        Ok(())
    }

    #[test]
    fn every_product_of_a_group_stays_what_it_was() -> Result<()> {
        let g = three(DType::BF16, 10, [true; 3])?;
        let mut weights = Weights::new(&Device::Cpu);
        let values = |seed: usize, spec: Spec| {
            let v = (0..spec.shape.numel()).map(|i| ((i * 7 + seed * 13) % 29) as f32 / 29.0 - 0.5).collect();
            Ok::<_, crate::Error>(HostTensor::f32(spec.shape, v)?.to(spec.dtype))
        };
        for (i, (_, v, _)) in g.weights().enumerate() {
            weights.insert(&v.name, &values(i, v.spec)?)?;
        }
        let run = |g: Graph| -> Result<Vec<HostTensor>> {
            let mut program = Program::new(g, &weights, &Device::Cpu)?;
            program.write("x", &values(99, program.spec("x")?)?)?;
            program.run(&mut ())?;
            ["a", "b", "other", "c"].iter().map(|name| program.read(name)).collect()
        };
        let joined = super::gather(&g)?;
        assert_eq!(groups(&joined).len(), 1);
        assert_eq!(run(joined)?, run(g)?);
        Ok(())
    }

    #[test]
    fn what_differs_in_kind_or_is_faster_by_itself_stays_apart() -> Result<()> {
        let mixed = fuse(&three(DType::F16, 10, [true, false, false])?, Target::Cuda)?;
        assert_eq!(groups(&mixed), [("b and 1 more".into(), LinearGroup { products: 2, bias: false })]);
        assert!(groups(&fuse(&three(DType::F32, 10, [true; 3])?, Target::Cuda)?).is_empty());
        // Products that fill the card: larger tiles are faster.
        let mut g = Graph::new();
        let x = g.input("x", DType::BF16, [8192, 320]);
        for name in ["a", "b"] {
            let y = product(&mut g, x, name, 2560, true)?;
            g.output(name, y);
        }
        assert!(groups(&fuse(&g, Target::Cuda)?).is_empty());
        Ok(())
    }

    #[test]
    fn a_product_whose_weight_is_made_later_does_not_join() -> Result<()> {
        let mut g = Graph::new();
        let x = g.input("x", DType::BF16, [10, 64]);
        let a = product(&mut g, x, "a", 64, false)?;
        let late = g.input("late", DType::F32, [64, 64]);
        let late = g.push("cast", Cast { to: DType::BF16, scale: 1.0 }, &[late])?;
        let b = g.push("b", Linear::default(), &[x, late])?;
        let c = product(&mut g, x, "c", 64, false)?;
        [a, b, c].into_iter().zip(["a", "b", "c"]).for_each(|(v, name)| g.output(name, v));
        let fused = fuse(&g, Target::Cuda)?;
        let want = LinearGroup { products: 2, bias: false };
        assert_eq!(groups(&fused), [("b and 1 more".into(), want)], "{}", fused.show(None));
        Ok(())
    }

    #[test]
    fn a_graph_that_trains_keeps_its_products_where_they_are() -> Result<()> {
        let mut g = Graph::new();
        g.train(true);
        let x = g.input("x", DType::F16, [2, 64]);
        let weights = ["a", "b"].map(|name| g.weight(name, Layout::Linear, DType::F16, [64, 64]));
        for (name, w) in ["a", "b"].into_iter().zip(weights) {
            let y = g.push(name, Linear::default(), &[x, w?])?;
            g.output(name, y);
        }
        assert!(groups(&fuse(&g, Target::Cuda)?).is_empty());
        g.parameters.clear();
        assert_eq!(groups(&fuse(&g, Target::Cuda)?).len(), 1, "there is nothing else that keeps them apart");
        Ok(())
    }

    #[test]
    fn a_launch_takes_no_more_than_it_can() -> Result<()> {
        let mut g = Graph::new();
        let x = g.input("x", DType::F16, [2, 64]);
        for i in 0..crate::ops::MOST_PRODUCTS + 3 {
            let y = product(&mut g, x, &format!("w{i}"), 64, false)?;
            g.output(&format!("y{i}"), y);
        }
        let sizes: Vec<usize> =
            groups(&fuse(&g, Target::Cuda)?).iter().map(|(_, group)| group.products).collect();
        assert_eq!(sizes, [32, 3]);
        Ok(())
    }
}
