// Sums pairs into shared memory. Wrong: the accumulators do not start at zero.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    float x[BLOCK];
};

struct SmemNotZeroed {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) smem_not_zeroed(const __grid_constant__ SmemNotZeroed p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), i = block_x() * BLOCK + t;
#if !BAD
    s.x[t] = 0.0f;
#endif
    s.x[t] += load(p.x + i);
    s.x[t] += 1.0f;
    store(p.y + i, s.x[t]);
}
