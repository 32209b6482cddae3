// Reverses each block through shared memory. Wrong: a wide load from an odd element.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    alignas(16) float x[BLOCK + 4];
};

struct MisalignedShared {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) misaligned_shared(const __grid_constant__ MisalignedShared p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), first = block_x() * BLOCK;
    s.x[t] = load(p.x + first + t);
    sync_block();
    const int i = BLOCK - 1 - t;
#if BAD
    store(p.y + first + t, load_shared<2>(s.x + i)[0]);
#else
    store(p.y + first + t, load_shared<2>(s.x + i / 2 * 2)[i % 2]);
#endif
}
