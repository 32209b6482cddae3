//! The CPU: an arena of plain memory, and the view of it that a room gets.

pub mod attention;
pub mod gemm;
pub mod math;
mod scratch;
pub mod simd;
mod slice;
pub mod winograd;

pub use scratch::scratch as with_scratch;
use slice::each_mut;
pub use slice::{Element, Slice, SliceMut, optional};

use crate::error::{Error, Result};
use crate::tensor::{DType, Spec};
use gemm::{Packed, Weights};
use half::{bf16, f16};
use rayon::prelude::*;
use std::borrow::Cow;

/// Elements that a task of an elementwise operation takes: they stay in the first-level cache.
const CHUNK: usize = 8192;

/// Bytes of memory that a program can still get: what the system calls available, swap, and no more than the limit of
/// the control group. `None` where the system does not say.
pub fn available() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |key: &str| -> Option<usize> {
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let free = kib("MemAvailable")?.saturating_add(kib("SwapFree").unwrap_or(0)).saturating_mul(1024);
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = limits.iter().find_map(|f| std::fs::read_to_string(f).ok()?.trim().parse().ok());
    Some(limit.unwrap_or(usize::MAX).min(free))
}

/// 64 bytes that start on a cache line.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Memory whose first byte stands on a cache line.
#[derive(Clone, Default)]
pub struct Memory(Vec<Line>);

impl Memory {
    /// Zeroed memory.
    ///
    /// # Errors
    /// [`Error::Device`] with the bytes that are needed, when the system has no room for them.
    pub fn new(bytes: usize) -> Result<Memory> {
        bytemuck::allocation::try_zeroed_vec(bytes.div_ceil(64)).map(Memory).map_err(|()| {
            Error::Device(format!(
                "out of memory: {bytes} bytes cannot be had; close other programs, or try a smaller picture or batch"
            ))
        })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// An input as a room sees it.
#[derive(Clone, Copy)]
pub enum In<'a> {
    /// Memory of its own.
    Shared(&'a [u8]),
    /// A weight that was packed when it was loaded.
    Packed(Packed<'a>),
    /// The memory of this output, which holds the input until it is written.
    Output(usize),
}

/// One call of a room: inputs, outputs, scratch.
pub struct Call<'a, 'b> {
    /// Types and axes of the inputs.
    pub x: &'b [Spec],
    /// Types and axes of the outputs.
    pub y: &'b [Spec],
    inputs: &'b [In<'a>],
    outputs: &'b mut [&'a mut [u8]],
}

impl<'a, 'b> Call<'a, 'b> {
    /// A call over borrowed memory; `inputs` and `outputs` have the sizes that their specs say.
    pub fn new(
        x: &'b [Spec],
        y: &'b [Spec],
        inputs: &'b [In<'a>],
        outputs: &'b mut [&'a mut [u8]],
    ) -> Call<'a, 'b> {
        debug_assert!(x.len() == inputs.len() && y.len() == outputs.len());
        debug_assert!(y.iter().zip(&*outputs).all(|(s, b)| s.bytes() == b.len()));
        Call { x, y, inputs, outputs }
    }

    /// Input `i` as f32: borrowed where it is f32 in memory of its own, else converted.
    pub fn f32(&self, i: usize) -> Cow<'a, [f32]> {
        match &self.inputs[i] {
            In::Shared(bytes) => floats(self.x[i].dtype, bytes),
            In::Packed(w) => Cow::Owned(floats(self.x[i].dtype, &w.unpack()).into_owned()),
            In::Output(j) => Cow::Owned(floats(self.x[i].dtype, &*self.outputs[*j]).into_owned()),
        }
    }

    /// Input `i` as integers.
    pub fn i32(&self, i: usize) -> Cow<'a, [i32]> {
        match &self.inputs[i] {
            In::Shared(bytes) => Cow::Borrowed(bytemuck::cast_slice(bytes)),
            In::Packed(_) => unreachable!("integers are never packed"),
            In::Output(j) => Cow::Owned(bytemuck::pod_collect_to_vec(&*self.outputs[*j])),
        }
    }

    /// Element `k` of input `i`, an integer.
    pub fn i32_at(&self, i: usize, k: usize) -> i32 {
        let bytes = match &self.inputs[i] {
            In::Shared(bytes) => bytes,
            In::Packed(_) => unreachable!("integers are never packed"),
            In::Output(j) => &*self.outputs[*j],
        };
        bytemuck::cast_slice(bytes)[k]
    }

    /// Input `i` in its own type. Panics for integers, for a packed weight, and for memory that an output takes over.
    pub fn slice(&self, i: usize) -> Slice<'a> {
        match &self.inputs[i] {
            In::Shared(bytes) => Slice::of(self.x[i].dtype, bytes),
            _ => None,
        }
        .unwrap_or_else(|| panic!("input {i}, {}, is not in floats of its own", self.x[i]))
    }

    /// Input `i` as the right operand of a product. Panics as [`Call::slice`].
    pub fn weights(&self, i: usize) -> Weights<'a> {
        match &self.inputs[i] {
            In::Packed(w) => Weights::Packed(*w),
            _ => Weights::Raw(self.slice(i)),
        }
    }

    /// Output `j`, to write in its own type. Panics for integers.
    pub fn out(&mut self, j: usize) -> SliceMut<'_> {
        let (spec, bytes) = (self.y[j], &mut *self.outputs[j]);
        SliceMut::of(spec.dtype, bytes).unwrap_or_else(|| panic!("output {j}, {spec}, does not hold floats"))
    }

    /// The first N outputs at once, to write in their own types. Panics for integers.
    pub fn outs<const N: usize>(&mut self) -> [SliceMut<'_>; N] {
        let specs = self.y;
        let mut all = self.outputs.iter_mut().zip(specs).map(|(bytes, spec)| SliceMut::of(spec.dtype, bytes));
        std::array::from_fn(|j| {
            all.next().flatten().unwrap_or_else(|| panic!("output {j} does not hold floats"))
        })
    }

    /// Computes output `j` in parallel, some rows of `width` elements at a time: `f(first row, rows)` writes them in f32.
    pub fn rows(&mut self, j: usize, width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        let rows = (CHUNK / width.max(1)).max(1);
        each_mut!(self.out(j), y => y.par_chunks_mut((rows * width).max(1)).enumerate().for_each(|(i, y)| {
            Element::edit(y, false, |y| f(i * rows, y));
        }));
    }

    /// Computes output `j` from input `i` of the same shape, whether they share memory or not, in parallel: in f32,
    /// `f(first element, values)` turns some elements of the input into those of the output.
    pub fn update(&mut self, i: usize, j: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        let x = match &self.inputs[i] {
            In::Output(same) if *same == j && self.x[i].dtype == self.y[j].dtype => None,
            _ => Some(self.slice(i)),
        };
        each_mut!(self.out(j), y => y.par_chunks_mut(CHUNK).enumerate().for_each(|(c, y)| {
            Element::edit(y, x.is_none(), |y| {
                if let Some(x) = x {
                    x.read(c * CHUNK, y);
                }
                f(c * CHUNK, y);
            });
        }));
    }

    /// Whether input `i` is in memory that an output takes over.
    pub fn shares(&self, i: usize) -> bool {
        matches!(self.inputs[i], In::Output(_))
    }

    /// Lets `f` compute output `j` in f32; what it wrote is rounded once to the output's type.
    pub fn write<R>(&mut self, j: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        let spec = self.y[j];
        let bytes = &mut *self.outputs[j];
        match spec.dtype {
            DType::F32 => f(bytemuck::cast_slice_mut(bytes)),
            DType::F16 => {
                let mut y = vec![0.0; spec.shape.numel()];
                let r = f(&mut y);
                math::f32_to_f16(&y, bytemuck::cast_slice_mut::<u8, f16>(bytes));
                r
            }
            DType::BF16 => {
                let mut y = vec![0.0; spec.shape.numel()];
                let r = f(&mut y);
                math::f32_to_bf16(&y, bytemuck::cast_slice_mut::<u8, bf16>(bytes));
                r
            }
            DType::I32 => {
                let mut y = vec![0.0; spec.shape.numel()];
                let r = f(&mut y);
                let ints = bytemuck::cast_slice_mut::<u8, i32>(bytes);
                ints.iter_mut().zip(y).for_each(|(to, v)| *to = v as i32);
                r
            }
        }
    }

    /// Output `j` as integers, to write.
    pub fn i32_mut(&mut self, j: usize) -> &mut [i32] {
        bytemuck::cast_slice_mut(&mut *self.outputs[j])
    }
}

