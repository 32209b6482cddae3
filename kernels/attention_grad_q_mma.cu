// The gradient of attention by q on tensor cores, and what attention_grad_kv_mma needs of each query. With scores s = scale · q kᵀ,
// p = softmax(s) and delta = sum dy · y of a query: ds = p · (dy vᵀ - delta), dq = scale · ds k (Dao et al. 2022, algorithm 4).
//
// Grid: (ceil(T / BM), N, B). A block owns BM queries of one head, each of its four warps BM / 4 of them, in tiles of 16, and walks
// over the keys twice. The first pass makes the scores, MANY keys at a time, for the logarithm of the sum of exponentials (lse)
// alone; the second makes them again, KEYS keys at a time, with dy vᵀ, and from both ds and its product with k. Each lane keeps the
// largest exponent and the sum of its own keys in the first pass; four lanes put theirs together behind it. No block adds to
// what another one has: a result has the same bits whenever it is computed.
//
// Operands of a warp: its rows of q and dy are left operands in registers, read once (`whole`, and `half`, their last 8 columns
// where D is an odd multiple of 8: a product of half the depth), those of dy for the second pass alone. Scores (`sc`), dy vᵀ - delta
// (`ds`, which starts at -delta) and dq are f32 accumulators in registers; ds becomes 16 bits in registers, where the accumulator's
// layout is that of a left operand: each is rounded by itself, so that a sum of them loses about what rounding the result loses. k
// and v are read from shared memory: k as a right operand, by columns of its rows, for the scores, and once more, transposed as it
// is read, for dq. delta is of y and dy as they are stored, by the words of left operands, a lane its own and four lanes together.
//
// Shared memory: q and dy, and a ring of two stages: 2 · BN keys of k in the first pass, BN of k and of v in the second. y
// lies in stage 1 before the first turn. Rows of PITCH chunks of 16 bytes, PITCH = 2^A · odd (D = 128: PITCH is 16 and A is 3; what
// follows holds too); chunk c of row r lies at chunk
// r · PITCH + (c ^ x), where only the low A bits of c are changed, and x is the A bits of r from bit 3 - A on.
// Without conflicts, since each pass, eight lanes of 16 bytes, touches each of the 8 chunk columns (mod 8) once:
//   ldmatrix reads chunk c of rows 8i … 8i+7. Rows with different x differ in the low A bits of c ^ x, to which r · PITCH,
//   a multiple of 2^A, adds nothing; the 2^(3-A) consecutive rows of one x differ in odd · r mod 2^(3-A).
//   cp_async and the rows of dq move 8 chunks from a multiple of 8 on in the order of r · PITCH + c; the exclusive or
//   permutes them within aligned groups of 2^A. The words of dq are written as ldmatrix reads.
//
// Waits: before the first turn a wait and a barrier make q, dy, y and the first keys visible. Each turn waits for its stage,
// which was asked for a turn before, and passes the turn's only barrier: behind it everybody's copies of this stage are visible,
// and everybody has left the other stage (in the first turn, stage 1 of y), which is filled again at once. The last turn of the
// first pass asks for the first one of the second. dq goes out by the place of q, which nobody reads any more but the warp whose
// rows they are: a barrier of the warp stands between its writes and reads.
//
// Exponentials are to base 2: p = 2^(s·c - lse), c = scale · log2 e. The largest exponent starts at the lowest finite value, so
// that -inf scores add 0; a query whose scores are all -inf, one with +inf and one with a NaN have p = NaN, in dq and by `stats`
// in dk and dv.
//
// Edges: rows from S on (T for q, y and dy) and columns from d on are zeros in shared memory; scores of keys that a query does not
// see are -inf, set in those turns alone that have such keys, and their ds is 0 whatever dy vᵀ is. The second pass
// takes whole turns of BN keys: with `causal`, a NaN or an inf in k of a key reaches dq of all the block's queries, as 0 · inf, in those
// turns that have keys which some query of the block does not see. Rows from T on and columns from d on of dq are not stored. `stats` of rows from T on, up to a multiple of BM, is +inf and
// 0, from which attention_grad_kv_mma makes p = 0 and ds = 0. A copy that writes zeros touches no memory at its address, which may
// lie outside.
// Wants: pointers aligned to 16 bytes and not null, d <= D and a multiple of 8, scale > 0; S > 0, and with `causal` S >= T.
// Occupancy: the BLOCKS that are asked for are what registers allow (at most 128, 168 and 255 of a thread; 122 to 128, 167 to 168
// and 213 to 255 are used, nothing is spilled); shared memory (24 to 80 KB) allows as many on sm_80 and sm_90. On sm_86 and sm_89 it
// allows two where D is 40, or 64 with BM = 64, and one where D is larger or BM is 128 with it. The loops over keys within a
// turn are rolled: unrolled, the compiler reads operands of the next keys early, and spills.
//
// types: f16 bf16
// variants: BM=64,D=32 BM=64,D=40 BM=128,D=40 BM=64,D=64 BM=128,D=64 BM=64,D=80 BM=64,D=128 BM=64,D=160
#include "dev.cuh"

