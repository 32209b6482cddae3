//! The shape of the crate, as rules on its sources: which module may import which, how long a file may be, where `unsafe`
//! stands, what a kernel may say. Every rule is a function from text to complaints, and is itself tested on a bad sample.

#[path = "architecture/tokens.rs"]
mod tokens;

use ldm::ops::ROOMS;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use tokens::{Token, shipped, tokens};

/// What a module may import, besides `error`, `tensor` and itself. The only place where layers are written down.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("tensor", &[]),
    ("kernels", &[]),
    ("rng", &[]),
    ("samplers", &[]),
    ("io", &[]),
    ("data", &["io", "rng"]),
    ("backend", &["kernels"]),
    ("ops", &["graph", "backend", "kernels", "rng"]),
    ("graph", &["ops", "backend", "kernels", "rng"]),
    ("exec", &["graph", "ops", "backend"]),
    ("nn", &["graph", "ops"]),
    ("models", &["nn", "graph", "ops", "io"]),
    ("presets", &["nn", "graph", "ops", "io"]),
    ("diffusion", &["models", "samplers", "exec", "graph", "ops", "rng"]),
    ("pipeline", &["diffusion", "models", "presets", "exec", "io", "rng", "samplers"]),
    (
        "train",
        &[
            "pipeline",
            "diffusion",
            "models",
            "presets",
            "exec",
            "nn",
            "graph",
            "ops",
            "io",
            "rng",
            "samplers",
            "data",
        ],
    ),
];

/// Modules that may import anything.
const FREE: [&str; 4] = ["lib", "main", "cli", "capi"];

/// Names at the root that belong to a module: re-exports and exported macros.
const AT_ROOT: &[(&str, &str)] =
    &[("Error", "error"), ("Result", "error"), ("rooms", "ops"), ("ensure", "ops")];

/// Most lines of a file.
const LINES: usize = 600;

/// The files with `unsafe`: driver calls, SIMD, the memory map, the C ABI; and the tests that load the emulator.
const UNSAFE: [&str; 9] = [
    "src/backend/cuda/driver.rs",
    "src/backend/cuda/driver/tensor.rs",
    "src/backend/cpu/simd.rs",
    "src/backend/cpu/simd/grid.rs",
    "src/io/mmap.rs",
    "src/capi.rs",
    "tests/common/emulator.rs",
    "tests/emulator.rs",
    "tests/emulator/harness.rs",
];

/// What only `kernels/dev.cuh` may say; a word that starts with one of these is meant too.
const DEVICE_WORDS: [&str; 15] = [
    "asm",
    "__asm",
    "__shared__",
    "threadIdx",
    "blockIdx",
    "blockDim",
    "gridDim",
    "__shfl",
    "__syncthreads",
    "__syncwarp",
    "__ballot",
    "__ldg",
    "__expf",
    "__half",
    "__nv_bfloat16",
];

struct Source {
    /// Path in the repository, with `/`.
    path: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The sources under these folders, in order of path.
fn sources(folders: &[&str], extensions: &[&str]) -> Vec<Source> {
    let mut waiting: Vec<PathBuf> = folders.iter().map(|f| root().join(f)).collect();
    let mut all = Vec::new();
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            let entries = fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            waiting.extend(entries.map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|e| extensions.iter().any(|want| e == *want)) {
            let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let path = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
            all.push(Source { path, text });
        }
    }
    all.sort_by(|a, b| a.path.cmp(&b.path));
    all
}

fn rust() -> Vec<Source> {
    sources(&["src", "tests", "benches", "examples", "build", "build.rs"], &["rs"])
}

