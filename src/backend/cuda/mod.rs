//! The CUDA device: memory, copies, modules, launches, recorded launches. One stream per handle; everything in it happens
//! in order.

mod call;
mod driver;

pub use call::{COUNTERS, Call, Operand, Types};
pub use driver::Event;
pub use driver::tensor::Boxed;

use crate::error::{Error, Result};
use crate::kernels::{self, DevicePtr, Params, UNITS};
use driver::{Context, Failure, Function, Memory, Module, Recording};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

/// A handle on one GPU. Clones share it.
#[derive(Clone)]
pub struct Cuda {
    inner: Arc<Inner>,
    /// Where kernels and fills are written down instead of run, inside [`Cuda::record_graph`].
    recording: Option<Arc<Recording>>,
    /// `LDM_CUDA_WGMMA`, on hardware that has them: see [`Cuda::wgmma`].
    wgmma: Wgmma,
}

/// The one version of the hardware that has the products of warpgroups.
const WGMMA: (u32, u32) = (9, 0);

/// Which kernels rooms launch for products of 16-bit matrices: `LDM_CUDA_WGMMA`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wgmma {
    /// Those that multiply by warps (`mma.sync`), which every card has.
    Off,
    /// Those that multiply by whole warpgroups (`wgmma`): of each tile that of the next two which was measured to be faster.
    On,
    /// Those whose threads copy the operands.
    Threads,
    /// Those whose operands the memory accelerator (TMA) copies, where a product suits it.
    Tma,
}

impl Wgmma {
    /// By the words of the variable.
    pub const ALL: [(&str, Wgmma); 4] =
        [("on", Wgmma::On), ("off", Wgmma::Off), ("threads", Wgmma::Threads), ("tma", Wgmma::Tma)];

    /// What is taken on hardware of a version where the variable does not say: they, where this build has them for it.
    fn unset(capability: (u32, u32)) -> Wgmma {
        let compiled = |stem| {
            let mut units = UNITS.iter().filter(|unit| unit.stem == stem);
            // Without any image in the build, none of these is missing.
            let has = |unit: &kernels::Unit| {
                unit.image(capability).is_some_and(|i| i.arch != kernels::Arch::None || !kernels::COMPILED)
            };
            units.all(has)
        };
        if capability == WGMMA && ["conv2d_wgmma", "conv2d_tma"].into_iter().all(compiled) {
            Wgmma::On
        } else {
            Wgmma::Off
        }
    }
}

struct Inner {
    ordinal: usize,
    name: String,
    capability: (u32, u32),
    driver: i32,
    /// `LDM_CUDA_SYNC=1`: wait after each launch.
    patient: bool,
    /// Unless `LDM_CUDA_GRAPH=off`.
    graphs: bool,
    /// Unless `LDM_CUDA_OVERLAP=off`: a kernel may start before the one before it has ended.
    overlap: bool,
    functions: Mutex<HashMap<(usize, &'static str), Function>>,
    modules: Mutex<HashMap<usize, Arc<Module>>>,
    counters: Mutex<Option<Memory>>,
    context: Arc<Context>,
}

/// Device memory; freed on drop, after the work that was asked for.
pub struct Buffer {
    memory: Memory,
    bytes: usize,
}

impl Buffer {
    /// Address of the first byte; a multiple of 256.
    pub fn ptr(&self) -> DevicePtr {
        self.memory.ptr()
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address of `n` bytes from `offset` on.
    fn part(&self, what: &str, offset: usize, n: usize) -> Result<DevicePtr> {
        match offset.checked_add(n) {
            Some(end) if end <= self.bytes => Ok(self.ptr().offset(offset)),
            _ => Err(Error::invalid(format!(
                "{what}: want bytes inside a buffer of {}; got {n} from {offset} on",
                self.bytes
            ))),
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({}, {} bytes)", self.ptr(), self.bytes)
    }
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{} ({})", self.inner.ordinal, self.inner.name)
    }
}

/// Whether an environment variable switches something on; `unset` where it does not say.
fn switch(name: &str, unset: bool) -> Result<bool> {
    setting(name, unset, &[("on", true), ("off", false)])
}

/// What an environment variable sets, of these; `unset` where it does not say.
fn setting<V: Copy>(name: &str, unset: V, values: &[(&str, V)]) -> Result<V> {
    let text = std::env::var(name).unwrap_or_default();
    if text.is_empty() {
        return Ok(unset);
    }
    values.iter().find(|(word, _)| *word == text).map(|(_, value)| *value).ok_or_else(|| {
        let words: Vec<&str> = values.iter().map(|(word, _)| *word).collect();
        Error::invalid(format!("{name}: want {}; got `{text}`", words.join(" or ")))
    })
}

impl Cuda {
    /// Number of GPUs, at least one.
    ///
    /// # Errors
    /// [`Error::Device`], with what is missing, when there is no driver or no GPU.
    pub fn count() -> Result<usize> {
        driver::start()?;
        match driver::count()? {
            0 => Err(Error::Device(
                "the NVIDIA driver sees no GPU (is CUDA_VISIBLE_DEVICES set?); `--device cpu` runs without"
                    .into(),
            )),
            n => Ok(n),
        }
    }

