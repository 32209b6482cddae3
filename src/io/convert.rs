//! The bytes of a stored tensor, as the element type that the engine wants, with every value checked.

use super::weights::{Entry, StoredType};
use crate::tensor::{DType, Data, HostTensor, Shape, Spec};
use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};

/// What is wrong with a stored tensor.
pub(crate) struct Fault {
    pub(crate) want: String,
    pub(crate) got: String,
}

fn fault(want: impl Into<String>, got: impl Into<String>) -> Fault {
    Fault { want: want.into(), got: got.into() }
}

/// Elements that are converted at a time: they stay in the first-level cache.
const CHUNK: usize = 2048;

/// `bytes` are those of `entry`, whose size was checked against its shape when the file was opened.
pub(crate) fn tensor(entry: &Entry, bytes: &[u8], dtype: DType) -> Result<HostTensor, Fault> {
    if entry.shape.len() > 6 {
        return Err(fault("at most six axes", format!("{:?}", entry.shape)));
    }
    let data = match dtype {
        DType::F32 => Data::F32(floats(entry, bytes)?),
        DType::F16 => Data::F16(floats(entry, bytes)?),
        DType::BF16 => Data::BF16(floats(entry, bytes)?),
        DType::I32 => Data::I32(narrowed(entry, &integers(entry, bytes)?)?),
    };
    let spec = Spec::new(dtype, Shape::new(&entry.shape));
    HostTensor::new(spec.shape, data).map_err(|e| fault(spec.to_string(), e.to_string()))
}

/// An integer tensor, widened.
pub(crate) fn integers(entry: &Entry, bytes: &[u8]) -> Result<Vec<i64>, Fault> {
    match entry.dtype {
        StoredType::I64 => Ok(bytemuck::pod_collect_to_vec(bytes)),
        StoredType::I32 => {
            Ok(bytemuck::pod_collect_to_vec::<u8, i32>(bytes).into_iter().map(i64::from).collect())
        }
        other => Err(fault("I64 or I32", other.to_string())),
    }
}

fn narrowed(entry: &Entry, wide: &[i64]) -> Result<Vec<i32>, Fault> {
    let one = |(i, &v): (usize, &i64)| {
        i32::try_from(v).map_err(|_| fault("values that i32 can hold", format!("{v} at {}", place(entry, i))))
    };
    wide.iter().enumerate().map(one).collect()
}

/// A float tensor in type `F`, rounded to nearest; all values finite.
pub(crate) fn floats<F: Float>(entry: &Entry, bytes: &[u8]) -> Result<Vec<F>, Fault> {
    let out: Vec<F> = match entry.dtype {
        stored if stored == F::STORED => bytemuck::pod_collect_to_vec(bytes),
        StoredType::F32 => through_f32(bytes, |from: &[f32], to| to.copy_from_slice(from)),
        StoredType::F16 => through_f32(bytes, |from: &[f16], to| from.convert_to_f32_slice(to)),
        StoredType::BF16 => through_f32(bytes, |from: &[bf16], to| from.convert_to_f32_slice(to)),
        StoredType::F64 => through_f32(bytes, |from: &[f64], to| {
            to.iter_mut().zip(from).for_each(|(t, &f)| *t = F::shortened(f));
        }),
        other => return Err(fault("F32, F16, BF16 or F64", other.to_string())),
    };
    // Without a branch for each value, so that the compiler can take many at a time.
    let finite = |chunk: &[F]| chunk.iter().fold(true, |all, v| all & v.finite());
    if out.chunks(CHUNK).all(finite) {
        return Ok(out);
    }
    let i = out.iter().position(|v| !v.finite()).unwrap_or(0);
    let (value, at) = (stored_value(entry.dtype, bytes, i), place(entry, i));
    Err(match value.is_finite() {
        true => fault(format!("values that {} can hold", F::NAME), format!("{value} at {at}")),
        false => fault("finite values", format!("{value} at {at}")),
    })
}

/// Converts chunk by chunk, so that no second copy of the whole tensor ever exists.
fn through_f32<S: bytemuck::Pod, F: Float>(bytes: &[u8], widen: impl Fn(&[S], &mut [f32])) -> Vec<F> {
    let (mut stored, mut wide) = ([S::zeroed(); CHUNK], [0f32; CHUNK]);
    let mut out = Vec::with_capacity(bytes.len() / size_of::<S>());
    for part in bytes.chunks(CHUNK * size_of::<S>()) {
        // A copy, because nothing aligns the tensors of a file.
        let n = part.len() / size_of::<S>();
        bytemuck::cast_slice_mut(&mut stored[..n]).copy_from_slice(part);
        widen(&stored[..n], &mut wide[..n]);
        F::append(&wide[..n], &mut out);
    }
    out
}