fn none(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

/// The modules of the crate's root that a file names, with the line: `crate::x`, `crate::{x, y::z}`, and `super::x`
/// where that is the root. `depth` is the number of modules that the file lies in.
fn imports<'a>(code: &[Token<'a>], depth: usize) -> Vec<Token<'a>> {
    let at = |i: usize| code.get(i).map_or("", |t: &Token| t.text);
    let mut found = Vec::new();
    // Inline modules lie deeper; each entry is the brace depth at which one began.
    let (mut inline, mut braces): (Vec<usize>, usize) = (Vec::new(), 0);
    for i in 0..code.len() {
        match at(i) {
            "{" => {
                braces += 1;
                if i >= 2 && at(i - 2) == "mod" {
                    inline.push(braces);
                }
            }
            "}" => {
                inline.pop_if(|began| *began == braces);
                braces = braces.saturating_sub(1);
            }
            _ => {}
        }
        let starts = at(i + 1) == "::" && (i == 0 || at(i - 1) != "::");
        let mut next = match at(i) {
            "crate" if starts => i + 2,
            "super" if starts => {
                let ups = (0..).take_while(|k| at(i + 2 * k) == "super" && at(i + 2 * k + 1) == "::").count();
                if ups < depth + inline.len() {
                    continue;
                }
                i + 2 * ups
            }
            _ => continue,
        };
        if at(next) != "{" {
            found.extend(code.get(next));
            continue;
        }
        // A group: what follows its `{` and its own commas.
        let mut nested = 0;
        loop {
            match at(next) {
                "{" => nested += 1,
                "}" => nested -= 1,
                _ => {}
            }
            let first = matches!((at(next), nested), ("{" | ",", 1)) && at(next + 1) != "}";
            next += 1;
            if nested == 0 || next >= code.len() {
                break;
            }
            if first {
                found.extend(code.get(next));
            }
        }
    }
    found
}

/// Modules that a file lies in, from the root: `src/io/png.rs` is `["io", "png"]`, `src/io/mod.rs` is `["io"]`.
fn module_of(path: &str) -> Vec<&str> {
    let inner = path.strip_prefix("src/").and_then(|p| p.strip_suffix(".rs")).unwrap_or(path);
    let mut parts: Vec<&str> = inner.split('/').collect();
    parts.pop_if(|last| *last == "mod");
    parts
}

/// Arrows that the table does not have.
fn arrows(path: &str, text: &str) -> Vec<String> {
    let module = module_of(path);
    let from = module[0];
    if FREE.contains(&from) {
        return Vec::new();
    }
    let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == from) else {
        return vec![format!("{path}: module `{from}` has no row in MAY_IMPORT (tests/architecture.rs)")];
    };
    let (code, _) = shipped(text);
    let mut complaints = Vec::new();
    for Token { text: name, line } in imports(&code, module.len()) {
        let to = AT_ROOT.iter().find(|(n, _)| *n == name).map_or(name, |(_, module)| module);
        if to != from && to != "error" && to != "tensor" && !allowed.contains(&to) {
            complaints.push(format!("{path}:{line}: `{from}` may not import `{to}`"));
        }
    }
    complaints
}

/// Folders or files of modules that stand under `#[cfg(test)]`.
fn test_modules(path: &str, text: &str) -> Vec<String> {
    let folder = match path.strip_suffix("/mod.rs") {
        Some(folder) => folder.to_string(),
        None if matches!(path, "src/lib.rs" | "src/main.rs") => "src".into(),
        None => path.trim_end_matches(".rs").into(),
    };
    shipped(text).1.into_iter().map(|name| format!("{folder}/{name}")).collect()
}

fn too_long(path: &str, text: &str) -> Vec<String> {
    let lines = text.lines().count();
    if lines <= LINES { vec![] } else { vec![format!("{path}: {lines} lines, want at most {LINES}")] }
}

fn unsafe_outside(path: &str, text: &str) -> Vec<String> {
    if UNSAFE.contains(&path) {
        return vec![];
    }
    let all = tokens(text);
    let bad = all.iter().filter(|t| matches!(t.text, "unsafe" | "unsafe_code"));
    bad.map(|t| format!("{path}:{}: `{}` outside the fenced files", t.line, t.text)).collect()
}

