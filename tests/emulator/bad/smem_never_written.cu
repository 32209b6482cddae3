// Shifts each block by one through shared memory. Wrong: reads an element that nobody wrote.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    float x[BLOCK];
};

struct SmemNeverWritten {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) smem_never_written(const __grid_constant__ SmemNeverWritten p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), i = block_x() * BLOCK + t;
    if (!BAD || t > 0) s.x[t] = load(p.x + i);
    sync_block();
    store(p.y + i, s.x[(t + 1) % BLOCK]);
}
