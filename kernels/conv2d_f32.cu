// y = act(conv(x, w) + bias + time) + residual in f32 throughout: an implicit matrix product by float units, whose rows m are
// output pixels, whose columns n are output channels, and whose sum runs over blocks of BK channels of one tap.
//
// Who owns what. Grid: (ceil(M / BM), ceil(O / BN), splits); a block owns a BM×BN tile of y, or with several splits a
// contiguous run of its k-blocks. A thread holds TM×TN sums in registers: rows LM apart, columns in runs of four. 64 sums, 32
// values of w and four of x are what a thread needs at once (32, 16 and four in the narrow tile, BN = 16), and 128 registers
// for 512 threads are what limits a multiprocessor: to two, four, eight blocks of 256, 128, 64 threads. Shared memory, 49, 37,
// 25 KB a block, allows as many on sm_90, six of the eight on sm_80, and two, two, three on sm_86 and sm_89. The narrow tile
// takes 28 KB a block; shared memory limits it to seven blocks on sm_90, five on sm_80, three on sm_86 and sm_89.
//
// Operands. A k-block of x (BM rows of BK channels) and of w (BN rows) lies in one slot of a ring of STAGES slots in shared
// memory, in rows of 64 bytes; chunk c of 16 bytes of a row of w stands at c ^ (row / 2 % (LN / 2)), those of x in their order. A
// thread reads four channels of a row at once. The lanes of a warp stand LM×LN over its part of the tile, the lowest bit and
// the highest ones of their number along m, those between along n: eight lanes read two neighbouring rows of x, or four of w,
// which fall into different banks. And as each address is also that of lane ^ 1 or of lane ^ 2, the hardware may serve
// sixteen lanes in a pass (of x not in the narrow tile). To allow it, neighbouring lanes along n read neighbouring rows: row j·LN
// + l of a warp's part of w in a slot is the j-th column of the lanes at place l along n, of LN (`column`). cp.async writes zeros
// for pixels outside the image, channels beyond C, rows beyond M and O. Where the window of each row begins is in shared memory
// too, as it is wanted at a new tap only.
//
// The loop over the four chunks of a k-block is not unrolled: else the compiler reads the next chunk's w early, and a sixth of
// the instructions move registers. The other warps hide what a chunk waits for.
//
// Order. A barrier before the first copy makes the windows visible. Each thread commits one group of copies per k-block. At
// k-block i it waits until its group i has landed; the barrier after that makes everybody's visible, and also says that all
// are done with k-block i − 1, whose slot is then filled with k-block i + STAGES − 1. After the loop no copy is in flight.
//
// Phases. A 3×3 convolution behind a nearest upsampling comes as four of 2×2 on the small image, as in `conv2d_mma`: rows m
// then run over images, phases, pixels of the small image; a tile lies in one phase, whose weights it takes; the end scatters
// its rows to the pixels of y.
//
// End. With splits, the blocks of a tile add up in pairs, pairs of pairs, and so on: each leaves its sums in `partial` and
// counts itself where the two meet, in `counters`; the one that comes second adds the other's. The order of the additions is
// the tree's, and a + b is b + a, so the sum does not depend on who comes when, and the counters are back at zero. Then each
// thread parks its sums in the ring, half of its rows at a time, and takes them back four by four in a loop that is not unrolled:
// bias, time, activation and residual are one piece of code. Nobody else reads them, so there is no barrier. The LN lanes
// beside each other along n write 16·LN bytes of a row of y.
//
// `counter` picks the row of `time`. Wants, and the caller checks: pointers aligned to 16 bytes; C and w_row multiples of 4; `flat`
// with windows of 1×1 only; at most 2³¹ − 1 elements in each of x and w; unless `flat`, out_h and out_w times the stride, and the
// padding, below 2^14 (a window's corner is packed into two halves of a word). O is any number: where 4 does not divide it, y is written element
// by element. `phases`: windows of 2×2, BM divides h·w_, O rows of w for each phase, no `upsample`, not `flat`; stride, top and
// left are not read.
// types: f32
// variants: BM=128,BN=128 BM=128,BN=64 BM=64,BN=64 BM=128,BN=16
#include "dev.cuh"

constexpr int TM = 8, TN = BN >= 64 ? 8 : 4;  // rows and columns of a thread
constexpr int BLOCK = BM * BN / (TM * TN);
constexpr int BK = 16;
constexpr int STAGES = 3;
constexpr int SMEM_BYTES = STAGES * (BM + BN) * BK * 4 + BM * 8;

