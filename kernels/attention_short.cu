// y = softmax(scale · q kᵀ) v per head on tensor cores, where keys are few (the tokens of a text): all of them stay on chip, a
// query's scores stand in registers at once, and the softmax takes one pass.
//
// Grid: (ceil(T / (BM · walk)), N, B). A block loads the keys and values of its head once and walks over up to `walk` tiles
// of BM queries. Each of its four warps has 16 queries of every tile, and goes its own way after the one barrier.
// Operands of a warp: q is read into registers (`qf`, left operand, and `qh`, its last 8 columns where D is an odd multiple of
// 8: a product of half the depth); the scores of 16 queries × KEYS keys (`sc`) and then the
// result (`o`) are f32 accumulators in registers; the weights p become 16 bits in registers (`pf`), where the accumulator's
// layout is that of a left operand. k and v lie in shared memory. A warp has two slots of 16 rows there: one holds the q of this
// turn and then, in its place, y on its way out; into the other the q of the next turn is copied meanwhile.
//
// Waits: before the loop, wait<0> and the block's barrier make k, v and everybody's first q visible. In a turn all is the
// warp's own: behind the products wait<0> and a barrier of the warp make the next q visible, and y of this turn to the lanes
// that store it. No other barrier is needed: ldmatrix and mma keep a warp together, so no lane still reads q when another
// writes y over it; and a lane copies the next q over those chunks of y alone that it has stored itself.
//
// Shared memory: rows of PITCH chunks of 16 bytes, PITCH = 2^A · odd. Chunk c of row r lies at chunk r · PITCH + (c ^ x),
// x = the A bits of r from bit 3 - A on (A at most 3). Without conflicts, since each eight lanes of an access, 16 bytes each, touch
// each of the 8 chunk columns (mod 8) once: eight rows of one ldmatrix either differ in x, or in odd · r mod 2^(3-A); copies
// and the reads of y take chunks in their order, which x permutes within aligned groups of 2^A. The words of y are
// written as ldmatrix reads.
//
// Softmax, in base 2: p = 2^(s·c - m), c = scale · log2 e, m = c · the row's largest score; the sum is divided out at the end.
// A row whose scores are all -inf, one with +inf and one with a NaN become NaN.
//
// Edges: rows from S on (T for q) and columns from d on are zeros in shared memory; scores of keys from S on are -inf. S is
// more than FEWEST, so that the first scores are not looked at. Columns from d on and rows from T on of y are not stored. A
// copy that writes zeros touches no memory at its address, which may lie outside.
// Wants: FEWEST < S <= KEYS, d <= D, a multiple of 8; pointers aligned to 16 bytes and not null, pitches multiples of 8, scale > 0. Every query
// sees every key.
// Occupancy: registers allow the BLOCKS that are asked for. Shared memory (27 to 90 KB) allows as many on sm_90; on sm_80 one
// where D is 160 and two where KEYS is 128 and D 80; on sm_86 and sm_89 one in these two variants, three of KEYS=80,D=40, and
// two of the others.
//
// types: f16 bf16
// variants: KEYS=80,D=40 KEYS=80,D=64 KEYS=80,D=80 KEYS=80,D=160 KEYS=128,D=40 KEYS=128,D=64 KEYS=128,D=80
#include "dev.cuh"

constexpr int BLOCK = 128;
constexpr int BM = 64;                        // queries of a tile
constexpr int FEWEST = KEYS == 80 ? 64 : 80;  // keys that are always there: S is more
constexpr int STEPS = D / 16;                 // steps of 16 columns of q kᵀ
constexpr int HALF = D % 16 / 8;              // and of 8
constexpr int ALL = STEPS + HALF;
constexpr int PITCH = 2 * ALL;                // chunks in a row
constexpr int TILE = 16 * PITCH * 8;          // elements of 16 rows
constexpr int A = PITCH % 8 == 0 ? 3 : PITCH % 4 == 0 ? 2 : 1;
constexpr int BLOCKS = D > 80 ? 2 : D > 64 || KEYS > 80 ? 3 : 4;  // on a multiprocessor
constexpr int SMEM_BYTES = (2 * KEYS + 2 * BM) * PITCH * 16;
// Instructions of a turn, which a test counts in the machine code.
constexpr int LOOP_HMMA = ALL * KEYS / 8 + KEYS / 16 * D / 8;
constexpr int LOOP_LDSM = ALL + KEYS / 16 * (STEPS + ALL) + HALF * (KEYS / 32 + KEYS % 32 / 16);
constexpr int LOOP_LDGSTS = ALL, LOOP_MUFU = KEYS / 2 + 2;

