// Reverses each block through an asynchronous copy. Wrong: its destination is not aligned to 16 bytes.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    alignas(16) float x[BLOCK + 4];
};

struct MisalignedCopy {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) misaligned_copy(const __grid_constant__ MisalignedCopy p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), first = block_x() * BLOCK;
    float* x = s.x + (BAD ? 2 : 4);
    if (t < BLOCK / 4) cp_async(x + 4 * t, p.x + first + 4 * t, true);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    store(p.y + first + t, x[BLOCK - 1 - t]);
}
