// The gradients of attention by k and v on tensor cores, behind attention_grad_q_mma, which has left of each query the logarithm to
// base 2 of its sum of exponentials and -delta (delta = sum dy · y). With p = softmax(scale · q kᵀ) and ds = p · (dy vᵀ - delta):
// dk = scale · dsᵀ q, dv = pᵀ dy (Dao et al. 2022, algorithm 4).
//
// Grid: (ceil(S / BN), N, B). A block owns BN keys of one head, each of its four warps BN / 4 of them, in tiles of 16, and walks
// over the queries, BM in a turn, of which it takes QUERIES at a time: it makes their scores again, transposed (k qᵀ, rows are
// keys), and v dyᵀ, and from both pᵀ and dsᵀ and their products with dy and q. No block adds to what another one has, and queries
// come in their order: a result has the same bits whenever it is computed.
//
// Operands of a warp: its rows of k and v are left operands, read once into registers (`whole`, and `half`, their last 8 columns where
// D is an odd multiple of 8: a product of half the depth), or, where the sums leave no room for them (D > 128), read again from shared
// memory for each QUERIES. Scores (`sc`), v dyᵀ - delta (`ds`, which starts at -delta), dk and dv are f32 accumulators in registers;
// p and ds become 16 bits in registers, where the accumulator's layout is that of a left operand: each is rounded by itself, so that
// a sum of them loses about what rounding the result loses. q and dy are read from shared memory twice: as right operands by columns
// of their rows for the scores, and, transposed as they are read, for dk and dv.
//
// Shared memory: k and v, a ring of two stages of q, dy and the two floats of each of their queries. Rows of PITCH chunks of 16 bytes,
// PITCH = 2^A · odd (D = 128: PITCH is 16 and A is 3; what
// follows holds too); chunk c of row r lies at chunk r · PITCH + (c ^ x), where only the low A bits of c are changed, and x is
// the A bits of r from bit 3 - A on. Without conflicts, since each pass, eight lanes of 16 bytes, touches each of the 8 chunk columns
// (mod 8) once:
//   ldmatrix reads chunk c of rows 8i … 8i+7. Rows with different x differ in the low A bits of c ^ x, to which r · PITCH,
//   a multiple of 2^A, adds nothing; the 2^(3-A) consecutive rows of one x differ in odd · r mod 2^(3-A).
//   cp_async and the rows of dk and dv move 8 chunks from a multiple of 8 on in the order of r · PITCH + c; the exclusive or
//   permutes them within aligned groups of 2^A. The words of dk and dv are written as ldmatrix reads.
// The floats of two queries are one chunk of 16 bytes; eight lanes of different keys read the same one.
//
// Waits: before the first turn wait<1> and a barrier make k and v visible, and leave the first q and dy on their way. Each turn
// waits for its stage, which was asked for a turn before, and passes the turn's only barrier: behind it everybody's copies of
// this stage are visible, and everybody has left the other stage, which is filled again at once. dk and dv go out by the
// places of k and v, each warp's rows by themselves, which no other warp reads: a barrier of the warp stands between its writes and
// reads.
//
// Edges: rows from S on (T for q and dy) and columns from d on are zeros in shared memory. Of queries from T on `stats` says +inf and
// 0, so that p and ds are 0; keys from S on get what they get, and are not stored, nor are columns from d on. With `causal` the
// walk begins with the turn of the first query that sees the block's first key, and p and ds of keys that a query does not see are
// 0, set in those turns alone that have such keys; a NaN or an inf in q or dy of a query of these turns reaches all keys of the
// block, as 0 · inf. A NaN or an inf in k or v of a key reaches dk and dv of no other key, but through `stats`. A copy that writes
// zeros touches no memory at its address, which may lie outside.
// Wants: pointers aligned to 16 bytes and not null, d <= D and a multiple of 8, scale > 0; S > 0, and with `causal` S >= T; `stats` of
// as many rows as whole turns of queries have, written by attention_grad_q_mma, whose BM is a multiple of this BM.
// p and ds are rounded to 16 bits before their products with dy and q; in f16 what is below 6e-8 of them is lost, and ds beyond 65504
// is infinite, which the loss scale of training notices.
// Occupancy: the BLOCKS that are asked for are what registers allow (at most 168 and 255 of a thread; 130 to 168 and 222 to 255
// are used, nothing is spilled); shared memory (25 to 81 KB) allows as many on sm_80 and sm_90. On sm_86 and sm_89 it allows two
// blocks where D is 40 or 64, and one where it is larger. The loop over the queries of a turn is rolled: unrolled, the compiler
// reads operands of the next queries early, and spills.
//
// types: f16 bf16
// variants: BN=64,D=32 BN=64,D=40 BN=128,D=40 BN=64,D=64 BN=64,D=80 BN=64,D=128 BN=64,D=160
#include "dev.cuh"

