// d = c + a · b, three times: fragments by ldmatrix, by ldmatrix_trans of the transposed matrices, and element by element
// as the documentation of `mma` says. Beside it an asynchronous copy with zeros, and a counter that wraps.
#include "dev.cuh"
// types: f16 bf16

constexpr int BLOCK = 32;
constexpr int M = 16, N = 8, K = 16;
constexpr int SMEM_BYTES = 131072;

struct Shared {
    T a[M][K], at[K][M], b[K][N], bt[N][K];
    float x[4 * BLOCK];
    char rest[SMEM_BYTES - 2 * 2 * K * (M + N) - 16 * BLOCK];
};
static_assert(sizeof(Shared) == SMEM_BYTES, "what the launch passes");

struct Matrices {
    float* d;          // (3,M,N)
    float* zeroed;     // (BLOCK,4): x, with zeros for odd threads
    float* before;     // (BLOCK): what each thread saw in the counter
    const float* a;    // (M,K)
    const float* b;    // (K,N)
    const float* c;    // (M,N)
    const float* x;    // (BLOCK,4)
    unsigned* counter; // (1) zero
};

DEV void write(float* d, const float (&v)[4]) {
    for (int i = 0; i < 4; i++) store(d + (lane() / 4 + 8 * (i / 2)) * N + 2 * (lane() % 4) + i % 2, v[i]);
}

extern "C" __global__ void __launch_bounds__(BLOCK) matrices(const __grid_constant__ Matrices p) {
    Shared& s = smem_dynamic<Shared>();
    const int t = thread_x();
    cp_async(s.x + 4 * t, p.x + 4 * t, t % 2 == 0);
    cp_async_commit();
    for (int i = t; i < M * K; i += BLOCK) s.a[i / K][i % K] = s.at[i % K][i / K] = from_float<T>(load(p.a + i));
    for (int i = t; i < K * N; i += BLOCK) s.b[i / N][i % N] = s.bt[i % N][i / N] = from_float<T>(load(p.b + i));
    sync_block();
    float c[4];
    for (int i = 0; i < 4; i++) c[i] = load(p.c + (t / 4 + 8 * (i / 2)) * N + 2 * (t % 4) + i % 2);

    // Matrix i of a: rows 8 (i % 2), columns 8 (i / 2). Lanes 16 and up name nothing for b.
    unsigned a[4], b[2];
    float d[3][4];
    for (int j = 0; j < 3; j++)
        for (int i = 0; i < 4; i++) d[j][i] = c[i];
    ldmatrix(a, &s.a[t % 16][8 * (t / 16)]);
    ldmatrix(b, t < 16 ? &s.bt[t % 8][8 * (t / 8)] : nullptr);
    mma<T>(d[0], a, b);
    ldmatrix_trans(a, &s.at[t % 8 + 8 * (t / 16)][8 * (t / 8 % 2)]);
    ldmatrix_trans(b, t < 16 ? &s.b[t][0] : nullptr);
    mma<T>(d[1], a, b);
    for (int r = 0; r < 4; r++) {
        const T* row = &s.a[t / 4 + 8 * (r % 2)][2 * (t % 4) + 8 * (r / 2)];
        a[r] = pack2<T>(to_float(row[0]), to_float(row[1]));
    }
    for (int r = 0; r < 2; r++) {
        const T* row = &s.bt[t / 4][2 * (t % 4) + 8 * r];
        b[r] = pack2<T>(to_float(row[0]), to_float(row[1]));
    }
    mma<T>(d[2], a, b);
    for (int j = 0; j < 3; j++) write(p.d + j * M * N, d[j]);

    cp_async_wait<0>();
    store(p.zeroed + 4 * t, load_shared<4>(s.x + 4 * t));
    fence_gpu();
    store(p.before + t, float(atomic_inc_u32(p.counter, 4)));
}