constexpr int WARPS = 4;
constexpr int BLOCK = 128;
constexpr int BN = D <= 80 ? 64 : 32;                // keys in a turn of the second pass; one of the first has 2 · BN
constexpr int TILES = BM / (16 * WARPS);             // tiles of 16 queries in a warp
constexpr int MANY = TILES > 1 || D > 80 ? 32 : 64;  // keys whose scores stand in registers in the first pass
constexpr int KEYS = TILES > 1 || D > 80 ? 16 : 32;  // and in the second
constexpr int STEPS = D / 16;                        // steps of 16 columns of q kᵀ and dy vᵀ
constexpr int HALF = D % 16 / 8;                     // and of 8
constexpr int PITCH = 2 * (STEPS + HALF);            // chunks in a row
constexpr int A = PITCH % 8 == 0 ? 3 : PITCH % 4 == 0 ? 2 : 1;
constexpr int BLOCKS = D <= 40 ? (TILES > 1 ? 3 : 4) : D <= 64 && TILES == 1 ? 3 : 2;  // on a multiprocessor
constexpr int SMEM_BYTES = (2 * BM + 4 * BN) * PITCH * 16;
// Instructions of a loop over keys of the second pass, which a test counts in the machine code.
constexpr int LOOP_HMMA = TILES * KEYS / 16 * (4 * (STEPS + HALF) + D / 8);
constexpr int LOOP_LDSM = KEYS / 16 * (3 * STEPS + HALF) + HALF * (KEYS / 32 + KEYS % 32 / 16);
constexpr int LOOP_LDGSTS = 0;

struct AttentionGradQMma {
    T* dq;         // (B,T,N·d)
    float* stats;  // (B,N,rows,2): of each query the logarithm to base 2 of the sum of exponentials, and -delta
    const T* q;    // (B,T,N·d)
    const T* k;    // (B,S,N·d)
    const T* v;    // (B,S,N·d)
    const T* y;    // (B,T,N·d)
    const T* dy;   // (B,T,N·d)
    int t, s, heads, d;  // d <= D, a multiple of 8
    int rows;            // T rounded up to a multiple of BM, or more
    float scale;         // of the scores
    float exponent;      // the same times log2 e
    int causal;          // query i sees keys up to i + S − T
};

struct alignas(128) GradQSmem {
    T q[BM * PITCH * 8];
    T dy[BM * PITCH * 8];
    T ring[2][2][BN * PITCH * 8];  // stage; k, v
};
static_assert(sizeof(GradQSmem) == SMEM_BYTES, "what the launch asks for");
static_assert(BN * PITCH % BLOCK == 0 && BM * PITCH % BLOCK == 0, "every thread copies alike");
static_assert(BM <= 2 * BN, "a stage holds y");

