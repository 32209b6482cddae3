// Gradient of layer_norm.cu with respect to x. With n = (x - mean) * rstd and g = dy * w: dx = rstd * (g - mean(g) - n *
// mean(g * n)). Grid: ceil(rows / (BLOCK / LANES)); LANES threads, a warp or a part of one, own one row. The row's mean, as a sum of
// two floats, and rstd are left in `stats`, for layer_norm_grad_params.cu.
//
// W is the widest row that a variant takes, as in layer_norm.cu: lane l holds the row's 16-byte vectors l, l + LANES, … of x and of
// dy in registers, so both are read once, all in flight together; first x less the row's first element, the pivot, then less the
// mean; dy times w from when w is there. Lanes past the end of the row hold nothing and add nothing. W=0 takes any width: four
// passes over x and two over dy, which the caches serve.
//
// dx = rstd * g + slant * v + level, with v = x - mean, slant = -rstd³ * mean(g * v) and level = -rstd * mean(g). No
// shared memory, no barrier. Occupancy: eight blocks, by registers (at most 128); six of f32 (168); four of the widest rows (255).
// Wants: C > 0; for W > 0 C <= W, C a multiple of the vector, pointers aligned to 16 bytes.
// variants: W=0 W=320 W=640 W=1280 W=2048
#include "dev.cuh"

constexpr int BLOCK = 64;
constexpr int LANES = W == 320 ? 8 : W == 640 ? 16 : 32;
constexpr int BLOCKS = W == 2048 ? 4 : sizeof(T) == 4 ? 6 : 8;  // of a multiprocessor

struct LayerNormGrad {
    T* dx;         // (rows,C)
    float* stats;  // (rows,4): mean as a sum of two, rstd, nothing
    const T* x;    // (rows,C)
    const T* w;    // (C)
    const T* dy;   // (rows,C)
    int rows, c;
    float eps;
};

DEV void leave_stats(const LayerNormGrad& p, int row, Pair mean, float rstd) {
    const Vec<float, 4> out = {{mean.high, mean.low, rstd, 0.0f}};
    store(p.stats + 4LL * row, out);
}

// Any width.
DEV void row_in_passes(const LayerNormGrad& p, int row) {
    const T* x = p.x + (long long)row * p.c;
    const T* dy = p.dy + (long long)row * p.c;
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

    float g_sum = 0.0f, gn_sum = 0.0f;
    for (int c = lane(); c < p.c; c += WARP) {
        const float g = to_float(load(dy + c)) * to_float(load(p.w + c));
        const float n = (to_float(load(x + c)) - mean.high - mean.low) * rstd;
        g_sum += g;
        gn_sum = fma_f(g, n, gn_sum);
    }
    g_sum = warp_sum(g_sum) / float(p.c);
    gn_sum = warp_sum(gn_sum) / float(p.c);
    for (int c = lane(); c < p.c; c += WARP) {
        const float g = to_float(load(dy + c)) * to_float(load(p.w + c));
        const float n = (to_float(load(x + c)) - mean.high - mean.low) * rstd;
        store(p.dx + (long long)row * p.c + c, from_float<T>(rstd * (g - g_sum - n * gn_sum)));
    }
    if (lane() == 0) leave_stats(p, row, mean, rstd);
}

// N vectors per lane, in registers. FULL: every lane has all N. Rows beyond the last take part in the shuffles.
template <int N, bool FULL>
DEV void row_in_registers(const LayerNormGrad& p, int row, int l) {
    constexpr int V = vec_width<T>;
    const T* x = p.x + (long long)row * p.c + l * V;
    const T* dy = p.dy + (long long)row * p.c + l * V;
    const auto in = [&](int i) { return row < p.rows && (FULL || (l + i * LANES) * V < p.c); };
    Loaded<T, V> held[N], held_dy[N];
    UNROLL
    for (int i = 0; i < N; i++) {
        held[i] = held_dy[i] = {};
        if (in(i)) {
            held[i].load_from(x + i * LANES * V);
            held_dy[i].load_from(dy + i * LANES * V);
        }
    }
    const float pivot = shfl(to_float(held[0].get()[0]), lane() & ~(LANES - 1));
    float v[N][V], sum = 0.0f;
    UNROLL
    for (int i = 0; i < N; i++) {
        UNROLL
        for (int k = 0; k < V; k++) {
            v[i][k] = FULL || in(i) ? to_float(held[i].get()[k]) - pivot : 0.0f;
            sum += v[i][k];
        }
    }
    const float share = rcp_fast_f(float(p.c)), mean = lanes_sum<LANES>(sum) * share;

    // The squares, and the sums of g and g * v, at once: nothing of one waits for another.
    float g[N][V], square = 0.0f, g_sum = 0.0f, gv_sum = 0.0f;
    UNROLL
    for (int i = 0; i < N; i++) {
        Vec<T, V> w = {};
        if (FULL || in(i)) w = load<V>(p.w + (l + i * LANES) * V);
        UNROLL
        for (int k = 0; k < V; k++) {
            v[i][k] = FULL || in(i) ? v[i][k] - mean : 0.0f;
            g[i][k] = to_float(held_dy[i].get()[k]) * to_float(w[k]);
            square = fma_f(v[i][k], v[i][k], square);
            g_sum += g[i][k];
            gv_sum = fma_f(g[i][k], v[i][k], gv_sum);
        }
    }
    const float rstd = rsqrt_fast_f(fma_f(lanes_sum<LANES>(square), share, p.eps));
    const float level = -rstd * (lanes_sum<LANES>(g_sum) * share);
    const float slant = -rstd * rstd * (rstd * (lanes_sum<LANES>(gv_sum) * share));
    if (row >= p.rows) return;

    T* dx = p.dx + (long long)row * p.c + l * V;
    UNROLL
    for (int i = 0; i < N; i++) {
        if (!FULL && !in(i)) continue;
        Vec<T, V> out;
        UNROLL
        for (int k = 0; k < V; k++) out[k] = from_float<T>(fma_f(rstd, g[i][k], fma_f(slant, v[i][k], level)));
        store(dx + i * LANES * V, out);
    }
    if (l == 0) leave_stats(p, row, two_sum(pivot, mean), rstd);
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) layer_norm_grad(const __grid_constant__ LayerNormGrad p) {
    griddep_wait();
    const int row = block_x() * (BLOCK / LANES) + thread_x() / LANES;
    if constexpr (W == 0) {
        if (row < p.rows) row_in_passes(p, row);  // a whole warp
    } else {
        constexpr int N = ceil_div(W, LANES * vec_width<T>);
        if (p.c == N * LANES * vec_width<T>) {
            row_in_registers<N, true>(p, row, thread_x() % LANES);
        } else {
            row_in_registers<N, false>(p, row, thread_x() % LANES);
        }
    }
}
