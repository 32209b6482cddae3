//! Shapes, element types, and tensors in host memory. Always contiguous, last axis fastest.

use crate::error::{Error, Result};
use half::{bf16, f16};
use std::fmt;

/// Element type of a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of binary32.
    BF16,
    /// 32-bit signed integer: token ids, codes, counters.
    I32,
}

impl DType {
    /// The types that activations and weights may have.
    pub const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// Name as written in flags, kernel images and dumps.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
        }
    }

    /// Unit roundoff times two: the gap between 1 and the next number. Zero for integers.
    pub const fn eps(self) -> f64 {
        match self {
            DType::F32 => 1.1920928955078125e-7,
            DType::F16 => 9.765625e-4,
            DType::BF16 => 7.8125e-3,
            DType::I32 => 0.0,
        }
    }

    /// The nearest value that this type can hold.
    pub fn round(self, v: f64) -> f64 {
        match self {
            DType::F32 => v as f32 as f64,
            DType::F16 => f16::from_f64(v).to_f64(),
            DType::BF16 => bf16::from_f64(v).to_f64(),
            DType::I32 => v.round(),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for DType {
    type Err = Error;
    fn from_str(s: &str) -> Result<DType> {
        match s {
            "f32" | "float32" | "fp32" => Ok(DType::F32),
            "f16" | "float16" | "fp16" | "half" => Ok(DType::F16),
            "bf16" | "bfloat16" => Ok(DType::BF16),
            _ => Err(Error::invalid(format!("dtype: want f32, f16 or bf16; got `{s}`"))),
        }
    }
}

/// Lengths of the axes, outermost first; at most six.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; 6],
    rank: usize,
}

impl Shape {
    /// A shape from its axes.
    ///
    /// # Panics
    /// With more than six axes: no operation has that many.
    pub fn new(dims: &[usize]) -> Shape {
        assert!(dims.len() <= 6, "a shape has at most six axes, got {dims:?}");
        let mut all = [0; 6];
        all[..dims.len()].copy_from_slice(dims);
        Shape { dims: all, rank: dims.len() }
    }

    /// Number of elements; 1 for a scalar. `usize::MAX` where it cannot be counted: nothing of that size exists.
    pub fn numel(&self) -> usize {
        product(self)
    }

    /// Length of the last axis; 1 for a scalar.
    pub fn last(&self) -> usize {
        self.as_ref().last().copied().unwrap_or(1)
    }

    /// All axes but the last, multiplied: the number of rows.
    pub fn rows(&self) -> usize {
        product(&self[..self.rank.saturating_sub(1)])
    }

    /// The same axes with the last one replaced.
    pub fn with_last(&self, n: usize) -> Shape {
        let mut s = *self;
        if s.rank > 0 {
            s.dims[s.rank - 1] = n;
        }
        s
    }
}

fn product(axes: &[usize]) -> usize {
    // An axis of zero makes any product zero, also one that could not be counted before it came to that axis.
    if axes.contains(&0) { 0 } else { axes.iter().fold(1, |n, &d| n.saturating_mul(d)) }
}

impl std::ops::Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.dims[..self.rank]
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Shape {
        Shape::new(&dims)
    }
}

