//! Which kernel computes an attention, in which variant, and how long by the model.

use super::super::prelude::*;
use super::SIXTEEN;
use crate::kernels::attention_f32 as floats;
use crate::kernels::attention_flash as flash;
use crate::kernels::attention_long as long;
use crate::kernels::attention_short as short;
use crate::kernels::attention_wide as wide;

/// The kernel files of this room.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Kernel {
    /// All types and head sizes, without tensor cores.
    Plain,
    /// f32, heads of up to 160.
    Floats,
    /// 16 bits, heads of up to 160.
    Flash,
    /// 16 bits, heads of 33 to 64, many queries and keys.
    Long,
    /// 16 bits, heads of up to 160, 65 to 128 keys.
    Short,
    /// 16 bits, heads of up to 512.
    Wide,
}

/// What computes an attention.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Choice {
    pub kernel: Kernel,
    /// As its file lists it.
    pub variant: &'static str,
    /// Queries of one block.
    pub queries: usize,
}

impl Choice {
    /// Keys and columns that it multiplies, both as it rounds them up; the columns of q kᵀ and of p v together.
    fn padded(&self, s: usize, d: usize) -> [usize; 2] {
        let tensor_cores = |columns: usize| 2 * columns;
        match self.kernel {
            Kernel::Plain => [s, 2 * d],
            Kernel::Floats => {
                [s.next_multiple_of(floats::BN.of(self.variant)), 2 * floats::D.of(self.variant)]
            }
            Kernel::Flash => {
                [s.next_multiple_of(flash::BN.of(self.variant)), tensor_cores(flash::D.of(self.variant))]
            }
            Kernel::Long => [s.next_multiple_of(long::BN), tensor_cores(long::D.of(self.variant))],
            Kernel::Short => [short::KEYS.of(self.variant), tensor_cores(short::D.of(self.variant))],
            Kernel::Wide => [s.next_multiple_of(wide::BN), tensor_cores(wide::D.of(self.variant))],
        }
    }

    /// The model: products by `mma.sync`, at three quarters of what long products reach (nine tenths where they overlap with
    /// exponentials), and seven tenths of the exponentials, 16 in a clock, which the products do not hide; as long as the
    /// multiprocessor with most blocks takes, 2 µs to begin and to end, and no shorter than `bytes` do. The float units reach
    /// 64 %, with four queries to a lane 52 %. Shares are measured (H100: heads of 40 and 80 of the flash kernel, of 40 of the
    /// long one, of 512 of the wide one, of 40 and 80 in f32).
    pub(super) fn microseconds(
        &self,
        blocks: usize,
        [t, s]: [usize; 2],
        d: usize,
        causal: bool,
        bytes: f64,
    ) -> f64 {
        let [keys, columns] = self.padded(s, d).map(|n| n as f64);
        let keys = if causal { (s - t) as f64 + t as f64 / 2.0 } else { keys };
        let rate = match self.kernel {
            Kernel::Plain => launch::PLAIN,
            Kernel::Floats => launch::FFMA * if floats::RM.of(self.variant) == 8 { 0.64 } else { 0.52 },
            Kernel::Wide => 0.44 * launch::MMA,
            Kernel::Long => 0.9 * launch::MMA,
            _ => 0.75 * launch::MMA,
        };
        let scores = self.queries as f64 * keys;
        let products = 2.0 * scores * columns / (rate / launch::MULTIPROCESSORS as f64);
        let each = blocks.div_ceil(launch::MULTIPROCESSORS) as f64;
        let exponentials = 0.7 * scores / 16.0 / launch::CLOCK;
        f64::max(each * (products + exponentials) + 2.0, launch::streaming(bytes, blocks)) + launch::GAP
    }
}

