// dx = [dy · GELU(gate) | dy · value · GELU'(gate)] with x = [value | gate]. Grid: ceil(n / BLOCK); a thread owns N elements of a
// row of dy, 16 bytes where E is a multiple of them, else one; and those of dx that come from them. Wants: pointers aligned to 16
// bytes. Occupancy: by registers.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct GegluGrad {
    T* dx;        // (rows,2E)
    const T* x;   // (rows,2E)
    const T* dy;  // (rows,E)
    int n;        // rows·E / N
    int e;
};

template <int N>
DEV void back(const GegluGrad& p) {
    const unsigned i = block_x() * BLOCK + thread_x(), per_row = p.e / N;
    if (i >= unsigned(p.n)) return;
    const unsigned row = i / per_row;
    const long long at = (long long)row * 2 * p.e + (i - row * per_row) * N;
    const Vec<T, N> value = load<N>(p.x + at), gate = load<N>(p.x + at + p.e), dy = load<N>(p.dy + (long long)i * N);
    Vec<T, N> dvalue, dgate;
    UNROLL
    for (int k = 0; k < N; k++) {
        const float d = to_float(dy[k]), g = to_float(gate[k]);
        dvalue[k] = from_float<T>(d * gelu_f(g));
        dgate[k] = from_float<T>(d * to_float(value[k]) * slope_f(2, g));
    }
    store(p.dx + at, dvalue);
    store(p.dx + at + p.e, dgate);
}

extern "C" __global__ void __launch_bounds__(BLOCK) geglu_grad(const __grid_constant__ GegluGrad p) {
    griddep_wait();
    if (p.e % vec_width<T> == 0) {
        back<vec_width<T>>(p);
    } else {
        back<1>(p);
    }
}
