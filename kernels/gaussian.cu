// y = scale · (mean + exp(logvar / 2) · noise), logvar held within -30 … 20. Grid: ceil(n / BLOCK); a thread owns one
// element of y. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct GaussianFwd {
    float* y;            // (rows,Z)
    const T* moments;    // (rows,2Z): mean, logvar
    const float* noise;  // (rows,Z)
    long long n;         // rows·Z
    int z;  // Z
    float scale;
};

extern "C" __global__ void __launch_bounds__(BLOCK) gaussian_fwd(const __grid_constant__ GaussianFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const long long row = i / p.z, c = i - row * p.z;
    const T* m = p.moments + row * 2 * p.z + c;
    float logvar = to_float(load(m + p.z));
    logvar = logvar < -30.0f ? -30.0f : logvar > 20.0f ? 20.0f : logvar;  // a NaN stays one
    store(p.y + i, p.scale * fma_f(exp_f(0.5f * logvar), load(p.noise + i), to_float(load(m))));
}