/// The kernel for a head size `d`, `t` queries and `s` keys in each of `n` heads, those of all images together. Tensor cores
/// want 16 bits and rows of whole 16-byte chunks.
pub(super) fn choose(dtype: DType, d: usize, [t, s]: [usize; 2], n: usize, causal: bool) -> Choice {
    let tensor_cores = SIXTEEN.contains(&dtype) && d.is_multiple_of(8);
    if dtype == DType::F32 && d.is_multiple_of(4) && d <= 160 {
        return by_floats(d);
    }
    match few_keys(d, [t, s], n) {
        Some(choice) if tensor_cores && !causal => choice,
        _ => any_keys(d, [t, s], n, tensor_cores),
    }
}

/// The kernel in f32. It wants rows of whole 16-byte chunks.
fn by_floats(d: usize) -> Choice {
    let variant = match d {
        ..=40 => "D=40",
        41..=64 => "D=64",
        65..=80 => "D=80",
        _ => "D=160",
    };
    Choice { kernel: Kernel::Floats, variant, queries: floats::BM.of(variant) }
}

/// The kernel that holds all keys and values at once, where it multiplies fewer numbers than the other, or as many: 80 or
/// 128 keys of its columns for theirs rounded up to 64 (96 columns at most) or 32.
fn few_keys(d: usize, [t, s]: [usize; 2], n: usize) -> Option<Choice> {
    let variant = match (s, d) {
        (65..=80, ..=40) => "KEYS=80,D=40",
        (65..=80, 41..=64) => "KEYS=80,D=64",
        (65..=80, 65..=80) => "KEYS=80,D=80",
        (65..=80, 136..=160) => "KEYS=80,D=160",
        (81..=128, 33..=40) => "KEYS=128,D=40",
        (81..=128, 41..=64) => "KEYS=128,D=64",
        (81..=128, 65..=80) => "KEYS=128,D=80",
        _ => return None,
    };
    // Keys and values are loaded less often while three blocks remain for each multiprocessor, which hide each other's
    // latencies, and while none gets more than a fiftieth more tiles than it must have.
    let (tiles, mut walk) = (t.div_ceil(short::BM), 1);
    let blocks = |walk: usize| n * tiles.div_ceil(walk);
    let most = |walk| blocks(walk).div_ceil(launch::MULTIPROCESSORS) * walk;
    let fits = |walk| blocks(walk) >= 3 * launch::MULTIPROCESSORS && 50 * most(walk) <= 51 * most(1);
    while walk < tiles && fits(2 * walk) {
        walk *= 2;
    }
    Some(Choice { kernel: Kernel::Short, variant, queries: walk * short::BM })
}

