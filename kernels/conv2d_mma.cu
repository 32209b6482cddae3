// y = act(conv(x, w) + bias + time) + residual on tensor cores: an implicit matrix product whose rows m are output pixels,
// whose columns n are output channels, and whose sum runs over blocks of BK channels of one tap of one segment of K.
//
// Who owns what. Grid: (ceil(M / BM), ceil(N / BN), splits); a block of 4 warps owns a BM×BN tile of y, or with several
// splits a contiguous run of its k-blocks. Warps stand WARPS_M×WARPS_N over the tile; a warp's part is MT×NT products of
// m16n8k16, held in float in registers (160 of them for the 128×160 tile). In the 64×80 tile four parts would be so small that
// reading their operands from shared memory costs more than the products: two groups of two warps each take the whole tile, and
// every second k-block.
//
// Occupancy: registers limit a multiprocessor to two blocks, of the 64×80 tile to three, of the last two to four and seven.
// Shared memory, 72, 64, 52, 56, 72, 32, 20 KB in the order of the variants, allows as many on sm_80 and sm_90, but of the
// 64×80 tile two on sm_80; on sm_86 and sm_89 one block of the first five, three, four.
//
// Segments of K. Segment 0 is x with its window of taps; up to two more add products of other inputs into the same sum: the
// second half of a concatenation, or a 1×1 shortcut. A segment without a window (`flat`) reads pixel m for row m. A segment 1
// with a window has that of segment 0, which then has one too; segment 2 never has one. With `part`
// there is one segment, and the rows of three weights count as one below the other; a tile lies in one of them.
//
// Operands. A k-block of x (BM rows of BK channels) and of w (BN rows) lies in one slot of a ring of STAGES slots in shared
// memory (of WARPS_K k-blocks, one for each group), rows of 64 bytes, whose 16-byte chunk c stands at c ^ (row / 2 % 4): the
// eight rows that ldmatrix reads at once, and the two rows that eight copying threads write, fall into all 32 banks. cp.async
// writes zeros for pixels outside the image, channels beyond the segment, rows beyond M and N.
//
// Order. A turn takes the k-blocks of one slot. Each thread commits one group of copies per turn, which may be empty, and
// STAGES − 1 before the first. At turn i it waits until
// its group i has landed; the barrier after that makes everybody's visible, and also says that all warps are done with turn i
// − 1, whose slot is then filled for turn i + STAGES − 1. After the loop no copy is in flight and the ring becomes the
// staging tile.
//
// Phases. A 3×3 convolution behind a nearest upsampling comes as four of 2×2 on the small image, one for each parity of the
// rows and columns of y (see `phase_weights.cu`). Rows m then run over images, phases, pixels of the small image; a tile lies
// in one phase, and only the last step scatters its rows to the pixels of y.
//
// End. Groups of warps exchange halves of their sums through shared memory, behind the staging tile, so that each has the
// whole sums of half of its rows. With splits, the blocks of a tile add up in pairs, pairs of pairs, and so on: each leaves
// its float tile in `partial` and counts itself where the two meet, in `counters`; the one that comes second adds the
// other's. The order of the additions is the tree's, and a + b is b + a, so the sum does not depend on who comes when, and
// the counters are back at zero. The last block reads log2(splits) tiles rather than all. Then, 64 rows at a time, the sums
// pass through shared memory in float (rows of BN + 8 words: writes meet in no bank; reads do in pairs with `glu`, in the
// narrow tile, and with 80 columns where eight threads straddle two rows), so that bias, time, activation and residual are applied once per element by threads that read and write rows
// of global memory; y is rounded once. With `glu` the columns of the tile alternate, eight values, eight gates, and y = value
// · GELU(gate) has half as many. With `stats` mean and sum of squared deviations of the 64 stored rows are written per
// channel.
//
// M is rows of y, O its columns; N is O (with `part` the rows of the three weights together), with `glu` 2·O. O may be any number:
// threads take four columns at once where it is a multiple of 4, else one at a time. Rows beyond M and columns beyond N are
// summed as zeros and not stored. `counter` picks the row of `time`. Null: what the struct says; x1 to w2 are not read without
// their segment or `part`, partial and counters not without splits.
//
// Wants, and the room sees to it: pointers aligned to 16 bytes; C of every segment and row pitches multiples of 8 elements;
// at most 2³¹ − 1 elements in each of x and w; out_h and out_w times the stride, and the padding, below 2^14 (a window's
// corner is packed into two halves of a word). `glu`: O a multiple of 8, no time, activation, residual, statistics, `part`. `stats`:
// M a multiple of SLAB, O of 4. `part`: one segment, a multiple of BN. `phases`: windows of 2×2, a small image whose pixels are a
// multiple of BM, no `upsample`, `flat`, `glu`, `part` or further segment; stride, top and left are not read.
// types: f16 bf16
// variants: BM=128,BN=160 BM=128,BN=128 BM=128,BN=80 BM=64,BN=160 BM=64,BN=80 BM=64,BN=64 BM=64,BN=16
#include "dev.cuh"

