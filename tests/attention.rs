//! What attention does with values that are not numbers, in every kernel: whatever they reach says so, and nothing else
//! changes; likewise its gradients on tensor cores. And what its kernels but the plain one promise of shared memory: that no access has a bank conflict.

mod common;

use ldm::exec::run_op;
use ldm::ops::{Array, Attention, AttentionGrad, Case, Op, t};
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

/// The gradients of attention by q, k and v, with these elements (input, token, column) of the first image replaced by NaN, or of the
/// second one.
fn gradients(
    device: &ldm::backend::Device,
    (dtype, heads, d, [queries, keys]): (DType, usize, usize, [usize; 2]),
    causal: bool,
    replaced: &[(usize, usize, usize, usize)],
) -> Vec<Vec<f64>> {
    let (q, kv) = (t([2, queries, heads * d]), t([2, keys, heads * d]));
    let case = Case::new(AttentionGrad { heads, causal }, [q.clone(), kv.clone(), kv, q.clone(), q]);
    let (mut x, specs) = (case.inputs(dtype, 6), case.specs(dtype));
    for &(input, image, token, column) in replaced {
        let [_, tokens, width] = x[input].shape[..] else { unreachable!("three axes") };
        x[input].data[(image * tokens + token) * width + column] = f64::NAN;
    }
    let x: Vec<HostTensor> = x.iter().zip(specs).map(|(a, s)| a.to_tensor(s).unwrap()).collect();
    run_op(device, &case.op, &x).unwrap().iter().map(HostTensor::to_f64).collect()
}

#[test]
fn a_nan_reaches_the_gradients_that_depend_on_it() {
    const SIZES: [usize; 2] = [130, 130];
    let kernels = [(DType::F16, 2, 40, SIZES), (DType::BF16, 1, 64, SIZES), (DType::BF16, 2, 160, SIZES)];
    common::on_cuda(|device| {
        for kernel in kernels {
            let (_, heads, d, [tokens, _]) = kernel;
            let width = heads * d;
            for causal in [false, true] {
                let good = gradients(device, kernel, causal, &[]);
                assert!(good.iter().flatten().all(|v| v.is_finite()));
                // Which rows of the first image's first head, of dq, dk and dv, are NaN, and which may be.
                let check = |what: (usize, usize, usize, usize),
                             hit: &dyn Fn(usize, usize) -> Option<bool>| {
                    for (output, got) in gradients(device, kernel, causal, &[what]).iter().enumerate() {
                        for (i, (got, good)) in got.iter().zip(&good[output]).enumerate() {
                            let (row, column) = (i / width, i % width);
                            let first = row < tokens && column < d;
                            let wanted = if first { hit(output, row) } else { Some(false) };
                            let as_wanted =
                                wanted.is_none_or(|nan| if nan { got.is_nan() } else { got == good });
                            assert!(
                                as_wanted || what.1 == 1 && row >= tokens,
                                "{kernel:?}, causal {causal}, NaN at {what:?}: output {output}[{row},{column}] = {got}, was {good}"
                            );
                        }
                    }
                };
                // Query i sees keys up to i. A value's NaN: what its weight's gradient reaches.
                let sees = |query: usize| !causal || query >= 100;
                check((2, 0, 100, 5), &|output, row| {
                    Some(match output {
                        0 => sees(row),
                        1 => row == 100,
                        _ => false,
                    })
                });
                // A key's NaN: the weights of all queries that see it, and by those all keys. Queries of a block of 64 that
                // shares a turn with the key may become NaN.
                check((1, 0, 100, 3), &|output, row| match output {
                    0 if causal && (64..100).contains(&row) => None,
                    0 => Some(sees(row)),
                    // The last queries, which see it, see all keys up to themselves.
                    _ => Some(true),
                });
                // A query's NaN, and one of its gradient: its own row, and all keys that it sees; with `causal` keys that share
                // a turn with it may become NaN.
                for input in [0, 4] {
                    check((input, 0, 100, 3), &|output, row| match output {
                        0 => Some(row == 100),
                        // Of the gradient the column alone.
                        2 if input == 4 => None,
                        _ if causal && row > 100 => None,
                        _ => Some(true),
                    });
                }
                // The second image stands behind the last keys and queries of the first.
                for input in 0..5 {
                    check((input, 1, 0, 0), &|_, _| Some(false));
                }
            }
        }
    });
}

#[test]
fn shared_memory_of_the_gradients_has_no_bank_conflicts() {
    // Every variant, in whole and partial blocks.
    let sizes = [32, 40, 64, 80, 128, 160].map(|d| (1, d)).into_iter().chain([(264, 40), (264, 64)]);
    common::on_cuda_with(&["order=forward;async=late;banks=count"], |device| {
        let Ok(Some(emulator)) = common::emulator::start() else { return };
        for (heads, d) in sizes.clone() {
            emulator.reset();
            let case = Case::new(AttentionGrad { heads, causal: false }, vec![t([1, 70, heads * d]); 5]);
            let (x, specs) = (case.inputs(DType::BF16, 1), case.specs(DType::BF16));
            let x: Vec<HostTensor> = x.iter().zip(specs).map(|(a, s)| a.to_tensor(s).unwrap()).collect();
            run_op(device, &case.op, &x).unwrap();
            let rows = emulator.banks();
            assert!(["q", "kv"].iter().all(|own| {
                let unit = format!("attention_grad_{own}_mma.");
                rows.iter().any(|row| row.unit.starts_with(&unit) && row.access.starts_with("ldmatrix"))
            }));
            for row in rows {
                assert_eq!(row.actual, row.ideal, "{heads} heads of {d}: {row:?}");
            }
        }
        emulator.configure("banks=off");
    });
}
