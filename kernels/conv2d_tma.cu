// What conv2d_wgmma.cu computes, in the same tiles and with the same products, its operands copied by Hopper's memory accelerator
// (TMA): one thread asks for a box of x and a box of w for each k-block, and the copies count themselves in. No other thread works
// out an address, and neither a barrier of the block nor a fence between proxies stands in the loop. On an H200 a 3×3 convolution over
// 64×64 of 960 channels runs at 650 TFLOP/s in tiles of 128×160; small tiles are slower than with conv2d_wgmma's copies, by what comes
// before the first box (1 to 2 µs).
//
// Who owns what. Grid: (ceil(M / BM), ceil(N / BN), splits); a block owns a BM×BN tile of y, or with several splits a contiguous
// run of its k-blocks. A block has a warpgroup, four warps, for each 64 rows of the tile: one or two. A warpgroup's sums are one
// chain of products m64nBNk16, held in float in registers, BN / 2 of a thread. Warp w of the block has rows 16w to 16w + 15 and all
// columns, in pieces of 8 as the products of mma.sync have them, so what comes behind the sums is the same code with MT = 1.
// Thread 0 also walks over the k-blocks and asks for their copies; there is no warp for that alone.
//
// Occupancy. A block takes 183, 99, 107, 86, 74, 66, 42 KB of shared memory, in the order of the variants, and the driver 1 KB more
// for each: a multiprocessor of sm_90 (228 KB) has room for 1, 2, 2, 2, 3, 3, 5 blocks, and the ring as many slots as leave that
// room (of the first, five of six). Registers (182, 128, 96, 183, 96, 80, 46 of a thread) leave as many or more; 128 is the most where two blocks of 256
// threads are to fit. No other card has these instructions.
//
// Operands. A k-block of x (BM rows of BK channels) and of w (BN rows) lies in one slot of a ring of STAGES slots in shared
// memory, rows of 128 bytes, whose 16-byte chunk c stands at c ^ (row % 8): the swizzle of 128 bytes, in which the copies write and
// the products read, both by the bits of the address. So a slot, and in it the first row of each warpgroup and of w, begin at
// multiples of 1024 bytes. Both matrices are K-major, eight rows to 1024 bytes; a step of 16 channels is 32 bytes further on.
//
// Maps. Axes from the innermost; a box is a k-block of the tile. Of x with a window: {C, W, H, images}, the tile a rectangle of
// pixels: of a part of a row, of whole rows of an image, or of whole images; a tap is added to the coordinates. Of x without one:
// {C, M}, BM rows. Of w: {C, taps, O, phases}, BN rows of one tap; with `glu` {C, 8, 2, O / 8}: eight values, then their eight gates,
// so the third axis has shorter steps than the second. The hardware writes zeros for what lies outside a map: pixels outside the
// image, on all sides, channels beyond the segment, rows of x beyond M, rows of w beyond O.
//
// Order. A slot has two barriers that count: full[] is over when both its copies have landed, empty[] when every warp has arrived.
// Thread 0 initialises them, fences them for the copies (the barrier of the block further on is for the other threads), and asks for
// the first STAGES k-blocks before the terms of the columns are loaded. Turn i begins with everybody's wait for full[slot]. What has
// landed there came by the proxy that the products read through, so no proxy is fenced. Lanes return from the wait one by one, and
// sync_warp brings them together for the products. The four of the turn are issued and committed; then a warp waits until the
// products of no more than PENDING turns run, and, where a k-block is left for it, arrives at empty[] of the slot of turn i − PENDING, whose
// products it has seen done.
// When all warps have, thread 0 asks for k-block i − PENDING + STAGES in that slot. A block that is alone on its multiprocessor leaves
// the products of one turn running, so that the next ones follow without a gap; where there are several, the others fill it. A
// phase has the parity of how often its slot has been filled before. The accumulators start as zeros and nobody touches them until the
// last wait: only the first turn needs the wgmma_fence, and the others have it since the compiler would add one. Behind the loop every
// copy has landed; one barrier: both warpgroups are done with the ring, and it becomes the staging tile.
//
// Beside the ring lie, for the end, where each row's window and pixel of y are, and the terms of the columns. The barrier before the loop
// makes both visible; thread 0 reads row 0 before, which it has written itself. Rows beyond M and columns beyond N are not stored.
//
// Segments of K, phases, the end, and what M, N and O are: see conv2d_tile.cuh. Wants, and the caller checks: what stands there, and
// maps as above; so a segment with a window has stride 1, no `upsample` without phases, and tiles that are rectangles.
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
constexpr int STEPS = BK / 16;
constexpr int SLOT_BYTES = (BM + BN) * BK * 2;
constexpr int SMEM_BYTES = STAGES * SLOT_BYTES + BM * 16 + 1024;
constexpr int BLOCKS = BM * BN > 128 * 128 ? 1 : BM * BN > 64 * 80 ? 2 : BN > 16 ? 3 : 5;  // beside each other
constexpr int PENDING = BLOCKS == 1 ? 1 : 0;  // turns whose products still run when those of the next are issued
// Instructions of the main loop's body, which a test counts in the machine code.
// WARPGROUP: a fence and a wait; where the compiler cannot keep products in flight, it adds some. UTMALDG: the two copies. SYNCS: two
// waits, an arrival, and what is expected.
constexpr int LOOP_HGMMA = STEPS, LOOP_WARPGROUP = 2, LOOP_UTMALDG = 2, LOOP_SYNCS = 4;
constexpr int LOOP_LDGSTS = 0, LOOP_MEMBAR = 0, LOOP_FENCE = 0, LOOP_BAR = 0, LOOP_HMMA = 0;

