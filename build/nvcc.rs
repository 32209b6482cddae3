//! Finds `nvcc`, and compiles what has changed.

use crate::scan::Unit;
use crate::units::{Arch, File};
use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

/// Optimised, and nothing that changes results: no fast math. The host compiler only sees headers, so its age
/// is no matter.
const FLAGS: [&str; 5] = ["-std=c++17", "-O3", "-Xptxas", "-v", "--allow-unsupported-compiler"];

/// The oldest version that knows sm_90 and `__grid_constant__` well.
const OLDEST: u32 = 12;

/// Files of the cache that no build has used for this long are removed.
const KEEP: Duration = Duration::from_secs(14 * 24 * 3600);

/// A working compiler.
pub struct Nvcc {
    /// The program.
    pub path: PathBuf,
    /// Such as `13.0.88`.
    pub version: String,
    flags: Vec<String>,
}

/// One compiled image.
pub struct Built {
    /// Index of the kernel file.
    pub file: usize,
    /// `f32` or `f32>bf16`.
    pub types: String,
    /// `D=40`, or empty.
    pub variant: String,
    /// What it is for.
    pub arch: Arch,
    /// Dynamic shared memory per block, bytes.
    pub smem: u32,
    /// Cubin, or PTX text.
    pub image: Vec<u8>,
    /// What the compiler printed, with the output of `-Xptxas -v`.
    pub log: String,
}

/// The compiler to use; `None` where there is none, or where `LDM_NVCC=off`.
pub fn find() -> Result<Option<Nvcc>, String> {
    let switch = env::var("LDM_NVCC").unwrap_or_default();
    match switch.as_str() {
        "" | "on" | "auto" => {}
        "off" => return Ok(None),
        other => return Err(format!("LDM_NVCC=`{other}`: want off or auto ($NVCC holds the path)")),
    }
    if let Some(path) = env::var_os("NVCC").filter(|p| !p.is_empty()) {
        return match probe(Path::new(&path)) {
            Ok(nvcc) => Ok(Some(nvcc)),
            Err(what) => Err(format!("$NVCC: {what}\nLDM_NVCC=off builds without GPU kernels.")),
        };
    }
    let found = candidates().into_iter().chain(wheels_of_python()).find_map(|path| probe(&path).ok());
    if found.is_none() {
        // Installing a toolkit mostly changes it, so the next build looks again.
        println!("cargo:rerun-if-env-changed=PATH");
        if switch == "on" {
            return Err("LDM_NVCC=on, but no nvcc was found: set $NVCC or $CUDA_HOME".into());
        }
    }
    Ok(found)
}

fn candidates() -> Vec<PathBuf> {
    let mut list = vec![];
    for home in ["CUDA_HOME", "CUDA_PATH"] {
        list.extend(env::var_os(home).map(|h| PathBuf::from(h).join("bin").join(exe("nvcc"))));
    }
    if let Some(path) = env::var_os("PATH") {
        list.extend(env::split_paths(&path).map(|p| p.join(exe("nvcc"))));
    }
    list.push(PathBuf::from("/usr/local/cuda/bin/nvcc"));
    if let Some(venv) = env::var_os("VIRTUAL_ENV").map(PathBuf::from) {
        let versions = fs::read_dir(venv.join("lib")).into_iter().flatten().flatten();
        let mut sites: Vec<PathBuf> = versions.map(|e| e.path().join("site-packages")).collect();
        sites.sort();
        sites.push(venv.join("Lib").join("site-packages"));
        list.extend(sites.iter().flat_map(|s| wheels(s)));
    }
    list.retain(|p| p.is_file());
    list
}

/// Where the wheels `nvidia-cuda-nvcc` (13) and `nvidia-cuda-nvcc-cu12` put it.
fn wheels(site: &Path) -> Vec<PathBuf> {
    let mut homes = vec![site.join("nvidia").join("cu13"), site.join("nvidia").join("cuda_nvcc")];
    homes.iter_mut().for_each(|h| *h = h.join("bin").join(exe("nvcc")));
    homes.retain(|p| p.is_file());
    homes
}

/// Asks the interpreter on the path for its folders of packages; only when nothing else was found.
fn wheels_of_python() -> impl Iterator<Item = PathBuf> {
    let ask = "import site; print('\\n'.join(site.getsitepackages() + [site.getusersitepackages()]))";
    let answer = |name| Command::new(name).args(["-c", ask]).output().ok().filter(|o| o.status.success());
    std::iter::once_with(move || ["python3", "python"].into_iter().find_map(answer))
        .flatten()
        .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
        .flat_map(|text| text.lines().flat_map(|site| wheels(Path::new(site))).collect::<Vec<_>>())
}

