// y = softmax(scale · q kᵀ) v per head on tensor cores, for many queries: products and exponentials at the same time
// (FlashAttention-3, Shah et al. 2024, section 3.2, within one warp).
//
// Grid: (ceil(T / BM), N, B). A block owns BM queries of one head, each of its four warps BM / 4 of them, in two tiles of 16, and
// walks over the keys, BN in a turn. Operands of a warp: q is read once into registers (`qf`, left operand, and `qh`, its last 8
// columns where D is an odd multiple of 8: a product of half the depth); the scores of its queries × KEYS keys and the result
// (`o`) are f32 accumulators in registers; the weights p become 16 bits in registers, where the accumulator's layout is that of a
// left operand. k and v are read from shared memory, an ldmatrix (a `group` below) at a time.
//
// A turn is of two steps, each of KEYS = BN / 2 keys. A step turns scores into weights, and meanwhile has two products that do
// not wait for them: q kᵀ of the keys of the step after, and p v of those of the step before. So tensor cores and
// exponentials overlap within a warp: a multiprocessor holds only eight warps, too few for one to hide what another waits for.
// The first scores stand before the loop, with the step that has no p v yet; behind it are the step that has no q kᵀ any more,
// and the last p v. For few turns these cost more than the overlap brings: `attention_flash` is for those.
//
// k and v lie in a ring of two stages in shared memory. As p v lags, a stage holds the keys of a block and the values of
// the block before. Waits: before the loop, a wait and a barrier make q (staged in stage 1, across its k and v) and the first keys
// visible, and a second barrier frees stage 1 of q. Each turn waits for its stage, which was asked for a turn before, and then
// passes the turn's only barrier: behind it everybody's copies of this stage are visible, and everybody has left the other
// stage, which is filled again at once. What follows the loop waits for the last values likewise. Then the other stage is
// free, and y passes through it in the layout of q: a warp writes and reads its own rows alone, with a barrier of the warp
// between.
//
// Shared memory: rows of PITCH chunks of 16 bytes, PITCH = 2^A · odd. Chunk c of row r lies at chunk
// r · PITCH + (c ^ x), where only the low A bits of c are changed, and x is the A bits of r from bit 3 - A on.
// Without conflicts, since each pass, eight lanes of 16 bytes, touches each of the 8 chunk columns (mod 8) once:
//   ldmatrix reads chunk c of rows 8i … 8i+7. Rows with different x differ in the low A bits of c ^ x, to which r · PITCH,
//   a multiple of 2^A, adds nothing; the 2^(3-A) consecutive rows of one x differ in odd · r mod 2^(3-A).
//   cp_async and the rows of y move 8 chunks from a multiple of 8 on in the order of r · PITCH + c; the exclusive or
//   permutes them within aligned groups of 2^A. The words of y are written as ldmatrix reads.
// 16 rows down x is the same, and 2^A chunks on the low bits of c are: a lane needs few addresses, and constants added to them.
//
// Softmax, in base 2: p = 2^(s·c - m), c = scale · log2 e. m is the row's maximum in one of the steps so far. A step takes it
// as it is, and looks at the sums of its weights, which a lane has of its own keys and needs anyway: where the sum of one of the
// row's four lanes passes 2^8, m becomes the maximum of the row's scores in this step, if that is larger, o and the sum are
// scaled to it, and the step's weights are computed anew. Till then p does not pass 2^8, which 16 bits hold, and the last
// division undoes any common factor. So most steps have no maximum, no shuffles and no rescaling. What m does depends on its own
// row alone, so a row's result has the same bits whatever its neighbours are. m starts at the lowest finite value: -inf scores
// give p = 0, and the first others an infinite sum, so that m is set; a row whose scores are all -inf ends as 0 / 0, and a NaN in
// a row passes into its sum: both become NaN in y, as does a score of +inf. This holds for finite v: an inf or a NaN there
// reaches its column of y in every query that shares the turn, seen or not, as 0 · inf. The sum is of the weights before
// rounding; a lane sums its own keys, by steps, and four lanes add up at the end.
//
// Edges: rows from S on (T for q) and columns from d on are zeros in shared memory; scores of keys that a query does not
// see are -inf, set in those steps alone that have such keys. Columns from d on and rows from T on of y are not
// stored. A copy that writes zeros touches no memory at its address, which may lie outside.
// Wants: pointers aligned to 16 bytes and not null, d <= D, d and the pitches (ldy too) multiples of 8, scale > 0; S > 0, and with
// `causal` S >= T.
// Occupancy: two blocks are asked for, which is what registers allow (246 to 254 of a thread); shared memory (24 KB for D = 40,
// 32 KB for 64) allows more.
//
// types: f16 bf16
// variants: BM=128,D=40 BM=128,D=64
#include "dev.cuh"

