//! Maps of tensors for the copies of Hopper's memory accelerator (TMA).

use super::{Failure, check};
use crate::kernels::{DevicePtr, TensorMap};
use crate::tensor::DType;
use cudarc::driver::sys;

/// A tensor of four axes, the innermost first, and the box of it that one copy takes, in the swizzle of 128 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Boxed {
    /// Extent of each axis: what lies outside is copied as zeros.
    pub extents: [usize; 4],
    /// Elements from one index to the next on all axes but the first, whose elements are neighbours. A multiple of 16 bytes each.
    pub strides: [usize; 3],
    /// Extent of the box on each axis, at most 256; on the first, 128 bytes.
    pub part: [usize; 4],
}

/// The map of a tensor at `at`, a multiple of 16. The driver only computes here; it has had the function since CUDA 12.0.
pub(in crate::backend::cuda) fn map(
    at: DevicePtr,
    dtype: DType,
    tensor: &Boxed,
) -> std::result::Result<TensorMap, Failure> {
    use sys::CUtensorMapDataType_enum as Element;
    let element = match dtype {
        DType::F16 => Element::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::BF16 => Element::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::F32 => Element::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        DType::I32 => Element::CU_TENSOR_MAP_DATA_TYPE_INT32,
    };
    let extents = tensor.extents.map(|n| n as u64);
    let strides = tensor.strides.map(|n| (n * dtype.size()) as u64);
    let (part, steps) = (tensor.part.map(|n| n as u32), [1; 4]);
    let mut raw = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the driver is started (a context is open) and has the function, since `start` wants a later version. It reads four
    // extents, boxes and steps and three strides, and writes one map. The address is not followed here; the kernel's copies are
    // held to the map's extents, which the caller has from the shapes of its operands.
    let code = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut raw,
            element,
            4,
            at.0 as *mut std::ffi::c_void,
            extents.as_ptr(),
            strides.as_ptr(),
            part.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check("cuTensorMapEncodeTiled", code).map(|()| TensorMap(raw.opaque))
}
