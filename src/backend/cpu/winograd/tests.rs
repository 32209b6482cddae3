use super::super::gemm::BatchAdd;
use super::super::math::Act;
use super::super::simd::tests::{assert_threads_agree, random};
use super::*;
use half::{bf16, f16};

/// The convolution in f64, and the same of absolute values.
fn spec(x: &[f32], w: &[f32], s: &ConvShape, n: usize) -> (Vec<f64>, Vec<f64>) {
    let up = 1 + s.upsample as usize;
    let (mut y, mut absolute) = (vec![], vec![]);
    for m in 0..s.b * s.out_h * s.out_w {
        let (b, oh, ow) = (m / (s.out_h * s.out_w), m / s.out_w % s.out_h, m % s.out_w);
        for o in 0..n {
            let (mut sum, mut size) = (0.0, 0.0);
            for (kh, kw) in (0..9).map(|t| (t / 3, t % 3)) {
                let (ih, iw) = ((oh + kh).wrapping_sub(s.pad_top), (ow + kw).wrapping_sub(s.pad_left));
                if ih < s.h * up && iw < s.w * up {
                    let x = &x[((b * s.h + ih / up) * s.w + iw / up) * s.c..][..s.c];
                    let w = &w[((o * 3 + kh) * 3 + kw) * s.c..][..s.c];
                    for (x, w) in x.iter().zip(w) {
                        sum += *x as f64 * *w as f64;
                        size += (*x as f64 * *w as f64).abs();
                    }
                }
            }
            y.push(sum);
            absolute.push(size);
        }
    }
    (y, absolute)
}

/// (b, h, w, c, pad_top, pad_left, out_h, out_w, upsample, n)
type Shape = (usize, usize, usize, usize, usize, usize, usize, usize, bool, usize);
const SHAPES: [Shape; 8] = [
    (1, 4, 4, 32, 1, 1, 4, 4, false, 32),
    (2, 8, 8, 64, 1, 1, 8, 8, false, 40),
    (3, 7, 9, 48, 1, 1, 7, 9, false, 5),
    (1, 12, 5, 32, 0, 2, 10, 7, false, 70),
    (2, 3, 5, 96, 1, 1, 6, 10, true, 33),
    (1, 8, 8, 544, 1, 1, 8, 8, false, 24),
    (1, 61, 66, 32, 1, 1, 61, 66, false, 96),
    (2, 16, 17, 1056, 1, 1, 16, 17, false, 16),
];

fn shape(i: usize) -> (ConvShape, usize) {
    let (b, h, w, c, pad_top, pad_left, out_h, out_w, upsample, n) = SHAPES[i];
    (ConvShape { b, h, w, c, kh: 3, kw: 3, stride: 1, pad_top, pad_left, out_h, out_w, upsample }, n)
}

/// 1e-5 in norm, and per element 8 · 2^-23 · the sum of absolute terms: the bounds of the room.
fn assert_near(got: &[f32], want: &[f64], absolute: &[f64], what: &str) {
    let (mut error, mut norm) = (0.0, 0.0);
    for (i, ((&g, &w), &a)) in got.iter().zip(want).zip(absolute).enumerate() {
        let d = (g as f64 - w).abs();
        assert!(d <= 8.0 * f64::from(f32::EPSILON) * a, "{what}: element {i}: got {g}, want {w}");
        error += d * d;
        norm += w * w;
    }
    assert!((error / norm).sqrt() <= 1e-5, "{what}: error in norm {:e}", (error / norm).sqrt());
}

#[test]
fn convolutions_are_right_in_every_type_and_instruction_set() {
    for i in 0..SHAPES.len() {
        let (s, n) = shape(i);
        let m = s.b * s.out_h * s.out_w;
        // Values that all types can hold.
        let round = |x: Vec<f32>| -> Vec<f32> { x.iter().map(|&v| (v * 64.0).round() / 64.0).collect() };
        let (x, w) = (round(random(s.b * s.h * s.w * s.c, 1)), round(random(n * 9 * s.c, 2)));
        let (want, absolute) = spec(&x, &w, &s, n);
        let (xb, wb): (Vec<bf16>, Vec<bf16>) =
            (x.iter().map(|&v| bf16::from_f32(v)).collect(), w.iter().map(|&v| bf16::from_f32(v)).collect());
        let (xh, wh): (Vec<f16>, Vec<f16>) =
            (x.iter().map(|&v| f16::from_f32(v)).collect(), w.iter().map(|&v| f16::from_f32(v)).collect());
        let none = Epilogue::default();
        for &isa in Isa::available() {
            let operands = [
                (Slice::F32(&x), Slice::F32(&w)),
                (Slice::BF16(&xb), Slice::BF16(&wb)),
                (Slice::F16(&xh), Slice::F16(&wh)),
            ];
            let mut first: Vec<f32> = vec![];
            for (x, w) in operands {
                let conv = Conv { x, shape: s };
                let mut y = vec![f32::NAN; m * n];
                conv3x3_with(isa, &conv, Weights::Raw(w), n, &none, SliceMut::F32(&mut y));
                let what = format!("{isa:?} {} {s:?}", w.dtype());
                assert_near(&y, &want, &absolute, &what);
                // The same numbers in another type, and packed before: the same bits.
                let layout = PackedLayout::new_with(isa, w.dtype(), n, 9 * s.c);
                let mut packed = vec![0; layout.bytes()];
                layout.pack(w, &mut packed);
                let mut again = vec![f32::NAN; m * n];
                let w = Weights::Packed(Packed::new(layout, &packed));
                conv3x3_with(isa, &conv, w, n, &none, SliceMut::F32(&mut again));
                assert!(y == again && (first.is_empty() || y == first), "{what}: other bits");
                first = y;
            }
        }
    }
}