constexpr int WARPS = 4;
constexpr int BLOCK = 128;
constexpr int BM = D <= 80 ? 64 : 32;                   // queries in a turn
constexpr int TILES = BN / (16 * WARPS);                // tiles of 16 keys in a warp
constexpr int QUERIES = TILES > 1 || D > 40 ? 16 : 32;  // queries whose scores stand in registers
constexpr int STEPS = D / 16;                           // steps of 16 columns of k qᵀ and v dyᵀ
constexpr int HALF = D % 16 / 8;                        // and of 8
constexpr int PITCH = 2 * (STEPS + HALF);               // chunks in a row
constexpr int A = PITCH % 8 == 0 ? 3 : PITCH % 4 == 0 ? 2 : 1;
constexpr int KEPT = D <= 128 ? STEPS : 0;              // steps of k and v in registers
constexpr int BLOCKS = D <= 64 && BN == 64 ? 3 : 2;    // on a multiprocessor
constexpr int SMEM_BYTES = (2 * BN + 4 * BM) * PITCH * 16 + 2 * BM * 8;
// Instructions of an inner turn, which a test counts in the machine code.
constexpr int LOOP_HMMA = TILES * QUERIES / 16 * (4 * (STEPS + HALF) + 2 * (D / 8));
constexpr int LOOP_LDSM = QUERIES / 16 * (4 * STEPS + 2 * HALF) + 2 * TILES * (STEPS - KEPT);
constexpr int LOOP_LDGSTS = 0;

struct AttentionGradKvMma {
    T* dk;               // (B,S,N·d)
    T* dv;               // (B,S,N·d)
    const float* stats;  // (B,N,rows,2), of attention_grad_q_mma
    const T* q;          // (B,T,N·d)
    const T* k;          // (B,S,N·d)
    const T* v;          // (B,S,N·d)
    const T* dy;         // (B,T,N·d)
    int t, s, heads, d;  // d <= D, a multiple of 8
    int rows;            // T rounded up to a multiple of BM, or more
    float scale;         // of the scores
    float exponent;      // the same times log2 e
    int causal;          // query i sees keys up to i + S − T
};

struct alignas(128) GradKvSmem {
    T k[BN * PITCH * 8];
    T v[BN * PITCH * 8];
    T ring[2][2][BM * PITCH * 8];  // stage; q, dy
    float stats[2][BM * 2];
};
static_assert(sizeof(GradKvSmem) == SMEM_BYTES, "what the launch asks for");
static_assert(BN * PITCH % BLOCK == 0 && BM * PITCH % BLOCK == 0 && BM / 2 <= BLOCK, "every thread copies alike");

#include "attention_tile.cuh"

// copy_tile; where registers are scarce, nothing of the addresses is kept from turn to turn.
template <int ROWS>
DEV void copy_rows(T* tile, const T* from, int rows, int ld, int d) {
    if (D > 128) {
        ROLLED
        for (int at = thread_x(); at < ROWS * PITCH; at += BLOCK) copy_chunk(tile, from, at, rows, ld, d);
    } else {
        copy_tile<ROWS>(tile, from, rows, ld, d);
    }
}

