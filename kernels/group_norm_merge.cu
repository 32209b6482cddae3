// Channel statistics of slabs to those of fewer, larger slabs: `fan` neighbours become one. For images of so many slabs that
// each block of group_norm_apply would spend its time on them. Grid: (ceil((C0 + C1) / 32), count, B); a block owns 32
// channels of one new slab: a lane a channel; warp w takes old slabs w, w + 8, …. The shares of the eight go through shared memory
// (3 KB), the one barrier makes them visible, and warp 0 merges them in order. Both tensors of group_norm_apply are served by one
// launch. An entry is the mean of a channel's pixels and the sum of squares about it; means are taken less that of the channel's
// first old slab, so that a mean far from zero costs no digits.
// Wants: fan > 0, pointers aligned to 8 bytes; x1 and y1 are not touched if C1 is 0. Lanes beyond C0 + C1, and
// warps without a slab, hand in an empty set (n = 0), which `merged` passes over. Occupancy: by registers and threads.
// types: f32
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int FLIGHT = 8;  // loads of a thread that are in flight

struct GroupNormMerge {
    float* y0;        // (B,count,C0,2)
    float* y1;        // (B,count,C1,2)
    const float* x0;  // (B,count·fan,C0,2)
    const float* x1;  // (B,count·fan,C1,2)
    int c0, c1;
    int fan;
    int each;  // pixels of an old slab
};

struct GroupNormMergeSmem {
    Moments share[BLOCK / WARP][WARP];
};

extern "C" __global__ void __launch_bounds__(BLOCK) group_norm_merge(const __grid_constant__ GroupNormMerge p) {
    griddep_wait();
    GroupNormMergeSmem& s = smem<GroupNormMergeSmem>();
    const int all = p.c0 + p.c1, channel = block_x() * WARP + lane();
    const bool in = channel < all, left = channel < p.c0;
    const int c = left ? channel : channel - p.c0, width = left ? p.c0 : p.c1;
    const long long slab = (long long)block_z() * grid_y() + block_y();
    const float* x = (left ? p.x0 : p.x1) + (slab * p.fan * width + c) * 2;
    const float pivot = in ? load(x) : 0.0f;
    EqualSets sets;
    for (int i = warp(); in && i < p.fan; i += FLIGHT * (BLOCK / WARP)) {
        Vec<float, 2> e[FLIGHT];
        UNROLL
        for (int k = 0; k < FLIGHT; k++) {
            const int at = i + k * (BLOCK / WARP);
            e[k] = {};
            if (at < p.fan) e[k] = load<2>(x + (long long)at * width * 2);
        }
        UNROLL
        for (int k = 0; k < FLIGHT; k++) {
            sets.add(e[k][0] - pivot, e[k][1], i + k * (BLOCK / WARP) < p.fan);
        }
    }
    s.share[warp()][lane()] = sets.moments(float(p.each));
    sync_block();
    if (warp() > 0 || !in) return;
    Moments m = s.share[0][lane()];
    UNROLL
    for (int w = 1; w < BLOCK / WARP; w++) m = merged(m, s.share[w][lane()]);
    const Vec<float, 2> out = {{pivot + m.mean, m.m2}};
    store((left ? p.y0 : p.y1) + (slab * width + c) * 2, out);
}
