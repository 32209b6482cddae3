// Gradients of group_norm.cu. With n = (x - mean) * rstd, z = n * w + bias, dz = dy * act'(z) and g = dz * w, where w and bias
// are those that an image's scale and shift leave, w0 * (1 + scale) and b0 * (1 + scale) + shift of the fields w0 = w, b0 = bias:
// dx = rstd * (g - mean(g) - n * mean(g * n)), the means over a group; over images and pixels dw = sum (1 + scale) * dz * n and
// dbias = sum (1 + scale) * dz; over the pixels of each image dscale = sum dz * (w0 * n + b0) and dshift = sum dz.
//
// Three launches, each of one grid: (strips of channels, slabs of pixels, B); a block owns one strip of one slab of `each` pixels.
// group_norm_grad_stats leaves, for each channel of a slab, the mean less the group's first element in the image, its pivot, and the
// sum of squares about it. group_norm_grad_sums merges those of all slabs and leaves sum dz * n and sum dz of each channel of a slab,
// and once for each group its mean and rstd. group_norm_grad adds these up to the group's means, and writes dx; its grid has one slab
// more, whose blocks add up the gradients of the parameters, of scale and of shift. All orders are fixed.
//
// A thread owns 16 bytes of channels, whose factors it keeps in registers, and every DOWN-th pixel; eight threads, 128 bytes of a
// pixel, lie side by side. What is loaded first is on its way while the factors are made, and a vector that was used makes room for
// the next. If C is no multiple of the vector, or act is neither none nor SiLU, `wide` is 0: a thread owns one channel then, 32 lie
// side by side, in the same loops. groups and HW are free; a group may lie in several strips, and a strip in several groups.
//
// Statistics: a thread takes mean and squares of a few pixels at a time, in two passes over registers; sets are merged as
// their means and sizes say (Chan), so that neither a mean far from zero nor a pivot far from the mean costs digits. The mean
// of a group is the pivot and what it differs from that, a sum of two floats: x - high - low. A warp merges a group, and
// makes the factors of its channels: dz * n = dz * (d - low) * rstd with d = x - high, z = d * a + b with a = rstd * w and
// b = bias - low * a, dx = a * dz + slant * d + level with slant = -rstd² * mean(g * n), level = -rstd * mean(g) - slant * low.
//
// Barriers: one makes factors visible, one the warps' shares of the sums of a strip, which a thread for each channel adds up.
// Occupancy: three blocks, by registers (at most 80), which is named; shared memory is 5.4 KB at most.
// Wants: pointers aligned to 16 bytes; cpg > 0 divides C; slabs = ceil(HW / each), 0 only in group_norm_grad; HW · cpg below 2^31;
// `wide` only with C a multiple of the vector and act 0 or 1.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int ACROSS = 8;   // vectors of a strip
constexpr int NARROW = 32;  // channels of a strip without vectors

constexpr int WARPS = BLOCK / WARP;
constexpr int FLIGHT = 2;   // pixels of a thread whose x and dy are in flight
constexpr int ENTRIES = 4;  // loads of a lane that are in flight, where a warp merges what slabs have left
constexpr int MOST = ACROSS * vec_width<T> > NARROW ? ACROSS * vec_width<T> : NARROW;

// What a thread owns: V channels from `c` on, the `column`-th and on of a strip, if `in`; and every DOWN-th pixel from `row` to `end`.
template <int V>
struct Share {
    static constexpr int SIDE = V > 1 ? ACROSS : NARROW, STRIP = SIDE * V, DOWN = BLOCK / SIDE;
    int first, last;  // channels of the strip
    int column, c, row, end;
    bool in;
    DEV Share of(int channels, int hw, int each, int slab) {
        Share s;
        s.first = block_x() * STRIP;
        s.last = (s.first + STRIP < channels ? s.first + STRIP : channels) - 1;
        s.column = int(thread_x()) % SIDE * V;
        s.c = s.first + s.column;
        s.in = s.c <= s.last;
        s.row = slab * each + int(thread_x()) / SIDE;
        s.end = slab * each + each < hw ? slab * each + each : hw;
        return s;
    }
};

