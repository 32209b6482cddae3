// Copies by way of a tensor copy. Wrong: the swizzle goes by the address, and the box does not begin where its pattern does.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1
#include "tensor_copy.cuh"

struct TensorMisaligned {
    TensorMap map;   // of x
    float* y;        // (n)
    const float* x;  // (n), rows of WIDTH
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) tensor_misaligned(const __grid_constant__ TensorMisaligned p) {
    Shared& s = smem<Shared>();
    float* rows = s.rows + BAD * 4 * WIDTH;
    if (thread_x() == 0) {
        mbarrier_init(s.full, 1);
        fence_mbarriers();
        mbarrier_expect(s.full, BOX);
        tma_load(rows, p.map, 0, block_x() * ROWS, 0, 0, s.full);
    }
    sync_block();
    mbarrier_wait(s.full, 0);
    write(p.y, s);
}
