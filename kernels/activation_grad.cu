// dx = dy · act'(x), elementwise. Grid: ceil(n / (BLOCK · N)); a thread owns N elements, 16 bytes of dx, or fewer at
// the end. dx may be dy's memory. Wants: pointers aligned to 16 bytes. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct ActivationGrad {
    T* dx;        // (n)
    const T* x;   // (n)
    const T* dy;  // (n)
    long long n;
    int act;      // as in activation.cu
};

extern "C" __global__ void __launch_bounds__(BLOCK) activation_grad(const __grid_constant__ ActivationGrad p) {
    griddep_wait();
    constexpr int N = vec_width<T>;
    const long long i = ((long long)block_x() * BLOCK + thread_x()) * N;
    if (i + N <= p.n) {
        const Vec<T, N> x = load<N>(p.x + i);
        Vec<T, N> d = load<N>(p.dy + i);
        UNROLL
        for (int k = 0; k < N; k++) d[k] = from_float<T>(to_float(d[k]) * slope_f(p.act, to_float(x[k])));
        store(p.dx + i, d);
    } else {
        for (long long k = i; k < p.n; k++) {
            store(p.dx + k, from_float<T>(to_float(load(p.dy + k)) * slope_f(p.act, to_float(load(p.x + k)))));
        }
    }
}
