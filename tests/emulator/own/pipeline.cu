// Sums the blocks, each times its step, through a ring of asynchronous copies. Every wait, barrier and commit is needed,
// but for one barrier where EXTRA is 1.
#include "dev.cuh"
// types: f32
// variants: EXTRA=0 EXTRA=1

constexpr int BLOCK = 64;
constexpr int STAGES = 3, STEPS = 8;

struct Shared {
    alignas(16) float x[STAGES][BLOCK];
};

struct Pipeline {
    float* y;        // (n)
    const float* x;  // (n), a multiple of BLOCK
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) pipeline(const __grid_constant__ Pipeline p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), blocks = p.n / BLOCK;
    auto fetch = [&](int k) {
        const float* from = p.x + (int(block_x()) + k) % blocks * BLOCK;
        if (k < STEPS && t < BLOCK / 4) cp_async(s.x[k % STAGES] + 4 * t, from + 4 * t, true);
        cp_async_commit();
    };
    float sum = 0;
    for (int k = 0; k < STAGES - 1; k++) fetch(k);
    for (int k = 0; k < STEPS; k++) {
        cp_async_wait<STAGES - 2>();
        sync_block();
        fetch(k + STAGES - 1);
#if EXTRA
        sync_block();
#endif
        sum += float(k + 1) * s.x[k % STAGES][BLOCK - 1 - t];
    }
    store(p.y + block_x() * BLOCK + t, sum);
}
