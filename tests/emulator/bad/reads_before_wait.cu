// y = x + 1, in a programmatic launch. Wrong: reads x, which the kernel before may still write, before it waits.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct ReadsBeforeWait {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) reads_before_wait(const __grid_constant__ ReadsBeforeWait p) {
    const int i = block_x() * BLOCK + thread_x();
    if (!BAD) griddep_wait();
    const float x = i < p.n ? load(p.x + i) : 0.0f;
    if (BAD) griddep_wait();
    if (i < p.n) store(p.y + i, x + 1.0f);
}