    /// Whether there is a driver with at least one GPU, or a driver that fails for another reason than having none.
    pub fn present() -> bool {
        driver::present()
    }

    /// Opens GPU number `ordinal`, counted from 0, and checks that this build's kernels run on it.
    ///
    /// # Errors
    /// [`Error::Device`], with what is missing, when there is no driver, no such GPU, or no kernel for it.
    pub fn open(ordinal: usize) -> Result<Cuda> {
        let driver = driver::start()?;
        let count = Cuda::count()?;
        if ordinal >= count {
            let there = if count == 1 {
                "there is one, cuda:0".into()
            } else {
                format!("there are {count}, from cuda:0")
            };
            return Err(Error::Device(format!("no device cuda:{ordinal}: {there}")));
        }
        let context = Arc::new(Context::open(ordinal)?);
        let (name, capability) = context.describe()?;
        let patient = std::env::var("LDM_CUDA_SYNC").is_ok_and(|v| !matches!(v.as_str(), "" | "0"));
        let (graphs, overlap) = (switch("LDM_CUDA_GRAPH", true)?, switch("LDM_CUDA_OVERLAP", true)?);
        let wgmma = setting("LDM_CUDA_WGMMA", Wgmma::unset(capability), &Wgmma::ALL)?;
        let (functions, modules, counters) = Default::default();
        let inner = Inner {
            ordinal,
            name,
            capability,
            driver,
            patient,
            graphs,
            overlap,
            functions,
            modules,
            counters,
            context,
        };
        let cuda = Cuda { inner: Arc::new(inner), recording: None, wgmma: Wgmma::Off }.with_wgmma(wgmma);
        // Whether one unit loads says whether the others will.
        if let Some(first) = UNITS.iter().position(|u| u.image(capability).is_some()) {
            cuda.module(first)?;
        } else if !UNITS.is_empty() {
            cuda.module(0)?;
        }
        Ok(cuda)
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.inner.ordinal
    }

    /// Such as `NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Version of the hardware: (9, 0) for Hopper.
    pub fn capability(&self) -> (u32, u32) {
        self.inner.capability
    }

    /// Which kernels rooms launch for products of 16-bit matrices: on hardware of version 9.0, the only one that has `wgmma`, as
    /// `LDM_CUDA_WGMMA` says, [`Wgmma::On`] where it does not; those by warps elsewhere, and in a build that has no image of the
    /// others for it (which fails at the launch, with what to do, where the variable asks for them).
    pub fn wgmma(&self) -> Wgmma {
        self.wgmma
    }

    /// A handle on the same GPU for which `LDM_CUDA_WGMMA` says so.
    pub fn with_wgmma(&self, wgmma: Wgmma) -> Cuda {
        let wgmma = if self.capability() == WGMMA { wgmma } else { Wgmma::Off };
        Cuda { wgmma, ..self.clone() }
    }

    /// Free and total bytes of memory, other processes' use included.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.inner.context.memory()
    }

