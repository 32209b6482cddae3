// Copies by way of a tensor copy. Wrong: the block ends while the copy is on its way.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "tensor_copy.cuh"

struct TensorAtExit {
    TensorMap map;   // of x
    float* y;        // (n)
    const float* x;  // (n), rows of WIDTH
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) tensor_at_exit(const __grid_constant__ TensorAtExit p) {
    Shared& s = smem<Shared>();
    if (thread_x() == 0) {
        mbarrier_init(s.full, 1);
        fence_mbarriers();
        copy_box(s, p.map);
    }
    sync_block();
    if (!BAD || block_x() > 0) {
        mbarrier_wait(s.full, 0);
        write(p.y, s);
    } else {
        const int first = thread_x() * 8;
        for (int i = 0; i < 8; i++) store(p.y + first + i, load(p.x + first + i));
    }
}
