//! Working memory that threads keep: fresh pages cost more than the arithmetic that would fill them.

use std::cell::RefCell;

/// Floats of one cache line.
const LINE: usize = 16;

thread_local! {
    static POOL: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` floats that start on a cache line and hold anything.
pub fn scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let fits = |data: &Vec<f32>| data.len() >= len + LINE - 1;
    let kept = POOL.with_borrow_mut(|pool| {
        // The smallest that is large enough.
        let best = (0..pool.len()).filter(|&i| fits(&pool[i])).min_by_key(|&i| pool[i].len());
        best.map(|i| pool.swap_remove(i))
    });
    let mut data = kept.unwrap_or_else(|| {
        // The largest makes room for a larger one, so that a thread keeps no more buffers than calls were nested.
        POOL.with_borrow_mut(|pool| {
            let largest = (0..pool.len()).max_by_key(|&i| pool[i].len());
            largest.map(|i| pool.swap_remove(i))
        });
        vec![0.0; len + LINE - 1]
    });
    let start = data.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE - 1);
    let result = f(&mut data[start..start + len]);
    POOL.with_borrow_mut(|pool| pool.push(data));
    result
}
