// Adds to each value that of the lane 16 further. Wrong: only half a warp calls the shuffle.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct InactiveLanes {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) inactive_lanes(const __grid_constant__ InactiveLanes p) {
    const int i = block_x() * BLOCK + thread_x();
    float v = load(p.x + i);
#if BAD
    if (lane() < 16) v += shfl_down(v, 16);
#else
    const float other = shfl_down(v, 16);
    if (lane() < 16) v += other;
#endif
    store(p.y + i, v);
}
