use super::super::simd::tests::{assert_close, assert_threads_agree, random};
use super::*;

/// In f64: the result, and its bound before the factor 8 · 2^-23. An error of a score, a share of Σ|q||k| · scale,
/// moves its weight by as much.
fn spec(p: &Attention, q: Heads, k: Heads, v: Heads) -> (Vec<f64>, Vec<f64>) {
    let width = p.heads * p.d;
    let (mut out, mut bound) = (vec![0.0; p.b * p.t * width], vec![0.0; p.b * p.t * width]);
    for i in 0..p.b * p.t * p.heads {
        let (b, t, head) = (i / (p.t * p.heads), i / p.heads % p.t, i % p.heads);
        let row = |x: &Heads, t: usize| -> Vec<f32> {
            let mut y = vec![0.0; p.d];
            x.data.read(b * x.batch + t * x.row + head * p.d, &mut y);
            y
        };
        let q = row(&q, t);
        let seen: Vec<usize> = (0..p.s)
            .filter(|&s| !p.causal || s as isize <= t as isize + p.s as isize - p.t as isize)
            .collect();
        let products = |s: usize| -> Vec<f64> {
            q.iter().zip(row(&k, s)).map(|(&q, k)| q as f64 * k as f64 * p.scale as f64).collect()
        };
        let scores: Vec<f64> = seen.iter().map(|&s| products(s).iter().sum()).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
        for (score, &s) in scores.iter().zip(&seen) {
            let weight = (score - top).exp() / total;
            let share = 1.0 + products(s).iter().map(|x| x.abs()).sum::<f64>();
            for (j, v) in row(&v, s).into_iter().enumerate() {
                out[i * p.d + j] += weight * v as f64;
                bound[i * p.d + j] += weight * (v as f64).abs() * share;
            }
        }
    }
    (out, bound)
}

fn inputs(p: &Attention) -> [Vec<f32>; 3] {
    let width = p.heads * p.d;
    [random(p.b * p.t * width, 1), random(p.b * p.s * width, 2), random(p.b * p.s * width, 3)]
}

#[test]
fn attention_is_right() {
    // (B, T, S, N, D)
    let shapes = [
        (1, 1, 1, 1, 1),
        (1, 3, 1, 2, 5),
        (2, 5, 7, 3, 4),
        (2, 64, 64, 2, 40),
        (1, 77, 77, 2, 64),
        (3, 130, 77, 2, 40),
        (1, 15, 600, 1, 33),
        (1, 127, 257, 1, 80),
        (1, 260, 512, 1, 17),
        (1, 9, 40, 1, 520),
        (1, 600, 15, 1, 16),
        (1, 4, 300, 1, 1024),
    ];
    for (b, t, s, heads, d) in shapes {
        for causal in [false, true] {
            let p = Attention { b, t, s, heads, d, scale: 1.0 / (d as f32).sqrt(), causal };
            let [q, k, v] = inputs(&p);
            let [q, k, v] = [
                Heads::new(Slice::F32(&q), t, heads * d),
                Heads::new(Slice::F32(&k), s, heads * d),
                Heads::new(Slice::F32(&v), s, heads * d),
            ];
            let (want, bound) = spec(&p, q, k, v);
            for &isa in Isa::available() {
                let mut out = vec![f32::NAN; want.len()];
                attention_with(isa, &p, q, k, v, SliceMut::F32(&mut out));
                assert_close(&out, &want, &bound, &format!("{isa:?} {p:?}"));
            }
        }
    }
}

/// 16-bit operands: against f64 on the same numbers, within what rounding the weights to bf16 costs.
#[test]
fn narrow_operands_are_right() {
    let shapes =
        [(1, 3, 1, 2, 5), (2, 64, 64, 2, 40), (1, 77, 77, 2, 64), (1, 15, 601, 1, 33), (1, 9, 40, 1, 520)];
    for (b, t, s, heads, d) in shapes {
        for causal in [false, true] {
            let p = Attention { b, t, s, heads, d, scale: 1.0 / (d as f32).sqrt(), causal };
            let narrow = inputs(&p).map(|x| x.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>());
            let half = inputs(&p).map(|x| x.iter().map(|&v| half::f16::from_f32(v)).collect::<Vec<_>>());
            for types in 0..2 {
                let data = |i: usize| if types == 0 { Slice::BF16(&narrow[i]) } else { Slice::F16(&half[i]) };
                let width = heads * d;
                let [q, k, v] =
                    [(0, t), (1, s), (2, s)].map(|(i, tokens)| Heads::new(data(i), tokens, width));
                let (want, bound) = spec(&p, q, k, v);
                for &isa in Isa::available() {
                    let mut out = vec![f32::NAN; want.len()];
                    attention_with(isa, &p, q, k, v, SliceMut::F32(&mut out));
                    let eps = if types == 0 && isa.has_dot() { 2f64.powi(-8) } else { 8.0 * 2f64.powi(-23) };
                    for (i, got) in out.iter().enumerate() {
                        let error = (*got as f64 - want[i]).abs();
                        assert!(error <= eps * bound[i], "{isa:?} {p:?} at {i}: {got}, want {}", want[i]);
                    }
                }
            }
        }
    }
}

