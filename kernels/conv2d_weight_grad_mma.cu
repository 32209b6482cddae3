// dw[o,k] = the sum over output pixels m of dy[m,o] · x[m's window, k], k = (kh·KW + kw)·C + c, on tensor cores, in f32: a
// product whose rows are output channels, whose columns are taps and channels of x, and whose sum runs over pixels.
//
// Who owns what. Grid: (ceil(K / BN), ceil(O / BM), splits); a block owns a BM×BN tile of dw for one part of the pixels, which it
// takes in k-blocks of BK. Its four warps stand 2×2; they take turns by 16 channels, of both operands: rows of
// warp (y,x) are those o with o / 16 % 2 = y, columns those with k / 16 % 2 = x. A warp has MT×NT products of m16n8k16, in
// float in registers (128 of a thread for the 128×128 tile, 160 for the other).
//
// Operands. Both lie in memory as pixels by channels: the sum's axis is that of rows. So they do in shared memory, in a ring of
// STAGES slots: of each k-block first dy, BK pixels by BM channels, then x, BK pixels by BN columns. Both in panels of 64 channels, a
// pixel's 128 bytes in a row, chunk c of 8 channels at c ^ (row % 8); where 32 of dy are left over (160 = 2·64 + 32), in a panel with rows
// of 64 bytes, chunk c at c ^ (row / 2 % 4), whose neighbours change places in the upper half (row ^ row / 16). Eight lanes copy a row
// of 128 bytes; of the narrow panel four lanes copy a row of 64 in one step, the other four row r + 16 in the next. (That these two
// lie in different halves of the banks matters only to a count that takes both steps as one access, as the emulator's does.) The 8×8
// matrices of a fragment are eight rows (pixels) of one chunk, in eight different groups of four banks: in the wide panels by the
// exclusive or, in the narrow one by it and the parity of the row.
//
// Fragments. `ldmatrix_trans` gives lane l, of each matrix, rows 2(l % 4) and + 1 of column l / 4: pixels in pairs, as the sum's axis
// of both operands of `mma` wants them. Of dy (left, 16 channels × 16 pixels) word r is channels 8(r % 2) …, pixels 8(r / 2) …: lane l
// names pixel l / 16 · 8 + l % 8 of chunk l / 8 % 2. Of x (right, 16 pixels × 16 columns, for two products) words 2r and + 1 are columns
// 8r …, pixels 0 … and 8 …: lane l names pixel l % 16 of chunk l / 16.
//
// Pixels. A thread copies the pixels thread / 8 and + 16 of a k-block, the same of both operands, and walks over them 16 at a time: the
// row and the column of the window, times the stride, and the pixels of x before its image move on by what the launch says, with
// one carry each. There is no division but at the start, where each thread finds its first pixel, and tap and channel
// of its chunk in each panel of x, which stay. A chunk lies in one tap, a tile may lie in several.
//
// Order. Each thread commits one group of copies per k-block, STAGES − 1 of them before the first. A k-block is two steps of 16
// pixels: fragments of dy are read a step ahead, those of x a pair ahead (16 columns), and 16 pixels of the k-block STAGES − 1 further
// on are asked for at the start of each step. Before its last pair, by when all of this slot is in registers, a thread waits until its
// group of the next slot has landed; the barrier after that makes everybody's visible, and also says that nobody reads this
// slot any more: it is filled from the next k-block on. Pixels from the part's end on are zeros, so the copies beyond the last k-block
// are too; the last wait sees them landed.
//
// End. With one part the tile goes to dw as it is; with more, block z writes the z-th of `splits` partial results, and sum_parts
// (reduce.cu) adds them up in order. Four lanes write 32 bytes in a row.
//
// Edges: pixels from the part's end on, and outside of the image, rows from O on and columns from K on are zeros in shared memory;
// such rows and columns are not stored. A copy that writes zeros touches no memory at its address, which may lie outside.
//
// Occupancy: two blocks, by registers (235 and 237 of a thread on sm_80 and sm_90 in the 128×128 tile, 255, the most that a
// thread can have, in the other, and nothing spills). A block takes 64 or 72 KB of shared memory, of which two fit on sm_80, three on
// sm_90, one on sm_86 and sm_89.
//
// Wants, and the caller checks: pointers aligned to 16 bytes; C and O multiples of 8; fewer than 2³¹ elements in each of x and dy;
// `each` a multiple of BK; splits · each, out_h · stride and out_w · stride, with the window, below 2³⁰. Without a window: x as (1,M,1,C), windows
// of 1×1.
// types: f16 bf16
// variants: BM=128,BN=128 BM=160,BN=128
#include "dev.cuh"