// ------------------------------------------------------------------------------------------------------- statistics

struct GroupNormGradStats {
    float* y;    // (B,slabs,C,2) mean less the pivot, sum of squares about it
    const T* x;  // (B,HW,C)
    int hw, c;
    int cpg;     // channels of a group
    int each;    // pixels of a slab
    int wide;
};

struct GroupNormGradStatsSmem {
    float n[WARPS], mean[WARPS][MOST], m2[WARPS][MOST];
};

// Takes in N pixels of V channels, DOWN pixels apart: n, mean and m2 are of those before.
template <int N, int V>
DEV void take(const T* x, long long step, const float (&pivot)[V], float& n, float (&mean)[V], float (&m2)[V]) {
    Vec<T, V> v[N];
    UNROLL
    for (int i = 0; i < N; i++) v[i] = load<V>(x + i * step);
    const float share = float(N) * rcp_fast_f(n + float(N)), weight = n * share;
    UNROLL
    for (int k = 0; k < V; k++) {
        float own = 0.0f, square = 0.0f;
        UNROLL
        for (int i = 0; i < N; i++) own += to_float(v[i][k]) - pivot[k];
        own *= 1.0f / float(N);
        UNROLL
        for (int i = 0; i < N; i++) {
            const float d = to_float(v[i][k]) - pivot[k] - own;
            square = fma_f(d, d, square);
        }
        const float d = own - mean[k];
        mean[k] = fma_f(d, share, mean[k]);
        m2[k] = fma_f(d * d, weight, m2[k] + square);
    }
    n += float(N);
}

template <int V>
DEV void statistics(const GroupNormGradStats& p, GroupNormGradStatsSmem& s) {
    using Own = Share<V>;
    const Own own = Own::of(p.c, p.hw, p.each, block_y());
    const T* image = p.x + (long long)block_z() * p.hw * p.c;
    float n = 0.0f, pivot[V], mean[V] = {}, m2[V] = {};
    if (own.in) {
        int member = own.c % p.cpg;  // of its group
        UNROLL
        for (int k = 0; k < V; k++) {
            pivot[k] = to_float(load(image + own.c + k - member));
            member = member + 1 < p.cpg ? member + 1 : 0;
        }
        constexpr int N = 2 * FLIGHT;
        const long long step = (long long)Own::DOWN * p.c;
        const T* x = image + (long long)own.row * p.c + own.c;
        int rest = own.end - own.row;
        for (; rest > (N - 1) * Own::DOWN; rest -= N * Own::DOWN, x += N * step) take<N>(x, step, pivot, n, mean, m2);
        if (rest > Own::DOWN) {
            take<2>(x, step, pivot, n, mean, m2);
            x += 2 * step;
            rest -= 2 * Own::DOWN;
        }
        if (rest > 0) take<1>(x, step, pivot, n, mean, m2);
    }
    UNROLL
    for (int step = Own::SIDE; step < WARP; step <<= 1) {
        const float other = shfl_xor(n, step), all = n + other, share = all > 0.0f ? other * rcp_fast_f(all) : 0.0f;
        UNROLL
        for (int k = 0; k < V; k++) {
            const float d = shfl_xor(mean[k], step) - mean[k];
            m2[k] = fma_f(d * d, n * share, m2[k] + shfl_xor(m2[k], step));
            mean[k] = fma_f(d, share, mean[k]);
        }
        n = all;
    }
    if (lane() < Own::SIDE) {
        UNROLL
        for (int k = 0; k < V; k++) {
            s.mean[warp()][own.column + k] = mean[k];
            s.m2[warp()][own.column + k] = m2[k];
        }
        // A lane past the last channel has no pixels; the first one is never past it.
        if (lane() == 0) s.n[warp()] = n;
    }
    sync_block();
    const int mine = thread_x(), c = own.first + mine;
    if (mine >= Own::STRIP || c > own.last) return;
    Moments m = {s.n[0], s.mean[0][mine], s.m2[0][mine]};
    UNROLL
    for (int w = 1; w < WARPS; w++) m = merged(m, {s.n[w], s.mean[w][mine], s.m2[w][mine]});
    const Vec<float, 2> out = {{m.mean, m.m2}};
    store(p.y + (((long long)block_z() * grid_y() + block_y()) * p.c + c) * 2, out);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 3) group_norm_grad_stats(const __grid_constant__ GroupNormGradStats p) {
    griddep_wait();
    GroupNormGradStatsSmem& s = smem<GroupNormGradStatsSmem>();
    if (p.wide) {
        statistics<vec_width<T>>(p, s);
    } else {
        statistics<1>(p, s);
    }
}

