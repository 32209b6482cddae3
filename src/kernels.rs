//! The compiled kernels: one module per `kernels/<stem>.cu`, written by `build.rs`, and the table of their
//! images.
//!
//! A module holds, for each kernel, the `#[repr(C)]` twin of its struct of arguments and a handle that takes
//! no other struct; and every `constexpr int` of the file, as a number, or as a [`ByVariant`] where its value (or a
//! macro of the variants) is not the same in all variants. Both compilers check sizes, offsets and values, so they cannot
//! disagree.

use crate::error::{Error, Result};
use std::fmt::{self, Write};
use std::marker::PhantomData;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// An address in device memory, in bytes; 0 is none.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, PartialOrd, Ord)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// No memory: what a kernel gets for an input that is absent.
    pub const NULL: DevicePtr = DevicePtr(0);

    /// The address `bytes` further on.
    pub const fn offset(self, bytes: usize) -> DevicePtr {
        DevicePtr(self.0 + bytes as u64)
    }

    /// Whether this is [`DevicePtr::NULL`].
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for DevicePtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// How a tensor lies in device memory, and which box of it one instruction of a kernel copies: `TensorMap` of kernels/dev.cuh. The
/// driver makes it (`tensor_map` of a launch), and it alone knows what it says.
#[repr(C, align(128))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TensorMap(pub [u64; 16]);

/// A kernel that takes the struct `P`. Only the generated modules make one.
pub struct Kernel<P> {
    stem: &'static str,
    name: &'static str,
    params: PhantomData<fn(P)>,
}

impl<P> Kernel<P> {
    const fn new(stem: &'static str, name: &'static str) -> Kernel<P> {
        Kernel { stem, name, params: PhantomData }
    }

    /// The file, without folder and extension.
    pub const fn stem(&self) -> &'static str {
        self.stem
    }

    /// The kernel's name in that file.
    pub const fn name(&self) -> &'static str {
        self.name
    }
}

impl<P> Clone for Kernel<P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Kernel<P> {}

impl<P> fmt::Debug for Kernel<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.stem, self.name)
    }
}

/// A number of a kernel file that is not the same in all its variants: a macro of the variants, or a constant that
/// follows from one. `k::BM.of("BM=128,BN=64")` is 128.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ByVariant(&'static [(&'static str, usize)]);

impl ByVariant {
    /// The number in this variant.
    ///
    /// # Panics
    /// When the file is not compiled in that variant: rooms ask for one that they have chosen from the file's list.
    pub fn of(self, variant: &str) -> usize {
        let found = self.0.iter().find(|(name, _)| *name == variant);
        found.unwrap_or_else(|| panic!("no variant `{variant}` among {:?}", self.0)).1
    }
}

/// The struct of arguments of a kernel.
pub trait Params: Copy + fmt::Debug + 'static {
    /// The kernel that takes it.
    const KERNEL: Kernel<Self>;
}

/// What an image was compiled for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arch {
    /// Machine code for one major version of the hardware, from this minor version on: 80 is `sm_80`.
    Cubin(u32),
    /// Machine code with instructions of exactly this architecture: 90 is `sm_90a`.
    CubinA(u32),
    /// Portable code that the driver compiles, from this version of the hardware on: 80 is `compute_80`.
    Ptx(u32),
    /// A header alone: there was no `nvcc`.
    None,
}

impl Arch {
    /// Whether the kernels of such an image wait by themselves for what was launched before them: `griddep_wait` of
    /// kernels/dev.cuh is an instruction from sm_90 on, and nothing before. A header alone is the emulator's, which waits.
    pub fn waits(self) -> bool {
        matches!(self, Arch::Cubin(90..) | Arch::CubinA(90..) | Arch::Ptx(90..) | Arch::None)
    }

    /// How well an image suits hardware of version `(major, minor)`; `None` if it does not run there.
    fn fit(self, (major, minor): (u32, u32)) -> Option<u32> {
        let have = major * 10 + minor;
        match self {
            Arch::CubinA(n) if n == have => Some(3000),
            Arch::Cubin(n) if n / 10 == major && n <= have => Some(2000 + n % 10),
            Arch::Ptx(n) if n <= have => Some(1000 + n),
            Arch::None => Some(0),
            _ => None,
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arch::Cubin(n) => write!(f, "sm_{n}"),
            Arch::CubinA(n) => write!(f, "sm_{n}a"),
            Arch::Ptx(n) => write!(f, "compute_{n}"),
            Arch::None => f.write_str("nothing"),
        }
    }
}

/// One compiled image of a unit.
#[derive(Debug)]
pub struct Image {
    /// What it was compiled for.
    pub arch: Arch,
    /// 64 bytes of header (magic, stem, types, variant), then cubin or PTX; 16-byte aligned.
    pub bytes: &'static [u8],
}

/// Bytes of header before every image.
pub const HEADER: usize = 64;

