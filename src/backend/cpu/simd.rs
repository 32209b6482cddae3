//! Instruction sets: detection, vector operations, and the matrix microkernels.
//!
//! The binary is built for the baseline CPU; what the machine has is asked once, at run time. Everything that needs
//! `unsafe` on the CPU is in this file and in `grid.rs` below it: vector intrinsics, the register tiles that read through raw pointers, and
//! [`Grid`], which hands out disjoint rectangles of one matrix to several threads. What it exports is safe.
//!
//! A loop is written once, generic over [`Simd`], as a [`Kernel`]; [`Isa::run`] compiles it for each instruction set
//! and calls the one asked for. Register tiles are reached through [`tile`].
#![allow(unsafe_code)]

mod grid;
mod isa;

pub use grid::{Block, Grid};
use half::bf16;
pub use isa::Isa;
use std::array::from_fn;

impl Isa {
    /// Runs `kernel`, compiled for this instruction set. Panics if the machine does not have it.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Out {
        self.check();
        match self {
            Isa::Portable => kernel.run(Portable(())),
            // SAFETY: `check` has seen the features that these two functions are compiled with.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { x86::run_avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { x86::run_avx512(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("`check` refuses other instruction sets on this architecture"),
        }
    }
}

/// A loop to be compiled once per instruction set. `run` must be `#[inline(always)]`, and so must every generic
/// function that it calls with `s`: code that is not inlined is compiled for the baseline.
pub trait Kernel {
    /// What the loop returns.
    type Out;
    /// The loop.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// Vector operations of one instruction set. A value of the type proves that the machine has it: only [`Isa::run`]
/// makes one.
pub trait Simd: Copy {
    /// One vector.
    type F: Copy;
    /// f32 lanes of a vector: 4, 8 or 16.
    const LANES: usize;

    /// # Safety
    /// `p` is readable for `LANES` floats.
    unsafe fn load_ptr(self, p: *const f32) -> Self::F;
    /// # Safety
    /// `p` is writable for `LANES` floats.
    unsafe fn store_ptr(self, p: *mut f32, v: Self::F);
    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// a + b
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// a - b
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a / b
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, rounded once where the machine can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// a < b ? a : b, so `b` if either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// a > b ? a : b, so `b` if either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// 2^n for integral n in -126..=127; anything for other n.
    fn pow2(self, n: Self::F) -> Self::F;
    /// a · 2^n for integral n in -126..=127 and a within 2 of 1.
    #[inline(always)]
    fn scale2(self, a: Self::F, n: Self::F) -> Self::F {
        self.mul(a, self.pow2(n))
    }
    /// a < b ? yes : no, so `no` if either is NaN.
    fn select_lt(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;

    /// The first `LANES` elements of `x`.
    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::F {
        assert!(x.len() >= Self::LANES);
        // SAFETY: the slice is long enough.
        unsafe { self.load_ptr(x.as_ptr()) }
    }

    /// Writes the first `LANES` elements of `y`.
    #[inline(always)]
    fn store(self, y: &mut [f32], v: Self::F) {
        assert!(y.len() >= Self::LANES);
        // SAFETY: the slice is long enough.
        unsafe { self.store_ptr(y.as_mut_ptr(), v) }
    }

    /// Combines the lanes of `v`, halves first: a fixed order.
    #[inline(always)]
    fn reduce(self, v: Self::F, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut a = self.to_array(v);
        let mut half = Self::LANES / 2;
        while half > 0 {
            for i in 0..half {
                a[i] = f(a[i], a[i + half]);
            }
            half /= 2;
        }
        a[0]
    }

    /// The lanes, padded with zeros.
    #[inline(always)]
    fn to_array(self, v: Self::F) -> [f32; 16] {
        let mut a = [0.0; 16];
        self.store(&mut a, v);
        a
    }
}

/// Methods of [`Simd`] over one vector type, a line each.
macro_rules! methods {
    ($f:ty: $($name:ident($($arg:ident),*) $body:expr;)*) => {
        $(#[inline(always)] fn $name(self, $($arg: $f),*) -> $f { $body })*
    };
}

/// The methods that touch memory, and `splat`: expressions of a pointer p, of p and v, and of a float.
macro_rules! memory {
    ($f:ty: $p:ident $load:expr, $v:ident $store:expr, $x:ident $splat:expr) => {
        #[inline(always)]
        unsafe fn load_ptr(self, $p: *const f32) -> $f {
            // SAFETY: the caller's promise.
            unsafe { $load }
        }
        #[inline(always)]
        unsafe fn store_ptr(self, $p: *mut f32, $v: $f) {
            // SAFETY: the caller's promise.
            unsafe { $store }
        }
        #[inline(always)]
        fn splat(self, $x: f32) -> $f {
            // SAFETY: the token proves that the machine has the instruction.
            #[allow(unused_unsafe)]
            unsafe {
                $splat
            }
        }
    };
}

/// Four lanes of plain Rust.
#[derive(Clone, Copy)]
pub struct Portable(());

type Four = [f32; 4];

/// `mul_add` is one instruction where the baseline has it, and a slow library call where it has not.
const BASELINE_FMA: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

/// Adding it to |x| < 2^22, and taking it off again, rounds x to an integer.
const ROUNDING: f32 = 12_582_912.0;

#[inline(always)]
fn zip(a: Four, b: Four, f: impl Fn(f32, f32) -> f32) -> Four {
    from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type F = Four;
    const LANES: usize = 4;

    memory! { Four: p p.cast::<Four>().read_unaligned(), v p.cast::<Four>().write_unaligned(v), x [x; 4] }
    methods! { Four:
        add(a, b) zip(a, b, |a, b| a + b);
        sub(a, b) zip(a, b, |a, b| a - b);
        mul(a, b) zip(a, b, |a, b| a * b);
        div(a, b) zip(a, b, |a, b| a / b);
        fma(a, b, c) from_fn(|i| if BASELINE_FMA { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] });
        min(a, b) zip(a, b, |a, b| if a < b { a } else { b });
        max(a, b) zip(a, b, |a, b| if a > b { a } else { b });
        round(a) a.map(|a| (a + ROUNDING) - ROUNDING);
        pow2(n) n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23));
        select_lt(a, b, yes, no) from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] });
    }
}