/// Scores of some hundreds that grow along the keys: the running maximum moves in every block.
#[test]
fn large_and_growing_scores_do_not_overflow() {
    let p = Attention { b: 1, t: 20, s: 900, heads: 1, d: 8, scale: 1.0, causal: false };
    let [q, mut k, v] = inputs(&p);
    k.iter_mut().enumerate().for_each(|(i, k)| *k *= (i / 8) as f32);
    let [q, k, v] = [
        Heads::new(Slice::F32(&q), 20, 8),
        Heads::new(Slice::F32(&k), 900, 8),
        Heads::new(Slice::F32(&v), 900, 8),
    ];
    let (want, bound) = spec(&p, q, k, v);
    for &isa in Isa::available() {
        let mut out = vec![f32::NAN; want.len()];
        attention_with(isa, &p, q, k, v, SliceMut::F32(&mut out));
        // Scores of 1000 carry errors of 1e-4: the bound per element knows, one in norm does not.
        for (i, got) in out.iter().enumerate() {
            let error = (*got as f64 - want[i]).abs();
            assert!(
                error <= 8.0 * f64::from(f32::EPSILON) * bound[i],
                "{isa:?} at {i}: {got}, want {}",
                want[i]
            );
        }
    }
}

#[test]
fn a_fused_projection_is_read_in_place() {
    let (b, t, heads, d) = (2, 33, 3, 20);
    let p = Attention { b, t, s: t, heads, d, scale: 0.2, causal: false };
    let width = heads * d;
    let fused = random(b * t * 3 * width, 4);
    let part =
        |i: usize| Heads { data: Slice::F32(&fused[i * width..]), row: 3 * width, batch: t * 3 * width };
    let copy = |i: usize| -> Vec<f32> {
        fused.chunks(3 * width).flat_map(|row| row[i * width..(i + 1) * width].to_vec()).collect()
    };
    let (q, k, v) = (copy(0), copy(1), copy(2));
    let (mut one, mut two) = (vec![0.0; b * t * width], vec![1.0; b * t * width]);
    attention(&p, part(0), part(1), part(2), SliceMut::F32(&mut one));
    let [q, k, v] = [&q, &k, &v].map(|x| Heads::new(Slice::F32(x), t, width));
    attention(&p, q, k, v, SliceMut::F32(&mut two));
    assert_eq!(one, two);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let p = Attention { b: 3, t: 200, s: 300, heads: 2, d: 40, scale: 0.16, causal: false };
    let [q, k, v] = inputs(&p);
    for &isa in Isa::available() {
        assert_threads_agree(&format!("{isa:?}"), || {
            let mut out = vec![f32::NAN; p.b * p.t * p.heads * p.d];
            let [q, k, v] = [
                Heads::new(Slice::F32(&q), 200, 80),
                Heads::new(Slice::F32(&k), 300, 80),
                Heads::new(Slice::F32(&v), 300, 80),
            ];
            attention_with(isa, &p, q, k, v, SliceMut::F32(&mut out));
            out
        });
    }
}

#[test]
fn a_nan_shows_in_its_row_alone() {
    let p = Attention { b: 1, t: 30, s: 300, heads: 1, d: 16, scale: 0.25, causal: false };
    let [mut q, k, v] = inputs(&p);
    q[7 * 16] = f32::NAN;
    for &isa in Isa::available() {
        let mut out = vec![0.0; 30 * 16];
        let [q, k, v] = [
            Heads::new(Slice::F32(&q), 30, 16),
            Heads::new(Slice::F32(&k), 300, 16),
            Heads::new(Slice::F32(&v), 300, 16),
        ];
        attention_with(isa, &p, q, k, v, SliceMut::F32(&mut out));
        for (i, x) in out.iter().enumerate() {
            assert_eq!(x.is_nan(), i / 16 == 7, "{isa:?} at {i}: {x}");
        }
    }
}

#[test]
fn no_keys_give_zeros() {
    let p = Attention { b: 1, t: 2, s: 0, heads: 1, d: 3, scale: 1.0, causal: false };
    let mut out = [f32::NAN; 6];
    attention(
        &p,
        Heads::new(Slice::F32(&[1.0; 6]), 2, 3),
        Heads::new(Slice::F32(&[]), 0, 3),
        Heads::new(Slice::F32(&[]), 0, 3),
        SliceMut::F32(&mut out),
    );
    assert_eq!(out, [0.0; 6]);
}
