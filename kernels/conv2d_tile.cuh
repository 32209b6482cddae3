// What the kernels of tiled products share: where rows of x lie, and everything behind the sums. In such a kernel a block owns the
// BM×BN tile of y that its place in the grid names, its warps stand with WARPS_N beside each other over the tile, each with MT×NT
// products of m16n8, and k-blocks of BK channels lie in a ring of slots in shared memory, BM rows of x, then BN rows of w.
//
// Segments of K. Segment 0 is x with its window of taps; up to two more add products of other inputs into the same sum: the
// second half of a concatenation, or a 1×1 shortcut. A segment without a window (`flat`) reads pixel m for row m. Segment 1
// may have a window where segment 0 has one; it is the same, over an image of the same size. Segment 2 never has one. With `part`
// there is one segment, and the rows of three weights count as one below the other; a tile lies in one of them.
//
// Phases. A 3×3 convolution behind a nearest upsampling comes as four of 2×2 on the small image, one for each parity of the
// rows and columns of y (see `phase_weights.cu`). Rows m then run over images, phases, pixels of the small image; a tile lies
// in one phase, and its rows are scattered only where the residual is read and y is written.
//
// End. With splits, the blocks of a tile add up in pairs, pairs of pairs, and so on: each leaves its float tile in `partial`
// and counts itself where the two meet, in `counters`; the one that comes second adds the other's. The order of the additions
// is the tree's, and a + b is b + a, so the sum does not depend on who comes when, and the counters are back at zero. The last
// block reads log2(splits) tiles rather than all. What is added to a whole column (bias, time of the image that the tile lies
// in) was loaded early, lies in shared memory (`columns`) and is added in registers. What needs much code for each element (activations, gates,
// times of several images in a tile) goes through shared memory, in a loop. The residual is copied to where y will stand in the
// staging tile (rows of BN + 8 elements: fragments meet in no bank), added in float, and y is rounded once, in its place; then the
// rows go to memory, 16 bytes to a thread. With `glu` the columns of the tile alternate, eight values, eight gates, both in one
// thread, and y = value · GELU(gate) has half as many. With `stats` mean and sum of squared deviations of each 64 stored rows
// are written per channel.
//
// M is rows of y, O its columns; N is O (with `part` the rows of the three weights together), with `glu` 2·O. O may be any number:
// threads take eight columns at once where it is a multiple of 8, else one at a time. Rows beyond M and columns beyond N are
// summed as zeros and not stored. `counter` picks the row of `time`. Null: what the struct says; x1 to w2 are not read without
// their segment or `part`, partial and counters not without splits.
//
// Wants, and the caller checks: pointers aligned to 16 bytes; C, w_row and w_tap of every segment multiples of 8 elements; at most
// 2³¹ − 1 elements in each input and each of the weights; where a segment has a window, out_h and out_w times the stride, and the
// padding, below 2^14 (a window's corner is packed into two halves of a word). `glu`: O a multiple of 8, a warp's columns a multiple of
// 16 (so not BN = 80, of which a warp of conv2d_mma has 40: all kernels take the same launches), no time, activation, residual,
// statistics, `part`. `stats`: M a multiple of SLAB, O of 4. `part`: one segment, a multiple of BN. `phases`: windows of 2×2, a small
// image whose pixels are a multiple of BM, no `upsample`, `flat`, `glu`, `part` or further segment; stride, top and left are not read.
//
// Its order in a kernel: `place_rows`, and a barrier before another thread's rows are read; `load_terms` early, `keep_terms` before
// some barrier that stands before `finish`; `finish` behind a barrier, with the ring idle. Barriers of the end: one behind sums that
// passed through the ring, whose place the tile takes; one behind the residual, for whose copies each thread has waited; one behind
// the rounded tile, which other threads store and take statistics of.
//
// It wants from the file that includes it: BM, BN, BLOCK, BK, STAGES, SLAB, WARPS_N, WARP_ROWS, WARP_COLUMNS, MT, NT, SMEM_BYTES,
// and `Conv`, its struct of arguments. Lines are counted from 601 on, so that none of them is a line of that file too: the emulator
// names barriers, waits and accesses by the file of the kernel and their line.
#pragma once
#line 647