    /// Memory with arbitrary contents.
    ///
    /// # Errors
    /// When there is too little: says what was asked for, and what is free.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let memory = Memory::new(&self.inner.context, bytes).map_err(|f| self.explain_alloc(f, bytes))?;
        Ok(Buffer { memory, bytes })
    }

    fn explain_alloc(&self, failure: Failure, bytes: usize) -> Error {
        if !failure.is_out_of_memory() {
            return failure.into();
        }
        let free = match self.memory() {
            Ok((free, total)) => format!("{} of {} are free", size(free), size(total)),
            Err(_) => "the device does not say what is free".into(),
        };
        let what = format!(
            "out of device memory: asked for {}; {free}. Close other programs on the GPU, or try a smaller \
             picture or batch, --dtype bf16, or --device cpu",
            size(bytes)
        );
        Error::Cuda { call: "cuMemAlloc".into(), node: String::new(), what }
    }

    /// Copies `bytes` into `to`, from byte `offset` on. Returns when the copy is done.
    ///
    /// # Errors
    /// When they do not fit, or earlier work has failed.
    pub fn upload(&self, to: &Buffer, offset: usize, bytes: &[u8]) -> Result<()> {
        let at = to.part("upload", offset, bytes.len())?;
        if bytes.is_empty() { Ok(()) } else { self.inner.context.upload(at, bytes) }
    }

    /// Copies from `from`, from byte `offset` on, until `bytes` is full. Waits for all work that was asked
    /// for before.
    ///
    /// # Errors
    /// When there are not that many bytes, or earlier work has failed.
    pub fn download(&self, from: &Buffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let at = from.part("download", offset, bytes.len())?;
        if bytes.is_empty() { self.synchronize() } else { self.inner.context.download(at, bytes) }
    }

    /// Copies `n` bytes on the device, in order with other work. The two parts must not overlap.
    ///
    /// # Errors
    /// When they do not fit, or the driver fails.
    pub fn copy(
        &self,
        from: &Buffer,
        from_offset: usize,
        to: &Buffer,
        to_offset: usize,
        n: usize,
    ) -> Result<()> {
        let (from, to) = (from.part("copy", from_offset, n)?, to.part("copy", to_offset, n)?);
        if n == 0 { Ok(()) } else { self.inner.context.copy(from, to, n, self.on()) }
    }

    /// Sets `n` bytes from byte `offset` on, in order with other work.
    ///
    /// # Errors
    /// When they are not in the buffer, or the driver fails.
    pub fn fill(&self, buffer: &Buffer, offset: usize, n: usize, byte: u8) -> Result<()> {
        let at = buffer.part("fill", offset, n)?;
        if n == 0 { Ok(()) } else { self.inner.context.fill(at, n, byte, self.on()) }
    }

