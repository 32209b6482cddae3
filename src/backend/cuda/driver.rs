//! The CUDA driver, made safe: handles that free themselves, and results instead of codes. All device
//! `unsafe` is here.
//!
//! Every call makes the context current first, since a handle may be used from any thread.
#![allow(unsafe_code)]

pub(super) mod tensor;

use crate::error::{Error, Result};
use crate::kernels::{DevicePtr, Params};
use cudarc::driver::sys::{self, CUresult};
use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// The oldest driver interface whose functions are all called here: CUDA 12.8, driver 570.
const OLDEST: i32 = 12080;

/// Bytes of dynamic shared memory that a block may have without the function being allowed more.
const UNASKED: usize = 48 * 1024;

/// A code of the driver, and the function that returned it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failure {
    call: &'static str,
    code: CUresult,
}

impl Failure {
    /// Whether memory ran out.
    pub(super) fn is_out_of_memory(self) -> bool {
        self.code == CUresult::CUDA_ERROR_OUT_OF_MEMORY
    }

    /// Whether an image does not suit the driver or the device.
    pub(super) fn is_bad_image(self) -> bool {
        use CUresult::*;
        matches!(
            self.code,
            CUDA_ERROR_INVALID_IMAGE
                | CUDA_ERROR_NO_BINARY_FOR_GPU
                | CUDA_ERROR_INVALID_PTX
                | CUDA_ERROR_UNSUPPORTED_PTX_VERSION
                | CUDA_ERROR_INVALID_SOURCE
                | CUDA_ERROR_JIT_COMPILER_NOT_FOUND
        )
    }

    /// The error of a wait for work that was asked for earlier.
    pub(super) fn of_earlier_work(self) -> Error {
        let what = self.words() + "; LDM_CUDA_SYNC=1 tells which kernel it was";
        Error::Cuda { call: "work on the device".into(), node: String::new(), what }
    }

    /// The driver's own words.
    pub(super) fn words(self) -> String {
        let text = |get: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
            let mut text = ptr::null();
            // SAFETY: `text` is a place for one pointer, and the driver has been loaded: it made `self`.
            let found = unsafe { get(self.code, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
            // SAFETY: on success the driver returns a NUL-terminated text that stays.
            found.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        match (text(sys::cuGetErrorName), text(sys::cuGetErrorString)) {
            (Some(name), Some(words)) => format!("{words} ({name})"),
            (Some(words), None) | (None, Some(words)) => words,
            (None, None) => format!("error {}", self.code as u32),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        Error::Cuda { call: failure.call.into(), node: String::new(), what: failure.words() }
    }
}

fn check(call: &'static str, code: CUresult) -> std::result::Result<(), Failure> {
    if code == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(Failure { call, code }) }
}

/// Whether there is a driver that does not simply say that it has no device.
pub(super) fn present() -> bool {
    // SAFETY: opens and closes the library.
    if !unsafe { sys::is_culib_present() } {
        return false;
    }
    // SAFETY: no arguments but the flags, which must be 0. May be called any number of times.
    unsafe { sys::cuInit(0) != CUresult::CUDA_ERROR_NO_DEVICE && !matches!(count(), Ok(0)) }
}

/// Whether NVTX's library is there: libnvToolsExt, which CUDA toolkits up to 12 bring.
pub(super) fn ranges() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: opens and closes the library. cudarc's own loader panics where there is none, so it must not be asked.
    *PRESENT.get_or_init(|| unsafe { cudarc::nvtx::sys::is_culib_present() })
}

/// Loads and starts the driver, and returns the CUDA version that it supports: 13000 is 13.0.
pub(super) fn start() -> Result<i32> {
    // SAFETY: opens and closes the library. cudarc's own loader panics where there is none, so it must not be
    // asked.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Device(
            "no NVIDIA driver: the library libcuda.so.1 is not there. Install driver 580 or later (if it is \
             installed, put its folder into LD_LIBRARY_PATH); `--device cpu` runs without"
                .into(),
        ));
    }
    let mut version = 0;
    // SAFETY: takes a place for one integer; may be called before cuInit.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    if version < OLDEST {
        return Err(Error::Device(format!(
            "the NVIDIA driver is too old: it supports CUDA {}; want {} or later, which is driver 570, and \
             driver 580 for kernels that were built by nvcc 13; `--device cpu` runs without",
            version_text(version),
            version_text(OLDEST)
        )));
    }
    // SAFETY: no arguments but the flags, which must be 0. May be called any number of times.
    check("cuInit", unsafe { sys::cuInit(0) }).map_err(|failure| {
        Error::Device(format!(
            "the NVIDIA driver does not start: {}. `nvidia-smi` should list a GPU; in a container, pass the \
             GPU through (`--gpus all`); `--device cpu` runs without",
            failure.words()
        ))
    })?;
    Ok(version)
}

