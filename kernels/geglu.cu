// y = value · GELU(gate), by the error function, with x = [value | gate] on the last axis. Grid: ceil(n / BLOCK); a thread owns
// one element of y.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct GegluFwd {
    T* y;        // (rows,E)
    const T* x;  // (rows,2E)
    long long n; // rows·E
    int e;
};

extern "C" __global__ void __launch_bounds__(BLOCK) geglu_fwd(const __grid_constant__ GegluFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const long long row = i / p.e, c = i - row * p.e;
    const T* x = p.x + row * 2 * p.e + c;
    store(p.y + i, from_float<T>(to_float(load(x)) * gelu_f(to_float(load(x + p.e)))));
}
