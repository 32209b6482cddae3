// y = (x - mean) * rstd * w + bias over the last axis. Grid: ceil(rows / (BLOCK / 32)); a warp owns one row, in three
// passes: mean, variance about it, result. Sums are of x - pivot, with the row's first element as pivot, and the
// mean is kept as a pair, so that a mean far from zero costs no digits.
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

extern "C" __global__ void __launch_bounds__(BLOCK) layer_norm_fwd(const __grid_constant__ LayerNormFwd p) {
    const int row = block_x() * (BLOCK / WARP) + warp();
    if (row >= p.rows) return;  // a whole warp leaves
    const T* x = p.x + (long long)row * p.c;
    T* y = p.y + (long long)row * p.c;
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