impl From<&[usize]> for Shape {
    fn from(dims: &[usize]) -> Shape {
        Shape::new(dims)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(")?;
        for (i, d) in self.iter().enumerate() {
            write!(f, "{}{d}", if i > 0 { "," } else { "" })?;
        }
        f.write_str(")")
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Element type and shape: everything that is known about a value before it exists.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Spec {
    /// Element type.
    pub dtype: DType,
    /// Axes.
    pub shape: Shape,
}

impl Spec {
    /// Type and axes together.
    pub fn new(dtype: DType, shape: impl Into<Shape>) -> Spec {
        Spec { dtype, shape: shape.into() }
    }

    /// Size in bytes; `usize::MAX` where it cannot be counted.
    pub fn bytes(&self) -> usize {
        self.shape.numel().saturating_mul(self.dtype.size())
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)
    }
}

impl fmt::Debug for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The elements of a [`HostTensor`].
#[derive(Clone, PartialEq, Debug)]
pub enum Data {
    /// binary32.
    F32(Vec<f32>),
    /// binary16.
    F16(Vec<f16>),
    /// bfloat16.
    BF16(Vec<bf16>),
    /// integers.
    I32(Vec<i32>),
}

impl Data {
    fn rounded(dtype: DType, values: &[f64]) -> Data {
        match dtype {
            DType::F32 => Data::F32(values.iter().map(|&v| v as f32).collect()),
            DType::F16 => Data::F16(values.iter().map(|&v| f16::from_f64(v)).collect()),
            DType::BF16 => Data::BF16(values.iter().map(|&v| bf16::from_f64(v)).collect()),
            DType::I32 => Data::I32(values.iter().map(|&v| v as i32).collect()),
        }
    }
}

/// A tensor in host memory.
#[derive(Clone, PartialEq, Debug)]
pub struct HostTensor {
    shape: Shape,
    data: Data,
}

impl HostTensor {
    /// A tensor from its elements.
    ///
    /// # Errors
    /// When the number of elements is not the product of the axes.
    pub fn new(shape: impl Into<Shape>, data: Data) -> Result<HostTensor> {
        let shape = shape.into();
        let n = match &data {
            Data::F32(v) => v.len(),
            Data::F16(v) => v.len(),
            Data::BF16(v) => v.len(),
            Data::I32(v) => v.len(),
        };
        if n != shape.numel() {
            return Err(Error::invalid(format!("tensor {shape}: want {} elements; got {n}", shape.numel())));
        }
        Ok(HostTensor { shape, data })
    }

    /// An f32 tensor.
    ///
    /// # Errors
    /// As [`HostTensor::new`].
    pub fn f32(shape: impl Into<Shape>, data: Vec<f32>) -> Result<HostTensor> {
        HostTensor::new(shape, Data::F32(data))
    }

    /// An i32 tensor.
    ///
    /// # Errors
    /// As [`HostTensor::new`].
    pub fn i32(shape: impl Into<Shape>, data: Vec<i32>) -> Result<HostTensor> {
        HostTensor::new(shape, Data::I32(data))
    }

    /// f64 values rounded to `spec.dtype`.
    ///
    /// # Errors
    /// As [`HostTensor::new`].
    pub fn from_f64(spec: Spec, values: &[f64]) -> Result<HostTensor> {
        HostTensor::new(spec.shape, Data::rounded(spec.dtype, values))
    }

    /// A tensor from little-endian bytes.
    ///
    /// # Errors
    /// When the number of bytes is not that of `spec`.
    pub fn from_bytes(spec: Spec, bytes: &[u8]) -> Result<HostTensor> {
        if bytes.len() != spec.bytes() {
            return Err(Error::invalid(format!("{spec}: want {} bytes; got {}", spec.bytes(), bytes.len())));
        }
        let data = match spec.dtype {
            DType::F32 => Data::F32(bytemuck::pod_collect_to_vec(bytes)),
            DType::F16 => Data::F16(bytemuck::pod_collect_to_vec(bytes)),
            DType::BF16 => Data::BF16(bytemuck::pod_collect_to_vec(bytes)),
            DType::I32 => Data::I32(bytemuck::pod_collect_to_vec(bytes)),
        };
        HostTensor::new(spec.shape, data)
    }

    /// Zeros.
    pub fn zeros(spec: Spec) -> HostTensor {
        let n = spec.shape.numel();
        let data = match spec.dtype {
            DType::F32 => Data::F32(vec![0.0; n]),
            DType::F16 => Data::F16(vec![f16::ZERO; n]),
            DType::BF16 => Data::BF16(vec![bf16::ZERO; n]),
            DType::I32 => Data::I32(vec![0; n]),
        };
        HostTensor { shape: spec.shape, data }
    }

    /// Element type and axes.
    pub fn spec(&self) -> Spec {
        let dtype = match self.data {
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::BF16(_) => DType::BF16,
            Data::I32(_) => DType::I32,
        };
        Spec { dtype, shape: self.shape }
    }

    /// Axes.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The elements.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// The elements, where they are f32.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.data {
            Data::F32(v) => Some(v),
            _ => None,
        }
    }

