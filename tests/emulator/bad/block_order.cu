// y = a running sum of blocks. Wrong: a block reads what an earlier block wrote in the same launch.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct BlockOrder {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) block_order(const __grid_constant__ BlockOrder p) {
    const int t = thread_x(), i = block_x() * BLOCK + t;
#if BAD
    const float before = i >= BLOCK ? load(p.y + i - BLOCK) : 0.0f;
    store(p.y + i, before + load(p.x + i));
#else
    float v = 0.0f;
    for (int k = t; k <= i; k += BLOCK) v += load(p.x + k);
    store(p.y + i, v);
#endif
}
