// Reverses each block through shared memory of 64 KB, which the launch must pass. Wrong: the launch passes another size.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;
constexpr int SMEM_BYTES = 65536 - 1024 * BAD;

struct Shared {
    float x[SMEM_BYTES / 4];
};

struct DynamicSize {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) dynamic_size(const __grid_constant__ DynamicSize p) {
    Shared& s = smem_dynamic<Shared>();
    const int t = thread_x(), first = block_x() * BLOCK;
    float* x = s.x + SMEM_BYTES / 4 - BLOCK;
    x[t] = load(p.x + first + t);
    sync_block();
    store(p.y + first + t, x[BLOCK - 1 - t]);
}
