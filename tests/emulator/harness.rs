//! The driver, called directly, for the tests of the emulator.
#![allow(unsafe_code, dead_code)]

#[path = "../common/emulator.rs"]
mod emulator;

use std::ffi::{CString, c_void};
use std::io::Write;
use std::sync::{Mutex, MutexGuard};

use cudarc::driver::sys::{self, CUresult};
use emulator::Emulator;

/// The emulator, held by one test at a time: its settings and its sticky error belong to the process.
pub struct Bench {
    pub emulator: Emulator,
    _held: MutexGuard<'static, ()>,
}

impl Bench {
    /// `None`, said loudly, where there is nothing to test.
    pub fn new(test: &str) -> Option<Bench> {
        static ONE: Mutex<()> = Mutex::new(());
        let held = ONE.lock().unwrap_or_else(|e| e.into_inner());
        match emulator::start_on(&["tests/emulator/bad", "tests/emulator/own"]) {
            Ok(Some(emulator)) => {
                emulator.reset();
                emulator.configure(
                    "order=forward;async=late;fail=none;uninit=error;threads=0;banks=off;drop=none",
                );
                unsafe {
                    ok(sys::cuInit(0));
                    let mut context = std::ptr::null_mut();
                    ok(sys::cuDevicePrimaryCtxRetain(&mut context, 0));
                    ok(sys::cuCtxSetCurrent(context));
                }
                Some(Bench { emulator, _held: held })
            }
            Ok(None) => {
                eprintln!("SKIPPED: {test}: LDM_TEST_DEVICE=cuda, and this tests the emulator");
                None
            }
            Err(why) => {
                // Past the test harness, which keeps what passing tests print to itself.
                assert!(std::env::var_os("LDM_REQUIRE_EMULATOR").is_none(), "{test} would be skipped: {why}");
                let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
                None
            }
        }
    }
}

/// Panics on anything but success.
pub fn ok(result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS);
}

/// What a driver call gives.
pub type Step<T> = Result<T, CUresult>;

/// A call's code as a `Result`.
pub fn step(result: CUresult) -> Step<()> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(result) }
}

/// Device memory that is freed when dropped.
pub struct Memory(pub u64);

impl Memory {
    pub fn new(bytes: usize) -> Step<Memory> {
        let mut at = 0;
        step(unsafe { sys::cuMemAlloc_v2(&mut at, bytes) })?;
        Ok(Memory(at))
    }

    pub fn with(values: &[f32], stream: sys::CUstream) -> Step<Memory> {
        let memory = Memory::new(size_of_val(values))?;
        step(unsafe {
            sys::cuMemcpyHtoDAsync_v2(memory.0, values.as_ptr().cast(), size_of_val(values), stream)
        })?;
        Ok(memory)
    }

    pub fn read(&self, n: usize, stream: sys::CUstream) -> Step<Vec<f32>> {
        let mut out = vec![0f32; n];
        step(unsafe { sys::cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast(), self.0, 4 * n, stream) })?;
        step(unsafe { sys::cuStreamSynchronize(stream) })?;
        Ok(out)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = unsafe { sys::cuMemFree_v2(self.0) };
    }
}

/// Page-locked host memory.
pub struct Pinned {
    pub at: *mut f32,
    n: usize,
}

impl Pinned {
    pub fn new(n: usize) -> Pinned {
        let mut at: *mut c_void = std::ptr::null_mut();
        ok(unsafe { sys::cuMemHostAlloc(&mut at, 4 * n, 0) });
        Pinned { at: at.cast(), n }
    }