/// Element `i`, exactly.
fn stored_value(dtype: StoredType, bytes: &[u8], i: usize) -> f64 {
    let at = |n: usize| &bytes[i * n..(i + 1) * n];
    match dtype {
        StoredType::F32 => bytemuck::pod_read_unaligned::<f32>(at(4)).into(),
        StoredType::F16 => bytemuck::pod_read_unaligned::<f16>(at(2)).into(),
        StoredType::BF16 => bytemuck::pod_read_unaligned::<bf16>(at(2)).into(),
        _ => bytemuck::pod_read_unaligned(at(8)),
    }
}

/// The indices of element `i`, outermost first.
fn place(entry: &Entry, mut i: usize) -> String {
    let mut indices: Vec<usize> = entry
        .shape
        .iter()
        .rev()
        .map(|&d| {
            let index = i % d.max(1);
            i /= d.max(1);
            index
        })
        .collect();
    indices.reverse();
    format!("{indices:?}")
}

/// The float types of the engine.
pub(crate) trait Float: bytemuck::Pod {
    const STORED: StoredType;
    const NAME: &'static str;
    /// An f32 that rounds to the same value of this type as `v` does.
    fn shortened(v: f64) -> f32;
    fn finite(self) -> bool;
    fn append(from: &[f32], to: &mut Vec<Self>);
}

