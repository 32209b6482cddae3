// Gradients of attention.cu per head. With scores s = scale · q kᵀ, p = softmax(s) and delta = sum dy · y of a query:
// ds = scale · p · (dy vᵀ - delta); dq = ds k, dk = dsᵀ q, dv = pᵀ dy (Dao et al. 2022, algorithm 4). Scores are made again, in
// tiles of TILE×TILE whose operands pass through shared memory CHUNK elements at a time; thread (row, column) owns one.
//
// attention_grad_q, grid: (ceil(T / TILE) · parts, N, B), the parts of a tile side by side: a block owns TILE queries, the rows of
// its scores. A first pass over the keys gives the natural logarithm of the sum of exponentials, left in `stats` with delta; a second
// one dq, of which thread (row, column) owns elements column, column + LANES, … of the part. attention_grad_kv, grid:
// (ceil(S / TILE) · parts, N, B): a block owns TILE keys, which are the rows here and queries the columns, a thread its elements of
// dk and dv, in order of the queries. Nothing is added up by two blocks. It runs after attention_grad_q, whose blocks of part 0 write
// `stats`; the grid's wait, first of all, makes that visible. Heads wider than D are served in parts of D elements, each by blocks
// of its own that make the scores again.
//
// Operands: q and k, and dy and v, are read into shared memory for the scores and dy vᵀ, as f32, in rows padded by one float, so that
// the threads of a warp, two rows × 16 columns, read without conflicts; the block's own rows anew for each tile. For dq, dk and dv
// the rows of k, q and dy are read again from global memory, that is the caches; y, and dy for delta, are read from there alone. Through shared memory
// pass, in attention_grad_q the scores of a tile in the first pass and ds in the second, in attention_grad_kv p and ds: a thread
// wants those of its row.
//
// Barriers: for each chunk one makes it visible, and one says that it is read. One more makes a tile's scores, or p and ds, visible.
// That they are read says the next tile's first chunk, whose two barriers lie before they are written again (d > 0). So do the
// shares of delta, in `ds` since before the first pass, reach whoever adds them up behind it (it has a tile, as S > 0); and `lse` and
// `delta`, written between the passes, are visible behind the second one's first chunk.
//
// Edges: rows from T and S on and columns from d on are zeros in shared memory; keys that a query does not see have the score
// -inf in the first pass, and p = 0 in the others (a NaN or an inf in k or v reaches, with `causal`, also dq of queries that share a
// tile with the key, as 0 · inf; one in q dk, and one in dy dv, of keys that share a tile with the query); rows from T and S on, and
// columns from d on, are not stored.
// Wants: 0 < d <= parts · D, S > 0, with `causal` S >= T, so that each query sees a key.
// Occupancy: two blocks on a multiprocessor or more, by registers, of which D / LANES sums for dq and twice as many for dk and
// dv are a part; one of attention_grad_kv with D = 512. The bounds ask for one. Shared memory is 10.5 KB.
//
// variants: D=64 D=160 D=512
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int TILE = 16;
constexpr int CHUNK = 32;
constexpr int LANES = 16;
constexpr int OWN = D / LANES;
static_assert(LANES == TILE && BLOCK == TILE * TILE, "a thread for each score");

struct TileSmem {
    float a[2][TILE][CHUNK + 1];  // rows of the block: of q and dy, or of k and v
    float b[2][TILE][CHUNK + 1];  // rows that pass by
    float p[TILE][TILE + 1];
    float ds[TILE][TILE + 1];
    float lse[TILE], delta[TILE];
};

// Rows of a head: of (B,tokens,N·d), from the head's first element of an image on.
struct Rows {
    const T* at;
    int first, count, width, d;
};

// Chunk c0 … of TILE rows, zeros beyond the end.
DEV void fetch(float (*to)[CHUNK + 1], const Rows& rows, int c0) {
    for (int i = thread_x(); i < TILE * CHUNK; i += BLOCK) {
        const int r = i / CHUNK, c = c0 + i % CHUNK, row = rows.first + r;
        to[r][i % CHUNK] = row < rows.count && c < rows.d ? to_float(load(rows.at + (long long)row * rows.width + c)) : 0.0f;
    }
}

DEV float inner(const float (*a)[CHUNK + 1], const float (*b)[CHUNK + 1], int row, int column, float sum) {
    for (int c = 0; c < CHUNK; c++) sum = fma_f(a[row][c], b[column][c], sum);
    return sum;
}

