use super::super::simd::tests::{assert_close, assert_threads_agree, random};
use super::*;
use crate::tensor::DType;
use half::f16;

/// A · Wᵀ in f64, and the same of absolute values.
fn product(a: &[f32], w: &[f32], m: usize, n: usize, k: usize) -> (Vec<f64>, Vec<f64>) {
    let dot = |i: usize, f: fn(f64) -> f64| {
        let (a, w) = (&a[i / n * k..][..k], &w[i % n * k..][..k]);
        a.iter().zip(w).map(|(&a, &w)| f(a as f64 * w as f64)).sum::<f64>()
    };
    ((0..m * n).map(|i| dot(i, |x| x)).collect(), (0..m * n).map(|i| dot(i, f64::abs)).collect())
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

const SIZES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (1, 5, 7),
    (2, 64, 513),
    (3, 17, 33),
    (13, 16, 31),
    (15, 33, 512),
    (29, 48, 1030),
    (64, 40, 97),
    (77, 96, 64),
    (256, 31, 20),
    (257, 33, 40),
    (300, 350, 600),
    (341, 4, 36),
    (400, 1, 3),
];

/// Each form of W gives the same bits, and these are right.
#[test]
fn products_are_right_in_every_form() {
    for (m, n, k) in SIZES {
        let (a, w) = (random(m * k, 1), random(n * k, 2));
        let (want, absolute) = product(&a, &w, m, n, k);
        for &isa in Isa::available() {
            let what = format!("{isa:?} ({m}, {n}, {k})");
            let layout = PackedLayout::new_with(isa, DType::F32, n, k);
            assert_eq!((layout.shape(), layout.dtype()), ((n, k), DType::F32));
            let mut packed = vec![0; layout.bytes()];
            layout.pack(Slice::F32(&w), &mut packed);
            let packed = Packed::new(layout, &packed);
            assert!(packed.unpack() == bytemuck::cast_slice::<f32, u8>(&w), "{what}: unpacked");
            let run = |w: Weights| {
                let mut out = vec![f32::NAN; m * n];
                let a = Dense::new(Slice::F32(&a), m, k);
                gemm_with(isa, &a, w, n, &Epilogue::default(), SliceMut::F32(&mut out));
                out
            };
            let first = run(Weights::Raw(Slice::F32(&w)));
            assert_close(&first, &want, &absolute, &what);
            assert!(bits(&run(Weights::Packed(packed))) == bits(&first), "{what}: packed gives other bits");
        }
    }
}

/// 16-bit operands, multiplied in pairs or widened, raw or packed: their products in f64, to f32's bounds; and the
/// same rounded once where the result is 16 bits wide.
#[test]
fn narrow_products_are_right_in_every_form() {
    for (m, n, k) in SIZES {
        let (a, w) = (random(m * k, 1), random(n * k, 2));
        let (ab, wb) =
            (a.iter().map(|&v| bf16::from_f32(v)).collect(), w.iter().map(|&v| bf16::from_f32(v)).collect());
        let (ah, wh) =
            (a.iter().map(|&v| f16::from_f32(v)).collect(), w.iter().map(|&v| f16::from_f32(v)).collect());
        let (ab, wb, ah, wh): (Vec<bf16>, Vec<bf16>, Vec<f16>, Vec<f16>) = (ab, wb, ah, wh);
        for (x, w) in [(Slice::BF16(&ab), Slice::BF16(&wb)), (Slice::F16(&ah), Slice::F16(&wh))] {
            let (mut a, mut wide) = (vec![0.0; m * k], vec![0.0; n * k]);
            x.read(0, &mut a);
            w.read(0, &mut wide);
            let (want, absolute) = product(&a, &wide, m, n, k);
            let residual: Vec<f32> = random(m * n, 6).iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
            let narrow: Vec<bf16> = residual.iter().map(|&v| bf16::from_f32(v)).collect();
            for &isa in Isa::available() {
                let what = format!("{isa:?} {} ({m}, {n}, {k})", x.dtype());
                let layout = PackedLayout::new_with(isa, x.dtype(), n, k);
                let mut packed = vec![0; layout.bytes()];
                layout.pack(w, &mut packed);
                let packed = Packed::new(layout, &packed);
                let mut again = vec![0.0; n * k];
                Slice::of(x.dtype(), &packed.unpack()).unwrap().read(0, &mut again);
                assert!(again == wide, "{what}: unpacked");
                let (mut first, mut second, mut third) =
                    (vec![0.0; m * n], vec![0.0; m * n], vec![bf16::ZERO; m * n]);
                let a = Dense::new(x, m, k);
                let e = Epilogue::default();
                gemm_with(isa, &a, Weights::Raw(w), n, &e, SliceMut::F32(&mut first));
                gemm_with(isa, &a, Weights::Packed(packed), n, &e, SliceMut::F32(&mut second));
                assert_close(&first, &want, &absolute, &what);
                assert!(bits(&first) == bits(&second), "{what}: packed gives other bits");
                let e = Epilogue { residual: Some(Slice::BF16(&narrow)), ..e };
                gemm_with(isa, &a, Weights::Packed(packed), n, &e, SliceMut::BF16(&mut third));
                for i in 0..m * n {
                    assert_eq!(third[i], bf16::from_f32(first[i] + residual[i]), "{what}: element {i}");
                }
            }
        }
    }
}