impl Float for f32 {
    const STORED: StoredType = StoredType::F32;
    const NAME: &'static str = "f32";
    fn shortened(v: f64) -> f32 {
        v as f32
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
    fn append(from: &[f32], to: &mut Vec<f32>) {
        to.extend_from_slice(from);
    }
}

impl Float for f16 {
    const STORED: StoredType = StoredType::F16;
    const NAME: &'static str = "f16";
    fn shortened(v: f64) -> f32 {
        to_odd(v)
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
    fn append(from: &[f32], to: &mut Vec<f16>) {
        let old = to.len();
        to.resize(old + from.len(), f16::ZERO);
        to[old..].convert_from_f32_slice(from);
    }
}

impl Float for bf16 {
    const STORED: StoredType = StoredType::BF16;
    const NAME: &'static str = "bf16";
    fn shortened(v: f64) -> f32 {
        to_odd(v)
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
    fn append(from: &[f32], to: &mut Vec<bf16>) {
        to.extend(from.iter().map(|&v| brain(v)));
    }
}

/// The nearest bf16, even on a tie. `half` has the same, but with a branch that keeps the compiler from taking many
/// values at a time: reading f32 as bf16 takes some five times as long with it.
fn brain(v: f32) -> bf16 {
    let bits = v.to_bits();
    // Cannot overflow unless `v` is NaN, and then it is not used.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if v.is_nan() { 0x7fc0 } else { rounded as u16 })
}

/// The neighbour of `v` among f32 whose last bit is 1, unless `v` is an f32 itself: rounding it once more, to a type
/// with at least two bits less, gives what rounding `v` gives. Rounding to nearest twice does not.
fn to_odd(v: f64) -> f32 {
    let near = v as f32;
    let bits = near.to_bits();
    match f64::from(near) {
        same if same == v || v.is_nan() || bits & 1 == 1 => near,
        short if short.abs() < v.abs() => f32::from_bits(bits + 1),
        _ => f32::from_bits(bits - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(dtype: StoredType, shape: &[usize]) -> Entry {
        Entry { dtype, shape: shape.into() }
    }

    fn said<T>(r: Result<T, Fault>) -> String {
        r.err().map(|f| format!("want {}; got {}", f.want, f.got)).unwrap()
    }

    #[test]
    fn every_half_and_every_brain_float_is_widened_exactly() {
        let finite: Vec<u16> = (0..=u16::MAX).filter(|&b| f16::from_bits(b).is_finite()).collect();
        let wide: Vec<f32> =
            floats(&entry(StoredType::F16, &[finite.len()]), bytemuck::cast_slice(&finite)).ok().unwrap();
        assert!(finite.iter().zip(&wide).all(|(&b, w)| f16::from_bits(b).to_f32().to_bits() == w.to_bits()));
        let back: Vec<f16> =
            floats(&entry(StoredType::F32, &[wide.len()]), bytemuck::cast_slice(&wide)).ok().unwrap();
        assert!(finite.iter().zip(&back).all(|(&b, h)| b == h.to_bits()));

        let finite: Vec<u16> = (0..=u16::MAX).filter(|&b| bf16::from_bits(b).is_finite()).collect();
        let wide: Vec<f32> =
            floats(&entry(StoredType::BF16, &[finite.len()]), bytemuck::cast_slice(&finite)).ok().unwrap();
        assert!(finite.iter().zip(&wide).all(|(&b, w)| u32::from(b) << 16 == w.to_bits()));
    }

    #[test]
    fn brain_floats_are_rounded_as_half_rounds_them() {
        let tails = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        for bits in (0..=u16::MAX).flat_map(|high| tails.map(|low| u32::from(high) << 16 | low)) {
            let v = f32::from_bits(bits);
            let (ours, theirs) = (brain(v), bf16::from_f32(v));
            assert!(ours.to_bits() == theirs.to_bits() || v.is_nan() && ours.is_nan(), "{bits:08x}");
        }
    }

    #[test]
    fn doubles_are_rounded_once() {
        // Just above the middle of 1 and its successor: rounded to f32 first, it would fall on the middle, then on 1.
        let v = [1.0 + 2f64.powi(-11) + 2f64.powi(-40), 1.0 + 2f64.powi(-8) + 2f64.powi(-40), -0.1, 1e-300];
        let e = entry(StoredType::F64, &[4]);
        let h: Vec<f16> = floats(&e, bytemuck::cast_slice(&v)).ok().unwrap();
        assert_eq!((h[0].to_f64(), h[2].to_bits(), h[3]), (1.0 + 2f64.powi(-10), 0xae66, f16::ZERO));
        let b: Vec<bf16> = floats(&e, bytemuck::cast_slice(&v)).ok().unwrap();
        assert_eq!((b[1].to_f64(), b[2].to_bits()), (1.0 + 2f64.powi(-7), 0xbdcd));
        let f: Vec<f32> = floats(&e, bytemuck::cast_slice(&v)).ok().unwrap();
        assert_eq!((f[2], f[3]), (-0.1, 0.0));
        assert!(
            said(floats::<f32>(&entry(StoredType::F64, &[1]), &1e39f64.to_le_bytes()))
                .contains("f32 can hold")
        );
    }

    #[test]
    fn faults_say_where_also_beyond_the_first_chunk_and_unaligned() {
        let mut v = vec![1f32; 3 * CHUNK + 5];
        v[2 * CHUNK + 3] = f32::NEG_INFINITY;
        let bytes = [&[0u8][..], bytemuck::cast_slice(&v)].concat();
        let shape = [v.len()];
        for dtype in DType::FLOATS {
            let e = said(tensor(&entry(StoredType::F32, &shape), &bytes[1..], dtype));
            assert_eq!(e, format!("want finite values; got -inf at [{}]", 2 * CHUNK + 3));
        }
        v[2 * CHUNK + 3] = 65520.0;
        let bytes = [&[0u8][..], bytemuck::cast_slice(&v)].concat();
        let e = entry(StoredType::F32, &shape);
        assert_eq!(
            said(tensor(&e, &bytes[1..], DType::F16)),
            "want values that f16 can hold; got 65520 at [4099]"
        );
        assert_eq!(tensor(&e, &bytes[1..], DType::F32).ok().unwrap().to_f32(), v);
        assert_eq!(tensor(&e, &bytes[1..], DType::BF16).ok().unwrap().to_f32()[4099], 65536.0);
    }

    #[test]
    fn integers_are_range_checked() {
        let wide = [1i64, -5, 1 << 31];
        let e = entry(StoredType::I64, &[3, 1]);
        assert_eq!(integers(&e, bytemuck::cast_slice(&wide)).ok().unwrap(), wide);
        let bad = said(tensor(&e, bytemuck::cast_slice(&wide), DType::I32));
        assert_eq!(bad, "want values that i32 can hold; got 2147483648 at [2, 0]");
        let scalar = tensor(&entry(StoredType::I64, &[]), &9i64.to_le_bytes(), DType::I32).ok().unwrap();
        assert_eq!(scalar, HostTensor::i32([], vec![9]).unwrap());
        assert!(
            said(tensor(&entry(StoredType::F32, &[1; 7]), &[0; 4], DType::F32)).contains("at most six axes")
        );
        assert_eq!(
            tensor(&entry(StoredType::F32, &[0, 2]), &[], DType::F32).ok().unwrap().shape(),
            [0, 2].into()
        );
    }
}
