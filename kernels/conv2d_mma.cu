// y = act(conv(x, w) + bias + time) + residual on tensor cores: an implicit matrix product whose rows m are output pixels,
// whose columns n are output channels, and whose sum runs over blocks of BK channels of one tap of one segment of K.
//
// Who owns what. Grid: (ceil(M / BM), ceil(N / BN), splits); a block owns a BM×BN tile of y, or with several splits a contiguous
// run of its k-blocks. A block has four warps, eight for the 128×160 tile. Warps stand WARPS_M×WARPS_N over the tile; a warp's
// part is MT×NT products of m16n8k16, held in float in registers (128 of a thread for the 128×128 tile, 80 for those of 128×160,
// 128×80 and 64×160, fewer for the rest).
//
// Occupancy. A block takes 111, 99, 81, 86, 74, 66, 42 KB of shared memory, in the order of the variants, and the driver 1 KB more
// for each. So a multiprocessor of sm_90 (228 KB) has room for 2, 2, 2, 2, 3, 3, 5 blocks in that order, and registers (192, 254,
// 195, 190, 131, 120, 72 of a thread there) leave one of the first; sm_80 (164 KB) has room for 1, 1, 2, 1, 2, 2, 3, sm_86 and
// sm_89 (100 KB) for none of the first, one of the others, two of the last.
//
// Segments of K. Segment 0 is x with its window of taps; up to two more add products of other inputs into the same sum: the
// second half of a concatenation, or a 1×1 shortcut. A segment without a window (`flat`) reads pixel m for row m. Segment 1
// may have a window where segment 0 has one; it is the same, over an image of the same size. Segment 2 never has one. With `part`
// there is one segment, and the rows of three weights count as one below the other; a tile lies in one of them.
//
// Operands. A k-block of x (BM rows of BK channels) and of w (BN rows) lies in one slot of a ring of STAGES slots in shared
// memory, rows of 128 bytes, a line of the caches, whose 16-byte chunk c stands at c ^ (row % 8): the eight rows that ldmatrix
// reads at once fall into all 32 banks, as does the row that eight threads copy. cp.async writes zeros for pixels outside the
// image, channels beyond the segment, rows beyond M and N. Where the window of each row lies, and which pixel of y it is, is worked
// out once, a row by each thread, and kept in shared memory.
//
// Order. Each thread commits one group of copies per k-block, STAGES − 1 of them before the first. The products of a k-block are
// four steps of 16 channels; fragments of x are read a step ahead, those of w a pair ahead (16 of the warp's columns), and the
// copies of the k-block STAGES − 1 further on begin in three of the steps, between products: address arithmetic, shared memory
// and tensor cores work side by side even where a scheduler has a single warp. Before its last pair, by when all of this slot is
// in registers, a thread waits until its group of the next slot has landed; the barrier after that makes everybody's visible, and
// also says that nobody reads this slot any more: it is filled from the next k-block on. Copies beyond the end write zeros into
// slots whose values nobody multiplies (behind the last k-block the first fragments of one are read and dropped); the last wait
// and barrier see them landed, then the ring becomes the staging tile.
//
// Phases. A 3×3 convolution behind a nearest upsampling comes as four of 2×2 on the small image, one for each parity of the
// rows and columns of y (see `phase_weights.cu`). Rows m then run over images, phases, pixels of the small image; a tile lies
// in one phase, and its rows are scattered only where the residual is read and y is written.
//
// End. With splits, the blocks of a tile add up in pairs, pairs of pairs, and so on: each leaves its float tile in `partial`
// and counts itself where the two meet, in `counters`; the one that comes second adds the other's. The order of the additions
// is the tree's, and a + b is b + a, so the sum does not depend on who comes when, and the counters are back at zero. The last
// block reads log2(splits) tiles rather than all. What is added to a whole column (bias, time of the image that the tile lies
// in) was loaded before the first copies and is added in registers. What needs much code for each element (activations, gates,
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
// Wants, and the caller checks: pointers aligned to 16 bytes; C of every segment, w_row and w_tap multiples of 8 elements;
// at most 2³¹ − 1 elements in each of x and w; out_h and out_w times the stride, and the padding, below 2^14 (a window's
// corner is packed into two halves of a word). `glu`: O a multiple of 8, a warp's columns a multiple of 16 (so BN is not 80), no
// time, activation, residual, statistics, `part`. `stats`: M a multiple of SLAB, O of 4. `part`: one segment, a multiple of BN.
// `phases`: windows of 2×2, a small image whose pixels are a multiple of BM, no `upsample`, `flat`, `glu`, `part` or further
// segment; stride, top and left are not read.
// types: f16 bf16
// variants: BM=128,BN=160 BM=128,BN=128 BM=128,BN=80 BM=64,BN=160 BM=64,BN=80 BM=64,BN=64 BM=64,BN=16
#include "dev.cuh"

