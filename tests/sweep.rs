//! The sweep over tiles and splits on the emulator: every choice of a small product is run and written down once, and what is
//! written down is not run again. Its times are nothing here.

mod common;
#[path = "../benches/common/sweep.rs"]
mod sweep;

use ldm::graph::Graph;
use ldm::ops::{Conv2d, Linear, Op};
use ldm::tensor::{DType, Spec};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};
use sweep::{Effort, heaviest};

const QUICK: Effort = Effort { slice: Duration::ZERO, tries: 1 };

/// A convolution and a product of its result, in f32 or on tensor cores.
fn graph(dtype: DType) -> Graph {
    let mut g = Graph::new();
    let x = g.input("x", dtype, [1, 6, 5, 32]);
    let w = g.input("w", dtype, [40, 3, 3, 32]);
    let bias = g.input("bias", dtype, [40]);
    let v = g.input("v", dtype, [24, 40]);
    let y = g.push("conv", Conv2d::same(3), &[x, w, bias]).unwrap();
    let z = g.push("product", Linear::default(), &[y, v]).unwrap();
    g.output("z", z);
    g
}

#[test]
fn every_choice_is_measured_once() {
    common::on_cuda_with(&["order=forward;async=late"], |device| {
        for dtype in [DType::F32, DType::BF16] {
            let subjects = heaviest(&[(graph(dtype), 1.0)], 30).unwrap();
            assert_eq!(subjects.iter().map(|s| s.op.name()).collect::<Vec<_>>(), ["conv2d", "linear"]);
            let soon = || Instant::now() + Duration::from_secs(3600);
            let run = |done: &[Value], until| {
                let mut rows: Vec<Value> = vec![];
                let write = |row: &Value| {
                    rows.push(row.clone());
                    Ok(())
                };
                let all = sweep::sweep(device, &subjects, f64::INFINITY, QUICK, done, until, write).unwrap();
                (rows, all)
            };
            let (rows, all) = run(&[], soon());
            let want: usize = subjects.iter().map(|s| s.op.choices(&s.x).len()).sum();
            assert!(all && rows.len() == want && want > 8, "{} rows of {want}", rows.len());
            assert!(rows.iter().all(|row| row["microseconds"].as_f64().is_some_and(|us| us >= 0.0)));
            assert_eq!(rows.iter().filter(|row| row["chosen"] == true).count(), subjects.len());
            // What was there is left alone; where there is no time, nothing is done, and it says so.
            let (more, all) = run(&rows[1..], soon());
            assert!(all && more.len() == 1 && more[0]["variant"] == rows[0]["variant"]);
            assert_eq!(run(&rows[1..], Instant::now()), (vec![], false));
        }
    });
}

#[test]
fn a_choice_that_the_inputs_do_not_suit_is_refused() {
    let specs = |dtype| [Spec::new(dtype, [64, 64]), Spec::new(dtype, [32, 64])];
    let choices = Op::from(Linear::default()).choices(&specs(DType::F32));
    assert!(choices.iter().all(|op| op.infer(&specs(DType::F32)).is_ok()));
    // Those of the f32 kernel are none of the other's, and the plain kernel has none.
    assert!(choices[0].infer(&[Spec::new(DType::F32, [64, 3]), Spec::new(DType::F32, [32, 3])]).is_err());
    assert!(
        Op::from(Linear::default())
            .choices(&[Spec::new(DType::F32, [64, 3]), Spec::new(DType::F32, [32, 3])])
            .is_empty()
    );
    let Some(Op::Linear(mut op)) = choices.into_iter().next() else { panic!("no choice") };
    op.choice.as_mut().unwrap().splits = 99;
    let e = Op::from(op).infer(&specs(DType::F32)).unwrap_err().to_string();
    assert!(e.contains("choices"), "{e}");
}

/// What was measured on a card, of the rows that end like this before their microseconds: by op, shape, variant and splits.
fn measured(file: &str, way: &[&str]) -> HashMap<[String; 2], Vec<(String, usize, f64)>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/measured").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut all: HashMap<_, Vec<_>> = HashMap::new();
    for line in text.lines().filter(|l| !l.starts_with('#')).skip(1) {
        let [op, shape, variant, splits, ref rest @ .., us] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        if rest == way {
            let row = (variant.to_string(), splits.parse().unwrap(), us.parse().unwrap());
            all.entry([op.to_string(), shape.to_string()]).or_default().push(row);
        }
    }
    all
}

/// The model of `src/ops/conv2d/tensor_cores.rs`, which is of `mma.sync`, orders the choices nearly as the cards did.
#[test]
fn what_is_chosen_was_measured_to_be_nearly_the_best() {
    let subjects = heaviest(&sweep::graphs(DType::BF16).unwrap(), 30).unwrap();
    for (file, way, bound) in [("h100-sweep.tsv", &[][..], 1.06), ("h200-sweep.tsv", &["on"][..], 1.12)] {
        let (measured, mut found) = (measured(file, way), 0);
        for subject in &subjects {
            let Some(rows) = measured.get(&[subject.op.name().to_string(), subject.title()]) else {
                continue;
            };
            let own = subject.op.launches(&subject.x)[0];
            let of_own =
                rows.iter().find(|(variant, splits, _)| (&variant[..], *splits) == (own.variant, own.splits));
            let best = rows.iter().map(|row| row.2).fold(f64::INFINITY, f64::min);
            let us =
                of_own.unwrap_or_else(|| panic!("{}: {} was not measured", subject.title(), own.variant)).2;
            println!("{us:7.2} us, {:.3} of the best: {} {}", us / best, subject.op.name(), subject.title());
            assert!(us <= bound * best, "{file}: {}: {us} us; the best took {best}", subject.title());
            found += 1;
        }
        assert!(found >= 8, "{file}: {found} shapes that were measured");
    }
}
