// y = x, four elements a thread. Wrong: the last thread moves whole vectors past n.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct UncheckedVectorTail {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) unchecked_vector_tail(const __grid_constant__ UncheckedVectorTail p) {
    const int i = (block_x() * BLOCK + thread_x()) * 4;
    if (i + 4 <= p.n || (BAD && i < p.n)) {
        store(p.y + i, load<4>(p.x + i));
    } else {
        for (int k = i; k < p.n; k++) store(p.y + k, load(p.x + k));
    }
}
