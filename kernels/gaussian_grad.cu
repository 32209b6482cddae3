// dmean = scale · dz, dlogvar = scale · dz · noise · exp(logvar / 2) / 2 where logvar is within -30…20, else (NaN too) 0. Grid:
// ceil(n / BLOCK); a thread owns one element of z, and the two of moments that it comes from. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct GaussianGrad {
    T* dx;               // (rows,2Z): dmean, dlogvar
    const T* moments;    // (rows,2Z)
    const float* noise;  // (rows,Z)
    const float* dz;     // (rows,Z)
    long long n;         // rows·Z
    int z;
    float scale;
};

extern "C" __global__ void __launch_bounds__(BLOCK) gaussian_grad(const __grid_constant__ GaussianGrad p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const long long row = i / p.z, mean = row * 2 * p.z + (i - row * p.z), var = mean + p.z;
    const float logvar = to_float(load(p.moments + var)), d = p.scale * load(p.dz + i);
    const bool inside = logvar >= -30.0f && logvar <= 20.0f;
    store(p.dx + mean, from_float<T>(d));
    store(p.dx + var, from_float<T>(inside ? 0.5f * d * load(p.noise + i) * exp_f(0.5f * logvar) : 0.0f));
}