constexpr int BLOCK = BM * BN > 128 * 128 ? 256 : 128;
constexpr int BK = 64;
constexpr int SLAB = 64;  // rows of one entry of `stats`

constexpr int STAGES = BM * BN > 64 * 80 ? 3 : 4;
constexpr int WARPS_N = BN >= 64 ? 2 : 1, WARPS_M = BLOCK / 32 / WARPS_N;
constexpr int WARP_ROWS = BM / WARPS_M, WARP_COLUMNS = BN / WARPS_N;
constexpr int MT = WARP_ROWS / 16, NT = WARP_COLUMNS / 8;
constexpr int PITCH = BN + 8;
constexpr int CHUNKS = BK / 8;
constexpr int LOAD_ROWS = BLOCK / CHUNKS;  // rows that one round of copies covers: eight threads, eight chunks to a row
constexpr int A_LOADS = BM / LOAD_ROWS, B_LOADS = BN / LOAD_ROWS;
constexpr int STEPS = BK / 16, PAIRS = (NT + 1) / 2;  // a pair: two products' columns of a warp; the last may be a single one's
constexpr int THIRDS = 3;  // the copies of a k-block are begun in three of its four steps
constexpr int ROUNDS = BM * BN / 8 / BLOCK;  // in which the block moves the tile, 16 bytes to a thread
constexpr int AT_ONCE = ROUNDS % 5 == 0 ? 5 : ROUNDS % 4 == 0 ? 4 : 1;
constexpr int TERMS = (BN + BLOCK - 1) / BLOCK;  // columns of the tile whose terms a thread loads
constexpr int SMEM_BYTES = STAGES * (BM + BN) * BK * 2 + BM * 16 + 1024;
// Instructions of the main loop's body, which a test counts in the machine code.
constexpr int LOOP_HMMA = MT * NT * STEPS, LOOP_LDSM = (MT + PAIRS) * STEPS;
constexpr int LOOP_LDGSTS = A_LOADS + B_LOADS;
static_assert(BM % LOAD_ROWS == 0 && BN % LOAD_ROWS == 0 && BM <= BLOCK && BM % SLAB == 0, "whole rounds and slabs");

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
    int act;  // by the numbers of activate_f
    int glu;             // w and bias have 2·O rows: values, then gates
    int phases;          // w (4,O,2,2,C): x is doubled in four phases; h·w_ is a multiple of BM
};

// A row of the tile.
struct Row {
    int base;    // pixels before its image in x
    int corner;  // row << 16 | column of its window's first tap, each biased by 2^14; or -1 beyond M
    int to;      // its pixel of y
    int unused;
};

struct alignas(128) ConvShared {
    T ring[STAGES][(BM + BN) * BK];
    Row rows[BM];
    float columns[BN];  // what is added to each column
    unsigned met;       // of `combine`
    unsigned unused[255 - BN];
};
static_assert(sizeof(ConvShared) == SMEM_BYTES, "what the launch passes");
static_assert(sizeof(ConvShared::ring) >= BM * BN * 4 && sizeof(ConvShared::ring) >= BM * PITCH * 2, "sums and y fit into the ring");

// Where chunk `chunk` of a row of a slot stands.
DEV int place(int row, int chunk) { return row * BK + ((chunk ^ (row & 7)) << 3); }

// What a thread copies next, and from where.
struct Walk {
    int segment, kh, kw, c;    // the k-block: its first channel, within the segment
    const T* x;                // of the segment
    const T* w;                // first row of this thread, at the tap
    int channels, w_row, w_tap, flat;
    int at[A_LOADS];           // element of x at this tap, or -1 outside
};

