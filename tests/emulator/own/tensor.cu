// A convolution of 3×3 in two images of 8×8 by two warpgroups, whose operands come as boxes of tensors through a ring of two slots.
// WAY 0 is right; 1 has no sync_warp before products, 2 refills a slot that others may still read, 3 does not say that a slot is
// read, 4 does not say which bytes come, 5 waits for the wrong phase, 6 has no barrier behind the initialisation, 7 arrives twice;
// in 8 the box leaves shared memory.
#include "dev.cuh"
// types: f16 bf16
// variants: WAY=0 WAY=1 WAY=2 WAY=3 WAY=4 WAY=5 WAY=6 WAY=7 WAY=8

constexpr int BLOCK = 256, STAGES = 2;
constexpr int M = 128, N = 16, BK = 64, C = 72, TAPS = 9;
constexpr int BYTES = (M + N) * BK * 2;

struct alignas(1024) Shared {
    T ring[STAGES][(M + N) * BK];
    Mbarrier full[STAGES], empty[STAGES];
};

struct Tensor {
    TensorMap x;  // (2,8,8,C): boxes of all pixels
    TensorMap w;  // (1,N,TAPS,C): boxes of one tap
    float* d;     // (M,N)
};

extern "C" __global__ void __launch_bounds__(BLOCK) tensor(const __grid_constant__ Tensor p) {
    Shared& s = smem<Shared>();
    constexpr int BLOCKS = 2 * TAPS;
    auto fetch = [&](int i) {
        Mbarrier& full = s.full[i % STAGES];
        T* slot = s.ring[i % STAGES] + (WAY == 8 && i == BLOCKS - 1 ? M * BK : 0);
        const int tap = i / 2, c = i % 2 * BK;
        if (WAY == 4) mbarrier_arrive(full);
        else mbarrier_expect(full, BYTES);
        tma_load(slot, p.x, c, tap % 3 - 1, tap / 3 - 1, 0, full);
        tma_load(s.ring[i % STAGES] + M * BK, p.w, c, tap, 0, 0, full);
    };
    if (thread_x() == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(s.full[i], 1);
            mbarrier_init(s.empty[i], BLOCK / WARP);
        }
        fence_mbarriers();
        for (int i = 0; i < STAGES; i++) fetch(i);
    }
    if (WAY != 6) sync_block();
    float d[N / 8][4] = {};
    for (int i = 0; i < BLOCKS; i++) {
        const int slot = i % STAGES, phase = i / STAGES % 2;
        mbarrier_wait(s.full[slot], WAY == 5 ? 1 - phase : phase);
        if (WAY != 1) sync_warp();
        wgmma_fence();
        const unsigned long long a = wgmma_descriptor(s.ring[slot] + warp() / 4 * 64 * BK), b = wgmma_descriptor(s.ring[slot] + M * BK);
        for (int step = 0; step < BK / 16; step++) wgmma<T, N>(d, a + 2 * step, b + 2 * step);
        wgmma_commit();
        wgmma_wait_all(d);
        if (i + STAGES >= BLOCKS) continue;
        if (lane() == 0 && WAY != 3) mbarrier_arrive(s.empty[slot]);
        if (lane() == 0 && WAY == 7 && i == 1) mbarrier_arrive(s.empty[slot]);
        if (thread_x() == 0) {
            if (WAY != 2) mbarrier_wait(s.empty[slot], phase);
            fetch(i + STAGES);
        }
    }
    const int row = thread_x() / 32 * 16 + lane() / 4, column = lane() % 4 * 2;
    for (int i = 0; i < N / 2; i++) store(p.d + (row + i / 2 % 2 * 8) * N + column + i / 4 * 8 + i % 2, d[i / 4][i % 4]);
}
