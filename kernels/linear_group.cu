// y_i = x w_iᵀ + bias_i on tensor cores, for up to MOST matrices w_i that multiply the same x, in one launch: keys and values of a
// prompt for all layers, the embedding of a timestep for all blocks. Each of them by itself has too few tiles for the card, and
// waits for its first operands.
//
// Who owns what. Grid: (ceil(M / BM), tiles of columns of all products). y_i has ceil(O_i / BN) tiles of BN columns; they are counted
// on from product to product, and `end[i]` is their number up to and with those of y_i. A block owns BM rows × BN columns of the y_i
// that block_y falls into. block_x varies fastest, so that blocks which read the same rows of w_i are likely to run at the same time.
// Four warps stand 2×2 over a tile of 64 rows, 1×4 over one of 16; a warp's part is MT×NT tiles of m16n8, held in float in registers.
//
// Operands. A k-block, BK columns of BM rows of x and of BN rows of w_i, lies in one slot of a ring of STAGES slots in dynamic
// shared memory: rows of 128 bytes, whose 16-byte chunk c stands at c ^ (row % 8). The eight rows that ldmatrix reads at once
// fall into all 32 banks, as does the row that eight threads copy. cp.async writes zeros for columns from C on, rows from M on, and
// rows of w_i from O_i on; such a copy touches no memory at its address, which may lie outside.
//
// Order. Each thread commits a group of copies per k-block, STAGES − 1 of them before the first turn; where there is no further
// k-block the groups are empty. A turn waits until its own group has landed. The barrier after that makes everybody's visible, and
// says that everybody has left the slot of the turn before, which is filled at once with the k-block STAGES − 1 after this turn's.
// The products of a turn are STEPS steps of 16 columns, whose fragments are read a step ahead: the first before those copies begin.
//
// End. The sums begin with the bias, which is asked for before the first copies. A thread holds pairs of columns: y is rounded once,
// and stored 4 bytes at a time, of which the four lanes of a row have 16 side by side. Nothing passes through shared memory.
//
// Edges: rows from M on and columns from O_i on are computed from zeros and not stored.
// Wants: M, C > 0; pointers aligned to 16 bytes and, but for the biases, not null; C and each O_i multiples of 8. Behind the last
// product `end` is at least the number of all tiles; the other entries there are not read.
// Occupancy: shared memory (64 KB and 40 KB, and 1 KB for the driver) has room for three blocks of 64 rows on a multiprocessor of
// sm_90, and for five of 16; two and four on sm_80, one and two on sm_86 and sm_89. Registers (96 and 48 of a thread) allow more.
//
// types: f16 bf16
// variants: BM=64 BM=16
#include "dev.cuh"

constexpr int BLOCK = 128;
constexpr int MOST = 32;  // products of a launch
constexpr int BN = 64, BK = 64, STAGES = 4;
constexpr int WARPS_M = BM == 64 ? 2 : 1, WARPS_N = BLOCK / 32 / WARPS_M;
constexpr int WARP_ROWS = BM / WARPS_M, WARP_COLUMNS = BN / WARPS_N;
constexpr int MT = WARP_ROWS / 16, NT = WARP_COLUMNS / 8;
constexpr int CHUNKS = BK / 8;
constexpr int LOAD_ROWS = BLOCK / CHUNKS;  // rows that one round of copies covers: eight threads, eight chunks to a row
constexpr int A_LOADS = BM / LOAD_ROWS, B_LOADS = BN / LOAD_ROWS;
constexpr int STEPS = BK / 16;
constexpr int SMEM_BYTES = STAGES * (BM + BN) * BK * 2;
// Instructions of the main loop's body, which a test counts in the machine code.
constexpr int LOOP_HMMA = MT * NT * STEPS, LOOP_LDSM = (MT + NT / 2) * STEPS, LOOP_LDGSTS = A_LOADS + B_LOADS;

struct LinearGroupFwd {
    const T* x;           // (M,C)
    T* y[MOST];           // (M,O_i)
    const T* w[MOST];     // (O_i,C)
    const T* bias[MOST];  // (O_i) or null
    int o[MOST];          // O_i
    int end[MOST];        // tiles of columns up to and with this product's; behind the last at least as many
    int m, c;
};

struct alignas(128) GroupSmem {
    T ring[STAGES][(BM + BN) * BK];  // rows of x, then of w
};
static_assert(sizeof(GroupSmem) == SMEM_BYTES, "what the launch passes");

// Where chunk `chunk` of a row of a slot stands.
DEV int place(int row, int chunk) { return row * BK + ((chunk ^ (row & 7)) << 3); }

// What a thread copies of every k-block: chunk `chunk` of its rows, where they are there.
struct Copies {
    const T* x;  // its first row
    const T* w;
    int row, chunk;
    bool in_x[A_LOADS], in_w[B_LOADS];
};