// The left operand of a warp's 16 · TILES rows: the first KEPT steps in registers, the others in `tile`, whose first row is the
// warp's.
struct Left {
    unsigned whole[TILES][KEPT > 0 ? KEPT : 1][4], half[TILES][2];
    const T* tile;
};
DEV void load_left(Left& to, const T* tile) {
    const int l = lane();
    to.tile = tile;
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int j = 0; j < KEPT; j++) ldmatrix(to.whole[i][j], tile + chunk(16 * i + l % 16, 2 * j + l / 16));
        if (HALF) ldmatrix(to.half[i], tile + chunk(16 * i + l % 16, 2 * STEPS));
    }
}

// A lane's sums for 16 · TILES keys: of QUERIES queries, and of all columns.
typedef float Scores[TILES][QUERIES / 8][4];
typedef float Sums[TILES][D / 8][4];

// sum += left · QUERIES rows of `tile`, transposed, without the last 8 columns where D is an odd multiple of 8.
DEV void multiply(Scores& sum, const Left& left, const T* tile) {
    const int l = lane();
    UNROLL
    for (int j = 0; j < STEPS; j++) {
        unsigned a[TILES][4];
        UNROLL
        for (int i = 0; i < TILES; i++) {
            if (j >= KEPT) {
                ldmatrix(a[i], left.tile + chunk(16 * i + l % 16, 2 * j + l / 16));
            } else {
                UNROLL
                for (int w = 0; w < 4; w++) a[i][w] = left.whole[i][j < KEPT ? j : 0][w];
            }
        }
        UNROLL
        for (int n = 0; n < QUERIES / 16; n++) {
            // 16 rows × 16 columns: words 0, 1 are rows 0 to 7, words 2, 3 rows 8 to 15.
            unsigned f[4];
            ldmatrix(f, tile + chunk(16 * n + l % 8 + l / 16 * 8, 2 * j + l / 8 % 2));
            const unsigned low[2] = {f[0], f[1]}, high[2] = {f[2], f[3]};
            UNROLL
            for (int i = 0; i < TILES; i++) {
                mma<T>(sum[i][2 * n], a[i], low);
                mma<T>(sum[i][2 * n + 1], a[i], high);
            }
        }
    }
}

// sum += left (16 · TILES keys × QUERIES queries) · QUERIES rows of `tile`, without the last 8 columns where D is an odd multiple of 8.
DEV void accumulate(Sums& sum, const unsigned (&left)[TILES][QUERIES / 16][4], const T* tile) {
    const int l = lane();
    UNROLL
    for (int n = 0; n < STEPS; n++) {
        UNROLL
        for (int j = 0; j < QUERIES / 16; j++) {
            // 16 rows × 16 columns: words 0, 1 are columns 0 to 7, words 2, 3 columns 8 to 15.
            unsigned f[4];
            ldmatrix_trans(f, tile + chunk(16 * j + l % 16, 2 * n + l / 16));
            const unsigned low[2] = {f[0], f[1]}, high[2] = {f[2], f[3]};
            UNROLL
            for (int i = 0; i < TILES; i++) {
                mma<T>(sum[i][2 * n], left[i][j], low);
                mma<T>(sum[i][2 * n + 1], left[i][j], high);
            }
        }
    }
}

