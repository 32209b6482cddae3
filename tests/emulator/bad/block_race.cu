// y = x; the first element says which blocks there are. Wrong: the last block to write it wins.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct BlockRace {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) block_race(const __grid_constant__ BlockRace p) {
    const int i = block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    if (i % BLOCK != 0) {
        store(p.y + i, load(p.x + i));
        return;
    }
    if (i > 0) store(p.y + i, load(p.x + i));
#if BAD
    store(p.y, float(block_x()));
#else
    if (i == 0) store(p.y, float(grid_x()));
#endif
}
