// Losses of a discriminator's logits and their gradient; the weight that balances the generator's loss against the distance of the
// reconstruction (VQGAN, Esser et al. 2021, eq. 7); and the product of a tensor with a number.
// Occupancy: by threads; shared memory is 32 bytes.
#include "dev.cuh"

constexpr int BLOCK = 256;

// softplus(x) = log(1 + e^x), without overflow.
DEV float softplus(float x) { return max_f(x, 0.0f) + log_f(1.0f + exp_f(-abs_f(x))); }
DEV float sigmoid(float x) { return 1.0f / (1.0f + exp_f(-x)); }

// 0: -x, the generator's. Hinge: 1, of real pictures, max(0, 1 - x); 2, of made ones, max(0, 1 + x). Vanilla: 3, of real ones,
// softplus(-x); 4, of made ones, softplus(x). A NaN stays one.
DEV float cost(int kind, float x) {
    switch (kind) {
        case 0: return -x;
        case 1: return 1.0f - x > 0.0f ? 1.0f - x : x == x ? 0.0f : x;
        case 2: return 1.0f + x > 0.0f ? 1.0f + x : x == x ? 0.0f : x;
        case 3: return x == x ? softplus(-x) : x;
        default: return x == x ? softplus(x) : x;
    }
}

// Of the cost; a hinge's is 0 at its corner and for a NaN.
DEV float cost_slope(int kind, float x) {
    switch (kind) {
        case 0: return -1.0f;
        case 1: return x < 1.0f ? -1.0f : 0.0f;
        case 2: return x > -1.0f ? 1.0f : 0.0f;
        case 3: return -sigmoid(-x);
        default: return sigmoid(x);
    }
}

struct LogitLossFwd {
    float* partial;  // (grid)
    const T* x;      // (n)
    long long n;
    int kind;
};

struct LogitSmem {
    float scratch[BLOCK / WARP];
};

// Grid: at most 1024; block b adds up the costs of elements b · BLOCK + t, + grid · BLOCK, ….
extern "C" __global__ void __launch_bounds__(BLOCK) logit_loss_fwd(const __grid_constant__ LogitLossFwd p) {
    griddep_wait();
    LogitSmem& s = smem<LogitSmem>();
    float sum = 0.0f;
    for (long long i = (long long)block_x() * BLOCK + thread_x(); i < p.n; i += (long long)grid_x() * BLOCK) {
        sum += cost(p.kind, to_float(load(p.x + i)));
    }
    sum = block_sum<BLOCK>(sum, s.scratch);
    if (thread_x() == 0) store(p.partial + block_x(), sum);
}

struct LogitLossMean {
    float* y;              // (1)
    const float* partial;  // (count)
    int count;
    float n;               // elements
};

// y = the sum of the partial sums / n. Grid: 1.
extern "C" __global__ void __launch_bounds__(BLOCK) logit_loss_mean(const __grid_constant__ LogitLossMean p) {
    griddep_wait();
    LogitSmem& s = smem<LogitSmem>();
    float sum = 0.0f;
    for (int i = thread_x(); i < p.count; i += BLOCK) sum += load(p.partial + i);
    sum = block_sum<BLOCK>(sum, s.scratch);
    if (thread_x() == 0) store(p.y, sum / p.n);
}

struct LogitLossGrad {
    T* dx;               // (n)
    const T* x;          // (n)
    const float* dloss;  // (1)
    long long n;
    int kind;
};

// dx = dloss · slope(x) / n. Grid: ceil(n / BLOCK); a thread owns one element.
extern "C" __global__ void __launch_bounds__(BLOCK) logit_loss_grad(const __grid_constant__ LogitLossGrad p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const float share = load(p.dloss) / float(p.n);
    store(p.dx + i, from_float<T>(share * cost_slope(p.kind, to_float(load(p.x + i)))));
}

struct AdaptiveWeightFwd {
    float* weight;        // (1)
    float* share;         // (1)
    const float* likely;  // (1): the sum of squares of the distance's gradient at the last layer
    const float* judged;  // (1): that of the generator's loss
    const float* scale;   // (1): what both gradients are multiplied by, the scale of the loss
    const float* factor;  // (1): 0 before the discriminator's first step
    float most;           // of the quotient
    float times;          // the weight that was asked for
};

// weight = times · min(√likely / (√judged + 1e-4 scale), most); share = factor · weight. Grid: 1; its first thread works.
extern "C" __global__ void __launch_bounds__(BLOCK) adaptive_weight_fwd(const __grid_constant__ AdaptiveWeightFwd p) {
    griddep_wait();
    if (thread_x() != 0) return;
    const float below = fma_f(1e-4f, load(p.scale), sqrt_f(load(p.judged)));
    const float quotient = sqrt_f(load(p.likely)) / below;
    const float weight = p.times * (quotient > p.most ? p.most : quotient);
    store(p.weight, weight);
    store(p.share, load(p.factor) * weight);
}

struct ScaleFwd {
    T* y;            // (n)
    const T* x;      // (n)
    const float* s;  // (1)
    long long n;
};

// y = s · x. Grid: ceil(n / BLOCK); a thread owns one element. y may be x's memory.
extern "C" __global__ void __launch_bounds__(BLOCK) scale_fwd(const __grid_constant__ ScaleFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i < p.n) store(p.y + i, from_float<T>(load(p.s) * to_float(load(p.x + i))));
}
