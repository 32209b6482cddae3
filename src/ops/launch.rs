//! What a launch will be, known without a device: kernel, grid, and how long it should take on a Hopper card.
//!
//! Floors take the card's best: 790 TFLOP/s by `wgmma`, of which `mma.sync` is taken to reach 470, and 4.3 TB/s. What our own
//! kernels reach of it was measured on an H100, where rooms say so. The predictions order choices, and show a shape that becomes
//! worse.

use super::{Case, Cost, Op, ROOMS};
use crate::error::Result;
use crate::kernels::{Kernel, RESOURCES, Resource};
use crate::tensor::{DType, Spec};

/// Multiprocessors of an H100 and an H200.
pub const MULTIPROCESSORS: usize = 132;

/// Clocks in a microsecond, with busy tensor cores.
pub(super) const CLOCK: f64 = 1720.0;

/// FLOP in a microsecond by `mma.sync` on 16-bit types, on the whole card.
pub const MMA: f64 = 470e6;

/// FLOP in a microsecond on 16-bit types by the best instructions that the card has.
const PEAK: f64 = 790e6;

/// FLOP in a microsecond in f32 by float units, on the whole card: 128 of them in a multiprocessor of compute capability 9.0
/// (CUDA C++ Programming Guide, "Arithmetic Instructions": 128 results of a 32-bit multiply-add per clock).
pub const FFMA: f64 = 2.0 * 128.0 * MULTIPROCESSORS as f64 * CLOCK;

/// FLOP in a microsecond by a kernel that uses no tensor cores: a guess, a sixth of what the float units could do.
pub(super) const PLAIN: f64 = 10e6;

/// Bytes in a microsecond, read and written: of memory, and of the second-level cache for what fits into it.
pub(super) const MEMORY: f64 = 4.3e6;
const CACHE: f64 = 5.5e6;
const CACHED: f64 = 40e6;

/// Microseconds between the end of a kernel's work and the start of the next one's, within a captured graph.
pub(super) const GAP: f64 = 1.5;

/// One launch of a kernel.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LaunchPlan {
    /// Kernel file, without folder and extension.
    pub stem: &'static str,
    /// Kernel.
    pub kernel: &'static str,
    /// Element type that it is compiled for.
    pub dtype: DType,
    /// Variant of the file, or empty.
    pub variant: &'static str,
    /// Blocks of the grid.
    pub blocks: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Parts that the sums are split into; 1 where they are not.
    pub splits: usize,
    /// Predicted time.
    pub microseconds: f64,
}

impl LaunchPlan {
    /// A launch as [`crate::backend::cuda::Call::launch`] makes it, without splits.
    pub(super) fn new<P>(
        kernel: Kernel<P>,
        dtype: DType,
        variant: &'static str,
        grid: [usize; 3],
        threads: usize,
        microseconds: f64,
    ) -> LaunchPlan {
        let (stem, kernel, blocks) = (kernel.stem(), kernel.name(), grid.iter().product());
        LaunchPlan { stem, kernel, dtype, variant, blocks, threads, splits: 1, microseconds }
    }

    /// What the compiler says that the kernel needs on an architecture such as `sm_90`; `None` where it was not compiled.
    pub fn resource(&self, arch: &str) -> Option<&'static Resource> {
        let types = self.dtype.name();
        let own = |r: &&Resource| (r.stem, r.kernel, r.variant) == (self.stem, self.kernel, self.variant);
        RESOURCES.iter().filter(own).find(|r| r.types == types && r.arch == arch)
    }
}

/// Blocks of a kernel that fit onto one multiprocessor of sm_90: 65,536 registers in units of 256 per warp, 2,048
/// threads, 32 blocks, and 228 KB of shared memory, of which each block takes 1 KB more than it asks for.
pub fn occupancy(r: &Resource, threads: usize) -> usize {
    let warps = threads.div_ceil(32);
    let registers = (r.registers as usize * 32).next_multiple_of(256) * warps;
    let smem = (r.smem as usize).next_multiple_of(128) + 1024;
    (65536 / registers.max(1)).min(2048 / (warps * 32).max(1)).min(228 * 1024 / smem).min(32)
}

