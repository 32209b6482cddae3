//! Group norms as a graph on a GPU runs them: statistics in slabs, merged, and applied, against the norm itself in f64.

mod common;

use ldm::exec::{Program, Weights};
use ldm::graph::{Graph, Layout};
use ldm::ops::{Act, Arg, Array, Case, Concat, Given, GroupNorm, Op, Operation, t};
use ldm::tensor::DType;

/// A norm of x, which may be two tensors side by side, and how far its result is from the specification, in norm.
fn error(
    device: &ldm::backend::Device,
    x: &[Arg],
    groups: usize,
    dtype: DType,
) -> Result<(f64, Given), ldm::Error> {
    let c: usize = x.iter().map(|x| x.shape.last()).sum();
    let mut args = x.to_vec();
    args.extend([t([c]).normal(1.0, 0.2), t([c])]);
    let op = GroupNorm::new(groups, 1e-5, Act::None);
    let case = Case::new(op.clone(), args);
    let (arrays, specs) = (case.inputs(dtype, 11), case.specs(dtype));

    let (mut g, mut weights) = (Graph::new(), Weights::new(device));
    let mut vars = vec![];
    for (i, spec) in specs.iter().enumerate() {
        vars.push(if i < x.len() {
            g.input(&format!("x{i}"), spec.dtype, spec.shape)
        } else {
            weights.insert(&format!("w{i}"), &arrays[i].to_tensor(*spec)?)?;
            g.weight(&format!("w{i}"), Layout::Same, spec.dtype, spec.shape)?
        });
    }
    let whole = if x.len() == 2 { g.push("concat", Concat, &vars[..2])? } else { vars[0] };
    let y = g.push("norm", op.clone(), &[whole, vars[x.len()], vars[x.len() + 1]])?;
    g.output("y", y);
    let mut program = Program::new(g, &weights, device)?;
    for i in 0..x.len() {
        program.write(&format!("x{i}"), &arrays[i].to_tensor(specs[i])?)?;
    }
    program.run(&mut ())?;
    let got = Array::from_tensor(&program.read("y")?);
    let form = program.graph().nodes().iter().find_map(|n| match &n.op {
        Op::GroupNorm(norm) => Some(norm.given),
        _ => None,
    });

    let whole = if x.len() == 2 { Concat.spec(&arrays[..2]).remove(0) } else { arrays[0].clone() };
    let want = op.spec(&[whole, arrays[x.len()].clone(), arrays[x.len() + 1].clone()]).remove(0);
    let norm = |a: &Array| a.data.iter().map(|v| v * v).sum::<f64>().sqrt();
    Ok((norm(&got.zip(&want, |a, b| a - b)) / norm(&want), form.unwrap_or_default()))
}

#[test]
fn statistics_and_application_together_are_the_norm() {
    common::on_cuda(|device| {
        let x = |shape: &[usize], mean: f64, deviation: f64| t(shape).normal(mean, deviation);
        // The bounds are those of the rooms. Where the mean is ten thousand deviations, f32 holds x to 4e-4 of a
        // deviation, and a slab's mean no better; over the slabs of a group that averages out.
        for (x, groups, form) in [
            (vec![x(&[2, 16, 16, 40], 0.5, 2.0)], 4, Given::Stats),
            (vec![x(&[1, 65, 64, 16], 3.0, 1.0)], 2, Given::Stats),
            (vec![x(&[2, 8, 16, 24], 1.0, 1.0), x(&[2, 8, 16, 16], -2.0, 0.5)], 4, Given::Halves),
            (vec![x(&[1, 5, 7, 24], 1.0, 1.0)], 3, Given::Input),
        ] {
            for (dtype, bound) in [(DType::F32, 1e-5), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
                let (off, got) = error(device, &x, groups, dtype).unwrap();
                assert!(off <= bound && got == form, "{x:?} {dtype}: {off:e}, bound {bound:e}; {got:?}");
            }
        }
        for (x, groups) in [
            (vec![x(&[2, 16, 16, 40], 100.0, 0.01)], 4),
            (vec![x(&[1, 65, 64, 16], 100.0, 0.01)], 2),
            (vec![x(&[2, 8, 16, 24], 100.0, 0.01), x(&[2, 8, 16, 16], 100.0, 0.01)], 4),
        ] {
            let (off, _) = error(device, &x, groups, DType::F32).unwrap();
            assert!(off <= 8e-5, "{x:?}: {off:e}");
        }
    });
}