constexpr int LN = BN >= 64 ? 8 : 4, LM = WARP / LN;  // lanes of a warp along columns and rows
constexpr int WARP_ROWS = TM * LM, WARP_COLUMNS = TN * LN;
constexpr int WARPS_N = BN / WARP_COLUMNS;
constexpr int QUADS = TN / 4;
constexpr int LOAD_ROWS = BLOCK / 4;  // rows that one round of copies covers: four threads, four chunks to a row
constexpr int A_LOADS = BM / LOAD_ROWS, B_LOADS = BN / LOAD_ROWS;
// Instructions of the innermost loop's body, which a test counts in the machine code.
constexpr int LOOP_FFMA = TM * TN * 4, LOOP_LDS = TM + TN;
static_assert(BM % WARP_ROWS == 0 && BN % WARP_COLUMNS == 0 && BLOCK == BM / WARP_ROWS * WARPS_N * WARP, "whole warps");
static_assert(A_LOADS * LOAD_ROWS == BM && B_LOADS * LOAD_ROWS == BN, "whole rounds of copies");
static_assert(TM / 2 * TN * BLOCK * 4 <= SMEM_BYTES, "half of the sums fit into the ring");

struct Conv2dF32 {
    T* y;                // (M,O)
    const T* x;          // (B,H,W,C)
    const T* w;          // (O,KH,KW,C)
    const T* bias;       // (O) or null
    const T* time;       // (time_rows,O) or null
    const int* counter;  // null, or the row of time that serves every image
    const T* residual;   // (M,O) or null
    float* partial;      // (splits,tiles,BM·BN) with splits > 1
    unsigned* counters;  // (splits − 1,tiles), zero before and after
    int m, o;
    int h, w_, c;        // size of x in memory
    int kh, kw, out_h, out_w;
    int stride, top, left;
    int upsample;        // 1: x counts as doubled by nearest neighbour; else 0
    int w_row;           // elements of a row of w
    int flat;            // no window: row m reads pixel m
    int blocks;          // k-blocks in all
    int time_rows;       // 1, or one per image; any number with a counter
    int act;  // by the numbers of activate_f
    int phases;          // w (4,O,2,2,C): x is doubled in four phases
};

struct alignas(128) FloatRing {
    T slot[STAGES][(BM + BN) * BK];
    Vec<int, 2> window[BM];  // of each row of the tile: pixels before its image; and its window's first tap, `corner`
};
static_assert(sizeof(FloatRing) == SMEM_BYTES, "what the launch passes");

// Where chunk `chunk` of a row of w stands. Rows of x are not swizzled.
DEV int place(int row, int chunk) { return BM * BK + row * BK + ((chunk ^ (row >> 1 & (LN / 2 - 1))) << 2); }

// The column of the tile whose weights are row `row` of a slot. The bits of the row are permuted: `column` of a sum of rows
// without common bits is the sum of theirs.
DEV_CONST int column(int row) {
    const int l = row % LN, j = row / LN % TN;
    return row / WARP_COLUMNS * WARP_COLUMNS + j / 4 * (4 * LN) + l * 4 + j % 4;
}

// No element of x; a multiple of four, as the address of a copy that reads nothing is aligned too.
constexpr int OUTSIDE = -4;

// What a thread copies next, and from where.
struct Walk {
    int kh, kw, c;    // the k-block
    int w;            // element of w: first row of this thread, at the tap
    int at[A_LOADS];  // element of x at this tap, or OUTSIDE
};

// Which of the four phases this tile belongs to; 0 where there are none.
DEV int phase(const Conv2dF32& p) { return p.phases ? int(block_x() * BM) / (p.h * p.w_) % 4 : 0; }

// The pixel of y that row m is.
DEV long long pixel_of(const Conv2dF32& p, int m) {
    if (!p.phases) return m;
    const int small = p.h * p.w_, image = m / (4 * small), rest = m % small, row = rest / p.w_;
    return ((long long)image * p.out_h + 2 * row + phase(p) / 2) * p.out_w + 2 * (rest - row * p.w_) + phase(p) % 2;
}

// Two numbers for row m: the pixels of x before its image; and its window's first tap, row << 16 | column, each biased by 2^14,
// or -1 beyond M.
DEV Vec<int, 2> corner(const Conv2dF32& p, int m) {
    if (p.phases) {
        const int small = p.h * p.w_, rest = m % small, y = rest / p.w_;
        const int tap = (y + phase(p) / 2 - 1 + 0x4000) << 16 | (rest - y * p.w_ + phase(p) % 2 - 1 + 0x4000);
        return {{m / (4 * small) * small, tap}};
    }
    const int image = m / (p.out_h * p.out_w), rest = m - image * (p.out_h * p.out_w);
    const int y = rest / p.out_w, x = rest - y * p.out_w;
    const int tap = (y * p.stride - p.top + 0x4000) << 16 | (x * p.stride - p.left + 0x4000);
    return {{image * p.h * p.w_, m < p.m ? tap : -1}};
}

