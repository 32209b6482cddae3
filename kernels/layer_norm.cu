// y = (x - mean) * rstd * w + bias over the last axis. Grid: ceil(rows / (BLOCK / LANES)); LANES threads, a warp or a part of
// one, own one row.
//
// W is the widest row that a variant takes: lane l of a row holds its 16-byte vectors l, l + LANES, … in registers, so x is
// read once; N of them per lane are all in flight together. A row of W elements leaves no lane without a
// vector. The row's width must be a multiple of the vector. Lanes past the end of the row hold nothing and add nothing. W=0
// takes any width: three passes over x, which the caches serve.
//
// Mean first, then the variance about it. Sums are of x - pivot, with the row's first element as pivot, which is what the lanes
// hold from then on, so that a mean far from zero costs no digits. No shared memory, no barrier: rows do not wait for each
// other. Registers limit the warps in flight: N · (vector width) floats of x per lane. Eight blocks on a multiprocessor
// are asked for, that is at most 128 registers for each thread. W=0 holds no row: it takes 32, and as many blocks fit as a
// multiprocessor takes.
// Wants: C > 0; for W > 0 C <= W, C a multiple of the vector, pointers aligned to 16 bytes.
// variants: W=0 W=320 W=640 W=1280 W=2048
#include "dev.cuh"

constexpr int BLOCK = 64;
constexpr int LANES = W == 320 ? 8 : W == 640 ? 16 : 32;

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

// N vectors per lane, in registers. FULL: every lane has all N. Rows beyond the last take part in the shuffles.
template <int N, bool FULL>
DEV void row_in_registers(const LayerNormFwd& p, int row, int l) {
    constexpr int V = vec_width<T>;
    const T* x = p.x + (long long)row * p.c;
    const auto in = [&](int i) { return row < p.rows && (FULL || (l + i * LANES) * V < p.c); };
    Vec<T, V> held[N];
    UNROLL
    for (int i = 0; i < N; i++) {
        held[i] = {};
        if (in(i)) held[i] = load<V>(x + (l + i * LANES) * V);
    }
    const float pivot = shfl(to_float(held[0][0]), lane() & ~(LANES - 1));
    float v[N][V], sum = 0.0f;
    UNROLL
    for (int i = 0; i < N; i++) {
        UNROLL
        for (int k = 0; k < V; k++) {
            v[i][k] = FULL || in(i) ? to_float(held[i][k]) - pivot : 0.0f;
            sum += v[i][k];
        }
    }
    const float share = rcp_fast_f(float(p.c)), mean = lanes_sum<LANES>(sum) * share;

    float square = 0.0f;
    UNROLL
    for (int i = 0; i < N; i++) {
        UNROLL
        for (int k = 0; k < V; k++) {
            v[i][k] -= mean;
            if (FULL || in(i)) square = fma_f(v[i][k], v[i][k], square);
        }
    }
    const float rstd = rsqrt_fast_f(fma_f(lanes_sum<LANES>(square), share, p.eps));
    if (row >= p.rows) return;

    T* y = p.y + (long long)row * p.c + l * V;
    // Stores may touch what is loaded behind them, as far as the compiler knows: a few vectors of weights come first.
    constexpr int FEW = !FULL ? 1 : N % 5 == 0 ? 5 : 4;
    static_assert(N % FEW == 0, "whole sets");
    UNROLL
    for (int from = 0; from < N; from += FEW) {
        Vec<T, V> w[FEW], bias[FEW];
        UNROLL
        for (int i = 0; i < FEW; i++) {
            if (!FULL && !in(from + i)) continue;
            w[i] = load<V>(p.w + (l + (from + i) * LANES) * V);
            bias[i] = load<V>(p.bias + (l + (from + i) * LANES) * V);
        }
        UNROLL
        for (int i = 0; i < FEW; i++) {
            if (!FULL && !in(from + i)) continue;
            Vec<T, V> out;
            UNROLL
            for (int k = 0; k < V; k++) {
                out[k] = from_float<T>(fma_f(v[from + i][k] * rstd, to_float(w[i][k]), to_float(bias[i][k])));
            }
            store(y + (from + i) * LANES * V, out);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 8) layer_norm_fwd(const __grid_constant__ LayerNormFwd p) {
    griddep_wait();
    const int row = block_x() * (BLOCK / LANES) + thread_x() / LANES;
    if constexpr (W == 0) {
        if (row < p.rows) row_in_passes(p, p.y + (long long)row * p.c, p.x + (long long)row * p.c);  // a whole warp
    } else {
        constexpr int N = ceil_div(W, LANES * vec_width<T>);
        if (p.c == N * LANES * vec_width<T>) {
            row_in_registers<N, true>(p, row, thread_x() % LANES);
        } else {
            row_in_registers<N, false>(p, row, thread_x() % LANES);
        }
    }
}