constexpr int PITCH = BN + 8;
constexpr int ROUNDS = BM * BN / 8 / BLOCK;  // in which the block moves the tile, 16 bytes to a thread
constexpr int AT_ONCE = ROUNDS % 5 == 0 ? 5 : ROUNDS % 4 == 0 ? 4 : 1;
constexpr int TERMS = (BN + BLOCK - 1) / BLOCK;  // columns of the tile whose terms a thread loads
static_assert(BN % 16 == 0 && BM <= BLOCK && BM % SLAB == 0, "whole rounds and slabs");

// A row of the tile.
struct Row {
    int base;    // pixels before its image in x
    int corner;  // row << 16 | column of its window's first tap, each biased by 2^14; or -1 beyond M
    int to;      // its pixel of y
    int unused;
};

struct alignas(1024) ConvShared {
    T ring[STAGES][(BM + BN) * BK];
    Row rows[BM];
    float columns[BN];  // what is added to each column
    unsigned met;       // of `combine`
    unsigned unused;
    Mbarrier barriers[127 - BN / 2];  // of kernels whose copies arrive at such
};
static_assert(sizeof(ConvShared) == SMEM_BYTES, "what the launch passes");
static_assert(sizeof(ConvShared::ring) >= BM * BN * 4 && sizeof(ConvShared::ring) >= BM * PITCH * 2, "sums and y fit into the ring");

// Adds up the sums of the splits, pairs of them, then pairs of pairs, and so on. Of two, the one that comes first leaves its
// sums and ends: false. The other adds them to its own; it has all in the end.
DEV bool combine(float (&acc)[MT][NT][4], const Conv& p, unsigned* met) {
    const int tiles = grid_x() * grid_y(), tile = block_y() * grid_x() + block_x(), splits = grid_z();
    const long long step = (long long)tiles * BM * BN;
    float* part = p.partial + (long long)tile * BM * BN + thread_x() * 4;
    ROLLED
    for (int half = 1; half < splits; half *= 2) {
        // Splits z to z + half - 1 are in this block's sums; those of the other half begin at `other`, if there are any.
        const int z = block_z() / half * half, other = z ^ half;
        if (other >= splits) continue;
        UNROLL
        for (int i = 0; i < MT * NT; i++) {
            Vec<float, 4> v;
            UNROLL
            for (int e = 0; e < 4; e++) v[e] = acc[i / NT][i % NT][e];
            store(part + z * step + i * BLOCK * 4, v);
        }
        fence_gpu();
        sync_block();
        // The counter of the place where the two halves meet.
        if (thread_x() == 0) *met = atomic_inc_u32(p.counters + ((z | half) - 1) * tiles + tile, 1);
        sync_block();
        if (*met != 1) return false;
        fence_gpu();
        UNROLL
        for (int i = 0; i < MT * NT; i++) {
            const Vec<float, 4> v = load<4>(part + other * step + i * BLOCK * 4);
            UNROLL
            for (int e = 0; e < 4; e++) acc[i / NT][i % NT][e] += v[e];
        }
    }
    return true;
}

// The row of the weights that column n of the tile takes: with gates, eight rows of values and eight of gates alternate.
DEV int weight_row(const Conv& p, int n) { return p.glu ? n / 16 * 8 + n % 8 + (n / 8 % 2) * p.o : n; }

// Which of the four phases this tile belongs to.
DEV int phase(const Conv& p) { return int(block_x() * BM) / (p.h * p.w_) % 4; }

// Whether the rows of a tile belong to images with times of their own.
DEV bool many_times(const Conv& p) {
    return p.time && !p.counter && p.time_rows > 1 && p.out_h * p.out_w % BM != 0;
}

