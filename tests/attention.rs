//! What attention does with values that are not numbers, in every kernel: whatever they reach says so, and nothing else
//! changes. And what its kernels but the plain one promise of shared memory: that no access has a bank conflict.

mod common;

use ldm::exec::run_op;
use ldm::ops::{Array, Attention, Case, Op, t};
use ldm::tensor::{DType, HostTensor};

/// Types, heads, their size, and keys that take, in turn, the kernels on tensor cores, the plain one, that in f32 twice, the
/// plain one again, and that for many queries. With `causal`
/// the second and third take what any number of keys takes.
const KERNELS: [(DType, usize, usize, usize); 11] = [
    (DType::F16, 2, 40, 150),
    (DType::BF16, 2, 64, 77),
    (DType::F16, 2, 80, 83),
    (DType::BF16, 2, 64, 130),
    (DType::BF16, 2, 160, 83),
    (DType::F16, 2, 168, 83),
    (DType::BF16, 2, 36, 83),
    (DType::F32, 2, 40, 83),
    (DType::F32, 2, 80, 130),
    (DType::F32, 2, 42, 83),
    (DType::BF16, 264, 40, 260),
];
const QUERIES: usize = 70;

struct Run {
    case: Case,
    dtype: DType,
    x: Vec<Array>,
}

impl Run {
    fn new(dtype: DType, heads: usize, d: usize, keys: usize, causal: bool) -> Run {
        let (q, kv) = ([1, QUERIES, heads * d], [1, keys, heads * d]);
        let case = Case::new(Attention { heads, causal, joined: false }, [t(q), t(kv), t(kv)]);
        let x = case.inputs(dtype, 5);
        Run { case, dtype, x }
    }

    /// The result with these elements (input, token, column) replaced.
    fn result(&self, device: &ldm::backend::Device, replaced: &[(usize, usize, usize)], by: f64) -> Vec<f64> {
        let mut x = self.x.clone();
        for &(input, token, column) in replaced {
            let width = x[input].shape.last();
            x[input].data[token * width + column] = by;
        }
        let specs = self.case.specs(self.dtype);
        let x: Vec<HostTensor> = x.iter().zip(specs).map(|(a, s)| a.to_tensor(s).unwrap()).collect();
        let op: &Op = &self.case.op;
        run_op(device, op, &x).unwrap().remove(0).to_f64()
    }
}

#[test]
fn a_nan_reaches_all_that_depends_on_it_and_nothing_else() {
    common::on_cuda(|device| {
        for (dtype, heads, d, keys) in KERNELS {
            let run = Run::new(dtype, heads, d, keys, false);
            let good = run.result(device, &[], 0.0);
            assert!(good.iter().all(|v| v.is_finite()));
            // All in the first head: a query's whole row; with a key all queries; with a value one column.
            let check = |what: (usize, usize, usize), hit: &dyn Fn(usize, usize) -> bool| {
                let got = run.result(device, &[what], f64::NAN);
                for (i, (got, good)) in got.iter().zip(&good).enumerate() {
                    let (row, column) = (i / (heads * d), i % (heads * d));
                    let as_wanted = if hit(row, column) { got.is_nan() } else { got == good };
                    assert!(
                        as_wanted,
                        "{dtype:?}, d = {d}, NaN at {what:?}: y[{row},{column}] = {got}, was {good}"
                    );
                }
            };
            check((0, 67, 3), &|row, column| row == 67 && column < d);
            check((1, 0, d - 1), &|_, column| column < d);
            check((1, keys - 1, 0), &|_, column| column < d);
            check((2, 69, 5), &|_, column| column == 5);
        }
    });
}

