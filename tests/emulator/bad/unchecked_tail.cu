// y = x. Wrong: the last block does not look where n ends.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct UncheckedTail {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) unchecked_tail(const __grid_constant__ UncheckedTail p) {
    const int i = block_x() * BLOCK + thread_x();
    if (BAD || i < p.n) store(p.y + i, load(p.x + i));
}
