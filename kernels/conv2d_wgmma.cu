// What conv2d_mma.cu computes, from the same arguments and in the same tiles, by the tensor cores of Hopper: `wgmma` multiplies
// 64 rows of x by all columns of the tile at once, reads both from shared memory by itself, and works while its threads go on.
// On an H200 it takes 30 to 37 % less time than conv2d_mma in tiles of 128×160, 10 to 30 % in those of 64×80; conv2d_tma is faster in the
// former, not in the latter.
//
// Who owns what. Grid: (ceil(M / BM), ceil(N / BN), splits); a block owns a BM×BN tile of y, or with several splits a contiguous
// run of its k-blocks. A block has a warpgroup, four warps, for each 64 rows of the tile: one or two. A warpgroup's sums are one
// chain of products m64nBNk16, held in float in registers, BN / 2 of a thread. Warp w of the block has rows 16w to 16w + 15 and all
// columns, in pieces of 8 as the products of mma.sync have them, so what comes behind the sums is the same code with MT = 1.
//
// Occupancy. A block takes 183, 99, 107, 86, 74, 66, 42 KB of shared memory, in the order of the variants, and the driver 1 KB more
// for each: a multiprocessor of sm_90 (228 KB) has room for 1, 2, 2, 2, 3, 3, 5 blocks, and the ring as many slots as leave that
// room (of the first, five of six). Registers (182, 128, 100, 183, 96, 84, 48 of a thread) leave as many or more; 128 is the most where two blocks of 256
// threads are to fit. No other card has these instructions.
//
// Operands. A k-block of x (BM rows of BK channels) and of w (BN rows) lies in one slot of a ring of STAGES slots in shared
// memory, rows of 128 bytes, whose 16-byte chunk c stands at c ^ (row % 8). That is the swizzle of 128 bytes, which the hardware
// undoes by the bits of the address: so a slot, and in it the first row of each warpgroup and of w, begin at multiples of 1024
// bytes. Both matrices are K-major, eight rows to 1024 bytes; a step of 16 channels is 32 bytes further on. cp.async writes zeros
// for pixels outside the image, channels beyond the segment, rows beyond M and N; in the last round of 128×80, threads beyond the 80
// rows copy nothing. Where the window of each row lies, and which pixel of y it is, is in shared memory too; the barrier before the first
// copies makes it visible. The terms of the columns, which are for the end, follow when they have come, and any later barrier does for
// them. Rows beyond M and columns beyond N are not stored.
//
// Order. Each thread commits one group of copies per k-block, an empty one where none is left, AHEAD of them before the first.
// Turn i begins with a wait until this thread's group of k-block i has landed, and a fence: the products read through the async proxy,
// which what a thread has written does not pass by itself. The barrier after that makes everybody's copies visible to both
// warpgroups. It also says that all threads have seen the products of turn i − 1 − PENDING done, so that their slot, the one of k-block
// i + AHEAD, may be filled. The four products of the turn are issued and committed; while they run, the copies of k-block
// i + AHEAD begin and the walk goes on; then the thread waits until the products of no more than PENDING turns run. A block that
// is alone on its multiprocessor leaves those of one turn running, so that the next ones follow without a gap; where there are
// several, the others fill it, and the slot is better spent on copies. The accumulators start as zeros and nobody touches them
// until the last wait: only the first turn needs the wgmma_fence, and the others have it since the compiler would add one. Behind
// the loop, one barrier: both warpgroups are done with the ring, no copy is on its way, and the ring becomes the staging tile.
//
// Segments of K, phases, the end, what M, N and O are, and what the caller checks: see conv2d_tile.cuh; the walk over k-blocks and
// the copies of one: see conv2d_walk.cuh.
// arch: 90a
// types: f16 bf16
// variants: BM=128,BN=160 BM=128,BN=128 BM=128,BN=80 BM=64,BN=160 BM=64,BN=80 BM=64,BN=64 BM=64,BN=16
#include "dev.cuh"

constexpr int BLOCK = BM * 2;  // a warpgroup to 64 rows
constexpr int BK = 64;
constexpr int SLAB = 64;  // rows of one entry of `stats`

