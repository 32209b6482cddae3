// Copies by way of a tensor copy. Wrong: the wait names the phase before the first, which counts as over.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "tensor_copy.cuh"

struct TensorWrongPhase {
    TensorMap map;   // of x
    float* y;        // (n)
    const float* x;  // (n), rows of WIDTH
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) tensor_wrong_phase(const __grid_constant__ TensorWrongPhase p) {
    Shared& s = smem<Shared>();
    if (thread_x() == 0) {
        mbarrier_init(s.full, 1);
        fence_mbarriers();
        copy_box(s, p.map);
    }
    sync_block();
    mbarrier_wait(s.full, BAD);
    write(p.y, s);
#if BAD
    mbarrier_wait(s.full, 0);
#endif
}
