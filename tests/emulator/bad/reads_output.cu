// y = x + 1. Wrong: adds to y, which holds nothing yet.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct ReadsOutput {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) reads_output(const __grid_constant__ ReadsOutput p) {
    const int i = block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
#if BAD
    store(p.y + i, load(p.y + i) + load(p.x + i));
#else
    store(p.y + i, load(p.x + i) + 1.0f);
#endif
}
