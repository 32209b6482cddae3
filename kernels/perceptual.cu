// LPIPS (Zhang et al. 2018): pictures by the mean and deviation of natural ones, and the distance of two sets of features.
//
// The distance of two sets of features (B,P,C), P pixels of C channels: the mean over pixels of sum w (a / m(a) - b / m(b))^2, where
// m(v) = |v| + eps and |v| is the norm over channels; and its gradient with respect to a. A warp takes a pixel at a time. In
// perceptual_fwd the warps' sums go through shared memory (32 bytes): the one barrier makes them visible to thread 0, which adds them
// in order. Occupancy: by threads; that of perceptual_fwd by registers. Wants: B at most 65535, B · P below 2^31.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr float EPS = 1e-10f;

// The norm of a pixel, for all lanes.
DEV float norm_of(const T* v, int c) {
    float sum = 0.0f;
    for (int i = lane(); i < c; i += WARP) {
        const float x = to_float(load(v + i));
        sum = fma_f(x, x, sum);
    }
    return sqrt_f(warp_sum(sum));
}

struct PerceptualFwd {
    float* partial;  // (B,parts): sums over the pixels of a part
    const T* a;      // (B,P,C)
    const T* b;      // (B,P,C)
    const float* w;  // (C)
    int pixels, c;
};

struct PerceptualSmem {
    float sums[BLOCK / WARP];
};

// Grid: (parts, B); warp w of part p takes pixels p · WARPS + w, + parts · WARPS, ….
extern "C" __global__ void __launch_bounds__(BLOCK) perceptual_fwd(const __grid_constant__ PerceptualFwd p) {
    griddep_wait();
    PerceptualSmem& s = smem<PerceptualSmem>();
    constexpr int WARPS = BLOCK / WARP;
    float total = 0.0f;
    for (int pixel = block_x() * WARPS + warp(); pixel < p.pixels; pixel += grid_x() * WARPS) {
        const long long at = ((long long)block_y() * p.pixels + pixel) * p.c;
        const float over_a = 1.0f / (norm_of(p.a + at, p.c) + EPS), over_b = 1.0f / (norm_of(p.b + at, p.c) + EPS);
        float sum = 0.0f;
        for (int i = lane(); i < p.c; i += WARP) {
            const float d = to_float(load(p.a + at + i)) * over_a - to_float(load(p.b + at + i)) * over_b;
            sum = fma_f(load(p.w + i) * d, d, sum);
        }
        total += warp_sum(sum);
    }
    if (lane() == 0) s.sums[warp()] = total;
    sync_block();
    if (thread_x() != 0) return;
    for (int i = 1; i < WARPS; i++) total += s.sums[i];
    store(p.partial + block_y() * grid_x() + block_x(), total);
}

struct PerceptualMean {
    float* loss;           // (1)
    const float* partial;  // (B,parts)
    const float* weights;  // (B)
    int batch, parts, pixels;
};

// loss = the mean over images of weight · (sum of the parts) / pixels. Grid: 1; its first thread works.
extern "C" __global__ void __launch_bounds__(BLOCK) perceptual_mean(const __grid_constant__ PerceptualMean p) {
    griddep_wait();
    if (thread_x() != 0) return;
    float loss = 0.0f;
    for (int b = 0; b < p.batch; b++) {
        float sum = 0.0f;
        for (int i = 0; i < p.parts; i++) sum += load(p.partial + b * p.parts + i);
        loss = fma_f(load(p.weights + b), sum / float(p.pixels), loss);
    }
    store(p.loss, loss / float(p.batch));
}

struct PerceptualGrad {
    T* da;                 // (rows,C)
    const T* a;            // (rows,C)
    const T* b;            // (rows,C)
    const float* w;        // (C)
    const float* weights;  // (B)
    const float* dloss;    // (1)
    int rows, c, pixels;   // rows: B · pixels
};

// With n = |a|, m = n + eps, g = w (a / m - b / m(b)) and s = 2 · dloss · weight / rows: da = s (g / m - a (sum g a) / (n m^2)), and
// 0 where n is 0 or a NaN. Grid: ceil(rows / (BLOCK / WARP)); a warp owns one pixel.
extern "C" __global__ void __launch_bounds__(BLOCK) perceptual_grad(const __grid_constant__ PerceptualGrad p) {
    griddep_wait();
    const int row = block_x() * (BLOCK / WARP) + warp();
    if (row >= p.rows) return;
    const long long at = (long long)row * p.c;
    const float norm = norm_of(p.a + at, p.c), over = 1.0f / (norm + EPS);
    const float over_b = 1.0f / (norm_of(p.b + at, p.c) + EPS);
    const float s = 2.0f * load(p.dloss) * load(p.weights + row / p.pixels) / float(p.rows);
    float dot = 0.0f;
    for (int i = lane(); i < p.c; i += WARP) {
        const float a = to_float(load(p.a + at + i)) * over;
        dot = fma_f(load(p.w + i) * (a - to_float(load(p.b + at + i)) * over_b), a, dot);
    }
    dot = warp_sum(dot);
    for (int i = lane(); i < p.c; i += WARP) {
        const float x = to_float(load(p.a + at + i)), a = x * over;
        const float g = load(p.w + i) * (a - to_float(load(p.b + at + i)) * over_b);
        const float d = norm > 0.0f ? s * (g * over - x / norm * (dot * over)) : 0.0f;
        store(p.da + at + i, from_float<T>(d));
    }
}

struct StandardizeFwd {
    T* y;        // (rows,3)
    const T* x;  // (rows,3)
    long long n;
    int shifted;  // 0 for gradients
};

// y = (x - shift) / scale by channel, or without the shift. Grid: ceil(n / BLOCK); a thread owns one element. y may be x's memory.
extern "C" __global__ void __launch_bounds__(BLOCK) standardize_fwd(const __grid_constant__ StandardizeFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const int c = int(i % 3);
    const float shift = p.shifted ? (c == 0 ? -0.030f : c == 1 ? -0.088f : -0.188f) : 0.0f;
    const float scale = c == 0 ? 0.458f : c == 1 ? 0.448f : 0.450f;
    store(p.y + i, from_float<T>((to_float(load(p.x + i)) - shift) / scale));
}
