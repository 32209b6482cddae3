//! Which instruction sets there are, and which this machine has.

use std::sync::OnceLock;

/// An instruction set that the CPU engine is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust that the compiler vectorises for the target's baseline; on every architecture.
    Portable,
    /// x86-64 with AVX2, FMA and F16C: 8 lanes, 16 registers.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL: 16 lanes, 32 registers.
    Avx512,
}

impl Isa {
    /// What this machine can run, slowest first. Asked once.
    pub fn available() -> &'static [Isa] {
        static LIST: OnceLock<Vec<Isa>> = OnceLock::new();
        LIST.get_or_init(|| {
            [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|i| i.detect()).collect()
        })
    }

    /// The fastest instruction set of this machine.
    pub fn best() -> Isa {
        Self::available().last().copied().unwrap_or(Isa::Portable)
    }

    #[cfg(target_arch = "x86_64")]
    fn detect(self) -> bool {
        // The standard library caches the answers: this is a load and a mask.
        let avx2 = || {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        };
        match self {
            Isa::Portable => true,
            Isa::Avx2 => avx2(),
            Isa::Avx512 => {
                avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect(self) -> bool {
        self == Isa::Portable
    }

    /// Whether this machine multiplies pairs of bf16 in units of full width, as Zen 5 does, where Zen 4 takes a 512-bit
    /// instruction in two halves. The processors that do are told by AVX-VNNI, which they all have and those that do not lack.
    pub fn has_wide_dot(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.has_dot() && is_x86_feature_detected!("avxvnni");
        #[cfg(not(target_arch = "x86_64"))]
        return false;
    }

    /// Whether this machine multiplies pairs of bf16 ([`super::Arith::Dot`]) in this instruction set.
    pub fn has_dot(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Isa::Avx512 && self.detect() && is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        return false;
    }

    /// Panics unless this machine has the instruction set: what makes the dispatch below sound.
    pub(super) fn check(self) {
        assert!(
            self.detect(),
            "instruction set {self:?} is not on this machine; it has {:?}",
            Self::available()
        );
    }

    /// f32 lanes of one vector.
    pub const fn lanes(self) -> usize {
        match self {
            Isa::Portable => 4,
            Isa::Avx2 => 8,
            Isa::Avx512 => 16,
        }
    }

    /// Columns of a full register tile: two vectors. The last panel of a matrix may be half as wide.
    pub const fn nr(self) -> usize {
        2 * self.lanes()
    }

    /// Rows of a full register tile: what the registers hold (of the baseline, 16 on x86-64 and 32 elsewhere). Fewer
    /// rows have tiles of their own.
    pub const fn mr(self) -> usize {
        match self {
            Isa::Portable if cfg!(target_arch = "x86_64") => 4,
            Isa::Portable => 8,
            Isa::Avx2 => 6,
            Isa::Avx512 => 14,
        }
    }
}
