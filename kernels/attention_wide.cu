// y = softmax(scale · q kᵀ) v per head on tensor cores, for heads up to 512 wide (the autoencoder's), in one pass over
// blocks of 32 keys (FlashAttention-2, Dao 2023).
//
// Grid: (ceil(T / BM), N, B). A block owns BM queries of one head. Its eight warps are 4 groups of 16 queries × 2 halves,
// warp w the half w / 4 of group w % 4: half h of a group computes the scores of keys 16h … 16h+15 of a block of keys, and owns columns h·D/2 … of the result.
// q stays in shared memory. k and v pass through a ring of two slots as four pieces of D·32 bytes: columns 0 … D/2-1 of
// the keys, then the other columns; keys 0 to 15 of v, then 16 to 31. Scores (`sc`) and result (`o`, D/4 registers) are
// f32 accumulators. The weights p of a half are packed to the left operand of a product in registers, 16 bytes a thread,
// and go to the thread of the same lane in the other half through `p`, one place for each such pair: half 0 hands over
// before the first piece of v, half 1 before the second, so that the one who writes is always the one who read last.
//
// Barrier 1 of the first turn also makes q visible; the one after the loop exchanges the halves' sums, and y then takes q's place.
// There is at least one turn (see Wants).
//
// Barriers of a turn. Before all but the fourth each thread waits for its copies, which the barrier makes visible to all:
//   1  columns of k are there; slot 1 is free (v of the last turn is used up)          copies the other columns into it
//   2  the other columns are there; slot 0 is free                                     copies the first keys of v
//   3  the first keys of v are there, and each half's maxima; slot 1 is free           copies the other keys of v
//   4  half 0's weights are there
//   5  the other keys of v and half 1's weights are there; slot 0 is free              copies k of the next turn
//
// Shared memory: rows are a multiple of 8 chunks of 16 bytes; chunk c of row r lies at chunk c ^ (r & 7) of its row. ldmatrix
// reads a chunk of rows 8i … 8i+7, which the exclusive or puts into 8 different chunk columns; a copy's 8 chunks in a row are
// permuted among themselves: no conflicts.
//
// Softmax, in base 2: p = 2^(s·c - m), c = scale · log2 e. m is the row's maximum at some time, and moves only when a
// score passes it by more than 8: till then p is at most 2^8, which 16 bits hold, and the last division undoes any common
// factor. What m does depends on its own row alone. m starts at the lowest finite value, so that -inf scores give p = 0; a row
// whose scores are all -inf ends as 0 / 0, and a NaN in a row passes into its sum: both become NaN in y, as does a score of +inf.
// A NaN or an inf in v reaches its column of y in every query that shares the turn, seen or not, as 0 · inf.
//
// Edges: rows from S on (T for q) and columns from d on are zeros in shared memory; scores of keys that a query does not
// see are -inf. Columns from d on and rows from T on of y are not stored. A copy that writes zeros touches no memory at its address,
// which may lie outside.
// Wants: pointers aligned to 16 bytes and not null, d <= D, d and the pitches (ldy too) multiples of 8, scale > 0; S > 0, and with `causal`
// S >= T.
// Occupancy: one block a multiprocessor, by registers (187 to 255 of 256 threads; two blocks would need at most 128); on sm_80 at D = 512, on sm_86 and sm_89 at any D,
// also by shared memory: 50.5, 74.5 and 98.5 KB.
//
// types: f16 bf16
// variants: D=256 D=384 D=512
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int BM = 64;
constexpr int BN = 32;
constexpr int KEY_PITCH = D / 16;  // chunks in a row of a piece of k
constexpr int PITCH = D / 8;       // chunks in a row of q, v, y
constexpr int SMEM_BYTES = 2 * BM * D + 2 * BN * D + 16 * BLOCK / 2 + 4 * 2 * BM;
// Instructions of a turn, which a test counts in the machine code.
constexpr int LOOP_HMMA = D / 4, LOOP_LDSM = D / 16 * 3, LOOP_LDGSTS = 2 * BN * PITCH / BLOCK;

