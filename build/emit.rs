//! Writes the Rust side of the kernels: structs, constants, and the table of images that `src/kernels.rs`
//! includes.

use crate::nvcc::Built;
use crate::resources::Resource;
use crate::scan::{Field, Kernel, Kind};
use crate::units::{Arch, File};
use std::fmt::Write;
use std::path::Path;

/// Payload of an image that was never compiled; a driver refuses it.
const EMPTY: &[u8; 16] = b"// no nvcc here\0";

/// Size and offsets of a kernel's struct by the rules of C.
pub struct Layout {
    /// Bytes, padding included.
    pub size: usize,
    /// One per field.
    pub offsets: Vec<usize>,
}

/// Lays a struct out as both compilers must.
pub fn layout(kernel: &Kernel) -> Layout {
    let (mut at, mut align, mut offsets) = (0usize, 1, vec![]);
    for field in &kernel.fields {
        let each = field.kind.size();
        at = at.next_multiple_of(each);
        offsets.push(at);
        at += field.size();
        align = align.max(each);
    }
    Layout { size: at.next_multiple_of(align), offsets }
}

fn rust_type(field: &Field) -> String {
    let each = match field.kind {
        Kind::Pointer => "DevicePtr",
        Kind::I32 => "i32",
        Kind::U32 => "u32",
        Kind::F32 => "f32",
        Kind::I64 => "i64",
        Kind::U64 => "u64",
        Kind::F64 => "f64",
        Kind::Map => "TensorMap",
    };
    field.count.map_or(each.into(), |count| format!("[{each}; {count}]"))
}

/// Writes `kernels.rs` and `images.bin` into `out`.
pub fn write(
    out: &Path,
    files: &[File],
    archs: &[Arch],
    nvcc: Option<&str>,
    built: &[Built],
    table: &[(usize, Resource)],
) -> Result<(), String> {
    let mut text = String::from("// Written by build.rs.\n\n");
    for file in files {
        module(&mut text, file);
    }
    let names: Vec<String> = archs.iter().map(|a| format!("{:?}", a.to_string())).collect();
    let _ = writeln!(
        text,
        "/// Whether the build found `nvcc`.\npub const COMPILED: bool = {};\n",
        nvcc.is_some()
    );
    let _ = writeln!(
        text,
        "/// What the kernels were compiled for.\npub const ARCHS: &[&str] = &[{}];\n",
        names.join(", ")
    );
    let _ = writeln!(
        text,
        "/// The version of `nvcc`, or empty.\npub const NVCC: &str = {:?};\n",
        nvcc.unwrap_or_default()
    );

    let mut bytes: Vec<u8> = vec![];
    let mut units = units(files, built, &mut bytes)?;
    units.sort();
    let _ = writeln!(
        text,
        "static IMAGES: Aligned<[u8; {}]> =\n    Aligned(*include_bytes!(\"images.bin\"));\n",
        bytes.len()
    );
    text += "/// Every unit, in order of stem, types and variant.\npub static UNITS: &[Unit] = &[\n";
    for (_, _, _, line) in &units {
        text += line;
    }
    text += "];\n\n/// What each compiled kernel needs; empty without `nvcc`.\n";
    text += "pub static RESOURCES: &[Resource] = &[\n";
    for (i, r) in table {
        let (unit, [stores, loads]) = (&built[*i], r.spill);
        let stem = &files[unit.file].scan.stem;
        let _ = writeln!(
            text,
            "    Resource {{ stem: {stem:?}, types: {:?}, variant: {:?}, arch: {:?}, kernel: {:?}, \
             registers: {}, smem: {}, stack: {}, spill_stores: {stores}, spill_loads: {loads} }},",
            unit.types,
            unit.variant,
            unit.arch.to_string(),
            r.kernel,
            r.registers,
            r.smem,
            r.stack
        );
    }
    text += "];\n";
    crate::write_if_changed(&out.join("images.bin"), &bytes)?;
    crate::write_if_changed(&out.join("kernels.rs"), text.as_bytes())
}

