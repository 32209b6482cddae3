//! The command line: parse, run, exit code.

use ldm::cli::Heap;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use std::alloc::System;

/// The system's allocator, counted: a few atomic additions per allocation. `ldm bench` reports the counts.
#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn main() -> std::process::ExitCode {
    ldm::cli::main(|| {
        let s = HEAP.stats();
        Heap {
            allocations: s.allocations + s.reallocations,
            allocated: s.bytes_allocated,
            freed: s.bytes_deallocated,
        }
    })
}