constexpr int BLOCK = 128;
constexpr int BK = 32;
constexpr int STAGES = 4;
constexpr int SLAB = 64;  // rows of the staging tile, and of one entry of `stats`

constexpr int WARPS_K = BM * BN == 64 * 80 ? 2 : 1;  // groups of warps, each with its own k-blocks
constexpr int WARPS_N = BN >= 64 ? 2 : 1, WARPS_M = 4 / WARPS_N / WARPS_K;
constexpr int WARP_ROWS = BM / WARPS_M, WARP_COLUMNS = BN / WARPS_N;
constexpr int MT = WARP_ROWS / 16, NT = WARP_COLUMNS / 8;
constexpr int OWN = MT / WARPS_K;  // of its MT, those whose sums a warp has at the end
constexpr int PITCH = BN + 8;
constexpr int SMEM_BYTES = STAGES * WARPS_K * (BM + BN) * BK * 2;
constexpr int LOAD_ROWS = BLOCK / 4;  // rows that one round of copies covers: four threads, four chunks to a row
constexpr int A_LOADS = BM / LOAD_ROWS, B_LOADS = (BN + LOAD_ROWS - 1) / LOAD_ROWS;
// Instructions of the main loop's body, which a test counts in the machine code.
constexpr int LOOP_HMMA = MT * NT * (BK / 16), LOOP_LDSM = (MT + (NT + 1) / 2) * (BK / 16);
constexpr int LOOP_LDGSTS = WARPS_K * (A_LOADS + B_LOADS);
static_assert(OWN * WARPS_K * 16 == WARP_ROWS && WARP_COLUMNS % 8 == 0 && BM % SLAB == 0, "whole fragments and slabs");
// Where the groups leave sums for each other, behind the staging tile.
constexpr int EXCHANGE = SLAB * PITCH;
static_assert((EXCHANGE + (WARPS_K - 1) * BM * BN) * 4 <= SMEM_BYTES, "the staging tile and the exchange fit into the ring");

struct Conv2dMma {
    T* y;                // (M,O)
    const T* x;          // segment 0: (B,H,W,C)
    const T* w;          // (O,KH,KW,C): rows of w_row elements, taps of w_tap
    const T* x1;         // segment 1
    const T* w1;         // its weights, rows of w_row1
    const T* x2;         // segment 2
    const T* w2;         // its weights, rows of w_row2
    const T* bias;       // (O) or null
    const T* bias1;      // (O) or null: of a shortcut
    const T* time;       // (time_rows,O) or null
    const int* counter;  // null, or the row of time that serves every image
    const T* residual;   // (M,O) or null
    float* stats;        // (M / SLAB,O,2) or null: mean, sum of squared deviations
    float* partial;      // (splits,tiles,BM·BN) with splits > 1
    unsigned* counters;  // (splits − 1,tiles), zero before and after
    int m, o;            // o: columns of y
    int h, w_, c;        // size of x in memory
    int kh, kw, out_h, out_w;
    int stride, top, left;
    int upsample;        // x counts as doubled by nearest neighbour
    int flat;            // segment 0 has no window: row m reads pixel m
    int w_row, w_tap;
    int c1, w_row1, w_tap1, flat1;
    int c2, w_row2;
    int segments;
    int blocks;          // k-blocks in all
    int part;            // 0, or rows of each of w, w1, w2, which then stand one below the other; a multiple of BN
    int time_rows;       // 1, or one per image; any number with a counter
    int act;
    int glu;             // w and bias have 2·O rows: values, then gates
    int phases;          // w (4,O,2,2,C): x is doubled in four phases; h·w_ is a multiple of BM
};