// The pixels of this tap.
DEV void tap(Walk& k, const Conv2dMma& p, const Row* rows, int m0) {
    const int first = thread_x() / CHUNKS;
    if (k.flat) {
        UNROLL
        for (int i = 0; i < A_LOADS; i++) {
            const int m = m0 + first + i * LOAD_ROWS;
            k.at[i] = m < p.m ? m * k.channels : -1;
        }
        return;
    }
    const int h = p.h << p.upsample, w = p.w_ << p.upsample;
    UNROLL
    for (int i = 0; i < A_LOADS; i++) {
        const Vec<int, 2> at = load_shared<2>(&rows[first + i * LOAD_ROWS].base);
        const int row = (at[1] >> 16) - 0x4000 + k.kh, column = (at[1] & 0xffff) - 0x4000 + k.kw;
        const bool in = at[1] >= 0 && unsigned(row) < unsigned(h) && unsigned(column) < unsigned(w);
        const int pixel = at[0] + (row >> p.upsample) * p.w_ + (column >> p.upsample);
        k.at[i] = in ? pixel * k.channels : -1;
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

DEV void next(Walk& k, const Conv2dMma& p, const Row* rows, int m0, int n) {
    k.c += BK;
    if (k.c < k.channels) return;
    k.c = 0;
    k.w += k.w_tap;
    if (++k.kw == p.kw || k.flat) {
        k.kw = 0;
        if (++k.kh == p.kh || k.flat) enter(k, p, k.segment + 1, k.segment + 1, n);
    }
    if (k.segment < p.segments) tap(k, p, rows, m0);
}

// A third of the copies of one k-block into a slot, x first, then w; zeros where it is not `live`.
DEV void fetch(const Walk& k, T* slot, int step, int rows_left, bool live, int third) {
    const int row = thread_x() / CHUNKS, chunk = thread_x() % CHUNKS, c = k.c + chunk * 8;
    const bool channel = live && c < k.channels;
    UNROLL
    for (int i = third; i < A_LOADS; i += THIRDS) {
        const bool in = channel && k.at[i] >= 0;
        cp_async(slot + place(row + i * LOAD_ROWS, chunk), k.x + (in ? k.at[i] + c : 0), in);
    }
    UNROLL
    for (int i = third; i < B_LOADS; i += THIRDS) {
        const bool in = channel && i * step < rows_left;
        cp_async(slot + BM * BK + place(row + i * LOAD_ROWS, chunk), in ? k.w + i * step * k.w_row + c : k.x, in);
    }
}

// Fragments of this warp's rows of x for one step of 16 channels.
DEV void load_x(unsigned (&a)[MT][4], const T* slot, int k, int warp_m) {
    const int l = lane();
    UNROLL
    for (int i = 0; i < MT; i++) ldmatrix(a[i], slot + place(warp_m * WARP_ROWS + i * 16 + l % 16, 2 * k + l / 16));
}

// Of 16 of its columns of w, or of the last 8 where NT is odd.
DEV void load_w(unsigned (&b)[4], const T* slot, int j, int k, int warp_n) {
    const int l = lane(), column = warp_n * WARP_COLUMNS + j * 16;
    if (2 * j + 1 < NT) {
        ldmatrix(b, slot + BM * BK + place(column + l / 16 * 8 + l % 8, 2 * k + l / 8 % 2));
    } else {
        unsigned two[2];
        ldmatrix(two, slot + BM * BK + place(column + l % 8, 2 * k + l / 8 % 2));
        b[0] = two[0];
        b[1] = two[1];
    }
}

// Adds up the sums of the splits, pairs of them, then pairs of pairs, and so on. Of two, the one that comes first leaves its
// sums and ends: false. The other adds them to its own; it has all in the end.
DEV bool combine(float (&acc)[MT][NT][4], const Conv2dMma& p, unsigned* met) {
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
DEV int weight_row(const Conv2dMma& p, int n) { return p.glu ? n / 16 * 8 + n % 8 + (n / 8 % 2) * p.o : n; }

// Which of the four phases this tile belongs to.
DEV int phase(const Conv2dMma& p) { return int(block_x() * BM) / (p.h * p.w_) % 4; }

// Whether the rows of a tile belong to images with times of their own.
DEV bool many_times(const Conv2dMma& p) {
    return p.time && !p.counter && p.time_rows > 1 && p.out_h * p.out_w % BM != 0;
}

// Where the window of each row of the tile lies, and where its results go.
DEV void place_rows(const Conv2dMma& p, Row* rows, int m0) {
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

DEV void load_terms(Terms& t, const Conv2dMma& p, int m0, int n0) {
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
DEV void activate(float (&acc)[MT][NT][4], const Conv2dMma& p, float* own, int m, int n) {
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
DEV void fetch_residual(const Conv2dMma& p, T* tile, const Row* rows, int m0, int n0) {
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
DEV void write_rows(const Conv2dMma& p, const T* tile, const Row* rows, int m0, int n0, int width) {
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
DEV void write_stats(const Conv2dMma& p, const T* tile, int m0, int n0) {
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

extern "C" __global__ void __launch_bounds__(BLOCK, 256 / BLOCK) conv2d_mma(const __grid_constant__ Conv2dMma p) {
    griddep_wait();
    ConvShared& s = smem_dynamic<ConvShared>();
    const int m0 = block_x() * BM, n0 = block_y() * BN;
    const int warp_m = warp() / WARPS_N, warp_n = warp() % WARPS_N;
    const int n = n0 + thread_x() / CHUNKS;  // first row of w that this thread copies
    const int part = p.part ? n0 / p.part : 0;
    // Its row in the weights, and how far down the next one is.
    const int row = weight_row(p, n - part * p.part), step = p.glu ? LOAD_ROWS / 2 : LOAD_ROWS;
    // Rows of w from there on: of values, or of gates.
    const int rows_left = p.glu ? p.o - (n / 16 * 8 + n % 8) : (p.part ? p.part : p.o) - row;

    place_rows(p, s.rows, m0);
    Terms terms;
    load_terms(terms, p, m0, n0);
    sync_block();

    Walk k;
    int first = 0, count = p.blocks;
    enter(k, p, 0, part, row);
    if (p.phases) k.w += phase(p) * p.o * k.w_row;
    if (grid_z() > 1) {
        first = p.blocks * int(block_z()) / int(grid_z());
        count = p.blocks * int(block_z() + 1) / int(grid_z()) - first;
        int skip = first;
        ROLLED
        for (;;) {
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
    }
    tap(k, p, s.rows, m0);

    ROLLED
    for (int i = 0; i < STAGES - 1; i++) {
        UNROLL
        for (int third = 0; third < THIRDS; third++) fetch(k, s.ring[i], step, rows_left, i < count, third);
        cp_async_commit();
        if (i < count) next(k, p, s.rows, m0, row);
    }
    keep_terms(terms, s.columns);
    cp_async_wait<STAGES - 2>();
    sync_block();

    float acc[MT][NT][4] = {};
    unsigned a[2][MT][4], b[2][4];
    load_x(a[0], s.ring[0], 0, warp_m);
    load_w(b[0], s.ring[0], 0, 0, warp_n);
    int slot = 0;
    ROLLED
    for (int i = 0; i < count; i++) {
        const int before = slot == 0 ? STAGES - 1 : slot - 1, after = slot + 1 == STAGES ? 0 : slot + 1;
        const bool live = i + STAGES - 1 < count;
        UNROLL
        for (int t = 0; t < STEPS * PAIRS; t++) {
            const int step_k = t / PAIRS, j = t % PAIRS, next_t = (t + 1) % (STEPS * PAIRS);
            if (j == 0) {
                if (step_k + 1 < STEPS) load_x(a[(step_k + 1) % 2], s.ring[slot], step_k + 1, warp_m);
                if (step_k < THIRDS) fetch(k, s.ring[before], step, rows_left, live, step_k);
                if (step_k == THIRDS - 1) cp_async_commit();
            }
            if (next_t == 0) {
                cp_async_wait<STAGES - 2>();
                sync_block();
                load_x(a[0], s.ring[after], 0, warp_m);
            }
            load_w(b[(t + 1) % 2], next_t == 0 ? s.ring[after] : s.ring[slot], next_t % PAIRS, next_t / PAIRS, warp_n);
            UNROLL
            for (int e = 0; e < 2 && 2 * j + e < NT; e++) {
                const unsigned own[2] = {b[t % 2][2 * e], b[t % 2][2 * e + 1]};
                UNROLL
                for (int mt = 0; mt < MT; mt++) mma<T>(acc[mt][2 * j + e], a[step_k % 2][mt], own);
            }
        }
        if (live) next(k, p, s.rows, m0, row);
        slot = after;
    }
    cp_async_wait<0>();
    sync_block();  // everybody is done with the ring, and the last zeros have landed

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
