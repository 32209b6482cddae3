// y = act(x), elementwise. Grid: ceil(n / (BLOCK · N)); a thread owns N elements, 16 bytes of y, or fewer at the
// end. Wants: pointers aligned to 16 bytes. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct ActivationFwd {
    T* y;        // (n)
    const T* x;  // (n)
    long long n;
    int act;     // 0 none, 1 SiLU, 2 GELU, 3 quick GELU, 4 GELU by tanh, 5 ReLU, 6 leaky ReLU (0.2)
};

extern "C" __global__ void __launch_bounds__(BLOCK) activation_fwd(const __grid_constant__ ActivationFwd p) {
    griddep_wait();
    constexpr int N = vec_width<T>;
    const long long i = ((long long)block_x() * BLOCK + thread_x()) * N;
    if (i + N <= p.n) {
        Vec<T, N> x = load<N>(p.x + i);
        UNROLL
        for (int k = 0; k < N; k++) x[k] = from_float<T>(activate_f(p.act, to_float(x[k])));
        store(p.y + i, x);
    } else {
        for (long long k = i; k < p.n; k++) store(p.y + k, from_float<T>(activate_f(p.act, to_float(load(p.x + k)))));
    }
}
