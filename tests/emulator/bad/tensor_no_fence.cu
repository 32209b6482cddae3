// Copies by way of a tensor copy. Wrong: the copy may arrive at a barrier that its proxy has not seen initialised.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "tensor_copy.cuh"

struct TensorNoFence {
    TensorMap map;   // of x
    float* y;        // (n)
    const float* x;  // (n), rows of WIDTH
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) tensor_no_fence(const __grid_constant__ TensorNoFence p) {
    Shared& s = smem<Shared>();
    if (thread_x() == 0) {
        mbarrier_init(s.full, 1);
#if !BAD
        fence_mbarriers();
#endif
        copy_box(s, p.map);
    }
    sync_block();
    mbarrier_wait(s.full, 0);
    write(p.y, s);
}
