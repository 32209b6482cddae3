// y = x. Wrong: dereferences an address that is none, without `load`.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct PlainPointer {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) plain_pointer(const __grid_constant__ PlainPointer p) {
    const int i = block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
#if BAD
    store(p.y + i, ((const float*)(long long)p.n)[i]);
#else
    store(p.y + i, load(p.x + i));
#endif
}
