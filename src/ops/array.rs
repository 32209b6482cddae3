//! f64 arrays: what specifications compute with.

use crate::error::Result;
use crate::tensor::{HostTensor, Shape, Spec};

/// A dense f64 array, last axis fastest.
#[derive(Clone, PartialEq, Debug)]
pub struct Array {
    /// Axes.
    pub shape: Shape,
    /// Elements.
    pub data: Vec<f64>,
}

impl Array {
    /// An array of zeros.
    pub fn zeros(shape: impl Into<Shape>) -> Array {
        let shape = shape.into();
        Array { shape, data: vec![0.0; shape.numel()] }
    }

    /// An array whose element at `index` (one number per axis) is `f(index)`.
    pub fn from_fn(shape: impl Into<Shape>, mut f: impl FnMut(&[usize]) -> f64) -> Array {
        let shape = shape.into();
        let mut at = vec![0; shape.len()];
        let data = (0..shape.numel())
            .map(|_| {
                let v = f(&at);
                for axis in (0..at.len()).rev() {
                    at[axis] += 1;
                    if at[axis] < shape[axis] {
                        break;
                    }
                    at[axis] = 0;
                }
                v
            })
            .collect();
        Array { shape, data }
    }

    /// The element at an index.
    pub fn at(&self, index: &[usize]) -> f64 {
        self.data[self.offset(index)]
    }

    /// The elements along the last axis at an index of the others.
    pub fn row(&self, lead: &[usize]) -> &[f64] {
        debug_assert_eq!(lead.len() + 1, self.shape.len());
        let n = self.shape.last();
        &self.data[self.place(lead) * n..][..n]
    }

    /// Position of an index in `data`.
    pub fn offset(&self, index: &[usize]) -> usize {
        debug_assert_eq!(index.len(), self.shape.len());
        self.place(index)
    }

    /// Which of the parts that an index of the first axes picks one of.
    fn place(&self, lead: &[usize]) -> usize {
        lead.iter().zip(self.shape.iter()).fold(0, |at, (&i, &n)| {
            debug_assert!(i < n, "index {lead:?} outside {}", self.shape);
            at * n + i
        })
    }

    /// Each element through a function.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Array {
        Array { shape: self.shape, data: self.data.iter().map(|&v| f(v)).collect() }
    }

    /// Two arrays of the same shape, element by element.
    pub fn zip(&self, other: &Array, f: impl Fn(f64, f64) -> f64) -> Array {
        debug_assert_eq!(self.shape, other.shape);
        let data = self.data.iter().zip(&other.data).map(|(&a, &b)| f(a, b)).collect();
        Array { shape: self.shape, data }
    }

    /// The values of a tensor.
    pub fn from_tensor(x: &HostTensor) -> Array {
        Array { shape: x.shape(), data: x.to_f64() }
    }

    /// The values rounded to a type.
    ///
    /// # Errors
    /// When the shapes differ in size.
    pub fn to_tensor(&self, spec: Spec) -> Result<HostTensor> {
        HostTensor::from_f64(spec, &self.data)
    }
}

/// Σ a·b, in eight sums that vector instructions hold.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    debug_assert_eq!(a.len(), b.len());
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

impl From<Vec<f64>> for Array {
    fn from(data: Vec<f64>) -> Array {
        Array { shape: Shape::from([data.len()]), data }
    }
}
