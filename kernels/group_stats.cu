// Channel statistics of slabs of ROWS pixels: for each channel the mean of its ROWS values and the sum of squares about it,
// of the values as they are stored, that is rounded to T. Grid: slabs · ceil(C / STRIP); a block owns STRIP channels of one slab,
// neighbouring blocks the strips of the same slab.
//
// A thread owns one 16-byte vector of channels in every DOWN-th row; all of its loads are in flight together, and x is
// read once (the slab's first row again, from the caches). Values are taken less the channel's value in that row, so that a mean
// far from zero costs no digits. A thread takes mean and sum of squares of its own rows; shuffles merge sets of equal size in pairs,
// those of a warp; then, behind the one barrier, a thread for each channel merges those of the eight warps from shared memory
// (4 KB). The order is fixed. Threads past the last channel hold nothing, and no set mixes channels. Occupancy: by
// registers (32) and threads. Wants: C a multiple of 8, x aligned to 16 bytes, y to 8.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int STRIP = 64;
constexpr int ROWS = 64;

struct GroupStatsFwd {
    float* y;    // (slabs,C,2) mean, sum of squares about it
    const T* x;  // (slabs·ROWS,C)
    int c;
};

constexpr int V = vec_width<T>, ACROSS = STRIP / V, DOWN = BLOCK / ACROSS, OWN = ROWS / DOWN;

struct GroupStatsSmem {
    float mean[BLOCK / WARP][STRIP], m2[BLOCK / WARP][STRIP];
};

extern "C" __global__ void __launch_bounds__(BLOCK) group_stats_fwd(const __grid_constant__ GroupStatsFwd p) {
    griddep_wait();
    GroupStatsSmem& s = smem<GroupStatsSmem>();
    const int strips = ceil_div(p.c, STRIP), slab = int(block_x()) / strips, first = (int(block_x()) - slab * strips) * STRIP;
    const int column = int(thread_x()) % ACROSS * V, row = thread_x() / ACROSS, c = first + column;
    const T* x = p.x + (long long)slab * ROWS * p.c + c;
    float mean[V], m2[V];
    UNROLL
    for (int k = 0; k < V; k++) mean[k] = m2[k] = 0.0f;
    if (c < p.c) {
        const Vec<T, V> top = load<V>(x);
        Vec<T, V> v[OWN];
        UNROLL
        for (int i = 0; i < OWN; i++) v[i] = load<V>(x + (long long)(row + i * DOWN) * p.c);
        UNROLL
        for (int k = 0; k < V; k++) {
            const float pivot = to_float(top[k]);
            UNROLL
            for (int i = 0; i < OWN; i++) mean[k] += to_float(v[i][k]) - pivot;
            mean[k] *= 1.0f / OWN;
            UNROLL
            for (int i = 0; i < OWN; i++) {
                const float d = to_float(v[i][k]) - pivot - mean[k];
                m2[k] = fma_f(d, d, m2[k]);
            }
        }
    }
    // Two sets of n numbers each: the mean of the means, and n/2 · (their difference)² more.
    float n = OWN;
    UNROLL
    for (int step = ACROSS; step < WARP; step <<= 1) {
        UNROLL
        for (int k = 0; k < V; k++) {
            const float other = shfl_xor(mean[k], step), d = other - mean[k];
            m2[k] = fma_f(d * d, 0.5f * n, m2[k] + shfl_xor(m2[k], step));
            mean[k] = 0.5f * (mean[k] + other);
        }
        n *= 2.0f;
    }
    if (lane() < ACROSS) {
        UNROLL
        for (int k = 0; k < V; k++) {
            s.mean[warp()][column + k] = mean[k];
            s.m2[warp()][column + k] = m2[k];
        }
    }
    sync_block();
    // A thread per channel: eight sets.
    const int mine = thread_x(), channel = first + mine;
    if (mine >= STRIP || channel >= p.c) return;
    EqualSets sets;
    UNROLL
    for (int w = 0; w < BLOCK / WARP; w++) sets.add(s.mean[w][mine], s.m2[w][mine]);
    const Moments m = sets.moments(float(ROWS / (BLOCK / WARP)));
    const float pivot = to_float(load(p.x + (long long)slab * ROWS * p.c + channel));
    const Vec<float, 2> out = {{pivot + m.mean, m.m2}};
    store(p.y + ((long long)slab * p.c + channel) * 2, out);
}