// The sums of a turn's BM queries. With HIDE, query `first` + i sees the lane's first key where i >= 0, its next ones the more
// queries later.
template <bool HIDE>
DEV void add_products(Sums& dk, Sums& dv, const Left& k, const Left& v, const T* qt, const T* yt, const float* stats, float exponent,
                      int first) {
    const int l = lane(), quad = l % 4;
    ROLLED
    for (int at = 0; at < BM; at += QUERIES, qt += QUERIES * PITCH * 8, yt += QUERIES * PITCH * 8, stats += QUERIES * 2) {
        Scores sc, ds;
        float lse[QUERIES / 8][2];
        UNROLL
        for (int n = 0; n < QUERIES / 8; n++) {
            const Vec<float, 4> pair = load_shared<4>(stats + 2 * (8 * n + 2 * quad));
            UNROLL
            for (int e = 0; e < 4; e++) {
                lse[n][e % 2] = pair[e % 2 * 2];
                UNROLL
                for (int i = 0; i < TILES; i++) sc[i][n][e] = 0.0f, ds[i][n][e] = pair[e % 2 * 2 + 1];
            }
        }
        multiply(sc, k, qt);
        multiply(ds, v, yt);
        if (HALF) {
            UNROLL
            for (int n = 0; n < QUERIES / 16; n++) {
                // 16 queries × 8 columns: words 0, 1 of q, 2, 3 of dy.
                unsigned f[4];
                ldmatrix(f, (l < 16 ? qt : yt) + chunk(16 * n + l % 16, 2 * STEPS));
                UNROLL
                for (int e = 0; e < 2; e++) {
                    UNROLL
                    for (int i = 0; i < TILES; i++) {
                        mma<T>(sc[i][2 * n + e], k.half[i], f[e]);
                        mma<T>(ds[i][2 * n + e], v.half[i], f[2 + e]);
                    }
                }
            }
        }
        unsigned pf[TILES][QUERIES / 16][4], df[TILES][QUERIES / 16][4];
        UNROLL
        for (int i = 0; i < TILES; i++) {
            UNROLL
            for (int n = 0; n < QUERIES / 8; n++) {
                UNROLL
                for (int e = 0; e < 4; e++) {
                    const float weight = exp2_fast_f(fma_f(sc[i][n][e], exponent, -lse[n][e % 2]));
                    const bool hidden = HIDE && at + 8 * n + 2 * quad + e % 2 < first + 16 * i + e / 2 * 8;
                    sc[i][n][e] = hidden ? 0.0f : weight;
                    ds[i][n][e] = hidden ? 0.0f : weight * ds[i][n][e];
                }
                UNROLL
                for (int h = 0; h < 2; h++) {
                    pf[i][n / 2][n % 2 * 2 + h] = pack2<T>(sc[i][n][2 * h], sc[i][n][2 * h + 1]);
                    df[i][n / 2][n % 2 * 2 + h] = pack2<T>(ds[i][n][2 * h], ds[i][n][2 * h + 1]);
                }
            }
        }
        accumulate(dv, pf, yt);
        accumulate(dk, df, qt);
        if (HALF) {
            UNROLL
            for (int j = 0; j < QUERIES / 16; j++) {
                // 16 queries × 8 columns: words 0, 1 of dy, 2, 3 of q.
                unsigned f[4];
                ldmatrix_trans(f, (l < 16 ? yt : qt) + chunk(16 * j + l % 16, D / 8 - 1));
                const unsigned low[2] = {f[0], f[1]}, high[2] = {f[2], f[3]};
                UNROLL
                for (int i = 0; i < TILES; i++) {
                    mma<T>(dv[i][D / 8 - 1], pf[i][j], low);
                    mma<T>(dk[i][D / 8 - 1], df[i][j], high);
                }
            }
        }
    }
}

