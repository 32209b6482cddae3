// y = softmax(scale · q kᵀ) v per head on tensor cores, in one pass over blocks of BN keys (FlashAttention-2, Dao 2023).
//
// Grid: (ceil(T / BM), N, B). A block owns BM queries of one head, each of its four warps BM / 4 of them, in tiles of 16.
// Operands of a warp: q is read once into registers (`qf`, left operand, and `qh`, its last 8 columns where D is an odd
// multiple of 8: a product of half the depth); the scores of 16 queries × BN keys (`sc`) and the
// result (`o`) are f32 accumulators in registers; the weights p become 16 bits in registers, where the accumulator's
// layout is that of a left operand. k and v lie in a ring of two stages in shared memory, one block of keys in each.
//
// Waits: before the loop, wait<1> and a barrier make q visible, which is staged in stage 1 (in its k; where BN is 32,
// across k and v). Each turn waits for its stage, which was asked for a turn before, and then passes the turn's only barrier: behind it everybody's copies of this stage are visible, and everybody has left the other stage, which is filled again
// at once. The first turn's barrier frees stage 1 of q; after the last turn a further barrier frees the ring for y, which
// lies in stage 0 in the layout of q; a warp writes and reads its own rows alone, with a barrier of the warp between. There is
// at least one turn (see Wants).
//
// Shared memory: rows of PITCH chunks of 16 bytes, PITCH = 2^A · odd (D = 128: PITCH is 16 and A is 3; eight rows in a row have
// eight different x, and what follows holds too). Chunk c of row r lies at chunk r · PITCH + (c ^ x), x = the A bits of r from
// bit 3 - A on. Without conflicts, since each pass, eight lanes of 16 bytes, touches each of the 8 chunk columns (mod 8) once:
//   ldmatrix reads chunk c of rows 8i … 8i+7. Rows with different x differ in the low A bits of c ^ x, to which r · PITCH,
//   a multiple of 2^A, adds nothing; the 2^(3-A) consecutive rows of one x differ in odd · r mod 2^(3-A).
//   cp_async and the rows of y move 8 chunks from a multiple of 8 on in the order of r · PITCH + c; the exclusive or
//   permutes them within aligned groups of 2^A. The words of y are written as ldmatrix reads.
//
// Softmax, in base 2: p = 2^(s·c - m), c = scale · log2 e. m is the row's maximum at some time, and moves only when a
// score passes it by more than 8: till then p does not pass 2^8, which 16 bits hold, and the last division undoes any common
// factor. So most turns have neither shuffles nor a rescaling. What m does depends on its own row alone, so a row's result
// has the same bits whatever its neighbours are. m starts at the lowest finite value, so
// that -inf scores give p = 0; a row whose scores are all -inf ends as 0 / 0, and a NaN in a row passes into its sum: both
// become NaN in y, as does a score of +inf. This holds for finite v: an inf or a NaN there reaches its column of y in every
// query that shares the turn, seen or not, as 0 · inf. The sum is of the weights before rounding; a lane sums its own keys, and
// four lanes add up at the end.
//
// Edges: rows from S on (T for q) and columns from d on are zeros in shared memory; scores of keys that a query does not
// see are -inf, set in those turns alone that have such keys. Columns from d on and rows from T on of y are not
// stored. A copy that writes zeros touches no memory at its address, which may lie outside.
// Wants: pointers aligned to 16 bytes and not null, d <= D, d and the pitches (ldy too) multiples of 8, scale > 0; S > 0, and with
// `causal` S >= T.
// Occupancy: the BLOCKS that are asked for are what registers allow (at most 128, 168 and 255 of a thread; 100 to 125, 158 to 168
// and 221 to 245 are used); shared memory (16 to 48 KB) allows as many on sm_80 and sm_90; on sm_86 and sm_89 too, except where D is
// 80 or 96: two.
//
// types: f16 bf16
// variants: BM=64,D=32 BM=64,D=40 BM=64,D=64 BM=64,D=80 BM=64,D=96 BM=64,D=128 BM=64,D=160
#include "dev.cuh"

constexpr int WARPS = 4;
constexpr int BLOCK = 128;
constexpr int BN = D <= 96 ? 64 : 32;       // keys in a turn
constexpr int TILES = BM / (16 * WARPS);    // tiles of 16 queries in a warp
constexpr int STEPS = D / 16;               // steps of 16 columns of q kᵀ
constexpr int HALF = D % 16 / 8;            // and of 8
constexpr int PITCH = 2 * (STEPS + HALF);   // chunks in a row
constexpr int A = PITCH % 8 == 0 ? 3 : PITCH % 4 == 0 ? 2 : 1;
constexpr int BLOCKS = D > 128 ? 2 : D < 64 ? 4 : 3;  // on a multiprocessor
// Instructions of a turn, which a test counts in the machine code.
constexpr int LOOP_HMMA = TILES * ((STEPS + HALF) * BN / 8 + BN / 16 * D / 8), LOOP_LDGSTS = 2 * BN * PITCH / BLOCK;
constexpr int LOOP_LDSM = BN / 16 * (STEPS + STEPS + HALF) + HALF * BN / 32;

