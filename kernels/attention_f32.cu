// y = softmax(scale · q kᵀ) v per head in f32 throughout, by float units, in one pass over blocks of BN keys (FlashAttention-2,
// Dao 2023).
//
// Who owns what. Grid: (ceil(T / BM), N, B). A block owns BM queries of one head, each of its warps 4·RM of them. The lanes of a
// warp stand 4×8 over queries and keys: the lowest bit and the highest one of their number along the queries, those between
// along the keys. A lane holds in registers the scores of RM queries, 4 apart, and KN keys, 8 apart (`sc`), and of the
// result the same queries and CN columns, in runs of VEC, 8·VEC apart (`o`); both are f32 sums.
//
// Operands. q lies in shared memory throughout, a block of keys in one tile and its values in another, in rows of PITCH floats.
// A lane reads at once four columns of a row of q or k, VEC columns of a row of v (eight lanes side by side), four keys of a row
// of p. Eight lanes read two rows of q and four of k: rows begin an odd multiple of four banks apart, so eight of them meet in
// none; and as each address is also that of lane ^ 1 or of lane ^ 2, the hardware may serve sixteen lanes in a pass. Copies take
// a chunk of 16 bytes of eight rows, for the same reason. The weights p pass through shared memory, 32 keys at a time, in rows of
// P_PITCH floats that one warp alone writes and reads; four queries' rows are eight banks apart, as the writes of 8 keys each
// want it.
//
// Order. A turn takes a block of keys. While its scores are made its values are copied, and while they are weighed the next
// keys: each copy is asked for as soon as everybody has left what it overwrites, and waited for before the next barrier. The
// first barrier of a turn makes the keys visible (and q, in the first turn) and says that all have left the values of the
// last; the second makes the values visible and says that all have left the keys. Barriers of the warp stand around the
// reads of p. No copy is in flight at the end.
//
// Loops over columns and over keys are not unrolled, so that a chunk's operands alone are in registers.
//
// Softmax, in base 2: p = 2^(s·c - m), c = scale · log2 e, m the row's maximum so far; what was summed is multiplied by the
// power of what m grows by. m is the same in the eight lanes of a query; each sums the weights of its own keys, and they add
// up at the end. m starts at the lowest finite value, so that -inf scores give p = 0; a row whose scores are all -inf ends as
// 0 / 0, and a NaN in a row passes into its sum: both become NaN in y. So does a score of +inf. A NaN or an inf in v reaches
// its column of y, with `causal` also in queries of the block that do not see the key but share a turn with it, as 0 · inf.
//
// Edges: rows from S on (T for q) and columns from d on are zeros in shared memory; scores of keys that a query does not
// see are -inf. Columns from d on and rows from T on of y are not stored. A copy that writes zeros touches no memory at its
// address, which may lie outside.
// Wants: pointers aligned to 16 bytes and not null, d <= D, d and the pitches multiples of 4, scale > 0; S > 0, and with
// `causal` S >= T.
// Occupancy: the BLOCKS that are asked for are what registers allow; but at D = 80 those would allow four blocks of two warps, and
// three is what shared memory allows on sm_90. Shared memory, 64, 88, 73, 92 KB in the order of the variants, allows as many on
// sm_90; on sm_80 two of the first and the third, one of the others; on sm_86 and sm_89 one.
//
// types: f32
// variants: D=40 D=64 D=80 D=160
#include "dev.cuh"

constexpr int WARPS = D == 80 ? 2 : 4;
constexpr int BLOCK = 32 * WARPS;
constexpr int RM = D > 80 ? 4 : 8;   // queries of a lane
constexpr int BM = WARPS * 4 * RM;
constexpr int BN = D > 80 ? 32 : 64; // keys in a turn
constexpr int KN = BN / 8;           // of a lane
constexpr int CN = D / 8;            // columns of y of a lane
constexpr int VEC = D % 32 == 0 ? 4 : D % 16 == 0 ? 2 : 1;
constexpr int PITCH = D + 4, P_PITCH = 40;
constexpr int BLOCKS = D == 80 ? 3 : 2;  // on a multiprocessor
constexpr int SMEM_BYTES = ((BM + 2 * BN) * PITCH + BM * P_PITCH) * 4;
// Instructions of the innermost loop's body, which a test counts in the machine code: of the scores, or with many columns of
// the weighing.
constexpr int LOOP_FFMA = D > 80 ? 4 * RM * CN : 4 * RM * KN, LOOP_LDS = D > 80 ? RM + 4 * CN / VEC : RM + KN;
static_assert(BM * D / 4 % BLOCK == 0 && BN * D / 4 % BLOCK == 0, "every thread copies alike");
static_assert(PITCH % 8 == 4 && P_PITCH % 32 == 8, "banks");

