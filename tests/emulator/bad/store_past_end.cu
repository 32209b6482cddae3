// y = 2x. Wrong: stores one element too far.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct StorePastEnd {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) store_past_end(const __grid_constant__ StorePastEnd p) {
    const int i = block_x() * BLOCK + thread_x();
    if (i < p.n) store(p.y + i + BAD, 2.0f * load(p.x + i));
#if BAD
    if (i == 0) store(p.y, 0.0f);
#endif
}
