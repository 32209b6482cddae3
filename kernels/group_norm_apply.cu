// y = act((x - mean) * rstd * w + bias), act SiLU or none, from x and its channel statistics, channels last. x may come as two tensors
// that lie side by side along the channels, x0 (C0) and x1 (C1); groups may straddle the seam. y is written as one tensor of
// C = C0 + C1. With `film` the value is multiplied by 1 + scale and shift is added, before act; both are of the channel and of a row of
// film: the one that `counter` names, else the image's, else the only one. They are folded into the factors.
// Grid: (ceil(C / STRIP), ceil(HW / rows), B). A block owns `rows` pixels of STRIP channels of one image.
//
// Statistics: an image's pixels are cut into `count` slabs of `each` pixels; a slab's entry holds, for each channel, the
// mean and the sum of squares about it. The entries of all groups that the strip touches are merged by the block itself. A group
// is one team's, `warps` warps; a team of one warp takes every WARPS-th group of the strip, and a larger one has at most one. A
// thread of it takes one channel (in a group of more channels than the team has threads, every (warps · 32)-th) and every
// `phases`-th slab of it, ENTRIES of them in flight, and adds up, in one pass, means less that of its first entry, and their squares.
// What threads have got, as (pixels, mean, squares about it), is merged by the lanes of a warp, then by the warps of a team: means
// are averaged first, then the squares taken about that average, three sums by shuffles in place of a chain of quotients. All orders
// are fixed by the shapes alone. Means are differences from a pivot, that of the group's first channel in the first slab, and the
// group's mean is kept as a pair, so that a mean far from zero costs no digits. The first warp of a team leaves the factors of the
// group's channels in the strip in shared memory, a lane to each, 32 at a time: y = (x - high) * a + b with a = rstd * w and
// b = bias - low * a. Few instructions matter here: in a small image each block has more to merge than to stream.
//
// Streaming: a thread owns one 16-byte vector of channels, whose factors it keeps in registers, and every DOWN-th pixel; FLIGHT of
// its loads are in flight, the first ones from before the barriers on, and a vector that was stored makes room for the next.
// Neighbouring threads read the vectors of one pixel (of 32 channels, 64 bytes of a 16-bit type, in four threads; 128 of f32, in
// eight), then the next pixel. SiLU takes one reciprocal for two elements: it is the unit of special functions that a small image
// waits for.
//
// Waits: the grid's wait, first of all, makes what earlier kernels wrote visible. With teams of more than a warp, a barrier makes the
// warps' shares visible to the first; the last one makes the factors visible to all. No shared memory is written twice.
//
// Wants: HW = count · each; rows > 0; cpg = (C0 + C1) / groups, a whole number; (C0 + C1 + BLOCK) · cpg below 2^31, reciprocal =
// ceil(2^31 / cpg). warps: a power of two, at most WARPS; with more than one, teams enough for the groups of any strip. phases =
// warps · 32 / cpg, rounded down, at least 1. Pointers aligned to 16 bytes; C0 and C1 multiples of 8, so that no vector crosses the seam
// or an end. Threads past the last channel or pixel only help to merge.
//
// A strip of 64 channels, in a 16-bit type a whole line of the second-level cache, streams large images faster; but its block has
// twice as much to merge, for which small ones wait.
// Occupancy: two blocks, by registers (64, which the bounds ask for); shared memory is 576 or 960 bytes.
// variants: STRIP=32 STRIP=64
#include "dev.cuh"

constexpr int BLOCK = 512;
constexpr int FLIGHT = 4;
constexpr int ENTRIES = 16;  // loads of statistics that a thread has in flight

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
    int hw, c0, c1;
    int cpg;              // channels of a group
    unsigned reciprocal;  // of cpg
    int warps, phases;    // of a team; slabs that it takes at a time
    int rows;             // pixels of a block
    int count;            // slabs of an image
    int each;             // pixels of a slab
    int film_rows;        // 1, or one per image; any number with a counter
    float eps;
    int silu;  // act: 1 SiLU, 0 none
};

constexpr int V = vec_width<T>, ACROSS = STRIP / V, DOWN = BLOCK / ACROSS;
constexpr int WARPS = BLOCK / WARP;

