// Copies by way of a tensor copy. Wrong: the copy overtakes what threads have written where it lands.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "tensor_copy.cuh"

struct TensorNoProxyFence {
    TensorMap map;   // of x
    float* y;        // (n)
    const float* x;  // (n), rows of WIDTH
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) tensor_no_proxy_fence(const __grid_constant__ TensorNoProxyFence p) {
    Shared& s = smem<Shared>();
    store_shared(s.rows + thread_x() * 4, Vec<float, 4>{});
#if !BAD
    fence_proxy_async();
#endif
    sync_block();
    if (thread_x() == 0) {
        mbarrier_init(s.full, 1);
        fence_mbarriers();
        copy_box(s, p.map);
    }
    sync_block();
    mbarrier_wait(s.full, 0);
    write(p.y, s);
}
