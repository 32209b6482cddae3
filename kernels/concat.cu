// y = [a | b] on the last axis. Grid: ceil(n / BLOCK); a thread owns one element of y.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct ConcatFwd {
    T* y;         // (rows,A+B)
    const T* a;   // (rows,A)
    const T* b;   // (rows,B)
    long long n;  // rows·(A+B)
    int a_len, b_len;  // A, B
};

extern "C" __global__ void __launch_bounds__(BLOCK) concat_fwd(const __grid_constant__ ConcatFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const int len = p.a_len + p.b_len;
    const long long row = i / len;
    const int c = int(i - row * len);
    store(p.y + i, c < p.a_len ? load(p.a + row * p.a_len + c) : load(p.b + row * p.b_len + (c - p.a_len)));
}
