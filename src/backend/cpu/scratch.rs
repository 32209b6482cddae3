//! Working memory that threads keep: fresh pages cost more than the arithmetic that would fill them.

use crate::backend::Memory;
use std::alloc::{Layout, handle_alloc_error};
use std::cell::RefCell;

thread_local! {
    static POOL: RefCell<Vec<Memory>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` floats that start on a cache line and hold anything.
pub fn scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let bytes = len * size_of::<f32>();
    let kept = POOL.with_borrow_mut(|pool| {
        let fits = |i: &usize| pool[*i].bytes().len() >= bytes;
        // The smallest that is large enough.
        let best = (0..pool.len()).filter(fits).min_by_key(|&i| pool[i].bytes().len());
        best.map(|i| pool.swap_remove(i))
    });
    let mut memory = kept.unwrap_or_else(|| {
        // The largest makes room for a larger one, so that a thread keeps no more buffers than calls were nested.
        POOL.with_borrow_mut(|pool| {
            let largest = (0..pool.len()).max_by_key(|&i| pool[i].bytes().len());
            largest.map(|i| pool.swap_remove(i))
        });
        Memory::new(bytes).unwrap_or_else(|_| handle_alloc_error(Layout::new::<f32>()))
    });
    let result = f(&mut bytemuck::cast_slice_mut(memory.bytes_mut())[..len]);
    POOL.with_borrow_mut(|pool| pool.push(memory));
    result
}