/// Floats from one row of a tile's left operand to the next. Fixed, so that a tile addresses all its rows from one
/// register, and odd in cache lines, so that rows fall into different sets.
pub const LDA: usize = 528;

/// Longest inner dimension of one call of [`tile`].
pub const KC: usize = 512;

/// The widest and the tallest tile of any instruction set.
pub const MAX_NR: usize = 32;
/// See [`MAX_NR`].
pub const MAX_MR: usize = 14;

type TileFn = unsafe fn(&Tile);

/// What a register tile works on: C (row stride ldc) = A (row stride [`LDA`], kc long) · B (kc lines), or +=.
struct Tile {
    a: *const f32,
    b: *const f32,
    kc: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
}

/// R rows by V vectors: R · V accumulators in registers, one fused multiply-add chain per element in order of k,
/// whatever the tile's size. So an element's bits do not depend on how a matrix is cut into tiles.
///
/// # Safety
/// a is readable for ·LDA + kc floats, b for kc·V·LANES, c writable for ·ldc + V·LANES.
#[inline(always)]
unsafe fn tile_body<S: Simd, const R: usize, const V: usize>(s: S, t: &Tile) {
    let mut acc = [[s.splat(0.0); V]; R];
    // SAFETY: the caller's promise bounds every offset below.
    unsafe {
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.kc {
            let mut row = [s.splat(0.0); V];
            for v in 0..V {
                row[v] = s.load_ptr(b.add(v * S::LANES));
            }
            for r in 0..R {
                let x = s.splat(*a.add(r * LDA));
                for v in 0..V {
                    acc[r][v] = s.fma(x, row[v], acc[r][v]);
                }
            }
            a = a.add(1);
            b = b.add(V * S::LANES);
        }
        for r in 0..R {
            for v in 0..V {
                let p = t.c.add(r * t.ldc + v * S::LANES);
                let sum = if t.accumulate { s.add(s.load_ptr(p), acc[r][v]) } else { acc[r][v] };
                s.store_ptr(p, sum);
            }
        }
    }
}

/// # Safety
/// As [`tile_body`].
unsafe fn tile_portable<const R: usize, const V: usize>(t: &Tile) {
    // SAFETY: the caller's promise.
    unsafe { tile_body::<Portable, R, V>(Portable(()), t) }
}

/// `[width in vectors - 1][rows - 1]`
macro_rules! tiles {
    ($f:ident, $($r:literal)*) => { [[$($f::<$r, 1> as TileFn),*], [$($f::<$r, 2> as TileFn),*]] };
}