fn leftovers(path: &str, text: &str) -> Vec<String> {
    let all = tokens(text);
    let mut bad: Vec<(usize, String)> = Vec::new();
    for w in all.windows(3) {
        if matches!(w[0].text, "todo" | "unimplemented" | "dbg") && w[1].text == "!" && w[2].text != "=" {
            bad.push((w[0].line, format!("{}!", w[0].text)));
        }
        if (w[0].text, w[1].text, w[2].text) == ("#", "[", "ignore") {
            bad.push((w[0].line, "#[ignore]".into()));
        }
    }
    let mark = ["FIX", "ME"].concat();
    let lines = text.lines().enumerate().filter(|(_, line)| line.contains(&mark));
    bad.extend(lines.map(|(i, _)| (i + 1, mark.clone())));
    bad.into_iter().map(|(line, what)| format!("{path}:{line}: {what}")).collect()
}

/// What a `.cu` says and only `dev.cuh` may say.
fn device_words(path: &str, text: &str) -> Vec<String> {
    let mut complaints: Vec<String> = tokens(text)
        .iter()
        .filter(|t| {
            t.is_word() && DEVICE_WORDS.iter().any(|w| t.text == *w || w.len() > 3 && t.text.starts_with(w))
        })
        .map(|t| format!("{path}:{}: `{}` belongs in dev.cuh", t.line, t.text))
        .collect();
    for (i, line) in text.lines().enumerate() {
        let directive = line.trim_start().strip_prefix('#').map(str::trim_start);
        let Some(what) = directive.and_then(|d| d.strip_prefix("include")) else { continue };
        let name = what.split("//").next().unwrap_or_default().trim();
        // What kernels of one room share is named as they are: conv2d_tile.cuh for conv2d_mma.cu.
        let room = path.rsplit('/').next().and_then(|file| file.split(['_', '.']).next()).unwrap_or_default();
        let shared =
            path.ends_with(".cu") && name.starts_with(&format!("\"{room}_")) && name.ends_with(".cuh\"");
        if name != "\"dev.cuh\"" && !shared {
            let says = "a kernel includes \"dev.cuh\" and what its room shares, and no other";
            complaints.push(format!("{path}:{}: {says}", i + 1));
        }
    }
    complaints
}

/// Kernels whose first statement is not the wait for the kernels before them: they may be launched while those still run.
fn late_waits(path: &str, text: &str) -> Vec<String> {
    const WAIT: [&str; 4] = ["griddep_wait", "(", ")", ";"];
    let all = tokens(text);
    let kernels = all.iter().enumerate().filter(|(_, t)| t.text == "__global__");
    let body = |i: usize| all[i..].iter().skip_while(|t| t.text != "{").skip(1).map(|t| t.text);
    let bad = kernels.filter(|&(i, _)| !body(i).take(WAIT.len()).eq(WAIT));
    bad.map(|(_, t)| format!("{path}:{}: a kernel begins with `griddep_wait();`", t.line)).collect()
}

/// Rooms that launch and kernel files, which must be the same: `kernels/x.cu`, and `kernels/x_what.cu` beside it, are of
/// room `x`. `launches` says whether a room names a kernel file.
fn pairs(rooms: &[&str], kernels: &[&str], launches: impl Fn(&str, &str) -> bool) -> Vec<String> {
    let mut complaints = Vec::new();
    for kernel in kernels {
        let of = |room: &&&str| {
            kernel.strip_prefix(**room).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        };
        match rooms.iter().filter(of).max_by_key(|room| room.len()) {
            Some(room) if launches(room, kernel) => {}
            Some(room) => complaints.push(format!("kernels/{kernel}.cu: src/ops/{room}.rs does not use it")),
            None => complaints.push(format!("kernels/{kernel}.cu: there is no room for it in `rooms!`")),
        }
    }
    let missing = rooms.iter().filter(|room| launches(room, room) && !kernels.contains(room));
    complaints
        .extend(missing.map(|room| format!("src/ops/{room}.rs launches, but kernels/{room}.cu is missing")));
    complaints
}

