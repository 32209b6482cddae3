// y = conv(x, w) + bias for a 3×3 window over C channels, few of them: the first layers of UNets and autoencoders. The whole
// sum of a pixel, its patch of 9·C numbers, fits into a row of shared memory; y is what costs time.
//
// Grid: (ceil(M / (BM · walk)), ceil(O / BN)). A block holds the weights of BN channels and walks over up to `walk` tiles of
// BM pixels. Four warps stand 2×2 over a tile; a warp's part is 2×4 products of m16n8k16, in float in registers (`acc`).
// Operands: w passes through shared memory once and stays in registers (`wf`, right operands); the bias of the lane's columns
// goes to registers at once. Two threads gather the patch of one pixel, even and odd chunks of 8 numbers, k = (kh·3 + kw)·C + c; the
// next tile's patches are on their way in registers (`next`) while this one is multiplied.
//
// Barriers: one makes w visible. In a turn the first makes the patches visible, the second y as it was rounded, which also says
// that the patches may be overwritten; the first one of the next turn says that of y. With `stats` a third makes the moments of
// 16 rows each visible, which 64 threads merge.
//
// Shared memory: patches and w in rows of CHUNKS chunks of 16 bytes, CHUNKS = 2^A · odd; chunk c of row r lies at chunk
// r · CHUNKS + (c ^ x), x = the A bits of r from bit 3 - A on. So each eight lanes of an access, 128 bytes, meet every bank once,
// whether it takes one chunk of eight rows (ldmatrix, patches) or chunks in order (w). y in rows of 8 chunks, c ^ (r % 8).
//
// Edges: pixels outside the image, rows from M on, channels from O on and k from 9·C on are zeros; what lies beyond M and O
// is not stored.
// `stats`: of each BM rows and each channel the mean of y as it was rounded, and the sum of squared deviations from it.
// Wants: y aligned to 16 bytes, x and w to WIDTH elements; O a multiple of 8, stride 1; with `stats` M a
// multiple of BM; fewer than 2³¹ elements in x and w.
// Occupancy: the BLOCKS that are asked for are what registers allow; shared memory (18 to 34 KB) allows as many on sm_80 and
// sm_90, and on sm_86 and sm_89 five, four, three, two, in the order of the variants.
//
// types: f16 bf16
// variants: C=3 C=4 C=8 C=9
#include "dev.cuh"

constexpr int BLOCK = 128;
constexpr int BM = 64;  // also the rows of one entry of `stats`
constexpr int BN = 64;
constexpr int K = 9 * C;
constexpr int STEPS = (K + 15) / 16;
constexpr int CHUNKS = 2 * STEPS;
constexpr int A = CHUNKS % 8 == 0 ? 3 : CHUNKS % 4 == 0 ? 2 : 1;
constexpr int WIDTH = C % 8 == 0 ? 8 : C % 4 == 0 ? 4 : 1;  // elements of one load of x and w
constexpr int BLOCKS = C > 4 ? 4 : 5;                       // on a multiprocessor
// Instructions of a turn, which a test counts in the machine code.
constexpr int LOOP_HMMA = 2 * 4 * STEPS, LOOP_LDSM = 2 * STEPS;

struct Conv2dEdge {
    T* y;           // (M,O), M = B·OUT_H·OUT_W
    const T* x;     // (B,H,W,C)
    const T* w;     // (O,3,3,C)
    const T* bias;  // (O) or null
    float* stats;   // (M / BM,O,2) or null: mean, sum of squared deviations
    int m, o, h, w_;
    int out_h, out_w;
    int top, left;  // zeros above and left of the image
    int walk;       // tiles of a block
};

struct alignas(128) EdgeSmem {
    T w[BN * CHUNKS * 8];
    T patch[BM * CHUNKS * 8];
    T y[BM * BN];
    float part[4][BN][2];  // moments of 16 rows
};

// Where chunk c of row r begins, in elements. Eight rows on, the same chunk lies as many rows further.
DEV int chunk(int r, int c) {
    constexpr int LOW = (1 << A) - 1;
    return (r * CHUNKS + (c & ~LOW) + ((c ^ (r >> (3 - A))) & LOW)) * 8;
}
DEV int chunk_of_y(int r, int c) { return (r * (BN / 8) + (c ^ (r & 7))) * 8; }

