// y = softmax(scale · q kᵀ) v per head, in one pass over blocks of keys: running maximum m, sum l and result o per query.
// Grid: (ceil(T / BM), N, B); a block owns BM queries of one head, a group of LANES threads one query: the threads of a
// group share its scores (with 8 queries in a block only the first BN have one), and each keeps some elements of its result. T is
// the number of queries here, in the code the type of an element.
//
// Operands: q stays in shared memory as f32, times scale; BN keys, and then their values, pass through one buffer there. Rows
// are not padded and begin in the same bank: reads of k conflict (8 ways, 3 where D is 1024), and with 32 queries in a block
// those of q, the scores and the weights (4 ways). Barriers of a turn: the first makes the keys (and q) visible; the second the
// scores, and says that the keys are read; the third the weights and values; the fourth says that those are read. Edges: rows
// from S on (T for q) are zeros; keys that a query does not see have the score -inf; rows from T on and columns from d on are not
// stored. A NaN or an inf in v reaches its column of y, with `causal` also in queries of the block that do not see the key but
// share a turn with it, as 0 · inf. A row whose scores are all -inf, or with +inf or a NaN among them, becomes NaN. Wants: S > 0 and,
// with `causal`, S >= T, so that each query sees a key. Occupancy: two blocks a multiprocessor are asked for, that is at most 128
// registers for each thread (72 to 107 are used); without that the compiler aims at 80 or fewer, and spills at D = 512 on sm_90. So
// registers leave three, two, three, two in the order of the variants. Shared memory is 24, 48, 32.5 and 44.2 KB, which leaves fewer on
// sm_86 and sm_89 alone: two of the third.
// variants: D=64 D=160 D=512 D=1024
#include "dev.cuh"

constexpr int BLOCK = 256;

struct AttentionFwd {
    T* y;        // (B,T,N·d)
    const T* q;  // (B,T,N·d)
    const T* k;  // (B,S,N·d)
    const T* v;  // (B,S,N·d)
    int t, s, heads, d;  // d <= D
    float scale;
    int causal;  // query i sees keys up to i + S − T
};

template <int SIZE>
struct AttentionTile {
    static constexpr int BM = SIZE <= 160 ? 32 : 8;             // queries
    static constexpr int BN = SIZE <= 160 ? 32 : SIZE <= 512 ? 8 : 3;  // keys: 48 KB hold them, q and the scores
    static constexpr int LANES = BLOCK / BM;
    struct Smem {
        float q[BM][SIZE];
        float kv[BN][SIZE];
        float scores[BM][BN];
        float p[BM][BN];
    };
};

extern "C" __global__ void __launch_bounds__(BLOCK, 2) attention_fwd(const __grid_constant__ AttentionFwd p) {
    griddep_wait();
    typedef AttentionTile<D> Tile;
    constexpr int BM = Tile::BM, BN = Tile::BN, LANES = Tile::LANES, OWN = D / LANES;
    Tile::Smem& s = smem<Tile::Smem>();
    const int thread = thread_x(), row = thread / LANES, own = thread % LANES, t0 = block_x() * BM;
    const int width = p.heads * p.d, head = block_y() * p.d;
    const T* q = p.q + (long long)block_z() * p.t * width + head;
    const T* k = p.k + (long long)block_z() * p.s * width + head;
    const T* v = p.v + (long long)block_z() * p.s * width + head;

    for (int i = thread; i < BM * p.d; i += BLOCK) {
        const int r = i / p.d, c = i - r * p.d;
        s.q[r][c] = t0 + r < p.t ? to_float(load(q + (long long)(t0 + r) * width + c)) * p.scale : 0.0f;
    }

    // The last query of the block sees the most keys.
    const int last = t0 + BM < p.t ? t0 + BM : p.t;
    const int visible = p.causal ? last + p.s - p.t : p.s;
    float m = -FLOAT_INF, l = 0.0f, o[OWN];
    UNROLL
    for (int i = 0; i < OWN; i++) o[i] = 0.0f;

    for (int n0 = 0; n0 < visible; n0 += BN) {
        for (int i = thread; i < BN * p.d; i += BLOCK) {
            const int r = i / p.d, c = i - r * p.d;
            s.kv[r][c] = n0 + r < p.s ? to_float(load(k + (long long)(n0 + r) * width + c)) : 0.0f;
        }
        sync_block();
        for (int n = own; n < BN; n += LANES) {
            float dot = 0.0f;
            for (int c = 0; c < p.d; c++) dot = fma_f(s.q[row][c], s.kv[n][c], dot);
            const int key = n0 + n;
            const bool seen = key < p.s && (!p.causal || key <= t0 + row + p.s - p.t);
            s.scores[row][n] = seen ? dot : -FLOAT_INF;
        }
        sync_block();
        float top = m;
        for (int n = 0; n < BN; n++) top = max_f(top, s.scores[row][n]);
        // Every query sees key 0, so top is -inf only where all scores so far are NaN, which stay NaN, or -inf.
        const float rescale = top == -FLOAT_INF ? 1.0f : exp_f(m - top);
        for (int n = own; n < BN; n += LANES) {
            const float score = s.scores[row][n];
            s.p[row][n] = score == -FLOAT_INF ? 0.0f : exp_f(score - top);
        }
        for (int i = thread; i < BN * p.d; i += BLOCK) {
            const int r = i / p.d, c = i - r * p.d;
            s.kv[r][c] = n0 + r < p.s ? to_float(load(v + (long long)(n0 + r) * width + c)) : 0.0f;
        }
        sync_block();
        float sum = 0.0f;
        for (int n = 0; n < BN; n++) sum += s.p[row][n];
        l = l * rescale + sum;
        m = top;
        UNROLL
        for (int i = 0; i < OWN; i++) {
            const int c = own + i * LANES;
            if (c < p.d) {
                float a = o[i] * rescale;
                for (int n = 0; n < BN; n++) a = fma_f(s.p[row][n], s.kv[n][c], a);
                o[i] = a;
            }
        }
        sync_block();
    }

    if (t0 + row < p.t) {
        T* y = p.y + ((long long)block_z() * p.t + t0 + row) * width + head;
        UNROLL
        for (int i = 0; i < OWN; i++) {
            const int c = own + i * LANES;
            if (c < p.d) store(y + c, from_float<T>(o[i] / l));
        }
    }
}
