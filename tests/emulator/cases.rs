//! The wrong kernels of `bad`, each with its right twin: how they are run, what they should compute, what must be said of the wrong one.

/// One of them.
pub struct Case {
    pub stem: &'static str,
    pub n: usize,
    pub per_thread: usize,
    /// Bytes of dynamic shared memory that the launch passes.
    pub shared: u32,
    /// Whether it is launched behind its right twin, and may start before that has ended.
    pub programmatic: bool,
    /// Whether its arguments begin with a tensor map of x.
    pub mapped: bool,
    /// A word of the report that a violation must carry; empty where only the values betray it.
    pub says: &'static str,
    pub want: fn(&[f32], usize) -> f32,
}

/// With a thread for each `per_thread` elements.
pub const fn case(
    stem: &'static str,
    n: usize,
    per_thread: usize,
    says: &'static str,
    want: fn(&[f32], usize) -> f32,
) -> Case {
    Case { stem, n, per_thread, shared: 0, programmatic: false, mapped: false, says, want }
}

const fn mapped(stem: &'static str, says: &'static str) -> Case {
    Case { mapped: true, ..case(stem, 4096, 8, says, |x, i| x[i]) }
}

/// Blocks of 256 the other way round.
fn reversed(x: &[f32], i: usize) -> f32 {
    x[i / 256 * 256 + 255 - i % 256]
}

fn ring(x: &[f32], i: usize, by: usize, size: usize) -> f32 {
    x[i / size * size + (i + by) % size]
}

/// Eight steps through the blocks, from the own one on, each times its step.
fn steps(x: &[f32], i: usize) -> f32 {
    (0..8).map(|k| (k + 1) as f32 * reversed(x, (i + 256 * k) % x.len())).sum()
}

/// Element `i` of a block, as ldmatrix brings it to the lanes and each warp keeps half a matrix.
fn permuted(x: &[f32], i: usize) -> f32 {
    let t = i % 256;
    x[i - t + t / 64 * 64 + 2 * (t % 32) + t / 32 % 2]
}

/// All of them.
pub const CASES: &[Case] = &[
    case("missing_barrier", 1024, 1, "", reversed),
    case("missing_second_barrier", 1024, 1, "", |x, i| ring(x, i, 3, 256)),
    case("store_past_end", 1000, 1, "past the end", |x, i| 2.0 * x[i]),
    case("load_past_end", 1000, 1, "past the end", |x, i| x[(i + 1).min(999)]),
    case("load_before_start", 1000, 1, "before the allocation", |x, i| x[i.max(1) - 1]),
    case("unchecked_tail", 1000, 1, "past the end", |x, i| x[i]),
    case("unchecked_vector_tail", 1002, 4, "past the end", |x, i| x[i]),
    case("smem_never_written", 1024, 1, "", |x, i| ring(x, i, 1, 256)),
    case("smem_not_zeroed", 1024, 1, "", |x, i| x[i] + 1.0),
    case("smem_overflow", 1024, 1, "past the block's", |x, i| x[i]),
    case("divergent_barrier", 1024, 1, "sync_block", reversed),
    case("two_barriers", 1024, 1, "divergent barrier", reversed),
    case("barrier_count", 1024, 1, "sync_block", reversed),
    case("early_exit", 1000, 1, "block_sum", |x, i| {
        let block = &x[i / 256 * 256..1000.min((i / 256 + 1) * 256)];
        x[i] / block.iter().sum::<f32>()
    }),
    case("misaligned_load", 1000, 4, "misaligned", |x, i| x[if i < 996 { i + 1 } else { i }]),
    case("misaligned_store", 1000, 4, "misaligned", |x, i| if i == 0 { 0.0 } else { x[i - 1] }),
    case("inactive_lanes", 1024, 1, "shfl_down", |x, i| x[i] + if i % 32 < 16 { x[i + 16] } else { 0.0 }),
    case("missing_warp_barrier", 1024, 1, "", |x, i| ring(x, i, 1, 32)),
    case("reads_output", 1000, 1, "nothing has written", |x, i| x[i] + 1.0),
    case("deadlock", 1024, 1, "", |x, i| x[i] + x[i ^ 1]),
    case("block_race", 1000, 1, "", |x, i| if i == 0 { 4.0 } else { x[i] }),
    case("plain_pointer", 1000, 1, "plain pointer", |x, i| x[i]),
    case("late_copy_wait", 1024, 1, "", reversed),
    case("missing_commit", 1024, 1, "", reversed),
    case("wait_without_barrier", 1024, 1, "", reversed),
    case("wait_count", 1024, 1, "", steps),
    case("ring_reuse", 1024, 1, "", steps),
    case("copies_at_exit", 1024, 1, "exits and has not waited", |x, i| 2.0 * x[i]),
    case("misaligned_copy", 1024, 1, "misaligned cp_async", reversed),
    case("copy_past_end", 1024, 1, "outside the block's", reversed),
    case("shared_past_end", 1024, 1, "outside the block's", reversed),
    case("misaligned_shared", 1024, 1, "misaligned load_shared", reversed),
    case("misaligned_matrix", 1024, 1, "misaligned ldmatrix", permuted),
    case("diverged_matrix", 1024, 1, "ldmatrix", permuted),
    case("diverged_mma", 1024, 1, "diverged warp", |x, i| 16.0 * x[i]),
    case("wgmma_no_proxy_fence", 4096, 8, "no fence_proxy_async", |x, i| x[i]),
    case("wgmma_no_fence", 4096, 8, "without a wgmma_fence", |x, i| x[i]),
    case("wgmma_early_read", 4096, 8, "", |x, i| x[i]),
    case("wgmma_overwritten", 4096, 8, "", |x, i| x[i]),
    mapped("tensor_no_wait", "has not waited for its phase"),
    mapped("tensor_wrong_phase", ""),
    mapped("tensor_bytes", "0 of 1 arrivals and 128 bytes in phase 0"),
    mapped("tensor_no_bytes", "128 bytes more than mbarrier_expect"),
    mapped("tensor_no_fence", "no fence_mbarriers since"),
    mapped("tensor_no_barrier", "has been met in"),
    mapped("tensor_no_proxy_fence", "no fence_proxy_async since"),
    mapped("tensor_misaligned", "want a multiple of 1024"),
    mapped("tensor_at_exit", "nobody has waited for 1 of its tensor copies"),
    Case { shared: 65536, ..case("dynamic_size", 1024, 1, "65536 bytes", reversed) },
    Case {
        programmatic: true,
        ..case("reads_before_wait", 1000, 1, "before griddep_wait", |x, i| x[i] + 1.0)
    },
    Case { programmatic: true, ..case("never_waits", 1000, 1, "has not waited", |x, i| x[i] + 1.0) },
    case("block_order", 1024, 1, "", |x, i| (i % 256..=i).step_by(256).map(|k| x[k]).sum()),
];