// Of the thread's row of the block and column of the tile that passes by: q · k, and dy · v.
struct Scores {
    float score, dp;
};
DEV Scores scores(TileSmem& s, const Rows& a0, const Rows& a1, const Rows& b0, const Rows& b1, int row, int column) {
    Scores made = {0.0f, 0.0f};
    for (int c0 = 0; c0 < a0.d; c0 += CHUNK) {
        fetch(s.a[0], a0, c0);
        fetch(s.a[1], a1, c0);
        fetch(s.b[0], b0, c0);
        fetch(s.b[1], b1, c0);
        sync_block();
        made.score = inner(s.a[0], s.b[0], row, column, made.score);
        made.dp = inner(s.a[1], s.b[1], row, column, made.dp);
        sync_block();
    }
    return made;
}

struct AttentionGradQ {
    T* dq;         // (B,T,N·d)
    float* stats;  // (B,N,T,2): lse, delta
    const T* q;    // (B,T,N·d)
    const T* k;    // (B,S,N·d)
    const T* v;    // (B,S,N·d)
    const T* y;    // (B,T,N·d)
    const T* dy;   // (B,T,N·d)
    int t, s, heads, d, parts;  // d <= parts · D
    float scale;
    int causal;  // query i sees keys up to i + S − T
};

extern "C" __global__ void __launch_bounds__(BLOCK, 1) attention_grad_q(const __grid_constant__ AttentionGradQ p) {
    griddep_wait();
    TileSmem& s = smem<TileSmem>();
    const int thread = thread_x(), row = thread / TILE, column = thread % TILE;
    const int part = block_x() % p.parts, own = part * D + column, t0 = block_x() / p.parts * TILE, query = t0 + row;
    const int width = p.heads * p.d;
    const long long head = (long long)block_y() * p.d;
    const long long queries = (long long)block_z() * p.t * width + head, keys = (long long)block_z() * p.s * width + head;
    Rows q = {p.q + queries, t0, p.t, width, p.d}, dy = {p.dy + queries, t0, p.t, width, p.d};
    Rows k = {p.k + keys, 0, p.s, width, p.d}, v = {p.v + keys, 0, p.s, width, p.d};
    const int seen = p.causal ? query + 1 + p.s - p.t : p.s;
    const int last = t0 + TILE < p.t ? t0 + TILE : p.t, all = p.causal ? last + p.s - p.t : p.s;

    float delta = 0.0f;
    if (query < p.t) {
        const T* y = p.y + queries + (long long)query * width;
        for (int c = column; c < p.d; c += TILE) {
            delta = fma_f(to_float(load(y + c)), to_float(load(dy.at + (long long)query * width + c)), delta);
        }
    }
    s.ds[row][column] = delta;

    float m = -FLOAT_INF, l = 0.0f;
    for (int n0 = 0; n0 < all; n0 += TILE) {
        k.first = n0;
        float score = 0.0f;
        for (int c0 = 0; c0 < p.d; c0 += CHUNK) {
            fetch(s.a[0], q, c0);
            fetch(s.b[0], k, c0);
            sync_block();
            score = inner(s.a[0], s.b[0], row, column, score);
            sync_block();
        }
        s.p[row][column] = n0 + column < seen && n0 + column < p.s ? score * p.scale : -FLOAT_INF;
        sync_block();
        if (column == 0) {
            float most = m;
            for (int i = 0; i < TILE; i++) most = max_f(most, s.p[row][i]);
            float sum = 0.0f;
            for (int i = 0; i < TILE; i++) sum += exp_f(s.p[row][i] - most);
            l = fma_f(l, exp_f(m - most), sum);
            m = most;
        }
    }
    if (column == 0) {
        for (int i = 1; i < TILE; i++) delta += s.ds[row][i];
        s.lse[row] = m + log_f(l);
        s.delta[row] = delta;
        if (part == 0 && query < p.t) {
            float* stats = p.stats + 2 * (((long long)block_z() * p.heads + block_y()) * p.t + query);
            store(stats, s.lse[row]);
            store(stats + 1, delta);
        }
    }

    float dq[OWN];
    UNROLL
    for (int i = 0; i < OWN; i++) dq[i] = 0.0f;
    for (int n0 = 0; n0 < all; n0 += TILE) {
        k.first = n0;
        v.first = n0;
        const Scores made = scores(s, q, dy, k, v, row, column);
        const bool visible = n0 + column < seen && n0 + column < p.s && query < p.t;
        const float weight = visible ? exp_f(made.score * p.scale - s.lse[row]) : 0.0f;
        s.ds[row][column] = weight * (made.dp - s.delta[row]) * p.scale;
        sync_block();
        const int count = p.s - n0 < TILE ? p.s - n0 : TILE;
        for (int j = 0; j < count; j++) {
            const float ds = s.ds[row][j];
            const T* from = k.at + (long long)(n0 + j) * width;
            UNROLL
            for (int i = 0; i < OWN; i++) {
                const int c = own + i * LANES;
                if (c < p.d) dq[i] = fma_f(ds, to_float(load(from + c)), dq[i]);
            }
        }
    }
    if (query >= p.t) return;
    T* to = p.dq + queries + (long long)query * width;
    UNROLL
    for (int i = 0; i < OWN; i++) {
        const int c = own + i * LANES;
        if (c < p.d) store(to + c, from_float<T>(dq[i]));
    }
}