#[test]
fn epilogues_do_what_they_say() {
    // Few rows and many; a block of rows that crosses batch items; a panel that crosses the width.
    for (m, n, k, per_item) in [(6, 37, 20, 3), (300, 45, 70, 100), (600, 330, 40, 150)] {
        let (a, w) = (random(m * k, 1), random(n * k, 2));
        let (bias, residual) = (random(n, 3), random(m * n, 4));
        let items = random(m / per_item * n, 5);
        let (sums, absolute) = product(&a, &w, m, n, k);
        for &isa in Isa::available() {
            for act in
                [Act::None, Act::Silu, Act::Gelu, Act::QuickGelu, Act::GeluTanh, Act::Relu, Act::LeakyRelu]
            {
                for data in [&items[..], &items[..n]] {
                    let batch = Some(BatchAdd { data, rows: per_item });
                    let e = Epilogue { bias: Some(&bias), batch, act, residual: Some(Slice::F32(&residual)) };
                    let mut out = vec![f32::NAN; m * n];
                    gemm_with(
                        isa,
                        &Dense::new(Slice::F32(&a), m, k),
                        Weights::Raw(Slice::F32(&w)),
                        n,
                        &e,
                        SliceMut::F32(&mut out),
                    );
                    let (mut want, mut scale) = (vec![0.0; m * n], vec![0.0; m * n]);
                    for i in 0..m * n {
                        let item = if data.len() == n { 0 } else { i / n / per_item };
                        let (b, t, r) =
                            (bias[i % n] as f64, data[item * n + i % n] as f64, residual[i] as f64);
                        want[i] = act.apply_f64(sums[i] + b + t) + r;
                        // The slope of these functions is at most 1.13.
                        scale[i] = 1.13 * (absolute[i] + b.abs() + t.abs()) + r.abs();
                    }
                    assert_close(&out, &want, &scale, &format!("{isa:?} ({m}, {n}, {k}) {act:?}"));
                }
            }
        }
    }
}

fn im2col(x: &[f32], p: &ConvShape) -> Vec<f32> {
    let (k, up) = (p.kh * p.kw * p.c, if p.upsample { 2 } else { 1 });
    let mut a = vec![0.0; p.b * p.out_h * p.out_w * k];
    for (i, a) in a.iter_mut().enumerate() {
        let (m, k) = (i / k, i % k);
        let (b, oh, ow) = (m / (p.out_h * p.out_w), m / p.out_w % p.out_h, m % p.out_w);
        let (kh, kw, c) = (k / (p.kw * p.c), k / p.c % p.kw, k % p.c);
        let ih = (oh * p.stride + kh) as isize - p.pad_top as isize;
        let iw = (ow * p.stride + kw) as isize - p.pad_left as isize;
        if (0..(p.h * up) as isize).contains(&ih) && (0..(p.w * up) as isize).contains(&iw) {
            *a = x[((b * p.h + ih as usize / up) * p.w + iw as usize / up) * p.c + c];
        }
    }
    a
}

