//! Tensors with random contents, filled by all threads.

use crate::error::Result;
use crate::tensor::{DType, Data, HostTensor, Spec};
use half::{bf16, f16};
use rayon::prelude::*;

/// Elements that one task fills.
const CHUNK: usize = 1 << 16;

/// A weight of this name. What it is like depends on its axes: one axis is a bias or the scale of a norm, more are a
/// matrix, a convolution (O,KH,KW,I) or a table.
pub(super) fn tensor(name: &str, spec: Spec, seed: u64) -> Result<HostTensor> {
    let axes = &spec.shape[..];
    let scale = axes.len() == 1 && name.ends_with(".weight");
    let fan_in = axes.iter().skip(1).product::<usize>().max(1);
    // Uniform in ±a has variance a² / 3.
    let (mean, a) = match axes.len() {
        0 | 1 if scale => (1.0, 0.0),
        0 | 1 => (0.0, 0.01),
        _ => (0.0, (3.0 / fan_in as f32).sqrt()),
    };
    uniform(spec, mean, a, seed ^ hash(name))
}

/// Uniform in `mean` ± `a`.
fn uniform(spec: Spec, mean: f32, a: f32, seed: u64) -> Result<HostTensor> {
    let n = spec.shape.numel();
    let data = match spec.dtype {
        DType::F32 => Data::F32(fill(n, seed, |u| mean + a * u)),
        DType::F16 => Data::F16(fill(n, seed, |u| f16::from_f32(mean + a * u))),
        DType::BF16 => Data::BF16(fill(n, seed, |u| bf16::from_f32(mean + a * u))),
        DType::I32 => Data::I32(vec![0; n]),
    };
    HostTensor::new(spec.shape, data)
}

/// `n` values of `f` of uniform numbers in −1…1: a counter, hashed, so that threads need not wait for each other.
fn fill<T: Send + Copy + Default>(n: usize, seed: u64, f: impl Fn(f32) -> T + Sync) -> Vec<T> {
    let mut y = vec![T::default(); n];
    y.par_chunks_mut(CHUNK).enumerate().for_each(|(c, chunk)| {
        for (i, pair) in chunk.chunks_mut(2).enumerate() {
            let bits = mix(seed.wrapping_add((c * CHUNK + 2 * i) as u64));
            for (k, y) in pair.iter_mut().enumerate() {
                *y = f((bits >> (32 * k)) as i32 as f32 * (1.0 / (1u32 << 31) as f32));
            }
        }
    });
    y
}

/// SplitMix64's output function (Steele, Lea and Flood 2014).
fn mix(counter: u64) -> u64 {
    let x = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// FNV-1a.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_depend_on_name_and_seed_alone_and_have_the_right_spread() {
        let spec = Spec::new(DType::F32, [64, 3, 3, 100]);
        let [a, b, c] =
            [("x.weight", 0), ("x.weight", 0), ("y.weight", 0)].map(|(n, s)| tensor(n, spec, s).unwrap());
        assert!(a == b && a != c && a != tensor("x.weight", spec, 1).unwrap());
        let v = a.to_f64();
        let mean = v.iter().sum::<f64>() / v.len() as f64;
        let variance = v.iter().map(|x| x * x).sum::<f64>() / v.len() as f64;
        assert!(mean.abs() < 1e-3 && (variance * 900.0 - 1.0).abs() < 0.02, "{mean} {variance}");
        let norm = tensor("norm.weight", Spec::new(DType::BF16, [7]), 0).unwrap();
        assert_eq!(norm.to_f32(), [1.0; 7]);
        let bias = tensor("norm.bias", Spec::new(DType::F16, [7]), 0).unwrap();
        assert!(bias.to_f32().iter().all(|b| b.abs() < 0.011 && *b != 0.0));
    }
}