#[test]
fn a_nan_in_a_key_does_not_reach_the_queries_before_it() {
    common::on_cuda(|device| {
        for (dtype, heads, d, keys) in KERNELS {
            let run = Run::new(dtype, heads, d, keys, true);
            let good = run.result(device, &[], 0.0);
            assert!(good.iter().all(|v| v.is_finite()), "{dtype:?}, d = {d}: no row without keys");
            // Query i sees keys up to i + keys − 70.
            for key in [0, keys - QUERIES, 50, keys - 1] {
                let got = run.result(device, &[(1, key, 2)], f64::NAN);
                for (i, (got, good)) in got.iter().zip(&good).enumerate() {
                    let (row, column) = (i / (heads * d), i % (heads * d));
                    let hit = column < d && key <= row + keys - QUERIES;
                    let as_wanted = if hit { got.is_nan() } else { got == good };
                    assert!(
                        as_wanted,
                        "{dtype:?}, d = {d}, NaN in key {key}: y[{row},{column}] = {got}, was {good}"
                    );
                }
            }
        }
    });
}

#[test]
fn scores_that_overflow_are_no_weights() {
    common::on_cuda(|device| {
        for (dtype, heads, d, keys) in KERNELS {
            // Beyond f32: -inf for all keys, or +inf for some. f16 holds no such operands.
            if dtype == DType::F16 {
                continue;
            }
            let run = Run::new(dtype, heads, d, keys, false);
            let all: Vec<_> = (0..keys).map(|key| (1, key, 0)).chain([(0, 4, 0)]).collect();
            let mut x = run.x.clone();
            for &(input, token, column) in &all {
                let width = x[input].shape.last();
                x[input].data[token * width + column] = if input == 0 { -1e30 } else { 1e30 };
            }
            let run = Run { x, ..run };
            let got = run.result(device, &[], 0.0);
            assert!(
                got[4 * heads * d..][..d].iter().all(|v| v.is_nan()),
                "{dtype:?}, d = {d}: all scores are -inf"
            );
            let got = run.result(device, &[(1, 50, 0)], -1e30);
            assert!(
                got[4 * heads * d..][..d].iter().all(|v| v.is_nan()),
                "{dtype:?}, d = {d}: one score is inf"
            );
        }
    });
}

#[test]
fn shared_memory_has_no_bank_conflicts() {
    // Every variant, by (heads, head size, keys), in whole and partial blocks.
    let any = [32, 40, 64, 80, 96, 128, 160, 256, 384, 512].map(|d| (1, d, 130));
    let large = [(264, 40, 260), (264, 64, 260)];
    let few = [40, 64, 80, 160].map(|d| (1, d, 77));
    let more = [40, 64, 80].map(|d| (1, d, 120));
    let sizes: Vec<(usize, usize, usize)> = [&any[..], &large, &few, &more].concat();
    let floats = [40, 64, 80, 160].map(|d| (DType::F32, (1, d, 130)));
    let sizes: Vec<_> = sizes.into_iter().map(|size| (DType::BF16, size)).chain(floats).collect();
    common::on_cuda_with(&["order=forward;async=late;banks=count"], |device| {
        // On a card there is nothing to count.
        let Ok(Some(emulator)) = common::emulator::start() else { return };
        for &(dtype, (heads, d, keys)) in &sizes {
            emulator.reset();
            let kv = [1, keys, heads * d];
            let case = Case::new(
                Attention { heads, causal: false, joined: false },
                [t([1, 66, heads * d]), t(kv), t(kv)],
            );
            let (x, specs) = (case.inputs(dtype, 1), case.specs(dtype));
            let x: Vec<HostTensor> = x.iter().zip(specs).map(|(a, s)| a.to_tensor(s).unwrap()).collect();
            run_op(device, &case.op, &x).unwrap();
            let rows = emulator.banks();
            let copies = rows.iter().filter(|row| row.access == "cp_async").count();
            assert!(copies > 0 && rows.len() > copies, "d = {d}: {rows:?}");
            for row in rows {
                assert_eq!(row.actual, row.ideal, "{dtype:?}, {heads} heads of {d}, {keys} keys: {row:?}");
            }
        }
        emulator.configure("banks=off");
    });
}