struct alignas(128) ConvRing {
    T slot[STAGES][WARPS_K][(BM + BN) * BK];
};
static_assert(sizeof(ConvRing) == SMEM_BYTES, "what the launch passes");

// Where chunk `chunk` of a row of a slot stands.
DEV int place(int row, int chunk) { return row * BK + ((chunk ^ (row >> 1 & 3)) << 3); }

// What a thread copies next, and from where.
struct Walk {
    int segment, kh, kw, c;    // the k-block: its first channel, within the segment
    const T* x;                // of the segment
    const T* w;                // first row of this thread, at the tap
    int channels, w_row, w_tap, flat;
    int base[A_LOADS];         // pixels before the row's image
    int corner[A_LOADS];       // row << 16 | column of the window's first tap, each biased by 2^14; or -1 beyond M
    int at[A_LOADS];           // element of x at this tap, or -1 outside
};

// The pixels of this tap.
DEV void tap(Walk& k, const Conv2dMma& p, int m) {
    UNROLL
    for (int i = 0; i < A_LOADS; i++) {
        if (k.flat) {
            k.at[i] = m + i * LOAD_ROWS < p.m ? (m + i * LOAD_ROWS) * k.channels : -1;
        } else {
            const int row = (k.corner[i] >> 16) - 0x4000 + k.kh, column = (k.corner[i] & 0xffff) - 0x4000 + k.kw;
            const bool in = k.corner[i] >= 0 && unsigned(row) < unsigned(p.h << p.upsample) &&
                            unsigned(column) < unsigned(p.w_ << p.upsample);
            const int pixel = k.base[i] + (row >> p.upsample) * p.w_ + (column >> p.upsample);
            k.at[i] = in ? pixel * k.channels : -1;
        }
    }
}

// `which` of the weights: those of the segment, or with parts those that this tile's columns belong to.
DEV void enter(Walk& k, const Conv2dMma& p, int segment, int which, int n) {
    k.segment = segment;
    k.kh = k.kw = k.c = 0;
    k.x = segment == 0 ? p.x : segment == 1 ? p.x1 : p.x2;
    k.channels = segment == 0 ? p.c : segment == 1 ? p.c1 : p.c2;
    k.w_row = segment == 0 ? p.w_row : segment == 1 ? p.w_row1 : p.w_row2;
    k.w_tap = segment == 0 ? p.w_tap : p.w_tap1;
    k.flat = segment == 0 ? p.flat : segment == 1 ? p.flat1 : 1;
    k.w = (which == 0 ? p.w : which == 1 ? p.w1 : p.w2) + n * k.w_row;
}

DEV void next(Walk& k, const Conv2dMma& p, int m, int n) {
    k.c += BK;
    if (k.c < k.channels) return;
    k.c = 0;
    k.w += k.w_tap;
    if (++k.kw == p.kw || k.flat) {
        k.kw = 0;
        if (++k.kh == p.kh || k.flat) enter(k, p, k.segment + 1, k.segment + 1, n);
    }
    if (k.segment < p.segments) tap(k, p, m);
}

// Copies of one k-block into a slot, x first, then w.
DEV void fetch(const Walk& k, T* slot, int step, int rows_left) {
    const int row = thread_x() / 4, chunk = thread_x() % 4, c = k.c + chunk * 8;
    const bool channel = c < k.channels;
    UNROLL
    for (int i = 0; i < A_LOADS; i++) {
        const bool in = channel && k.at[i] >= 0;
        cp_async(slot + place(row + i * LOAD_ROWS, chunk), k.x + (in ? k.at[i] + c : 0), in);
    }
    UNROLL
    for (int i = 0; i < B_LOADS; i++) {
        if (BN % LOAD_ROWS != 0 && row + i * LOAD_ROWS >= BN) break;
        const bool in = channel && i * step < rows_left;
        cp_async(slot + BM * BK + place(row + i * LOAD_ROWS, chunk), in ? k.w + i * step * k.w_row + c : k.x, in);
    }
}

