// Copies by way of a tensor copy. Wrong: only the thread that began the copy waits for it.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "tensor_copy.cuh"

struct TensorNoWait {
    TensorMap map;   // of x
    float* y;        // (n)
    const float* x;  // (n), rows of WIDTH
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) tensor_no_wait(const __grid_constant__ TensorNoWait p) {
    Shared& s = smem<Shared>();
    if (thread_x() == 0) {
        mbarrier_init(s.full, 1);
        fence_mbarriers();
        copy_box(s, p.map);
    }
    sync_block();
#if BAD
    if (thread_x() == 0)
#endif
        mbarrier_wait(s.full, 0);
    write(p.y, s);
}