struct alignas(16) GroupNormApplySmem {
    Moments share[WARPS];
    // By channel of the strip.
    float high[STRIP], a[STRIP], b[STRIP];
};
constexpr int TURNS = STRIP / WARP;  // in which the lanes of a warp serve each channel of a strip
static_assert(TURNS * WARP == STRIP, "a lane for each channel");

// n / cpg.
DEV int by_cpg(const GroupNormApply& p, int n) { return int((unsigned long long)unsigned(n) * p.reciprocal >> 31); }

// Statistics of channel c, from the image's first slab on.
DEV const float* entries(const GroupNormApply& p, int image, int c) {
    const bool left = c < p.c0;
    const long long before = (long long)image * p.count * (left ? p.c0 : p.c1);
    return (left ? p.stats0 : p.stats1) + (before + (left ? c : c - p.c0)) * 2;
}

// The warp's share of the group whose first channel is `from`; its mean less `pivot`.
DEV Moments gather(const GroupNormApply& p, int image, int from, int rank, float pivot) {
    const int phase = by_cpg(p, rank);
    float sets = 0.0f, first = 0.0f, sum = 0.0f, square = 0.0f, m2 = 0.0f;
    for (int k = rank - phase * p.cpg; k < p.cpg && phase < p.phases; k += p.warps * WARP) {
        const int width = (from + k < p.c0 ? p.c0 : p.c1) * 2, step = p.phases * width;
        const float* at = entries(p, image, from + k) + (long long)phase * width;
        for (int slab = phase; slab < p.count; slab += ENTRIES * p.phases) {
            Vec<float, 2> e[ENTRIES];
            UNROLL
            for (int i = 0; i < ENTRIES; i++) {
                e[i] = {};
                if (slab + i * p.phases < p.count) e[i] = load<2>(at + i * step);
            }
            first = sets == 0.0f ? e[0][0] : first;
            UNROLL
            for (int i = 0; i < ENTRIES; i++) {
                const bool in = slab + i * p.phases < p.count;
                const float d = in ? e[i][0] - first : 0.0f;
                sets += in ? 1.0f : 0.0f;
                sum += d;
                square = fma_f(d, d, square);
                m2 += e[i][1];
            }
            at += (long long)ENTRIES * step;
        }
    }
    Moments m = {0.0f, 0.0f, 0.0f};
    if (sets > 0.0f) {
        const float mean = sum * rcp_fast_f(sets), each = float(p.each);
        m = {sets * each, first - pivot + mean, fma_f(each, max_f(fma_f(-sum, mean, square), 0.0f), m2)};
    }
    return warp_merged(m);
}

// The factors of channel c, the k-th of the strip, from its group's statistics; mean as `pivot` and `m.mean` more.
DEV void factors(const GroupNormApply& p, GroupNormApplySmem& s, int image, int c, int k, Moments m, float pivot, float w, float bias) {
    const Pair mean = two_sum(pivot, m.mean);
    float a = w * rsqrt_fast_f(fma_f(m.m2, rcp_fast_f(m.n), p.eps)), b = fma_f(-mean.low, a, bias);
    if (p.film) {
        const int all = p.c0 + p.c1, row = p.counter ? load(p.counter) : p.film_rows > 1 ? image : 0;
        const float factor = 1.0f + to_float(load(p.film + 2ll * row * all + c));
        a *= factor;
        b = fma_f(b, factor, to_float(load(p.film + (2ll * row + 1) * all + c)));
    }
    s.high[k] = mean.high;
    s.a[k] = a;
    s.b[k] = b;
}