static PORTABLE_TILES: [[TileFn; 8]; 2] = tiles!(tile_portable, 1 2 3 4 5 6 7 8);

/// A packed panel of the right operand, kc lines of `width` words, where `width` is nr or nr / 2 of `isa`.
#[derive(Clone, Copy)]
pub struct Panel<'a> {
    /// The instruction set whose tiles it is packed for.
    pub isa: Isa,
    /// (kc, width)
    pub data: &'a [f32],
    /// Columns, padding included.
    pub width: usize,
    /// Length of the inner dimension in words, at most [`KC`].
    pub kc: usize,
    /// What the words are.
    pub arith: Arith,
}

/// What the 32-bit words of a product's operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arith {
    /// One f32 each: fused multiply-adds.
    Fma,
    /// Two adjacent bf16 each, of which the machine adds both products to one f32: twice as many a cycle. Subnormal
    /// numbers count as zero.
    Dot,
}

/// C\[r0.., c0..\] (rows × width) = A (rows × kc, row stride [`LDA`]) · `b`, or += if `accumulate`; `rows` is 1..=mr.
/// An element is one chain of fused multiply-adds in order of k.
pub fn tile(rows: usize, a: &[f32], b: &Panel, c: &mut Block, (r0, c0): (usize, usize), accumulate: bool) {
    let Panel { isa, data, width, kc, arith } = *b;
    isa.check();
    assert!(arith == Arith::Fma || isa.has_dot(), "{isa:?} has no dot products of bf16");
    let vectors = width / isa.lanes();
    assert!(
        (1..=isa.mr()).contains(&rows) && (vectors == 1 || vectors == 2) && width == vectors * isa.lanes()
    );
    assert!((1..=KC).contains(&kc) && a.len() >= (rows - 1) * LDA + kc && data.len() >= kc * width);
    let inside = r0 <= c.rows() && rows <= c.rows() - r0 && c0 <= c.cols() && width <= c.cols() - c0;
    assert!(
        inside,
        "a tile {rows} × {width} at ({r0}, {c0}) lies outside its block, {} × {}",
        c.rows(),
        c.cols()
    );
    let f = match isa {
        Isa::Portable => PORTABLE_TILES[vectors - 1][rows - 1],
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::AVX2_TILES[vectors - 1][rows - 1],
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if arith == Arith::Dot => x86::DOT_TILES[vectors - 1][rows - 1],
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => x86::AVX512_TILES[vectors - 1][rows - 1],
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("`check` refuses other instruction sets on this architecture"),
    };
    // SAFETY: `check` has seen the instruction set; the assertions above are what a tile asks of a, b and c.
    unsafe {
        let (c, ldc) = (c.ptr().add(r0 * c.ld() + c0), c.ld());
        f(&Tile { a: a.as_ptr(), b: data.as_ptr(), kc, c, ldc, accumulate })
    }
}

/// y = x in bf16, nearest even, subnormal numbers as zero. Panics where there are no dot products of bf16, whose operand
/// this makes, or lengths differ.
pub fn narrow_for_dot(isa: Isa, x: &[f32], y: &mut [bf16]) {
    assert!(isa.has_dot() && x.len() == y.len());
    // SAFETY: `has_dot` has seen the instruction set; both are x.len() long.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        x86::narrow(x.as_ptr(), y.as_mut_ptr().cast(), x.len());
    }
}