// ------------------------------------------------------------------------------------------- what the other two share

// The factor and the bias of channel c of image b.
struct Affine {
    float w, bias;
};
DEV Affine affine(const T* w, const T* bias, const T* film, int channels, int b, int c) {
    Affine a = {to_float(load(w + c)), to_float(load(bias + c))};
    if (film) {
        const T* of = film + (long long)b * 2 * channels + c;
        const float scale = 1.0f + to_float(load(of));
        a = {a.w * scale, fma_f(a.bias, scale, to_float(load(of + channels)))};
    }
    return a;
}

// The mean of a group and what its channels make of x - high.
struct Factors {
    float high[MOST], low[MOST], rstd[MOST], a[MOST], b[MOST];
};

// act' of V numbers, in place. ACT: 0 none, 1 SiLU, -1 any, by `act`.
template <int ACT, int V>
DEV void slopes(float (&z)[V], int act) {
    if constexpr (ACT == 1) {
        UNROLL
        for (int k = 0; k < V; k += 2) silu_slope_fast_pair(z[k], z[k + 1]);
    } else {
        UNROLL
        for (int k = 0; k < V; k++) z[k] = ACT == 0 ? 1.0f : slope_f(act, z[k]);
    }
}

// A lane's share of what the slabs have left of the group from channel `from` on, in pairs of floats: `f(pair, slab)` of each, in
// order, and `g(channel)` when all slabs of a channel were taken. Lanes take channels, and, of few channels, several slabs at a time.
template <class F, class G>
DEV void each_entry(const float* entries, int channels, int from, int cpg, int slabs, F f, G g) {
    const int phases = cpg < WARP ? WARP / cpg : 1, phase = cpg < WARP ? int(lane()) / cpg : 0;
    if (phase >= phases) return;
    for (int k = int(lane()) - phase * cpg; k < cpg; k += WARP) {
        for (int slab = phase; slab < slabs; slab += ENTRIES * phases) {
            const float* at = entries + ((long long)slab * channels + from + k) * 2;
            Vec<float, 2> e[ENTRIES];
            UNROLL
            for (int i = 0; i < ENTRIES; i++) {
                if (slab + i * phases < slabs) e[i] = load<2>(at + (long long)i * phases * channels * 2);
            }
            UNROLL
            for (int i = 0; i < ENTRIES; i++) {
                if (slab + i * phases < slabs) f(e[i], slab + i * phases);
            }
        }
        g(from + k);
    }
}

// x and dy of a thread's next pixels.
template <int V>
struct Stream {
    static constexpr int DOWN = Share<V>::DOWN;
    const T *all_x, *all_dy;
    Loaded<T, V> x[FLIGHT], dy[FLIGHT];
    long long next;  // element of the pixel in slot 0
    int step;        // elements from one of the thread's pixels to its next
    int rest;        // pixels to the end from the next one on

    __device__ __forceinline__ void start(const Share<V>& own, int hw, int channels, int image) {
        next = ((long long)image * hw + own.row) * channels + own.c;
        rest = own.in ? own.end - own.row : 0;
        step = DOWN * channels;
        UNROLL
        for (int i = 0; i < FLIGHT; i++) fill(i, i);
    }
    // Slot `to` from the pixel that lies `ahead` rows of threads ahead, if there is one.
    __device__ __forceinline__ void fill(int to, int ahead) {
        if (ahead * DOWN < rest) {
            const long long at = next + ahead * step;
            x[to].load_from(all_x + at);
            dy[to].load_from(all_dy + at);
        }
    }
    // f(x, dy, where they lie) of each pixel in turn.
    template <class F>
    __device__ __forceinline__ void run(F f) {
        while (true) {
            UNROLL
            for (int i = 0; i < FLIGHT; i++) {
                if (i * DOWN >= rest) return;
                f(x[i].get(), dy[i].get(), next + i * step);
                fill(i, FLIGHT + i);
            }
            rest -= FLIGHT * DOWN;
            next += FLIGHT * step;
        }
    }
};

