// Reverses each block through an asynchronous copy. Wrong: one thread too many copies, past the shared memory.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    alignas(16) float x[BLOCK];
};

struct CopyPastEnd {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) copy_past_end(const __grid_constant__ CopyPastEnd p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), first = block_x() * BLOCK;
    const int from = first + 4 * t < p.n ? first + 4 * t : 0;
    if (t < BLOCK / 4 + BAD) cp_async(s.x + 4 * t, p.x + from, true);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    store(p.y + first + t, s.x[BLOCK - 1 - t]);
}
