//! Compiles `kernels/*.cu` ahead of time and writes the Rust side of every kernel (see `src/kernels.rs`).
//!
//! Each kernel file becomes one *unit* per element type and variant, each unit one image per architecture.
//! Without `nvcc` the images hold only their header: everything builds and runs, on the CPU and on the
//! emulator of the tests.

#[path = "build/emit.rs"]
mod emit;
#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/resources.rs"]
mod resources;
#[path = "build/scan.rs"]
mod scan;
#[path = "build/units.rs"]
mod units;

use std::path::PathBuf;
use std::{env, fs, process};

fn main() {
    if let Err(what) = build() {
        eprintln!("\n{what}\n");
        process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let root = PathBuf::from(var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(var("OUT_DIR")?);
    for path in ["build.rs", "build", "kernels"] {
        println!("cargo:rerun-if-changed={path}");
    }
    for name in ["NVCC", "NVCC_CCBIN", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    for name in ["LDM_NVCC", "LDM_NVCC_FLAGS", "LDM_CUDA_ARCH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let files = units::read(&root.join("kernels"))?;
    let nvcc = nvcc::find()?;
    let archs = match &nvcc {
        Some(_) => units::Arch::list(&env::var("LDM_CUDA_ARCH").unwrap_or_default())?,
        None => vec![],
    };
    if let Some(nvcc) = &nvcc {
        // For the test that reads the machine code: the disassembler lies beside the compiler.
        println!("cargo:rustc-env=LDM_NVCC_PATH={}", nvcc.path.display());
    }
    let cache = nvcc::cache(&out);
    let built = match &nvcc {
        Some(nvcc) => nvcc::compile(nvcc, &root.join("kernels"), &files, &archs, &cache)?,
        None => vec![],
    };
    let table = resources::table(&built)?;
    let stems: Vec<&str> = files.iter().map(|f| f.scan.stem.as_str()).collect();
    resources::write(&table, &built, &stems, &[&out, &cache])?;
    emit::write(&out, &files, &archs, nvcc.as_ref().map(|n| n.version.as_str()), &built, &table)
}

fn var(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("{name} is not set: build.rs is run by cargo"))
}

/// Writes a file only when its content changes, so that cargo has no reason to compile the crate again.
fn write_if_changed(path: &std::path::Path, content: &[u8]) -> Result<(), String> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    fs::write(path, content).map_err(|e| format!("{}: {e}", path.display()))
}
