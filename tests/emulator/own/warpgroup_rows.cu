// d = c + a · b by a warpgroup: a comes in registers, b by asynchronous copies, its rows as they lie in memory. WAY 0 is right; in 1 b begins
// within 1024 bytes, 2 has no fence between copies and products, 3 no wait; in 4 a thread names another matrix; 5 overwrites b before the
// wait; in 6 the columns from 64 on are outside the block's memory; 7 has no wgmma_fence between a wait and more of a, although d is still
// being added to.
#include "dev.cuh"
// types: f16 bf16
// variants: WAY=0 WAY=1 WAY=2 WAY=3 WAY=4 WAY=5 WAY=6 WAY=7

constexpr int BLOCK = 128;
constexpr int M = 64, N = 80, K = 64;
constexpr int PART = 64;  // columns of b that lie side by side

struct alignas(1024) Shared {
    T b[2][K * PART];
};

struct WarpgroupRows {
    float* d;       // (M,N)
    const T* a;     // (M,K)
    const T* b;     // (K,N)
    const float* c; // (M,N)
};

extern "C" __global__ void __launch_bounds__(BLOCK) warpgroup_rows(const __grid_constant__ WarpgroupRows p) {
    Shared& s = smem<Shared>();
    const int t = thread_x(), row = t / 32 * 16 + t % 32 / 4;
    for (int i = t; i < K * N / 8; i += BLOCK) {
        const int k = i / (N / 8), chunk = i % (N / 8);
        cp_async(s.b[chunk / 8] + k * PART + (chunk % 8 ^ k % 8) * 8, p.b + i * 8, true);
    }
    cp_async_commit();
    cp_async_wait<0>();
    if (WAY != 2) fence_proxy_async();
    sync_block();
    unsigned a[K / 16][4];
    for (int i = 0; i < K / 4; i++) {
        const Vec<T, 2> two = load<2>(p.a + (row + i % 2 * 8) * K + i / 4 * 16 + i % 4 / 2 * 8 + t % 4 * 2);
        a[i / 4][i % 4] = pack2<T>(to_float(two[0]), to_float(two[1]));
    }
    float d[N / 8][4];
    for (int i = 0; i < N / 2; i++) d[i / 4][i % 4] = load(p.c + (row + i / 2 % 2 * 8) * N + i / 4 * 8 + t % 4 * 2 + i % 2);
    wgmma_fence();
    const unsigned long long b = wgmma_rows_descriptor(s.b[0] + (WAY == 1 ? 8 * 8 : 0), WAY == 6 ? 1 << 17 : K * PART * 2);
    for (int step = 0; step < K / 16; step++) {
        wgmma_rows<T, N>(d, a[step], b + 128 * step + (WAY == 4 && t == 77 ? 64 : 0));
        if (WAY == 7 && step == 1) {
            wgmma_commit();
            wgmma_wait<1>();
        }
    }
    wgmma_commit();
    if (WAY == 5) {
        sync_block();
        const Vec<T, 8> zeros = {};
        store_shared(s.b[0] + t * 8, zeros);
    }
    if (WAY != 3) wgmma_wait_all(d);
    for (int i = 0; i < N / 2; i++) store(p.d + (row + i / 2 % 2 * 8) * N + i / 4 * 8 + t % 4 * 2 + i % 2, d[i / 4][i % 4]);
}
