//! What a room is given to launch its kernels: the operands of one node, and the device.

use super::{Boxed, Cuda, driver};
use crate::error::{Error, Result};
use crate::kernels::{self, DevicePtr, Kernel, Params, TensorMap};
use crate::tensor::{DType, Spec};
use std::borrow::Cow;

/// Blocks along x, y and z that every device takes.
const GRID: [usize; 3] = [(1 << 31) - 1, 65535, 65535];

/// Threads of a block that every device takes.
const BLOCK: usize = 1024;

/// Words of [`Call::counters`].
pub const COUNTERS: usize = 1 << 16;

/// A tensor in device memory.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Element type and shape.
    pub spec: Spec,
    /// Address of the first element; [`DevicePtr::NULL`] for an optional input that is absent.
    pub ptr: DevicePtr,
}

/// The element types that a kernel is compiled for: one, or a pair (first and second type of the file).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Types(DType, Option<DType>);

impl From<DType> for Types {
    fn from(t: DType) -> Types {
        Types(t, None)
    }
}

impl From<(DType, DType)> for Types {
    fn from((t, u): (DType, DType)) -> Types {
        Types(t, Some(u))
    }
}

impl Types {
    /// `f32`, or `f32>bf16`.
    pub fn name(self) -> Cow<'static, str> {
        match self {
            Types(t, None) => t.name().into(),
            Types(t, Some(u)) => format!("{t}>{u}").into(),
        }
    }
}

/// One node to be run on the device.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Where.
    pub device: &'a Cuda,
    /// The node's label, for errors.
    pub node: &'a str,
    /// Inputs.
    pub x: &'a [Operand],
    /// Outputs.
    pub y: &'a [Operand],
    /// Memory with arbitrary contents that the planner has reserved for this node.
    pub scratch: DevicePtr,
    /// Its size.
    pub scratch_bytes: usize,
}

impl Call<'_> {
    /// Address of input `i`; NULL if it is absent.
    pub fn x(&self, i: usize) -> DevicePtr {
        self.x.get(i).map_or(DevicePtr::NULL, |x| x.ptr)
    }

    /// Address of output `i`; NULL if it is absent.
    pub fn y(&self, i: usize) -> DevicePtr {
        self.y.get(i).map_or(DevicePtr::NULL, |y| y.ptr)
    }

    /// Type and shape of input `i`.
    ///
    /// # Panics
    /// When there is no input `i`: the shape rule of the room has counted them.
    pub fn x_spec(&self, i: usize) -> &Spec {
        &self.x[i].spec
    }

    /// Type and shape of output `i`.
    ///
    /// # Panics
    /// When there is no output `i`.
    pub fn y_spec(&self, i: usize) -> &Spec {
        &self.y[i].spec
    }

    /// Whether input `i` is there.
    pub fn has_x(&self, i: usize) -> bool {
        !self.x(i).is_null()
    }

    /// Whether output `i` is there.
    pub fn has_y(&self, i: usize) -> bool {
        !self.y(i).is_null()
    }

    /// A size for an `int` of a kernel's struct.
    ///
    /// # Errors
    /// When it is 2³¹ or more.
    pub fn int(&self, n: usize) -> Result<i32> {
        i32::try_from(n).map_err(|_| {
            let node = self.node;
            Error::invalid(format!(
                "node \"{node}\": the kernel counts with 32 bits; got a size of {n}: try a smaller one"
            ))
        })
    }

    /// [`COUNTERS`] words of device memory that hold 0: where blocks that share a result count their arrivals, so that the
    /// last one combines what all have left in scratch memory.
    ///
    /// All kernels of a device handle share them. They run one after another, so a kernel may use any of the words, and
    /// must leave 0 in each that it used: `atomic_inc_u32`, with the number of arrivals less one as its limit, does.
    ///
    /// # Errors
    /// When the device has no memory left for them.
    pub fn counters(&self) -> Result<DevicePtr> {
        self.device.counters().map_err(|e| e.at_node(self.node))
    }

    /// Sets output `i` to zero bytes, before kernels that add to it.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn zero_y(&self, i: usize) -> Result<()> {
        let bytes = self.y_spec(i).bytes();
        self.device.fill_at(self.y(i), bytes, 0).map_err(|e| e.at_node(self.node))
    }

    /// How a tensor at `at` lies, for a kernel whose copies take boxes of it: a field of its arguments.
    ///
    /// # Errors
    /// When the driver refuses it: an address or a stride that is no multiple of 16 bytes, a box with more than 256 on an axis or
    /// other than 128 bytes on the first.
    pub fn tensor_map(&self, at: DevicePtr, dtype: DType, tensor: &Boxed) -> Result<TensorMap> {
        driver::tensor::map(at, dtype, tensor).map_err(|failure| {
            let what = format!("{} for {dtype:?} at {at}, {tensor:?}", failure.words());
            Error::Cuda { call: "cuTensorMapEncodeTiled".into(), node: self.node.into(), what }
        })
    }

    /// Starts a kernel with `grid` blocks along x, y, z, of `block` threads each. Nothing is done if the grid
    /// is empty.
    ///
    /// `types` and `variant` choose among what the kernel file lists; the variant is empty where it lists
    /// none.
    ///
    /// # Errors
    /// When the file was not compiled for them, when grid or block is beyond the hardware's limits, or when
    /// the driver fails; a fault of the kernel itself shows at the next synchronisation (here, with
    /// `LDM_CUDA_SYNC=1`).
    pub fn launch<P: Params>(
        &self,
        kernel: Kernel<P>,
        types: impl Into<Types>,
        variant: &str,
        grid: [usize; 3],
        block: usize,
        params: P,
    ) -> Result<()> {
        let (types, name) = (types.into().name(), kernel.name());
        let [x, y, z] = grid;
        let index = kernels::find(kernel.stem(), &types, variant)?;
        let fits = (1..=BLOCK).contains(&block) && grid.iter().zip(GRID).all(|(&n, most)| n <= most);
        if !fits {
            return Err(Error::Cuda {
                call: format!("{name} of {}, grid ({x},{y},{z}), block {block}", kernels::UNITS[index]),
                node: self.node.into(),
                what: format!(
                    "the limits are grid ({},{},{}) and block {BLOCK}; use smaller sizes",
                    GRID[0], GRID[1], GRID[2]
                ),
            });
        }
        if grid.contains(&0) {
            return Ok(());
        }
        let grid = grid.map(|n| n as u32);
        self.device.start(index, grid, block as u32, &params).map_err(|e| e.at_node(self.node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_named_as_in_the_images() {
        assert_eq!(Types::from(DType::BF16).name(), "bf16");
        assert_eq!(Types::from((DType::F32, DType::F16)).name(), "f32>f16");
    }
}
