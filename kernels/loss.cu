// Losses of training, and their gradients. Each image is summed in f32 by one block, in an order that n alone fixes; then one
// thread adds up the images in theirs.
// Occupancy: by threads; shared memory is 32 bytes.
//
// d = prediction - target; rho(d) = |d|, d^2, or Huber's d^2 / 2 up to delta and delta (|d| - delta / 2) beyond.
#include "dev.cuh"

constexpr int BLOCK = 256;

DEV float rho(int kind, float delta, float d) {
    const float a = abs_f(d);
    if (kind == 0) return a;
    if (kind == 1) return d * d;
    return a <= delta ? 0.5f * d * d : delta * (a - 0.5f * delta);
}

// Of rho; |d|'s is 0 at 0. Of a NaN only d²'s is a NaN, the others 0.
DEV float slope(int kind, float delta, float d) {
    const float sign = d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : 0.0f;
    if (kind == 0) return sign;
    if (kind == 1) return 2.0f * d;
    return abs_f(d) <= delta ? d : delta * sign;
}

struct LossSmem {
    float scratch[BLOCK / WARP];
};

struct LossFwd {
    float* each;          // (B): the mean of rho over an image
    const T* prediction;  // (B,n)
    const float* target;  // (B,n)
    long long n;
    int kind;             // 0 L1, 1 L2, 2 Huber
    float delta;
};

// Grid: B; a block owns one image.
extern "C" __global__ void __launch_bounds__(BLOCK) loss_fwd(const __grid_constant__ LossFwd p) {
    griddep_wait();
    LossSmem& s = smem<LossSmem>();
    const long long base = (long long)block_x() * p.n;
    float sum = 0.0f;
    for (long long i = thread_x(); i < p.n; i += BLOCK) {
        sum += rho(p.kind, p.delta, to_float(load(p.prediction + base + i)) - load(p.target + base + i));
    }
    sum = block_sum<BLOCK>(sum, s.scratch);
    if (thread_x() == 0) store(p.each + block_x(), sum / float(p.n));
}

struct LossTotal {
    float* loss;           // (1)
    const float* each;     // (B)
    const float* weights;  // (B) or null, for ones
    int batch;
};

// loss = the mean of weight · each over the images. Grid: 1; its first thread works.
extern "C" __global__ void __launch_bounds__(BLOCK) loss_total(const __grid_constant__ LossTotal p) {
    griddep_wait();
    if (thread_x() != 0) return;
    float sum = 0.0f;
    for (int b = 0; b < p.batch; b++) sum += (p.weights ? load(p.weights + b) : 1.0f) * load(p.each + b);
    store(p.loss, sum / float(p.batch));
}

struct LossGrad {
    T* dx;                 // (B,n)
    const T* prediction;   // (B,n)
    const float* target;   // (B,n)
    const float* weights;  // (B), not null
    const float* dloss;    // (1)
    long long n, total;    // total: B·n
    int kind;
    float delta;
};

// dx = dloss · weight · slope(d) / (B · n). Grid: ceil(total / BLOCK); a thread owns one element.
extern "C" __global__ void __launch_bounds__(BLOCK) loss_grad(const __grid_constant__ LossGrad p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.total) return;
    const float d = to_float(load(p.prediction + i)) - load(p.target + i);
    const float share = load(p.dloss) * load(p.weights + i / p.n) / float(p.total);
    store(p.dx + i, from_float<T>(share * slope(p.kind, p.delta, d)));
}

struct KlFwd {
    float* each;       // (B)
    const T* moments;  // (B,pixels,2Z): for each pixel Z means, then Z logvars
    int pixels, z;  // pixels · Z at most 2^31 - BLOCK
};

// each = the sum over an image of (mean^2 + exp(logvar) - 1 - logvar) / 2, logvar held within -30…20, a NaN
// as it is. Grid: B.
extern "C" __global__ void __launch_bounds__(BLOCK) kl_fwd(const __grid_constant__ KlFwd p) {
    griddep_wait();
    LossSmem& s = smem<LossSmem>();
    const long long base = (long long)block_x() * p.pixels * 2 * p.z;
    float sum = 0.0f;
    for (int i = thread_x(); i < p.pixels * p.z; i += BLOCK) {
        const long long at = base + (long long)(i / p.z) * 2 * p.z + i % p.z;
        const float mean = to_float(load(p.moments + at));
        float logvar = to_float(load(p.moments + at + p.z));
        logvar = logvar < -30.0f ? -30.0f : logvar > 20.0f ? 20.0f : logvar;
        sum += 0.5f * (fma_f(mean, mean, exp_f(logvar)) - 1.0f - logvar);
    }
    sum = block_sum<BLOCK>(sum, s.scratch);
    if (thread_x() == 0) store(p.each + block_x(), sum);
}

struct KlGrad {
    T* dx;               // (rows,2Z)
    const T* moments;    // (rows,2Z)
    const float* dloss;  // (1)
    long long n;         // rows·Z
    int z, batch;
};

// dmean = dloss · mean / B, dlogvar = dloss · (exp(logvar) - 1) / (2 B) where logvar is within -30…20, else 0. Grid:
// ceil(n / BLOCK); a thread owns one mean and its logvar.
extern "C" __global__ void __launch_bounds__(BLOCK) kl_grad(const __grid_constant__ KlGrad p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const long long at = i / p.z * 2 * p.z + i % p.z;
    const float share = load(p.dloss) / float(p.batch), logvar = to_float(load(p.moments + at + p.z));
    const bool inside = logvar >= -30.0f && logvar <= 20.0f;
    store(p.dx + at, from_float<T>(share * to_float(load(p.moments + at))));
    store(p.dx + at + p.z, from_float<T>(inside ? 0.5f * share * (exp_f(logvar) - 1.0f) : 0.0f));
}
