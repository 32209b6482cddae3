// y = x of the next element, four elements a thread. Wrong: the vector starts off its alignment.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct MisalignedLoad {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) misaligned_load(const __grid_constant__ MisalignedLoad p) {
    const int i = (block_x() * BLOCK + thread_x()) * 4;
    if (i >= p.n) return;
#if BAD
    Vec<float, 4> v = i + 4 < p.n ? load<4>(p.x + i + 1) : load<4>(p.x + i);
#else
    Vec<float, 4> v = load<4>(p.x + i);
    if (i + 4 < p.n) {
        for (int k = 0; k < 3; k++) v[k] = v[k + 1];
        v[3] = load(p.x + i + 4);
    }
#endif
    store(p.y + i, v);
}
