//! Disjoint rectangles of one matrix, for several threads.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

/// A rectangle of a row-major matrix that one thread writes.
pub struct Block<'a, T = f32> {
    ptr: *mut T,
    ld: usize,
    rows: usize,
    cols: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: a block is the only way to its elements, as `&mut [T]` is.
unsafe impl<T: Send> Send for Block<'_, T> {}

impl<'a, T> Block<'a, T> {
    /// The first `rows` rows and `cols` columns of `data`, whose rows are `ld` apart.
    pub fn new(data: &'a mut [T], ld: usize, rows: usize, cols: usize) -> Block<'a, T> {
        let need = rows.saturating_sub(1).saturating_mul(ld).saturating_add(cols);
        assert!(rows >= 1 && cols <= ld && data.len() >= need);
        Block { ptr: data.as_mut_ptr(), ld, rows, cols, life: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    pub(super) fn ld(&self) -> usize {
        self.ld
    }

    /// The first element.
    pub(super) fn ptr(&mut self) -> *mut T {
        self.ptr
    }

    /// Row `r` of the rectangle.
    #[inline]
    pub fn row(&mut self, r: usize) -> &mut [T] {
        assert!(r < self.rows);
        // SAFETY: row r of the rectangle is `cols` elements that only this block reaches, borrowed with it.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(r * self.ld), self.cols) }
    }
}

/// Rectangles that are remembered without an allocation.
const INLINE: usize = 64;

/// A row-major matrix (m, n) cut into rectangles of mb × nb (smaller at the edges), each of which can be taken once:
/// what lets rayon tasks write disjoint parts of one output.
pub struct Grid<'a, T = f32> {
    ptr: *mut T,
    m: usize,
    n: usize,
    mb: usize,
    nb: usize,
    /// A bit for each rectangle that was taken: those of the first 4096, and the others.
    taken: [AtomicU64; INLINE],
    more: Vec<AtomicU64>,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: shared access only takes blocks, each of them once, and blocks are disjoint.
unsafe impl<T: Send> Sync for Grid<'_, T> {}

impl<'a, T> Grid<'a, T> {
    /// Cuts `data`, of m · n elements.
    pub fn new(data: &'a mut [T], m: usize, n: usize, mb: usize, nb: usize) -> Grid<'a, T> {
        assert!(m.checked_mul(n) == Some(data.len()) && mb > 0 && nb > 0);
        let words = (m.div_ceil(mb) * n.div_ceil(nb)).div_ceil(64);
        let more = (INLINE..words).map(|_| AtomicU64::new(0)).collect();
        let taken = [const { AtomicU64::new(0) }; INLINE];
        Grid { ptr: data.as_mut_ptr(), m, n, mb, nb, taken, more, life: PhantomData }
    }

    /// Number of rectangles.
    pub fn count(&self) -> usize {
        self.m.div_ceil(self.mb) * self.n.div_ceil(self.nb)
    }

    /// Takes rectangle `index` (row by row): its first row, its first column, and itself. Panics the second time.
    pub fn take(&self, index: usize) -> (usize, usize, Block<'a, T>) {
        assert!(index < self.count(), "block {index} of a grid of {}", self.count());
        let (word, bit) = (index / 64, 1 << (index % 64));
        let word = self.taken.get(word).unwrap_or_else(|| &self.more[word - INLINE]);
        assert!(
            word.fetch_or(bit, Ordering::Relaxed) & bit == 0,
            "block {index} of the grid was taken before"
        );
        let across = self.n.div_ceil(self.nb);
        let (m0, n0) = (index / across * self.mb, index % across * self.nb);
        // SAFETY: m0 < m and n0 < n, so the offset is inside the matrix.
        let ptr = unsafe { self.ptr.add(m0 * self.n + n0) };
        let (rows, cols) = (self.mb.min(self.m - m0), self.nb.min(self.n - n0));
        (m0, n0, Block { ptr, ld: self.n, rows, cols, life: PhantomData })
    }
}