#include "attention_tile.cuh"

// The left operand of a warp's 16 · TILES rows.
struct Left {
    unsigned whole[TILES][STEPS][4], half[TILES][2];
};
DEV void load_left(Left& to, const T* tile, int own) {
    const int l = lane();
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int j = 0; j < STEPS; j++) ldmatrix(to.whole[i][j], tile + chunk(own + 16 * i + l % 16, 2 * j + l / 16));
        if (HALF) ldmatrix(to.half[i], tile + chunk(own + 16 * i + l % 16, 2 * STEPS));
    }
}

// sum += left · N rows of `tile`, transposed, without the last 8 columns where D is an odd multiple of 8.
template <int N>
DEV void multiply(float (&sum)[TILES][N / 8][4], const Left& left, const T* tile) {
    const int l = lane();
    UNROLL
    for (int j = 0; j < STEPS; j++) {
        UNROLL
        for (int n = 0; n < N / 16; n++) {
            // 16 rows × 16 columns: words 0, 1 are rows 0 to 7, words 2, 3 rows 8 to 15.
            unsigned f[4];
            ldmatrix(f, tile + chunk(16 * n + l % 8 + l / 16 * 8, 2 * j + l / 8 % 2));
            const unsigned low[2] = {f[0], f[1]}, high[2] = {f[2], f[3]};
            UNROLL
            for (int i = 0; i < TILES; i++) {
                mma<T>(sum[i][2 * n], left.whole[i][j], low);
                mma<T>(sum[i][2 * n + 1], left.whole[i][j], high);
            }
        }
    }
}

// What a lane has of its two rows of each tile.
struct Rows {
    float m[TILES][2], sum[TILES][2];  // first pass: the largest exponent and the sum of exponentials below it, of its own keys
    float lse[TILES][2], minus[TILES][2];  // the logarithm to base 2 of the sum of all exponentials; -delta
};

// The sum of the products of the two elements in a word.
DEV float dot(unsigned a, unsigned b, float sum) {
    const T a0 = {(unsigned short)a}, a1 = {(unsigned short)(a >> 16)}, b0 = {(unsigned short)b}, b1 = {(unsigned short)(b >> 16)};
    return fma_f(to_float(a1), to_float(b1), fma_f(to_float(a0), to_float(b0), sum));
}

// Sets what a lane has of its rows before the first pass: delta, by the words that it would have of left operands.
DEV void start_rows(Rows& w, const T* dy, const T* y, int own) {
    const int l = lane();
    UNROLL
    for (int i = 0; i < TILES; i++) {
        float delta[2] = {0.0f, 0.0f};
        UNROLL
        for (int j = 0; j < STEPS + HALF; j++) {
            unsigned a[4], b[4];
            const int at = chunk(own + 16 * i + l % 16, 2 * j + l / 16);
            ldmatrix(a, dy + at);
            ldmatrix(b, y + at);
            UNROLL
            for (int e = 0; e < 4; e++) delta[e % 2] = dot(a[e], b[e], delta[e % 2]);
        }
        UNROLL
        for (int h = 0; h < 2; h++) {
            delta[h] += shfl_xor(delta[h], 1);
            delta[h] += shfl_xor(delta[h], 2);
            w.minus[i][h] = -delta[h];
            w.m[i][h] = -FLOAT_MAX, w.sum[i][h] = 0.0f;
        }
    }
}

// A score of a key that the query does not see becomes -inf. `end` is the first such key of the lane's first row, `keys` the
// first that there is not.
template <int N>
DEV void hide(float (&sc)[TILES][N / 8][4], int first, int end, int keys, int causal) {
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int n = 0; n < N / 8; n++) {
            UNROLL
            for (int e = 0; e < 4; e++) {
                const int key = first + 8 * n + e % 2;
                if (key >= keys || (causal && key >= end + 16 * i + e / 2 * 8)) sc[i][n][e] = -FLOAT_INF;
            }
        }
    }
}

