// d = c + a · bᵀ by a warpgroup, whose operands come by asynchronous copies. WAY 0 is right; 1 has no fence between copies and products,
// 2 no barrier behind it, 3 no wgmma_fence, 4 no wait, 5 no commit; 6 reads d before the wait, 7 overwrites a before it; in 8 a thread names
// another matrix, 9 writes to d in flight, in 10 a begins within 1024 bytes, in 11 warps wait in two places, in 12 nothing is waited for.
#include "dev.cuh"
// types: f16 bf16
// variants: WAY=0 WAY=1 WAY=2 WAY=3 WAY=4 WAY=5 WAY=6 WAY=7 WAY=8 WAY=9 WAY=10 WAY=11 WAY=12

constexpr int BLOCK = 128;
constexpr int M = 64, N = 80, K = 64;

struct alignas(1024) Shared {
    T rows[(M + N) * K];  // those of a, then those of b
};

struct Warpgroup {
    float* d;       // (M,N)
    const T* rows;  // (M+N,K)
    const float* c; // (M,N)
};

extern "C" __global__ void __launch_bounds__(BLOCK) warpgroup(const __grid_constant__ Warpgroup p) {
    Shared& s = smem<Shared>();
    const int t = thread_x();
    for (int i = t; i < (M + N) * K / 8; i += BLOCK) {
        const int row = i / 8, chunk = i % 8;
        cp_async(s.rows + row * K + (chunk ^ row % 8) * 8, p.rows + i * 8, true);
    }
    cp_async_commit();
    if (WAY != 12) cp_async_wait<0>();
    if (WAY != 1) fence_proxy_async();
    if (WAY != 2) sync_block();
    float d[N / 8][4];
    for (int i = 0; i < N / 2; i++) d[i / 4][i % 4] = load(p.c + (t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + t % 4 * 2 + i % 2);
    if (WAY != 3) wgmma_fence();
    const unsigned long long a = wgmma_descriptor(s.rows + (WAY == 10 ? 4 * K : 0)), b = wgmma_descriptor(s.rows + M * K);
    for (int step = 0; step < K / 16; step++) {
        wgmma<T, N>(d, a + 2 * step + (WAY == 8 && t == 77 ? 2 : 0), b + 2 * step);
        if (WAY == 9) d[3][1] = 0.0f;
    }
    if (WAY != 5) wgmma_commit();
    auto write = [&] {
        for (int i = 0; i < N / 2; i++) store(p.d + (t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + t % 4 * 2 + i % 2, d[i / 4][i % 4]);
    };
    if (WAY == 6) write();
    if (WAY == 7) {
        sync_block();
        Vec<T, 8> zeros = {};
        store_shared(s.rows + t * 8, zeros);
    }
    if (WAY == 11 && warp() == 2) {
        wgmma_wait_all(d);
    } else if (WAY != 4) {
        wgmma_wait_all(d);
    }
    if (WAY != 6) write();
    if (WAY == 12) cp_async_wait<0>();
}
