//! What products take over from the nodes around them.

use super::{Conv2d, Linear, Op};
use super::super::prelude::*;

/// `at` = a + b where b (or a) is a product without residual that nothing else reads: the other becomes its residual.
pub(in crate::ops) fn absorb_residual(g: &Graph, at: Var) -> Option<Rewrite> {
    let add = g.maker(at)?;
    let uses = g.uses();
    [(add.x[1], add.x[0]), (add.x[0], add.x[1])].into_iter().find_map(|(product, other)| {
        let node = g.maker(product).filter(|_| uses[product.index()] == 1 && product != other)?;
        let mut op = node.op.clone();
        match &mut op {
            Op::Conv2d(Conv2d { epi, .. }) | Op::Linear(Linear { epi }) if !epi.residual => epi.residual = true,
            _ => return None,
        }
        Some(Rewrite { op, x: [&node.x[..], &[other]].concat() })
    })
}