// First pass: `count` keys. `first` is the lane's first one.
template <bool HIDE>
DEV void add_exponentials(Rows& w, const Left& q, const T* kt, int count, float exponent, int first, int end, int keys, int causal) {
    const int l = lane();
    ROLLED
    for (int at = 0; at < count; at += MANY, kt += MANY * PITCH * 8, first += MANY) {
        float sc[TILES][MANY / 8][4];
        UNROLL
        for (int i = 0; i < TILES; i++) {
            UNROLL
            for (int n = 0; n < MANY / 8; n++) {
                UNROLL
                for (int e = 0; e < 4; e++) sc[i][n][e] = 0.0f;
            }
        }
        multiply<MANY>(sc, q, kt);
        if (HALF) {
            UNROLL
            for (int n = 0; n < MANY / 32; n++) {
                // 32 keys × 8 columns: word e is keys 8e to 8e + 7.
                unsigned f[4];
                ldmatrix(f, kt + chunk(32 * n + l, 2 * STEPS));
                UNROLL
                for (int e = 0; e < 4; e++) {
                    UNROLL
                    for (int i = 0; i < TILES; i++) mma<T>(sc[i][4 * n + e], q.half[i], f[e]);
                }
            }
        }
        if (HIDE) hide<MANY>(sc, first, end, keys, causal);
        UNROLL
        for (int i = 0; i < TILES; i++) {
            UNROLL
            for (int h = 0; h < 2; h++) {
                float most = -FLOAT_INF;
                UNROLL
                for (int n = 0; n < MANY / 8; n++) most = max_f(most, max_f(sc[i][n][2 * h], sc[i][n][2 * h + 1]));
                most = max_f(w.m[i][h], most * exponent);
                w.sum[i][h] *= exp2_fast_f(w.m[i][h] - most);
                w.m[i][h] = most;
                UNROLL
                for (int n = 0; n < MANY / 8; n++) {
                    UNROLL
                    for (int e = 2 * h; e < 2 * h + 2; e++) w.sum[i][h] += exp2_fast_f(fma_f(sc[i][n][e], exponent, -most));
                }
            }
        }
    }
}