// A pixel of y.
struct Pixel {
    int image, row, column;
};

// The chunks 2i + HALF of its patch.
template <int HALF>
DEV void gather(Vec<T, 8> (&part)[STEPS], const Conv2dEdge& p, Pixel at, bool in) {
    const int row = at.row - p.top, column = at.column - p.left;
    const int corner = ((at.image * p.h + row) * p.w_ + column) * C;
    UNROLL
    for (int i = 0; i < STEPS; i++) {
        UNROLL
        for (int e = 0; e < 8; e += WIDTH) {
            const int k = (2 * i + HALF) * 8 + e, kh = k / C / 3, kw = k / C % 3;
            Vec<T, WIDTH> v = {};
            if (k < K && in && unsigned(row + kh) < unsigned(p.h) && unsigned(column + kw) < unsigned(p.w_)) {
                v = load<WIDTH>(p.x + corner + (kh * p.w_ + kw) * C + k % C);
            }
            UNROLL
            for (int f = 0; f < WIDTH; f++) part[i][e + f] = v[f];
        }
    }
}

// Mean and sum of squared deviations of the tile's columns, as they were stored: of 16 rows by each warp, two columns a lane,
// then of all.
DEV void write_stats(const Conv2dEdge& p, EdgeSmem& s, int tile, int n0) {
    const int l = lane();
    float pivot[2], sum[2] = {}, square[2] = {};
    UNROLL
    for (int i = 0; i < 16; i++) {
        const Vec<T, 2> pair = load_shared<2>(s.y + chunk_of_y(i, l / 4) + warp() * 16 * BN + l % 4 * 2);
        UNROLL
        for (int e = 0; e < 2; e++) {
            if (i == 0) pivot[e] = to_float(pair[e]);
            const float d = to_float(pair[e]) - pivot[e];
            sum[e] += d;
            square[e] = fma_f(d, d, square[e]);
        }
    }
    Vec<float, 4> moments;
    UNROLL
    for (int e = 0; e < 2; e++) {
        moments[2 * e] = fma_f(sum[e], 1.0f / 16, pivot[e]);
        moments[2 * e + 1] = max_f(fma_f(-sum[e] * (1.0f / 16), sum[e], square[e]), 0.0f);
    }
    store_shared(s.part[warp()][2 * l], moments);
    sync_block();
    const int n = thread_x();
    if (n >= BN || n0 + n >= p.o) return;
    float first = 0.0f, d = 0.0f, d2 = 0.0f, m2 = 0.0f;
    UNROLL
    for (int i = 0; i < 4; i++) {
        const Vec<float, 2> v = load_shared<2>(s.part[i][n]);
        if (i == 0) first = v[0];
        d += v[0] - first;
        d2 = fma_f(v[0] - first, v[0] - first, d2);
        m2 += v[1];
    }
    Vec<float, 2> all;
    all[0] = fma_f(d, 0.25f, first);
    all[1] = fma_f(16.0f, max_f(fma_f(-d * 0.25f, d, d2), 0.0f), m2);
    store(p.stats + ((long long)tile * p.o + n0 + n) * 2, all);
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) conv2d_edge(const __grid_constant__ Conv2dEdge p) {
    griddep_wait();
    EdgeSmem& s = smem<EdgeSmem>();
    const int l = lane(), quad = l % 4, warp_m = warp() / 2, warp_n = warp() % 2, n0 = block_y() * BN;
    const int first = block_x() * p.walk * BM, end = first + p.walk * BM < p.m ? first + p.walk * BM : p.m;

    const int r = thread_x() % BM;  // of the pixel that this thread gathers
    Pixel at;
    at.image = (first + r) / (p.out_h * p.out_w);
    at.row = (first + r - at.image * p.out_h * p.out_w) / p.out_w;
    at.column = first + r - (at.image * p.out_h + at.row) * p.out_w;
    Vec<T, 8> next[STEPS];
    if (warp_m == 0) gather<0>(next, p, at, first + r < p.m);
    else gather<1>(next, p, at, first + r < p.m);

    UNROLL
    for (int i = 0; i < BN * CHUNKS / BLOCK; i++) {
        const int row = (i * BLOCK + thread_x()) / CHUNKS, c = (i * BLOCK + thread_x()) % CHUNKS;
        Vec<T, 8> part;
        UNROLL
        for (int e = 0; e < 8; e += WIDTH) {
            Vec<T, WIDTH> v = {};
            if (n0 + row < p.o && c * 8 + e < K) v = load<WIDTH>(p.w + (n0 + row) * K + c * 8 + e);
            UNROLL
            for (int f = 0; f < WIDTH; f++) part[e + f] = v[f];
        }
        store_shared(s.w + chunk(row, c), part);
    }
    float bias[4][2] = {};
    UNROLL
    for (int j = 0; j < 4; j++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
            const int n = n0 + warp_n * 32 + j * 8 + 2 * quad + e;
            if (p.bias && n < p.o) bias[j][e] = to_float(load(p.bias + n));
        }
    }
    sync_block();
    unsigned wf[STEPS][2][4];
    UNROLL
    for (int k = 0; k < STEPS; k++) {
        UNROLL
        for (int j = 0; j < 2; j++) {
            ldmatrix(wf[k][j], s.w + chunk(l / 16 * 8 + l % 8, 2 * k + l / 8 % 2) + (warp_n * 32 + j * 16) * CHUNKS * 8);
        }
    }

    for (int m0 = first; m0 < end; m0 += BM) {
        UNROLL
        for (int i = 0; i < STEPS; i++) store_shared(s.patch + chunk(r, 2 * i + warp_m), next[i]);
        sync_block();
        if (m0 + BM < end) {
            at.column += BM;
            while (at.column >= p.out_w) {
                at.column -= p.out_w;
                if (++at.row == p.out_h) at.row = 0, at.image++;
            }
            if (warp_m == 0) gather<0>(next, p, at, m0 + BM + r < p.m);
            else gather<1>(next, p, at, m0 + BM + r < p.m);
        }

        float acc[2][4][4] = {};
        UNROLL
        for (int k = 0; k < STEPS; k++) {
            unsigned a[2][4];
            UNROLL
            for (int i = 0; i < 2; i++) ldmatrix(a[i], s.patch + chunk(l % 16, 2 * k + l / 16) + (warp_m * 32 + i * 16) * CHUNKS * 8);
            UNROLL
            for (int j = 0; j < 4; j++) {
                const unsigned pair[2] = {wf[k][j / 2][j % 2 * 2], wf[k][j / 2][j % 2 * 2 + 1]};
                UNROLL
                for (int i = 0; i < 2; i++) mma<T>(acc[i][j], a[i], pair);
            }
        }
        UNROLL
        for (int i = 0; i < 2; i++) {
            UNROLL
            for (int j = 0; j < 4; j++) {
                UNROLL
                for (int h = 0; h < 2; h++) {
                    const Vec<unsigned, 1> word = {pack2<T>(acc[i][j][2 * h] + bias[j][0], acc[i][j][2 * h + 1] + bias[j][1])};
                    T* to = s.y + chunk_of_y(l / 4, warp_n * 4 + j) + (warp_m * 32 + i * 16 + h * 8) * BN + 2 * quad;
                    store_shared(reinterpret_cast<unsigned*>(to), word);
                }
            }
        }
        sync_block();
        UNROLL
        for (int i = 0; i < BM * BN / 8 / BLOCK; i++) {
            const int row = (i * BLOCK + thread_x()) / (BN / 8), c = thread_x() % (BN / 8);
            const Vec<T, 8> part = load_shared<8>(s.y + chunk_of_y(thread_x() / (BN / 8), c) + i * BLOCK * 8);
            if (m0 + row < p.m && n0 + c * 8 < p.o) store(p.y + (long long)(m0 + row) * p.o + n0 + c * 8, part);
        }
        if (p.stats) write_stats(p, s, m0 / BM, n0);
    }
}