/// The kernel for any number of keys.
fn any_keys(d: usize, [t, s]: [usize; 2], n: usize, tensor_cores: bool) -> Choice {
    // Large blocks read keys and values half as often, if there are enough to give each multiprocessor of the largest
    // cards (132) the two that its registers hold; and the first scores and the last products, which nothing overlaps with, want
    // some turns between them.
    let many = n * t.div_ceil(128) >= 2 * 132 && s >= 4 * long::BN;
    let (kernel, variant, queries) = match d {
        ..=32 if tensor_cores => (Kernel::Flash, "BM=64,D=32", 64),
        ..=40 if tensor_cores && many => (Kernel::Long, "BM=128,D=40", 128),
        ..=40 if tensor_cores => (Kernel::Flash, "BM=64,D=40", 64),
        ..=64 if tensor_cores && many => (Kernel::Long, "BM=128,D=64", 128),
        ..=64 if tensor_cores => (Kernel::Flash, "BM=64,D=64", 64),
        ..=80 if tensor_cores => (Kernel::Flash, "BM=64,D=80", 64),
        ..=96 if tensor_cores => (Kernel::Flash, "BM=64,D=96", 64),
        ..=128 if tensor_cores => (Kernel::Flash, "BM=64,D=128", 64),
        ..=160 if tensor_cores => (Kernel::Flash, "BM=64,D=160", 64),
        ..=256 if tensor_cores => (Kernel::Wide, "D=256", 64),
        ..=384 if tensor_cores => (Kernel::Wide, "D=384", 64),
        ..=512 if tensor_cores => (Kernel::Wide, "D=512", 64),
        ..=64 => (Kernel::Plain, "D=64", 32),
        65..=160 => (Kernel::Plain, "D=160", 32),
        161..=512 => (Kernel::Plain, "D=512", 8),
        _ => (Kernel::Plain, "D=1024", 8),
    };
    Choice { kernel, variant, queries }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::attention as plain;

    #[test]
    fn every_head_size_has_a_variant_that_holds_it() {
        let sizes = (1..=1024).flat_map(|d| [64, 4096].map(|t| [d, t]));
        let sizes = sizes.flat_map(|[d, t]| [1, 64, 65, 77, 80, 81, 100, 128, 129].map(|s| [d, t, s]));
        for ([d, t, s], dtype) in sizes.flat_map(|sizes| DType::FLOATS.map(|dtype| (sizes, dtype))) {
            let Choice { kernel, variant, queries } = choose(dtype, d, [t, s], 16, false);
            let listed: &[&str] = match kernel {
                Kernel::Plain => plain::VARIANTS,
                Kernel::Floats => floats::VARIANTS,
                Kernel::Flash => flash::VARIANTS,
                Kernel::Long => long::VARIANTS,
                Kernel::Short => short::VARIANTS,
                Kernel::Wide => wide::VARIANTS,
            };
            let macros: Vec<(&str, usize)> = variant
                .split(',')
                .map(|m| m.split_once('=').map(|(k, v)| (k, v.parse().unwrap())).unwrap())
                .collect();
            let of = |name| macros.iter().find(|(k, _)| *k == name).map(|(_, v)| *v);
            assert!(
                listed.contains(&variant) && d <= of("D").unwrap(),
                "{dtype:?} {d}: {kernel:?} {variant}"
            );
            assert_eq!(of("BM").unwrap_or(queries), queries, "{variant}");
            assert!(kernel != Kernel::Wide || queries == wide::BM, "{variant}");
            if kernel == Kernel::Short {
                let (fewest, most) = (short::FEWEST.of(variant), short::KEYS.of(variant));
                assert!(fewest < s && s <= most && queries % short::BM == 0, "{s} keys: {variant}");
            }
            let fits = match kernel {
                Kernel::Plain => true,
                Kernel::Floats => dtype == DType::F32 && d % 4 == 0,
                _ => dtype != DType::F32 && d % 8 == 0 && d <= 512,
            };
            assert!(fits, "{dtype:?} {d}");
        }
    }

    #[test]
    fn what_the_models_run() {
        use Kernel::{Flash, Floats, Long, Plain, Wide};
        // Heads × images, head size, queries; to themselves.
        let table = [
            ("SD 1.5, 64×64", 16, 40, 4096, Long, "BM=128,D=40"),
            ("SD 1.5, 32×32", 16, 80, 1024, Flash, "BM=64,D=80"),
            ("SD 1.5, 16×16", 16, 160, 256, Flash, "BM=64,D=160"),
            ("SD 1.5, 8×8", 16, 160, 64, Flash, "BM=64,D=160"),
            ("SDXL, 64×64", 20, 64, 4096, Long, "BM=128,D=64"),
            ("SDXL, 32×32", 40, 64, 1024, Long, "BM=128,D=64"),
            ("LDM 1.45B, 32×32", 16, 40, 1024, Flash, "BM=64,D=40"),
            ("many of few tokens", 2000, 64, 192, Flash, "BM=64,D=64"),
            ("LDM with heads of 32", 14, 32, 4096, Flash, "BM=64,D=32"),
            ("LDM on ImageNet, one head", 2, 384, 1024, Wide, "D=384"),
            ("LDM on ImageNet, one head", 2, 960, 64, Plain, "D=1024"),
            ("autoencoder", 1, 512, 4096, Wide, "D=512"),
        ];
        for (name, n, d, t, kernel, variant) in table {
            for dtype in SIXTEEN {
                let got = choose(dtype, d, [t, t], n, false);
                assert_eq!((got.kernel, got.variant), (kernel, variant), "{name}, {dtype:?}");
            }
            let by_floats = if d <= 160 { Floats } else { Plain };
            assert_eq!(choose(DType::F32, d, [t, t], n, false).kernel, by_floats, "{name}");
        }
        let of = |dtype, d| choose(dtype, d, [4096, 77], 16, false);
        assert_eq!([40, 64, 72, 96].map(|d| of(DType::F32, d).variant), ["D=40", "D=64", "D=80", "D=160"]);
        assert_eq!(
            (of(DType::BF16, 44).kernel, of(DType::F32, 42).kernel),
            (Plain, Plain),
            "no whole chunks"
        );
        assert_eq!(choose(DType::F16, 64, [77, 77], 24, true), any_keys(64, [77, 77], 24, true), "CLIP");
    }

    #[test]
    fn what_the_models_run_to_a_text() {
        // Heads × images, head size, queries, keys: variant, tiles of a block.
        let table = [
            ("SD 1.5, 64×64", 16, 40, 4096, 77, "KEYS=80,D=40", 2),
            ("SD 1.5, 64×64, eight images", 128, 40, 4096, 77, "KEYS=80,D=40", 16),
            ("SD 1.5, 32×32", 16, 80, 1024, 77, "KEYS=80,D=80", 1),
            ("SD 1.5, 16×16", 16, 160, 256, 77, "KEYS=80,D=160", 1),
            ("SD 1.5, 8×8", 16, 160, 64, 77, "KEYS=80,D=160", 1),
            ("SD 2, 96×96", 10, 64, 9216, 77, "KEYS=80,D=64", 1),
            ("SDXL, 64×64", 20, 64, 4096, 77, "KEYS=80,D=64", 2),
            ("SDXL, 32×32", 40, 64, 1024, 77, "KEYS=80,D=64", 1),
            ("LDM 1.45B's transformer", 16, 64, 77, 77, "KEYS=80,D=64", 1),
            ("the small checkpoint", 4, 16, 64, 77, "KEYS=80,D=40", 1),
            ("100 keys", 16, 64, 4096, 100, "KEYS=128,D=64", 2),
        ];
        for (name, n, d, t, s, variant, walk) in table {
            let want = Choice { kernel: Kernel::Short, variant, queries: walk * short::BM };
            for dtype in SIXTEEN {
                assert_eq!(choose(dtype, d, [t, s], n, false), want, "{name}");
            }
        }
        // Fewer products with the keys in blocks of 64 and 32.
        for (d, s) in [(40, 64), (32, 100), (96, 77), (128, 77), (160, 64), (160, 81), (64, 129), (64, 154)] {
            let got = choose(DType::BF16, d, [1024, s], 16, false);
            assert_eq!(got.kernel, Kernel::Flash, "{s} keys of {d}");
        }
    }

    #[test]
    fn keys_on_chip_are_never_predicted_slower() {
        let sizes = (1..=20).flat_map(|d| (1..=150).map(move |s| (8 * d, s)));
        for ((d, s), t) in sizes.flat_map(|sizes| [16, 64, 256, 1024, 4096].map(|t| (sizes, t))) {
            for n in [8, 16, 20, 40, 128] {
                let Some(own) = few_keys(d, [t, s], n) else { continue };
                let other = any_keys(d, [t, s], n, true);
                let time = |choice: Choice| {
                    choice.microseconds(n * t.div_ceil(choice.queries), [t, s], d, false, 0.0)
                };
                // What the model leaves out, loads of keys and values, pays for the fiftieth.
                assert!(
                    time(own) <= 1.02 * time(other),
                    "{n} heads of {d}, {t} queries, {s} keys: {own:?} {} us, {other:?} {} us",
                    time(own),
                    time(other)
                );
            }
        }
    }
}