    /// The elements as bytes, little-endian.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::F32(v) => bytemuck::cast_slice(v),
            Data::F16(v) => bytemuck::cast_slice(v),
            Data::BF16(v) => bytemuck::cast_slice(v),
            Data::I32(v) => bytemuck::cast_slice(v),
        }
    }

    /// All elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            Data::F32(v) => v.clone(),
            Data::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Data::BF16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Data::I32(v) => v.iter().map(|&x| x as f32).collect(),
        }
    }

    /// All elements as f64.
    pub fn to_f64(&self) -> Vec<f64> {
        match &self.data {
            Data::F32(v) => v.iter().map(|&x| x as f64).collect(),
            Data::F16(v) => v.iter().map(|x| x.to_f64()).collect(),
            Data::BF16(v) => v.iter().map(|x| x.to_f64()).collect(),
            Data::I32(v) => v.iter().map(|&x| x as f64).collect(),
        }
    }

    /// The same values in another element type, rounded to nearest.
    pub fn to(&self, dtype: DType) -> HostTensor {
        if dtype == self.spec().dtype {
            return self.clone();
        }
        HostTensor { shape: self.shape, data: Data::rounded(dtype, &self.to_f64()) }
    }

    /// The same elements under other axes.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(self, shape: impl Into<Shape>) -> Result<HostTensor> {
        HostTensor::new(shape, self.data)
    }

    /// Axes permuted: axis `i` of the result is axis `order[i]` of `self`.
    ///
    /// # Errors
    /// When `order` is not a permutation of the axes.
    pub fn permute(&self, order: &[usize]) -> Result<HostTensor> {
        let mut seen = vec![false; self.shape.len()];
        let fits = order.len() == seen.len()
            && order.iter().all(|&o| o < seen.len() && !std::mem::replace(&mut seen[o], true));
        if !fits {
            return Err(Error::invalid(format!("permute {}: got order {order:?}", self.shape)));
        }
        let dims: Vec<usize> = order.iter().map(|&o| self.shape[o]).collect();
        let data = match &self.data {
            Data::F32(v) => Data::F32(permuted(v, &self.shape, order)),
            Data::F16(v) => Data::F16(permuted(v, &self.shape, order)),
            Data::BF16(v) => Data::BF16(permuted(v, &self.shape, order)),
            Data::I32(v) => Data::I32(permuted(v, &self.shape, order)),
        };
        HostTensor::new(dims.as_slice(), data)
    }
}

fn permuted<T: Copy>(x: &[T], shape: &[usize], order: &[usize]) -> Vec<T> {
    let mut strides = vec![1; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * shape[i + 1];
    }
    let axes: Vec<(usize, usize)> = order.iter().map(|&o| (shape[o], strides[o])).collect();
    let mut out = Vec::with_capacity(x.len());
    fill(x, &axes, 0, &mut out);
    out
}

fn fill<T: Copy>(x: &[T], axes: &[(usize, usize)], base: usize, out: &mut Vec<T>) {
    match axes {
        [] => out.push(x[base]),
        [(n, stride)] => out.extend((0..*n).map(|i| x[base + i * stride])),
        [(n, stride), rest @ ..] => (0..*n).for_each(|i| fill(x, rest, base + i * stride, out)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permute_moves_channels_last() {
        let x = HostTensor::f32([1, 2, 1, 3], vec![0., 1., 2., 10., 11., 12.]).unwrap();
        let y = x.permute(&[0, 2, 3, 1]).unwrap();
        assert_eq!(y.shape(), Shape::from([1, 1, 3, 2]));
        assert_eq!(y.to_f32(), [0., 10., 1., 11., 2., 12.]);
        assert!(x.permute(&[0, 0, 1, 2]).is_err());
    }

    #[test]
    fn a_wrong_number_of_elements_is_an_error() {
        assert!(HostTensor::f32([2, 2], vec![0.0; 3]).is_err());
        assert!(HostTensor::from_bytes(Spec::new(DType::F16, [3]), &[0; 5]).is_err());
    }

    #[test]
    fn rounding_is_that_of_the_type() {
        assert_eq!(DType::BF16.round(1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(DType::F16.round(65520.0), f64::INFINITY);
        assert_eq!(DType::F32.round(0.1), 0.1f32 as f64);
    }
}
