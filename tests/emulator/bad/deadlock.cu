// y = x + the neighbour's. Wrong: half a warp waits in a shuffle, the other half at the block's barrier.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Deadlock {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) deadlock(const __grid_constant__ Deadlock p) {
    const int i = block_x() * BLOCK + thread_x();
    float v = load(p.x + i);
#if BAD
    if (lane() < 16) {
        v += shfl_xor(v, 1);
    } else {
        sync_block();
    }
#else
    v += shfl_xor(v, 1);
    sync_block();
#endif
    store(p.y + i, v);
}