/// Bytes of working memory that elementwise operations and norms over a last axis of `width` take, all threads together.
pub fn working_bytes(width: usize) -> usize {
    3 * CHUNK.max(width) * size_of::<f32>() * rayon::current_num_threads()
}

/// Bytes of the f32 copies that [`Call::f32`] and [`Call::write`] make of 16-bit inputs and outputs.
pub fn copies(x: &[Spec], y: &[Spec]) -> usize {
    let copied = x.iter().chain(y).filter(|s| matches!(s.dtype, DType::F16 | DType::BF16));
    copied.fold(0, |sum, s| sum.saturating_add(s.shape.numel().saturating_mul(size_of::<f32>())))
}

fn floats(dtype: DType, bytes: &[u8]) -> Cow<'_, [f32]> {
    match dtype {
        DType::F32 => Cow::Borrowed(bytemuck::cast_slice(bytes)),
        DType::F16 => {
            let x: &[f16] = bytemuck::cast_slice(bytes);
            let mut y = vec![0.0; x.len()];
            math::f16_to_f32(x, &mut y);
            Cow::Owned(y)
        }
        DType::BF16 => {
            let x: &[bf16] = bytemuck::cast_slice(bytes);
            let mut y = vec![0.0; x.len()];
            math::bf16_to_f32(x, &mut y);
            Cow::Owned(y)
        }
        DType::I32 => {
            let x: &[i32] = bytemuck::cast_slice(bytes);
            Cow::Owned(x.iter().map(|&v| v as f32).collect())
        }
    }
}