constexpr int STAGES = BM * BN > 128 * 128 ? 5 : BN > 80 ? 3 : 4;
constexpr int WARPS_N = 1, WARP_ROWS = 16, WARP_COLUMNS = BN;
constexpr int MT = 1, NT = BN / 8;
constexpr int CHUNKS = BK / 8;
constexpr int LOAD_ROWS = BLOCK / CHUNKS;  // rows that one round of copies covers: eight threads, eight chunks to a row
constexpr int A_LOADS = BM / LOAD_ROWS, B_LOADS = (BN + LOAD_ROWS - 1) / LOAD_ROWS;
constexpr int STEPS = BK / 16;
constexpr int SMEM_BYTES = STAGES * (BM + BN) * BK * 2 + BM * 16 + 1024;
constexpr int BLOCKS = BM * BN > 128 * 128 ? 1 : BM * BN > 64 * 80 ? 2 : BN > 16 ? 3 : 5;  // beside each other
constexpr int PENDING = BLOCKS == 1 ? 1 : 0;  // turns whose products still run when those of the next are issued
constexpr int AHEAD = STAGES - 1 - PENDING;   // k-blocks whose copies are on their way while one is multiplied
// Instructions of the main loop's body, which a test counts in the machine code.
// WARPGROUP: a fence and a wait; where the compiler cannot keep products in flight, it adds some.
constexpr int LOOP_HGMMA = STEPS, LOOP_WARPGROUP = 2, LOOP_LDGSTS = A_LOADS + B_LOADS, LOOP_LDSM = 0, LOOP_HMMA = 0;

struct Conv2dWgmma {
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

typedef Conv2dWgmma Conv;
#include "conv2d_tile.cuh"
#include "conv2d_walk.cuh"

// Goes to the first k-block of this block's split; how many it has. (conv2d_mma has this in its kernel: as a function it would
// become other machine code there.)
DEV int start(Walk& k, const Conv& p, const Row* rows, int m0, const Columns& columns) {
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
    tap(k, p, rows, m0);
    return count;
}

// The copies of a k-block.
DEV void fetch_all(const Walk& k, T* slot, const Columns& columns) {
    UNROLL
    for (int third = 0; third < THIRDS; third++) fetch(k, slot, columns.step, columns.left, true, third);
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) conv2d_wgmma(const __grid_constant__ Conv2dWgmma p) {
    griddep_wait();
    ConvShared& s = smem_dynamic<ConvShared>();
    const int m0 = block_x() * BM, n0 = block_y() * BN;
    const Columns columns = columns_of(p, n0);

    place_rows(p, s.rows, m0);
    Terms terms;
    load_terms(terms, p, m0, n0);
    sync_block();

    Walk k;
    const int count = start(k, p, s.rows, m0, columns);
    ROLLED
    for (int i = 0; i < AHEAD; i++) {
        if (i < count) {
            fetch_all(k, s.ring[i], columns);
            next(k, p, s.rows, m0, columns.row);
        }
        cp_async_commit();
    }
    keep_terms(terms, s.columns);

    float acc[MT][NT][4] = {};
    const unsigned long long a = wgmma_descriptor(s.ring[0] + warp() / 4 * 64 * BK), b = wgmma_descriptor(s.ring[0] + BM * BK);
    int slot = 0;
    ROLLED
    for (int i = 0; i < count; i++) {
        cp_async_wait<AHEAD - 1>();
        fence_proxy_async();
        sync_block();
        wgmma_fence();
        const int at = slot * ((BM + BN) * BK * 2 / 16);
        UNROLL
        for (int step = 0; step < STEPS; step++) wgmma<T, BN>(acc[0], a + at + 2 * step, b + at + 2 * step);
        wgmma_commit();
        if (i + AHEAD < count) {
            fetch_all(k, s.ring[slot <= PENDING ? slot + AHEAD : slot - 1 - PENDING], columns);
            next(k, p, s.rows, m0, columns.row);
        }
        cp_async_commit();
        wgmma_wait<PENDING>();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    wgmma_wait_all(acc[0]);
    sync_block();
    finish(acc, p, s, m0, n0);
}