    /// The most shared memory that a block may have, in bytes.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn shared_memory(&self) -> Result<usize> {
        Ok(self.inner.context.shared_memory()?)
    }

    /// Waits for all work that was asked for.
    ///
    /// # Errors
    /// When some of it has failed.
    pub fn synchronize(&self) -> Result<()> {
        self.inner.context.synchronize().map_err(Failure::of_earlier_work)
    }

    fn on(&self) -> Option<&Recording> {
        self.recording.as_deref()
    }

    /// Whether what is run again and again should be recorded: not with `LDM_CUDA_GRAPH=off`, nor with `LDM_CUDA_SYNC=1`,
    /// which looks at each launch.
    pub fn records_graphs(&self) -> bool {
        self.inner.graphs && !self.inner.patient
    }

    /// Records the kernels and fills that `work` asks for of the handle that it is given, as one graph; none of them is
    /// run. Their modules must have been loaded, that is, they must have run before: nothing can be loaded, allocated or
    /// waited for in between.
    ///
    /// # Errors
    /// Those of `work`; and the driver's, when something was asked for that cannot be recorded.
    pub fn record_graph(&self, work: impl FnOnce(&Cuda) -> Result<()>) -> Result<Graph> {
        let context = &self.inner.context;
        let recording = Arc::new(Recording::begin(context).map_err(explain_graph)?);
        let done = work(&Cuda { recording: Some(recording.clone()), ..self.clone() });
        // It ends in any case. An error of the work says more than what it does to the recording.
        let graph = recording.end();
        done?;
        Ok(Graph { graph: graph.map_err(explain_graph)?, device: self.clone() })
    }

    /// Marks this point of the work, for timing.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn record(&self) -> Result<Event> {
        Event::record(&self.inner.context)
    }

    /// Opens a range of this name on the calling thread for profilers (NVTX); nothing where its library is missing.
    pub fn range_push(&self, name: &str) {
        if driver::ranges() && !name.contains('\0') {
            cudarc::nvtx::result::range_push(name);
        }
    }

    /// Closes the range that was opened last.
    pub fn range_pop(&self) {
        if driver::ranges() {
            cudarc::nvtx::result::range_pop();
        }
    }

    /// The loaded module of a unit, loaded on first use.
    fn module(&self, index: usize) -> Result<Arc<Module>> {
        let mut modules = lock(&self.inner.modules);
        if let Some(module) = modules.get(&index) {
            return Ok(module.clone());
        }
        let unit = &UNITS[index];
        let (major, minor) = self.inner.capability;
        let Some(image) = unit.image(self.inner.capability) else {
            let archs: Vec<String> = unit.images.iter().map(|i| i.arch.to_string()).collect();
            let advice = match major {
                ..8 => "The kernels want sm_80 (Ampere) or later; run with `--device cpu`".to_string(),
                _ => format!("Build again with `LDM_CUDA_ARCH={major}{minor}`, or run with `--device cpu`"),
            };
            let (name, archs) = (self.name(), archs.join(", "));
            return Err(Error::Device(format!(
                "{unit}: compiled for {archs}; {name} is sm_{major}{minor}. {advice}"
            )));
        };
        let load = Module::new(&self.inner.context, image.payload());
        let module = Arc::new(load.map_err(|failure| self.explain_load(failure, unit, image))?);
        modules.insert(index, module.clone());
        Ok(module)
    }

    fn explain_load(&self, failure: Failure, unit: &kernels::Unit, image: &kernels::Image) -> Error {
        if failure.is_bad_image() && image.arch == kernels::Arch::None {
            let words = failure.words();
            return Error::Device(if kernels::COMPILED {
                format!(
                    "{unit}: not compiled in this build ({words}); build again without LDM_CUDA_ARCH, or run \
                     with `--device cpu`"
                )
            } else {
                format!(
                    "built without nvcc: there are no GPU kernels in this program (the driver says of \
                     {unit}: {words}). Install the CUDA toolkit 13, or `pip install nvidia-cuda-nvcc` into \
                     the active environment, then `touch build.rs` and build again; `--device cpu` runs without"
                )
            });
        }
        let mut what = failure.words();
        if failure.is_bad_image() {
            let driver = driver::version_text(self.inner.driver);
            what += &format!(
                ". The driver supports CUDA {driver}, the kernels were built by nvcc {}: nvcc 13 wants \
                 driver 580 or later. Update the driver, or build with the nvcc of its own CUDA version \
                 ($NVCC)",
                kernels::NVCC
            );
        }
        Error::Cuda { call: format!("loading {unit} ({})", image.arch), node: String::new(), what }
    }

    /// The kernel of a unit, looked up once, and allowed the shared memory that its unit asks for.
    fn function(&self, index: usize, name: &'static str) -> Result<Function> {
        if let Some(function) = lock(&self.inner.functions).get(&(index, name)) {
            return Ok(function.clone());
        }
        let unit = &UNITS[index];
        let named = |e: Error| match e {
            Error::Cuda { call, node, what } => {
                Error::Cuda { call: format!("{call}({name} of {unit})"), node, what }
            }
            other => other,
        };
        let module = self.module(index)?;
        let limit = self.inner.context.shared_memory().map_err(|failure| named(failure.into()))?;
        if unit.smem > limit {
            return Err(Error::Device(format!(
                "{unit}: its kernels want {} bytes of shared memory per block; {} has {limit}. Run with \
                 `--device cpu`, or on a GPU with more (sm_80 and sm_90 have enough)",
                unit.smem,
                self.name()
            )));
        }
        // An image for less than sm_90, or PTX of it, has no wait in it, whatever the card.
        let overlaps =
            self.inner.overlap && unit.image(self.inner.capability).is_some_and(|image| image.arch.waits());
        let function = module.function(name, unit.smem, overlaps).map_err(named)?;
        lock(&self.inner.functions).insert((index, name), function.clone());
        Ok(function)
    }

    /// Starts a kernel of a unit. Sizes are within the limits (see [`Call::launch`]).
    fn start<P: Params>(&self, index: usize, grid: [u32; 3], block: u32, params: &P) -> Result<()> {
        let name = P::KERNEL.name();
        let function = self.function(index, name)?;
        let context = &self.inner.context;
        let mut done = context.launch(self.on(), &function, grid, block, params);
        if self.inner.patient && self.recording.is_none() {
            done = done.and_then(|()| context.synchronize());
        }
        done.map_err(|failure| {
            let [x, y, z] = grid;
            let call = format!("{name} of {}, grid ({x},{y},{z}), block {block}", UNITS[index]);
            Error::Cuda { call, node: String::new(), what: failure.words() }
        })
    }

    /// Memory for [`Call::counters`], made and set to 0 on first use.
    fn counters(&self) -> Result<DevicePtr> {
        let mut counters = lock(&self.inner.counters);
        if let Some(memory) = &*counters {
            return Ok(memory.ptr());
        }
        let bytes = COUNTERS * size_of::<u32>();
        let memory = Memory::new(&self.inner.context, bytes).map_err(|f| self.explain_alloc(f, bytes))?;
        self.inner.context.fill(memory.ptr(), bytes, 0, None)?;
        Ok(counters.insert(memory).ptr())
    }

    /// Sets memory that a call was given.
    fn fill_at(&self, at: DevicePtr, n: usize, byte: u8) -> Result<()> {
        if n == 0 { Ok(()) } else { self.inner.context.fill(at, n, byte, self.on()) }
    }
}

