// y = (x - mean) * rstd * w + bias over the last axis. Grid: ceil(rows / (BLOCK / 32)); a warp owns one row.
//
// W is the widest row that a variant takes: lane l holds the 16-byte vectors l, l + 32, … of the row in registers, so x is
// read once; N of them per lane are all in flight together. The row's width must be a multiple of the vector. Lanes past
// the end of the row hold nothing and add nothing. W=0 takes any width: three passes over x, which the caches serve.
//
// Mean first, then the variance about it. Sums are of x - pivot, with the row's first element as pivot, and the mean is
// kept as a pair, so that a mean far from zero costs no digits. No shared memory, no barrier: rows do not wait for each
// other. Registers limit the warps in flight: N · (vector width) floats of x per lane. Four blocks on a multiprocessor
// are asked for, that is at most 128 registers for each thread; left alone, the compiler takes fewer and spills one.
// Wants: C > 0; for W > 0 C <= W, C a multiple of the vector, pointers aligned to 16 bytes.
// variants: W=0 W=320 W=640 W=1280 W=2048
#include "dev.cuh"

constexpr int BLOCK = 128;

struct LayerNormFwd {
    T* y;           // (rows,C)
    const T* x;     // (rows,C)
    const T* w;     // (C)
    const T* bias;  // (C)
    int rows, c;
    float eps;
};

// Any width.
DEV void row_in_passes(const LayerNormFwd& p, T* y, const T* x) {
    const float pivot = to_float(load(x));
    float sum = 0.0f;
    for (int c = lane(); c < p.c; c += WARP) sum += to_float(load(x + c)) - pivot;
    const Pair mean = two_sum(pivot, warp_sum(sum) / float(p.c));

    float square = 0.0f;
    for (int c = lane(); c < p.c; c += WARP) {
        const float d = to_float(load(x + c)) - mean.high - mean.low;
        square = fma_f(d, d, square);
    }
    const float rstd = rsqrt_f(warp_sum(square) / float(p.c) + p.eps);

    for (int c = lane(); c < p.c; c += WARP) {
        const float v = (to_float(load(x + c)) - mean.high - mean.low) * rstd;
        store(y + c, from_float<T>(fma_f(v, to_float(load(p.w + c)), to_float(load(p.bias + c)))));
    }
}

// N vectors per lane, in registers.
template <int N>
DEV void row_in_registers(const LayerNormFwd& p, T* y, const T* x) {
    constexpr int V = vec_width<T>;
    Vec<T, V> held[N];
    UNROLL
    for (int i = 0; i < N; i++) {
        const int c = (int(lane()) + i * WARP) * V;
        if (c < p.c) held[i] = load<V>(x + c);
    }
    const float pivot = shfl(to_float(held[0][0]), 0);
    float v[N][V], sum = 0.0f;
    UNROLL
    for (int i = 0; i < N; i++) {
        const bool in = (int(lane()) + i * WARP) * V < p.c;
        UNROLL
        for (int k = 0; k < V; k++) {
            v[i][k] = in ? to_float(held[i][k]) : pivot;
            sum += v[i][k] - pivot;
        }
    }
    const Pair mean = two_sum(pivot, warp_sum(sum) / float(p.c));

    float square = 0.0f;
    UNROLL
    for (int i = 0; i < N; i++) {
        const bool in = (int(lane()) + i * WARP) * V < p.c;
        UNROLL
        for (int k = 0; k < V; k++) {
            v[i][k] = v[i][k] - mean.high - mean.low;
            if (in) square = fma_f(v[i][k], v[i][k], square);
        }
    }
    const float rstd = rsqrt_f(warp_sum(square) / float(p.c) + p.eps);

    UNROLL
    for (int i = 0; i < N; i++) {
        const int c = (int(lane()) + i * WARP) * V;
        if (c >= p.c) continue;
        const Vec<T, V> w = load<V>(p.w + c), bias = load<V>(p.bias + c);
        Vec<T, V> out;
        UNROLL
        for (int k = 0; k < V; k++) {
            out[k] = from_float<T>(fma_f(v[i][k] * rstd, to_float(w[k]), to_float(bias[k])));
        }
        store(y + c, out);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 4) layer_norm_fwd(const __grid_constant__ LayerNormFwd p) {
    griddep_wait();
    const int row = block_x() * (BLOCK / WARP) + warp();
    if (row >= p.rows) return;  // a whole warp leaves
    const T* x = p.x + (long long)row * p.c;
    T* y = p.y + (long long)row * p.c;
    if constexpr (W == 0) {
        row_in_passes(p, y, x);
    } else {
        row_in_registers<ceil_div(W, WARP * vec_width<T>)>(p, y, x);
    }
}
