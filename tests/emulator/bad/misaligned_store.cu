// y of the next element = x, four elements a thread. Wrong: the vector starts off its alignment.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct MisalignedStore {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) misaligned_store(const __grid_constant__ MisalignedStore p) {
    const int i = (block_x() * BLOCK + thread_x()) * 4;
    if (i == 0) store(p.y, 0.0f);
    if (i + 4 >= p.n) {
        for (int k = i; k + 1 < p.n; k++) store(p.y + k + 1, load(p.x + k));
        return;
    }
    const Vec<float, 4> v = load<4>(p.x + i);
#if BAD
    store(p.y + i + 1, v);
#else
    for (int k = 0; k < 4; k++) store(p.y + i + 1 + k, v[k]);
#endif
}