/// Kernels and fills that run as one launch, on the memory that they were recorded with. That memory must outlive it: it
/// holds none itself, but for what the driver keeps on the device for each kernel.
pub struct Graph {
    graph: driver::Graph,
    device: Cuda,
}

impl Graph {
    /// Kernels and fills in it.
    pub fn nodes(&self) -> usize {
        self.graph.nodes
    }

    /// Those of the kernels that may start before the one before them has ended: none with `LDM_CUDA_OVERLAP=off`.
    pub fn early(&self) -> usize {
        self.graph.early
    }

    /// Runs it, in order with other work.
    ///
    /// # Errors
    /// When the driver refuses; a fault of a kernel shows at the next synchronisation.
    pub fn launch(&self) -> Result<()> {
        self.graph.launch().map_err(explain_graph)
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph({} nodes on {:?})", self.nodes(), self.device)
    }
}

fn explain_graph(failure: Failure) -> Error {
    match Error::from(failure) {
        Error::Cuda { call, node, what } => {
            let call = format!("{call} (a recorded evaluation)");
            Error::Cuda { call, node, what: what + "; LDM_CUDA_GRAPH=off runs node by node" }
        }
        other => other,
    }
}

/// A poisoned lock holds a map that is whole: insertions are its only change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Bytes for people.
fn size(bytes: usize) -> String {
    let b = bytes as f64;
    match bytes {
        0..0x40_0000 => format!("{bytes} bytes"),
        0x40_0000..0x4000_0000 => format!("{:.1} MiB", b / 1048576.0),
        _ => format!("{:.2} GiB", b / 1073741824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_device_the_error_says_what_to_do() {
        let Err(error) = Cuda::open(1 << 40) else { panic!("there are not so many") };
        let text = error.to_string();
        assert!(matches!(error, Error::Device(_)), "{error:?}");
        assert!(text.contains("--device cpu") || text.contains("cuda:0"), "{text}");
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(1000), "1000 bytes");
        assert_eq!(size(10 << 20), "10.0 MiB");
        assert_eq!(size(3 << 29), "1.50 GiB");
    }
}