// Where the window of each row of the tile lies, and where its results go.
DEV void place_rows(const Conv& p, Row* rows, int m0) {
    if (thread_x() >= BM) return;
    const int m = m0 + thread_x();
    Vec<int, 4> row;
    row[0] = row[3] = 0;
    row[1] = -1;
    row[2] = m;
    if (p.phases) {
        const int small = p.h * p.w_, image = m / (4 * small), rest = m % small, y = rest / p.w_, x = rest - y * p.w_;
        const int down = phase(p) / 2, right = phase(p) % 2;
        row[0] = image * small;
        row[1] = (y + down - 1 + 0x4000) << 16 | (x + right - 1 + 0x4000);
        row[2] = (image * p.out_h + 2 * y + down) * p.out_w + 2 * x + right;
    } else if (!p.flat && m < p.m) {
        const int image = m / (p.out_h * p.out_w), rest = m - image * (p.out_h * p.out_w);
        const int y = rest / p.out_w, x = rest - y * p.out_w;
        row[0] = image * p.h * p.w_;
        row[1] = (y * p.stride - p.top + 0x4000) << 16 | (x * p.stride - p.left + 0x4000);
    }
    store_shared(&rows[thread_x()].base, row);
}

// What the epilogue adds to each column of the tile: bias, that of a shortcut, time. Loaded before the first copies, added up
// behind them: nobody waits for one after the other.
struct Terms {
    T bias[TERMS], bias1[TERMS], time[TERMS];
};

DEV void load_terms(Terms& t, const Conv& p, int m0, int n0) {
    const bool timed = p.time && !many_times(p);
    const long long image = !timed ? 0 : p.counter ? load(p.counter) : p.time_rows > 1 ? m0 / (p.out_h * p.out_w) : 0;
    UNROLL
    for (int i = 0; i < TERMS; i++) {
        const int c = i * BLOCK + thread_x(), n = n0 + c, row = weight_row(p, n);
        const bool in = c < BN && (p.glu ? n / 16 * 8 + n % 8 < p.o : n < p.o);
        t.bias[i] = t.bias1[i] = t.time[i] = from_float<T>(0.0f);
        if (in && p.bias) t.bias[i] = load(p.bias + row);
        if (in && p.bias1) t.bias1[i] = load(p.bias1 + row);
        if (in && timed) t.time[i] = load(p.time + image * p.o + n);
    }
}

DEV void keep_terms(const Terms& t, float* columns) {
    UNROLL
    for (int i = 0; i < TERMS; i++) {
        const int c = i * BLOCK + thread_x();
        if (c < BN) columns[c] = to_float(t.bias[i]) + to_float(t.bias1[i]) + to_float(t.time[i]);
    }
}

// Times of several images, the activation, values times GELU of their gates: by way of shared memory, since a loop over it is
// short, where registers would need one piece of code each. Threads meet nobody here: each reads what it wrote.
DEV void activate(float (&acc)[MT][NT][4], const Conv& p, float* own, int m, int n) {
    UNROLL
    for (int i = 0; i < MT * NT; i++) {
        Vec<float, 4> v;
        UNROLL
        for (int e = 0; e < 4; e++) v[e] = acc[i / NT][i % NT][e];
        store_shared(own + i * BLOCK * 4, v);
    }
    if (p.glu) {
        constexpr int BOTH = MT * NT % 4 == 0 ? 2 : 1;
        ROLLED
        for (int i = 0; i < MT * NT; i += 2 * BOTH) {
            Vec<float, 4> v[BOTH], gate[BOTH];
            UNROLL
            for (int j = 0; j < BOTH; j++) {
                v[j] = load_shared<4>(own + (i + 2 * j) * BLOCK * 4);
                gate[j] = load_shared<4>(own + (i + 2 * j + 1) * BLOCK * 4);
            }
            UNROLL
            for (int e = 0; e < 4 * BOTH; e++) v[e / 4][e % 4] *= gelu_fast_f(gate[e / 4][e % 4]);
            UNROLL
            for (int j = 0; j < BOTH; j++) store_shared(own + (i + 2 * j) * BLOCK * 4, v[j]);
        }
    } else {
        const bool timed = many_times(p);
        ROLLED
        for (int i = 0; i < MT * NT * 4; i++) {
            const int row = m + i / 4 / NT * 16 + i / 2 % 2 * 8, c = n + i / 4 % NT * 8 + i % 2;
            float* at = own + i / 4 * BLOCK * 4 + i % 4;
            float v = *at;
            if (timed && row < p.m && c < p.o) v += to_float(load(p.time + (long long)(row / (p.out_h * p.out_w)) * p.o + c));
            *at = activate_f(p.act, v);
        }
    }
    UNROLL
    for (int i = 0; i < MT * NT; i++) {
        const Vec<float, 4> v = load_shared<4>(own + i * BLOCK * 4);
        UNROLL
        for (int e = 0; e < 4; e++) acc[i / NT][i % NT][e] = v[e];
    }
}

