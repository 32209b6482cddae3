// y = 2 x, with a prefetch of what no one reads. Wrong: the threads exit while it is on its way.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    alignas(16) float x[BLOCK];
};

struct CopiesAtExit {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) copies_at_exit(const __grid_constant__ CopiesAtExit p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), first = block_x() * BLOCK;
    if (t < BLOCK / 4) cp_async(s.x + 4 * t, p.x + first + 4 * t, true);
    cp_async_commit();
    store(p.y + first + t, 2.0f * load(p.x + first + t));
#if !BAD
    cp_async_wait<0>();
#endif
}
