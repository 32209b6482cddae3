// CONTRACT
//
// types: f16 bf16
// variants: BM=64,D=32 BM=64,D=40 BM=128,D=40 BM=64,D=64 BM=128,D=64 BM=64,D=80 BM=64,D=128 BM=64,D=160
#include "dev.cuh"

constexpr int WARPS = 4;
constexpr int BLOCK = 128;
constexpr int BN = D <= 80 ? 64 : 32;       // keys in a turn of the second pass, half of those in one of the first
constexpr int TILES = BM / (16 * WARPS);    // tiles of 16 queries in a warp
constexpr int MANY = TILES > 1 || D > 80 ? 32 : 64;   // keys whose scores stand in registers in the first pass
constexpr int KEYS = TILES > 1 || D > 128 ? 16 : D > 40 ? 32 : 64;  // and in the second
constexpr int STEPS = D / 16;               // steps of 16 columns of q kᵀ and dy vᵀ
constexpr int HALF = D % 16 / 8;            // and of 8
constexpr int PITCH = 2 * (STEPS + HALF);   // chunks in a row
constexpr int A = PITCH % 8 == 0 ? 3 : PITCH % 4 == 0 ? 2 : 1;
constexpr int BLOCKS = D <= 40 ? 3 : D <= 64 && BM == 64 ? 3 : 2;  // on a multiprocessor
constexpr int SMEM_BYTES = (2 * BM + 4 * BN) * PITCH * 16;
// Instructions of a turn of the second pass, which a test counts in the machine code.
constexpr int LOOP_HMMA = TILES * (BN / 8 * 2 * (STEPS + HALF) + BN / 16 * (D / 8)), LOOP_LDGSTS = 2 * BN * PITCH / BLOCK;
constexpr int LOOP_LDSM = BN / 16 * (2 * STEPS + HALF + STEPS) + HALF * BN / KEYS;

struct AttentionGradQMma {
    T* dq;         // (B,T,N·d)
    float* stats;  // (B,N,rows,2): of each query the logarithm to base 2 of the sum of exponentials, and delta
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

// Where chunk c of row r begins in a tile, in elements.
DEV int chunk(int r, int c) {
    constexpr int LOW = (1 << A) - 1;
    return (r * PITCH + (c & ~LOW) + ((c ^ (r >> (3 - A))) & LOW)) * 8;
}

// Starts the copy of ROWS rows of a head; rows from `rows` on and columns from d on become zeros.
template <int ROWS>
DEV void copy_tile(T* tile, const T* from, int rows, int ld, int d) {
    UNROLL
    for (int i = 0; i < ROWS * PITCH / BLOCK; i++) {
        const int at = i * BLOCK + int(thread_x()), r = at / PITCH, c = at % PITCH;
        cp_async(tile + chunk(r, c), from + r * ld + c * 8, r < rows && c * 8 < d);
    }
}

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
    float lse[TILES][2], delta[TILES][2];
};

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

// First pass: MANY keys. `first` is the lane's first key.
template <bool HIDE>
DEV void add_exponentials(Rows& w, const Left& q, const T* kt, float exponent, int first, int end, int keys, int causal) {
    const int l = lane();
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
                for (int e = 0; e < 4; e++) sc[i][n][e] = 0.0f, ds[i][n][e] = -w.delta[i][e / 2];
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
    copy_tile<2 * BN>(s.ring[0][0], k, p.s, ld, p.d);
    cp_async_commit();

    Rows w;
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int h = 0; h < 2; h++) {
            // A quarter of delta's columns for each lane of four.
            const int row = own + 16 * i + 8 * h + l / 4;
            const T *y = p.y + queries + (long long)row * ld, *dy = p.dy + queries + (long long)row * ld;
            float delta = 0.0f;
            if (row < rows) {
                for (int c = quad * 8; c < p.d; c += 32) {
                    const Vec<T, 8> a = load<8>(y + c), b = load<8>(dy + c);
                    UNROLL
                    for (int e = 0; e < 8; e++) delta = fma_f(to_float(a[e]), to_float(b[e]), delta);
                }
            }
            delta += shfl_xor(delta, 1);
            delta += shfl_xor(delta, 2);
            w.delta[i][h] = delta;
            w.m[i][h] = -FLOAT_MAX, w.sum[i][h] = 0.0f;
        }
    }

    cp_async_wait<0>();
    sync_block();
    Left q, dy;
    load_left(q, s.q, own);
    int stage = 0;
    ROLLED
    for (int n0 = 0; n0 < visible; n0 += 2 * BN, stage ^= 1) {
        if (n0 > 0) {
            cp_async_wait<0>();
            sync_block();
        }
        const int next = n0 + 2 * BN;
        if (next < visible) {
            copy_tile<2 * BN>(s.ring[stage ^ 1][0], k + (long long)next * ld, p.s - next, ld, p.d);
        } else {
            copy_tile<BN>(s.ring[stage ^ 1][0], k, p.s, ld, p.d);
            copy_tile<BN>(s.ring[stage ^ 1][1], v, p.s, ld, p.d);
        }
        cp_async_commit();
        UNROLL
        for (int i = 0; i < 2 * BN; i += MANY) {
            const int at = n0 + i, first = at + 2 * quad;
            const T* kt = s.ring[stage][0] + i * PITCH * 8;
            if (at + MANY <= common) {
                add_exponentials<false>(w, q, kt, p.exponent, first, end, p.s, p.causal);
            } else if (at < visible) {
                add_exponentials<true>(w, q, kt, p.exponent, first, end, p.s, p.causal);
            }
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
                const Vec<float, 2> pair = {row < rows ? w.lse[i][h] : FLOAT_INF, w.delta[i][h]};
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