/// Whether a room's code names this module of `crate::kernels`.
fn names_kernels(kernel: &str, text: &str) -> bool {
    shipped(text).0.windows(3).any(|w| (w[0].text, w[1].text, w[2].text) == ("kernels", "::", kernel))
}

#[test]
fn imports_flow_one_way() {
    let files = sources(&["src"], &["rs"]);
    let tests: Vec<String> = files.iter().flat_map(|f| test_modules(&f.path, &f.text)).collect();
    let in_tests = |path: &str| {
        tests.iter().any(|t| path.strip_prefix(t.as_str()).is_some_and(|r| r == ".rs" || r.starts_with('/')))
    };
    none(files.iter().filter(|f| !in_tests(&f.path)).flat_map(|f| arrows(&f.path, &f.text)).collect());
}

#[test]
fn the_table_of_layers_has_no_circle() {
    // `ops` and `graph` are one layer; everywhere else an arrow leads to an earlier row.
    for (i, (from, to)) in MAY_IMPORT.iter().enumerate() {
        for name in *to {
            let at = MAY_IMPORT.iter().position(|(n, _)| n == name);
            let earlier = (*from, *name) == ("ops", "graph") || at.is_some_and(|at| at < i);
            assert!(earlier, "`{from}` → `{name}`: the row of `{name}` must come first");
        }
    }
}

#[test]
fn files_are_short() {
    let folders = ["src", "kernels", "tests", "benches", "examples", "build", "build.rs", "tools"];
    let extensions = ["rs", "cu", "cuh", "cpp", "h", "py", "sh"];
    none(sources(&folders, &extensions).iter().flat_map(|f| too_long(&f.path, &f.text)).collect());
}

#[test]
fn unsafe_stands_in_the_fenced_files_only() {
    // This file and the scanner of kernels hold the word as data, in strings, which are not tokens.
    none(rust().iter().flat_map(|f| unsafe_outside(&f.path, &f.text)).collect());
}

#[test]
fn nothing_is_left_over() {
    none(rust().iter().flat_map(|f| leftovers(&f.path, &f.text)).collect());
}

#[test]
fn kernels_keep_to_dev_cuh() {
    let (dev, others): (Vec<_>, Vec<_>) = sources(&["kernels"], &["cu", "cuh", "h", "hpp"])
        .into_iter()
        .partition(|f| f.path.starts_with("kernels/dev"));
    none(others.iter().flat_map(|f| device_words(&f.path, &f.text)).collect());
    let paths = |files: &[Source]| files.iter().map(|f| f.path.clone()).collect::<Vec<_>>();
    assert_eq!(paths(&dev), ["kernels/dev.cuh", "kernels/dev_emu.cuh", "kernels/dev_gpu.cuh"]);
    let shared: Vec<_> = paths(&others).into_iter().filter(|path| !path.ends_with(".cu")).collect();
    assert_eq!(shared, ["kernels/attention_tile.cuh", "kernels/conv2d_tile.cuh", "kernels/conv2d_walk.cuh"]);
}

#[test]
fn kernels_wait_first() {
    let files = sources(&["kernels"], &["cu"]);
    assert!(files.iter().all(|f| f.text.contains("__global__")));
    none(files.iter().flat_map(|f| late_waits(&f.path, &f.text)).collect());
}

#[test]
fn each_kernel_file_has_its_room() {
    let rooms: BTreeSet<&str> = ROOMS.iter().map(|r| r.stem).collect();
    let files = sources(&["kernels"], &["cu"]);
    let kernels: Vec<&str> =
        files.iter().filter_map(|f| f.path.strip_prefix("kernels/")?.strip_suffix(".cu")).collect();
    let code = sources(&["src/ops"], &["rs"]);
    let launches = |room: &str, kernel: &str| {
        let own = |f: &&Source| module_of(&f.path).get(1) == Some(&room);
        code.iter().filter(own).any(|f| names_kernels(kernel, &f.text))
    };
    none(pairs(&rooms.into_iter().collect::<Vec<_>>(), &kernels, launches));
}