struct Conv2dTma {
    TensorMap xs, xs1, xs2;  // of x, of each segment
    TensorMap ws, ws1, ws2;  // of w, of each segment or part
    T* y;                // (M,O)
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
    int flat;            // segment 0 has no window: row m reads pixel m
    int c1, flat1;
    int c2;
    int segments;
    int blocks;          // k-blocks in all
    int part;            // 0, or rows of each of w, w1, w2, which then stand one below the other; a multiple of BN
    int time_rows;       // 1, or one per image; any number with a counter
    int act;  // by the numbers of activate_f
    int glu;             // w and bias have 2·O rows: values, then gates
    int phases;          // w (4,O,2,2,C): x is doubled in four phases; h·w_ is a multiple of BM
};

typedef Conv2dTma Conv;
#include "conv2d_tile.cuh"
static_assert(sizeof(ConvShared::barriers) >= 2 * STAGES * sizeof(Mbarrier), "a slot is full, or empty");

// What thread 0 asks for next: a k-block, by its segment, tap and first channel.
struct Boxes {
    int segment, kh, kw, tap, c;
    int channels, flat;          // of the segment
    int column, row, image;      // of the tile's first pixel, at the first tap
    int part, w_row, w_last;     // which of three weights, and coordinates on the outer axes
};

DEV void enter(Boxes& b, const Conv& p, int segment) {
    b.segment = segment;
    b.kh = b.kw = b.tap = b.c = 0;
    b.channels = segment == 0 ? p.c : segment == 1 ? p.c1 : p.c2;
    b.flat = segment == 0 ? p.flat : segment == 1 ? p.flat1 : 1;
}

// Goes to k-block `skip` of this tile.
DEV void start(Boxes& b, const Conv& p, const Row& first, int n0, int skip) {
    b.column = (first.corner & 0xffff) - 0x4000;
    b.row = (first.corner >> 16) - 0x4000;
    b.image = p.flat ? 0 : first.base / (p.h * p.w_);
    b.part = p.part ? n0 / p.part : 0;
    b.w_row = p.glu ? 0 : n0 - b.part * p.part;
    b.w_last = p.glu ? n0 / 16 : p.phases ? phase(p) : 0;
    enter(b, p, 0);
    ROLLED
    while (skip > 0) {
        // Whole segments, then whole taps, then blocks of channels.
        const int per_tap = ceil_div(b.channels, BK), taps = b.flat ? 1 : p.kh * p.kw;
        if (skip >= per_tap * taps && b.segment + 1 < p.segments) {
            skip -= per_tap * taps;
            enter(b, p, b.segment + 1);
            continue;
        }
        b.tap = skip / per_tap;
        b.kh = b.flat ? 0 : b.tap / p.kw;
        b.kw = b.tap - b.kh * p.kw;
        b.c = (skip - b.tap * per_tap) * BK;
        break;
    }
}

