//! Builds and loads the CUDA emulator of `tests/emulator`, before cudarc looks for a driver.
//!
//! `start()` compiles the emulator and every kernel with the host's C++ compiler, once: what did not change is found again
//! under `target/emulator` by the hash of its source, the flags, the compiler and the processor. Several test processes
//! may start at once.
#![allow(unsafe_code, dead_code)]

#[path = "../../build/scan.rs"]
mod scan;

use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, CString, c_char, c_int};
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};

/// The loaded emulator. One process holds one.
#[derive(Clone, Copy)]
pub struct Emulator {
    configure: unsafe extern "C" fn(*const c_char) -> c_int,
    report: unsafe extern "C" fn() -> *const c_char,
    reset: unsafe extern "C" fn(),
    count: unsafe extern "C" fn(*const c_char) -> u64,
    poison: unsafe extern "C" fn(u64, u64) -> c_int,
    sites: unsafe extern "C" fn() -> *const c_char,
    banks: unsafe extern "C" fn() -> *const c_char,
    paths: &'static Built,
}

impl Emulator {
    /// Changes settings: `order=forward|reverse|random:SEED`, `async=late|early|random:SEED`,
    /// `fail=alloc:3,copy:2,load:1,launch:5,sync:1,host:1,graph:1` (the n-th such call from now on fails) or `fail=none`,
    /// `uninit=error|ignore`, `threads=N`, `memory=BYTES`, `timeout=SECONDS` of one launch, `banks=count|off`,
    /// `drop=KIND:STEM:LINE` (that site of `sites` does nothing) or `drop=none`; several are joined by `;`. Panics on an
    /// unknown one.
    pub fn configure(&self, settings: &str) {
        let text = CString::new(settings).unwrap();
        assert_eq!(unsafe { (self.configure)(text.as_ptr()) }, 0, "emulator: settings `{settings}`");
    }

    /// Text of the last violation or refused call; empty if there was none since the last `reset`.
    pub fn report(&self) -> String {
        unsafe { CStr::from_ptr((self.report)()) }.to_string_lossy().into_owned()
    }

    /// Clears the sticky error, the report, what is still queued, `sites` and `banks`. Memory, modules and streams stay.
    pub fn reset(&self) {
        unsafe { (self.reset)() }
    }

    /// Calls made so far: `alloc`, `copy`, `load`, `launch`, `sync`, `host`, `graph`, `programmatic` (launches that may start
    /// before the one before them ends); or `live` allocations, the `bytes` in them, and their `peak`.
    pub fn count(&self, what: &str) -> u64 {
        let text = CString::new(what).unwrap();
        let n = unsafe { (self.count)(text.as_ptr()) };
        assert_ne!(n, u64::MAX, "emulator: no count of `{what}`");
        n
    }

    /// The barriers, waits, commits and fences that kernels have reached since the last `reset`, as `KIND:STEM:LINE`.
    pub fn sites(&self) -> Vec<String> {
        let text = unsafe { CStr::from_ptr((self.sites)()) }.to_string_lossy();
        text.lines().map(str::to_string).collect()
    }

    /// The accesses to shared memory since the last `reset`, under `banks=count`: those by `load_shared`, `store_shared`,
    /// `cp_async` and `ldmatrix`.
    pub fn banks(&self) -> Vec<Banks> {
        let text = unsafe { CStr::from_ptr((self.banks)()) }.to_string_lossy();
        let row = |row: &str| {
            let mut words = row.split(' ');
            let mut word = || words.next().expect("six words a row");
            let (unit, line, access) = (word().to_string(), word().parse().unwrap(), word().to_string());
            let mut number = || word().parse().unwrap();
            Banks { unit, line, access, count: number(), ideal: number(), actual: number() }
        };
        text.lines().map(row).collect()
    }