struct AttentionGradKv {
    T* dk;               // (B,S,N·d)
    T* dv;               // (B,S,N·d)
    const float* stats;  // (B,N,T,2)
    const T* q;          // (B,T,N·d)
    const T* k;          // (B,S,N·d)
    const T* v;          // (B,S,N·d)
    const T* dy;         // (B,T,N·d)
    int t, s, heads, d, parts;  // d <= parts · D
    float scale;
    int causal;
};

extern "C" __global__ void __launch_bounds__(BLOCK, 1) attention_grad_kv(const __grid_constant__ AttentionGradKv p) {
    griddep_wait();
    TileSmem& s = smem<TileSmem>();
    const int thread = thread_x(), row = thread / TILE, column = thread % TILE;
    const int own = block_x() % p.parts * D + column, s0 = block_x() / p.parts * TILE, key = s0 + row;
    const int width = p.heads * p.d;
    const long long head = (long long)block_y() * p.d;
    const long long queries = (long long)block_z() * p.t * width + head, keys = (long long)block_z() * p.s * width + head;
    Rows q = {p.q + queries, 0, p.t, width, p.d}, dy = {p.dy + queries, 0, p.t, width, p.d};
    Rows k = {p.k + keys, s0, p.s, width, p.d}, v = {p.v + keys, s0, p.s, width, p.d};
    // The first query that sees the block's first key.
    const int early = p.causal ? s0 - (p.s - p.t) : 0, from = early > 0 ? early / TILE * TILE : 0;

    float dk[OWN], dv[OWN];
    UNROLL
    for (int i = 0; i < OWN; i++) {
        dk[i] = 0.0f;
        dv[i] = 0.0f;
    }
    for (int t0 = from; t0 < p.t; t0 += TILE) {
        q.first = t0;
        dy.first = t0;
        const Scores made = scores(s, k, v, q, dy, row, column);
        const int query = t0 + column;
        float weight = 0.0f, ds = 0.0f;
        if (query < p.t && key < p.s && (!p.causal || key < query + 1 + p.s - p.t)) {
            const float* stats = p.stats + 2 * (((long long)block_z() * p.heads + block_y()) * p.t + query);
            weight = exp_f(made.score * p.scale - load(stats));
            ds = weight * (made.dp - load(stats + 1)) * p.scale;
        }
        s.p[row][column] = weight;
        s.ds[row][column] = ds;
        sync_block();
        const int count = p.t - t0 < TILE ? p.t - t0 : TILE;
        for (int j = 0; j < count; j++) {
            const float w = s.p[row][j], d = s.ds[row][j];
            const long long at = (long long)(t0 + j) * width;
            UNROLL
            for (int i = 0; i < OWN; i++) {
                const int c = own + i * LANES;
                if (c < p.d) {
                    dk[i] = fma_f(d, to_float(load(q.at + at + c)), dk[i]);
                    dv[i] = fma_f(w, to_float(load(dy.at + at + c)), dv[i]);
                }
            }
        }
    }
    if (key >= p.s) return;
    UNROLL
    for (int i = 0; i < OWN; i++) {
        const int c = own + i * LANES;
        if (c < p.d) {
            store(p.dk + keys + (long long)key * width + c, from_float<T>(dk[i]));
            store(p.dv + keys + (long long)key * width + c, from_float<T>(dv[i]));
        }
    }
}