// ---------------------------------------------------------------------------------------------------- sums by channel

struct GroupNormGradSums {
    float* moments;      // (B,groups,4): the mean as a sum of two, rstd, nothing
    float* sums;         // (B,slabs,C,2): sum dz * n, sum dz
    const float* stats;  // (B,slabs,C,2): of group_norm_grad_stats
    const T* x;          // (B,HW,C)
    const T* w;          // (C)
    const T* bias;       // (C)
    const T* dy;         // (B,HW,C)
    const T* film;       // (B,2C) or null: scales, shifts
    int hw, c;
    int cpg;             // channels of a group
    int each;            // pixels of a slab
    float eps;
    int act;             // by the numbers of activate_f
    int wide;
};

struct GroupNormGradSumsSmem {
    Factors of;
    float n[WARPS][MOST], one[WARPS][MOST];
};

template <int V, int ACT>
DEV void sums(const GroupNormGradSums& p, GroupNormGradSumsSmem& s) {
    // From the end: of a large x, the caches hold what was read last.
    const int image = grid_z() - 1 - block_z(), slab = grid_y() - 1 - block_y(), slabs = grid_y();
    using Own = Share<V>;
    const Own own = Own::of(p.c, p.hw, p.each, slab);
    Stream<V> stream = {p.x, p.dy};
    stream.start(own, p.hw, p.c, image);

    for (int g = own.first / p.cpg + int(warp()); g * p.cpg <= own.last; g += WARPS) {
        const int from = g * p.cpg, to = from + p.cpg;
        const float pivot = to_float(load(p.x + (long long)image * p.hw * p.c + from));
        // Of the lane's sets: elements, the first mean, and sums of the others' differences from it.
        float n = 0.0f, top = 0.0f, sum = 0.0f, square = 0.0f, m2 = 0.0f;
        const auto add = [&](const Vec<float, 2>& e, int at) {
            const float count = float(at + 1 < slabs ? p.each : p.hw - at * p.each);
            top = n == 0.0f ? e[0] : top;
            const float d = e[0] - top;
            n += count;
            sum = fma_f(count, d, sum);
            square = fma_f(count * d, d, square);
            m2 += e[1];
        };
        each_entry(p.stats + (long long)image * slabs * p.c * 2, p.c, from, p.cpg, slabs, add, [](int) {});
        const float off = n > 0.0f ? sum * rcp_fast_f(n) : 0.0f;
        const Moments all = warp_merged({n, top + off, max_f(fma_f(-sum, off, square), 0.0f) + m2});
        const Pair mean = two_sum(pivot, all.mean);
        const float rstd = rsqrt_fast_f(fma_f(all.m2, rcp_fast_f(all.n), p.eps));
        for (int c = (from > own.first ? from : own.first) + int(lane()); c < to && c <= own.last; c += WARP) {
            const Affine f = affine(p.w, p.bias, p.film, p.c, image, c);
            const int k = c - own.first;
            s.of.high[k] = mean.high;
            s.of.low[k] = mean.low;
            s.of.rstd[k] = rstd;
            s.of.a[k] = rstd * f.w;
            s.of.b[k] = fma_f(-mean.low, rstd * f.w, f.bias);
        }
        if (slab == 0 && from >= own.first && lane() == 0) {
            const Vec<float, 4> out = {{mean.high, mean.low, rstd, 0.0f}};
            store(p.moments + ((long long)image * (p.c / p.cpg) + g) * 4, out);
        }
    }
    sync_block();

    float high[V], a[V], b[V], dw[V] = {}, dbias[V] = {};
    UNROLL
    for (int k = 0; k < V; k++) {
        high[k] = s.of.high[own.column + k];
        a[k] = s.of.a[own.column + k];
        b[k] = s.of.b[own.column + k];
    }
    stream.run([&](const Vec<T, V>& x, const Vec<T, V>& dy, long long) {
        float d[V], z[V];
        UNROLL
        for (int k = 0; k < V; k++) {
            d[k] = to_float(x[k]) - high[k];
            z[k] = fma_f(d[k], a[k], b[k]);
        }
        slopes<ACT>(z, p.act);
        UNROLL
        for (int k = 0; k < V; k++) {
            const float dz = to_float(dy[k]) * z[k];
            dw[k] = fma_f(dz, d[k], dw[k]);
            dbias[k] += dz;
        }
    });

    UNROLL
    for (int step = Own::SIDE; step < WARP; step <<= 1) {
        UNROLL
        for (int k = 0; k < V; k++) {
            dw[k] += shfl_xor(dw[k], step);
            dbias[k] += shfl_xor(dbias[k], step);
        }
    }
    if (lane() < Own::SIDE) {
        UNROLL
        for (int k = 0; k < V; k++) {
            s.n[warp()][own.column + k] = dw[k];
            s.one[warp()][own.column + k] = dbias[k];
        }
    }
    sync_block();
    const int mine = thread_x(), c = own.first + mine;
    if (mine >= Own::STRIP || c > own.last) return;
    float to_w = 0.0f, to_bias = 0.0f;
    UNROLL
    for (int w = 0; w < WARPS; w++) {
        to_w += s.n[w][mine];
        to_bias += s.one[w][mine];
    }
    const Vec<float, 2> out = {{fma_f(-s.of.low[mine], to_bias, to_w) * s.of.rstd[mine], to_bias}};
    store(p.sums + (((long long)image * slabs + slab) * p.c + c) * 2, out);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 3) group_norm_grad_sums(const __grid_constant__ GroupNormGradSums p) {
    griddep_wait();
    GroupNormGradSumsSmem& s = smem<GroupNormGradSumsSmem>();
    if (!p.wide) {
        sums<1, -1>(p, s);
    } else if (p.act == 1) {
        sums<vec_width<T>, 1>(p, s);
    } else {
        sums<vec_width<T>, 0>(p, s);
    }
}