#[test]
fn convolutions_read_what_im2col_would() {
    // (b, h, w, c, kh, kw, stride, pad_top, pad_left, out_h, out_w)
    let shapes = [
        [1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1],
        [1, 1, 1, 3, 3, 3, 1, 1, 1, 1, 1],
        [2, 5, 7, 3, 3, 3, 1, 1, 1, 5, 7],
        [3, 8, 6, 4, 3, 3, 2, 1, 1, 4, 3],
        // Padding below and to the right alone, as the downsampling of the autoencoders has it.
        [2, 8, 8, 5, 3, 3, 2, 0, 0, 4, 4],
        [1, 9, 4, 70, 3, 3, 1, 1, 1, 9, 4],
        [2, 6, 5, 130, 1, 1, 1, 0, 0, 6, 5],
        [1, 16, 16, 8, 5, 3, 1, 2, 1, 16, 16],
        [1, 7, 3, 2, 4, 4, 4, 0, 0, 2, 1],
        [1, 2, 2, 600, 3, 3, 1, 1, 1, 2, 2],
        [1, 4, 4, 6, 7, 7, 1, 5, 6, 5, 7],
        [2, 17, 19, 11, 3, 3, 1, 1, 1, 17, 19],
    ];
    for s in shapes {
        for upsample in [false, true] {
            let [b, h, w, c, kh, kw, stride, pad_top, pad_left, mut out_h, mut out_w] = s;
            if upsample && stride == 1 {
                (out_h, out_w) = (out_h + h, out_w + w);
            }
            let shape = ConvShape { b, h, w, c, kh, kw, stride, pad_top, pad_left, out_h, out_w, upsample };
            let (m, n, k) = (b * out_h * out_w, 9, kh * kw * c);
            let (x, weights) = (random(b * h * w * c, 1), random(n * k, 2));
            let a = im2col(&x, &shape);
            let conv = Conv { x: Slice::F32(&x), shape };
            assert_eq!((conv.m(), conv.k()), (m, k));
            let (want, absolute) = product(&a, &weights, m, n, k);
            for &isa in Isa::available() {
                let (mut out, mut dense) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
                let e = Epilogue::default();
                gemm_with(isa, &conv, Weights::Raw(Slice::F32(&weights)), n, &e, SliceMut::F32(&mut out));
                gemm_with(
                    isa,
                    &Dense::new(Slice::F32(&a), m, k),
                    Weights::Raw(Slice::F32(&weights)),
                    n,
                    &e,
                    SliceMut::F32(&mut dense),
                );
                assert_close(&out, &want, &absolute, &format!("{isa:?} {shape:?}"));
                assert!(bits(&out) == bits(&dense), "{isa:?} {shape:?}: other bits than im2col");
            }
        }
    }
}

#[test]
fn bits_depend_on_neither_threads_nor_other_rows_nor_the_width_of_vectors() {
    for (m, n, k) in [(5, 70, 300), (100, 200, 1100), (700, 90, 1100)] {
        let (a, w) = (random(m * k, 1), random(n * k, 2));
        let run = |isa: Isa, m: usize| {
            let mut out = vec![f32::NAN; m * n];
            let a = Dense::new(Slice::F32(&a[..m * k]), m, k);
            gemm_with(
                isa,
                &a,
                Weights::Raw(Slice::F32(&w)),
                n,
                &Epilogue::default(),
                SliceMut::F32(&mut out),
            );
            out
        };
        for &isa in Isa::available() {
            assert_threads_agree(&format!("{isa:?} ({m}, {n}, {k})"), || run(isa, m));
            let all = run(isa, m);
            for rows in [1, 3] {
                assert!(bits(&run(isa, rows)) == bits(&all[..rows * n]), "{isa:?}: {rows} rows alone differ");
            }
        }
        if Isa::available().contains(&Isa::Avx512) {
            assert!(bits(&run(Isa::Avx2, m)) == bits(&run(Isa::Avx512, m)), "AVX2 and AVX-512 differ");
        }
    }
}

/// Padded columns of a panel are 0 · A: an infinity there must not reach what is kept.
#[test]
fn infinities_stay_in_their_row() {
    let (m, n, k) = (20, 3, 9);
    let (mut a, w) = (random(m * k, 1), random(n * k, 2));
    a[4 * k] = f32::INFINITY;
    for &isa in Isa::available() {
        let mut out = vec![0.0; m * n];
        gemm_with(
            isa,
            &Dense::new(Slice::F32(&a), m, k),
            Weights::Raw(Slice::F32(&w)),
            n,
            &Epilogue::default(),
            SliceMut::F32(&mut out),
        );
        for (i, x) in out.iter().enumerate() {
            assert_eq!(x.is_finite(), i / n != 4, "{isa:?} at {i}: {x}");
        }
    }
}

#[test]
fn nothing_to_do_is_no_error() {
    gemm(
        &Dense::new(Slice::F32(&[]), 0, 3),
        Weights::Raw(Slice::F32(&[1.0; 6])),
        2,
        &Epilogue::default(),
        SliceMut::F32(&mut []),
    );
    gemm(
        &Dense::new(Slice::F32(&[1.0; 6]), 2, 3),
        Weights::Raw(Slice::F32(&[])),
        0,
        &Epilogue::default(),
        SliceMut::F32(&mut []),
    );
}

#[test]
#[should_panic(expected = "length or type of w")]
fn a_wrong_weight_is_refused() {
    gemm(
        &Dense::new(Slice::F32(&[1.0; 6]), 2, 3),
        Weights::Raw(Slice::F32(&[1.0; 5])),
        2,
        &Epilogue::default(),
        SliceMut::F32(&mut [0.0; 4]),
    );
}
