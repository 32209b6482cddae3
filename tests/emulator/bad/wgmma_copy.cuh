// What the kernels `wgmma_…` share: y = x · I, in bfloat16, by two warpgroups of a block, each of 64 rows of 16 columns.
#pragma once

constexpr int BLOCK = 256, N = 16, PART = 64 * N;

struct alignas(1024) Shared {
    bf16 a[BLOCK / 128][64 * 64];  // rows of 128 bytes, of which 32 are used
    bf16 b[N * 64];
};

DEV void put(bf16* rows, int row, int half, const Vec<bf16, 8>& v) { store_shared(rows + row * 64 + (half ^ row % 8) * 8, v); }

// x and the identity into shared memory.
DEV void fill(Shared& s, const float* x) {
    const int t = thread_x(), group = t / 128, row = t % 128 / 2, half = t % 2;
    Vec<bf16, 8> v;
    for (int i = 0; i < 8; i++) v[i] = from_float<bf16>(load(x + group * PART + row * N + half * 8 + i));
    put(s.a[group], row, half, v);
    if (t >= 2 * N) return;
    for (int i = 0; i < 8; i++) v[i] = from_float<bf16>(row == half * 8 + i ? 1.0f : 0.0f);
    put(s.b, row, half, v);
}

// Begins the product of the own warpgroup.
DEV void multiply(float (&d)[N / 8][4], const Shared& s) {
    wgmma_fence();
    wgmma<bf16, N>(d, wgmma_descriptor(s.a[warp() / 4]), wgmma_descriptor(s.b));
    wgmma_commit();
}

DEV void write(float* y, const float (&d)[N / 8][4]) {
    const int row = warp() * 16 + lane() / 4, column = lane() % 4 * 2;
    for (int i = 0; i < N / 2; i++) store(y + (row + i / 2 % 2 * 8) * N + column + i / 4 * 8 + i % 2, d[i / 4][i % 4]);
}
