// Permutes each block by ldmatrix. Wrong: its rows are not aligned to 16 bytes.
#include "dev.cuh"
// types: f32
// variants: BAD=0 BAD=1

constexpr int BLOCK = 256;

struct Shared {
    alignas(16) bf16 x[BLOCK + 8];
};

struct MisalignedMatrix {
    float* y;        // (n)
    const float* x;  // (n)
    int n;
};

extern "C" __global__ void __launch_bounds__(BLOCK) misaligned_matrix(const __grid_constant__ MisalignedMatrix p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), first = block_x() * BLOCK;
    s.x[t] = from_float<bf16>(load(p.x + first + t));
    sync_block();
    unsigned r[4];
    ldmatrix(r, s.x + 8 * lane() + BAD);
    // Word i of a lane: elements 2 l and 2 l + 1 of matrix i. Each warp keeps half a matrix.
    const unsigned word = r[warp() / 2];
    const bf16 y = {(unsigned short)(warp() % 2 ? word >> 16 : word)};
    store(p.y + first + t, to_float(y));
}