    pub fn values(&mut self) -> &mut [f32] {
        unsafe { std::slice::from_raw_parts_mut(self.at, self.n) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        ok(unsafe { sys::cuMemFreeHost(self.at.cast()) });
    }
}

/// A stream that does not wait for the default one.
pub fn stream() -> sys::CUstream {
    let mut stream = std::ptr::null_mut();
    ok(unsafe { sys::cuStreamCreate(&mut stream, 1) });
    stream
}

#[repr(C, align(16))]
struct Image([u8; 80]);

/// A module and its kernel, by the header that stands before an image.
pub fn kernel(stem: &str, variant: &str) -> Step<sys::CUfunction> {
    kernel_of(stem, "f32", variant)
}

/// As `kernel`, for another element type.
pub fn kernel_of(stem: &str, dtype: &str, variant: &str) -> Step<sys::CUfunction> {
    let mut image = Box::new(Image([0; 80]));
    image.0[..8].copy_from_slice(b"LDMKERN1");
    image.0[8..8 + stem.len()].copy_from_slice(stem.as_bytes());
    image.0[40..40 + dtype.len()].copy_from_slice(dtype.as_bytes());
    image.0[48..48 + variant.len()].copy_from_slice(variant.as_bytes());
    let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
    let name = CString::new(stem).unwrap();
    step(unsafe { sys::cuModuleLoadData(&mut module, image.0[64..].as_ptr().cast()) })?;
    step(unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) })?;
    Ok(function)
}

/// A grid in one dimension.
pub fn launch<P>(
    function: sys::CUfunction,
    grid: usize,
    block: usize,
    stream: sys::CUstream,
    params: P,
) -> Step<()> {
    launch_3d(function, [grid as u32, 1, 1], block as u32, stream, params)
}

/// Launches with one struct of parameters.
pub fn launch_3d<P>(
    function: sys::CUfunction,
    grid: [u32; 3],
    block: u32,
    stream: sys::CUstream,
    params: P,
) -> Step<()> {
    launch_shared(function, grid, block, 0, stream, params)
}

/// Launches with dynamic shared memory.
pub fn launch_shared<P>(
    function: sys::CUfunction,
    [x, y, z]: [u32; 3],
    block: u32,
    shared: u32,
    stream: sys::CUstream,
    mut params: P,
) -> Step<()> {
    let mut pointers = [(&raw mut params).cast::<c_void>()];
    let (pointers, extra) = (pointers.as_mut_ptr(), std::ptr::null_mut());
    step(unsafe { sys::cuLaunchKernel(function, x, y, z, block, 1, 1, shared, stream, pointers, extra) })
}

/// As `launch`, but it may start before the kernel before it has ended.
pub fn launch_programmatic<P>(
    function: sys::CUfunction,
    grid: u32,
    block: u32,
    stream: sys::CUstream,
    mut params: P,
) -> Step<()> {
    let mut pointers = [(&raw mut params).cast::<c_void>()];
    let mut serial = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: grid,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        hStream: stream,
        attrs: &mut serial,
        numAttrs: 1,
    };
    step(unsafe { sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) })
}

const DYNAMIC: sys::CUfunction_attribute =
    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;

/// Lets launches of a kernel pass this much dynamic shared memory.
pub fn allow_shared(function: sys::CUfunction, bytes: i32) -> Step<()> {
    step(unsafe { sys::cuFuncSetAttribute(function, DYNAMIC, bytes) })
}

/// Elements of a tensor map: f32, f16 or bf16.
pub use sys::CUtensorMapDataType;

/// A map of a tensor with 4 axes, innermost first, from extents, the outer axes' strides in bytes, and the box, in the swizzle of 128 bytes.
pub fn tensor_map(
    kind: CUtensorMapDataType,
    at: u64,
    extents: [u64; 4],
    strides: [u64; 3],
    part: [u32; 4],
) -> Step<sys::CUtensorMap> {
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    step(unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            kind,
            4,
            at as *mut c_void,
            extents.as_ptr(),
            strides.as_ptr(),
            part.as_ptr(),
            [1; 4].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    })?;
    Ok(map)
}

/// How much dynamic shared memory launches of a kernel may pass.
pub fn allowed_shared(function: sys::CUfunction) -> i32 {
    let mut bytes = 0;
    ok(unsafe { sys::cuFuncGetAttribute(&mut bytes, DYNAMIC, function) });
    bytes
}

/// An answer of the device, by the number of the question.
pub fn attribute(which: sys::CUdevice_attribute) -> i32 {
    let mut value = 0;
    ok(unsafe { sys::cuDeviceGetAttribute(&mut value, which, 0) });
    value
}
