// Gradients of group_norm.cu. With n = (x - mean) * rstd, z = n * w + bias, dz = dy * act'(z) and g = dz * w, where w and bias
// are those that an image's scale and shift leave, w0 * (1 + scale) and b0 * (1 + scale) + shift of the fields w0 = w, b0 = bias:
// dx = rstd * (g - mean(g) - n * mean(g * n)), the means over a group; over images and pixels dw = sum (1 + scale) * dz * n and
// dbias = sum (1 + scale) * dz; over the pixels of each image dscale = sum dz * (w0 * n + b0) and dshift = sum dz.
//
// group_norm_grad, grid: (G, B): a block owns one group of one image, in passes that the caches serve: mean, variance, sums by
// channel, dx. The mean is the group's first element, a pivot, and the mean of x - pivot. In each pass a thread takes N channels, as
// many as divide the group's (4 at most, in one access), of every `step`-th pixel, so that its factors stay in registers; a
// group of more than BLOCK · N channels is taken in runs. The sums of a channel are added in order. They are left in `sums`, from
// which group_norm_grad_params, grid: ceil(C / BLOCK), a thread a channel, adds up the images, and makes the gradients of scale and
// shift of each.
//
// Barriers: one makes the sums of a run visible to the threads that add them, one says that they are read; block_sum has its own.
// Occupancy: four blocks, by registers (at most 64; 62 and fewer are used), which is named so that nothing spills; shared memory is
// 8 KB. Wants: pointers aligned to 16 bytes; groups divide C; HW > 0; fewer than 2^31 elements in a group.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct GroupNormGrad {
    T* dx;           // (B,HW,C)
    float* sums;     // (B,C,2): sum dz * n, sum dz
    const T* x;      // (B,HW,C)
    const T* w;      // (C)
    const T* bias;   // (C)
    const T* dy;     // (B,HW,C)
    const T* film;   // (B,2C) or null: scales, shifts
    int hw, c, groups;
    float eps;
    int act;  // by the numbers of activate_f
};

// The factor and the bias of channel c of image b.
struct Affine {
    float w, bias;
};
DEV Affine affine(const T* w, const T* bias, const T* film, int channels, int b, int c) {
    Affine a = {to_float(load(w + c)), to_float(load(bias + c))};
    if (film) {
        const T* of = film + (long long)b * 2 * channels + c;
        const float scale = 1.0f + to_float(load(of));
        a = {a.w * scale, fma_f(a.bias, scale, to_float(load(of + channels)))};
    }
    return a;
}

constexpr int MOST = 4;  // channels of a thread

struct GroupNormGradSmem {
    float scratch[BLOCK / WARP];
    float w[MOST][BLOCK], bias[MOST][BLOCK];
};

// What a thread takes in a run of `width` threads for a pixel: the first of its channels within the group, its first pixel,
// and pixels from one to the next. Threads that are left over take none.
struct Share {
    int channel, pixel, step;
};
template <int N>
DEV Share share(const GroupNormGrad& p, int run, int width) {
    const int lanes = BLOCK / width, lane_p = thread_x() / width;
    return {(run + int(thread_x()) % width) * N, lane_p < lanes ? lane_p : p.hw, lanes};
}

