// Sums the blocks, each times its step, through a ring of two. Wrong: a slot is refilled before all have read it.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;
constexpr int STAGES = 2, STEPS = 8;

struct Shared {
    alignas(16) float x[STAGES][BLOCK];
};

struct RingReuse {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) ring_reuse(const __grid_constant__ RingReuse p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), blocks = p.n / BLOCK;
    // The block of step k, by the threads that have a copy to issue.
    auto fetch = [&](int k) {
        const float* from = p.x + (int(block_x()) + k) % blocks * BLOCK;
        if (k < STEPS && t < BLOCK / 4) cp_async(s.x[k % STAGES] + 4 * t, from + 4 * t, true);
        cp_async_commit();
    };
    float sum = 0;
    fetch(0);
    for (int k = 0; k < STEPS; k++) {
        cp_async_wait<0>();
#if BAD
        fetch(k + 1);
        sync_block();
#else
        sync_block();
        fetch(k + 1);
#endif
        sum += float(k + 1) * s.x[k % STAGES][BLOCK - 1 - t];
    }
    cp_async_wait<0>();
    store(p.y + block_x() * BLOCK + t, sum);
}