/// The test of the test: each rule on a sample that breaks it, and on its right twin.
mod the_rules_themselves {
    use super::*;

    #[test]
    fn comments_strings_and_tests_are_no_code() {
        let text = "/* a /* b */ c */ x // y\n\"z \\\" z\" 'q' '\\'' &'a r#\"v \" v\"# b\"w\" one::two";
        let got: Vec<_> = tokens(text).iter().map(|t| (t.text, t.line)).collect();
        assert_eq!(got, [("x", 1), ("&", 2), ("a", 2), ("b", 2), ("one", 2), ("::", 2), ("two", 2)]);
        let text = "use a; #[cfg(test)] #[allow(b)] mod c { use d; } #[cfg(test)] mod e; use f;";
        let (kept, modules) = shipped(text);
        let words: Vec<_> = kept.iter().filter(|t| t.is_word()).map(|t| t.text).collect();
        assert_eq!((words, modules), (vec!["use", "a", "use", "f"], vec!["e"]));
        assert_eq!(test_modules("src/io/mod.rs", text), ["src/io/e"]);
        assert_eq!(test_modules("src/rng.rs", text), ["src/rng/e"]);
    }

    #[test]
    fn a_forbidden_arrow_is_found_however_it_is_written() {
        for bad in [
            "use crate::pipeline::Pipeline;",
            "use crate::{error::Result, cli};",
            "use crate::{\n    error::{Error, Result},\n    train::Loop,\n};",
            "fn f() { crate::exec::run() }",
            "use super::super::models::X;",
            "mod inner { use super::super::super::exec::X; }",
            "use crate::*;",
            "macro_rules! m { () => { $crate::diffusion::x() } }",
            "#[cfg(test)] mod tests { } use crate::nn::X;",
        ] {
            assert_eq!(arrows("src/ops/add.rs", bad).len(), 1, "{bad}");
        }
        for good in [
            "use crate::graph::{Graph, Var}; use crate::{error::Result, tensor::{DType, Spec}};",
            "use super::{Case, prelude::*}; use super::super::graph::Graph;",
            "mod inner { use super::super::case::Case; }",
            "// use crate::cli;\nconst X: &str = \"crate::cli::x\";",
            "#[cfg(test)]\nmod tests { use crate::exec::run_op; }",
        ] {
            assert_eq!(arrows("src/ops/add.rs", good), [""; 0], "{good}");
        }
        assert_eq!(arrows("src/rng.rs", "use super::io::png;").len(), 1);
        assert_eq!(arrows("src/graph/plan.rs", "use crate::exec::Program;").len(), 1);
        assert_eq!(arrows("src/unheard_of.rs", "").len(), 1);
        assert_eq!(arrows("src/cli/mod.rs", "use crate::train::Loop;"), [""; 0]);
        assert!(
            arrows("src/ops/a.rs", "\n\nuse crate::cli;")[0].starts_with("src/ops/a.rs:3: `ops` may not")
        );
    }

    #[test]
    fn a_kernel_that_does_not_wait_first_is_found() {
        let kernel = |body: &str| {
            format!("extern \"C\" __global__ void __launch_bounds__(B, 2) k(const P p) {{\n    {body}\n}}\n")
        };
        let right = kernel("griddep_wait();  // first\n    store(p.y, load(p.x));");
        assert_eq!(late_waits("kernels/add.cu", &right.repeat(2)), [""; 0]);
        assert_eq!(late_waits("kernels/add.cu", &kernel("// why\n    griddep_wait();")), [""; 0]);
        for bad in [
            "store(p.y, load(p.x));",
            "const T x = load(p.x);\n    griddep_wait();",
            "if (block_x() == 0) griddep_wait();",
            "// griddep_wait();\n    return;",
            "",
        ] {
            let wrong = late_waits("kernels/add.cu", &[&right[..], &kernel(bad)].concat());
            assert_eq!(wrong, ["kernels/add.cu:5: a kernel begins with `griddep_wait();`"], "{bad}");
        }
    }

