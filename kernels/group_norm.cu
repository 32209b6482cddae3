// y = act(((x - mean) * rstd * w + bias) * (1 + scale) + shift), statistics over the pixels and channels of a group, scale and
// shift (zeros without `film`) of an image and channel. Grid: (groups, B); a block owns one group of one image, in three passes that
// the caches serve: mean, variance about it, result. Sums are of x - pivot, with the group's first element as pivot, so that a mean
// far from zero costs no digits; the mean is kept as a pair for the same reason.
//
// Barriers: those of block_sum, one before it reads `scratch` and one after, so that it may be used again.
// Occupancy: by threads; shared memory is 32 bytes.
// Wants: groups divide C; HW > 0; fewer than 2^31 − 256 elements in a group; the counter a row of `film`.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct GroupNormFwd {
    T* y;           // (B,HW,C)
    const T* x;     // (B,HW,C)
    const T* w;     // (C)
    const T* bias;  // (C)
    const T* film;       // (film_rows,2·C) or null: scales, shifts
    const int* counter;  // null, or the row of film that serves every image
    int film_rows;       // 1, or one per image; any number with a counter
    int hw, c, groups;
    float eps;
    int act;  // by the numbers of activate_f
};

struct GroupNormSmem {
    float scratch[BLOCK / WARP];
};

extern "C" __global__ void __launch_bounds__(BLOCK) group_norm_fwd(const __grid_constant__ GroupNormFwd p) {
    griddep_wait();
    GroupNormSmem& s = smem<GroupNormSmem>();
    const int cpg = p.c / p.groups, first = block_x() * cpg, n = p.hw * cpg;
    const long long base = (long long)block_y() * p.hw * p.c + first;
    const float pivot = to_float(load(p.x + base));

    float sum = 0.0f;
    for (int i = thread_x(); i < n; i += BLOCK) {
        const int pixel = i / cpg;
        sum += to_float(load(p.x + base + (long long)pixel * p.c + (i - pixel * cpg))) - pivot;
    }
    const Pair mean = two_sum(pivot, block_sum<BLOCK>(sum, s.scratch) / float(n));

    float square = 0.0f;
    for (int i = thread_x(); i < n; i += BLOCK) {
        const int pixel = i / cpg;
        const float d = to_float(load(p.x + base + (long long)pixel * p.c + (i - pixel * cpg))) - mean.high - mean.low;
        square = fma_f(d, d, square);
    }
    const float rstd = rsqrt_f(block_sum<BLOCK>(square, s.scratch) / float(n) + p.eps);

    const int row = p.counter ? load(p.counter) : p.film_rows > 1 ? block_y() : 0;
    const T* film = p.film + (p.film ? 2ll * row * p.c + first : 0);
    for (int i = thread_x(); i < n; i += BLOCK) {
        const int pixel = i / cpg, c = i - pixel * cpg;
        const long long at = base + (long long)pixel * p.c + c;
        const float v = (to_float(load(p.x + at)) - mean.high - mean.low) * rstd;
        const float w = to_float(load(p.w + first + c)), b = to_float(load(p.bias + first + c));
        float z = fma_f(v, w, b);
        if (p.film) z = fma_f(z, 1.0f + to_float(load(film + c)), to_float(load(film + p.c + c)));
        store(p.y + at, from_float<T>(activate_f(p.act, z)));
    }
}
