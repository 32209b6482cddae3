// Gradients of layer_norm.cu with respect to w and bias, from what layer_norm_grad.cu has left of each row. With n = (x - mean) *
// rstd: dw = sum dy * n, dbias = sum dy over the rows. Grid: (strips of columns, splits); a block owns one strip of `each` rows, and
// leaves its sums, which sum_parts (reduce.cu) adds up.
//
// A thread owns 16 bytes of columns of every DOWN-th row, FLIGHT of which are in flight; eight threads, 128 bytes of a row, lie side
// by side. If C is no multiple of the vector, `wide` is 0: a thread owns one column then, and 32 lie side by side. Shuffles add up
// the rows of a warp, and a thread for each column those of the warps, behind the one barrier; the order is fixed. The last part may
// be short. Occupancy: three blocks, by registers (at most 80), which is named; shared memory is 4 KB at most.
// Wants: C > 0; pointers aligned to 16 bytes; splits · each below 2^31 − 64; `wide` only with C a multiple of the vector.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int ACROSS = 8;   // vectors of a strip
constexpr int NARROW = 32;  // columns of a strip without vectors

constexpr int WARPS = BLOCK / WARP;
constexpr int FLIGHT = 2;
constexpr int MOST = ACROSS * vec_width<T> > NARROW ? ACROSS * vec_width<T> : NARROW;

struct LayerNormGradParams {
    float* dw;           // (splits,C)
    float* dbias;        // (splits,C)
    const float* stats;  // (rows,4): mean as a sum of two, rstd, nothing
    const T* x;          // (rows,C)
    const T* dy;         // (rows,C)
    int rows, c;
    int each;            // rows of a part
    int wide;
};

struct LayerNormGradParamsSmem {
    float w[WARPS][MOST], bias[WARPS][MOST];
};

template <int V>
DEV void sums(const LayerNormGradParams& p, LayerNormGradParamsSmem& s) {
    constexpr int SIDE = V > 1 ? ACROSS : NARROW, STRIP = SIDE * V, DOWN = BLOCK / SIDE;
    const int column = int(thread_x()) % SIDE * V, first = block_x() * STRIP, c = first + column, row = block_y() * p.each;
    const int last = row + p.each < p.rows ? row + p.each : p.rows;
    float w[V] = {}, bias[V] = {};
    for (int i = c < p.c ? row + int(thread_x()) / SIDE : last; i < last; i += FLIGHT * DOWN) {
        Loaded<T, V> x[FLIGHT], dy[FLIGHT];
        Vec<float, 4> stats[FLIGHT];
        UNROLL
        for (int j = 0; j < FLIGHT; j++) {
            x[j] = dy[j] = {};
            stats[j] = {};
            if (i + j * DOWN < last) {
                x[j].load_from(p.x + (long long)(i + j * DOWN) * p.c + c);
                dy[j].load_from(p.dy + (long long)(i + j * DOWN) * p.c + c);
                stats[j] = load<4>(p.stats + 4LL * (i + j * DOWN));
            }
        }
        UNROLL
        for (int j = 0; j < FLIGHT; j++) {
            const float high = stats[j][0], rstd = stats[j][2], rest = -stats[j][1] * rstd;
            const Vec<T, V> of_x = x[j].get(), of_dy = dy[j].get();
            UNROLL
            for (int k = 0; k < V; k++) {
                const float d = to_float(of_dy[k]);
                w[k] = fma_f(d, fma_f(to_float(of_x[k]) - high, rstd, rest), w[k]);
                bias[k] += d;
            }
        }
    }
    UNROLL
    for (int step = SIDE; step < WARP; step <<= 1) {
        UNROLL
        for (int k = 0; k < V; k++) {
            w[k] += shfl_xor(w[k], step);
            bias[k] += shfl_xor(bias[k], step);
        }
    }
    if (lane() < SIDE) {
        UNROLL
        for (int k = 0; k < V; k++) {
            s.w[warp()][column + k] = w[k];
            s.bias[warp()][column + k] = bias[k];
        }
    }
    sync_block();
    const int mine = thread_x();
    if (mine >= STRIP || first + mine >= p.c) return;
    float dw = 0.0f, dbias = 0.0f;
    UNROLL
    for (int i = 0; i < WARPS; i++) {
        dw += s.w[i][mine];
        dbias += s.bias[i][mine];
    }
    const long long at = (long long)block_y() * p.c + first + mine;
    store(p.dw + at, dw);
    store(p.dbias + at, dbias);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 3) layer_norm_grad_params(const __grid_constant__ LayerNormGradParams p) {
    griddep_wait();
    LayerNormGradParamsSmem& s = smem<LayerNormGradParamsSmem>();
    if (p.wide) {
        sums<vec_width<T>>(p, s);
    } else {
        sums<1>(p, s);
    }
}
