// y = x of the element before. Wrong: the first thread loads before the start.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct LoadBeforeStart {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) load_before_start(const __grid_constant__ LoadBeforeStart p) {
    const int i = block_x() * BLOCK + thread_x();
    if (i < p.n) store(p.y + i, load(p.x + (BAD || i > 0 ? i - 1 : i)));
}
