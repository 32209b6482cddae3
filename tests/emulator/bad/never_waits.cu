// y = x + 1, in a programmatic launch. Wrong: threads past n leave without a wait; a block of such threads alone would be over
// before the kernel before it.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct NeverWaits {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) never_waits(const __grid_constant__ NeverWaits p) {
    const int i = block_x() * BLOCK + thread_x();
    if (BAD && i >= p.n) return;
    griddep_wait();
    if (i < p.n) store(p.y + i, load(p.x + i) + 1.0f);
}
