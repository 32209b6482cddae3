// Gradients of layer_norm.cu. With n = (x - mean) * rstd and g = dy * w: dx = rstd * (g - mean(g) - n * mean(g * n)),
// dw = sum dy * n, dbias = sum dy over the rows.
//
// layer_norm_grad, grid: ceil(rows / (BLOCK / 32)): a warp owns one row, in passes that the caches serve; it leaves the row's
// mean (as a pair) and rstd in `stats`. layer_norm_grad_params, grid: (ceil(C / COLUMNS), splits): a block owns COLUMNS
// columns of one part of the rows: thread t adds up column t % COLUMNS of rows t / COLUMNS, + ROWS, …, and the ROWS sums are
// added in order, behind the one barrier; sum_parts (reduce.cu) adds up the parts, of which some may be short or empty (zeros).
// It runs after layer_norm_grad. Occupancy: by registers and threads; shared memory is 2 KB. Wants: C > 0; splits · each below 2^31.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int COLUMNS = 32;
constexpr int ROWS = 8;
static_assert(ROWS * COLUMNS == BLOCK, "every thread has a row and a column");

struct LayerNormGrad {
    T* dx;         // (rows,C)
    float* stats;  // (rows,3)
    const T* x;    // (rows,C)
    const T* w;    // (C)
    const T* dy;   // (rows,C)
    int rows, c;
    float eps;
};

extern "C" __global__ void __launch_bounds__(BLOCK) layer_norm_grad(const __grid_constant__ LayerNormGrad p) {
    griddep_wait();
    const int row = block_x() * (BLOCK / WARP) + warp();
    if (row >= p.rows) return;  // a whole warp leaves
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
    if (lane() == 0) {
        store(p.stats + 3LL * row, mean.high);
        store(p.stats + 3LL * row + 1, mean.low);
        store(p.stats + 3LL * row + 2, rstd);
    }
}

struct LayerNormGradParams {
    float* dw;           // (splits,C)
    float* dbias;        // (splits,C)
    const float* stats;  // (rows,3)
    const T* x;          // (rows,C)
    const T* dy;         // (rows,C)
    int rows, c, each;   // each: rows of a part
};

struct ParamsSmem {
    float w[ROWS][COLUMNS], bias[ROWS][COLUMNS];
};

extern "C" __global__ void __launch_bounds__(BLOCK) layer_norm_grad_params(const __grid_constant__ LayerNormGradParams p) {
    griddep_wait();
    ParamsSmem& s = smem<ParamsSmem>();
    const int column = thread_x() % COLUMNS, r = thread_x() / COLUMNS, c = block_x() * COLUMNS + column;
    const int first = block_y() * p.each, last = first + p.each < p.rows ? first + p.each : p.rows;
    float w = 0.0f, bias = 0.0f;
    if (c < p.c) {
        for (int row = first + r; row < last; row += ROWS) {
            const float* stats = p.stats + 3LL * row;
            const float dy = to_float(load(p.dy + (long long)row * p.c + c));
            const float n = (to_float(load(p.x + (long long)row * p.c + c)) - load(stats) - load(stats + 1)) * load(stats + 2);
            w = fma_f(dy, n, w);
            bias += dy;
        }
    }
    s.w[r][column] = w;
    s.bias[r][column] = bias;
    sync_block();
    if (r != 0 || c >= p.c) return;
    for (int i = 1; i < ROWS; i++) {
        w += s.w[i][column];
        bias += s.bias[i][column];
    }
    store(p.dw + (long long)block_y() * p.c + c, w);
    store(p.dbias + (long long)block_y() * p.c + c, bias);
}