impl Image {
    /// What the driver is given: cubin, or PTX that ends in NUL.
    pub fn payload(&self) -> &'static [u8] {
        &self.bytes[HEADER..]
    }
}

/// A kernel file compiled for one element type (or pair) and one variant.
#[derive(Debug)]
pub struct Unit {
    /// The kernel file, without folder and extension.
    pub stem: &'static str,
    /// `f32`, or `f32>bf16` for a pair.
    pub types: &'static str,
    /// `D=40`, `BM=128,BN=64`, or empty.
    pub variant: &'static str,
    /// Dynamic shared memory that each launch of its kernels gives a block, in bytes: the file's `SMEM_BYTES`, or 0.
    pub smem: usize,
    /// What the body of its main loop holds: kind of instruction (`HMMA`) and count, from the file's `LOOP_HMMA` and the
    /// like; empty where the file has none.
    pub loops: &'static [(&'static str, u32)],
    /// One per architecture, at least one.
    pub images: &'static [Image],
}

impl Unit {
    /// The image that suits hardware of version `(major, minor)` best, if any does.
    pub fn image(&self, capability: (u32, u32)) -> Option<&'static Image> {
        let fits = self.images.iter().filter_map(|image| Some((image.arch.fit(capability)?, image)));
        fits.max_by_key(|(fit, _)| *fit).map(|(_, image)| image)
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unit { stem, types, variant, .. } = self;
        let comma = if variant.is_empty() { "" } else { ", " };
        write!(f, "{stem}<{types}{comma}{variant}>")
    }
}

/// The unit of a kernel file for these types and this variant.
pub fn unit(stem: &str, types: &str, variant: &str) -> Option<&'static Unit> {
    index(stem, types, variant).map(|i| &UNITS[i])
}

/// Its place in [`UNITS`], which is sorted.
pub fn index(stem: &str, types: &str, variant: &str) -> Option<usize> {
    UNITS.binary_search_by(|u| (u.stem, u.types, u.variant).cmp(&(stem, types, variant))).ok()
}

/// As [`index`], with an error that names what there is.
///
/// # Errors
/// When the file was not compiled for these types or in this variant.
pub fn find(stem: &str, types: &str, variant: &str) -> Result<usize> {
    index(stem, types, variant).ok_or_else(|| {
        let of_stem = || UNITS.iter().filter(|u| u.stem == stem);
        let same_types: Vec<_> = of_stem().filter(|u| u.types == types).map(|u| quoted(u.variant)).collect();
        let mut all_types: Vec<_> = of_stem().map(|u| u.types).collect();
        all_types.dedup();
        Error::invalid(if all_types.is_empty() {
            format!("kernels: there is no kernels/{stem}.cu")
        } else if same_types.is_empty() {
            format!("kernels/{stem}.cu: not compiled for `{types}`; its types are {}", all_types.join(", "))
        } else if same_types == ["``"] {
            format!("kernels/{stem}.cu: no variant `{variant}`; it has none")
        } else {
            format!("kernels/{stem}.cu: no variant `{variant}`; its variants are {}", same_types.join(", "))
        })
    })
}

fn quoted(variant: &str) -> String {
    format!("`{variant}`")
}

/// What one compiled kernel needs of a multiprocessor, as `ptxas` reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resource {
    /// Kernel file.
    pub stem: &'static str,
    /// Element types.
    pub types: &'static str,
    /// Variant, or empty.
    pub variant: &'static str,
    /// Such as `sm_80`.
    pub arch: &'static str,
    /// Kernel.
    pub kernel: &'static str,
    /// Registers per thread.
    pub registers: u32,
    /// Shared memory per block, bytes: what the kernel declares, and what its launch adds ([`Unit::smem`]).
    pub smem: u32,
    /// Stack per thread, bytes.
    pub stack: u32,
    /// Bytes stored because registers ran out.
    pub spill_stores: u32,
    /// Bytes loaded because registers ran out.
    pub spill_loads: u32,
}

impl Resource {
    /// Whether the kernel uses local memory: it has spilled registers, or a stack.
    pub const fn spills(&self) -> bool {
        self.stack + self.spill_stores + self.spill_loads > 0
    }
}

/// The kernels that use local memory. There should be none.
pub fn spilling() -> Vec<&'static Resource> {
    RESOURCES.iter().filter(|r| r.spills()).collect()
}

/// [`RESOURCES`] as a table; empty without `nvcc`.
pub fn report() -> String {
    if !COMPILED {
        return String::new();
    }
    let unit = |r: &Resource| match r.variant {
        "" => r.types.to_string(),
        variant => format!("{} {variant}", r.types),
    };
    let wide = |f: &dyn Fn(&Resource) -> usize| RESOURCES.iter().map(f).max().unwrap_or(0).max(8);
    let (a, b) = (wide(&|r| r.kernel.len()), wide(&|r| unit(r).len()));
    let mut text = format!("{:a$}  {:b$}  arch    registers   smem  stack  spill\n", "kernel", "unit");
    for r in RESOURCES {
        let (spill, mark) =
            (r.spill_stores + r.spill_loads, if r.spills() { "  <-- local memory" } else { "" });
        let (registers, smem, stack) = (r.registers, r.smem, r.stack);
        let _ = write!(text, "{:a$}  {:b$}  {:6}  {registers:9}", r.kernel, unit(r), r.arch);
        let _ = writeln!(text, "  {smem:5}  {stack:5}  {spill:5}{mark}");
    }
    text
}

