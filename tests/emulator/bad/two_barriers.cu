// Reverses each block. Wrong: each half of the block waits at a barrier of its own.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    float x[BLOCK];
};

struct TwoBarriers {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) two_barriers(const __grid_constant__ TwoBarriers p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), i = block_x() * BLOCK + t;
    s.x[t] = load(p.x + i);
#if BAD
    if (t < BLOCK / 2) {
        sync_block();
    } else {
        sync_block();
    }
#else
    sync_block();
#endif
    store(p.y + i, s.x[BLOCK - 1 - t]);
}
