// y = act((x - mean) * rstd * w + bias), act SiLU or none, from x and its channel statistics. x may come as two tensors that lie
// side by side along the channels, x0 (C0) and x1 (C1); groups may straddle the seam. y is written as one tensor of C = C0 + C1.
// With `film` the value is multiplied by 1 + scale and shift is added, before act; both are of the channel and of a row of film,
// the image's or the one that `counter` names, and are folded into the factors. Grid: (ceil(C / STRIP), ceil(HW / rows), B). A
// block owns `rows` pixels of STRIP channels of one image.
//
// Statistics: an image's pixels are cut into `count` slabs of `each` pixels; a slab's entry holds, for each channel, the
// mean and the sum of squares about it. The entries of all groups that the strip touches are merged by the block itself:
// a team of threads per group, each thread an interleaved share of the entries, then a warp per group the shares, all in
// an order that the shapes alone fix. Means are merged as differences from the group's first one, and the group's mean is
// kept as a pair, so that a mean far from zero costs no digits. The shares and the groups' results lie in shared memory.
//
// Streaming: a thread owns one 16-byte vector of channels, whose factors it keeps in registers, and every DOWN-th pixel;
// FLIGHT of its loads are in flight, the first ones while the statistics are merged. Neighbouring threads read the
// vectors of one pixel (64 bytes of a 16-bit type, in four threads; 128 of f32, in eight), then the next pixel. y = (x - high) *
// a + b with a = rstd * w and b = bias - low * a.
//
// Barriers: one makes the shares and the groups' first means visible, the next the groups' results.
//
// Wants: HW = count · each; groups divide C0 + C1; pointers aligned to 16 bytes; C0 and C1 multiples of 8, so that no vector
// crosses the seam or an end. Threads past the last channel or pixel only help to merge. Two blocks on a multiprocessor: 64
// registers.
#include "dev.cuh"

constexpr int BLOCK = 512;
constexpr int STRIP = 32;
constexpr int FLIGHT = 4;
constexpr int ENTRIES = 8;  // loads of statistics that a thread has in flight

struct GroupNormApply {
    T* y;                 // (B,HW,C0+C1)
    const T* x0;          // (B,HW,C0)
    const T* x1;          // (B,HW,C1), not read if C1 is 0
    const T* w;           // (C0+C1)
    const T* bias;        // (C0+C1)
    const T* film;        // (film_rows,2·(C0+C1)) or null: scales, shifts
    const int* counter;   // null, or the row of film that serves every image
    const float* stats0;  // (B,count,C0,2) mean, sum of squares about it
    const float* stats1;  // (B,count,C1,2)
    int hw, c0, c1, groups;
    int rows;   // pixels of a block
    int count;  // slabs of an image
    int each;   // pixels of a slab
    int film_rows;  // 1, or one per image; any number with a counter
    float eps;
    int silu;  // act: 1 SiLU, 0 none
};

constexpr int V = vec_width<T>, ACROSS = STRIP / V, DOWN = BLOCK / ACROSS;

struct GroupNormApplySmem {
    Moments share[BLOCK];
    // By group of the strip; there are no more groups than channels.
    float high[STRIP], low[STRIP], rstd[STRIP];
};

// The entry of slab `slab`, counted over all images, channel c of C0 + C1.
DEV const float* entry(const GroupNormApply& p, int slab, int c) {
    return c < p.c0 ? p.stats0 + ((long long)slab * p.c0 + c) * 2 : p.stats1 + ((long long)slab * p.c1 + c - p.c0) * 2;
}

