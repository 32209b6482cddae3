// y = x of the next lane, through shared memory. Wrong: lanes do not wait for each other.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    float x[BLOCK];
};

struct MissingWarpBarrier {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) missing_warp_barrier(const __grid_constant__ MissingWarpBarrier p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), i = block_x() * BLOCK + t;
    s.x[t] = load(p.x + i);
#if !BAD
    sync_warp();
#endif
    store(p.y + i, s.x[(t & ~31) + (t + 1) % 32]);
}
