// y = value · GELU(gate), by the error function, with x = [value | gate] on the last axis. Grid: ceil(n / BLOCK); a thread owns
// N elements of a row of y: 16 bytes where E is a multiple of them, else one. Wants: pointers aligned to 16 bytes.
// Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct GegluFwd {
    T* y;        // (rows,E)
    const T* x;  // (rows,2E)
    int n;       // rows·E / N
    int e;
};

template <int N>
DEV void gated(const GegluFwd& p) {
    const unsigned i = block_x() * BLOCK + thread_x(), per_row = p.e / N;
    if (i >= unsigned(p.n)) return;
    const unsigned row = i / per_row;
    const T* x = p.x + (long long)row * 2 * p.e + (i - row * per_row) * N;
    const Vec<T, N> value = load<N>(x), gate = load<N>(x + p.e);
    Vec<T, N> y;
    UNROLL
    for (int k = 0; k < N; k++) y[k] = from_float<T>(to_float(value[k]) * gelu_f(to_float(gate[k])));
    store(p.y + (long long)i * N, y);
}

extern "C" __global__ void __launch_bounds__(BLOCK) geglu_fwd(const __grid_constant__ GegluFwd p) {
    griddep_wait();
    if (p.e % vec_width<T> == 0) {
        gated<vec_width<T>>(p);
    } else {
        gated<1>(p);
    }
}
