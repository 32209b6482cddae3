// Copies by way of tensor cores. Wrong: the results are read before the wait.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "wgmma_copy.cuh"

struct WgmmaEarlyRead {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) wgmma_early_read(const __grid_constant__ WgmmaEarlyRead p) {
    Shared& s = smem<Shared>();
    const int first = block_x() * 2 * PART;
    float d[N / 8][4] = {};
    fill(s, p.x + first);
    fence_proxy_async();
    sync_block();
    multiply(d, s);
#if BAD
    write(p.y + first, d);
    wgmma_wait_all(d);
#else
    wgmma_wait_all(d);
    write(p.y + first, d);
#endif
}