struct AttentionF32Fwd {
    T* y;        // (B,T,N·d)
    const T* q;  // (B,T,N·d)
    const T* k;  // (B,S,N·d)
    const T* v;  // (B,S,N·d)
    int t, s, d;        // d <= D, a multiple of 4
    int ldq, ldk, ldv;  // elements from a token to the next, multiples of 4
    int ldy;            // the same of y
    float scale;        // c: of the scores, times log2 e
    int causal;         // query i sees keys up to i + S − T
};

struct alignas(128) F32Smem {
    float q[BM * PITCH];
    float k[BN * PITCH];
    float v[BN * PITCH];
    float p[BM * P_PITCH];
};
static_assert(sizeof(F32Smem) == SMEM_BYTES, "what the launch asks for");

// Starts the copy of ROWS rows of a head; rows from `rows` on and columns from d on become zeros.
template <int ROWS>
DEV void copy_tile(float* tile, const float* from, int rows, int ld, int d) {
    UNROLL
    for (int i = 0; i < ROWS * D / 4 / BLOCK; i++) {
        const int at = i * BLOCK + int(thread_x()), r = at % ROWS, c = at / ROWS * 4;
        cp_async(tile + r * PITCH + c, from + r * ld + c, r < rows && c < d);
    }
}

// What is the same in all lanes with the same queries.
DEV float of_queries(float v, bool sum) {
    UNROLL
    for (int step = 2; step < 16; step *= 2) {
        const float other = shfl_xor(v, step);
        v = sum ? v + other : max_f(v, other);
    }
    return v;
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) attention_f32_fwd(const __grid_constant__ AttentionF32Fwd p) {
    griddep_wait();
    F32Smem& s = smem_dynamic<F32Smem>();
    const int lane_m = lane() % 2 + lane() / 16 * 2, lane_n = lane() / 2 % 8, head = block_y() * p.d;
    const int t0 = block_x() * BM, own = warp() * (4 * RM) + lane_m;  // of this lane's queries the first, in the block
    const float* q = p.q + ((long long)block_z() * p.t + t0) * p.ldq + head;
    const float* k = p.k + (long long)block_z() * p.s * p.ldk + head;
    const float* v = p.v + (long long)block_z() * p.s * p.ldv + head;
    const int rows = p.t - t0 < BM ? p.t - t0 : BM;
    // Keys that the last query of the block sees, and those that all of them see.
    const int visible = p.causal ? t0 + rows + p.s - p.t : p.s;
    const int common = p.causal ? t0 + 1 + p.s - p.t : p.s;
    const float *q_own = s.q + own * PITCH, *k_own = s.k + lane_n * PITCH, *v_own = s.v + lane_n * VEC;
    float* p_own = s.p + own * P_PITCH;

    copy_tile<BM>(s.q, q, rows, p.ldq, p.d);
    copy_tile<BN>(s.k, k, p.s, p.ldk, p.d);
    cp_async_commit();

    float o[RM][CN], m[RM], sum[RM];
    UNROLL
    for (int i = 0; i < RM; i++) {
        m[i] = -FLOAT_MAX;
        sum[i] = 0.0f;
        UNROLL
        for (int j = 0; j < CN; j++) o[i][j] = 0.0f;
    }
    for (int n0 = 0; n0 < visible; n0 += BN) {
        cp_async_wait<0>();
        sync_block();
        copy_tile<BN>(s.v, v + (long long)n0 * p.ldv, p.s - n0, p.ldv, p.d);
        cp_async_commit();

        float sc[RM][KN];
        UNROLL
        for (int i = 0; i < RM; i++) {
            UNROLL
            for (int j = 0; j < KN; j++) sc[i][j] = 0.0f;
        }
        ROLLED
        for (int c = 0; c < D; c += 4) {
            Vec<float, 4> b[KN];
            UNROLL
            for (int j = 0; j < KN; j++) b[j] = load_shared<4>(k_own + j * 8 * PITCH + c);
            UNROLL
            for (int i = 0; i < RM; i++) {
                const Vec<float, 4> a = load_shared<4>(q_own + i * 4 * PITCH + c);
                UNROLL
                for (int e = 0; e < 4; e++) {
                    UNROLL
                    for (int j = 0; j < KN; j++) sc[i][j] = fma_f(a[e], b[j][e], sc[i][j]);
                }
            }
        }

        if (n0 + BN > common) {
            UNROLL
            for (int i = 0; i < RM; i++) {
                UNROLL
                for (int j = 0; j < KN; j++) {
                    const int key = n0 + 8 * j + lane_n;
                    if (key >= p.s || (p.causal && key >= common + own + 4 * i)) sc[i][j] = -FLOAT_INF;
                }
            }
        }
        UNROLL
        for (int i = 0; i < RM; i++) {
            float top = sc[i][0];
            UNROLL
            for (int j = 1; j < KN; j++) top = max_f(top, sc[i][j]);
            top = max_f(m[i], of_queries(top, false) * p.scale);
            const float factor = exp2_fast_f(m[i] - top);
            m[i] = top;
            sum[i] *= factor;
            UNROLL
            for (int j = 0; j < CN; j++) o[i][j] *= factor;
            UNROLL
            for (int j = 0; j < KN; j++) {
                sc[i][j] = exp2_fast_f(fma_f(sc[i][j], p.scale, -top));
                sum[i] += sc[i][j];
            }
        }

        cp_async_wait<0>();
        sync_block();
        if (n0 + BN < visible) {
            const int next = n0 + BN;
            copy_tile<BN>(s.k, k + (long long)next * p.ldk, p.s - next, p.ldk, p.d);
            cp_async_commit();
        }
        UNROLL
        for (int half = 0; half < BN; half += 32) {
            UNROLL
            for (int i = 0; i < RM; i++) {
                UNROLL
                for (int j = 0; j < 4; j++) {
                    const Vec<float, 1> weight = {sc[i][half / 8 + j]};
                    store_shared(p_own + i * 4 * P_PITCH + 8 * j + lane_n, weight);
                }
            }
            sync_warp();
            ROLLED
            for (int n = 0; n < 32; n += 4) {
                Vec<float, 4> a[RM];
                UNROLL
                for (int i = 0; i < RM; i++) a[i] = load_shared<4>(p_own + i * 4 * P_PITCH + n);
                UNROLL
                for (int e = 0; e < 4; e++) {
                    UNROLL
                    for (int j = 0; j < CN / VEC; j++) {
                        const Vec<float, VEC> b = load_shared<VEC>(v_own + (half + n + e) * PITCH + j * 8 * VEC);
                        UNROLL
                        for (int f = 0; f < VEC; f++) {
                            UNROLL
                            for (int i = 0; i < RM; i++) o[i][j * VEC + f] = fma_f(a[i][e], b[f], o[i][j * VEC + f]);
                        }
                    }
                }
            }
            sync_warp();
        }
    }

    float* y = p.y + ((long long)block_z() * p.t + t0) * p.ldy + head;
    UNROLL
    for (int i = 0; i < RM; i++) {
        const float share = 1.0f / of_queries(sum[i], true);
        if (own + 4 * i >= rows) continue;
        UNROLL
        for (int j = 0; j < CN / VEC; j++) {
            const int c = (j * 8 + lane_n) * VEC;
            Vec<float, VEC> part;
            UNROLL
            for (int f = 0; f < VEC; f++) part[f] = o[i][j * VEC + f] * share;
            if (c < p.d) store(y + (long long)(own + 4 * i) * p.ldy + c, part);
        }
    }
}
