// Reverses each block through wide stores to shared memory. Wrong: the last one lies past its end.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    alignas(16) float x[BLOCK];
};

struct SharedPastEnd {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) shared_past_end(const __grid_constant__ SharedPastEnd p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), first = block_x() * BLOCK;
    if (t < BLOCK / 4) store_shared(s.x + 4 * t + (BAD && t == BLOCK / 4 - 1 ? 4 : 0), load<4>(p.x + first + 4 * t));
    sync_block();
    store(p.y + first + t, s.x[BLOCK - 1 - t]);
}