// The products of one slot.
DEV void multiply(float (&acc)[MT][NT][4], const T* slot, int warp_m, int warp_n) {
    const int l = lane();
    UNROLL
    for (int k = 0; k < BK / 16; k++) {
        unsigned a[MT][4], b[NT][2];
        UNROLL
        for (int i = 0; i < MT; i++) ldmatrix(a[i], slot + place(warp_m * WARP_ROWS + i * 16 + l % 16, 2 * k + l / 16));
        UNROLL
        for (int j = 0; j < NT / 2; j++) {
            const int row = warp_n * WARP_COLUMNS + j * 16 + l / 16 * 8 + l % 8;
            unsigned two[4];
            ldmatrix(two, slot + BM * BK + place(row, 2 * k + l / 8 % 2));
            UNROLL
            for (int e = 0; e < 4; e++) b[2 * j + e / 2][e % 2] = two[e];
        }
        if (NT % 2 != 0) {
            const int row = warp_n * WARP_COLUMNS + (NT - 1) * 8 + l % 8;
            ldmatrix(b[NT - 1], slot + BM * BK + place(row, 2 * k + l / 8 % 2));
        }
        UNROLL
        for (int j = 0; j < NT; j++) {
            UNROLL
            for (int i = 0; i < MT; i++) mma<T>(acc[i][j], a[i], b[j]);
        }
    }
}

// The sums of both groups, of the rows that this warp keeps: the other half goes to its partner in the other group.
DEV void exchange(float (&sum)[OWN][NT][4], const float (&acc)[MT][NT][4], float* at) {
    const bool second = warp() >= WARPS_M * WARPS_N;
    float* own = at + (warp() * OWN * NT * WARP + lane()) * 4;
    const float* other = at + ((warp() ^ (WARPS_M * WARPS_N)) * OWN * NT * WARP + lane()) * 4;
    UNROLL
    for (int i = 0; i < OWN * NT; i++) {
        Vec<float, 4> v;
        UNROLL
        for (int e = 0; e < 4; e++) {
            const float low = acc[i / NT][i % NT][e], high = acc[MT - OWN + i / NT][i % NT][e];
            v[e] = second ? low : high;
            sum[i / NT][i % NT][e] = second ? high : low;
        }
        store_shared(own + i * WARP * 4, v);
    }
    sync_block();
    UNROLL
    for (int i = 0; i < OWN * NT; i++) {
        const Vec<float, 4> v = load_shared<4>(other + i * WARP * 4);
        UNROLL
        for (int e = 0; e < 4; e++) sum[i / NT][i % NT][e] += v[e];
    }
}

