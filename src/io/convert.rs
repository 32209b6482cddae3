//! The bytes of a stored tensor, as the element type that the engine wants, with every value checked.

use super::weights::{Entry, StoredType};
use crate::tensor::{DType, Data, HostTensor, Shape, Spec};
use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use std::ops::Range;

/// What is wrong with a stored tensor.
pub(crate) struct Fault {
    pub(crate) want: String,
    pub(crate) got: String,
}

fn fault(want: impl Into<String>, got: impl Into<String>) -> Fault {
    Fault { want: want.into(), got: got.into() }
}

/// How the elements of a tensor are to lie in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Order {
    /// As in the file.
    #[default]
    Stored,
    /// Stored (O,I,…), wanted (O,…,I).
    ChannelsLast,
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

/// Converts the rows `rows` of the outermost axis into `out`, which holds just these, aligned to the type.
pub(crate) fn rows(
    entry: &Entry,
    bytes: &[u8],
    (dtype, order): (DType, Order),
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<(), Fault> {
    match dtype {
        DType::F32 => rows_of::<f32>(entry, bytes, order, rows, out),
        DType::F16 => rows_of::<f16>(entry, bytes, order, rows, out),
        DType::BF16 => rows_of::<bf16>(entry, bytes, order, rows, out),
        DType::I32 => Err(fault("a float type to convert to", dtype.name())),
    }
}

fn rows_of<F: Float>(
    entry: &Entry,
    bytes: &[u8],
    order: Order,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<(), Fault> {
    let row: usize = entry.shape.iter().skip(1).product();
    let there = entry.shape.first().copied().unwrap_or(1);
    let room = out.len();
    let refused = || {
        let want = format!("rows within {there}, {row} elements each, in memory of their size");
        fault(want, format!("rows {rows:?} for {room} bytes"))
    };
    let out: &mut [F] = bytemuck::try_cast_slice_mut(out).map_err(|_| refused())?;
    let fits = rows.start <= rows.end && rows.end <= there && out.len() == rows.len() * row;
    if !fits {
        return Err(refused());
    }
    let channels = entry.shape.get(1).copied().unwrap_or(1);
    let taps = row.checked_div(channels).unwrap_or(1);
    let first = rows.start * row;
    if order == Order::Stored || taps <= 1 || channels == 1 {
        return into(entry, bytes, first, out);
    }
    // As many channels at a time as stay in the first-level cache: read in one piece, written in `taps` pieces.
    let most = (CHUNK / taps).max(1);
    let mut part = vec![F::zeroed(); most * taps];
    for (r, out) in out.chunks_exact_mut(row).enumerate() {
        for c in (0..channels).step_by(most) {
            let n = most.min(channels - c);
            let part = &mut part[..n * taps];
            into(entry, bytes, first + r * row + c * taps, part)?;
            match taps {
                9 => scatter::<F, 9>(part, &mut out[c..], channels),
                _ => (0..taps).for_each(|k| {
                    let out = out[k * channels + c..][..n].iter_mut();
                    out.zip(part[k..].iter().step_by(taps)).for_each(|(to, &from)| *to = from);
                }),
            }
        }
    }
    Ok(())
}

/// Channels with `K` values each, to `K` rows of channels: the step is known, so the compiler can take many at a time.
fn scatter<F: Float, const K: usize>(part: &[F], out: &mut [F], channels: usize) {
    for k in 0..K {
        let from = part.as_chunks::<K>().0;
        let to = &mut out[k * channels..][..from.len()];
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from[k]);
    }
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
    let mut out = vec![F::zeroed(); entry.elements()];
    into(entry, bytes, 0, &mut out)?;
    Ok(out)
}

/// Elements from `first` on, in the order of the file, as many as `out` takes; rounded to nearest, all finite.
fn into<F: Float>(entry: &Entry, bytes: &[u8], first: usize, out: &mut [F]) -> Result<(), Fault> {
    let size = entry.dtype.bitsize() / 8;
    let from = &bytes[first * size..][..out.len() * size];
    for (i, (from, to)) in from.chunks(CHUNK * size).zip(out.chunks_mut(CHUNK)).enumerate() {
        match entry.dtype {
            stored if stored == F::STORED => bytemuck::cast_slice_mut(to).copy_from_slice(from),
            StoredType::F32 => aligned(from, |from: &[f32]| F::round(from, to)),
            StoredType::F16 => {
                aligned(from, |from: &[f16]| through(to, |wide| from.convert_to_f32_slice(wide)))
            }
            StoredType::BF16 => {
                aligned(from, |from: &[bf16]| through(to, |wide| from.convert_to_f32_slice(wide)))
            }
            StoredType::F64 => aligned(from, |from: &[f64]| {
                through(to, |wide| wide.iter_mut().zip(from).for_each(|(w, &f)| *w = F::shortened(f)));
            }),
            other => return Err(fault("F32, F16, BF16 or F64", other.to_string())),
        }
        // While the chunk is in the cache; without a branch for each value, so that the compiler can take many at a time.
        if !to.iter().fold(true, |all, v| all & v.finite()) {
            let at = first + i * CHUNK + to.iter().position(|v| !v.finite()).unwrap_or(0);
            let (value, at) = (stored_value(entry.dtype, bytes, at), place(entry, at));
            return Err(match value.is_finite() {
                true => fault(format!("values that {} can hold", F::NAME), format!("{value} at {at}")),
                false => fault("finite values", format!("{value} at {at}")),
            });
        }
    }
    Ok(())
}

/// A chunk of the file as values. Nothing aligns the tensors of a file; those that are not are copied.
fn aligned<S: bytemuck::Pod>(bytes: &[u8], f: impl FnOnce(&[S])) {
    if let Ok(stored) = bytemuck::try_cast_slice(bytes) {
        return f(stored);
    }
    let (mut copy, n) = ([S::zeroed(); CHUNK], bytes.len() / size_of::<S>());
    bytemuck::cast_slice_mut(&mut copy[..n]).copy_from_slice(bytes);
    f(&copy[..n]);
}

/// Fills a chunk by way of f32.
fn through<F: Float>(to: &mut [F], widen: impl FnOnce(&mut [f32])) {
    let mut wide = [0f32; CHUNK];
    widen(&mut wide[..to.len()]);
    F::round(&wide[..to.len()], to);
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
    /// As many as there are, to nearest.
    fn round(from: &[f32], to: &mut [Self]);
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
    fn round(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
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
    fn round(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
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
    fn round(from: &[f32], to: &mut [bf16]) {
        to.iter_mut().zip(from).for_each(|(to, &v)| *to = brain(v));
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

    #[test]
    fn rows_are_parts_of_the_whole_in_either_order() {
        // More channels than a chunk holds, kernels with and without a length of their own, and an odd start in memory.
        for shape in [
            &[5, 300, 3, 3][..],
            &[3, 7, 5, 5],
            &[4, 600, 2, 2],
            &[3, 4, 1, 1],
            &[6, 1, 3, 3],
            &[9, 5000],
            &[7],
            &[],
        ] {
            let n: usize = shape.iter().product();
            let v: Vec<f32> = (0..n).map(|i| i as f32 - 100.0).collect();
            let bytes = [&[0u8][..], bytemuck::cast_slice(&v)].concat();
            let e = entry(StoredType::F32, shape);
            let count = shape.first().copied().unwrap_or(1);
            for dtype in DType::FLOATS {
                for order in [Order::Stored, Order::ChannelsLast] {
                    let whole = tensor(&e, &bytes[1..], dtype).ok().unwrap();
                    let whole = match (order, shape.len()) {
                        (Order::ChannelsLast, 4) => whole.permute(&[0, 2, 3, 1]).unwrap(),
                        _ => whole,
                    };
                    let row = n / count * dtype.size();
                    for part in [0..count, 0..1, count / 2..count, 1..1] {
                        let mut out = vec![0f64; (part.len() * row).div_ceil(8)];
                        let out = &mut bytemuck::cast_slice_mut::<f64, u8>(&mut out)[..part.len() * row];
                        assert!(rows(&e, &bytes[1..], (dtype, order), part.clone(), out).is_ok());
                        assert!(
                            *out == whole.bytes()[part.start * row..part.end * row],
                            "{shape:?} {dtype} {order:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn rows_that_are_not_there_are_refused_and_a_fault_says_its_place_in_the_file() {
        let mut v = vec![1f32; 2 * 3 * 4];
        v[12 + 4 + 3] = f32::NAN;
        let e = entry(StoredType::F32, &[2, 3, 2, 2]);
        let mut out = vec![0u32; 24];
        let out: &mut [u8] = bytemuck::cast_slice_mut(&mut out);
        let mut take = |part: Range<usize>, n: usize| {
            rows(&e, bytemuck::cast_slice(&v), (DType::F32, Order::ChannelsLast), part, &mut out[..n])
        };
        assert!(take(0..1, 48).is_ok());
        assert_eq!(said(take(0..2, 96)), "want finite values; got NaN at [1, 1, 1, 1]");
        assert_eq!(said(take(1..2, 48)), "want finite values; got NaN at [1, 1, 1, 1]");
        assert!(said(take(1..3, 96)).contains("got rows 1..3 for 96 bytes"));
        assert!(said(take(0..1, 44)).contains("rows within 2, 12 elements each"));
    }
}