/// `13.0` for 13000.
pub(super) fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Number of devices.
pub(super) fn count() -> Result<usize> {
    let mut count = 0;
    // SAFETY: takes a place for one integer.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// A stream, whether the newest that it was given is a kernel, and how many of its kernels may start early: behind one only.
struct Stream {
    raw: sys::CUstream,
    state: Mutex<(bool, usize)>,
}

impl Stream {
    fn state(&self) -> MutexGuard<'_, (bool, usize)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives it anything but a kernel, by `call`. No other thread gives it something meanwhile.
    fn give(&self, call: impl FnOnce(sys::CUstream) -> CUresult) -> CUresult {
        let mut state = self.state();
        state.0 = false;
        call(self.raw)
    }

    /// Gives it a kernel, by `call`, which hears whether it may start early; it may not unless it `overlaps`.
    fn give_kernel(&self, overlaps: bool, call: impl FnOnce(sys::CUstream, bool) -> CUresult) -> CUresult {
        let mut state = self.state();
        let early = overlaps && state.0;
        let code = call(self.raw, early);
        let good = code == CUresult::CUDA_SUCCESS;
        *state = (good, state.1 + usize::from(early && good));
        code
    }
}

/// One device's primary context, and the stream in which all of a handle's work is done, in order.
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: Stream,
}