/// One line about all of [`RESOURCES`]; it ends in `no spill, no stack` where that is so.
pub fn summary() -> String {
    if !COMPILED {
        return "built without nvcc: no kernel is compiled\n".into();
    }
    let (bad, most) = (spilling().len(), RESOURCES.iter().map(|r| r.registers).max().unwrap_or(0));
    let local = if bad == 0 { "no spill, no stack".into() } else { format!("{bad} use local memory") };
    let (kernels, units, archs) = (RESOURCES.len(), UNITS.len(), ARCHS.join(", "));
    format!(
        "{kernels} kernels in {units} units for {archs}, nvcc {NVCC}; at most {most} registers; {local}\n"
    )
}

#[repr(C, align(16))]
struct Aligned<B>(B);

/// A slice of [`IMAGES`], where the compiler can see it.
const fn part(start: usize, size: usize) -> &'static [u8] {
    let all: &'static [u8] = &IMAGES.0;
    all.split_at(start).1.split_at(size).0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_waits_from_sm_90_on() {
        let (with, without) = ([Arch::CubinA(90), Arch::Cubin(90), Arch::Ptx(100), Arch::None], [80, 89]);
        assert!(with.into_iter().all(Arch::waits));
        assert!(!without.into_iter().any(|n| Arch::Cubin(n).waits() || Arch::Ptx(n).waits()));
    }

    fn chosen(archs: &[Arch], capability: (u32, u32)) -> Option<Arch> {
        let fits = archs.iter().filter_map(|a| Some((a.fit(capability)?, *a)));
        fits.max_by_key(|(fit, _)| *fit).map(|(_, a)| a)
    }

    #[test]
    fn the_image_of_the_hardware_is_chosen() {
        let all = [Arch::Cubin(80), Arch::Cubin(90), Arch::Ptx(80)];
        assert_eq!(chosen(&all, (8, 0)), Some(Arch::Cubin(80)));
        assert_eq!(chosen(&all, (8, 9)), Some(Arch::Cubin(80)));
        assert_eq!(chosen(&all, (9, 0)), Some(Arch::Cubin(90)));
        assert_eq!(chosen(&all, (12, 0)), Some(Arch::Ptx(80)));
        assert_eq!(chosen(&all, (7, 5)), None);
        let exact = [Arch::CubinA(90), Arch::Cubin(90), Arch::Cubin(86), Arch::Cubin(80)];
        assert_eq!(chosen(&exact, (9, 0)), Some(Arch::CubinA(90)));
        assert_eq!(chosen(&exact, (8, 6)), Some(Arch::Cubin(86)));
        assert_eq!(chosen(&exact, (10, 0)), None);
        assert_eq!(chosen(&[Arch::None], (9, 0)), Some(Arch::None));
    }

    #[test]
    fn units_are_sorted_and_their_images_carry_their_names() {
        assert!(
            UNITS
                .windows(2)
                .all(|w| { (w[0].stem, w[0].types, w[0].variant) < (w[1].stem, w[1].types, w[1].variant) })
        );
        for unit in UNITS {
            let mut header = [0u8; HEADER];
            let types_at = if unit.types.len() > 8 { 32 } else { 40 };
            for (at, text) in [(0, "LDMKERN1"), (8, unit.stem), (types_at, unit.types), (48, unit.variant)] {
                header[at..at + text.len()].copy_from_slice(text.as_bytes());
            }
            for image in unit.images {
                assert_eq!(image.bytes[..HEADER], header, "{unit}");
                assert_eq!(image.bytes.as_ptr() as usize % 16, 0, "{unit}");
                let ptx = !image.payload().starts_with(b"\x7fELF");
                assert_eq!(ptx, matches!(image.arch, Arch::Ptx(_) | Arch::None), "{unit}");
                assert_eq!(image.payload().last(), Some(&0), "{unit}");
            }
        }
    }

    #[test]
    fn an_unknown_unit_names_those_there_are() {
        let text = |s, t, v| find(s, t, v).unwrap_err().to_string();
        assert_eq!(text("no_such", "f32", ""), "kernels: there is no kernels/no_such.cu");
        let Some(unit) = UNITS.first() else { return };
        assert!(text(unit.stem, "f64", "").contains("its types are"), "{unit}");
        assert!(text(unit.stem, unit.types, "no=1").contains("no variant `no=1`; it"), "{unit}");
    }
}
