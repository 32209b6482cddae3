use super::super::simd::tests::random;
use super::*;

const ACTS: [Act; 7] =
    [Act::None, Act::Silu, Act::Gelu, Act::QuickGelu, Act::GeluTanh, Act::Relu, Act::LeakyRelu];

fn run(isa: Isa, act: Act, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    activate_with(isa, act, x, &mut y);
    y
}

#[test]
fn exp_is_within_two_ulp() {
    let x: Vec<f32> = (-400_000..400_003).map(|i| i as f32 * 2.2e-4).collect();
    for &isa in Isa::available() {
        let mut y = vec![0.0; x.len()];
        exp_with(isa, &x, &mut y);
        for (&x, &y) in x.iter().zip(&y) {
            let want = (x as f64).exp();
            let ulp = f64::from(f32::EPSILON) * want.max(f64::from(f32::MIN_POSITIVE));
            assert!((y as f64 - want).abs() <= 2.0 * ulp, "{isa:?} exp({x}) = {y}, want {want}");
        }
    }
}

#[test]
fn exp_of_special_values() {
    let x = [f32::NEG_INFINITY, -1000.0, -103.0, -0.0, 88.8, 1e30, f32::INFINITY, f32::NAN];
    for &isa in Isa::available() {
        let mut y = [7.0; 8];
        exp_with(isa, &x, &mut y);
        assert_eq!(y[..2], [0.0; 2], "{isa:?}");
        assert!(y[2] > 0.0 && y[2] < 1e-44, "{isa:?}: a subnormal result, got {}", y[2]);
        assert_eq!((y[3], y[4], y[5], y[6]), (1.0, f32::INFINITY, f32::INFINITY, f32::INFINITY), "{isa:?}");
        assert!(y[7].is_nan(), "{isa:?}");
    }
}

#[test]
fn activations_follow_their_formulas() {
    let x: Vec<f32> = (-60_000..60_001).map(|i| i as f32 * 2.1e-4).chain(random(7, 1)).collect();
    for &isa in Isa::available() {
        for act in ACTS {
            for (&x, y) in x.iter().zip(run(isa, act, &x)) {
                let want = act.apply_f64(x as f64);
                let bound = 1e-7 * (1.0 + want.abs());
                assert!((y as f64 - want).abs() <= 2.0 * bound, "{isa:?} {act:?}({x}) = {y}, want {want}");
            }
        }
    }
}

#[test]
fn activations_keep_nan_and_saturate() {
    for &isa in Isa::available() {
        for act in ACTS {
            let y = run(isa, act, &[f32::NAN, 500.0, -500.0]);
            assert!(y[0].is_nan() && y[1] == 500.0, "{isa:?} {act:?}: {y:?}");
            let kept = match act {
                Act::None => -500.0,
                Act::LeakyRelu => -100.0,
                _ => 0.0,
            };
            assert!((y[2] - kept).abs() < 1e-30, "{isa:?} {act:?}: {y:?}");
        }
    }
}

#[test]
fn tails_and_places_do_not_matter() {
    let x = random(50, 2);
    for &isa in Isa::available() {
        for act in ACTS {
            let all = run(isa, act, &x);
            for len in 0..x.len() {
                assert_eq!(run(isa, act, &x[..len]), all[..len], "{isa:?} {act:?} at length {len}");
            }
            let mut y = x.clone();
            activate_in_place_with(isa, act, &mut y);
            assert_eq!(y, all, "{isa:?} {act:?} in place");
        }
    }
}

#[test]
fn erfc_has_known_values() {
    let known = [
        (0.0, 1.0),
        (0.5, 0.479_500_122_186_953_5),
        (1.0, 0.157_299_207_050_285_13),
        (3.0, 2.209_049_699_858_544e-5),
        (-1.0, 1.842_700_792_949_715),
        (5.0, 1.537_459_794_428_035e-12),
    ];
    for (x, want) in known {
        assert!((erfc_f64(x) - want).abs() <= 1e-12 * want, "erfc({x}) = {:e}", erfc_f64(x));
    }
}