    #[test]
    fn the_other_rules_find_their_samples() {
        assert_eq!(too_long("a.rs", &"x\n".repeat(LINES + 1)).len(), 1);
        assert_eq!(too_long("a.rs", &"x\n".repeat(LINES)), [""; 0]);
        for bad in ["fn f() { unsafe { g() } }", "#![allow(unsafe_code)]", "unsafe impl Send for X {}"] {
            assert_eq!(unsafe_outside("src/exec.rs", bad).len(), 1, "{bad}");
            assert_eq!(unsafe_outside("src/io/mmap.rs", bad), [""; 0], "{bad}");
        }
        assert_eq!(unsafe_outside("src/exec.rs", "// unsafe\nlet x = \"unsafe\";"), [""; 0]);
        let comment = ["// FIX", "ME: later"].concat();
        for bad in
            ["fn f() { todo!() }", "unimplemented!(\"x\")", "dbg!(x);", "#[ignore] fn t() {}", &comment]
        {
            assert_eq!(leftovers("a.rs", bad).len(), 1, "{bad}");
        }
        assert_eq!(leftovers("a.rs", "// todo!() is forbidden\nlet todo = \"dbg!\"; todo != x;"), [""; 0]);
    }

    #[test]
    fn a_kernel_that_leaves_dev_cuh_is_found() {
        for bad in [
            "asm(\"bar.sync 0;\");",
            "__shared__ float x[32];",
            "int i = threadIdx.x;",
            "x += __shfl_xor_sync(~0u, x, 1);",
            "__syncthreads();",
            "#include <cuda_fp16.h>",
            "#include \"dev.cuh\"\n  #  include \"other.cuh\"",
            "#include \"dev.cuh\"\n#include \"x_shared.h\"",
        ] {
            assert!(!device_words("kernels/x.cu", bad).is_empty(), "{bad}");
        }
        let good = "#include \"dev.cuh\"  // all of it\n// no asm, no __shared__\nint asmd = thread_x();";
        assert_eq!(device_words("kernels/x.cu", good), [""; 0]);
        let shared = "#include \"dev.cuh\"\n#include \"x_tile.cuh\"";
        assert_eq!(device_words("kernels/x_fast.cu", shared), [""; 0]);
        assert!(!device_words("kernels/y_fast.cu", shared).is_empty());
        assert!(!device_words("kernels/x_tile.cuh", shared).is_empty());
    }

    #[test]
    fn a_kernel_without_a_room_and_a_room_without_a_kernel_are_found() {
        let launches = |room: &str, _: &str| room != "reshape";
        assert_eq!(pairs(&["add", "reshape"], &["add"], launches), [""; 0]);
        assert_eq!(pairs(&["add"], &["add", "stray"], launches).len(), 1);
        assert_eq!(pairs(&["add", "mix"], &["add"], launches).len(), 1);
        assert_eq!(pairs(&["reshape"], &["reshape"], launches).len(), 1);
        assert_eq!(pairs(&["add"], &["add", "add_fast"], launches), [""; 0]);
        assert_eq!(pairs(&["add"], &["add", "address"], launches).len(), 1);
        assert_eq!(pairs(&["add"], &["add", "add_fast"], |_: &str, k: &str| k == "add").len(), 1);
        assert!(names_kernels("add", "use crate::kernels::add as k;"));
        assert!(!names_kernels("add", "// crate::kernels::add\nuse crate::kernels::{mix};"));
    }
}