/// out\[k·width + r\] = src\[r·ld + k\] for r < rows, k < kc, and 0 for rows <= r < width: packs rows into a panel.
pub fn transpose(isa: Isa, src: &[f32], ld: usize, rows: usize, kc: usize, width: usize, out: &mut [f32]) {
    isa.check();
    let need = rows.saturating_sub(1).saturating_mul(ld).saturating_add(kc);
    assert!(rows <= width && out.len() >= kc.saturating_mul(width) && (rows == 0 || src.len() >= need));
    // Whole 8 × 8 blocks go through registers where there is AVX2; the rest element by element.
    let whole = if isa == Isa::Portable { (0, 0) } else { (rows / 8 * 8, kc / 8 * 8) };
    #[cfg(target_arch = "x86_64")]
    if isa != Isa::Portable {
        // SAFETY: `check` has seen AVX2; the blocks lie inside what the assertion measured.
        unsafe { x86::transpose8(src.as_ptr(), ld, whole.0, whole.1, width, out.as_mut_ptr()) };
    }
    for (k, line) in out.chunks_exact_mut(width).take(kc).enumerate() {
        for r in if k < whole.1 { whole.0 } else { 0 }..rows {
            line[r] = src[r * ld + k];
        }
        line[rows..].fill(0.0);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, LDA, Simd, Tile, TileFn, tile_body};
    use std::arch::x86_64::*;
    use std::mem::transmute;

    /// Eight lanes.
    #[derive(Clone, Copy)]
    pub(super) struct Ymm(());
    /// Sixteen lanes.
    #[derive(Clone, Copy)]
    pub(super) struct Zmm(());

    /// # Safety
    /// The machine has the features.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Out {
        kernel.run(Ymm(()))
    }

    /// # Safety
    /// The machine has the features.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Out {
        kernel.run(Zmm(()))
    }

    /// # Safety
    /// The machine has the features; pointers as `tile_body`.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile_avx2<const R: usize, const V: usize>(t: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile_body::<Ymm, R, V>(Ymm(()), t) }
    }

    /// # Safety
    /// The machine has the features; pointers as `tile_body`.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn tile_avx512<const R: usize, const V: usize>(t: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile_body::<Zmm, R, V>(Zmm(()), t) }
    }

    /// The same bits, as pairs.
    #[inline(always)]
    fn pairs(v: __m512) -> __m512bh {
        // SAFETY: both are 64 bytes without invalid values.
        unsafe { transmute::<__m512, __m512bh>(v) }
    }

    /// [`tile_body`] on pairs of bf16: a word of A times a word of B is two products.
    ///
    /// # Safety
    /// The machine has the features; pointers as `tile_body`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn tile_dot<const R: usize, const V: usize>(t: &Tile) {
        let mut acc = [[_mm512_setzero_ps(); V]; R];
        // SAFETY: the caller's promise bounds every offset below; any 64 bytes are 32 bf16.
        unsafe {
            let (mut a, mut b) = (t.a, t.b);
            for _ in 0..t.kc {
                let mut row = [pairs(_mm512_setzero_ps()); V];
                for v in 0..V {
                    row[v] = pairs(_mm512_loadu_ps(b.add(v * 16)));
                }
                for r in 0..R {
                    let x = pairs(_mm512_set1_ps(*a.add(r * LDA)));
                    for v in 0..V {
                        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, row[v]);
                    }
                }
                a = a.add(1);
                b = b.add(V * 16);
            }
            for r in 0..R {
                for v in 0..V {
                    let p = t.c.add(r * t.ldc + v * 16);
                    let sum =
                        if t.accumulate { _mm512_add_ps(_mm512_loadu_ps(p), acc[r][v]) } else { acc[r][v] };
                    _mm512_storeu_ps(p, sum);
                }
            }
        }
    }

    /// Rounds n floats to bf16.
    ///
    /// # Safety
    /// The machine has the features; x is readable and y writable for n elements.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn narrow(x: *const f32, y: *mut u16, n: usize) {
        for i in (0..n).step_by(16) {
            let mask = if n - i < 16 { (1u16 << (n - i)) - 1 } else { !0 };
            // SAFETY: the mask keeps both accesses within n elements.
            unsafe {
                let v = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x.add(i)));
                _mm256_mask_storeu_epi16(y.add(i).cast(), mask, transmute::<__m256bh, __m256i>(v));
            }
        }
    }

    pub(super) static DOT_TILES: [[TileFn; 14]; 2] = tiles!(tile_dot, 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    pub(super) static AVX2_TILES: [[TileFn; 6]; 2] = tiles!(tile_avx2, 1 2 3 4 5 6);
    pub(super) static AVX512_TILES: [[TileFn; 14]; 2] = tiles!(tile_avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14);

    /// out[k·width + r] = src[r·ld + k] for r < rows, k < kc, both multiples of 8.
    ///
    /// # Safety
    /// The machine has AVX2; src is readable for (rows-1)·ld + kc floats, out writable for (kc-1)·width + rows.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn transpose8(
        src: *const f32,
        ld: usize,
        rows: usize,
        kc: usize,
        width: usize,
        out: *mut f32,
    ) {
        // Along k within a strip of eight rows: eight streams of reads, which the prefetcher follows.
        for r in (0..rows).step_by(8) {
            for k in (0..kc).step_by(8) {
                // SAFETY: the 8 × 8 block at (r, k) is inside both.
                unsafe {
                    let p = src.add(r * ld + k);
                    if k % 16 == 0 {
                        // Rows are far apart, and a block of k too short for the hardware to see a stream: ask for
                        // the next strip, or for the same rows in the next block of k. May point past the end.
                        let next = if r + 8 < rows {
                            p.wrapping_add(8 * ld)
                        } else {
                            p.wrapping_sub(r * ld).wrapping_add(kc)
                        };
                        for i in 0..8 {
                            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(i * ld).cast());
                        }
                    }
                    let mut x = [_mm256_setzero_ps(); 8];
                    for (i, x) in x.iter_mut().enumerate() {
                        *x = _mm256_loadu_ps(p.add(i * ld));
                    }
                    // Pairs, then quads of rows are interleaved within 128-bit halves; the last step swaps halves.
                    let (a0, a1) = (_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
                    let (b0, b1) = (_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
                    let (c0, c1) = (_mm256_unpacklo_ps(x[4], x[5]), _mm256_unpackhi_ps(x[4], x[5]));
                    let (d0, d1) = (_mm256_unpacklo_ps(x[6], x[7]), _mm256_unpackhi_ps(x[6], x[7]));
                    let top = [
                        _mm256_shuffle_ps::<0x44>(a0, b0),
                        _mm256_shuffle_ps::<0xEE>(a0, b0),
                        _mm256_shuffle_ps::<0x44>(a1, b1),
                        _mm256_shuffle_ps::<0xEE>(a1, b1),
                    ];
                    let bottom = [
                        _mm256_shuffle_ps::<0x44>(c0, d0),
                        _mm256_shuffle_ps::<0xEE>(c0, d0),
                        _mm256_shuffle_ps::<0x44>(c1, d1),
                        _mm256_shuffle_ps::<0xEE>(c1, d1),
                    ];
                    let q = out.add(k * width + r);
                    for i in 0..4 {
                        _mm256_storeu_ps(q.add(i * width), _mm256_permute2f128_ps::<0x20>(top[i], bottom[i]));
                        _mm256_storeu_ps(
                            q.add((i + 4) * width),
                            _mm256_permute2f128_ps::<0x31>(top[i], bottom[i]),
                        );
                    }
                }
            }
        }
    }

    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

    // SAFETY of all `unsafe` in these two: a method is inlined into a function that has the features, because a token
    // exists only there; what pointers must point to is the caller's promise.
    impl Simd for Ymm {
        type F = __m256;
        const LANES: usize = 8;

        memory! { __m256: p _mm256_loadu_ps(p), v _mm256_storeu_ps(p, v), x _mm256_set1_ps(x) }
        methods! { __m256:
            add(a, b) unsafe { _mm256_add_ps(a, b) };
            sub(a, b) unsafe { _mm256_sub_ps(a, b) };
            mul(a, b) unsafe { _mm256_mul_ps(a, b) };
            div(a, b) unsafe { _mm256_div_ps(a, b) };
            fma(a, b, c) unsafe { _mm256_fmadd_ps(a, b, c) };
            min(a, b) unsafe { _mm256_min_ps(a, b) };
            max(a, b) unsafe { _mm256_max_ps(a, b) };
            round(a) unsafe { _mm256_round_ps::<NEAREST>(a) };
            pow2(n) unsafe {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            };
            select_lt(a, b, yes, no) unsafe { _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) };
        }
    }

    impl Simd for Zmm {
        type F = __m512;
        const LANES: usize = 16;

        memory! { __m512: p _mm512_loadu_ps(p), v _mm512_storeu_ps(p, v), x _mm512_set1_ps(x) }
        methods! { __m512:
            add(a, b) unsafe { _mm512_add_ps(a, b) };
            sub(a, b) unsafe { _mm512_sub_ps(a, b) };
            mul(a, b) unsafe { _mm512_mul_ps(a, b) };
            div(a, b) unsafe { _mm512_div_ps(a, b) };
            fma(a, b, c) unsafe { _mm512_fmadd_ps(a, b, c) };
            min(a, b) unsafe { _mm512_min_ps(a, b) };
            max(a, b) unsafe { _mm512_max_ps(a, b) };
            round(a) unsafe { _mm512_roundscale_ps::<NEAREST>(a) };
            pow2(n) unsafe {
                let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
            };
            scale2(a, n) unsafe { _mm512_scalef_ps(a, n) };
            select_lt(a, b, yes, no) unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes) };
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