#[test]
fn epilogues_and_narrow_results_are_as_those_of_the_product() {
    let (s, n) = shape(2);
    let m = s.b * s.out_h * s.out_w;
    let (x, w) = (random(s.b * s.h * s.w * s.c, 1), random(n * 9 * s.c, 2));
    let (bias, time, residual) = (random(n, 3), random(s.b * n, 4), random(m * n, 5));
    let conv = Conv { x: Slice::F32(&x), shape: s };
    for act in [Act::None, Act::Silu] {
        let batch = Some(BatchAdd { data: &time, rows: s.out_h * s.out_w });
        let e = Epilogue { bias: Some(&bias), batch, act, residual: Some(Slice::F32(&residual)) };
        let (mut y, mut want) = (vec![0.0; m * n], vec![0.0; m * n]);
        conv3x3(&conv, Weights::Raw(Slice::F32(&w)), n, &e, SliceMut::F32(&mut y));
        super::super::gemm::gemm(&conv, Weights::Raw(Slice::F32(&w)), n, &e, SliceMut::F32(&mut want));
        assert!(y.iter().zip(&want).all(|(y, w)| (y - w).abs() < 1e-4), "{act:?}");
        let mut narrow = vec![bf16::ZERO; m * n];
        conv3x3(&conv, Weights::Raw(Slice::F32(&w)), n, &e, SliceMut::BF16(&mut narrow));
        assert!(y.iter().zip(&narrow).all(|(y, b)| bf16::from_f32(*y) == *b), "{act:?}");
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for i in [2, 6] {
        let (s, n) = shape(i);
        let (x, w) = (random(s.b * s.h * s.w * s.c, 1), random(n * 9 * s.c, 2));
        let conv = Conv { x: Slice::F32(&x), shape: s };
        assert_threads_agree(&format!("{s:?}"), || {
            let mut y = vec![f32::NAN; s.b * s.out_h * s.out_w * n];
            conv3x3(&conv, Weights::Raw(Slice::F32(&w)), n, &Epilogue::default(), SliceMut::F32(&mut y));
            y
        });
    }
}

/// Where it is chosen: wherever it multiplies less, for the shapes of Stable Diffusion 1.5.
#[test]
fn the_real_shapes_take_the_cheaper_way() {
    let same = |b, side, c| ConvShape {
        b,
        h: side,
        w: side,
        c,
        kh: 3,
        kw: 3,
        stride: 1,
        pad_top: 1,
        pad_left: 1,
        out_h: side,
        out_w: side,
        upsample: false,
    };
    for (b, side, c) in [(2, 64, 320), (2, 32, 640), (2, 16, 1280), (2, 8, 1280), (1, 512, 128), (1, 64, 512)]
    {
        assert!(applies(&same(b, side, c), DType::F32), "{b} {side} {c}");
    }
    for (b, side, c) in [(2, 64, 320), (1, 512, 128)] {
        assert_eq!(applies(&same(b, side, c), DType::BF16), !Isa::best().has_wide_dot(), "{b} {side} {c}");
    }
    // One tile, the four channels of the latents, another step, another window.
    assert!(!applies(&same(1, 4, 1280), DType::F32) && !applies(&same(2, 64, 4), DType::F32));
    assert!(!applies(&ConvShape { stride: 2, out_h: 32, out_w: 32, ..same(2, 64, 320) }, DType::F32));
    assert!(!applies(&ConvShape { kh: 1, kw: 1, pad_top: 0, pad_left: 0, ..same(2, 64, 320) }, DType::F32));
    // Pairs of bf16 are multiplied where the machine can, and then serve few tiles better.
    for &isa in Isa::available() {
        let pairs = arith(isa, DType::BF16) == Arith::Dot;
        assert_eq!(pairs, isa.has_dot(), "{isa:?}");
        assert_eq!([DType::F32, DType::F16].map(|t| arith(isa, t)), [Arith::Fma; 2]);
    }
    assert_eq!(applies(&same(2, 8, 1280), DType::BF16), !Isa::best().has_dot());
}
