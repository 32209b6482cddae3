// One value of every primitive of dev.cuh, per thread, in columns of `f`; T goes through a store and a load of both widths.
#include "dev.cuh"

constexpr int BLOCK = 64;
constexpr int COLUMNS = 16;

struct Shared {
    float scratch[BLOCK / WARP];
};

struct Primitives {
    float* f;                // (blocks,BLOCK,COLUMNS)
    T* y;                    // (blocks,BLOCK) and, after them, (blocks,BLOCK/8) vectors of 8
    unsigned* counts;        // (2) zeros: an or, a sum
    unsigned long long* low; // (1) all ones
    unsigned short* bits;    // (65536) of all 16-bit values: through float and back
    int blocks;
};

extern "C" __global__ void __launch_bounds__(BLOCK) primitives(const __grid_constant__ Primitives p) {
    Shared& s = smem<Shared>();
    const int t = thread_x();
    const int block = (block_z() * grid_y() + block_y()) * grid_x() + block_x();
    const int i = block * BLOCK + t;
    const float v = float(t % 32) - 7.0f;
    float f[COLUMNS];
    f[0] = shfl_xor(v, 5);
    f[1] = shfl_down(v, 3);
    f[2] = shfl(v, (t + 1) % 32);
    f[3] = float(ballot(t % 3 == 0) & 0xffffu);
    f[4] = warp_sum(v);
    f[5] = warp_max(v);
    f[6] = block_sum<BLOCK>(float(i), s.scratch);
    f[7] = block_max<BLOCK>(-float(i), s.scratch);
    f[8] = sin_f(v);
    f[9] = cos_f(100.0f * v);
    f[10] = float(int(lane()) + 100 * int(warp()) + 10000 * int(block_dim_x()));
    f[11] = float(shfl_down(t, 1));
    f[12] = rsqrt_f(float(t + 1));
    f[13] = erf_f(v) + tanh_f(v) + exp_f(v) + exp2_f(v) + log_f(float(t + 1)) + abs_f(v) + fma_f(v, v, v);
    f[14] = is_finite_f(v / 0.0f) ? 1.0f : 0.0f;
    f[15] = to_float(from_float<T>(1.0f + float(t) / 1024.0f));
    for (int k = 0; k < COLUMNS; k += 8) {
        Vec<float, 8> row;
        for (int j = 0; j < 8; j++) row[j] = f[k + j];
        store(p.f + (long long)i * COLUMNS + k, row);
    }
    store(p.y + i, from_float<T>(float(t)));
    if (t % 8 == 0) {
        Vec<T, 8> row;
        for (int j = 0; j < 8; j++) row[j] = from_float<T>(float(j) + float(block));
        store(p.y + (long long)p.blocks * BLOCK + i, row);
    }
    atomic_or_u32(p.counts, 1u << (i % 32));
    atomic_add_u32(p.counts + 1, 1u);
    atomic_min_u64(p.low, (unsigned long long)(1000 + i));
#ifndef T_F32
    for (int k = i; k < 65536; k += p.blocks * BLOCK) {
        T h;
        h.bits = (unsigned short)k;
        store(p.bits + k, from_float<T>(to_float(h)).bits);
    }
#endif
}
