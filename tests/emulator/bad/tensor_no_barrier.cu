// Copies by way of a tensor copy. Wrong: threads wait at a barrier that they may not have seen initialised.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "tensor_copy.cuh"

struct TensorNoBarrier {
    TensorMap map;   // of x
    float* y;        // (n)
    const float* x;  // (n), rows of WIDTH
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) tensor_no_barrier(const __grid_constant__ TensorNoBarrier p) {
    Shared& s = smem<Shared>();
    if (thread_x() == 0) {
        mbarrier_init(s.full, 1);
        fence_mbarriers();
        copy_box(s, p.map);
    }
#if !BAD
    sync_block();
#endif
    mbarrier_wait(s.full, 0);
    write(p.y, s);
}