#[test]
fn scale_shift_act_goes_by_channel() {
    for c in [1, 3, 16, 37, 64] {
        let (x, a, b) = (random(5 * c, 1), random(c, 2), random(c, 3));
        for &isa in Isa::available() {
            for act in ACTS {
                let mut y = vec![f32::NAN; x.len()];
                scale_shift_act_with(isa, &x, &a, &b, act, &mut y);
                for (i, &y) in y.iter().enumerate() {
                    let want = act.apply_f64(x[i] as f64 * a[i % c] as f64 + b[i % c] as f64);
                    assert!(
                        (y as f64 - want).abs() <= 5e-7,
                        "{isa:?} {act:?} C {c} at {i}: {y}, want {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn statistics_are_right_and_alike_everywhere() {
    // The second set has a mean of a thousand deviations.
    for (hw, c, groups, offset) in
        [(1, 1, 1, 0.0), (50, 12, 3, 1000.0), (3000, 40, 8, 5.0), (7, 33, 33, -2.0)]
    {
        let x: Vec<f32> = random(hw * c, 1).into_iter().map(|x| x + offset).collect();
        let two_passes = |select: &dyn Fn(usize) -> bool| {
            let part: Vec<f64> = (0..x.len()).filter(|&i| select(i)).map(|i| x[i] as f64).collect();
            let mean = part.iter().sum::<f64>() / part.len() as f64;
            [mean, part.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / part.len() as f64]
        };
        let close = |got: [f64; 2], want: [f64; 2], what: &str| {
            let fine = (got[0] - want[0]).abs() <= 1e-12 * (1.0 + want[0].abs())
                && (got[1] - want[1]).abs() <= 1e-8 * want[1];
            assert!(fine, "{what}: got {got:?}, want {want:?}");
        };
        let mut first: Option<Vec<[f64; 2]>> = None;
        for &isa in Isa::available() {
            // Twice the same image.
            let two = [&x[..], &x[..]].concat();
            let mut stats = group_stats_with(isa, Slice::F32(&two), 2, c, groups, <[_]>::to_vec);
            assert_eq!(stats[..groups], stats[groups..]);
            stats.truncate(groups);
            for (g, &stat) in stats.iter().enumerate() {
                close(
                    stat,
                    two_passes(&|i| i % c / (c / groups) == g),
                    &format!("{isa:?} group {g} of {groups}"),
                );
            }
            stats.push(mean_var_with(isa, &x));
            close(stats[groups], two_passes(&|_| true), &format!("{isa:?} row"));
            assert_eq!(&stats, first.get_or_insert(stats.clone()), "{isa:?}");
        }
    }
}

#[test]
fn conversions_round_to_nearest_even() {
    let mut x = random(1001, 1);
    let special =
        [0.0, -0.0, 1.0039063, 1.0117188, 65519.0, 65520.0, 1e-7, 3.4e38, f32::INFINITY, f32::NEG_INFINITY];
    x.extend(special.into_iter().chain([f32::NAN, f32::from_bits(0x7F80_0001), f32::from_bits(0xFFFF_FFFF)]));
    let (mut h, mut b, mut wide) = (vec![f16::ZERO; x.len()], vec![bf16::ZERO; x.len()], vec![0.0; x.len()]);
    f32_to_f16(&x, &mut h);
    f32_to_bf16(&x, &mut b);
    for i in 0..x.len() {
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(same(h[i].to_f32(), f16::from_f32(x[i]).to_f32()), "f16 of {}: {}", x[i], h[i]);
        assert!(same(b[i].to_f32(), bf16::from_f32(x[i]).to_f32()), "bf16 of {}: {}", x[i], b[i]);
    }
    f16_to_f32(&h, &mut wide);
    assert!(wide.iter().zip(&h).all(|(w, h)| w.is_nan() == h.is_nan() && (w.is_nan() || *w == h.to_f32())));
    bf16_to_f32(&b, &mut wide);
    assert!(wide.iter().zip(&b).all(|(w, b)| w.to_bits() == b.to_f32().to_bits()));
}
