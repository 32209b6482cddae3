// Copies by way of a tensor copy. Wrong: the barrier is told of fewer bytes than come, and its phase is over before them.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "tensor_copy.cuh"

struct TensorNoBytes {
    TensorMap map;   // of x
    float* y;        // (n)
    const float* x;  // (n), rows of WIDTH
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) tensor_no_bytes(const __grid_constant__ TensorNoBytes p) {
    Shared& s = smem<Shared>();
    if (thread_x() == 0) {
        mbarrier_init(s.full, 1);
        fence_mbarriers();
        mbarrier_expect(s.full, BOX - BAD * 128);
        tma_load(s.rows, p.map, 0, block_x() * ROWS, 0, 0, s.full);
    }
    sync_block();
    mbarrier_wait(s.full, 0);
    write(p.y, s);
}