DEV void next(Boxes& b, const Conv& p) {
    b.c += BK;
    if (b.c < b.channels) return;
    b.c = 0;
    b.tap++;
    if (++b.kw == p.kw || b.flat) {
        b.kw = 0;
        if (++b.kh == p.kh || b.flat) enter(b, p, b.segment + 1);
    }
}

// Asks for the copies of a k-block.
DEV void fetch(const Boxes& b, const Conv& p, T* slot, Mbarrier& full, int m0) {
    const TensorMap& x = b.segment == 0 ? p.xs : b.segment == 1 ? p.xs1 : p.xs2;
    const int which = p.part ? b.part : b.segment;
    const TensorMap& w = which == 0 ? p.ws : which == 1 ? p.ws1 : p.ws2;
    mbarrier_expect(full, SLOT_BYTES);
    tma_load(slot, x, b.c, b.flat ? m0 : b.column + b.kw, b.flat ? 0 : b.row + b.kh, b.flat ? 0 : b.image, full);
    tma_load(slot + BM * BK, w, b.c, b.tap, b.w_row, b.w_last, full);
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) conv2d_tma(const __grid_constant__ Conv2dTma p) {
    griddep_wait();
    ConvShared& s = smem_dynamic<ConvShared>();
    Mbarrier *full = s.barriers, *empty = s.barriers + STAGES;
    const int m0 = block_x() * BM, n0 = block_y() * BN;
    const int first = p.blocks * int(block_z()) / int(grid_z());
    const int count = p.blocks * int(block_z() + 1) / int(grid_z()) - first;

    place_rows(p, s.rows, m0);
    Boxes boxes;
    if (thread_x() == 0) {
        UNROLL
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(full[i], 1);
            mbarrier_init(empty[i], BLOCK / WARP);
        }
        fence_mbarriers();
        start(boxes, p, s.rows[0], n0, first);
        ROLLED
        for (int i = 0; i < STAGES && i < count; i++) {
            fetch(boxes, p, s.ring[i], full[i], m0);
            next(boxes, p);
        }
    }
    Terms terms;
    load_terms(terms, p, m0, n0);
    keep_terms(terms, s.columns);
    sync_block();

    float acc[MT][NT][4] = {};
    const unsigned long long a = wgmma_descriptor(s.ring[0] + warp() / 4 * 64 * BK), b = wgmma_descriptor(s.ring[0] + BM * BK);
    int slot = 0, parity = 0;
    ROLLED
    for (int i = 0; i < count; i++) {
        mbarrier_wait(full[slot], parity);
        sync_warp();
        wgmma_fence();
        const int at = slot * (SLOT_BYTES / 16);
        UNROLL
        for (int step = 0; step < STEPS; step++) wgmma<T, BN>(acc[0], a + at + 2 * step, b + at + 2 * step);
        wgmma_commit();
        wgmma_wait<PENDING>();
        if (i >= PENDING && i - PENDING + STAGES < count) {
            const int done = PENDING == 0 ? slot : slot == 0 ? STAGES - 1 : slot - 1;
            if (lane() == 0) mbarrier_arrive(empty[done]);
            if (thread_x() == 0) {
                mbarrier_wait(empty[done], done > slot ? 1 - parity : parity);
                fetch(boxes, p, s.ring[done], full[done], m0);
                next(boxes, p);
            }
        }
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        parity ^= slot == 0;
    }
    wgmma_wait_all(acc[0]);
    sync_block();
    finish(acc, p, s, m0, n0);
}