// ------------------------------------------------------------------------------------------------------------------ dx

struct GroupNormGrad {
    T* dx;                 // (B,HW,C)
    float* dw;             // (C)
    float* dbias;          // (C)
    T* dfilm;              // (B,2C): dscale, dshift; null where film is
    const float* moments;  // (B,groups,4): of group_norm_grad_sums
    const float* sums;     // (B,slabs,C,2)
    const T* x;            // (B,HW,C)
    const T* w;            // (C)
    const T* bias;         // (C)
    const T* dy;           // (B,HW,C)
    const T* film;         // (B,2C) or null: scales, shifts
    int batch, hw, c;
    int cpg;               // channels of a group
    int slabs, each;       // of an image; pixels of one
    int act;               // by the numbers of activate_f
    int wide;
};

struct GroupNormGradSmem {
    float high[MOST], a[MOST], b[MOST], slant[MOST], level[MOST];
};

// Gradients of the parameters of channel c, and of its scale and shift in each image.
DEV void of_parameters(const GroupNormGrad& p, int c) {
    float dw = 0.0f, dbias = 0.0f;
    for (int b = 0; b < p.batch; b++) {
        float to_w = 0.0f, to_bias = 0.0f, scale = 1.0f;
        for (int slab = 0; slab < p.slabs; slab += ENTRIES) {
            const float* at = p.sums + (((long long)b * p.slabs + slab) * p.c + c) * 2;
            Vec<float, 2> e[ENTRIES];
            UNROLL
            for (int i = 0; i < ENTRIES; i++) {
                e[i] = {};
                if (slab + i < p.slabs) e[i] = load<2>(at + (long long)i * p.c * 2);
            }
            UNROLL
            for (int i = 0; i < ENTRIES; i++) {
                to_w += e[i][0];
                to_bias += e[i][1];
            }
        }
        if (p.film) {
            const long long at = (long long)b * 2 * p.c + c;
            scale += to_float(load(p.film + at));
            store(p.dfilm + at, from_float<T>(fma_f(to_float(load(p.w + c)), to_w, to_float(load(p.bias + c)) * to_bias)));
            store(p.dfilm + at + p.c, from_float<T>(to_bias));
        }
        dw = fma_f(scale, to_w, dw);
        dbias = fma_f(scale, to_bias, dbias);
    }
    store(p.dw + c, dw);
    store(p.dbias + c, dbias);
}