struct AttentionFlashFwd {
    T* y;        // (B,T,N·d)
    const T* q;  // (B,T,N·d)
    const T* k;  // (B,S,N·d)
    const T* v;  // (B,S,N·d)
    int t, s, d;        // d <= D, a multiple of 8
    int ldq, ldk, ldv;  // elements from a token to the next, multiples of 8
    int ldy;
    float scale;        // of the scores, times log2 e
    int causal;         // query i sees keys up to i + S − T
};

struct alignas(128) FlashSmem {
    T ring[2][2][BN * PITCH * 8];  // stage; k, v
};
static_assert(2 * BN >= BM && BN * PITCH % BLOCK == 0, "a stage holds q, and every thread copies alike");

#include "attention_tile.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) attention_flash_fwd(const __grid_constant__ AttentionFlashFwd p) {
    griddep_wait();
    FlashSmem& s = smem<FlashSmem>();
    const int l = lane(), quad = l % 4, t0 = block_x() * BM, own = warp() * (16 * TILES), head = block_y() * p.d;
    const T* q = p.q + ((long long)block_z() * p.t + t0) * p.ldq + head;
    const T* k = p.k + (long long)block_z() * p.s * p.ldk + head;
    const T* v = p.v + (long long)block_z() * p.s * p.ldv + head;
    const int rows = p.t - t0 < BM ? p.t - t0 : BM;
    // Keys that the last query of the block sees, and those that all of them see.
    const int visible = p.causal ? t0 + rows + p.s - p.t : p.s;
    const int common = p.causal ? t0 + 1 + p.s - p.t : p.s;

    T* staged = s.ring[1][0];
    copy_tile<BM>(staged, q, rows, p.ldq, p.d);
    cp_async_commit();
    copy_tile<BN>(s.ring[0][0], k, p.s, p.ldk, p.d);
    copy_tile<BN>(s.ring[0][1], v, p.s, p.ldv, p.d);
    cp_async_commit();
    cp_async_wait<1>();
    sync_block();
    unsigned qf[TILES][STEPS][4], qh[TILES][2];
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int j = 0; j < STEPS; j++) ldmatrix(qf[i][j], staged + chunk(own + 16 * i + l % 16, 2 * j + l / 16));
        if (HALF) ldmatrix(qh[i], staged + chunk(own + 16 * i + l % 16, 2 * STEPS));
    }

    float o[TILES][D / 8][4], m[TILES][2], sum[TILES][2];
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int n = 0; n < D / 8; n++) {
            UNROLL
            for (int e = 0; e < 4; e++) o[i][n][e] = 0.0f;
        }
        UNROLL
        for (int h = 0; h < 2; h++) m[i][h] = -FLOAT_MAX, sum[i][h] = 0.0f;
    }

    for (int n0 = 0, stage = 0; n0 < visible; n0 += BN, stage ^= 1) {
        cp_async_wait<0>();
        sync_block();
        const T *kt = s.ring[stage][0], *vt = s.ring[stage][1];
        if (n0 + BN < visible) {
            const int next = n0 + BN;
            copy_tile<BN>(s.ring[stage ^ 1][0], k + (long long)next * p.ldk, p.s - next, p.ldk, p.d);
            copy_tile<BN>(s.ring[stage ^ 1][1], v + (long long)next * p.ldv, p.s - next, p.ldv, p.d);
            cp_async_commit();
        }

        float sc[TILES][BN / 8][4];
        UNROLL
        for (int i = 0; i < TILES; i++) {
            UNROLL
            for (int n = 0; n < BN / 8; n++) {
                UNROLL
                for (int e = 0; e < 4; e++) sc[i][n][e] = 0.0f;
            }
        }
        UNROLL
        for (int j = 0; j < STEPS; j++) {
            UNROLL
            for (int n = 0; n < BN / 16; n++) {
                // 16 keys × 16 columns: words 0, 1 are keys 0 to 7, words 2, 3 keys 8 to 15.
                unsigned kf[4];
                ldmatrix(kf, kt + chunk(16 * n + l % 8 + l / 16 * 8, 2 * j + l / 8 % 2));
                const unsigned low[2] = {kf[0], kf[1]}, high[2] = {kf[2], kf[3]};
                UNROLL
                for (int i = 0; i < TILES; i++) {
                    mma<T>(sc[i][2 * n], qf[i][j], low);
                    mma<T>(sc[i][2 * n + 1], qf[i][j], high);
                }
            }
        }

        if (HALF) {
            UNROLL
            for (int n = 0; n < BN / 32; n++) {
                // 32 keys × 8 columns: word w is keys 8w to 8w + 7.
                unsigned kf[4];
                ldmatrix(kf, kt + chunk(32 * n + l, 2 * STEPS));
                UNROLL
                for (int w = 0; w < 4; w++) {
                    UNROLL
                    for (int i = 0; i < TILES; i++) mma<T>(sc[i][4 * n + w], qh[i], kf[w]);
                }
            }
        }

        if (n0 + BN > common) {
            UNROLL
            for (int i = 0; i < TILES; i++) {
                UNROLL
                for (int n = 0; n < BN / 8; n++) {
                    UNROLL
                    for (int e = 0; e < 4; e++) {
                        const int key = n0 + 8 * n + 2 * quad + e % 2, row = own + 16 * i + l / 4 + e / 2 * 8;
                        const bool seen = key < p.s && (!p.causal || key < common + row);
                        if (!seen) sc[i][n][e] = -FLOAT_INF;
                    }
                }
            }
        }

        float top[TILES][2];
        bool grows = false;
        UNROLL
        for (int i = 0; i < TILES; i++) {
            UNROLL
            for (int h = 0; h < 2; h++) {
                float a = -FLOAT_INF;
                UNROLL
                for (int n = 0; n < BN / 8; n++) a = max_f(a, max_f(sc[i][n][2 * h], sc[i][n][2 * h + 1]));
                top[i][h] = a * p.scale;
                grows = grows || top[i][h] > m[i][h] + 8.0f;
            }
        }
        if (ballot(grows)) {
            UNROLL
            for (int i = 0; i < TILES; i++) {
                UNROLL
                for (int h = 0; h < 2; h++) {
                    float a = top[i][h];
                    a = max_f(a, shfl_xor(a, 1));
                    a = max_f(a, shfl_xor(a, 2));
                    if (!(a > m[i][h] + 8.0f)) a = m[i][h];
                    const float factor = exp2_fast_f(m[i][h] - a);
                    m[i][h] = a;
                    sum[i][h] *= factor;
                    UNROLL
                    for (int n = 0; n < D / 8; n++) {
                        o[i][n][2 * h] *= factor;
                        o[i][n][2 * h + 1] *= factor;
                    }
                }
            }
        }
        UNROLL
        for (int i = 0; i < TILES; i++) {
            UNROLL
            for (int n = 0; n < BN / 8; n++) {
                UNROLL
                for (int e = 0; e < 4; e++) {
                    sc[i][n][e] = exp2_fast_f(fma_f(sc[i][n][e], p.scale, -m[i][e / 2]));
                    sum[i][e / 2] += sc[i][n][e];
                }
            }
        }

        UNROLL
        for (int j = 0; j < BN / 16; j++) {
            unsigned pf[TILES][4];
            UNROLL
            for (int i = 0; i < TILES; i++) {
                UNROLL
                for (int w = 0; w < 4; w++) {
                    const float* pair = sc[i][2 * j + w / 2] + w % 2 * 2;
                    pf[i][w] = pack2<T>(pair[0], pair[1]);
                }
            }
            UNROLL
            for (int n = 0; n < D / 16; n++) {
                // 16 keys × 16 columns: words 0, 1 are columns 0 to 7, words 2, 3 columns 8 to 15.
                unsigned vf[4];
                ldmatrix_trans(vf, vt + chunk(16 * j + l % 16, 2 * n + l / 16));
                const unsigned low[2] = {vf[0], vf[1]}, high[2] = {vf[2], vf[3]};
                UNROLL
                for (int i = 0; i < TILES; i++) {
                    mma<T>(o[i][2 * n], pf[i], low);
                    mma<T>(o[i][2 * n + 1], pf[i], high);
                }
            }
            if (D % 16 != 0) {
                unsigned vf[2];
                ldmatrix_trans(vf, vt + chunk(16 * j + l % 16, D / 8 - 1));
                UNROLL
                for (int i = 0; i < TILES; i++) mma<T>(o[i][D / 8 - 1], pf[i], vf);
            }
        }
    }

    sync_block();
    // y passes through shared memory, each warp's rows by themselves, so that it is stored in whole chunks.
    T* tile = s.ring[0][0];
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int h = 0; h < 2; h++) {
            float a = sum[i][h];
            a += shfl_xor(a, 1);
            a += shfl_xor(a, 2);
            const float share = 1.0f / a;
            UNROLL
            for (int n = 0; n < D / 8; n++) {
                const Vec<unsigned, 1> word = {pack2<T>(o[i][n][2 * h] * share, o[i][n][2 * h + 1] * share)};
                T* at = tile + chunk(own + 16 * i + l / 4 + 8 * h, n) + 2 * quad;
                store_shared(reinterpret_cast<unsigned*>(at), word);
            }
        }
    }
    sync_warp();
    T* y = p.y + ((long long)block_z() * p.t + t0) * p.ldy + head;
    UNROLL
    for (int i = l; i < 16 * TILES * PITCH; i += WARP) {
        const int r = own + i / PITCH, c = i % PITCH;
        const Vec<T, 8> part = load_shared<8>(tile + chunk(r, c));
        if (r < rows && c * 8 < p.d) store(y + (long long)r * p.ldy + c * 8, part);
    }
}