    /// What a child process needs in its environment to find the emulator as its driver.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        let mut folders = vec![self.paths.driver.parent().unwrap().to_path_buf()];
        folders.extend(std::env::var_os("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
        let search = std::env::join_paths(folders).unwrap().into_string().unwrap();
        [("LD_LIBRARY_PATH", search), ("LDM_EMULATOR_UNITS", self.paths.units.display().to_string())]
    }

    /// Marks device memory as never written again, for instance where a lifetime in an arena ends.
    pub fn poison(&self, address: u64, bytes: u64) {
        assert_eq!(unsafe { (self.poison)(address, bytes) }, 0, "emulator: {}", self.report());
    }
}

/// How one source line uses the banks of shared memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Banks {
    /// `STEM.TYPE.VARIANT`
    pub unit: String,
    /// Of the kernel file.
    pub line: u32,
    /// `load_shared`, `store_shared`, `cp_async` or `ldmatrix`.
    pub access: String,
    /// Accesses of whole warps.
    pub count: u64,
    /// Wavefronts that they would take without a conflict.
    pub ideal: u64,
    /// Wavefronts that they take.
    pub actual: u64,
}

/// Loads the emulator with the engine's kernels. `None` where `LDM_TEST_DEVICE=cuda` asks for the real driver; `Err` says
/// why there can be no emulator here: print it, loudly, and skip. A kernel that does not compile panics.
pub fn start() -> Result<Option<Emulator>, String> {
    start_on(&["kernels"])
}

/// As `start`, with the kernels of other folders of the repository.
pub fn start_on(folders: &[&str]) -> Result<Option<Emulator>, String> {
    static STARTED: OnceLock<Result<Option<Emulator>, String>> = OnceLock::new();
    STARTED
        .get_or_init(|| match std::env::var("LDM_TEST_DEVICE").as_deref() {
            Ok("cuda") => Ok(None),
            Ok("emulator") | Ok("") | Err(_) => load(Box::leak(Box::new(build(folders)?))).map(Some),
            Ok(other) => panic!("LDM_TEST_DEVICE: want `emulator` or `cuda`; got `{other}`"),
        })
        .clone()
}

struct Built {
    driver: PathBuf,
    alias: PathBuf,
    units: PathBuf,
}

