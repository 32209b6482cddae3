// y[b] = [sin(t f) | cos(t f)] or flipped, f_i = 10000^(-i / (E/2 - shift)) rounded to f32, t·f rounded to f32.
// Grid: ceil(n / BLOCK); a thread owns one element of y. Wants: E even, E / 2 not shift. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 128;

struct TimestepFwd {
    T* y;            // (B,E)
    const float* t;  // (B)
    int n, width;    // B·E, E
    int flip;        // cos first
    float shift;     // of the exponent: 0 or 1
};

extern "C" __global__ void __launch_bounds__(BLOCK) timestep_fwd(const __grid_constant__ TimestepFwd p) {
    griddep_wait();
    const int i = block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const int half = p.width / 2, b = i / p.width, c = i - b * p.width, f = c % half;
    // In double: where the frequency is just below 1, one ulp of it turns the angle by 6e-5 at t = 999.
    const float frequency = float(exp_d(-9.210340371976184 * double(f) / (double(half) - double(p.shift))));
    const float angle = mul_rn_f(load(p.t + b), frequency);
    store(p.y + i, from_float<T>((c < half) == (p.flip != 0) ? cos_f(angle) : sin_f(angle)));
}
