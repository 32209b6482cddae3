// Copies by way of tensor cores. Wrong: no fence between what threads store and what the products read.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "wgmma_copy.cuh"

struct WgmmaNoProxyFence {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) wgmma_no_proxy_fence(const __grid_constant__ WgmmaNoProxyFence p) {
    Shared& s = smem<Shared>();
    const int first = block_x() * 2 * PART;
    float d[N / 8][4] = {};
    fill(s, p.x + first);
#if !BAD
    fence_proxy_async();
#endif
    sync_block();
    multiply(d, s);
    wgmma_wait_all(d);
    write(p.y + first, d);
}