template <int N>
DEV void back(const GroupNormGrad& p, GroupNormGradSmem& s) {
    const int thread = thread_x(), cpg = p.c / p.groups, first = block_x() * cpg, threads = cpg / N;
    const float count = float(p.hw * cpg);
    const long long base = (long long)block_y() * p.hw * p.c + first;
    const float pivot = to_float(load(p.x + base));

    float sum = 0.0f;
    for (int run = 0; run < threads; run += BLOCK) {
        const Share own = share<N>(p, run, threads - run < BLOCK ? threads - run : BLOCK);
        for (int pixel = own.pixel; pixel < p.hw; pixel += own.step) {
            const Vec<T, N> x = load<N>(p.x + base + (long long)pixel * p.c + own.channel);
            UNROLL
            for (int k = 0; k < N; k++) sum += to_float(x[k]) - pivot;
        }
    }
    const Pair mean = two_sum(pivot, block_sum<BLOCK>(sum, s.scratch) / count);

    float square = 0.0f;
    for (int run = 0; run < threads; run += BLOCK) {
        const Share own = share<N>(p, run, threads - run < BLOCK ? threads - run : BLOCK);
        for (int pixel = own.pixel; pixel < p.hw; pixel += own.step) {
            const Vec<T, N> x = load<N>(p.x + base + (long long)pixel * p.c + own.channel);
            UNROLL
            for (int k = 0; k < N; k++) {
                const float d = to_float(x[k]) - mean.high - mean.low;
                square = fma_f(d, d, square);
            }
        }
    }
    const float rstd = rsqrt_f(block_sum<BLOCK>(square, s.scratch) / count + p.eps);

    // Of the group: sum g, sum g * n, by the threads that add up channels.
    float g_sum = 0.0f, gn_sum = 0.0f;
    for (int run = 0; run < threads; run += BLOCK) {
        const int width = threads - run < BLOCK ? threads - run : BLOCK;
        const Share own = share<N>(p, run, width);
        Affine a[N];
        float dw[N] = {}, dbias[N] = {};
        UNROLL
        for (int k = 0; k < N; k++) a[k] = affine(p.w, p.bias, p.film, p.c, block_y(), first + own.channel + k);
        for (int pixel = own.pixel; pixel < p.hw; pixel += own.step) {
            const long long at = base + (long long)pixel * p.c + own.channel;
            const Vec<T, N> x = load<N>(p.x + at), dy = load<N>(p.dy + at);
            UNROLL
            for (int k = 0; k < N; k++) {
                const float v = (to_float(x[k]) - mean.high - mean.low) * rstd;
                const float dz = to_float(dy[k]) * slope_f(p.act, fma_f(v, a[k].w, a[k].bias));
                dw[k] = fma_f(dz, v, dw[k]);
                dbias[k] += dz;
            }
        }
        UNROLL
        for (int k = 0; k < N; k++) {
            s.w[k][thread] = dw[k];
            s.bias[k][thread] = dbias[k];
        }
        sync_block();
        for (int e = thread; e < width * N; e += BLOCK) {
            float to_w = 0.0f, to_bias = 0.0f;
            for (int i = e / N; i < own.step * width; i += width) {
                to_w += s.w[e % N][i];
                to_bias += s.bias[e % N][i];
            }
            const int c = first + run * N + e;
            const long long at = 2 * ((long long)block_y() * p.c + c);
            store(p.sums + at, to_w);
            store(p.sums + at + 1, to_bias);
            const float w = affine(p.w, p.bias, p.film, p.c, block_y(), c).w;
            g_sum = fma_f(to_bias, w, g_sum);
            gn_sum = fma_f(to_w, w, gn_sum);
        }
        sync_block();
    }
    g_sum = block_sum<BLOCK>(g_sum, s.scratch) / count;
    gn_sum = block_sum<BLOCK>(gn_sum, s.scratch) / count;

    for (int run = 0; run < threads; run += BLOCK) {
        const Share own = share<N>(p, run, threads - run < BLOCK ? threads - run : BLOCK);
        Affine a[N];
        UNROLL
        for (int k = 0; k < N; k++) a[k] = affine(p.w, p.bias, p.film, p.c, block_y(), first + own.channel + k);
        for (int pixel = own.pixel; pixel < p.hw; pixel += own.step) {
            const long long at = base + (long long)pixel * p.c + own.channel;
            const Vec<T, N> x = load<N>(p.x + at);
            Vec<T, N> d = load<N>(p.dy + at);
            UNROLL
            for (int k = 0; k < N; k++) {
                const float v = (to_float(x[k]) - mean.high - mean.low) * rstd;
                const float dz = to_float(d[k]) * slope_f(p.act, fma_f(v, a[k].w, a[k].bias));
                d[k] = from_float<T>(rstd * (dz * a[k].w - g_sum - v * gn_sum));
            }
            store(p.dx + at, d);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 4) group_norm_grad(const __grid_constant__ GroupNormGrad p) {
    griddep_wait();
    GroupNormGradSmem& s = smem<GroupNormGradSmem>();
    const int cpg = p.c / p.groups;
    if (cpg % 4 == 0) {
        back<4>(p, s);
    } else if (cpg % 2 == 0) {
        back<2>(p, s);
    } else {
        back<1>(p, s);
    }
}

struct GroupNormGradParams {
    float* dw;          // (C)
    float* dbias;       // (C)
    T* dfilm;           // (B,2C): dscale, dshift; null where film is
    const float* sums;  // (B,C,2)
    const T* w;         // (C)
    const T* bias;      // (C)
    const T* film;      // (B,2C) or null
    int batch, c;
};

extern "C" __global__ void __launch_bounds__(BLOCK) group_norm_grad_params(const __grid_constant__ GroupNormGradParams p) {
    griddep_wait();
    const int c = block_x() * BLOCK + thread_x();
    if (c >= p.c) return;
    float dw = 0.0f, dbias = 0.0f;
    for (int b = 0; b < p.batch; b++) {
        const float to_w = load(p.sums + 2 * ((long long)b * p.c + c)), to_bias = load(p.sums + 2 * ((long long)b * p.c + c) + 1);
        float scale = 1.0f;
        if (p.film) {
            const long long at = (long long)b * 2 * p.c + c;
            scale += to_float(load(p.film + at));
            store(p.dfilm + at, from_float<T>(fma_f(to_float(load(p.w + c)), to_w, to_float(load(p.bias + c)) * to_bias)));
            store(p.dfilm + at + p.c, from_float<T>(to_bias));
        }
        dw = fma_f(scale, to_w, dw);
        dbias = fma_f(scale, to_bias, dbias);
    }
    store(p.dw + c, dw);
    store(p.dbias + c, dbias);
}
