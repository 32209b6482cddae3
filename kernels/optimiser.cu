// The optimiser: Adam with its moments, and the average of the weights, in one pass; the norm of all gradients; sums of gradients
// over batches. All f32.
// Occupancy: by threads; shared memory is 32 bytes.
// types: f32
#include "dev.cuh"

constexpr int BLOCK = 256;

struct AdamFwd {
    float* w;            // (n), updated, as m, v and average
    float* m;
    float* v;
    float* average;      // (n) or null
    const float* g;      // (n)
    const float* rates;  // (4): learning rate, 1 - beta1^t, 1 - beta2^t, share of the average that is kept
    const float* factor; // of the gradients; nothing is done where it is not finite
    long long n;
    float beta1, beta2, eps, decay;  // decay: of the weights
    int coupled;         // decay is added to the gradient (Adam), not taken from the weight (AdamW)
};

// Grid: ceil(n / BLOCK); a thread owns one weight.
extern "C" __global__ void __launch_bounds__(BLOCK) adam_fwd(const __grid_constant__ AdamFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    const float factor = load(p.factor);
    if (i >= p.n || !is_finite_f(factor)) return;
    const float rate = load(p.rates);
    float w = load(p.w + i), g = load(p.g + i) * factor;
    if (p.coupled) {
        g = fma_f(p.decay, w, g);
    } else {
        w = fma_f(-rate * p.decay, w, w);
    }
    const float m = fma_f(1.0f - p.beta1, g, p.beta1 * load(p.m + i));
    const float v = fma_f((1.0f - p.beta2) * g, g, p.beta2 * load(p.v + i));
    store(p.m + i, m);
    store(p.v + i, v);
    const float root = sqrt_f(v) / sqrt_f(load(p.rates + 2)) + p.eps;
    w = fma_f(-rate / load(p.rates + 1), m / root, w);
    store(p.w + i, w);
    if (p.average) {
        const float a = load(p.average + i);
        store(p.average + i, fma_f(1.0f - load(p.rates + 3), w - a, a));
    }
}

struct SquareSumFwd {
    float* partial;  // (grid)
    const float* g;  // (n)
    long long n;
};

struct SumSmem {
    float scratch[BLOCK / WARP];
};

// Grid: at most 1024; block b adds up the squares of elements b · BLOCK + t, + grid · BLOCK, ….
extern "C" __global__ void __launch_bounds__(BLOCK) square_sum_fwd(const __grid_constant__ SquareSumFwd p) {
    griddep_wait();
    SumSmem& s = smem<SumSmem>();
    float sum = 0.0f;
    for (long long i = (long long)block_x() * BLOCK + thread_x(); i < p.n; i += (long long)grid_x() * BLOCK) {
        const float g = load(p.g + i);
        sum = fma_f(g, g, sum);
    }
    sum = block_sum<BLOCK>(sum, s.scratch);
    if (thread_x() == 0) store(p.partial + block_x(), sum);
}

struct SquareSumAdd {
    float* y;              // (1)
    const float* before;   // (1) or null
    const float* partial;  // (count)
    int count;
};

// y = before + the sum of the partial sums. Grid: 1.
extern "C" __global__ void __launch_bounds__(BLOCK) square_sum_add(const __grid_constant__ SquareSumAdd p) {
    griddep_wait();
    SumSmem& s = smem<SumSmem>();
    float sum = 0.0f;
    for (int i = thread_x(); i < p.count; i += BLOCK) sum += load(p.partial + i);
    sum = block_sum<BLOCK>(sum, s.scratch);
    if (thread_x() == 0) store(p.y, p.before ? load(p.before) + sum : sum);
}

struct ClipFwd {
    float* factor;         // (1)
    float* norm;           // (1)
    const float* squares;  // (1)
    const float* scale;    // (1): what makes the true gradients of those that were summed
    const float* guard0;   // (1) or null: must be finite too
    const float* guard1;   // (1) or null
    float most;            // 0: no limit
};

// norm = scale · √squares. factor = scale, or scale · most / (norm + 1e-6) where norm + 1e-6 is beyond a limit `most`; infinite, so
// that adam_fwd does nothing, where the norm or a guard is not finite. Grid: 1; its first thread works.
extern "C" __global__ void __launch_bounds__(BLOCK) clip_fwd(const __grid_constant__ ClipFwd p) {
    griddep_wait();
    if (thread_x() != 0) return;
    const float scale = load(p.scale), norm = sqrt_f(load(p.squares)) * scale;
    float factor = scale;
    if (p.most > 0.0f && norm + 1e-6f > p.most) factor = scale * (p.most / (norm + 1e-6f));
    const bool finite = is_finite_f(norm) && (!p.guard0 || is_finite_f(load(p.guard0))) && (!p.guard1 || is_finite_f(load(p.guard1)));
    store(p.factor, finite ? factor : FLOAT_INF);
    store(p.norm, norm);
}

struct AccumulateFwd {
    float* sum;         // (n), updated
    const float* g;     // (n)
    const float* more;  // (1): 0 where the sum begins with g
    long long n;
};

// sum = g, or sum + g. Grid: ceil(n / BLOCK); a thread owns one element.
extern "C" __global__ void __launch_bounds__(BLOCK) accumulate_fwd(const __grid_constant__ AccumulateFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const float g = load(p.g + i);
    store(p.sum + i, load(p.more) == 0.0f ? g : load(p.sum + i) + g);
}