// SAFETY: the driver's functions may be called from any thread, and each method makes the context current in
// its own. The handles are never changed after `open`.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens device `ordinal`, which must be less than [`count`].
    pub(super) fn open(ordinal: usize) -> Result<Context> {
        let ordinal = c_int::try_from(ordinal).map_err(|_| Error::invalid(format!("device {ordinal}")))?;
        let (mut device, mut context, mut stream) = (0, ptr::null_mut(), ptr::null_mut());
        // SAFETY: the driver is started (the caller counted devices); takes a place for one device.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
        // SAFETY: `device` is valid; the context is released on drop.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        let mut this = Context { device, context, stream: Stream { raw: stream, state: Mutex::default() } };
        this.bind()?;
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the stream is destroyed on drop.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
        this.stream.raw = stream;
        Ok(this)
    }

    fn bind(&self) -> std::result::Result<(), Failure> {
        // SAFETY: the context is retained for as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Name, and version of the hardware.
    pub(super) fn describe(&self) -> Result<(String, (u32, u32))> {
        use sys::CUdevice_attribute_enum::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        let mut name = [0 as c_char; 128];
        // SAFETY: the driver writes at most the given number of characters, NUL included.
        check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 127, self.device) })?;
        // SAFETY: the last character was zero and is not written, so the text ends inside `name`.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok((name, (self.attribute(MAJOR)?, self.attribute(MINOR)?)))
    }

    fn attribute(&self, which: sys::CUdevice_attribute) -> std::result::Result<u32, Failure> {
        let mut value = 0;
        // SAFETY: takes a place for one integer.
        let code = unsafe { sys::cuDeviceGetAttribute(&mut value, which, self.device) };
        check("cuDeviceGetAttribute", code).map(|()| value.max(0) as u32)
    }

    /// The most shared memory that a block may ask for, in bytes.
    pub(super) fn shared_memory(&self) -> std::result::Result<usize, Failure> {
        use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as MOST;
        Ok(self.attribute(MOST)? as usize)
    }

    /// Free and total bytes of device memory.
    pub(super) fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: takes places for two sizes.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free, total))
    }

    /// Waits for everything that was asked for so far.
    pub(super) fn synchronize(&self) -> std::result::Result<(), Failure> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream.raw) })
    }

    /// Copies to the device. `to` must be inside an allocation that has room for `from`.
    pub(super) fn upload(&self, to: DevicePtr, from: &[u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller (mod.rs) has checked the bounds of the allocation. `from` is borrowed until the
        // synchronisation below, so the copy has read it before it can change.
        let code = self.stream.give(|stream| unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.0, from.as_ptr().cast(), from.len(), stream)
        });
        Ok(self.finish(check("cuMemcpyHtoDAsync", code))?)
    }

    /// Copies from the device, after everything that was asked for before.
    pub(super) fn download(&self, from: DevicePtr, to: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller (mod.rs) has checked the bounds of the allocation. `to` is borrowed until the
        // synchronisation below, so the copy has ended before anybody reads it.
        let code = self.stream.give(|stream| unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, to.len(), stream)
        });
        Ok(self.finish(check("cuMemcpyDtoHAsync", code))?)
    }

    /// Waits for a copy from or to host memory, which must not go on after its borrow ends.
    fn finish(&self, started: std::result::Result<(), Failure>) -> std::result::Result<(), Failure> {
        let mut done = self.synchronize();
        if done.is_err() {
            // Earlier work may have failed, or the wait itself: the second wait is for the copy.
            done = self.synchronize().and(done);
        }
        started.and(done)
    }

    /// The stream that work goes to: a recording's, if there is one.
    fn stream<'a>(&'a self, recording: Option<&'a Recording>) -> &'a Stream {
        recording.map_or(&self.stream, |r| &r.stream)
    }

    /// Copies `n` bytes on the device.
    pub(super) fn copy(
        &self,
        from: DevicePtr,
        to: DevicePtr,
        n: usize,
        on: Option<&Recording>,
    ) -> Result<()> {
        self.bind()?;
        // SAFETY: device memory only: nothing that Rust owns can be touched. The caller has checked the
        // bounds.
        let copy = |stream| unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, n, stream) };
        Ok(check("cuMemcpyDtoDAsync", self.stream(on).give(copy))?)
    }

    /// Sets `n` bytes.
    pub(super) fn fill(&self, at: DevicePtr, n: usize, byte: u8, on: Option<&Recording>) -> Result<()> {
        self.bind()?;
        // SAFETY: device memory only, as in `copy`.
        let fill = |stream| unsafe { sys::cuMemsetD8Async(at.0, byte, n, stream) };
        Ok(check("cuMemsetD8Async", self.stream(on).give(fill))?)
    }

    /// Starts a kernel: grid of blocks of `block` threads, each block with the dynamic shared memory that the function was
    /// looked up for. The sizes must be within the device's limits. One that may overlap and follows a kernel is launched
    /// programmatically: the driver may place its blocks when those before have returned, and before their writes are seen.
    /// A recording makes a programmatic edge of it (CUDA 12.3).
    pub(super) fn launch<P: Params>(
        &self,
        on: Option<&Recording>,
        function: &Function,
        [x, y, z]: [u32; 3],
        block: u32,
        params: &P,
    ) -> std::result::Result<(), Failure> {
        self.bind()?;
        let mut arguments = [ptr::from_ref(params).cast_mut().cast()];
        // SAFETY: the function's module is loaded (`function` holds it). The kernel has one parameter, and
        // `P` is the twin of its struct: only generated handles name a function, and both compilers have
        // checked the layout. The driver copies the struct and the attribute before it returns. The kernel itself reaches
        // device memory only, and one that overlaps does so behind its first statement, a wait for all that came before.
        let code = self.stream(on).give_kernel(function.overlaps, |stream, early| unsafe {
            let mut programmatic = sys::CUlaunchAttribute {
                id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: [0; 4],
                value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            };
            let config = sys::CUlaunchConfig {
                gridDimX: x,
                gridDimY: y,
                gridDimZ: z,
                blockDimX: block,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: function.smem,
                hStream: stream,
                attrs: &mut programmatic,
                numAttrs: u32::from(early),
            };
            sys::cuLaunchKernelEx(&config, function.raw, arguments.as_mut_ptr(), ptr::null_mut())
        });
        check("cuLaunchKernelEx", code)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // A failure here has nobody to tell, and leaves nothing that could be used any more.
        let _ = self.synchronize();
        if !self.stream.raw.is_null() {
            // SAFETY: made by `open`, destroyed once, and all work in it has ended.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.stream.raw) };
        }
        // SAFETY: retained once by `open`; buffers, modules and events hold an `Arc` of `self`, so none is
        // left.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Device memory, freed on drop.
pub(super) struct Memory {
    at: DevicePtr,
    context: Arc<Context>,
}

impl Memory {
    /// Allocates `bytes`, at least one.
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> std::result::Result<Memory, Failure> {
        context.bind()?;
        let mut at = 0;
        // SAFETY: takes a place for one address; freed on drop. The driver refuses a size of 0.
        check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut at, bytes.max(1)) })?;
        Ok(Memory { at: DevicePtr(at), context: context.clone() })
    }

    /// Its address.
    pub(super) fn ptr(&self) -> DevicePtr {
        self.at
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Work that was asked for may still use it.
        let _ = self.context.synchronize();
        // SAFETY: allocated by `new`, freed once.
        let _ = unsafe { sys::cuMemFree_v2(self.at.0) };
    }
}

