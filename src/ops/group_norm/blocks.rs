//! How the pixels, groups and statistics of a group norm are shared out on a GPU, where statistics are given.

use super::super::group_stats::SLAB;
use super::super::launch;
use crate::kernels::group_norm_apply as apply;

/// Most slabs of an image that every block of the apply kernel merges itself. In a 16-bit type it then reads as many bytes of
/// statistics as of 256 pixels; of more slabs, more than a launch costs.
const MERGED_IN_PLACE: usize = 64;

/// How many slabs of equal size are left to the apply kernel of `slabs`: all of them, or the most that divide them and are
/// no more than 16, or than 64 where there are more than 16 · 64. On an H200 a norm of 4096 slabs takes 8 µs less with 64 left than
/// with 16, one of 1024 slabs 1 µs less with 256 channels and 2 µs more with 512, one of 256 slabs 2 µs more
/// (`benches/measured/h200-group-norm.tsv`).
pub(super) fn slabs_kept(slabs: usize) -> usize {
    if slabs <= MERGED_IN_PLACE {
        return slabs;
    }
    let most = if slabs > 16 * 64 { 64 } else { 16 };
    (1..=most).rev().find(|&n| slabs.is_multiple_of(n)).unwrap_or(1)
}

/// The variant of the apply kernel for images of `slabs`: wide strips where blocks are left few slabs of many to merge. By
/// measurements in bf16; f32, of which 32 channels are a whole line too, goes along.
pub(super) fn variant(slabs: usize) -> &'static str {
    if slabs > MERGED_IN_PLACE { "STRIP=64" } else { "STRIP=32" }
}

/// Warps of the apply kernel that merge the statistics of a group, and slabs that they take at a time, of `count` of a group of
/// `cpg` channels of c: as few as hold all entries at once, a channel to a thread, and no more than the block has for each group
/// that a strip of `strip` channels touches.
pub(super) fn team(strip: usize, c: usize, cpg: usize, count: usize) -> (usize, usize) {
    let strips = (0..c).step_by(strip);
    let groups = |first: usize| ((first + strip).min(c) - 1) / cpg - first / cpg + 1;
    let most = strips.map(groups).max().unwrap_or(1);
    let phases = |warps: usize| (warps * 32 / cpg).max(1);
    let enough = |warps: usize| warps * 32 >= cpg && count <= apply::ENTRIES * phases(warps);
    let mut warps = 1;
    while !enough(warps) && 2 * warps * most <= apply::BLOCK / 32 {
        warps *= 2;
    }
    (warps, phases(warps))
}

/// Pixels of a block of the apply kernel, of `hw` in an image, where `strips` blocks lie side by side. An H100 has 132
/// multiprocessors, and room for two blocks on each: whatever comes after those begins with statistics again. So that number of
/// blocks to a strip for which the turns take least, of no fewer pixels than a slab has, and of no more than 1024: on an H200, images
/// from 256×256 on took up to 13 % longer in one turn of longer blocks in strips of 32; in strips of 64, blocks of up to 2048 took
/// as long, or 2 % less (`benches/measured/h200-group-norm.tsv`).
pub(super) fn rows_per_block(hw: usize, strips: usize) -> usize {
    const AT_ONCE: usize = 2 * launch::MULTIPROCESSORS;
    const MOST: usize = 1024;
    // Most blocks of a grid on its second axis.
    const GRID: usize = 65535;
    // Pixels that a block could stream while it merges statistics.
    const MERGE: usize = 400;
    let rows = |blocks: usize| hw.div_ceil(blocks);
    let turns = |blocks: usize| (strips * blocks).div_ceil(AT_ONCE) * (MERGE + rows(blocks));
    let [fewest, most] = [MOST, SLAB].map(|rows| hw.div_ceil(rows).clamp(1, GRID));
    let blocks = fewest..=most;
    blocks.min_by_key(|&blocks| turns(blocks)).map_or(hw, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_and_slabs_for_the_real_shapes() {
        // (batch, HW, C): pixels of a block, slabs that it merges, channels of a strip.
        let of = |[b, hw, c]: [usize; 3]| {
            let (slabs, strip) = (hw / SLAB, apply::STRIP.of(variant(hw / SLAB)));
            (rows_per_block(hw, b * c.div_ceil(strip)), slabs_kept(slabs), strip)
        };
        let sd15 = [[2, 4096, 320], [2, 1024, 640], [2, 256, 1280], [2, 64, 1280], [2, 64, 2560]];
        assert_eq!(sd15.map(of), [(316, 64, 32), (171, 16, 32), (86, 4, 32), (64, 1, 32), (64, 1, 32)]);
        let decoder = [[1, 4096, 512], [1, 16384, 512], [1, 65536, 256], [1, 262144, 128]];
        assert_eq!(decoder.map(of), [(256, 64, 32), (497, 16, 64), (993, 16, 64), (993, 64, 64)]);
        // 768×768, a prime number of slabs, and one image of one slab; about the number from which on more are left.
        assert_eq!([144, 67, 1].map(slabs_kept), [16, 1, 1]);
        assert_eq!([1024, 1031, 1040].map(slabs_kept), [16, 1, 52]);
    }

    #[test]
    fn teams_for_the_real_shapes() {
        // (channels, those of a group, slabs): warps that merge a group, slabs that they take at a time.
        let of = |strip| move |[c, cpg, count]: [usize; 3]| team(strip, c, cpg, count);
        let sd15 =
            [[320, 10, 64], [960, 30, 64], [640, 20, 16], [1920, 60, 16], [1280, 40, 4], [2560, 80, 1]];
        assert_eq!(sd15.map(of(32)), [(2, 6), (4, 4), (1, 1), (2, 1), (2, 1), (4, 1)]);
        assert_eq!(
            [[128, 4, 64], [256, 8, 16], [512, 16, 16]].map(of(64)),
            [(1, 8), (1, 4), (1, 2)]
        );
        assert_eq!(of(32)([512, 16, 64]), (2, 4));
        // A group for each channel, one for all of them, and one of more channels than threads.
        assert_eq!([[320, 1, 64], [320, 320, 64], [640, 640, 1]].map(of(32)), [(1, 32), (16, 1), (16, 1)]);
    }
}