// Mean and reciprocal deviation of the groups that the channels from `first` to `last` belong to.
DEV void merge_groups(const GroupNormApply& p, GroupNormApplySmem& s, int image, int first, int last) {
    const int cpg = (p.c0 + p.c1) / p.groups, g0 = first / cpg, here = last / cpg - g0 + 1;
    const int team = BLOCK / here, g = thread_x() / team, rank = thread_x() - g * team;
    EqualSets sets;
    if (g < here) {
        const int from = (g0 + g) * cpg, step_slab = team / cpg, step = team - step_slab * cpg;
        const float pivot = load(entry(p, image * p.count, from));
        if (rank == 0) s.high[g] = pivot;
        int slab = rank / cpg, c = rank - slab * cpg;
        slab += image * p.count;
        const int end = (image + 1) * p.count;
        while (slab < end) {
            Vec<float, 2> e[ENTRIES];
            int got = 0;
            UNROLL
            for (int i = 0; i < ENTRIES; i++) {
                e[i] = {};
                if (slab < end) e[i] = load<2>(entry(p, slab, from + c));
                got += slab < end;
                c += step;
                slab += step_slab + (c >= cpg);
                c -= c >= cpg ? cpg : 0;
            }
            UNROLL
            for (int i = 0; i < ENTRIES; i++) {
                sets.add(e[i][0] - pivot, e[i][1], i < got);
            }
        }
    }
    s.share[thread_x()] = sets.moments(float(p.each));
    sync_block();
    for (int i = warp(); i < here; i += BLOCK / WARP) {
        Moments sum = {0.0f, 0.0f, 0.0f};
        ROLLED
        for (int k = lane(); k < team; k += WARP) sum = merged(sum, s.share[i * team + k]);
        sum = warp_merged(sum);
        if (lane() == 0) {
            const Pair mean = two_sum(s.high[i], sum.mean);
            s.high[i] = mean.high;
            s.low[i] = mean.low;
            s.rstd[i] = rsqrt_f(sum.m2 / sum.n + p.eps);
        }
    }
    sync_block();
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2) group_norm_apply(const __grid_constant__ GroupNormApply p) {
    griddep_wait();
    GroupNormApplySmem& s = smem<GroupNormApplySmem>();
    const int all = p.c0 + p.c1, first = block_x() * STRIP, image = block_z();
    const int last = (first + STRIP < all ? first + STRIP : all) - 1;
    const int c = first + int(thread_x()) % ACROSS * V;
    const int end = (int(block_y()) + 1) * p.rows < p.hw ? (int(block_y()) + 1) * p.rows : p.hw;
    int row = block_y() * p.rows + thread_x() / ACROSS;
    if (c > last) row = end;

    const bool left = c < p.c0;
    const int stride = left ? p.c0 : p.c1;
    const T* x = (left ? p.x0 + c : p.x1 + (c - p.c0)) + ((long long)image * p.hw + row) * stride;
    T* y = p.y + ((long long)image * p.hw + row) * all + c;
    Vec<T, V> v[FLIGHT];
    UNROLL
    for (int i = 0; i < FLIGHT; i++) {
        if (row + i * DOWN < end) v[i] = load<V>(x + (long long)(i * DOWN) * stride);
    }
    merge_groups(p, s, image, first, last);
    if (row >= end) return;

    const int cpg = all / p.groups;
    int g = c / cpg, in_group = c - g * cpg;
    g -= first / cpg;
    const Vec<T, V> w = load<V>(p.w + c), bias = load<V>(p.bias + c);
    Vec<T, V> scale, shift;
    if (p.film) {
        const int row = p.counter ? load(p.counter) : p.film_rows > 1 ? image : 0;
        scale = load<V>(p.film + 2ll * row * all + c);
        shift = load<V>(p.film + (2ll * row + 1) * all + c);
    }
    float high[V], a[V], b[V];
    UNROLL
    for (int k = 0; k < V; k++) {
        high[k] = s.high[g];
        a[k] = to_float(w[k]) * s.rstd[g];
        b[k] = fma_f(-s.low[g], a[k], to_float(bias[k]));
        if (p.film) {
            const float factor = 1.0f + to_float(scale[k]);
            a[k] *= factor;
            b[k] = fma_f(b[k], factor, to_float(shift[k]));
        }
        in_group++;
        if (in_group == cpg) {
            in_group = 0;
            g++;
        }
    }

    while (true) {
        UNROLL
        for (int i = 0; i < FLIGHT; i++) {
            if (row + i * DOWN >= end) break;
            UNROLL
            for (int k = 0; k < V; k++) {
                const float z = fma_f(to_float(v[i][k]) - high[k], a[k], b[k]);
                v[i][k] = from_float<T>(p.silu ? silu_fast_f(z) : z);
            }
            store(y + (long long)(i * DOWN) * all, v[i]);
        }
        row += FLIGHT * DOWN;
        if (row >= end) return;
        x += (long long)(FLIGHT * DOWN) * stride;
        y += (long long)(FLIGHT * DOWN) * all;
        UNROLL
        for (int i = 0; i < FLIGHT; i++) {
            if (row + i * DOWN < end) v[i] = load<V>(x + (long long)(i * DOWN) * stride);
        }
    }
}