/// A loaded image, unloaded on drop.
pub(super) struct Module {
    raw: sys::CUmodule,
    context: Arc<Context>,
}

// SAFETY: a module's handle may be used from any thread, and is never changed.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin, or PTX that ends in NUL.
    pub(super) fn new(context: &Arc<Context>, image: &'static [u8]) -> std::result::Result<Module, Failure> {
        context.bind()?;
        let mut raw = ptr::null_mut();
        // SAFETY: a cubin carries its own size, PTX ends in NUL (build.rs adds one to every image).
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut raw, image.as_ptr().cast()) })?;
        Ok(Module { raw, context: context.clone() })
    }

    /// The kernel of this name, to be launched with `smem` bytes of dynamic shared memory: at most what
    /// [`Context::shared_memory`] says. `overlaps` where it may start before the kernel before it has ended: its image must wait.
    pub(super) fn function(self: &Arc<Self>, name: &str, smem: usize, overlaps: bool) -> Result<Function> {
        self.context.bind()?;
        let text = CString::new(name).map_err(|_| Error::invalid(format!("kernel `{name}`")))?;
        let mut raw = ptr::null_mut();
        // SAFETY: the module is loaded; `text` ends in NUL.
        check("cuModuleGetFunction", unsafe { sys::cuModuleGetFunction(&mut raw, self.raw, text.as_ptr()) })?;
        if smem > UNASKED {
            use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
            // SAFETY: the function was found above, in a module that is loaded.
            check("cuFuncSetAttribute", unsafe { sys::cuFuncSetAttribute(raw, MOST, smem as c_int) })?;
        }
        Ok(Function { raw, smem: smem as u32, overlaps, _module: self.clone() })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.context.synchronize();
        // SAFETY: loaded by `new`, unloaded once; functions hold an `Arc` of `self`, so none is left.
        let _ = unsafe { sys::cuModuleUnload(self.raw) };
    }
}

/// A kernel of a loaded module.
#[derive(Clone)]
pub(super) struct Function {
    raw: sys::CUfunction,
    /// Dynamic shared memory per block, bytes.
    smem: u32,
    overlaps: bool,
    _module: Arc<Module>,
}

// SAFETY: as for `Module`.
unsafe impl Send for Function {}
// SAFETY: as for `Module`.
unsafe impl Sync for Function {}

/// A stream that writes down what it is given instead of doing it, until it ends.
pub(super) struct Recording {
    stream: Stream,
    context: Arc<Context>,
}

// SAFETY: as for `Module`.
unsafe impl Send for Recording {}
// SAFETY: as for `Module`.
unsafe impl Sync for Recording {}

