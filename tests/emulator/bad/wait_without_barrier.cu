// Reverses each block through an asynchronous copy. Wrong: a wait is for the own copies; others need a barrier too.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    alignas(16) float x[BLOCK];
};

struct WaitWithoutBarrier {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) wait_without_barrier(const __grid_constant__ WaitWithoutBarrier p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), first = block_x() * BLOCK;
    if (t < BLOCK / 4) cp_async(s.x + 4 * t, p.x + first + 4 * t, true);
    cp_async_commit();
    cp_async_wait<0>();
#if !BAD
    sync_block();
#endif
    store(p.y + first + t, s.x[BLOCK - 1 - t]);
}
