// y = columns start … start + len - 1 of x. Grid: ceil(n / BLOCK); a thread owns N elements of a row of y: 16 bytes where LEN, C and
// `start` are multiples of them, else one. Wants: pointers aligned to 16 bytes,
// 0 <= start, start + LEN <= C. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct ConcatSlice {
    T* y;         // (rows,LEN)
    const T* x;   // (rows,C)
    int n;        // rows·LEN / N
    int len, c, start;
};

template <int N>
DEV void cut(const ConcatSlice& p) {
    const unsigned i = block_x() * BLOCK + thread_x(), per_row = p.len / N;
    if (i >= unsigned(p.n)) return;
    const unsigned row = i / per_row;
    store(p.y + (long long)i * N, load<N>(p.x + (long long)row * p.c + p.start + (i - row * per_row) * N));
}

extern "C" __global__ void __launch_bounds__(BLOCK) concat_slice(const __grid_constant__ ConcatSlice p) {
    griddep_wait();
    if (p.len % vec_width<T> == 0 && p.c % vec_width<T> == 0 && p.start % vec_width<T> == 0) {
        cut<vec_width<T>>(p);
    } else {
        cut<1>(p);
    }
}
