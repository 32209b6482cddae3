// y = 16 x, by mma: a holds x in every column, b ones. Wrong: half of the warps take a mma of their own.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct DivergedMma {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) diverged_mma(const __grid_constant__ DivergedMma p) {
    const int t = thread_x(), first = block_x() * BLOCK;
    // Row r of a is x of lane r: with rows 8 and up zero, a warp needs four products for its 32 elements.
    const float x = load(p.x + first + t);
    float y = 0;
    for (int part = 0; part < 4; part++) {
        const float row = shfl(x, 8 * part + int(lane()) / 4);
        const unsigned a[4] = {pack2<bf16>(row, row), 0, pack2<bf16>(row, row), 0};
        const unsigned one = pack2<bf16>(1.0f, 1.0f), b[2] = {one, one};
        float d[4] = {};
        if (BAD && lane() >= 16) {
            mma<bf16>(d, a, b);
        } else {
            mma<bf16>(d, a, b);
        }
        // Row r of d lies with lanes 4 r and up.
        const float of_row = shfl(d[0], 4 * (int(lane()) % 8));
        if (int(lane()) / 8 == part) y = of_row;
    }
    store(p.y + first + t, y);
}
