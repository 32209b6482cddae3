// y = x / the sum of its block. Wrong: threads past n leave before the reduction.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    float scratch[BLOCK / WARP];
};

struct EarlyExit {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) early_exit(const __grid_constant__ EarlyExit p) {
    Shared& s = smem<Shared>();
    const int i = block_x() * BLOCK + thread_x();
    if (BAD && i >= p.n) return;
    const float v = i < p.n ? load(p.x + i) : 0.0f;
    const float sum = block_sum<BLOCK>(v, s.scratch);
    if (i < p.n) store(p.y + i, v / sum);
}
