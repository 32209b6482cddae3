//! Kernel files, the units that they are compiled into, and the architectures that they are compiled for.

use crate::scan;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// One `kernels/<stem>.cu`.
pub struct File {
    /// What the scanner read from it.
    pub scan: scan::Unit,
    /// Where it lies.
    pub path: PathBuf,
    /// Its text, and that of every header beside it: what a cached image depends on.
    pub text: String,
    /// The architectures of its `// arch:` line, if it has one.
    pub archs: Option<Vec<Arch>>,
}

/// What an image is compiled for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Arch {
    /// Machine code for one major version of the hardware: 80 is `sm_80`.
    Cubin(u32),
    /// Machine code that uses instructions of exactly this architecture: 90 is `sm_90a`.
    CubinA(u32),
    /// Portable code that the driver compiles: 80 is `compute_80`.
    Ptx(u32),
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arch::Cubin(n) => write!(f, "sm_{n}"),
            Arch::CubinA(n) => write!(f, "sm_{n}a"),
            Arch::Ptx(n) => write!(f, "compute_{n}"),
        }
    }
}

impl Arch {
    /// Reads `80,90,ptx80`; empty text means the default.
    pub fn list(text: &str) -> Result<Vec<Arch>, String> {
        let mut list = vec![];
        for word in text.split([',', ' ']).map(str::trim).filter(|w| !w.is_empty()) {
            let arch = Arch::parse(word).ok_or_else(|| {
                format!(
                    "LDM_CUDA_ARCH or `// arch:`: want 80 or later, such as 90, 90a or ptx80; got `{word}`"
                )
            })?;
            if !list.contains(&arch) {
                list.push(arch);
            }
        }
        if list.is_empty() {
            list = vec![Arch::Cubin(80), Arch::Cubin(90), Arch::Ptx(80)];
        }
        Ok(list)
    }

    fn parse(word: &str) -> Option<Arch> {
        // dev.cuh uses instructions of sm_80: bfloat16, and later cp.async and mma.
        let digits = |s: &str| s.parse::<u32>().ok().filter(|n| (80..1000).contains(n));
        let plain = word.strip_prefix("sm_").unwrap_or(word);
        if let Some(n) = word.strip_prefix("ptx").or(word.strip_prefix("compute_")) {
            return digits(n).map(Arch::Ptx);
        }
        match plain.strip_suffix('a') {
            Some(n) => digits(n).map(Arch::CubinA),
            None => digits(plain).map(Arch::Cubin),
        }
    }

    /// Whether a build for `list` compiles an image for this architecture that a file asks for by itself.
    fn wanted(self, list: &[Arch]) -> bool {
        match self {
            Arch::CubinA(n) => list.contains(&self) || list.contains(&Arch::Cubin(n)),
            _ => list.contains(&self),
        }
    }
}

impl File {
    /// The architectures that this file is compiled for in a build for `list`.
    pub fn archs(&self, list: &[Arch]) -> Vec<Arch> {
        let plain = |a: &Arch| !matches!(a, Arch::CubinA(_));
        match &self.archs {
            Some(own) => own.iter().copied().filter(|a| a.wanted(list)).collect(),
            None => list.iter().copied().filter(plain).collect(),
        }
    }

    /// `f32` or `f32>bf16`, for every type the file is compiled for.
    pub fn types(&self) -> Vec<String> {
        self.scan
            .images()
            .into_iter()
            .map(|(types, _)| types)
            .step_by(self.scan.variants.len().max(1))
            .collect()
    }

    /// `D=40` or `BM=128,BN=64`, for every variant; one empty text if there are none.
    pub fn variants(&self) -> Vec<String> {
        self.scan.images().into_iter().map(|(_, variant)| variant).take(self.scan.variants.len()).collect()
    }
}

/// Reads and scans every kernel file, in order of name.
pub fn read(folder: &Path) -> Result<Vec<File>, String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.sort();
    let with =
        |ext: &str| paths.iter().filter(|p| p.extension().is_some_and(|e| e == ext)).collect::<Vec<_>>();
    let mut headers = String::new();
    for path in with("cuh") {
        headers += &text(path)?;
    }
    let mut files: Vec<File> = vec![];
    for path in with("cu") {
        let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
        let source = text(path)?;
        let at = |what: String| format!("{}: {what}", path.display());
        let file = File {
            scan: scan::scan(stem, &source)?,
            path: path.clone(),
            archs: own_archs(&source).map_err(at)?,
            text: source + &headers,
        };
        check(&file).map_err(at)?;
        for other in &files {
            let twin = |k: &scan::Kernel| other.scan.kernels.iter().any(|o| o.name == k.name);
            if let Some(kernel) = file.scan.kernels.iter().find(|k| twin(k)) {
                return Err(at(format!("kernel `{}` is also in {}", kernel.name, other.path.display())));
            }
        }
        files.push(file);
    }
    Ok(files)
}

fn text(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn own_archs(source: &str) -> Result<Option<Vec<Arch>>, String> {
    match source.lines().find_map(|line| line.trim().strip_prefix("// arch:")) {
        Some(list) if list.trim().is_empty() => Err("`// arch:` is empty".into()),
        Some(list) => Arch::list(list).map(Some),
        None => Ok(None),
    }
}

/// What does not fit the image header, or cannot be told apart by it.
fn check(file: &File) -> Result<(), String> {
    let stem = &file.scan.stem;
    let plain = |s: &str| s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if stem.len() > 24 || !plain(stem) || !stem.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Err(format!("`{stem}`: a kernel file is named with at most 24 of a-z, 0-9 and _"));
    }
    let (types, variants) = (file.types(), file.variants());
    for (what, most, list) in [("type", 16, &types), ("variant", 16, &variants)] {
        for (i, name) in list.iter().enumerate() {
            if name.len() > most {
                return Err(format!("{what} `{name}` has {} characters; at most {most} fit", name.len()));
            }
            if list[..i].contains(name) {
                return Err(format!("{what} `{name}` is listed twice"));
            }
        }
    }
    if types.is_empty() || variants.is_empty() || file.scan.kernels.is_empty() {
        return Err("there is no kernel, type or variant in it".into());
    }
    for (i, kernel) in file.scan.kernels.iter().enumerate() {
        let rest = &file.scan.kernels[..i];
        if rest.iter().any(|k| k.name == kernel.name || k.params_struct == kernel.params_struct) {
            return Err(format!("kernel `{}` or its struct is there twice", kernel.name));
        }
    }
    Ok(())
}