impl Recording {
    /// Begins. It has a stream of its own, so that what other threads ask of the device meanwhile is done, not recorded;
    /// the calling thread must neither allocate nor wait before the end.
    pub(super) fn begin(context: &Arc<Context>) -> std::result::Result<Recording, Failure> {
        use sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as OTHERS_MAY;
        context.bind()?;
        let (mut stream, flags) = (ptr::null_mut(), sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32);
        // SAFETY: the context is current; the stream is destroyed on drop.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
        let this =
            Recording { stream: Stream { raw: stream, state: Mutex::default() }, context: context.clone() };
        // SAFETY: the stream was made above.
        let code = unsafe { sys::cuStreamBeginCapture_v2(stream, OTHERS_MAY) };
        check("cuStreamBeginCapture", code).map(|()| this)
    }

    /// Ends, and makes what was recorded ready to run.
    pub(super) fn end(&self) -> std::result::Result<Graph, Failure> {
        self.context.bind()?;
        let (mut recorded, mut raw, mut nodes) = (ptr::null_mut(), ptr::null_mut(), 0);
        // SAFETY: the stream captures since `begin`; takes a place for one handle.
        check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(self.stream.raw, &mut recorded) })?;
        // SAFETY: `recorded` is a graph from here to its destruction below; without a place for nodes they are counted.
        let made = unsafe {
            check("cuGraphGetNodes", sys::cuGraphGetNodes(recorded, ptr::null_mut(), &mut nodes)).and_then(
                |()| check("cuGraphInstantiate", sys::cuGraphInstantiateWithFlags(&mut raw, recorded, 0)),
            )
        };
        // SAFETY: what is ready to run is a copy.
        let _ = unsafe { sys::cuGraphDestroy(recorded) };
        let early = self.stream.state().1;
        made.map(|()| Graph { raw, nodes, early, context: self.context.clone() })
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // SAFETY: made by `begin`, destroyed once.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.stream.raw) };
    }
}

/// Recorded work, ready to run as often as one likes.
pub(super) struct Graph {
    raw: sys::CUgraphExec,
    /// Kernels and fills in it.
    pub(super) nodes: usize,
    /// Those of the kernels that may start before the one before them has ended.
    pub(super) early: usize,
    context: Arc<Context>,
}

// SAFETY: as for `Module`: launches of one graph follow each other in the stream.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Graph {
    /// Runs it after everything that was asked for before.
    pub(super) fn launch(&self) -> std::result::Result<(), Failure> {
        self.context.bind()?;
        // SAFETY: the graph is alive. Its kernels' modules are loaded for as long as the device handle lives (`Graph` in
        // mod.rs holds one), and they reach device memory only.
        let launch = |stream| unsafe { sys::cuGraphLaunch(self.raw, stream) };
        check("cuGraphLaunch", self.context.stream.give(launch))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `end`, destroyed once; the driver waits by itself for a launch that still runs.
        let _ = unsafe { sys::cuGraphExecDestroy(self.raw) };
    }
}

/// A mark in the stream, which the device stamps with the time.
pub struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: as for `Module`.
unsafe impl Send for Event {}
// SAFETY: as for `Module`.
unsafe impl Sync for Event {}

impl Event {
    /// Marks the point that the stream has reached.
    pub(super) fn record(context: &Arc<Context>) -> Result<Event> {
        context.bind()?;
        let mut raw = ptr::null_mut();
        // SAFETY: takes a place for one handle; destroyed on drop.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut raw, 0) })?;
        let this = Event { raw, context: context.clone() };
        // SAFETY: event and stream are of the current context.
        check("cuEventRecord", context.stream.give(|stream| unsafe { sys::cuEventRecord(raw, stream) }))?;
        Ok(this)
    }

    /// Waits until the device has come this far.
    ///
    /// # Errors
    /// When work before it failed.
    pub fn wait(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the event is recorded.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw) })
            .map_err(Failure::of_earlier_work)
    }

    /// Milliseconds on the device from this mark to `later`; waits for `later`.
    ///
    /// # Errors
    /// When the two are marks of different devices, or work between them failed.
    pub fn elapsed(&self, later: &Event) -> Result<f64> {
        later.wait()?;
        let mut ms = 0.0;
        // SAFETY: both events are recorded; takes a place for one number.
        check("cuEventElapsedTime", unsafe { sys::cuEventElapsedTime_v2(&mut ms, self.raw, later.raw) })?;
        Ok(f64::from(ms))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record`, destroyed once; the driver waits for a pending record by itself.
        let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}