// Adds up the sums of the splits, pairs of them, then pairs of pairs, and so on. Of two, the one that comes first leaves its
// sums and ends: false. The other adds them to its own; it has all in the end.
DEV bool combine(float (&sum)[OWN][NT][4], const Conv2dMma& p, unsigned* shared) {
    const int tiles = grid_x() * grid_y(), tile = block_y() * grid_x() + block_x(), splits = grid_z();
    constexpr int PART = OWN * NT;
    const long long step = (long long)tiles * BM * BN;
    float* part = p.partial + (long long)tile * BM * BN + thread_x() * 4;
    for (int half = 1; half < splits; half *= 2) {
        // Splits z to z + half - 1 are in this block's sums; those of the other half begin at `other`, if there are any.
        const int z = block_z() / half * half, other = z ^ half;
        if (other >= splits) continue;
        UNROLL
        for (int i = 0; i < PART; i++) {
            Vec<float, 4> v;
            UNROLL
            for (int e = 0; e < 4; e++) v[e] = sum[i / NT][i % NT][e];
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
        for (int i = 0; i < PART; i++) {
            const Vec<float, 4> v = load<4>(part + other * step + i * BLOCK * 4);
            UNROLL
            for (int e = 0; e < 4; e++) sum[i / NT][i % NT][e] += v[e];
        }
        sync_block();  // *shared is read; it and the staging tile may be written
    }
    return true;
}

// What stands in column n of the weights' rows for column n of the tile: with gates, eight of each alternate.
DEV int weight_row(const Conv2dMma& p, int n) { return p.glu ? n / 16 * 8 + n % 8 + (n / 8 % 2) * p.o : n; }

DEV float add_column(const Conv2dMma& p, float v, int row, long long time) {
    if (p.bias) v += to_float(load(p.bias + row));
    if (p.bias1) v += to_float(load(p.bias1 + row));
    if (p.time) v += to_float(load(p.time + time + row));
    return v;
}

// Which of the four this tile belongs to.
DEV int phase(const Conv2dMma& p) { return int(block_x() * BM) / (p.h * p.w_) % 4; }

// The pixel of y that row m is.
DEV long long pixel_of(const Conv2dMma& p, int m) {
    if (!p.phases) return m;
    const int small = p.h * p.w_, image = m / (4 * small), rest = m % small, row = rest / p.w_;
    return ((long long)image * p.out_h + 2 * row + phase(p) / 2) * p.out_w + 2 * (rest - row * p.w_) + phase(p) % 2;
}

// Bias, time, activation and residual of SLAB rows of the staging tile, from row m on.
DEV void finish(const Conv2dMma& p, float* tile, int m0, int n0) {
    const int columns = p.glu ? BN / 2 : BN;
    for (int i = thread_x() * 4; i < SLAB * columns; i += BLOCK * 4) {
        const int r = i / columns, c = i - r * columns, m = m0 + r;
        const int n = (p.glu ? n0 / 2 : n0) + c;
        if (m >= p.m || n >= p.o) continue;
        const long long image = p.counter ? load(p.counter) : p.time_rows > 1 ? m / (p.out_h * p.out_w) : 0;
        float* at = tile + r * PITCH + (p.glu ? c / 8 * 16 + c % 8 : c);
        Vec<float, 4> v = load_shared<4>(at), gate;
        if (p.glu) gate = load_shared<4>(at + 8);
        const long long to = pixel_of(p, m) * p.o + n;
        if (p.o % 4 == 0) {
            Vec<T, 4> y, residual;
            if (p.residual) residual = load<4>(p.residual + to);
            UNROLL
            for (int e = 0; e < 4; e++) {
                float u = add_column(p, v[e], n + e, image * p.o);
                if (p.glu) u *= gelu_f(add_column(p, gate[e], p.o + n + e, 0));
                else u = activate_f(p.act, u);
                if (p.residual) u += to_float(residual[e]);
                y[e] = from_float<T>(u);
                v[e] = to_float(y[e]);
            }
            store(p.y + to, y);
            if (p.stats) store_shared(at, v);
        } else {
            for (int e = 0; e < 4 && n + e < p.o; e++) {
                float u = activate_f(p.act, add_column(p, at[e], n + e, image * p.o));
                if (p.residual) u += to_float(load(p.residual + to + e));
                store(p.y + to + e, from_float<T>(u));
            }
        }
    }
}

// Mean and sum of squared deviations of each column of the slab, as it was stored. Sums are of x − pivot.
DEV void write_stats(const Conv2dMma& p, const float* tile, int m0, int n0) {
    for (int c = thread_x(); c < BN && n0 + c < p.o; c += BLOCK) {
        const float pivot = tile[c];
        float sum = 0.0f, square = 0.0f;
        for (int r = 1; r < SLAB; r++) {
            const float d = tile[r * PITCH + c] - pivot;
            sum += d;
            square = fma_f(d, d, square);
        }
        Vec<float, 2> v;
        v[0] = fma_f(sum, 1.0f / SLAB, pivot);
        v[1] = max_f(fma_f(-sum * (1.0f / SLAB), sum, square), 0.0f);
        store(p.stats + ((long long)(m0 / SLAB) * p.o + n0 + c) * 2, v);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2) conv2d_mma(const __grid_constant__ Conv2dMma p) {
    ConvRing& s = smem_dynamic<ConvRing>();
    const int m0 = block_x() * BM, n0 = block_y() * BN;
    const int group = warp() / (WARPS_M * WARPS_N), warp_m = warp() / WARPS_N % WARPS_M, warp_n = warp() % WARPS_N;
    const int m = m0 + thread_x() / 4, n = n0 + thread_x() / 4;  // first rows that this thread copies
    const int part = p.part ? block_y() * BN / p.part : 0;
    const int row = weight_row(p, n - part * p.part), step = p.glu ? LOAD_ROWS / 2 : LOAD_ROWS;
    // Rows of w from there on: of values, or of gates.
    const int rows_left = p.glu ? p.o - (n / 16 * 8 + n % 8) : (p.part ? p.part : p.o) - row;

    Walk k;
    UNROLL
    for (int i = 0; i < A_LOADS; i++) {
        const int pixel = m + i * LOAD_ROWS;
        k.corner[i] = -1;
        k.base[i] = 0;
        if (p.phases) {
            const int small = p.h * p.w_, rest = pixel % small, y = rest / p.w_;
            k.base[i] = pixel / (4 * small) * small;
            k.corner[i] = (y + phase(p) / 2 - 1 + 0x4000) << 16 | (rest - y * p.w_ + phase(p) % 2 - 1 + 0x4000);
        } else if (!p.flat && pixel < p.m) {
            const int image = pixel / (p.out_h * p.out_w), rest = pixel - image * (p.out_h * p.out_w);
            const int y = rest / p.out_w, x = rest - y * p.out_w;
            k.base[i] = image * p.h * p.w_;
            k.corner[i] = (y * p.stride - p.top + 0x4000) << 16 | (x * p.stride - p.left + 0x4000);
        }
    }
    const int first = int((long long)p.blocks * block_z() / grid_z());
    const int count = int((long long)p.blocks * (block_z() + 1) / grid_z()) - first;
    enter(k, p, 0, part, row);
    if (p.phases) k.w += phase(p) * p.o * k.w_row;
    for (int skip = first;;) {
        // Whole segments, then whole taps, then blocks of channels.
        const int per_tap = ceil_div(k.channels, BK), taps = k.flat ? 1 : p.kh * p.kw;
        if (skip >= per_tap * taps && k.segment + 1 < p.segments) {
            skip -= per_tap * taps;
            enter(k, p, k.segment + 1, k.segment + 1, row);
            continue;
        }
        const int t = skip / per_tap;
        k.kh = k.flat ? 0 : t / p.kw;
        k.kw = t - k.kh * p.kw;
        k.c = (skip - t * per_tap) * BK;
        k.w += t * k.w_tap;
        break;
    }
    tap(k, p, m);

    float acc[MT][NT][4] = {};
    UNROLL
    for (int i = 0; i < STAGES - 1; i++) {
        UNROLL
        for (int j = 0; j < WARPS_K; j++) {
            if (i * WARPS_K + j < count) {
                fetch(k, s.slot[i][j], step, rows_left);
                next(k, p, m, row);
            }
        }
        cp_async_commit();
    }
    int read = 0, write = STAGES - 1;
    for (int i = 0; i < count; i += WARPS_K) {
        cp_async_wait<STAGES - 2>();
        sync_block();
        UNROLL
        for (int j = 0; j < WARPS_K; j++) {
            if (i + (STAGES - 1) * WARPS_K + j < count) {
                fetch(k, s.slot[write][j], step, rows_left);
                next(k, p, m, row);
            }
        }
        cp_async_commit();
        if (WARPS_K == 1 || i + group < count) multiply(acc, s.slot[read][group], warp_m, warp_n);
        read = read + 1 == STAGES ? 0 : read + 1;
        write = write + 1 == STAGES ? 0 : write + 1;
    }
    sync_block();  // everybody is done with the ring, and every copy has landed: the last groups are empty

    float* tile = reinterpret_cast<float*>(&s);
    float sum[OWN][NT][4];
    if (WARPS_K > 1) {
        exchange(sum, acc, tile + EXCHANGE);
    } else {
        UNROLL
        for (int i = 0; i < OWN * NT * 4; i++) sum[i / 4 / NT][i / 4 % NT][i % 4] = acc[i / 4 / NT][i / 4 % NT][i % 4];
    }
    if (grid_z() > 1 && !combine(sum, p, reinterpret_cast<unsigned*>(&s))) return;
    UNROLL
    for (int slab = 0; slab < BM / SLAB; slab++) {
        const int rows = warp_m * WARP_ROWS + group * OWN * 16 - slab * SLAB;  // where this warp's rows stand in the slab
        if (rows >= 0 && rows < SLAB) {
            UNROLL
            for (int i = 0; i < OWN * NT * 2; i++) {
                const int mt = i / 2 / NT, nt = i / 2 % NT;
                Vec<float, 2> v;
                v[0] = sum[mt][nt][i % 2 * 2];
                v[1] = sum[mt][nt][i % 2 * 2 + 1];
                const int r = rows + mt * 16 + i % 2 * 8 + lane() / 4;
                store_shared(tile + r * PITCH + warp_n * WARP_COLUMNS + nt * 8 + lane() % 4 * 2, v);
            }
        }
        sync_block();
        finish(p, tile, m0 + slab * SLAB, n0);
        if (p.stats && m0 + slab * SLAB < p.m) {
            sync_block();
            write_stats(p, tile, m0 + slab * SLAB, n0);
        }
        if (slab + 1 < BM / SLAB) sync_block();
    }
}
