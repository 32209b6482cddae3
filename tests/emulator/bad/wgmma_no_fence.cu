// Copies by way of tensor cores, twice. Wrong: the results are changed before the second product, and no wgmma_fence follows.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "wgmma_copy.cuh"

struct WgmmaNoFence {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) wgmma_no_fence(const __grid_constant__ WgmmaNoFence p) {
    Shared& s = smem<Shared>();
    const int first = block_x() * 2 * PART;
    float d[N / 8][4] = {};
    fill(s, p.x + first);
    fence_proxy_async();
    sync_block();
    multiply(d, s);
    wgmma_wait_all(d);
    for (int i = 0; i < N / 2; i++) d[i / 4][i % 4] = 0.0f;
#if !BAD
    wgmma_fence();
#endif
    wgmma<bf16, N>(d, wgmma_descriptor(s.a[warp() / 4]), wgmma_descriptor(s.b));
    wgmma_commit();
    wgmma_wait_all(d);
    write(p.y + first, d);
}
