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
// Operands. A k-block of x (BM rows of BK channels) and of w (BN rows) lies in one slot of a ring of STAGES slots in shared
// memory, rows of 128 bytes, a line of the caches, whose 16-byte chunk c stands at c ^ (row % 8): the eight rows that ldmatrix
// reads at once fall into all 32 banks, as does the row that eight threads copy. cp.async writes zeros for pixels outside the
// image, channels beyond the segment, rows beyond M and N. Where the window of each row lies, and which pixel of y it is, is worked
// out once, each row by one thread, and kept in shared memory; the barrier before the first copies makes it visible. The terms of the
// columns, which are for the end, follow when they have come, and any later barrier does for them. Rows beyond M and columns beyond N
// are not stored.
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
// Segments of K, phases, the end, what M, N and O are, and what the caller checks: see conv2d_tile.cuh, which with conv2d_walk.cuh
// holds all but the main loop.
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
constexpr int CHUNKS = BK / 8;
constexpr int LOAD_ROWS = BLOCK / CHUNKS;  // rows that one round of copies covers: eight threads, eight chunks to a row
constexpr int A_LOADS = BM / LOAD_ROWS, B_LOADS = BN / LOAD_ROWS;
constexpr int STEPS = BK / 16, PAIRS = (NT + 1) / 2;  // a pair: two products' columns of a warp; the last may be a single one's
constexpr int SMEM_BYTES = STAGES * (BM + BN) * BK * 2 + BM * 16 + 1024;
// Instructions of the main loop's body, which a test counts in the machine code.
constexpr int LOOP_HMMA = MT * NT * STEPS, LOOP_LDSM = (MT + PAIRS) * STEPS;
constexpr int LOOP_LDGSTS = A_LOADS + B_LOADS;

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
    int upsample;        // 1: x counts as doubled by nearest neighbour; else 0
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

typedef Conv2dMma Conv;
#include "conv2d_tile.cuh"
#include "conv2d_walk.cuh"

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

extern "C" __global__ void __launch_bounds__(BLOCK, 256 / BLOCK) conv2d_mma(const __grid_constant__ Conv2dMma p) {
    griddep_wait();
    ConvShared& s = smem_dynamic<ConvShared>();
    const int m0 = block_x() * BM, n0 = block_y() * BN;
    const int warp_m = warp() / WARPS_N, warp_n = warp() % WARPS_N;
    const Columns columns = columns_of(p, n0);

    place_rows(p, s.rows, m0);
    Terms terms;
    load_terms(terms, p, m0, n0);
    sync_block();

    Walk k;
    int first = 0, count = p.blocks;
    enter(k, p, 0, columns.part, columns.row);
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
                enter(k, p, k.segment + 1, k.segment + 1, columns.row);
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
        for (int third = 0; third < THIRDS; third++) fetch(k, s.ring[i], columns.step, columns.left, i < count, third);
        cp_async_commit();
        if (i < count) next(k, p, s.rows, m0, columns.row);
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
                if (step_k < THIRDS) fetch(k, s.ring[before], columns.step, columns.left, live, step_k);
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
        if (live) next(k, p, s.rows, m0, columns.row);
        slot = after;
    }
    cp_async_wait<0>();
    sync_block();  // everybody is done with the ring, and the last zeros have landed
    finish(acc, p, s, m0, n0);
}