// The tile's elements of the residual, to where those of y will stand.
DEV void fetch_residual(const Conv& p, T* tile, const Row* rows, int m0, int n0) {
    if (p.o % 8 == 0) {
        ROLLED
        for (int i = 0; i < ROUNDS; i += AT_ONCE) {
            UNROLL
            for (int j = 0; j < AT_ONCE; j++) {
                const int e = (i + j) * BLOCK + thread_x(), r = e / (BN / 8), c = e % (BN / 8) * 8;
                const bool in = m0 + r < p.m && n0 + c < p.o;
                cp_async(tile + r * PITCH + c, in ? p.residual + (long long)rows[r].to * p.o + n0 + c : p.residual, in);
            }
        }
    } else {
        ROLLED
        for (int e = thread_x(); e < BM * BN; e += BLOCK) {
            const int r = e / BN, c = e % BN;
            const bool in = m0 + r < p.m && n0 + c < p.o;
            tile[r * PITCH + c] = in ? load(p.residual + (long long)rows[r].to * p.o + n0 + c) : from_float<T>(0.0f);
        }
    }
    cp_async_commit();
    cp_async_wait<0>();
}

// Two results of a row, with the residual where there is one, rounded to where they are stored from.
DEV void round_pair(T* at, float low, float high, bool residual) {
    if (residual) {
        const Vec<T, 2> r = load_shared<2>(at);
        low += to_float(r[0]);
        high += to_float(r[1]);
    }
    Vec<unsigned, 1> v;
    v[0] = pack2<T>(low, high);
    store_shared(reinterpret_cast<unsigned*>(at), v);
}

// The tile's rows to y, `width` columns of it.
DEV void write_rows(const Conv& p, const T* tile, const Row* rows, int m0, int n0, int width) {
    if (p.o % 8 == 0) {
        const int per_row = width / 8;
        ROLLED
        for (int i = 0; i < ROUNDS; i += AT_ONCE) {
            UNROLL
            for (int j = 0; j < AT_ONCE; j++) {
                const int e = (i + j) * BLOCK + thread_x();
                const int r = p.glu ? e / (BN / 16) : e / (BN / 8), c = (e - r * per_row) * 8;
                if (r < BM && m0 + r < p.m && n0 + c < p.o) {
                    store(p.y + (long long)rows[r].to * p.o + n0 + c, load_shared<8>(tile + r * PITCH + c));
                }
            }
        }
    } else {
        ROLLED
        for (int e = thread_x(); e < BM * width; e += BLOCK) {
            const int r = e / width, c = e - r * width;
            if (m0 + r < p.m && n0 + c < p.o) store(p.y + (long long)rows[r].to * p.o + n0 + c, tile[r * PITCH + c]);
        }
    }
}