// Second pass: BN keys.
template <bool HIDE>
DEV void add_products(float (&dq)[TILES][D / 8][4], const Rows& w, const Left& q, const Left& dy, const T* kt, const T* vt,
                      float exponent, int first, int end, int keys, int causal) {
    const int l = lane();
    ROLLED
    for (int at = 0; at < BN; at += KEYS, kt += KEYS * PITCH * 8, vt += KEYS * PITCH * 8, first += KEYS) {
        float sc[TILES][KEYS / 8][4], ds[TILES][KEYS / 8][4];
        UNROLL
        for (int i = 0; i < TILES; i++) {
            UNROLL
            for (int n = 0; n < KEYS / 8; n++) {
                UNROLL
                for (int e = 0; e < 4; e++) sc[i][n][e] = 0.0f, ds[i][n][e] = w.minus[i][e / 2];
            }
        }
        multiply<KEYS>(sc, q, kt);
        multiply<KEYS>(ds, dy, vt);
        if (HALF) {
            UNROLL
            for (int n = 0; n < KEYS / 16; n++) {
                // 16 keys × 8 columns: words 0, 1 of k, 2, 3 of v.
                unsigned f[4];
                ldmatrix(f, (l < 16 ? kt : vt) + chunk(16 * n + l % 16, 2 * STEPS));
                UNROLL
                for (int e = 0; e < 2; e++) {
                    UNROLL
                    for (int i = 0; i < TILES; i++) {
                        mma<T>(sc[i][2 * n + e], q.half[i], f[e]);
                        mma<T>(ds[i][2 * n + e], dy.half[i], f[2 + e]);
                    }
                }
            }
        }
        if (HIDE) hide<KEYS>(sc, first, end, keys, causal);
        unsigned df[TILES][KEYS / 16][4];
        UNROLL
        for (int i = 0; i < TILES; i++) {
            UNROLL
            for (int n = 0; n < KEYS / 8; n++) {
                UNROLL
                for (int e = 0; e < 4; e++) {
                    const float weight = exp2_fast_f(fma_f(sc[i][n][e], exponent, -w.lse[i][e / 2]));
                    ds[i][n][e] = HIDE && weight == 0.0f ? 0.0f : weight * ds[i][n][e];
                }
                UNROLL
                for (int h = 0; h < 2; h++) df[i][n / 2][n % 2 * 2 + h] = pack2<T>(ds[i][n][2 * h], ds[i][n][2 * h + 1]);
            }
        }
        UNROLL
        for (int n = 0; n < D / 16; n++) {
            UNROLL
            for (int j = 0; j < KEYS / 16; j++) {
                // 16 keys × 16 columns: words 0, 1 are columns 0 to 7, words 2, 3 columns 8 to 15.
                unsigned f[4];
                ldmatrix_trans(f, kt + chunk(16 * j + l % 16, 2 * n + l / 16));
                const unsigned low[2] = {f[0], f[1]}, high[2] = {f[2], f[3]};
                UNROLL
                for (int i = 0; i < TILES; i++) {
                    mma<T>(dq[i][2 * n], df[i][j], low);
                    mma<T>(dq[i][2 * n + 1], df[i][j], high);
                }
            }
        }
        if (HALF && KEYS >= 32) {
            UNROLL
            for (int j = 0; j < KEYS / 16; j += 2) {
                // 32 keys × 8 columns: word e is keys 8e to 8e + 7.
                unsigned f[4];
                ldmatrix_trans(f, kt + chunk(16 * j + l, D / 8 - 1));
                const unsigned low[2] = {f[0], f[1]}, high[2] = {f[2], f[3]};
                UNROLL
                for (int i = 0; i < TILES; i++) {
                    mma<T>(dq[i][D / 8 - 1], df[i][j], low);
                    mma<T>(dq[i][D / 8 - 1], df[i][j + 1], high);
                }
            }
        } else if (HALF) {
            unsigned f[2];
            ldmatrix_trans(f, kt + chunk(l % 16, D / 8 - 1));
            UNROLL
            for (int i = 0; i < TILES; i++) mma<T>(dq[i][D / 8 - 1], df[i][0], f);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) attention_grad_q_mma(const __grid_constant__ AttentionGradQMma p) {
    griddep_wait();
    GradQSmem& s = smem_dynamic<GradQSmem>();
    const int l = lane(), quad = l % 4, t0 = block_x() * BM, own = warp() * (16 * TILES), ld = p.heads * p.d;
    const long long queries = ((long long)block_z() * p.t + t0) * ld + block_y() * p.d;
    const long long keys = (long long)block_z() * p.s * ld + block_y() * p.d;
    const T *k = p.k + keys, *v = p.v + keys;
    const int rows = p.t - t0 < BM ? p.t - t0 : BM;
    // Keys that the last query of the block sees, and those that all of them see.
    const int visible = p.causal ? t0 + rows + p.s - p.t : p.s;
    const int common = p.causal ? t0 + 1 + p.s - p.t : p.s;
    const int end = common + own + l / 4;

    copy_tile<BM>(s.q, p.q + queries, rows, ld, p.d);
    copy_tile<BM>(s.dy, p.dy + queries, rows, ld, p.d);
    copy_tile<BM>(s.ring[1][0], p.y + queries, rows, ld, p.d);
    copy_tile<2 * BN>(s.ring[0][0], k, p.s, ld, p.d);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    Left q, dy;
    load_left(q, s.q, own);
    Rows w;
    start_rows(w, s.dy, s.ring[1][0], own);
    int stage = 0;
    for (int n0 = 0; n0 < visible; n0 += 2 * BN, stage ^= 1) {
        cp_async_wait<0>();
        sync_block();
        const int next = n0 + 2 * BN;
        if (next < visible) {
            copy_tile<2 * BN>(s.ring[stage ^ 1][0], k + (long long)next * ld, p.s - next, ld, p.d);
        } else {
            copy_tile<BN>(s.ring[stage ^ 1][0], k, p.s, ld, p.d);
            copy_tile<BN>(s.ring[stage ^ 1][1], v, p.s, ld, p.d);
        }
        cp_async_commit();
        const T* kt = s.ring[stage][0];
        if (next <= common) {
            add_exponentials<false>(w, q, kt, 2 * BN, p.exponent, n0 + 2 * quad, end, p.s, p.causal);
        } else {
            const int count = visible - n0 < 2 * BN ? visible - n0 : 2 * BN;
            add_exponentials<true>(w, q, kt, count, p.exponent, n0 + 2 * quad, end, p.s, p.causal);
        }
    }

    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int h = 0; h < 2; h++) {
            float m = w.m[i][h];
            m = max_f(m, shfl_xor(m, 1));
            m = max_f(m, shfl_xor(m, 2));
            float sum = w.sum[i][h] * exp2_fast_f(w.m[i][h] - m);
            sum += shfl_xor(sum, 1);
            sum += shfl_xor(sum, 2);
            w.lse[i][h] = fma_f(log_f(sum), 1.44269504f, m);
            const int row = own + 16 * i + 8 * h + l / 4;
            if (quad == 0) {
                const Vec<float, 2> pair = {row < rows ? w.lse[i][h] : FLOAT_INF, w.minus[i][h]};
                store(p.stats + 2 * (((long long)block_z() * p.heads + block_y()) * p.rows + t0 + row), pair);
            }
        }
    }

    load_left(dy, s.dy, own);
    float dq[TILES][D / 8][4];
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int n = 0; n < D / 8; n++) {
            UNROLL
            for (int e = 0; e < 4; e++) dq[i][n][e] = 0.0f;
        }
    }
    for (int n0 = 0; n0 < visible; n0 += BN, stage ^= 1) {
        cp_async_wait<0>();
        sync_block();
        const int next = n0 + BN;
        if (next < visible) {
            copy_tile<BN>(s.ring[stage ^ 1][0], k + (long long)next * ld, p.s - next, ld, p.d);
            copy_tile<BN>(s.ring[stage ^ 1][1], v + (long long)next * ld, p.s - next, ld, p.d);
            cp_async_commit();
        }
        const T *kt = s.ring[stage][0], *vt = s.ring[stage][1];
        if (n0 + BN <= common) {
            add_products<false>(dq, w, q, dy, kt, vt, p.exponent, n0 + 2 * quad, end, p.s, p.causal);
        } else {
            add_products<true>(dq, w, q, dy, kt, vt, p.exponent, n0 + 2 * quad, end, p.s, p.causal);
        }
    }

    // dq passes through shared memory in the place of the warp's own rows of q, so that it is stored in whole chunks.
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int h = 0; h < 2; h++) {
            UNROLL
            for (int n = 0; n < D / 8; n++) {
                const Vec<unsigned, 1> word = {pack2<T>(dq[i][n][2 * h] * p.scale, dq[i][n][2 * h + 1] * p.scale)};
                T* at = s.q + chunk(own + 16 * i + l / 4 + 8 * h, n) + 2 * quad;
                store_shared(reinterpret_cast<unsigned*>(at), word);
            }
        }
    }
    sync_warp();
    T* to = p.dq + queries;
    UNROLL
    for (int i = l; i < 16 * TILES * PITCH; i += WARP) {
        const int r = own + i / PITCH, c = i % PITCH;
        const Vec<T, 8> part = load_shared<8>(s.q + chunk(r, c));
        if (r < rows && c * 8 < p.d) store(to + (long long)r * ld + c * 8, part);
    }
}