// Stores a warp's rows, through shared memory in the place of its own rows of k or v, in whole chunks. `tile` and `to` begin at its
// first row, of `rows`.
DEV void store_rows(T* to, T* tile, const Sums& sum, float factor, int rows, int ld, int d) {
    const int l = lane();
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int h = 0; h < 2; h++) {
            UNROLL
            for (int n = 0; n < D / 8; n++) {
                const Vec<unsigned, 1> word = {pack2<T>(sum[i][n][2 * h] * factor, sum[i][n][2 * h + 1] * factor)};
                T* at = tile + chunk(16 * i + l / 4 + 8 * h, n) + 2 * (l % 4);
                store_shared(reinterpret_cast<unsigned*>(at), word);
            }
        }
    }
    sync_warp();
    UNROLL
    for (int i = l; i < 16 * TILES * PITCH; i += WARP) {
        const int r = i / PITCH, c = i % PITCH;
        const Vec<T, 8> part = load_shared<8>(tile + chunk(r, c));
        if (r < rows && c * 8 < d) store(to + (long long)r * ld + c * 8, part);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) attention_grad_kv_mma(const __grid_constant__ AttentionGradKvMma p) {
    griddep_wait();
    GradKvSmem& s = smem_dynamic<GradKvSmem>();
    const int l = lane(), s0 = block_x() * BN, own = warp() * (16 * TILES), ld = p.heads * p.d, thread = thread_x();
    const long long queries = (long long)block_z() * p.t * ld + block_y() * p.d;
    const long long keys = ((long long)block_z() * p.s + s0) * ld + block_y() * p.d;
    const T *q = p.q + queries, *dy = p.dy + queries;
    const float* stats = p.stats + ((long long)block_z() * p.heads + block_y()) * p.rows * 2;
    const int rows = p.s - s0 < BN ? p.s - s0 : BN;
    // The first query that sees the block's first key, and the first that sees all of its keys.
    const int early = p.causal ? s0 - (p.s - p.t) : 0, common = p.causal ? early + rows - 1 : 0;
    const int from = early > 0 ? early / BM * BM : 0;

    copy_rows<BN>(s.k, p.k + keys, rows, ld, p.d);
    copy_rows<BN>(s.v, p.v + keys, rows, ld, p.d);
    cp_async_commit();
    copy_rows<BM>(s.ring[0][0], q + (long long)from * ld, p.t - from, ld, p.d);
    copy_rows<BM>(s.ring[0][1], dy + (long long)from * ld, p.t - from, ld, p.d);
    if (thread < BM / 2) cp_async(s.stats[0] + 4 * thread, stats + 2 * from + 4 * thread, true);
    cp_async_commit();

    Sums dk, dv;
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int n = 0; n < D / 8; n++) {
            UNROLL
            for (int e = 0; e < 4; e++) dk[i][n][e] = 0.0f, dv[i][n][e] = 0.0f;
        }
    }
    cp_async_wait<1>();
    sync_block();
    Left k, v;
    load_left(k, s.k + own * PITCH * 8);
    load_left(v, s.v + own * PITCH * 8);
    for (int t0 = from, stage = 0; t0 < p.t; t0 += BM, stage ^= 1) {
        cp_async_wait<0>();
        sync_block();
        const int next = t0 + BM;
        if (next < p.t) {
            copy_rows<BM>(s.ring[stage ^ 1][0], q + (long long)next * ld, p.t - next, ld, p.d);
            copy_rows<BM>(s.ring[stage ^ 1][1], dy + (long long)next * ld, p.t - next, ld, p.d);
            if (thread < BM / 2) cp_async(s.stats[stage ^ 1] + 4 * thread, stats + 2 * next + 4 * thread, true);
            cp_async_commit();
        }
        const T *qt = s.ring[stage][0], *yt = s.ring[stage][1];
        if (t0 >= common) {
            add_products<false>(dk, dv, k, v, qt, yt, s.stats[stage], p.exponent, 0);
        } else {
            add_products<true>(dk, dv, k, v, qt, yt, s.stats[stage], p.exponent, early + own + l / 4 - t0);
        }
    }

    const int left = rows - own;
    T *to_k = p.dk + keys + (long long)own * ld, *to_v = p.dv + keys + (long long)own * ld;
    store_rows(to_k, s.k + own * PITCH * 8, dk, p.scale, left, ld, p.d);
    store_rows(to_v, s.v + own * PITCH * 8, dv, 1.0f, left, ld, p.d);
}
