// Reverses each block. Wrong: the barrier is inside a branch that half the block takes.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    float x[BLOCK];
};

struct DivergentBarrier {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) divergent_barrier(const __grid_constant__ DivergentBarrier p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), i = block_x() * BLOCK + t;
    s.x[t] = load(p.x + i);
#if BAD
    if (t < BLOCK / 2)
#endif
        sync_block();
    store(p.y + i, s.x[BLOCK - 1 - t]);
}
