// Reverses each block through shared memory. Wrong: no barrier between write and read.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    float x[BLOCK];
};

struct MissingBarrier {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) missing_barrier(const __grid_constant__ MissingBarrier p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), i = block_x() * BLOCK + t;
    s.x[t] = load(p.x + i);
#if !BAD
    sync_block();
#endif
    store(p.y + i, s.x[BLOCK - 1 - t]);
}
