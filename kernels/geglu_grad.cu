// dx = [dy · GELU(gate) | dy · value · GELU'(gate)] with x = [value | gate]. Grid: ceil(n / BLOCK); a thread owns one element
// of dy, and the two of dx that come from it.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct GegluGrad {
    T* dx;        // (rows,2E)
    const T* x;   // (rows,2E)
    const T* dy;  // (rows,E)
    long long n;  // rows·E
    int e;
};

extern "C" __global__ void __launch_bounds__(BLOCK) geglu_grad(const __grid_constant__ GegluGrad p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const long long row = i / p.e, at = row * 2 * p.e + (i - row * p.e);
    const float value = to_float(load(p.x + at)), gate = to_float(load(p.x + at + p.e)), dy = to_float(load(p.dy + i));
    store(p.dx + at, from_float<T>(dy * gelu_f(gate)));
    store(p.dx + at + p.e, from_float<T>(dy * value * slope_f(2, gate)));
}