// Those of all channels of group g in the strip from `first` to `last`, by one warp. w and bias are of the lane's channels.
DEV void all_factors(const GroupNormApply& p, GroupNormApplySmem& s, int image, int first, int last, int g, Moments m, float pivot,
                     const float (&w)[TURNS], const float (&bias)[TURNS]) {
    UNROLL
    for (int t = 0; t < TURNS; t++) {
        const int k = t * WARP + int(lane()), c = first + k;
        if (by_cpg(p, c) == g && c <= last) factors(p, s, image, c, k, m, pivot, w[t], bias[t]);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2) group_norm_apply(const __grid_constant__ GroupNormApply p) {
    griddep_wait();
    GroupNormApplySmem& s = smem<GroupNormApplySmem>();
    const int all = p.c0 + p.c1, first = block_x() * STRIP, image = block_z();
    const int last = (first + STRIP < all ? first + STRIP : all) - 1;
    const int row = block_y() * p.rows + thread_x() / ACROSS, c = first + int(thread_x()) % ACROSS * V;
    const int end = (int(block_y()) + 1) * p.rows < p.hw ? (int(block_y()) + 1) * p.rows : p.hw;
    int rest = c > last ? 0 : end - row;  // pixels from the thread's next one to the end
    const bool left = c < p.c0;
    const int stride = left ? p.c0 : p.c1;
    const T* x = (left ? p.x0 + c : p.x1 + (c - p.c0)) + ((long long)image * p.hw + row) * stride;
    Vec<T, V> v[FLIGHT];

    const int g0 = by_cpg(p, first), g_last = by_cpg(p, last);
    const int team = p.warps * WARP, rank = thread_x() & (team - 1);
    float w[TURNS] = {}, bias[TURNS] = {}, pivot = 0.0f;
    UNROLL
    for (int t = 0; t < TURNS; t++) {
        const int mine = first + t * WARP + int(lane());
        if (rank < WARP && mine <= last) {
            w[t] = to_float(load(p.w + mine));
            bias[t] = to_float(load(p.bias + mine));
        }
    }
    int g = g0 + int(warp()) / p.warps;
    Moments m = {0.0f, 0.0f, 0.0f};
    for (int i = g; i <= g_last; i += WARPS / p.warps) {
        pivot = load(entries(p, image, i * p.cpg));
        m = gather(p, image, i * p.cpg, rank, pivot);
        if (p.warps == 1) all_factors(p, s, image, first, last, i, m, pivot, w, bias);
    }
    UNROLL
    for (int i = 0; i < FLIGHT; i++) {
        if (i * DOWN < rest) v[i] = load<V>(x + (long long)(i * DOWN) * stride);
    }
    if (p.warps > 1) {
        if (lane() == 0) s.share[warp()] = m;
        sync_block();
        if (rank < WARP && g <= g_last) {
            float n = 0.0f, sum = 0.0f, m2 = 0.0f;
            ROLLED
            for (int i = warp(); i < int(warp()) + p.warps; i++) {
                n += s.share[i].n;
                sum = fma_f(s.share[i].n, s.share[i].mean, sum);
            }
            const float mean = sum * rcp_fast_f(n);
            ROLLED
            for (int i = warp(); i < int(warp()) + p.warps; i++) {
                const float d = s.share[i].mean - mean;
                m2 += fma_f(s.share[i].n * d, d, s.share[i].m2);
            }
            all_factors(p, s, image, first, last, g, {n, mean, m2}, pivot, w, bias);
        }
    }
    sync_block();
    if (rest <= 0) return;

    T* y = p.y + ((long long)image * p.hw + row) * all + c;
    constexpr int WORDS = 4;  // floats of one access
    float high[V], a[V], b[V];
    UNROLL
    for (int k = 0; k < V; k += WORDS) {
        const int at = c - first + k;
        const Vec<float, WORDS> h = load_shared<WORDS>(s.high + at), fa = load_shared<WORDS>(s.a + at), fb = load_shared<WORDS>(s.b + at);
        UNROLL
        for (int i = 0; i < WORDS; i++) {
            high[k + i] = h[i];
            a[k + i] = fa[i];
            b[k + i] = fb[i];
        }
    }

    while (true) {
        UNROLL
        for (int i = 0; i < FLIGHT; i++) {
            if (i * DOWN >= rest) return;
            UNROLL
            for (int k = 0; k < V; k += 2) {
                float z0 = fma_f(to_float(v[i][k]) - high[k], a[k], b[k]);
                float z1 = fma_f(to_float(v[i][k + 1]) - high[k + 1], a[k + 1], b[k + 1]);
                if (p.silu) silu_fast_pair(z0, z1);
                v[i][k] = from_float<T>(z0);
                v[i][k + 1] = from_float<T>(z1);
            }
            store(y + (long long)(i * DOWN) * all, v[i]);
            if ((FLIGHT + i) * DOWN < rest) v[i] = load<V>(x + (long long)((FLIGHT + i) * DOWN) * stride);
        }
        rest -= FLIGHT * DOWN;
        x += (long long)(FLIGHT * DOWN) * stride;
        y += (long long)(FLIGHT * DOWN) * all;
    }
}
