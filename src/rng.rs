//! Random numbers: torch's CPU generator, bit for bit, and a small one for tests and benches.

use std::f64::consts::PI;

/// Words of MT19937's state.
const N: usize = 624;
/// Distance of the word that is mixed in.
const M: usize = 397;

/// torch's CPU generator: MT19937 and torch's own transforms to uniform and normal numbers.
///
/// `Generator::new(s).randn(n)` equals `torch.randn(n, generator=torch.Generator().manual_seed(s))` in
/// float32, bit for bit, as torch computes it on x86-64 with AVX2 (any later CPU takes the same path).
#[derive(Clone)]
pub struct Generator {
    state: [u32; N],
    next: usize,
    /// The second value of a double-precision Box-Muller pair, kept for the next short draw.
    spare: Option<f64>,
}

impl Generator {
    /// A generator as `torch.manual_seed(seed)` leaves it. Only the low 32 bits count, as in torch.
    pub fn new(seed: u64) -> Generator {
        let mut state = [0u32; N];
        state[0] = seed as u32;
        for i in 1..N {
            let last = state[i - 1];
            state[i] = 1812433253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        Generator { state, next: N, spare: None }
    }

    /// The next 32 random bits.
    pub fn random(&mut self) -> u32 {
        if self.next == N {
            self.refill();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// The next 64 random bits: the first word is the upper half.
    pub fn random64(&mut self) -> u64 {
        let high = self.random() as u64;
        high << 32 | self.random() as u64
    }

    /// Uniform in [0,1) with 24 bits, as `torch.rand` in float32.
    pub fn uniform(&mut self) -> f32 {
        (self.random() & 0xff_ffff) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    /// Uniform in [0,1) with 53 bits, as `torch.rand` in float64.
    pub fn uniform64(&mut self) -> f64 {
        (self.random64() & ((1 << 53) - 1)) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// `n` values of unit normal noise, as `torch.randn(shape)` in float32 for a shape of `n` elements.
    ///
    /// torch has two algorithms, and so two streams: from 16 elements on, blocks of 16 uniforms become 16
    /// normals (a last partial block is redrawn as the last 16 elements); below, pairs in double precision of
    /// which the second outlives the call.
    pub fn randn(&mut self, n: usize) -> Vec<f32> {
        if n < 16 {
            return (0..n).map(|_| self.normal64() as f32).collect();
        }
        let mut x: Vec<f32> = (0..n).map(|_| self.uniform()).collect();
        x.chunks_exact_mut(16).for_each(box_muller);
        if !n.is_multiple_of(16) {
            let tail = &mut x[n - 16..];
            tail.iter_mut().for_each(|v| *v = self.uniform());
            box_muller(tail);
        }
        x
    }

    fn normal64(&mut self) -> f64 {
        if let Some(v) = self.spare.take() {
            return v;
        }
        let (u1, u2) = (self.uniform64(), self.uniform64());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let angle = 2.0 * PI * u1;
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }

    fn refill(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }
}

/// 16 uniforms become 16 normals: elements j and j+8 are one pair.
fn box_muller(x: &mut [f32]) {
    for j in 0..8 {
        let radius = (-2.0 * ln(1.0 - x[j])).sqrt();
        let (sin, cos) = sin_cos((2.0 * PI) as f32 * x[j + 8]);
        x[j] = radius * cos;
        x[j + 8] = radius * sin;
    }
}

/// Horner's rule with one rounding per step, as the compiler contracts torch's vector code.
fn poly(x: f32, c: &[f32]) -> f32 {
    c[1..].iter().fold(c[0], |y, &c| y.mul_add(x, c))
}

/// Natural logarithm on (0,1], Cephes' single precision polynomial. Where a product is rounded before a sum
/// and where not follows the AVX2 build of torch: another order is as accurate, and differs in the last bit.
fn ln(v: f32) -> f32 {
    let bits = v.to_bits();
    let mut e = ((bits >> 23) as i32 - 126) as f32;
    let mut x = f32::from_bits(bits & 0x007f_ffff | 0x3f00_0000); // in [0.5, 1)
    if x < std::f32::consts::FRAC_1_SQRT_2 {
        e -= 1.0;
        x += x - 1.0;
    } else {
        x -= 1.0;
    }
    const P: [f32; 9] = [
        0.070_376_836,
        -0.115_146_1,
        0.116_769_984,
        -0.124_201_41,
        0.142_493_23,
        -0.166_680_57,
        0.200_007_14,
        -0.249_999_94,
        0.333_333_3,
    ];
    let z = x * x;
    let y = (poly(x, &P) * x).mul_add(z, e * -2.121_944_4e-4);
    let y = (-z).mul_add(0.5, y);
    e.mul_add(0.693_359_4, x + y)
}

/// Sine and cosine on [0, 2 pi), Cephes' single precision polynomials about the nearest multiple of pi/2,
/// rounded as in `ln`.
fn sin_cos(v: f32) -> (f32, f32) {
    let octant = ((v * std::f32::consts::FRAC_2_PI * 2.0) as i32 + 1) & !1;
    let q = octant as f32;
    // pi/4 in three parts, so that the subtraction loses nothing
    let x = [-0.785_156_25, -2.418_756_5e-4, -3.774_895e-8].iter().fold(v, |x, &part| q.mul_add(part, x));
    let z = x * x;
    let c = poly(z, &[2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2]) * z;
    let c = c.mul_add(z, -(z * 0.5)) + 1.0;
    let s = (poly(z, &[-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1]) * z).mul_add(x, x);
    match (octant / 2) & 3 {
        0 => (s, c),
        1 => (c, -s),
        2 => (-s, -c),
        _ => (-c, s),
    }
}

/// A small generator for tests, benches and made-up data (SplitMix64). Its numbers are not torch's.
#[derive(Clone, Debug)]
pub struct Small(u64);

impl Small {
    /// Any seed will do, zero included.
    pub fn new(seed: u64) -> Small {
        Small(seed)
    }

    /// The next 64 random bits.
    pub fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0,1).
    pub fn uniform(&mut self) -> f64 {
        (self.u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in [low, high).
    pub fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Unit normal.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (2.0 * PI * self.uniform()).cos()
    }

    /// Uniform among 0..n; `n` must not be zero.
    pub fn below(&mut self, n: usize) -> usize {
        // The bias of 2^-64 * n is of no concern to a test.
        ((self.u64() as u128 * n as u128) >> 64) as usize
    }
}

/// A seed that nobody chose, below 2³² so that it is short to type again.
pub fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library keys each of these from the operating system's randomness.
    std::collections::hash_map::RandomState::new().build_hasher().finish() >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Drawn by `tools/golden_samplers.py` from torch: bits of float32, as integers.
    #[derive(serde::Deserialize)]
    struct Case {
        seed: u64,
        /// Sizes of consecutive draws from one generator, and the bits of all of them.
        sizes: Vec<usize>,
        bits: Vec<u32>,
        /// FNV-1a over the bits of one long draw of this size.
        long: (usize, u64),
        rand: Vec<u32>,
    }

    #[test]
    fn equals_torch_bit_for_bit() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../tests/golden/randn.json")).unwrap();
        assert!(cases.len() >= 5);
        for case in cases {
            let mut g = Generator::new(case.seed);
            let ours: Vec<u32> = case.sizes.iter().flat_map(|&n| g.randn(n)).map(f32::to_bits).collect();
            assert_eq!(ours.len(), case.bits.len());
            for (i, (a, b)) in ours.iter().zip(&case.bits).enumerate() {
                let (x, y) = (f32::from_bits(*a), f32::from_bits(*b));
                assert_eq!(a, b, "seed {} sizes {:?} element {i}: {x} is not {y}", case.seed, case.sizes);
            }
            let mut g = Generator::new(case.seed);
            let hash = g.randn(case.long.0).iter().fold(0xcbf2_9ce4_8422_2325u64, |h, v| {
                (h ^ v.to_bits() as u64).wrapping_mul(0x0000_0100_0000_01b3)
            });
            assert_eq!(hash, case.long.1, "seed {}: the long draw", case.seed);
            let mut g = Generator::new(case.seed);
            let ours: Vec<u32> = case.rand.iter().map(|_| g.uniform().to_bits()).collect();
            assert_eq!(ours, case.rand, "seed {}: rand", case.seed);
        }
    }

    #[test]
    fn mersenne_twister_reference_values() {
        // The published test value of mt19937 with the default seed: the 10000th output.
        let mut g = Generator::new(5489);
        let last = (0..10_000).map(|_| g.random()).last();
        assert_eq!(last, Some(4123659995));
    }

    #[test]
    fn only_the_low_half_of_the_seed_counts() {
        assert_eq!(Generator::new(7).randn(20), Generator::new(7 | 1 << 40).randn(20));
    }

    #[test]
    fn small_has_the_right_moments() {
        let mut s = Small::new(3);
        let n = 100_000;
        let x: Vec<f64> = (0..n).map(|_| s.normal()).collect();
        let mean = x.iter().sum::<f64>() / n as f64;
        let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.02 && (var - 1.0).abs() < 0.02, "mean {mean}, variance {var}");
        let mut seen = [0usize; 7];
        (0..7000).for_each(|_| seen[s.below(7)] += 1);
        assert!(seen.iter().all(|&k| (800..1200).contains(&k)), "{seen:?}");
        assert!((0..1000).map(|_| s.range(-2.0, 3.0)).all(|v| (-2.0..3.0).contains(&v)));
    }
}