constexpr int BLOCK = 128;
constexpr int BK = 32;
constexpr int STAGES = 4;
constexpr int STRIDE = 16;  // pixels from one that a thread copies to its next
constexpr int STEPS = BK / STRIDE;
constexpr int MT = BM / 32, NT = BN / 16, PAIRS = BN / 32;
constexpr int PANELS = BN / 64;  // of x
constexpr int SMEM_BYTES = STAGES * (BM + BN) * BK * 2;
// Instructions of the main loop's body, which a test counts in the machine code.
constexpr int LOOP_HMMA = MT * NT * STEPS, LOOP_LDSM = (MT + PAIRS) * STEPS;
constexpr int LOOP_LDGSTS = ((BM + 63) / 64 + PANELS) * STEPS;
static_assert(BM % 32 == 0 && BN % 64 == 0 && STEPS == 2 && BLOCK / 8 == STRIDE, "a pixel for each eight threads, twice");

struct Conv2dWeightGradMma {
    float* dw;    // (splits,O,K)
    const T* x;   // (B,H,W,C)
    const T* dy;  // (B,OUT_H,OUT_W,O) = (M,O)
    int m, o, each;  // each: pixels of a part; a part past M writes zeros
    int h, w_, c;    // size of x in memory
    int kh, kw, out_h, out_w;
    int stride, top, left;
    int upsample;    // 1: x counts as doubled by nearest neighbour; else 0
    // STRIDE pixels further: columns, rows (times `stride`) and pixels of x's images, before carries.
    int next_column, next_row, next_image;
};

struct alignas(128) WeightGradRing {
    T slot[STAGES][(BM + BN) * BK];
};
static_assert(sizeof(WeightGradRing) == SMEM_BYTES, "what the launch passes");

// Where chunk `chunk` of a pixel stands in the panel of channels 64 · panel …, and in the narrow one of dy, behind the others.
DEV int wide(int panel, int row, int chunk) { return panel * 64 * BK + row * 64 + ((chunk ^ (row & 7)) << 3); }
DEV int narrow(int row, int chunk) { return BM / 64 * 64 * BK + (row ^ (row >> 4 & 1)) * 32 + ((chunk ^ (row >> 1 & 3)) << 3); }

// A row of the tap that a chunk of columns from K on counts to: outside of every image.
constexpr int NOWHERE = -(1 << 30);

// Tap and channel of a chunk of x's columns, or NOWHERE.
struct Column {
    int row, column, c;
};
DEV Column column_of(const Conv2dWeightGradMma& p, int k) {
    const int window = k / p.c, kh = window / p.kw;
    return {kh < p.kh ? kh - p.top : NOWHERE, window - kh * p.kw - p.left, k - window * p.c};
}

// The pixel that a thread copies next.
struct Walk {
    int left;        // pixels of the part from this one on; none are left below 1
    int row, column;  // of the window's corner, before padding
    unsigned image;  // pixels of x before its image
    const T* dy;     // this thread's first chunk of it
};

DEV void next(Walk& at, const Conv2dWeightGradMma& p) {
    at.left -= STRIDE;
    at.dy += STRIDE * p.o;
    at.column += p.next_column;
    at.row += p.next_row;
    at.image += p.next_image;
    if (at.column >= p.out_w * p.stride) {
        at.column -= p.out_w * p.stride;
        at.row += p.stride;
    }
    if (at.row >= p.out_h * p.stride) {
        at.row -= p.out_h * p.stride;
        at.image += p.h * p.w_;
    }
}

DEV void copy_x(T* to, const Conv2dWeightGradMma& p, const Walk& at, const Column& of) {
    const int row = at.row + of.row, column = at.column + of.column;
    const bool in = at.left > 0 && unsigned(row) < unsigned(p.h << p.upsample) && unsigned(column) < unsigned(p.w_ << p.upsample);
    const unsigned pixel = at.image + unsigned(row >> p.upsample) * p.w_ + unsigned(column >> p.upsample);
    cp_async(to, p.x + (pixel * p.c + of.c), in);
}

// Asks for this thread's pixel of a step, and moves on. Of a narrow panel, eight threads take chunks of two pixels, one in each step.
// `rows`: channels of dy from this thread's first chunk on.
DEV void fetch(Walk& at, T* slot, int step, const Conv2dWeightGradMma& p, const Column (&columns)[PANELS], int rows) {
    const int row = thread_x() / 8 + step * STRIDE, chunk = thread_x() % 8;
    UNROLL
    for (int i = 0; i < BM / 64; i++) {
        cp_async(slot + wide(i, row, chunk), at.dy + i * 64, at.left > 0 && i * 64 < rows);
    }
    if (BM % 64 && chunk / 4 == step) {
        const int further = BM / 64 * 64 - step * 32;
        cp_async(slot + narrow(row, chunk % 4), at.dy + further, at.left > 0 && further < rows);
    }
    slot += BM * BK;
    UNROLL
    for (int i = 0; i < PANELS; i++) copy_x(slot + wide(i, row, chunk), p, at, columns[i]);
    next(at, p);
}

