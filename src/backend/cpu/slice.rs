//! Elements in memory of one of the float types.

use super::math;
use super::scratch::scratch;
use super::simd::Block;
use crate::tensor::DType;
use half::{bf16, f16};
use std::ops::Range;

/// Floats to read.
#[derive(Clone, Copy, Debug)]
pub enum Slice<'a> {
    /// f32
    F32(&'a [f32]),
    /// f16
    F16(&'a [f16]),
    /// bf16
    BF16(&'a [bf16]),
}

/// Calls `$body` with `$x` bound to the typed slice.
macro_rules! each {
    ($slice:expr, $x:ident => $body:expr) => {
        match $slice {
            Slice::F32($x) => $body,
            Slice::F16($x) => $body,
            Slice::BF16($x) => $body,
        }
    };
}

impl<'a> Slice<'a> {
    /// The bytes of a float tensor; `None` for integers.
    pub fn of(dtype: DType, bytes: &'a [u8]) -> Option<Slice<'a>> {
        Some(match dtype {
            DType::F32 => Slice::F32(bytemuck::cast_slice(bytes)),
            DType::F16 => Slice::F16(bytemuck::cast_slice(bytes)),
            DType::BF16 => Slice::BF16(bytemuck::cast_slice(bytes)),
            DType::I32 => return None,
        })
    }

    /// Element type.
    pub fn dtype(self) -> DType {
        match self {
            Slice::F32(_) => DType::F32,
            Slice::F16(_) => DType::F16,
            Slice::BF16(_) => DType::BF16,
        }
    }

    /// Number of elements.
    pub fn len(self) -> usize {
        each!(self, x => x.len())
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// From element `from` on.
    pub fn from(self, from: usize) -> Slice<'a> {
        match self {
            Slice::F32(x) => Slice::F32(&x[from..]),
            Slice::F16(x) => Slice::F16(&x[from..]),
            Slice::BF16(x) => Slice::BF16(&x[from..]),
        }
    }

    /// Calls `f` with the elements of a range in f32: in place, or widened into working memory.
    #[inline]
    pub fn with<R>(self, range: Range<usize>, f: impl FnOnce(&[f32]) -> R) -> R {
        match self {
            Slice::F32(x) => f(&x[range]),
            x => scratch(range.len(), |wide| {
                x.read(range.start, wide);
                f(wide)
            }),
        }
    }

    /// [`Slice::with`] for all of them.
    pub fn with_all<R>(self, f: impl FnOnce(&[f32]) -> R) -> R {
        self.with(0..self.len(), f)
    }

    /// y = the elements from `from` on, widened.
    #[inline]
    pub fn read(self, from: usize, y: &mut [f32]) {
        let range = from..from + y.len();
        match self {
            Slice::F32(x) => y.copy_from_slice(&x[range]),
            Slice::F16(x) => math::f16_to_f32(&x[range], y),
            Slice::BF16(x) => math::bf16_to_f32(&x[range], y),
        }
    }
}

/// [`Slice::with_all`] for what may not be there.
pub fn optional<R>(x: Option<Slice>, f: impl FnOnce(Option<&[f32]>) -> R) -> R {
    match x {
        None => f(None),
        Some(x) => x.with_all(|x| f(Some(x))),
    }
}

/// Floats to write.
pub enum SliceMut<'a> {
    /// f32
    F32(&'a mut [f32]),
    /// f16
    F16(&'a mut [f16]),
    /// bf16
    BF16(&'a mut [bf16]),
}

impl<'a> SliceMut<'a> {
    /// The bytes of a float tensor; `None` for integers.
    pub fn of(dtype: DType, bytes: &'a mut [u8]) -> Option<SliceMut<'a>> {
        Some(match dtype {
            DType::F32 => SliceMut::F32(bytemuck::cast_slice_mut(bytes)),
            DType::F16 => SliceMut::F16(bytemuck::cast_slice_mut(bytes)),
            DType::BF16 => SliceMut::BF16(bytemuck::cast_slice_mut(bytes)),
            DType::I32 => return None,
        })
    }
}

/// Calls `$body` with `$y` bound to the typed slice.
macro_rules! each_mut {
    ($slice:expr, $y:ident => $body:expr) => {
        match $slice {
            $crate::backend::cpu::SliceMut::F32($y) => $body,
            $crate::backend::cpu::SliceMut::F16($y) => $body,
            $crate::backend::cpu::SliceMut::BF16($y) => $body,
        }
    };
}

pub(super) use each_mut;

/// A float type of activations and weights.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// Its name among the types of tensors.
    const DTYPE: DType;
    /// y = x
    fn widen(x: &[Self], y: &mut [f32]);
    /// y = x, rounded to nearest.
    fn narrow(x: &[f32], y: &mut [Self]);
    /// Lets `f` write a slice in f32, and rounds once. It finds there what `y` held if `keep`, else anything.
    fn edit(y: &mut [Self], keep: bool, f: impl FnOnce(&mut [f32])) {
        scratch(y.len(), |wide| {
            if keep {
                Self::widen(y, wide);
            }
            f(wide);
            Self::narrow(wide, y);
        });
    }
    /// Lets `f` fill a block in f32, and rounds once. What the block held before is not there.
    fn fill(mut block: Block<Self>, f: impl FnOnce(&mut Block)) {
        let (rows, cols) = (block.rows(), block.cols());
        scratch(rows * cols, |buffer| {
            f(&mut Block::new(buffer, cols, rows, cols));
            for (r, x) in buffer.chunks_exact(cols).enumerate() {
                Self::narrow(x, block.row(r));
            }
        });
    }
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    fn widen(x: &[f32], y: &mut [f32]) {
        y.copy_from_slice(x);
    }
    fn edit(y: &mut [f32], _keep: bool, f: impl FnOnce(&mut [f32])) {
        f(y);
    }
    #[inline]
    fn narrow(x: &[f32], y: &mut [f32]) {
        y.copy_from_slice(x);
    }
    fn fill(mut block: Block, f: impl FnOnce(&mut Block)) {
        f(&mut block);
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    fn widen(x: &[f16], y: &mut [f32]) {
        math::f16_to_f32(x, y);
    }
    fn narrow(x: &[f32], y: &mut [f16]) {
        math::f32_to_f16(x, y);
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    fn widen(x: &[bf16], y: &mut [f32]) {
        math::bf16_to_f32(x, y);
    }
    fn narrow(x: &[f32], y: &mut [bf16]) {
        math::f32_to_bf16(x, y);
    }
}
