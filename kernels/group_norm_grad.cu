// Gradients of group_norm.cu. With n = (x - mean) * rstd, z = n * w + bias, dz = dy * act'(z) and g = dz * w, where w and bias
// are those that an image's scale and shift leave, w0 * (1 + scale) and b0 * (1 + scale) + shift of the fields w0 = w, b0 = bias:
// dx = rstd * (g - mean(g) - n * mean(g * n)), the means over a group; over images and pixels dw = sum (1 + scale) * dz * n and
// dbias = sum (1 + scale) * dz; over the pixels of each image dscale = sum dz * (w0 * n + b0) and dshift = sum dz.
//
// group_norm_grad, grid: (G, B): a block owns one group of one image, in passes that the caches serve: mean, variance, sums by
// channel, dx. The mean is the group's first element, a pivot, and the mean of x - pivot. For the sums the group's cpg channels
// are taken in runs of `width`, BLOCK or what is left of them: thread t takes channel t % width of every (BLOCK / width)-th
// pixel, and the sums of a channel are added in order. They are left in `sums`, from which group_norm_grad_params, grid: ceil(C /
// BLOCK), a thread a channel, adds up the images, and makes the gradients of scale and shift of each.
//
// Barriers: one makes the sums of a run visible to the threads that add them, one says that they are read; block_sum has its own.
// Occupancy: by registers and threads; shared memory is 2 KB. Wants: groups divide C; HW > 0; fewer than 2^31 elements in a group.
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

struct GroupNormGradSmem {
    float scratch[BLOCK / WARP];
    float w[BLOCK], bias[BLOCK];
};

extern "C" __global__ void __launch_bounds__(BLOCK) group_norm_grad(const __grid_constant__ GroupNormGrad p) {
    griddep_wait();
    GroupNormGradSmem& s = smem<GroupNormGradSmem>();
    const int thread = thread_x(), cpg = p.c / p.groups, first = block_x() * cpg, count = p.hw * cpg;
    const long long base = (long long)block_y() * p.hw * p.c + first;
    const float pivot = to_float(load(p.x + base));

    float sum = 0.0f;
    for (int i = thread; i < count; i += BLOCK) {
        const int pixel = i / cpg;
        sum += to_float(load(p.x + base + (long long)pixel * p.c + (i - pixel * cpg))) - pivot;
    }
    const Pair mean = two_sum(pivot, block_sum<BLOCK>(sum, s.scratch) / float(count));

    float square = 0.0f;
    for (int i = thread; i < count; i += BLOCK) {
        const int pixel = i / cpg;
        const float d = to_float(load(p.x + base + (long long)pixel * p.c + (i - pixel * cpg))) - mean.high - mean.low;
        square = fma_f(d, d, square);
    }
    const float rstd = rsqrt_f(block_sum<BLOCK>(square, s.scratch) / float(count) + p.eps);

    // Of the group: sum g, sum g * n, by the threads that add up channels.
    float g_sum = 0.0f, gn_sum = 0.0f;
    for (int c0 = 0; c0 < cpg; c0 += BLOCK) {
        const int width = cpg - c0 < BLOCK ? cpg - c0 : BLOCK, lanes = BLOCK / width;
        const int c = thread % width, lane_p = thread / width;
        float dw = 0.0f, dbias = 0.0f;
        const Affine a = affine(p.w, p.bias, p.film, p.c, block_y(), first + c0 + c);
        if (lane_p < lanes) {
            for (int pixel = lane_p; pixel < p.hw; pixel += lanes) {
                const long long at = base + (long long)pixel * p.c + c0 + c;
                const float v = (to_float(load(p.x + at)) - mean.high - mean.low) * rstd;
                const float dz = to_float(load(p.dy + at)) * slope_f(p.act, fma_f(v, a.w, a.bias));
                dw = fma_f(dz, v, dw);
                dbias += dz;
            }
        }
        s.w[thread] = dw;
        s.bias[thread] = dbias;
        sync_block();
        if (lane_p == 0) {
            for (int i = 1; i < lanes; i++) {
                dw += s.w[i * width + c];
                dbias += s.bias[i * width + c];
            }
            const long long at = 2 * ((long long)block_y() * p.c + first + c0 + c);
            store(p.sums + at, dw);
            store(p.sums + at + 1, dbias);
            g_sum = fma_f(dbias, a.w, g_sum);
            gn_sum = fma_f(dw, a.w, gn_sum);
        }
        sync_block();
    }
    g_sum = block_sum<BLOCK>(g_sum, s.scratch) / float(count);
    gn_sum = block_sum<BLOCK>(gn_sum, s.scratch) / float(count);

    for (int i = thread; i < count; i += BLOCK) {
        const int pixel = i / cpg, c = i - pixel * cpg;
        const long long at = base + (long long)pixel * p.c + c;
        const float v = (to_float(load(p.x + at)) - mean.high - mean.low) * rstd;
        const Affine a = affine(p.w, p.bias, p.film, p.c, block_y(), first + c);
        const float dz = to_float(load(p.dy + at)) * slope_f(p.act, fma_f(v, a.w, a.bias));
        store(p.dx + at, from_float<T>(rstd * (dz * a.w - g_sum - v * gn_sum)));
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
