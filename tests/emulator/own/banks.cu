// Accesses to shared memory with known conflicts: a comment gives the wavefronts of a warp's access, ideal and actual.
#include "dev.cuh"
// types: f32

constexpr int BLOCK = 64;

struct Shared {
    alignas(16) float x[2 * BLOCK * 16];
    alignas(16) bf16 m[2 * 32 * 72];
};

struct Banks {
    float* y;        // (BLOCK)
    const float* x;  // (BLOCK,4)
};

extern "C" __global__ void __launch_bounds__(BLOCK) banks(const __grid_constant__ Banks p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), l = lane();
    const float one = load(p.x + t);
    Vec<float, 2> two = {{one, one}};
    Vec<float, 4> four = {{one, one, one, one}};
    float sum = 0;
    for (int i = t; i < 2 * BLOCK * 16; i += BLOCK) s.x[i] = 1.0f;
    for (int i = t; i < 2 * 32 * 72; i += BLOCK) s.m[i] = from_float<bf16>(1.0f);
    sync_block();
    sum += load_shared<1>(s.x + t)[0];              // 1 1
    sum += load_shared<1>(s.x + 5)[0];              // 1 1 of one word
    sum += load_shared<1>(s.x + 2 * l)[0];          // 1 2
    sum += load_shared<1>(s.x + 8 * l)[0];          // 1 8
    sum += load_shared<1>(s.x + 9 * l)[0];          // 1 1
    sum += load_shared<1>(s.x + 32 * l)[0];         // 1 32
    sum += load_shared<2>(s.x + 2 * l)[0];          // 2 2
    sum += load_shared<2>(s.x + 4 * l)[0];          // 2 4
    sum += load_shared<4>(s.x + 4 * l)[0];          // 4 4
    sum += load_shared<4>(s.x + 8 * l)[0];          // 4 8
    sum += load_shared<4>(s.x + 4 * (l ^ l / 8))[0]; // 4 4
    sum += load_shared<4>(s.x + 4 * (l / 8))[0];    // 4 4 of one word per eight lanes
    if (l < 3) sum += load_shared<1>(s.x + 32 * l)[0]; // 1 3
    sync_block();
    store_shared(s.x + 16 * t, four);               // 4 16
    store_shared(s.x + 2 * t, two);                 // 2 2
    sync_block();
    cp_async(s.x + 4 * t, p.x + 4 * t, true);       // 4 4
    cp_async(s.x + 8 * t + 4 * BLOCK, p.x, false);  // 4 8
    cp_async_commit();
    cp_async_wait<0>();
    unsigned r[4], q[2];
    ldmatrix(r, s.m + 8 * l);                       // 4 4
    ldmatrix(r, s.m + 64 * l);                      // 4 32
    ldmatrix(r, s.m + 72 * l);                      // 4 4
    ldmatrix_trans(q, s.m + 16 * l);                // 2 4
    store(p.y + t, sum + float(r[0] + q[0] == 0));
}
