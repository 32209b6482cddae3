// y = columns start … start + len - 1 of x. Grid: ceil(n / BLOCK); a thread owns one element of y.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct ConcatSlice {
    T* y;         // (rows,LEN)
    const T* x;   // (rows,C)
    long long n;  // rows·LEN
    int len, c, start;
};

extern "C" __global__ void __launch_bounds__(BLOCK) concat_slice(const __grid_constant__ ConcatSlice p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const long long row = i / p.len;
    store(p.y + i, load(p.x + row * p.c + p.start + (i - row * p.len)));
}