struct AttentionShortFwd {
    T* y;        // (B,T,N·d)
    const T* q;  // (B,T,N·d)
    const T* k;  // (B,S,N·d)
    const T* v;  // (B,S,N·d)
    int t, s, d;
    int ldq, ldk, ldv;  // elements from a token to the next
    int ldy;
    int walk;     // tiles of a block
    float scale;  // c: of the scores, times log2 e
};

struct alignas(128) ShortSmem {
    T k[KEYS * PITCH * 8];
    T v[KEYS * PITCH * 8];
    T slot[BLOCK / WARP][2][TILE];
};
static_assert(sizeof(ShortSmem) == SMEM_BYTES, "what the launch asks for");

#include "attention_tile.cuh"

// Starts the copy of the 16 rows of a warp's slot; rows from `rows` on and columns from d on become zeros.
DEV void copy_queries(T* to, const T* from, int rows, int ld, int d) {
    UNROLL
    for (int i = 0; i < ALL; i++) {
        const int at = i * WARP + int(lane()), r = at / PITCH, c = at % PITCH;
        cp_async(to + chunk(r, c), from + r * ld + c * 8, r < rows && c * 8 < d);
    }
}

// Starts the copies of keys and values by the block. A thread stays in one column of chunks, so that a copy costs few
// instructions: with a block's one turn or two they would be as many as those of the products.
DEV void copy_keys(ShortSmem& s, const AttentionShortFwd& p, int head) {
    constexpr int ROWS = BLOCK / PITCH;  // of a turn of the block
    const int c = thread_x() % PITCH, in = c * 8 < p.d ? p.s : 0;
    int r = thread_x() / PITCH;
    if (r >= ROWS) return;
    const T* k = p.k + ((long long)block_z() * p.s + r) * p.ldk + head + c * 8;
    const T* v = p.v + ((long long)block_z() * p.s + r) * p.ldv + head + c * 8;
    UNROLL
    for (int i = 0; i < ceil_div(KEYS, ROWS); i++) {
        if ((i + 1) * ROWS <= KEYS || r < KEYS) {
            cp_async(s.k + chunk(r, c), k, r < in);
            cp_async(s.v + chunk(r, c), v, r < in);
        }
        r += ROWS;
        k += ROWS * p.ldk;
        v += ROWS * p.ldv;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) attention_short_fwd(const __grid_constant__ AttentionShortFwd p) {
    griddep_wait();
    ShortSmem& s = smem_dynamic<ShortSmem>();
    const int l = lane(), quad = l % 4, head = block_y() * p.d;
    const int first = block_x() * p.walk * BM, end = first + p.walk * BM < p.t ? first + p.walk * BM : p.t;
    const int own = warp() * 16;  // of this warp's queries in a tile
    const T* q = p.q + ((long long)block_z() * p.t + first + own) * p.ldq + head;
    T* y = p.y + ((long long)block_z() * p.t + first + own) * p.ldy + head;

    copy_queries(s.slot[warp()][0], q, p.t - first - own, p.ldq, p.d);
    copy_keys(s, p, head);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();

    for (int at = first, turn = 0; at < end; at += BM, turn ^= 1) {
        T* slot = s.slot[warp()][turn];
        if (at + BM < end) {
            q += (long long)BM * p.ldq;
            copy_queries(s.slot[warp()][turn ^ 1], q, p.t - at - BM - own, p.ldq, p.d);
            cp_async_commit();
        }
        unsigned qf[STEPS][4], qh[2];
        UNROLL
        for (int j = 0; j < STEPS; j++) ldmatrix(qf[j], slot + chunk(l % 16, 2 * j + l / 16));
        if (HALF) ldmatrix(qh, slot + chunk(l % 16, 2 * STEPS));

        float sc[KEYS / 8][4] = {};
        UNROLL
        for (int j = 0; j < STEPS; j++) {
            UNROLL
            for (int n = 0; n < KEYS / 16; n++) {
                // 16 keys × 16 columns: words 0, 1 are keys 0 to 7, words 2, 3 keys 8 to 15.
                unsigned kf[4];
                ldmatrix(kf, s.k + chunk(l % 8 + l / 16 * 8, 2 * j + l / 8 % 2) + n * TILE);
                const unsigned low[2] = {kf[0], kf[1]}, high[2] = {kf[2], kf[3]};
                mma<T>(sc[2 * n], qf[j], low);
                mma<T>(sc[2 * n + 1], qf[j], high);
            }
        }
        if (HALF) {
            UNROLL
            for (int n = 0; n < KEYS / 32; n++) {
                // 32 keys × 8 columns: word w is keys 8w to 8w + 7.
                unsigned kf[4];
                ldmatrix(kf, s.k + chunk(l, 2 * STEPS) + 2 * n * TILE);
                UNROLL
                for (int w = 0; w < 4; w++) mma<T>(sc[4 * n + w], qh, kf[w]);
            }
            if (KEYS % 32 != 0) {
                unsigned kf[2];
                ldmatrix(kf, s.k + chunk(l % 16, 2 * STEPS) + KEYS / 32 * 2 * TILE);
                UNROLL
                for (int w = 0; w < 2; w++) mma<T>(sc[KEYS / 32 * 4 + w], qh, kf[w]);
            }
        }
        UNROLL
        for (int n = FEWEST / 8; n < KEYS / 8; n++) {
            UNROLL
            for (int e = 0; e < 4; e++) {
                if (8 * n + e % 2 >= p.s - 2 * quad) sc[n][e] = -FLOAT_INF;
            }
        }

        float share[2];
        UNROLL
        for (int h = 0; h < 2; h++) {
            float m = -FLOAT_INF, sum = 0.0f;
            UNROLL
            for (int n = 0; n < KEYS / 8; n++) m = max_f(m, max_f(sc[n][2 * h], sc[n][2 * h + 1]));
            m = max_f(m, shfl_xor(m, 1));
            m = max_f(m, shfl_xor(m, 2)) * p.scale;
            UNROLL
            for (int n = 0; n < KEYS / 8; n++) {
                UNROLL
                for (int e = 2 * h; e < 2 * h + 2; e++) {
                    sc[n][e] = exp2_fast_f(fma_f(sc[n][e], p.scale, -m));
                    sum += sc[n][e];
                }
            }
            sum += shfl_xor(sum, 1);
            share[h] = rcp_fast_f(sum + shfl_xor(sum, 2));
        }

        float o[D / 8][4] = {};
        UNROLL
        for (int j = 0; j < KEYS / 16; j++) {
            unsigned pf[4];
            UNROLL
            for (int w = 0; w < 4; w++) {
                const float* pair = sc[2 * j + w / 2] + w % 2 * 2;
                pf[w] = pack2<T>(pair[0], pair[1]);
            }
            UNROLL
            for (int n = 0; n < D / 16; n++) {
                // 16 keys × 16 columns: words 0, 1 are columns 0 to 7, words 2, 3 columns 8 to 15.
                unsigned vf[4];
                ldmatrix_trans(vf, s.v + chunk(l % 16, 2 * n + l / 16) + j * TILE);
                const unsigned low[2] = {vf[0], vf[1]}, high[2] = {vf[2], vf[3]};
                mma<T>(o[2 * n], pf, low);
                mma<T>(o[2 * n + 1], pf, high);
            }
            if (D % 16 != 0) {
                unsigned vf[2];
                ldmatrix_trans(vf, s.v + chunk(l % 16, D / 8 - 1) + j * TILE);
                mma<T>(o[D / 8 - 1], pf, vf);
            }
        }

        // y passes through the slot, so that it is stored in whole chunks.
        UNROLL
        for (int n = 0; n < D / 8; n++) {
            // Eight rows on, the same chunk lies TILE / 2 further.
            UNROLL
            for (int h = 0; h < 2; h++) {
                const Vec<unsigned, 1> word = {pack2<T>(o[n][2 * h] * share[h], o[n][2 * h + 1] * share[h])};
                store_shared(reinterpret_cast<unsigned*>(slot + chunk(l / 4, n) + h * (TILE / 2) + 2 * quad), word);
            }
        }
        cp_async_wait<0>();
        sync_warp();
        UNROLL
        for (int i = 0; i < ALL; i++) {
            const int r = (i * WARP + l) / PITCH, c = (i * WARP + l) % PITCH;
            const Vec<T, 8> part = load_shared<8>(slot + chunk(r, c));
            if (at + own + r < p.t && c * 8 < p.d) store(y + r * p.ldy + c * 8, part);
        }
        y += (long long)BM * p.ldy;
    }
}