/// One Rust module per kernel file.
fn module(text: &mut String, file: &File) {
    let stem = &file.scan.stem;
    let _ = writeln!(text, "/// Kernels of `kernels/{stem}.cu`.\npub mod {} {{", ident(stem));
    let _ = writeln!(text, "    use super::*;\n");
    for (name, values) in &file.scan.constants {
        constant(text, name, values, &file.variants());
    }
    let _ = writeln!(text, "    /// Element types that the file is compiled for.");
    let _ = writeln!(text, "    pub const TYPES: &[&str] = &{:?};", file.types());
    let _ = writeln!(text, "    /// Variants that the file is compiled in.");
    let _ = writeln!(text, "    pub const VARIANTS: &[&str] = &{:?};", file.variants());
    for kernel in &file.scan.kernels {
        let (name, params) = (&kernel.name, &kernel.params_struct);
        let handle = name.to_uppercase();
        let _ = writeln!(text, "\n    /// Arguments of [`{handle}`].");
        let _ = writeln!(text, "    #[repr(C)]\n    #[derive(Clone, Copy, Debug, Default, PartialEq)]");
        let _ = writeln!(text, "    pub struct {params} {{");
        for field in &kernel.fields {
            let ty = rust_type(field);
            let _ = writeln!(text, "        /// {}", doc(&field.comment, &field.name));
            let _ = writeln!(text, "        pub {}: {ty},", ident(&field.name));
        }
        let layout = layout(kernel);
        let _ = writeln!(text, "    }}\n    const _: () = {{");
        let _ = writeln!(text, "        assert!(size_of::<{params}>() == {});", layout.size);
        for (field, offset) in kernel.fields.iter().zip(&layout.offsets) {
            let f = ident(&field.name);
            let _ = writeln!(text, "        assert!(std::mem::offset_of!({params}, {f}) == {offset});");
        }
        let _ = writeln!(text, "    }};");
        let _ = writeln!(
            text,
            "    impl Params for {params} {{\n        const KERNEL: Kernel<{params}> = {handle};\n    }}"
        );
        let _ = writeln!(text, "    /// `{name}` in `kernels/{stem}.cu`.");
        let _ = writeln!(text, "    pub const {handle}: Kernel<{params}> = Kernel::new({stem:?}, {name:?});");
    }
    text.push_str("}\n\n");
}

/// A number where the variants agree, and a table of them where they do not.
fn constant(text: &mut String, name: &str, values: &[i64], variants: &[String]) {
    let negative = values.iter().any(|v| *v < 0);
    let of = "of the kernel file";
    if values.iter().all(|v| *v == values[0]) {
        let (kind, value) = (if negative { "i64" } else { "usize" }, values[0]);
        let _ = writeln!(text, "    /// `{name}` {of}.\n    pub const {name}: {kind} = {value};");
    } else if !negative {
        let rows: Vec<(&String, &i64)> = variants.iter().zip(values).collect();
        let _ = writeln!(text, "    /// `{name}` {of}, which each variant has its own of.");
        let _ = writeln!(text, "    pub const {name}: ByVariant = ByVariant(&{rows:?});");
    }
}

/// A name as Rust takes it.
fn ident(name: &str) -> String {
    const KEYWORDS: &str = " as async await box break const continue do dyn else enum extern false final \
         fn for gen if impl in let loop macro match mod move mut override priv pub ref return static struct \
         trait true try type typeof unsafe unsized use virtual where while yield abstract become ";
    if KEYWORDS.contains(&format!(" {name} ")) { format!("r#{name}") } else { name.into() }
}

/// A comment of the kernel file as a doc comment: nothing in it is markup.
fn doc(comment: &str, name: &str) -> String {
    let plain: String = comment.split_whitespace().collect::<Vec<_>>().join(" ");
    if plain.is_empty() {
        return format!("`{name}` of the kernel's struct.");
    }
    let mut text = String::new();
    for c in plain.chars() {
        if "[]<>*_`\\|".contains(c) {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

type UnitLine = (String, String, String, String);

/// Appends every image to `bytes`, and returns stem, types, variant and source line of every unit.
fn units(files: &[File], built: &[Built], bytes: &mut Vec<u8>) -> Result<Vec<UnitLine>, String> {
    let mut lines = vec![];
    for (i, file) in files.iter().enumerate() {
        let stem = &file.scan.stem;
        for (n, (types, variant)) in file.scan.images().into_iter().enumerate() {
            let number = n % file.scan.variants.len();
            let (smem, loops) = (file.scan.smem(number), file.scan.loops(number));
            let mut images: Vec<(String, &[u8])> = built
                .iter()
                .filter(|b| b.file == i && b.types == types && b.variant == variant)
                .map(|b| (format!("Arch::{:?}", b.arch), b.image.as_slice()))
                .collect();
            if images.is_empty() {
                images.push(("Arch::None".into(), EMPTY));
            }
            let mut list = vec![];
            for (arch, payload) in images {
                let start = bytes.len();
                bytes.extend(header(stem, &types, &variant));
                bytes.extend(payload);
                // PTX must end in NUL. It does no harm to a cubin.
                bytes.push(0);
                let size = bytes.len() - start;
                bytes.resize(bytes.len().next_multiple_of(16), 0);
                list.push(format!("Image {{ arch: {arch}, bytes: part({start}, {size}) }}"));
            }
            let line = format!(
                "    Unit {{ stem: {stem:?}, types: {types:?}, variant: {variant:?}, smem: {smem}, \
                 loops: &{loops:?}, images: &[{}] }},\n",
                list.join(", ")
            );
            lines.push((stem.clone(), types.clone(), variant, line));
        }
    }
    Ok(lines)
}

/// Magic, stem, types and variant: 64 bytes, by which the emulator of the tests knows what it is given.
fn header(stem: &str, types: &str, variant: &str) -> [u8; 64] {
    let mut header = [0; 64];
    let types_at = if types.len() > 8 { 32 } else { 40 };
    for (at, text) in [(0, "LDMKERN1"), (8, stem), (types_at, types), (48, variant)] {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
    header
}