struct AttentionWideFwd {
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

struct alignas(128) WideSmem {
    T q[BM * D];
    T ring[2][BN * D / 2];
    unsigned p[BLOCK / 2][4];
    float top[2][BM];
};
static_assert(sizeof(WideSmem) == SMEM_BYTES, "what the launch asks for");
static_assert(D % 128 == 0 && BN * KEY_PITCH % BLOCK == 0, "whole groups of 8 chunks, and every thread copies alike");

// Where chunk c of row r begins in rows of LD chunks, in elements.
template <int LD>
DEV int chunk(int r, int c) {
    return (r * LD + (c ^ (r & 7))) * 8;
}

// Starts the copy of ROWS rows, LD chunks of each from chunk c0 on; rows from `rows` on and columns from d on become zeros.
template <int ROWS, int LD>
DEV void copy_piece(T* tile, const T* from, int rows, int c0, int ld, int d) {
    UNROLL
    for (int i = 0; i < ROWS * LD / BLOCK; i++) {
        const int at = i * BLOCK + int(thread_x()), r = at / LD, c = at % LD;
        cp_async(tile + chunk<LD>(r, c), from + r * ld + (c0 + c) * 8, r < rows && (c0 + c) * 8 < d);
    }
    cp_async_commit();
}

// o += p · v for 16 keys and half of the columns.
DEV void add_values(float (&o)[D / 16][4], const unsigned (&pf)[4], const T* piece, int half) {
    const int l = lane();
    UNROLL
    for (int n = 0; n < D / 32; n++) {
        unsigned vf[4];
        ldmatrix_trans(vf, piece + chunk<PITCH>(l % 16, half * (D / 16) + 2 * n + l / 16));
        const unsigned low[2] = {vf[0], vf[1]}, high[2] = {vf[2], vf[3]};
        mma<T>(o[2 * n], pf, low);
        mma<T>(o[2 * n + 1], pf, high);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 1) attention_wide_fwd(const __grid_constant__ AttentionWideFwd p) {
    griddep_wait();
    WideSmem& s = smem_dynamic<WideSmem>();
    const int l = lane(), quad = l % 4, own = warp() % 4 * 16, half = warp() / 4, pair = warp() % 4 * WARP + l;
    const int t0 = block_x() * BM, head = block_y() * p.d;
    const T* q = p.q + ((long long)block_z() * p.t + t0) * p.ldq + head;
    const T* k = p.k + (long long)block_z() * p.s * p.ldk + head;
    const T* v = p.v + (long long)block_z() * p.s * p.ldv + head;
    const int rows = p.t - t0 < BM ? p.t - t0 : BM;
    // Keys that the last query of the block sees, and those that all of them see.
    const int visible = p.causal ? t0 + rows + p.s - p.t : p.s;
    const int common = p.causal ? t0 + 1 + p.s - p.t : p.s;

    copy_piece<BM, PITCH>(s.q, q, rows, 0, p.ldq, p.d);
    copy_piece<BN, KEY_PITCH>(s.ring[0], k, p.s, 0, p.ldk, p.d);
    float o[D / 16][4], m[2], sum[2];
    UNROLL
    for (int n = 0; n < D / 16; n++) {
        UNROLL
        for (int e = 0; e < 4; e++) o[n][e] = 0.0f;
    }
    UNROLL
    for (int h = 0; h < 2; h++) m[h] = -FLOAT_MAX, sum[h] = 0.0f;

    for (int n0 = 0; n0 < visible; n0 += BN) {
        const T* values = v + (long long)n0 * p.ldv;
        float sc[2][4];
        UNROLL
        for (int i = 0; i < 8; i++) sc[i / 4][i % 4] = 0.0f;
        UNROLL
        for (int piece = 0; piece < 2; piece++) {
            cp_async_wait<0>();
            sync_block();
            if (piece == 0) {
                copy_piece<BN, KEY_PITCH>(s.ring[1], k + (long long)n0 * p.ldk, p.s - n0, KEY_PITCH, p.ldk, p.d);
            } else {
                copy_piece<BN / 2, PITCH>(s.ring[0], values, p.s - n0, 0, p.ldv, p.d);
            }
            UNROLL
            for (int j = 0; j < D / 32; j++) {
                unsigned qf[4], kf[4];
                ldmatrix(qf, s.q + chunk<PITCH>(own + l % 16, piece * KEY_PITCH + 2 * j + l / 16));
                ldmatrix(kf, s.ring[piece] + chunk<KEY_PITCH>(16 * half + l % 8 + l / 16 * 8, 2 * j + l / 8 % 2));
                const unsigned low[2] = {kf[0], kf[1]}, high[2] = {kf[2], kf[3]};
                mma<T>(sc[0], qf, low);
                mma<T>(sc[1], qf, high);
            }
        }

        float top[2] = {-FLOAT_INF, -FLOAT_INF};
        UNROLL
        for (int n = 0; n < 2; n++) {
            UNROLL
            for (int e = 0; e < 4; e++) {
                const int key = n0 + 16 * half + 8 * n + 2 * quad + e % 2, row = own + l / 4 + e / 2 * 8;
                const bool seen = key < p.s && (!p.causal || key < common + row);
                if (!seen) sc[n][e] = -FLOAT_INF;
                top[e / 2] = max_f(top[e / 2], sc[n][e]);
            }
        }
        UNROLL
        for (int h = 0; h < 2; h++) {
            top[h] = max_f(top[h], shfl_xor(top[h], 1));
            top[h] = max_f(top[h], shfl_xor(top[h], 2));
            if (quad == 0) s.top[half][own + l / 4 + 8 * h] = top[h];
        }
        cp_async_wait<0>();
        sync_block();
        copy_piece<BN / 2, PITCH>(s.ring[1], values + (long long)(BN / 2) * p.ldv, p.s - n0 - BN / 2, 0, p.ldv, p.d);

        // Both halves see the same maxima and decide alike.
        bool grows = false;
        UNROLL
        for (int h = 0; h < 2; h++) {
            top[h] = max_f(top[h], s.top[1 - half][own + l / 4 + 8 * h]) * p.scale;
            grows = grows || top[h] > m[h] + 8.0f;
        }
        if (ballot(grows)) {
            UNROLL
            for (int h = 0; h < 2; h++) {
                const float a = top[h] > m[h] + 8.0f ? top[h] : m[h], factor = exp2_fast_f(m[h] - a);
                m[h] = a;
                sum[h] *= factor;
                UNROLL
                for (int n = 0; n < D / 16; n++) {
                    o[n][2 * h] *= factor;
                    o[n][2 * h + 1] *= factor;
                }
            }
        }
        Vec<unsigned, 4> mine;
        UNROLL
        for (int w = 0; w < 4; w++) {
            float* of = sc[w / 2] + w % 2 * 2;
            UNROLL
            for (int e = 0; e < 2; e++) {
                of[e] = exp2_fast_f(fma_f(of[e], p.scale, -m[w % 2]));
                sum[w % 2] += of[e];
            }
            mine[w] = pack2<T>(of[0], of[1]);
        }
        if (half == 0) store_shared(s.p[pair], mine);
        sync_block();
        Vec<unsigned, 4> pf = half == 0 ? mine : load_shared<4>(s.p[pair]);
        add_values(o, pf.v, s.ring[0], half);
        if (half == 1) store_shared(s.p[pair], mine);
        cp_async_wait<0>();
        sync_block();
        if (n0 + BN < visible) {
            const int next = n0 + BN;
            copy_piece<BN, KEY_PITCH>(s.ring[0], k + (long long)next * p.ldk, p.s - next, 0, p.ldk, p.d);
        }
        if (half == 0) pf = load_shared<4>(s.p[pair]);
        else pf = mine;
        add_values(o, pf.v, s.ring[1], half);
    }

    UNROLL
    for (int h = 0; h < 2; h++) {
        sum[h] += shfl_xor(sum[h], 1);
        sum[h] += shfl_xor(sum[h], 2);
        if (quad == 0) s.top[half][own + l / 4 + 8 * h] = sum[h];
    }
    sync_block();
    // y passes through the memory of q, each warp's part by itself, so that it is stored in whole chunks.
    UNROLL
    for (int h = 0; h < 2; h++) {
        const int r = own + l / 4 + 8 * h;
        const float share = 1.0f / (s.top[0][r] + s.top[1][r]);
        UNROLL
        for (int n = 0; n < D / 16; n++) {
            const Vec<unsigned, 1> word = {pack2<T>(o[n][2 * h] * share, o[n][2 * h + 1] * share)};
            store_shared(reinterpret_cast<unsigned*>(s.q + chunk<PITCH>(r, half * KEY_PITCH + n) + 2 * quad), word);
        }
    }
    sync_warp();
    T* y = p.y + ((long long)block_z() * p.t + t0) * p.ldy + head;
    UNROLL
    for (int i = l; i < 16 * KEY_PITCH; i += WARP) {
        const int r = own + i / KEY_PITCH, c = half * KEY_PITCH + i % KEY_PITCH;
        const Vec<T, 8> part = load_shared<8>(s.q + chunk<PITCH>(r, c));
        if (r < rows && c * 8 < p.d) store(y + (long long)r * p.ldy + c * 8, part);
    }
}
