// y = [a | b] on the last axis. Grid: ceil(n / BLOCK); a thread owns N elements of a row of y: 16 bytes where A and B are multiples
// of them, else one. Wants: pointers aligned to 16 bytes. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct ConcatFwd {
    T* y;         // (rows,A+B)
    const T* a;   // (rows,A)
    const T* b;   // (rows,B)
    int n;        // rows·(A+B) / N
    int a_len, b_len;  // A, B
};

template <int N>
DEV void join(const ConcatFwd& p) {
    const unsigned i = block_x() * BLOCK + thread_x(), per_row = (p.a_len + p.b_len) / N;
    if (i >= unsigned(p.n)) return;
    const long long row = i / per_row;
    const int c = int(i - unsigned(row) * per_row) * N;
    const T* from = c < p.a_len ? p.a + row * p.a_len + c : p.b + row * p.b_len + (c - p.a_len);
    store(p.y + (long long)i * N, load<N>(from));
}

extern "C" __global__ void __launch_bounds__(BLOCK) concat_fwd(const __grid_constant__ ConcatFwd p) {
    griddep_wait();
    if (p.a_len % vec_width<T> == 0 && p.b_len % vec_width<T> == 0) {
        join<vec_width<T>>(p);
    } else {
        join<1>(p);
    }
}
