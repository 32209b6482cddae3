// Passes values around a ring, three times. Wrong: the next round overwrites what a neighbour has yet to read.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    float x[BLOCK];
};

struct MissingSecondBarrier {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) missing_second_barrier(const __grid_constant__ MissingSecondBarrier p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), i = block_x() * BLOCK + t;
    float v = load(p.x + i);
    for (int round = 0; round < 3; round++) {
        s.x[t] = v;
        sync_block();
        v = s.x[(t + 1) % BLOCK];
#if !BAD
        sync_block();
#endif
    }
    store(p.y + i, v);
}