/// Microseconds in which so many blocks read and write these bytes once. What a multiprocessor that has no block could
/// have moved is lost.
pub(super) fn streaming(bytes: f64, blocks: usize) -> f64 {
    let share = (blocks as f64 / MULTIPROCESSORS as f64).min(1.0);
    bytes / (share * if bytes < CACHED { CACHE } else { MEMORY }) + GAP
}

/// Elements of a row that a thread takes at once where rows of all these lengths lie side by side: 16 bytes of them if all are
/// multiples of that, else one. Kernels choose alike.
pub(super) fn at_once(dtype: DType, lengths: &[usize]) -> usize {
    let most = 16 / dtype.size();
    if lengths.iter().all(|n| n.is_multiple_of(most)) { most } else { 1 }
}

/// Microseconds below which no kernel does this work: the best instructions at the rate that they sustain, or the
/// memory's.
pub fn floor(cost: Cost) -> f64 {
    f64::max(cost.flops / PEAK, cost.bytes / MEMORY)
}

/// Microseconds below which no kernel does it by `mma.sync`.
pub fn mma_floor(cost: Cost) -> f64 {
    f64::max(cost.flops / MMA, cost.bytes / MEMORY)
}

/// Microseconds below which no kernel does it in f32 by float units.
pub fn f32_floor(cost: Cost) -> f64 {
    f64::max(cost.flops / FFMA, cost.bytes / MEMORY)
}

/// Kernels that an op launches, and the predicted time of all of them. A room that does not say is taken to launch
/// one plain kernel.
pub fn predict(op: &Op, x: &[Spec]) -> Result<(usize, f64)> {
    let plans = op.launches(x);
    if plans.is_empty() {
        let cost = op.cost(x, &op.infer(x)?);
        return Ok((1, f64::max(streaming(cost.bytes, MULTIPROCESSORS), cost.flops / PLAIN + GAP)));
    }
    Ok((plans.len(), plans.iter().map(|p| p.microseconds).sum()))
}

/// A real shape of a room, and what is planned for it.
#[derive(Clone, Debug)]
pub struct Planned {
    /// [`super::Operation::NAME`].
    pub room: &'static str,
    /// [`Case::title`].
    pub shape: String,
    /// Its work.
    pub cost: Cost,
    /// What it launches; empty where the room does not say.
    pub launches: Vec<LaunchPlan>,
    /// [`predict`], microseconds.
    pub microseconds: f64,
}

/// Every real shape that the rooms list, in the order of the rooms, for a type.
///
/// # Errors
/// When a room refuses a case of its own.
pub fn planned(t: DType) -> Result<Vec<Planned>> {
    let mut all = vec![];
    for room in ROOMS {
        for case in (room.cases)().into_iter().filter(|c: &Case| c.bench && c.types.contains(&t)) {
            let x = case.specs(t);
            let cost = case.op.cost(&x, &case.op.infer(&x)?);
            let (launches, microseconds) = (case.op.launches(&x), predict(&case.op, &x)?.1);
            all.push(Planned { room: room.name, shape: case.title(), cost, launches, microseconds });
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(registers: u32, smem: u32) -> Resource {
        let (stem, types, variant, arch, kernel) = ("x", "bf16", "", "sm_90", "x_fwd");
        let (stack, spill_stores, spill_loads) = (0, 0, 0);
        Resource { stem, types, variant, arch, kernel, registers, smem, stack, spill_stores, spill_loads }
    }

    #[test]
    fn what_limits_the_blocks_of_a_multiprocessor() {
        for (registers, smem, threads, want) in [
            (32, 0, 256, 8),
            (254, 0, 128, 2),
            (255, 73728, 128, 2),
            (128, 0, 128, 4),
            (96, 0, 128, 5),
            (32, 232448, 128, 1),
            (32, 100 * 1024, 128, 2),
            (16, 0, 32, 32),
        ] {
            assert_eq!(occupancy(&resource(registers, smem), threads), want, "{registers} {smem} {threads}");
        }
    }
}