/// One shared object to make: the source's text, and the compiler's arguments.
struct Job {
    name: String,
    text: String,
    extension: &'static str,
    arguments: Vec<String>,
    key: u64,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn cache() -> PathBuf {
    let target = match option_env!("CARGO_TARGET_TMPDIR") {
        Some(tmp) => Path::new(tmp).parent().unwrap().to_path_buf(),
        None => root().join("target"),
    };
    target.join("emulator")
}

/// The compiler, and what identifies it and this processor.
fn compiler() -> Result<(String, String), String> {
    let chosen = std::env::var("CXX").ok();
    let candidates = chosen.iter().map(String::as_str).chain(["c++", "g++", "clang++"]);
    for name in candidates {
        let Ok(output) = Command::new(name).arg("--version").output() else { continue };
        if output.status.success() {
            let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let cpu = cpu.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
            return Ok((
                name.to_string(),
                format!("{name} {} {cpu}", String::from_utf8_lossy(&output.stdout)),
            ));
        }
    }
    Err("no C++ compiler (looked for $CXX, c++, g++, clang++): the CUDA emulator cannot be built".to_string())
}

fn hash(parts: &[&str]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut all: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    all.retain(|path| path.extension().is_some_and(|e| e == extension));
    all.sort();
    all
}

fn build(folders: &[&str]) -> Result<Built, String> {
    let (cxx, identity) = compiler()?;
    let kernels = root().join("kernels");
    let dev: String = files(&kernels, "cuh").iter().map(|path| read(path)).collect();
    let include = format!("-I{}", kernels.display());
    let mut common: Vec<String> =
        ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC"]
            .map(str::to_string)
            .to_vec();
    if !cfg!(target_arch = "x86_64") {
        common.retain(|flag| flag != "-march=native");
    }
    common.push(include);

    // The driver: its files are compiled apart, then linked.
    let runtime = root().join("tests/emulator");
    let header: String = files(&runtime, "h").iter().map(|path| read(path)).collect();
    let mut objects = Vec::new();
    for path in files(&runtime, "cpp") {
        let mut arguments = common.clone();
        arguments.extend(
            ["-c", "-fvisibility=hidden", "-ftls-model=initial-exec", "-Wall", "-Wextra"].map(str::to_string),
        );
        arguments.push(format!("-I{}", runtime.display()));
        let text = read(&path);
        let key = hash(&[&identity, &arguments.join(" "), &dev, &header, &text]);
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        objects.push(Job { name, text, extension: "o", arguments, key });
    }
    let driver_key = objects.iter().fold(0u64, |k, job| k.rotate_left(7) ^ job.key);

    let mut units = Vec::new();
    for folder in folders {
        for path in files(&root().join(folder), "cu") {
            let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
            let source = read(&path);
            let unit = scan::scan(&stem, &source).unwrap_or_else(|e| panic!("{e}"));
            unit_jobs(&unit, &path, &source, &mut units, &common, &identity, &dev);
        }
    }
    let set_key =
        units.iter().fold(driver_key, |k, job| hash(&[&k.to_string(), &job.name, &job.key.to_string()]));

    let cache = cache();
    let built = Built {
        driver: cache.join(format!("driver-{driver_key:016x}/libcuda.so.1")),
        alias: cache.join(format!("driver-{driver_key:016x}/libcuda.so")),
        units: cache.join(format!("units-{set_key:016x}")),
    };
    let parts = cache.join("parts");
    fs::create_dir_all(&parts).unwrap_or_else(|e| panic!("{}: {e}", parts.display()));
    let lock = fs::File::create(cache.join("lock")).unwrap();
    lock.lock().unwrap();
    let mut missing: Vec<&Job> =
        objects.iter().chain(&units).filter(|job| !part(&parts, job).exists()).collect();
    if built.driver.exists() && built.alias.exists() {
        missing.retain(|job| job.extension != "o");
    }
    compile(&cxx, &parts, &missing);
    if !built.driver.exists() || !built.alias.exists() {
        link(&cxx, &built, objects.iter().map(|job| part(&parts, job)).collect());
    }
    if !built.units.exists() {
        let fresh = built.units.with_extension(format!("{}", std::process::id()));
        let _ = fs::remove_dir_all(&fresh);
        fs::create_dir_all(&fresh).unwrap();
        for job in &units {
            let (from, to) = (part(&parts, job), fresh.join(format!("{}.so", job.name)));
            fs::hard_link(&from, &to).or_else(|_| fs::copy(&from, &to).map(|_| ())).unwrap();
        }
        fs::rename(&fresh, &built.units).unwrap();
    }
    Ok(built)
}

/// The units of one kernel file: it is included by a text that gives each kernel an entry for the emulator.
fn unit_jobs(
    unit: &scan::Unit,
    path: &Path,
    source: &str,
    jobs: &mut Vec<Job>,
    common: &[String],
    identity: &str,
    dev: &str,
) {
    // Hidden, so that a kernel's name never meets one of the C library's; only what the emulator asks for is exported.
    let mut text = format!("#include \"{}\"\n#pragma GCC visibility push(default)\n", path.display());
    // With what it shares with other kernels of its room.
    let shared = source.lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'));
    let shared = shared.filter(|name| *name != "dev.cuh").map(|name| read(&path.with_file_name(name)));
    let whole = source.to_string() + &shared.collect::<String>();
    text += &format!(
        "extern \"C\" {{ extern const unsigned ldm_combines; const unsigned ldm_combines = {}; }}\n",
        u32::from(whole.contains("atomic_"))
    );
    text += &format!(
        "extern \"C\" {{ extern const unsigned ldm_wgmma; const unsigned ldm_wgmma = {}; }}\n",
        u32::from(["wgmma", "tma_load"].iter().any(|word| whole.contains(word)))
    );
    for kernel in &unit.kernels {
        let (name, params) = (&kernel.name, &kernel.params_struct);
        text += &format!(
            "extern \"C\" void ldm_entry_{name}(const void* p) {{ {name}(*(const {params}*)p); }}\n"
        );
        text += &format!("extern \"C\" {{ extern const unsigned ldm_size_{name}; ");
        text += &format!("const unsigned ldm_size_{name} = sizeof({params}); }}\n");
        if let Some(bounds) = &kernel.bounds {
            text += &format!("extern \"C\" {{ extern const unsigned ldm_bounds_{name}; ");
            text += &format!("const unsigned ldm_bounds_{name} = unsigned({bounds}); }}\n");
        }
    }
    for types in &unit.types {
        for (number, variant) in unit.variants.iter().enumerate() {
            let text = text.clone() + &unit.asserts(number);
            let macros: Vec<String> = variant.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let type_name = types.1.as_ref().map_or(types.0.clone(), |u| format!("{}-{u}", types.0));
            let variant_name = if macros.is_empty() { "base".to_string() } else { macros.join(",") };
            let mut arguments = common.to_vec();
            arguments.extend(
                ["-shared", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
                    .map(str::to_string),
            );
            arguments.extend(scan::Unit::defines(types, variant));
            let key = hash(&[identity, &arguments.join(" "), dev, &text, &whole]);
            let name = format!("{}.{type_name}.{variant_name}", unit.stem);
            jobs.push(Job { name, text, extension: "so", arguments, key });
        }
    }
}

fn part(parts: &Path, job: &Job) -> PathBuf {
    parts.join(format!("{}-{:016x}.{}", job.name, job.key, job.extension))
}

fn run(command: &mut Command, what: &str) {
    let output = command.output().unwrap_or_else(|e| panic!("{what}: {command:?}: {e}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the host's C++ compiler refuses {what}:\n{text}");
    if !text.trim().is_empty() {
        eprintln!("{what}:\n{text}");
    }
}

fn compile(cxx: &str, parts: &Path, jobs: &[&Job]) {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(2, |n| n.get()).clamp(1, jobs.len().max(1));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let out = part(parts, job);
                    let source = out.with_extension("cpp");
                    let fresh = out.with_extension("new");
                    fs::write(&source, &job.text).unwrap();
                    let mut command = Command::new(cxx);
                    command.args(&job.arguments).arg("-o").arg(&fresh).arg(&source);
                    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        run(&mut command, &job.name)
                    }));
                    match done {
                        Ok(()) => fs::rename(&fresh, &out).unwrap(),
                        Err(_) => failed.lock().unwrap().push(job.name.clone()),
                    }
                    let _ = fs::remove_file(&source);
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "these do not compile for the emulator (see above): {}", failed.join(" "));
}

