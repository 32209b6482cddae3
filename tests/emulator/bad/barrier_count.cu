// Reverses each block. Wrong: odd threads pass one barrier more.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    float x[BLOCK];
};

struct BarrierCount {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) barrier_count(const __grid_constant__ BarrierCount p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), i = block_x() * BLOCK + t;
    s.x[t] = load(p.x + i);
    for (int k = 0; k < 1 + (BAD ? t & 1 : 1); k++) sync_block();
    store(p.y + i, s.x[BLOCK - 1 - t]);
}
