// Shifts each block by one through shared memory. Wrong: writes past the struct.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    float x[BLOCK];
};

struct SmemOverflow {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) smem_overflow(const __grid_constant__ SmemOverflow p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), i = block_x() * BLOCK + t;
    float* x = s.x;
    x[BAD ? t + 1 : t] = load(p.x + i);
    if (BAD && t == 0) x[0] = 0.0f;
    sync_block();
    store(p.y + i, s.x[t]);
}
