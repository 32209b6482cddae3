//! A graph as text: one line per node with shapes, place and work, and the totals.

use super::{Graph, Place, Plan};
use std::fmt::Write;

impl Graph {
    /// The graph as text; with a plan also offsets and bytes.
    pub fn show(&self, plan: Option<&Plan>) -> String {
        let mut out = String::new();
        for (i, node) in self.nodes.iter().enumerate() {
            let x = node.x.iter().map(|&v| self.describe(v)).collect::<Vec<_>>().join(" ");
            let y =
                node.y.iter().map(|v| format!("%{} {}", v.0, self.spec(*v))).collect::<Vec<_>>().join(" ");
            let at = match plan.and_then(|p| node.y.first().map(|v| p.places[v.index()])) {
                Some(Place::Arena(offset)) => format!(" @{offset:#x}"),
                Some(Place::State(_)) => " @state".into(),
                _ => String::new(),
            };
            let gflop = self.cost(node).flops / 1e9;
            let _ =
                writeln!(out, "{i:4} {y}{at} = {} {x}  # {} {gflop:.3} GFLOP", node.op.name(), node.label);
        }
        let cost = self.total_cost();
        let _ = write!(out, "{} nodes, {:.3} GFLOP", self.nodes.len(), cost.flops / 1e9);
        if let Some(p) = plan {
            let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
            let (arena, weights, states) = (mib(p.arena), mib(p.weights), mib(p.states));
            let _ = write!(out, ", arena {arena:.2} MiB, weights {weights:.2} MiB, states {states:.2} MiB");
        }
        out.push('\n');
        out
    }

    fn describe(&self, v: super::Var) -> String {
        let value = &self.values[v.index()];
        if value.name.is_empty() { format!("%{}", v.0) } else { value.name.clone() }
    }
}