/// Links the driver, and an empty library of the other name that cudarc tries first, which leads to it.
fn link(cxx: &str, built: &Built, objects: Vec<PathBuf>) {
    fs::create_dir_all(built.driver.parent().unwrap()).unwrap();
    let fresh = built.driver.with_extension("new");
    let shared = ["-shared", "-Wl,-soname,libcuda.so.1"];
    run(
        Command::new(cxx).args(shared).arg("-o").arg(&fresh).args(&objects).args(["-ldl", "-lpthread"]),
        "the driver",
    );
    fs::rename(&fresh, &built.driver).unwrap();
    let alias = ["-shared", "-Wl,-soname,libcuda.so", "-Wl,--no-as-needed"];
    run(Command::new(cxx).args(alias).arg("-o").arg(&fresh).arg(&built.driver), "the driver's other name");
    fs::rename(&fresh, &built.alias).unwrap();
}

fn load(built: &'static Built) -> Result<Emulator, String> {
    let open =
        |path: &Path| unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(|e| e.to_string());
    // Both stay for the life of the process: cudarc finds them by name.
    let driver: &'static Library = Box::leak(Box::new(open(&built.driver)?));
    Box::leak(Box::new(open(&built.alias)?));
    fn get<T: Copy>(library: &Library, name: &str) -> Result<T, String> {
        let symbol: Symbol<T> =
            unsafe { library.get(name.as_bytes()) }.map_err(|e| format!("{name}: {e}"))?;
        Ok(*symbol)
    }
    let emulator = Emulator {
        configure: get(driver, "ldm_emulator_configure")?,
        report: get(driver, "ldm_emulator_report")?,
        reset: get(driver, "ldm_emulator_reset")?,
        count: get(driver, "ldm_emulator_count")?,
        poison: get(driver, "ldm_emulator_poison")?,
        sites: get(driver, "ldm_emulator_sites")?,
        banks: get(driver, "ldm_emulator_banks")?,
        paths: built,
    };
    emulator.configure(&format!("units={}", built.units.display()));
    Ok(emulator)
}