fn exe(name: &str) -> String {
    format!("{name}{}", env::consts::EXE_SUFFIX)
}

/// Checks that the program answers, and is not too old.
fn probe(path: &Path) -> Result<Nvcc, String> {
    let at = |what: String| format!("{}: {what}", path.display());
    let out = Command::new(path).arg("--version").output().map_err(|e| at(e.to_string()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    // "Cuda compilation tools, release 13.0, V13.0.88"
    let version = text.rsplit_once(", V").map(|(_, v)| v.split_whitespace().next().unwrap_or("").to_string());
    let version = version.filter(|_| out.status.success());
    let version = version.ok_or_else(|| at(format!("`--version` does not look like nvcc's: {text}")))?;
    let major: u32 = version.split('.').next().and_then(|m| m.parse().ok()).unwrap_or(0);
    if major < OLDEST {
        return Err(at(format!("version {version}; want {OLDEST}.0 or later, best 13")));
    }
    let mut flags: Vec<String> = FLAGS.map(String::from).into();
    flags.extend(env::var("LDM_NVCC_FLAGS").unwrap_or_default().split_whitespace().map(String::from));
    // The wheels of CUDA 12 put each package into a folder of its own, so nvcc does not find the headers by
    // itself.
    let home = fs::canonicalize(path).ok().and_then(|p| Some(p.parent()?.parent()?.to_path_buf()));
    if let Some(home) = home.filter(|h| h.ends_with("cuda_nvcc")) {
        for package in ["cuda_nvcc", "cuda_runtime"] {
            flags.push(format!("-I{}", home.with_file_name(package).join("include").display()));
        }
    }
    if path.parent().is_some_and(|p| !p.as_os_str().is_empty()) {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    Ok(Nvcc { path: path.into(), version, flags })
}

/// `target/kernels`, which outlives the folder of one build script run.
pub fn cache(out: &Path) -> PathBuf {
    let target = out.ancestors().find(|p| p.join("CACHEDIR.TAG").is_file());
    target.unwrap_or(out).join("kernels")
}

struct Job {
    file: usize,
    types: String,
    variant: String,
    /// Index of the variant in the file's list.
    number: usize,
    defines: Vec<String>,
    arch: Arch,
}

/// Compiles every unit for every architecture, several at a time; what the cache holds is not compiled again.
pub fn compile(
    nvcc: &Nvcc,
    folder: &Path,
    files: &[File],
    archs: &[Arch],
    cache: &Path,
) -> Result<Vec<Built>, String> {
    fs::create_dir_all(cache).map_err(|e| format!("{}: {e}", cache.display()))?;
    let mut jobs = vec![];
    for (i, file) in files.iter().enumerate() {
        let variants = file.scan.variants.iter().enumerate();
        let pairs = file.scan.types.iter().flat_map(|t| variants.clone().map(move |v| (t, v)));
        for ((types, variant), (t, (number, macros))) in file.scan.images().into_iter().zip(pairs) {
            for arch in file.archs(archs) {
                let (types, variant) = (types.clone(), variant.clone());
                let defines = Unit::defines(t, macros);
                jobs.push(Job { file: i, types, variant, number, defines, arch });
            }
        }
    }
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let done: Mutex<Vec<(usize, Result<Built, String>)>> = Mutex::new(vec![]);
    let cores = thread::available_parallelism().map_or(1, |n| n.get());
    let asked = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(cores);
    thread::scope(|scope| {
        for _ in 0..cores.min(asked).min(jobs.len()) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(n) else { break };
                    let built = one(nvcc, folder, &files[job.file], job, cache);
                    failed.fetch_or(built.is_err(), Ordering::Relaxed);
                    done.lock().unwrap_or_else(|e| e.into_inner()).push((n, built));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    done.sort_by_key(|(n, _)| *n);
    let built: Vec<Built> = done.into_iter().map(|(_, b)| b).collect::<Result<_, _>>()?;
    warn(files, &built);
    prune(cache);
    Ok(built)
}

fn one(nvcc: &Nvcc, folder: &Path, file: &File, job: &Job, cache: &Path) -> Result<Built, String> {
    let (types, variant) = (&job.types, &job.variant);
    let wrapper = wrapper(file, job.number);
    let mut args = nvcc.flags.clone();
    args.push(format!("-I{}", folder.display()));
    args.extend(job.defines.iter().cloned());
    args.push(if matches!(job.arch, Arch::Ptx(_)) { "-ptx".into() } else { "-cubin".into() });
    args.push(format!("-arch={}", job.arch));

    let mut hash = DefaultHasher::new();
    // The folder's own path is no input: its headers are hashed, so a moved checkout keeps its cache.
    let plain = args.iter().filter(|a| **a != format!("-I{}", folder.display())).collect::<Vec<_>>();
    (&file.text, &file.scan.stem, wrapper.as_bytes(), plain, &nvcc.version).hash(&mut hash);
    let mut name = format!("{}.{types}.{variant}.{}.{:016x}", file.scan.stem, job.arch, hash.finish());
    name = name.replace('>', "-").replace("..", ".");
    let (image, log) = (cache.join(format!("{name}.image")), cache.join(format!("{name}.log")));
    let (t, v) = (types.clone(), variant.clone());
    let (arch, smem) = (job.arch, file.scan.smem(job.number));
    let built = |image, log| Built { file: job.file, types: t, variant: v, arch, smem, image, log };
    if let (Ok(bytes), Ok(text)) = (fs::read(&image), fs::read_to_string(&log)) {
        touch(&image);
        touch(&log);
        return Ok(built(bytes, text));
    }

    // Another cargo may compile the same unit at this moment: work under a name of our own, then rename.
    let own = |ext: &str| cache.join(format!("{name}.{}.{ext}", std::process::id()));
    let (source, temporary) = (own("cu"), own("tmp"));
    fs::write(&source, wrapper.replace("KERNEL_FILE", &file.path.display().to_string()))
        .map_err(|e| format!("{}: {e}", source.display()))?;
    let mut command = Command::new(&nvcc.path);
    command.args(&args).arg("-o").arg(&temporary).arg(&source);
    let out = command.output().map_err(|e| format!("{}: {e}", nvcc.path.display()))?;
    let _ = fs::remove_file(&source);
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    if !out.status.success() {
        let _ = fs::remove_file(&temporary);
        let path = file.path.display();
        let shown = command_line(&nvcc.path, &args);
        return Err(format!(
            "{path} does not compile for {types}{}{variant} on {}\n\n{text}\n{shown} {path}\n\
             (LDM_NVCC=off builds without GPU kernels)",
            if variant.is_empty() { "" } else { " " },
            job.arch
        ));
    }
    let bytes = fs::read(&temporary).map_err(|e| format!("{}: {e}", temporary.display()))?;
    let save = |from: &Path, to: &Path| fs::rename(from, to).map_err(|e| format!("{}: {e}", to.display()));
    save(&temporary, &image)?;
    fs::write(&temporary, &text).map_err(|e| format!("{}: {e}", temporary.display()))?;
    save(&temporary, &log)?;
    Ok(built(bytes, text))
}

/// Includes the kernel file, and makes the compiler check that it lays each struct out as its Rust twin, and gives each
/// constant the same value.
fn wrapper(file: &File, variant: usize) -> String {
    let mut text = String::from("#include \"KERNEL_FILE\"\n") + &file.scan.asserts(variant);
    for kernel in &file.scan.kernels {
        let (layout, name) = (crate::emit::layout(kernel), &kernel.params_struct);
        text += &format!("static_assert(sizeof({name}) == {}, \"size of {name}\");\n", layout.size);
        for (field, offset) in kernel.fields.iter().zip(&layout.offsets) {
            let f = &field.name;
            text +=
                &format!("static_assert(__builtin_offsetof({name}, {f}) == {offset}, \"{name}::{f}\");\n");
        }
    }
    text
}

fn command_line(nvcc: &Path, args: &[String]) -> String {
    let quoted = |a: &String| if a.contains(['>', ' ', '*']) { format!("'{a}'") } else { a.clone() };
    let args: Vec<String> = args.iter().map(quoted).collect();
    format!("{} {}", nvcc.display(), args.join(" "))
}

/// Shows each warning of the compiler once, however many units it came from.
fn warn(files: &[File], built: &[Built]) {
    let mut seen: Vec<&str> = vec![];
    for unit in built {
        for line in unit.log.lines().filter(|l| l.contains("warning") && !l.starts_with("ptxas info")) {
            if !seen.contains(&line) {
                seen.push(line);
                println!("cargo:warning={}.cu: {line}", files[unit.file].scan.stem);
            }
        }
    }
}

fn touch(path: &Path) {
    if let Ok(file) = fs::File::options().append(true).open(path) {
        let _ = file.set_modified(SystemTime::now());
    }
}

fn prune(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let age = entry.metadata().ok().and_then(|m| m.modified().ok()).and_then(|t| t.elapsed().ok());
        if age.is_some_and(|age| age > KEEP) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