constexpr int WARPS = 4;
constexpr int BLOCK = 128;
constexpr int BN = 64;                      // keys of a turn
constexpr int KEYS = BN / 2;                // and of a step
constexpr int TILES = BM / (16 * WARPS);    // tiles of 16 queries in a warp
constexpr int STEPS = D / 16;               // steps of 16 columns of q kᵀ
constexpr int HALF = D % 16 / 8;            // and of 8
constexpr int PITCH = 2 * (STEPS + HALF);   // chunks in a row
constexpr int A = PITCH % 8 == 0 ? 3 : PITCH % 4 == 0 ? 2 : 1;
constexpr int BLOCKS = 2;                   // on a multiprocessor
// Instructions of a turn, which a test counts in the machine code.
constexpr int LOOP_HMMA = TILES * ((STEPS + HALF) * BN / 8 + BN / 16 * D / 8), LOOP_LDGSTS = 2 * BN * PITCH / BLOCK;
constexpr int LOOP_LDSM = BN / 16 * (STEPS + STEPS + HALF) + HALF * BN / 32;

struct AttentionLongFwd {
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

struct alignas(128) LongSmem {
    T ring[2][2][BN * PITCH * 8];  // stage; k, v
};
static_assert(2 * BN >= BM && BN * PITCH % BLOCK == 0, "a stage holds q, and every thread copies alike");

#include "attention_tile.cuh"

// What a thread copies of every block of keys: the chunks at `at`, of columns that are in the head or not, and the same
// PASS rows down.
constexpr int COPIES = BN * PITCH / BLOCK, OWN = BLOCK % PITCH == 0 ? 1 : COPIES, PASS = BLOCK * OWN / PITCH;
static_assert(COPIES % OWN == 0 && PASS % 8 == 0, "rows of a pass have the exclusive or of those above");
struct Chunks {
    int row[OWN], at[OWN];
    bool in[OWN];
};

// Starts the copy of BN rows of a head, of which the thread's chunks are at `off`; rows from `rows` on become zeros.
DEV void copy_tile(T* tile, const T* from, const Chunks& own, const int (&off)[OWN], int rows, int ld) {
    UNROLL
    for (int i = 0; i < COPIES; i++) {
        const int n = i % OWN, down = i / OWN * PASS;
        cp_async(tile + own.at[n] + down * PITCH * 8, from + off[n] + down * ld, own.row[n] + down < rows && own.in[n]);
    }
}
constexpr int COLUMNS = 1 << (A - 1);  // pairs of chunks until the exclusive or of `chunk` comes round

// What a lane has of its warp's queries.
struct Rows {
    unsigned qf[TILES][STEPS][4], qh[TILES][2];
    float o[TILES][D / 8][4], m[TILES][2], sum[TILES][2];
};
typedef float Scores[TILES][KEYS / 8][4];
typedef unsigned Weights[TILES][KEYS / 16][4];

// The products of a step, in groups of one ldmatrix each: first of q kᵀ, by 16 columns and by 8; then of p v.
constexpr int LOADS_Q = KEYS / 16 * STEPS, LOADS_H = HALF * KEYS / 32;
constexpr int LOADS_K = LOADS_Q + LOADS_H, LOADS_V = KEYS / 16 * (STEPS + HALF);

// The operand from shared memory of group g. `kl` and `vl` are where the lane's row begins for each pair of chunks.
DEV void load_group(unsigned (&f)[4], int g, const T* kt, const int (&kl)[COLUMNS], int hl, const T* vt, const int (&vl)[COLUMNS]) {
    if (g < LOADS_Q) {
        // 16 keys × 16 columns: words 0, 1 are keys 0 to 7, words 2, 3 keys 8 to 15.
        const int n = g / STEPS, j = g % STEPS;
        ldmatrix(f, kt + kl[j % COLUMNS] + (16 * n * PITCH + j / COLUMNS * COLUMNS * 2) * 8);
    } else if (g < LOADS_K) {
        // 32 keys × 8 columns: word w is keys 8w to 8w + 7.
        ldmatrix(f, kt + hl + 32 * (g - LOADS_Q) * PITCH * 8);
    } else {
        // 16 keys × 16 columns: words 0, 1 are columns 0 to 7, words 2, 3 columns 8 to 15.
        const int j = (g - LOADS_K) / (STEPS + HALF), n = (g - LOADS_K) % (STEPS + HALF);
        const T* at = vt + vl[n % COLUMNS] + (16 * j * PITCH + n / COLUMNS * COLUMNS * 2) * 8;
        if (n < STEPS) {
            ldmatrix_trans(f, at);
        } else {
            unsigned two[2];
            ldmatrix_trans(two, at);
            f[0] = two[0], f[1] = two[1];
        }
    }
}

DEV void multiply_group(const unsigned (&f)[4], int g, Rows& w, Scores& next, const Weights& old) {
    const unsigned low[2] = {f[0], f[1]}, high[2] = {f[2], f[3]};
    if (g < LOADS_Q) {
        const int n = g / STEPS, j = g % STEPS;
        UNROLL
        for (int i = 0; i < TILES; i++) {
            mma<T>(next[i][2 * n], w.qf[i][j], low);
            mma<T>(next[i][2 * n + 1], w.qf[i][j], high);
        }
    } else if (g < LOADS_K) {
        UNROLL
        for (int n = 0; n < 4; n++) {
            UNROLL
            for (int i = 0; i < TILES; i++) mma<T>(next[i][4 * (g - LOADS_Q) + n], w.qh[i], f[n]);
        }
    } else {
        const int j = (g - LOADS_K) / (STEPS + HALF), n = (g - LOADS_K) % (STEPS + HALF);
        UNROLL
        for (int i = 0; i < TILES; i++) {
            mma<T>(w.o[i][2 * n], old[i][j], low);
            if (n < STEPS) mma<T>(w.o[i][2 * n + 1], old[i][j], high);
        }
    }
}

constexpr float MOST = 256.0f;  // that the sum of a lane's weights in a step may be before m moves

// Two of the weights, and their part of the sums.
DEV void weigh(const Scores& sc, Weights& p, float (&part)[TILES][2], const Rows& w, float scale, int at) {
    const int i = at / 2 % TILES, n = at / 2 / TILES, h = at % 2;
    const float a = exp2_fast_f(fma_f(sc[i][n][2 * h], scale, -w.m[i][h]));
    const float b = exp2_fast_f(fma_f(sc[i][n][2 * h + 1], scale, -w.m[i][h]));
    part[i][h] = n == 0 ? a : part[i][h] + a;
    part[i][h] += b;
    p[i][n / 2][n % 2 * 2 + h] = pack2<T>(a, b);
}
constexpr int PAIRS = TILES * KEYS / 8 * 2;

// A step: the weights of the scores `sc`, and among them q kᵀ of the keys of the next step (with K), to `next`, and p v of the
// step before (with V), whose weights are `old`. The products of a group come with the loads of the group after.
template <bool K, bool V>
DEV void step(Rows& w, Scores& sc, Scores& next, Weights& p, const Weights& old, float scale, const T* kt, const int (&kl)[COLUMNS], int hl,
              const T* vt, const int (&vl)[COLUMNS]) {
    constexpr int FROM = K ? 0 : LOADS_K, TO = V ? LOADS_K + LOADS_V : LOADS_K;
    float part[TILES][2];
    UNROLL
    for (int i = 0; i < TILES; i++) {
        if (K) {
            UNROLL
            for (int n = 0; n < KEYS / 8; n++) {
                UNROLL
                for (int e = 0; e < 4; e++) next[i][n][e] = 0.0f;
            }
        }
    }
    unsigned f[2][4];
    load_group(f[FROM % 2], FROM, kt, kl, hl, vt, vl);
    UNROLL
    for (int g = FROM; g < TO; g++) {
        if (g + 1 < TO) load_group(f[(g + 1) % 2], g + 1, kt, kl, hl, vt, vl);
        multiply_group(f[g % 2], g, w, next, old);
        UNROLL
        for (int at = (g - FROM) * PAIRS / (TO - FROM); at < (g + 1 - FROM) * PAIRS / (TO - FROM); at++) weigh(sc, p, part, w, scale, at);
    }
    bool over = false;
    UNROLL
    for (int i = 0; i < TILES; i++) over = over || !(part[i][0] <= MOST) || !(part[i][1] <= MOST);
    if (ballot(over)) {
        UNROLL
        for (int i = 0; i < TILES; i++) {
            UNROLL
            for (int h = 0; h < 2; h++) {
                float a = -FLOAT_INF;
                UNROLL
                for (int n = 0; n < KEYS / 8; n++) a = max_f(a, max_f(sc[i][n][2 * h], sc[i][n][2 * h + 1]));
                a = max_f(a, shfl_xor(a, 1));
                a = max_f(a, shfl_xor(a, 2)) * scale;
                const bool row = ballot(!(part[i][h] <= MOST)) >> (lane() & ~3u) & 15u;
                if (!row || !(a > w.m[i][h])) a = w.m[i][h];
                const float factor = exp2_fast_f(w.m[i][h] - a);
                w.m[i][h] = a;
                w.sum[i][h] *= factor;
                UNROLL
                for (int n = 0; n < D / 8; n++) {
                    w.o[i][n][2 * h] *= factor;
                    w.o[i][n][2 * h + 1] *= factor;
                }
            }
        }
        UNROLL
        for (int at = 0; at < PAIRS; at++) weigh(sc, p, part, w, scale, at);
    }
    UNROLL
    for (int i = 0; i < TILES; i++) {
        w.sum[i][0] += part[i][0];
        w.sum[i][1] += part[i][1];
    }
}

// Hides from a step's scores what a query does not see. `first` is the lane's first key and `row` its first query; query 0 sees
// `common` keys where `causal`, the next one more each.
DEV void hide(Scores& sc, int first, int row, int keys, int common, int causal) {
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int h = 0; h < 2; h++) {
            const int seen = common + row + 16 * i + 8 * h, end = causal && seen < keys ? seen : keys;
            UNROLL
            for (int n = 0; n < KEYS / 8; n++) {
                UNROLL
                for (int e = 0; e < 2; e++) {
                    if (first + 8 * n + e >= end) sc[i][n][2 * h + e] = -FLOAT_INF;
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) attention_long_fwd(const __grid_constant__ AttentionLongFwd p) {
    griddep_wait();
    LongSmem& s = smem<LongSmem>();
    const int l = lane(), quad = l % 4, t0 = block_x() * BM, own = warp() * (16 * TILES), head = block_y() * p.d;
    const int rows = p.t - t0 < BM ? p.t - t0 : BM;
    // Keys that the last query of the block sees, and those that all of them see.
    const int visible = p.causal ? t0 + rows + p.s - p.t : p.s;
    const int common = p.causal ? t0 + 1 + p.s - p.t : p.s;
    Chunks c;
    int ok[OWN], ov[OWN];  // their places in k and v, from the block's first key on
    UNROLL
    for (int i = 0; i < OWN; i++) {
        const int n = i * BLOCK + int(thread_x()), row = n / PITCH, column = n % PITCH;
        c.row[i] = row;
        c.at[i] = chunk(row, column);
        c.in[i] = column * 8 < p.d;
        ok[i] = row * p.ldk + column * 8;
        ov[i] = row * p.ldv + column * 8;
    }
    const T* k = p.k + (long long)block_z() * p.s * p.ldk + head;
    const T* v = p.v + (long long)block_z() * p.s * p.ldv + head;

    T* staged = s.ring[1][0];
    const T* q = p.q + ((long long)block_z() * p.t + t0) * p.ldq + head;
    UNROLL
    for (int i = 0; i < BM * PITCH / BLOCK; i++) {
        const int n = i * BLOCK + int(thread_x()), row = n / PITCH, column = n % PITCH;
        cp_async(staged + chunk(row, column), q + row * p.ldq + column * 8, row < rows && column * 8 < p.d);
    }
    copy_tile(s.ring[0][0], k, c, ok, p.s, p.ldk);
    cp_async_commit();
    // Lane l's place in a group's operand.
    int kl[COLUMNS], vl[COLUMNS];
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
        kl[i] = chunk(l % 8 + l / 16 * 8, 2 * i + l / 8 % 2);
        vl[i] = chunk(l % 16, 2 * i + l / 16);
    }
    const int hl = HALF ? chunk(l, 2 * STEPS) : 0;
    Rows w;
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int n = 0; n < D / 8; n++) {
            UNROLL
            for (int e = 0; e < 4; e++) w.o[i][n][e] = 0.0f;
        }
        UNROLL
        for (int h = 0; h < 2; h++) w.m[i][h] = -FLOAT_MAX, w.sum[i][h] = 0.0f;
    }
    cp_async_wait<0>();
    sync_block();
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int j = 0; j < STEPS; j++) ldmatrix(w.qf[i][j], staged + vl[j % COLUMNS] + ((own + 16 * i) * PITCH + j / COLUMNS * COLUMNS * 2) * 8);
        if (HALF) ldmatrix(w.qh[i], staged + vl[STEPS % COLUMNS] + ((own + 16 * i) * PITCH + STEPS / COLUMNS * COLUMNS * 2) * 8);
    }
    sync_block();
    copy_tile(s.ring[1][0], k + (long long)BN * p.ldk, c, ok, p.s - BN, p.ldk);
    copy_tile(s.ring[1][1], v, c, ov, p.s, p.ldv);
    cp_async_commit();

    Scores even, odd;
    Weights pe, po;
    const int row = own + l / 4, key = 2 * quad;
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int n = 0; n < KEYS / 8; n++) {
            UNROLL
            for (int e = 0; e < 4; e++) even[i][n][e] = 0.0f;
        }
    }
    UNROLL
    for (int g = 0; g < LOADS_K; g++) {
        unsigned f[4];
        load_group(f, g, s.ring[0][0], kl, hl, nullptr, vl);
        multiply_group(f, g, w, even, po);
    }
    if (KEYS > common) hide(even, key, row, p.s, common, p.causal);
    step<true, false>(w, even, odd, pe, po, p.scale, s.ring[0][0] + KEYS * PITCH * 8, kl, hl, nullptr, vl);
    if (BN > common) hide(odd, KEYS + key, row, p.s, common, p.causal);

    int stage = 1;
    for (int n0 = BN; n0 < visible; n0 += BN, stage ^= 1) {
        cp_async_wait<0>();
        sync_block();
        k += (long long)BN * p.ldk;
        v += (long long)BN * p.ldv;
        copy_tile(s.ring[stage ^ 1][0], k + (long long)BN * p.ldk, c, ok, p.s - n0 - BN, p.ldk);
        copy_tile(s.ring[stage ^ 1][1], v, c, ov, p.s - n0, p.ldv);
        cp_async_commit();
        const T *kt = s.ring[stage][0], *vt = s.ring[stage][1];
        step<true, true>(w, odd, even, po, pe, p.scale, kt, kl, hl, vt, vl);
        if (n0 + KEYS > common) hide(even, n0 + key, row, p.s, common, p.causal);
        step<true, true>(w, even, odd, pe, po, p.scale, kt + KEYS * PITCH * 8, kl, hl, vt + KEYS * PITCH * 8, vl);
        if (n0 + BN > common) hide(odd, n0 + KEYS + key, row, p.s, common, p.causal);
    }
    cp_async_wait<0>();
    sync_block();
    const T* vt = s.ring[stage][1];
    step<false, true>(w, odd, even, po, pe, p.scale, nullptr, kl, hl, vt, vl);
    UNROLL
    for (int g = LOADS_K; g < LOADS_K + LOADS_V; g++) {
        unsigned f[4];
        load_group(f, g, nullptr, kl, hl, vt + KEYS * PITCH * 8, vl);
        multiply_group(f, g, w, even, po);
    }

    T* tile = s.ring[stage ^ 1][0];

    // y passes through shared memory, each warp's rows by themselves, so that it is stored in whole chunks.
    UNROLL
    for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int h = 0; h < 2; h++) {
            float a = w.sum[i][h];
            a += shfl_xor(a, 1);
            a += shfl_xor(a, 2);
            const float share = 1.0f / a;
            UNROLL
            for (int n = 0; n < D / 8; n++) {
                const Vec<unsigned, 1> word = {pack2<T>(w.o[i][n][2 * h] * share, w.o[i][n][2 * h + 1] * share)};
                T* to = tile + chunk(own + 16 * i + l / 4 + 8 * h, n) + 2 * quad;
                store_shared(reinterpret_cast<unsigned*>(to), word);
            }
        }
    }
    sync_warp();
    T* y = p.y + ((long long)block_z() * p.t + t0) * p.ldy + head;
    UNROLL
    for (int i = l; i < 16 * TILES * PITCH; i += WARP) {
        const int own_row = own + i / PITCH, column = i % PITCH;
        const Vec<T, 8> part = load_shared<8>(tile + chunk(own_row, column));
        if (own_row < rows && column * 8 < p.d) store(y + (long long)own_row * p.ldy + column * 8, part);
    }
}