// Fragments of this warp's channels of dy for one step of 16 pixels.
DEV void load_dy(unsigned (&a)[MT][4], const T* slot, int step) {
    const int l = lane(), row = step * 16 + l / 16 * 8 + l % 8, chunk = warp() / 2 * 2 + l / 8 % 2;
    UNROLL
    for (int i = 0; i < MT; i++) {
        const int at = i < BM / 64 * 2 ? wide(i / 2, row, i % 2 * 4 + chunk) : narrow(row, chunk);
        ldmatrix_trans(a[i], slot + at);
    }
}

// Of 16 of its columns of x.
DEV void load_x(unsigned (&b)[4], const T* slot, int step, int j) {
    const int l = lane(), chunk = warp() % 2 * 2 + l / 16;
    ldmatrix_trans(b, slot + BM * BK + wide(j / 2, step * 16 + l % 16, j % 2 * 4 + chunk));
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2) conv2d_weight_grad_mma(const __grid_constant__ Conv2dWeightGradMma p) {
    griddep_wait();
    WeightGradRing& s = smem_dynamic<WeightGradRing>();
    const int thread = thread_x(), k0 = block_x() * BN, o0 = block_y() * BM, chunk = thread % 8;
    const int first = block_z() * p.each, pixels = first + p.each < p.m ? p.each : p.m - first;
    const int count = pixels > 0 ? ceil_div(pixels, BK) : 0;

    Column columns[PANELS];
    UNROLL
    for (int i = 0; i < PANELS; i++) columns[i] = column_of(p, k0 + i * 64 + chunk * 8);
    const int rows = p.o - o0 - chunk * 8, m = first + thread / 8;
    const int image = m / (p.out_h * p.out_w), rest = m - image * (p.out_h * p.out_w), row = rest / p.out_w;
    Walk at = {pixels - thread / 8, row * p.stride, (rest - row * p.out_w) * p.stride, unsigned(image) * p.h * p.w_,
               p.dy + (long long)m * p.o + o0 + chunk * 8};

    ROLLED
    for (int i = 0; i < STAGES - 1; i++) {
        UNROLL
        for (int step = 0; step < STEPS; step++) fetch(at, s.slot[i], step, p, columns, rows);
        cp_async_commit();
    }
    cp_async_wait<STAGES - 2>();
    sync_block();

    float acc[MT][NT][4] = {};
    unsigned a[2][MT][4], b[2][4];
    load_dy(a[0], s.slot[0], 0);
    load_x(b[0], s.slot[0], 0, 0);
    int slot = 0;
    ROLLED
    for (int i = 0; i < count; i++) {
        const int before = slot == 0 ? STAGES - 1 : slot - 1, after = slot + 1 == STAGES ? 0 : slot + 1;
        UNROLL
        for (int t = 0; t < STEPS * PAIRS; t++) {
            const int step = t / PAIRS, j = t % PAIRS, next_t = (t + 1) % (STEPS * PAIRS);
            if (j == 0) {
                if (step + 1 < STEPS) load_dy(a[(step + 1) % 2], s.slot[slot], step + 1);
                fetch(at, s.slot[before], step, p, columns, rows);
                if (step + 1 == STEPS) cp_async_commit();
            }
            if (next_t == 0) {
                cp_async_wait<STAGES - 2>();
                sync_block();
                load_dy(a[0], s.slot[after], 0);
            }
            load_x(b[(t + 1) % 2], s.slot[next_t == 0 ? after : slot], next_t / PAIRS, next_t % PAIRS);
            UNROLL
            for (int e = 0; e < 2; e++) {
                const unsigned own[2] = {b[t % 2][2 * e], b[t % 2][2 * e + 1]};
                UNROLL
                for (int mt = 0; mt < MT; mt++) mma<T>(acc[mt][2 * j + e], a[step % 2][mt], own);
            }
        }
        slot = after;
    }
    cp_async_wait<0>();

    const int l = lane(), k_total = p.kh * p.kw * p.c;
    const int o_own = o0 + warp() / 2 * 16 + l / 4, k_own = k0 + warp() % 2 * 16 + l % 4 * 2;
    float* dw = p.dw + ((long long)block_z() * p.o + o_own) * k_total + k_own;
    UNROLL
    for (int i = 0; i < MT * 2; i++) {
        const int mt = i / 2, o = mt * 32 + i % 2 * 8;
        if (o_own + o >= p.o) break;
        UNROLL
        for (int j = 0; j < NT; j++) {
            const int k = j / 2 * 32 + j % 2 * 8;
            Vec<float, 2> v;
            v[0] = acc[mt][j][i % 2 * 2];
            v[1] = acc[mt][j][i % 2 * 2 + 1];
            if (k_own + k < k_total) store(dw + (long long)o * k_total + k, v);
        }
    }
}
