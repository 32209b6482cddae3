// next = mask · next + (1 − mask) · (alpha · clean + sigma · noise) in the slot that the row in use has written; nothing from
// the first row on whose m was not finite (m, table and counter: see sampler.cu). Grid: ceil(n / BLOCK); a thread owns one element of the latents, n = B·H·W·C of them.
// Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int COLUMNS = 24;

// Columns of the table.
enum { NEXT = 17, ALPHA = 22, SIGMA = 23 };

struct BlendFwd {
    float* slots;        // (S,n), updated
    const float* table;  // (R,COLUMNS)
    const int* counter;  // row in use, next row, 1 + first row with a non-finite m, unused
    const float* mask;   // (n/C)
    const float* clean;  // (n)
    const float* noise;  // (n)
    long long n;
    int c;
};

extern "C" __global__ void __launch_bounds__(BLOCK) blend_fwd(const __grid_constant__ BlendFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n || load(p.counter + 2) != 0) return;
    const float* row = p.table + (long long)load(p.counter) * COLUMNS;
    float* next = p.slots + (long long)load(row + NEXT) * p.n + i;
    const float mask = load(p.mask + i / p.c);
    const float known = load(row + ALPHA) * load(p.clean + i) + load(row + SIGMA) * load(p.noise + i);
    store(next, mask * load(next) + (1.0f - mask) * known);
}