// The pixels of this tap, for the rows that this thread copies.
DEV void tap(Walk& k, const Conv2dF32& p, const FloatRing& s) {
    UNROLL
    for (int i = 0; i < A_LOADS; i++) {
        const int at = thread_x() / 4 + i * LOAD_ROWS, m = block_x() * BM + at;
        if (p.flat) {
            k.at[i] = m < p.m ? m * p.c : OUTSIDE;
        } else {
            const Vec<int, 2> window = load_shared<2>(&s.window[at].v[0]);
            const int row = (window[1] >> 16) - 0x4000 + k.kh, col = (window[1] & 0xffff) - 0x4000 + k.kw;
            const bool in = window[1] >= 0 && unsigned(row) < unsigned(p.h << p.upsample) &&
                            unsigned(col) < unsigned(p.w_ << p.upsample);
            k.at[i] = in ? (window[0] + (row >> p.upsample) * p.w_ + (col >> p.upsample)) * p.c : OUTSIDE;
        }
    }
}

DEV void next(Walk& k, const Conv2dF32& p, const FloatRing& s) {
    k.c += BK;
    if (k.c < p.c) return;
    k.c = 0;
    k.w += p.c;
    if (++k.kw == p.kw) {
        k.kw = 0;
        k.kh++;
    }
    tap(k, p, s);
}

// Copies of one k-block into a slot, x first, then w; where nothing is read the address may be outside of them.
// `rows_left`: rows of w from this thread's first one on.
DEV void fetch(const Walk& k, const Conv2dF32& p, T* slot, int rows_left) {
    const int row = thread_x() / 4, chunk = thread_x() % 4, c = k.c + chunk * 4;
    const bool channel = c < p.c;
    UNROLL
    for (int i = 0; i < A_LOADS; i++) {
        cp_async(slot + (row + i * LOAD_ROWS) * BK + chunk * 4, p.x + k.at[i] + c, channel && k.at[i] >= 0);
    }
    UNROLL
    for (int i = 0; i < B_LOADS; i++) {
        const T* from = p.w + k.w + column(i * LOAD_ROWS) * p.w_row + c;
        cp_async(slot + place(row + i * LOAD_ROWS, chunk), from, channel && column(i * LOAD_ROWS) < rows_left);
    }
}

// The products of one slot, from the rows of x and of w that this thread's first sum has.
DEV void multiply(float (&acc)[TM][TN], const T* slot, int row, int w_row) {
    slot += row * BK;
    ROLLED
    for (int k = 0; k < BK / 4; k++) {
        const int at = place(w_row, k) - row * BK;  // the swizzle of each of its rows is that of the first
        Vec<float, 4> b[TN];
        UNROLL
        for (int j = 0; j < TN; j++) b[j] = load_shared<4>(slot + at + j * LN * BK);
        UNROLL
        for (int i = 0; i < TM; i++) {
            const Vec<float, 4> a = load_shared<4>(slot + i * LM * BK + k * 4);
            UNROLL
            for (int e = 0; e < 4; e++) {
                UNROLL
                for (int j = 0; j < TN; j++) acc[i][j] = fma_f(a[e], b[j][e], acc[i][j]);
            }
        }
    }
}

// Adds up the sums of the splits, pairs of them, then pairs of pairs, and so on. Of two, the one that comes first leaves its
// sums and ends: false. The other adds them to its own; it has all in the end.
DEV bool combine(float (&acc)[TM][TN], const Conv2dF32& p, unsigned* shared) {
    const int tiles = grid_x() * grid_y(), tile = block_y() * grid_x() + block_x(), splits = grid_z();
    const long long step = (long long)tiles * BM * BN;
    float* part = p.partial + (long long)tile * BM * BN + thread_x() * 4;
    for (int half = 1; half < splits; half *= 2) {
        // Splits z to z + half - 1 are in this block's sums; those of the other half begin at `other`, if there are any.
        const int z = block_z() / half * half, other = z ^ half;
        if (other >= splits) continue;
        UNROLL
        for (int i = 0; i < TM * QUADS; i++) {
            Vec<float, 4> v;
            UNROLL
            for (int e = 0; e < 4; e++) v[e] = acc[i / QUADS][i % QUADS * 4 + e];
            store(part + z * step + i * BLOCK * 4, v);
        }
        fence_gpu();
        sync_block();
        // The counter of the place where the two halves meet.
        if (thread_x() == 0) *shared = atomic_inc_u32(p.counters + ((z | half) - 1) * tiles + tile, 1);
        sync_block();
        if (*shared != 1) return false;
        fence_gpu();
        UNROLL
        for (int i = 0; i < TM * QUADS; i++) {
            const Vec<float, 4> v = load<4>(part + other * step + i * BLOCK * 4);
            UNROLL
            for (int e = 0; e < 4; e++) acc[i / QUADS][i % QUADS * 4 + e] += v[e];
        }
        sync_block();  // *shared is read; it and the ring may be written
    }
    return true;
}

