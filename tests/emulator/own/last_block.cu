// The last block to arrive adds up what each block has left: y[t] = Σ x[b,t]. Ways 0 and 1 are right; 2 has no fence, 3 has
// it too late, in 4 one thread tells of stores that it has not waited for, and in 5 who reads has no fence.
#include "dev.cuh"
// types: f32
// variants: WAY=0 WAY=1 WAY=2 WAY=3 WAY=4 WAY=5

constexpr int BLOCK = 64;

struct Shared {
    unsigned before;
};

struct LastBlock {
    float* y;          // (BLOCK)
    float* parts;      // (blocks,BLOCK)
    const float* x;    // (blocks,BLOCK)
    unsigned* counter; // (1) zero
};

extern "C" __global__ void __launch_bounds__(BLOCK) last_block(const __grid_constant__ LastBlock p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), i = block_x() * BLOCK + t, blocks = grid_x();
    store(p.parts + i, load(p.x + i));
    if (WAY == 0 || WAY >= 4) fence_gpu();
    if (WAY != 4) sync_block();
    if (t == 0) {
        if (WAY == 1) fence_gpu();
        s.before = atomic_inc_u32(p.counter, blocks - 1);
        if (WAY == 3) fence_gpu();
    }
    sync_block();
    if (int(s.before) != blocks - 1) return;
    if (WAY != 5) fence_gpu();
    float sum = 0;
    for (int b = 0; b < blocks; b++) sum += load(p.parts + b * BLOCK + t);
    store(p.y + t, sum);
}
