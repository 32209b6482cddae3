// Copies by way of tensor cores. Wrong: the operands are overwritten before the products are done.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "wgmma_copy.cuh"

struct WgmmaOverwritten {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) wgmma_overwritten(const __grid_constant__ WgmmaOverwritten p) {
    Shared& s = smem<Shared>();
    const int first = block_x() * 2 * PART;
    float d[N / 8][4] = {};
    fill(s, p.x + first);
    fence_proxy_async();
    sync_block();
    multiply(d, s);
#if !BAD
    wgmma_wait_all(d);
#endif
    sync_block();
    put(s.a[thread_x() / 128], thread_x() % 128 / 2, thread_x() % 2, Vec<bf16, 8>{});
#if BAD
    sync_block();
    wgmma_wait_all(d);
#endif
    write(p.y + first, d);
}
