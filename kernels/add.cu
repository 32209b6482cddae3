// y = a + b, elementwise. Grid: ceil(n / (BLOCK · N)); a thread owns N elements, 16 bytes of y, or fewer at the
// end. Wants: pointers aligned to 16 bytes. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct AddFwd {
    T* y;        // (n)
    const T* a;  // (n)
    const T* b;  // (n)
    long long n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) add_fwd(const __grid_constant__ AddFwd p) {
    griddep_wait();
    constexpr int N = vec_width<T>;
    const long long i = ((long long)block_x() * BLOCK + thread_x()) * N;
    if (i + N <= p.n) {
        const Vec<T, N> a = load<N>(p.a + i), b = load<N>(p.b + i);
        Vec<T, N> y;
        UNROLL
        for (int k = 0; k < N; k++) y[k] = from_float<T>(to_float(a[k]) + to_float(b[k]));
        store(p.y + i, y);
    } else {
        for (long long k = i; k < p.n; k++) store(p.y + k, from_float<T>(to_float(load(p.a + k)) + to_float(load(p.b + k))));
    }
}
