// Reverses each block through an asynchronous copy. Wrong: a copy that is in no group is not waited for.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    alignas(16) float x[BLOCK];
};

struct MissingCommit {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) missing_commit(const __grid_constant__ MissingCommit p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), first = block_x() * BLOCK;
    if (t < BLOCK / 4) cp_async(s.x + 4 * t, p.x + first + 4 * t, true);
#if !BAD
    cp_async_commit();
#endif
    cp_async_wait<0>();
    sync_block();
    const float y = s.x[BLOCK - 1 - t];
    cp_async_commit();
    cp_async_wait<0>();
    store(p.y + first + t, y);
}