// Bias, time, activation and residual of four sums of row m, from column n on.
DEV void finish(const Conv2dF32& p, Vec<float, 4> v, int m, int n) {
    const long long image = p.counter ? load(p.counter) : p.time_rows > 1 ? m / (p.out_h * p.out_w) : 0;
    const T* time = p.time ? p.time + image * p.o : nullptr;
    const long long to = pixel_of(p, m) * p.o + n;
    if (p.o % 4 == 0) {
        Vec<float, 4> bias = {}, more = {}, residual = {};
        if (p.bias) bias = load<4>(p.bias + n);
        if (time) more = load<4>(time + n);
        if (p.residual) residual = load<4>(p.residual + to);
        UNROLL
        for (int e = 0; e < 4; e++) v[e] = activate_f(p.act, v[e] + bias[e] + more[e]) + residual[e];
        store(p.y + to, v);
    } else {
        for (int e = 0; e < 4 && n + e < p.o; e++) {
            float u = v[e];
            if (p.bias) u += load(p.bias + n + e);
            if (time) u += load(time + n + e);
            u = activate_f(p.act, u);
            if (p.residual) u += load(p.residual + to + e);
            store(p.y + to + e, u);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 512 / BLOCK) conv2d_f32(const __grid_constant__ Conv2dF32 p) {
    griddep_wait();
    FloatRing& s = smem_dynamic<FloatRing>();
    const int m0 = block_x() * BM, n0 = block_y() * BN;
    const int n = n0 + column(thread_x() / 4);  // first row of w that this thread copies
    // Where its first sum stands in the tile, in rows, and in rows of w.
    const int lane_m = lane() % 2 + lane() / (2 * LN) * 2, lane_n = lane() / 2 % LN;
    const int row = warp() / WARPS_N * WARP_ROWS + lane_m, w_row = warp() % WARPS_N * WARP_COLUMNS + lane_n;

    for (int i = thread_x(); i < BM && !p.flat; i += BLOCK) store_shared(&s.window[i].v[0], corner(p, m0 + i));
    sync_block();
    const int first = int((long long)p.blocks * block_z() / grid_z());
    int left = int((long long)p.blocks * (block_z() + 1) / grid_z()) - first;
    const int per_tap = ceil_div(p.c, BK), t = first / per_tap;
    Walk k;
    k.kh = t / p.kw;
    k.kw = t - k.kh * p.kw;
    k.c = (first - t * per_tap) * BK;
    k.w = (phase(p) * p.o + n) * p.w_row + t * p.c;
    tap(k, p, s);

    float acc[TM][TN] = {};
    UNROLL
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < left) {
            fetch(k, p, s.slot[i], p.o - n);
            next(k, p, s);
        }
        cp_async_commit();
    }
    for (int read = 0; left > 0; left--) {
        cp_async_wait<STAGES - 2>();
        sync_block();
        if (left > STAGES - 1) {
            fetch(k, p, s.slot[read == 0 ? STAGES - 1 : read - 1], p.o - n);
            next(k, p, s);
        }
        cp_async_commit();
        multiply(acc, s.slot[read], row, w_row);
        read = read + 1 == STAGES ? 0 : read + 1;
    }
    sync_block();  // everybody is done with the ring, and every copy has landed: the last groups are empty

    if (grid_z() > 1 && !combine(acc, p, reinterpret_cast<unsigned*>(&s))) return;
    float* own = s.slot[0] + thread_x() * 4;
    UNROLL
    for (int half = 0; half < TM; half += TM / 2) {
        UNROLL
        for (int i = 0; i < TM / 2 * QUADS; i++) {
            Vec<float, 4> v;
            UNROLL
            for (int e = 0; e < 4; e++) v[e] = acc[half + i / QUADS][i % QUADS * 4 + e];
            store_shared(own + i * BLOCK * 4, v);
        }
        ROLLED
        for (int i = 0; i < TM / 2 * QUADS; i++) {
            const int to_m = m0 + row + (half + i / QUADS) * LM, to_n = n0 + column(w_row) + i % QUADS * 4 * LN;
            if (to_m < p.m && to_n < p.o) finish(p, load_shared<4>(own + i * BLOCK * 4), to_m, to_n);
        }
    }
}
