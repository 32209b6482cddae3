// y = x of the next element, the last one stays. Wrong: the last thread loads past the end.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct LoadPastEnd {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) load_past_end(const __grid_constant__ LoadPastEnd p) {
    const int i = block_x() * BLOCK + thread_x();
    if (i < p.n) store(p.y + i, load(p.x + (BAD || i + 1 < p.n ? i + 1 : i)));
}
