//! What products take over from the nodes around them.

use super::super::prelude::*;
use super::{Conv2d, Epi, Linear, Op};
use crate::ops::Act;

/// `at` = a + b where b (or a) is a product without residual that nothing else reads: the other becomes its residual.
pub(in crate::ops) fn absorb_residual(g: &Graph, at: Var) -> Option<Rewrite> {
    let add = g.maker(at)?;
    let uses = g.uses();
    [(add.x[1], add.x[0]), (add.x[0], add.x[1])].into_iter().find_map(|(product, other)| {
        let node = g.maker(product).filter(|_| uses[product.index()] == 1 && product != other)?;
        let mut op = node.op.clone();
        match &mut op {
            Op::Conv2d(Conv2d { epi, .. }) | Op::Linear(Linear { epi, more: 0, .. }) if !epi.residual => {
                epi.residual = true
            }
            _ => return None,
        }
        Some(Rewrite { op, x: [&node.x[..], &[other]].concat(), made: vec![] })
    })
}

/// The node that made `v`, if nothing else reads it.
fn sole(g: &Graph, v: Var) -> Option<&crate::graph::Node> {
    g.maker(v).filter(|_| g.uses()[v.index()] == 1)
}

/// The offer, if its op takes such inputs.
fn offer(g: &Graph, op: impl Into<Op>, x: Vec<Var>) -> Option<Rewrite> {
    let op = op.into();
    let specs: Vec<Spec> = x.iter().map(|&v| g.spec(v)).collect();
    op.infer(&specs).is_ok().then_some(Rewrite { op, x, made: vec![] })
}

/// `at` = conv(…) + residual, where the residual is a 1×1 convolution that nothing else reads: its input, or both halves of
/// the concatenation that is its input, become the convolution's shortcut, and its sum a part of the convolution's.
pub(super) fn shortcut(g: &Graph, at: Var, target: Target) -> Option<Rewrite> {
    let node = g.maker(at).filter(|_| target == Target::Cuda)?;
    let Op::Conv2d(conv) = &node.op else { return None };
    let residual = conv.epi.inputs().residual;
    if residual == 0 || conv.epi.act != Act::None || conv.shortcut > 0 {
        return None;
    }
    let linear = sole(g, node.x[residual])?;
    let plain = Epi { bias: true, ..Epi::default() };
    if linear.op != Op::Linear(Linear { epi: plain, ..Linear::default() }) {
        return None;
    }
    let from = linear.x[0];
    let sources = match g.maker(from) {
        Some(cat) if matches!(cat.op, Op::Concat(_)) => cat.x.clone(),
        _ => vec![from],
    };
    let op =
        Conv2d { shortcut: sources.len(), epi: Epi { residual: false, ..conv.epi.clone() }, ..conv.clone() };
    let mut x = node.x.clone();
    x.remove(residual);
    x.extend(sources.into_iter().chain(linear.x[1..].iter().copied()));
    offer(g, op, x)
}

/// `at` = GEGLU of a product that nothing else reads: the product's epilogue.
pub(in crate::ops) fn gates(g: &Graph, at: Var, target: Target) -> Option<Rewrite> {
    let node = g.maker(at).filter(|_| target == Target::Cuda)?;
    let product = sole(g, node.x[0])?;
    let Op::Linear(Linear { epi, more: 0, choice: None }) = &product.op else { return None };
    let plain = Epi { bias: epi.bias, ..Epi::default() };
    let glu = Linear { epi: Epi { glu: true, ..epi.clone() }, ..Linear::default() };
    if *epi == plain { offer(g, glu, product.x.clone()) } else { None }
}

/// Queries, keys and values as one product, where the three are plain products of one input that nothing else reads; how to
/// make the queries' value from now on.
pub(in crate::ops) fn together(g: &Graph, qkv: [Var; 3]) -> Option<(Var, Op, Vec<Var>)> {
    let mut x = vec![];
    for v in qkv {
        let node = sole(g, v).filter(|n| n.op == Op::Linear(Linear::default()))?;
        x.extend(if x.is_empty() { &node.x[..] } else { &node.x[1..] });
        if node.x[0] != x[0] {
            return None;
        }
    }
    let op = Op::from(Linear { more: 2, ..Linear::default() });
    let specs: Vec<Spec> = x.iter().map(|&v| g.spec(v)).collect();
    op.infer(&specs).is_ok().then_some((qkv[0], op, x))
}