// Starts the copy of the k-block that begins at column c.
DEV void fetch(const Copies& own, T* slot, int c, int columns) {
    const bool live = c + own.chunk * 8 < columns;
    UNROLL
    for (int i = 0; i < A_LOADS; i++) {
        const int down = i * LOAD_ROWS;
        cp_async(slot + place(own.row + down, own.chunk), own.x + (long long)down * columns + c, live && own.in_x[i]);
    }
    UNROLL
    for (int i = 0; i < B_LOADS; i++) {
        const int down = i * LOAD_ROWS;
        cp_async(slot + place(BM + own.row + down, own.chunk), own.w + (long long)down * columns + c, live && own.in_w[i]);
    }
}

// The fragments of a warp for one step of 16 columns: of its rows of x, and of its columns of y, 16 of them at a time.
DEV void load_step(unsigned (&a)[MT][4], unsigned (&b)[NT / 2][4], const T* slot, int k, int warp_m, int warp_n) {
    const int l = lane();
    UNROLL
    for (int i = 0; i < MT; i++) ldmatrix(a[i], slot + place(warp_m * WARP_ROWS + i * 16 + l % 16, 2 * k + l / 16));
    UNROLL
    for (int j = 0; j < NT / 2; j++) {
        ldmatrix(b[j], slot + place(BM + warp_n * WARP_COLUMNS + j * 16 + l / 16 * 8 + l % 8, 2 * k + l / 8 % 2));
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) linear_group_fwd(const __grid_constant__ LinearGroupFwd p) {
    griddep_wait();
    GroupSmem& s = smem_dynamic<GroupSmem>();
    const int l = lane(), warp_m = warp() / WARPS_N, warp_n = warp() % WARPS_N;
    // The product of this block's tile: as many end before it.
    int product = 0;
    UNROLL
    for (int half = MOST / 2; half > 0; half /= 2) {
        if (int(block_y()) >= p.end[product + half - 1]) product += half;
    }
    const int m0 = int(block_x()) * BM, n0 = (int(block_y()) - (product > 0 ? p.end[product - 1] : 0)) * BN;
    const int o = p.o[product];
    const T* bias = p.bias[product];

    Copies own;
    own.row = int(thread_x()) / CHUNKS, own.chunk = int(thread_x()) % CHUNKS;
    own.x = p.x + (long long)(m0 + own.row) * p.c + own.chunk * 8;
    own.w = p.w[product] + (long long)(n0 + own.row) * p.c + own.chunk * 8;
    UNROLL
    for (int i = 0; i < A_LOADS; i++) own.in_x[i] = m0 + own.row + i * LOAD_ROWS < p.m;
    UNROLL
    for (int i = 0; i < B_LOADS; i++) own.in_w[i] = n0 + own.row + i * LOAD_ROWS < o;

    const int column = n0 + warp_n * WARP_COLUMNS + l % 4 * 2;  // the lane's first
    Vec<T, 2> first[NT];
    UNROLL
    for (int j = 0; j < NT; j++) {
        first[j] = {from_float<T>(0.0f), from_float<T>(0.0f)};
        if (bias && column + j * 8 < o) first[j] = load<2>(bias + column + j * 8);
    }

    const int turns = ceil_div(p.c, BK);
    UNROLL
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < turns) fetch(own, s.ring[i], i * BK, p.c);
        cp_async_commit();
    }
    float acc[MT][NT][4];
    UNROLL
    for (int i = 0; i < MT * NT * 4; i++) acc[i / 4 / NT][i / 4 % NT][i % 4] = to_float(first[i / 4 % NT][i % 2]);
    ROLLED
    for (int turn = 0; turn < turns; turn++) {
        cp_async_wait<STAGES - 2>();
        sync_block();
        const T* slot = s.ring[turn % STAGES];
        unsigned a[2][MT][4], b[2][NT / 2][4];
        load_step(a[0], b[0], slot, 0, warp_m, warp_n);
        const int ahead = turn + STAGES - 1;
        if (ahead < turns) fetch(own, s.ring[ahead % STAGES], ahead * BK, p.c);
        cp_async_commit();
        UNROLL
        for (int k = 0; k < STEPS; k++) {
            if (k + 1 < STEPS) load_step(a[(k + 1) % 2], b[(k + 1) % 2], slot, k + 1, warp_m, warp_n);
            UNROLL
            for (int j = 0; j < NT; j++) {
                const unsigned columns[2] = {b[k % 2][j / 2][j % 2 * 2], b[k % 2][j / 2][j % 2 * 2 + 1]};
                UNROLL
                for (int i = 0; i < MT; i++) mma<T>(acc[i][j], a[k % 2][i], columns);
            }
        }
    }

    T* y = p.y[product];
    UNROLL
    for (int i = 0; i < MT * 2; i++) {
        const int m = m0 + warp_m * WARP_ROWS + i / 2 * 16 + i % 2 * 8 + l / 4;
        if (m >= p.m) continue;
        UNROLL
        for (int j = 0; j < NT; j++) {
            const float* v = acc[i / 2][j] + i % 2 * 2;
            const Vec<unsigned, 1> word = {pack2<T>(v[0], v[1])};
            T* to = y + (long long)m * o + column + j * 8;
            if (column + j * 8 < o) store(reinterpret_cast<unsigned*>(to), word);
        }
    }
}