// Mean and sum of squared deviations of each column of each slab, as it was stored: two columns to a thread, and four of each
// eight rows, whose others lane ^ 16 takes: so they stand in the other sixteen banks. Sums are of x - pivot.
DEV void write_stats(const Conv& p, const T* tile, int m0, int n0) {
    constexpr int PAIRS = BN / 2, ALL = BM / SLAB * PAIRS, HALF = SLAB / 2;
    ROLLED
    for (int begin = warp() * 16; begin < ALL; begin += BLOCK / 2) {
        // Lanes beyond the last pair do it again: all take part in the shuffles.
        const int item = begin + lane() % 16, in = item < ALL ? item : ALL - 1, slab = in / PAIRS, c = in % PAIRS * 2;
        const T* at = tile + slab * SLAB * PITCH + c;
        const Vec<T, 2> first = load_shared<2>(at);
        const float pivot[2] = {to_float(first[0]), to_float(first[1])};
        float sum[2] = {}, square[2] = {};
        at += lane() / 16 * 4 * PITCH;
        UNROLL
        for (int r = 0; r < HALF; r++) {
            const Vec<T, 2> v = load_shared<2>(at + (r / 4 * 8 + r % 4) * PITCH);
            UNROLL
            for (int e = 0; e < 2; e++) {
                const float d = to_float(v[e]) - pivot[e];
                sum[e] += d;
                square[e] = fma_f(d, d, square[e]);
            }
        }
        Vec<float, 4> v;
        UNROLL
        for (int e = 0; e < 2; e++) {
            sum[e] += shfl_xor(sum[e], 16);
            square[e] += shfl_xor(square[e], 16);
            v[2 * e] = fma_f(sum[e], 1.0f / SLAB, pivot[e]);
            v[2 * e + 1] = max_f(fma_f(-sum[e] * (1.0f / SLAB), sum[e], square[e]), 0.0f);
        }
        if (lane() < 16 && item < ALL && m0 + slab * SLAB < p.m && n0 + c < p.o) {
            store(p.stats + ((long long)(m0 / SLAB + slab) * p.o + n0 + c) * 2, v);
        }
    }
}

// Everything behind the sums: those of the other splits, what is added, the activation, and the way to memory. The ring is the
// block's to use again: nobody reads it, and no copy is on its way.
DEV void finish(float (&acc)[MT][NT][4], const Conv& p, ConvShared& s, int m0, int n0) {
    const int warp_m = warp() / WARPS_N, warp_n = warp() % WARPS_N;
    if (grid_z() > 1 && !combine(acc, p, &s.met)) return;
    T* tile = s.ring[0];
    const int l = lane();
    UNROLL
    for (int j = 0; j < NT; j++) {
        const Vec<float, 2> add = load_shared<2>(s.columns + warp_n * WARP_COLUMNS + j * 8 + l % 4 * 2);
        UNROLL
        for (int i = 0; i < MT * 4; i++) acc[i / 4][j][i % 4] += add[i % 2];
    }
    if (p.act || p.glu || many_times(p)) {
        const int first_m = m0 + warp_m * WARP_ROWS + l / 4, first_n = n0 + warp_n * WARP_COLUMNS + l % 4 * 2;
        activate(acc, p, reinterpret_cast<float*>(s.ring[0]) + thread_x() * 4, first_m, first_n);
        sync_block();  // the tile takes the place of the sums
    }
    if (p.residual) {
        fetch_residual(p, tile, s.rows, m0, n0);
        sync_block();
    }
    T* own = tile + (warp_m * WARP_ROWS + l / 4) * PITCH + l % 4 * 2;
    if (p.glu) {
        UNROLL
        for (int i = 0; i < MT * (NT / 2) * 2; i++) {
            const int mt = i / 2 / (NT / 2), j = i / 2 % (NT / 2), h = i % 2;
            const float* v = acc[mt][2 * j] + 2 * h;
            round_pair(own + (mt * 16 + h * 8) * PITCH + warp_n * (WARP_COLUMNS / 2) + j * 8, v[0], v[1], false);
        }
    } else {
        UNROLL
        for (int i = 0; i < MT * NT * 2; i++) {
            const int mt = i / 2 / NT, j = i / 2 % NT, h = i % 2;
            const float* v = acc[mt][j] + 2 * h;
            round_pair(own + (mt * 16 + h * 8) * PITCH + warp_n * WARP_COLUMNS + j * 8, v[0], v[1], p.residual != nullptr);
        }
    }
    sync_block();
    write_rows(p, tile, s.rows, m0, p.glu ? n0 / 2 : n0, p.glu ? BN / 2 : BN);
    if (p.stats) write_stats(p, tile, m0, n0);
}