template <int V, int ACT>
DEV void back(const GroupNormGrad& p, GroupNormGradSmem& s) {
    const int image = block_z(), slab = block_y();
    using Own = Share<V>;
    const Own own = Own::of(p.c, p.hw, p.each, slab);
    if (slab == p.slabs) {
        const int mine = thread_x(), c = own.first + mine;
        if (image == 0 && mine < Own::STRIP && c <= own.last) of_parameters(p, c);
        return;
    }
    Stream<V> stream = {p.x, p.dy};
    stream.start(own, p.hw, p.c, image);

    const float share = 1.0f / float(p.hw * p.cpg);
    for (int g = own.first / p.cpg + int(warp()); g * p.cpg <= own.last; g += WARPS) {
        const int from = g * p.cpg, to = from + p.cpg;
        const Vec<float, 4> m = load<4>(p.moments + ((long long)image * (p.c / p.cpg) + g) * 4);
        const float low = m[1], rstd = m[2];
        float to_w = 0.0f, to_bias = 0.0f, g_sum = 0.0f, gn_sum = 0.0f;
        const auto add = [&](const Vec<float, 2>& e, int) {
            to_w += e[0];
            to_bias += e[1];
        };
        const auto channel = [&](int c) {
            const float w = affine(p.w, p.bias, p.film, p.c, image, c).w;
            g_sum = fma_f(to_bias, w, g_sum);
            gn_sum = fma_f(to_w, w, gn_sum);
            to_w = to_bias = 0.0f;
        };
        each_entry(p.sums + (long long)image * p.slabs * p.c * 2, p.c, from, p.cpg, p.slabs, add, channel);
        const float slant = -rstd * rstd * (warp_sum(gn_sum) * share);
        const float level = fma_f(-slant, low, -rstd * (warp_sum(g_sum) * share));
        for (int c = (from > own.first ? from : own.first) + int(lane()); c < to && c <= own.last; c += WARP) {
            const Affine f = affine(p.w, p.bias, p.film, p.c, image, c);
            const int k = c - own.first;
            s.high[k] = m[0];
            s.a[k] = rstd * f.w;
            s.b[k] = fma_f(-low, rstd * f.w, f.bias);
            s.slant[k] = slant;
            s.level[k] = level;
        }
    }
    sync_block();

    float high[V], a[V], b[V], slant[V], level[V];
    UNROLL
    for (int k = 0; k < V; k++) {
        high[k] = s.high[own.column + k];
        a[k] = s.a[own.column + k];
        b[k] = s.b[own.column + k];
        slant[k] = s.slant[own.column + k];
        level[k] = s.level[own.column + k];
    }
    stream.run([&](const Vec<T, V>& x, const Vec<T, V>& dy, long long at) {
        float d[V], z[V];
        UNROLL
        for (int k = 0; k < V; k++) {
            d[k] = to_float(x[k]) - high[k];
            z[k] = fma_f(d[k], a[k], b[k]);
        }
        slopes<ACT>(z, p.act);
        Vec<T, V> out;
        UNROLL
        for (int k = 0; k < V; k++) {
            out[k] = from_float<T>(fma_f(to_float(dy[k]) * z[k], a[k], fma_f(slant[k], d[k], level[k])));
        }
        store(p.dx + at, out);
    });
}

extern "C" __global__ void __launch_bounds__(BLOCK, 3) group_norm_grad(const __grid_constant__ GroupNormGrad p) {
    griddep_wait();
    GroupNormGradSmem& s = smem<GroupNormGradSmem>();
    if (!p.wide) {
        back<1, -1>(p, s);
    } else if (p.act == 1) {
        back<vec_width<T>, 1>(p, s);
    } else {
        back<vec_width<T>, 0>(p, s);
    }
}
