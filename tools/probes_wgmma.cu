// What `conv2d_wgmma` leans on, on a Hopper card (compiled for sm_90a alone; elsewhere they say "not on this card"):
//
//   FILE wgmma    one JSON object on stdout, as that of probes.cu
//
// P-1  descriptors: products of known integers from shared memory, 64×N by 64 deep, and 16 deep from 0, 32, 64 and 96 bytes into the
//      rows, each element compared with the host's; in f16 and bf16, of every N that dev.cuh has.
//      `by rows`: the same of `wgmma_rows`, whose left operand comes in registers and whose right one lies in rows of columns; for
//      attention. Rates: products m64nNk16 from operands that lie in shared memory, four to a commit as in the kernel's turn. `2 x 1 warpgroup`:
//      two blocks of one warpgroup beside each other.
// P-3  the main loop of a tile of `conv2d_wgmma` without its walk: a slot of a ring is multiplied while all threads copy a k-block
//      into another from the second-level cache. With all of its parts, and without some of them, so that what a turn takes can be
//      laid to products, copies, fence and barrier. `2 x 128x128`: of each of two blocks beside each other on a multiprocessor. Sums
//      of the whole loop are compared with the host's.
//      The fence: what `fence_proxy_async` and a barrier take right behind the start of 0 to 3 groups of copies, beside the barrier
//      alone, and beside the wait for these copies and a barrier. A fence that waits for copies takes as long as that.
#include "probes.cuh"

#include <vector>

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "compile for sm_90a: no other target has wgmma"
#endif

constexpr int BK = 64, STEPS = BK / 16;
constexpr int GROUP = 128;  // threads of a warpgroup

// Integers that all types hold: -3 to 3 without 0, in no order.
DEV_CONST int small(unsigned i) {
    const int v = int((i * 2654435769u >> 16) % 6);
    return v < 3 ? v - 3 : v - 2;
}

// Where chunk `chunk` of a row of 128 bytes stands, as in conv2d_tile.cuh.
DEV int place(int row, int chunk) { return row * BK + ((chunk ^ (row & 7)) << 3); }

// Rows of BK elements in shared memory, element k of row r of value small(first + r·BK + k).
template <class E>
DEV void fill_rows(E* to, int rows, unsigned first) {
    for (int i = thread_x(); i < rows * BK; i += block_dim_x()) {
        to[place(i / BK, i % BK / 8) + i % 8] = from_float<E>(float(small(first + i)));
    }
}

const char* plural(int number) { return number == 1 ? "" : "s"; }

template <int NT>
DEV float total(const float (&acc)[NT][4]) {
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < NT * 4; i++) sum += acc[i / 4][i % 4];
    return sum;
}

__global__ void fill_small(T* to, unsigned count) {
    for (unsigned i = block_x() * block_dim_x() + thread_x(); i < count; i += grid_x() * block_dim_x()) {
        store(to + i, from_float<T>(float(small(i))));
    }
}

// ------------------------------------------------------------------------------------------------------------ P-1

// y (64,N) = a (64,16·DEEP) · b (N,16·DEEP)ᵀ, both from the `at`-th 16 bytes of rows of 128.
template <class E, int N, int DEEP>
__global__ void __launch_bounds__(GROUP) described(float* y, int at) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    struct Operands {
        E a[64 * BK];
        E b[N * BK];
    };
    Operands& s = smem_dynamic<Operands>();
    fill_rows(s.a, 64, 0);
    fill_rows(s.b, N, 64 * BK);
    fence_proxy_async();
    sync_block();
    float acc[N / 8][4] = {};
    const unsigned long long a = wgmma_descriptor(s.a) + at, b = wgmma_descriptor(s.b) + at;
    wgmma_fence();
    UNROLL
    for (int step = 0; step < DEEP; step++) wgmma<E, N>(acc, a + 2 * step, b + 2 * step);
    wgmma_commit();
    wgmma_wait_all(acc);
    UNROLL
    for (int i = 0; i < N / 2; i++) {
        const int row = warp() * 16 + lane() / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane() % 4 * 2 + i % 2;
        store(y + row * N + column, acc[i / 4][i % 4]);
    }
#endif
}

// y (64,N) of one warpgroup.
template <int N, class K, class... A>
std::vector<float> product(K kernel, int smem, float* y, A... more) {
    CHECK(cudaMemset(y, 0xff, 64 * N * sizeof(float)));
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    kernel<<<1, GROUP, smem>>>(y, more...);
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    std::vector<float> got(64 * N);
    CHECK(cudaMemcpy(got.data(), y, got.size() * sizeof(float), cudaMemcpyDeviceToHost));
    return got;
}

// How many elements of the product are not the host's; the first of them on stderr.
template <class E, int N, int DEEP>
int wrong_elements(const char* type, float* y, int at) {
    const std::vector<float> got = product<N>(described<E, N, DEEP>, (64 + N) * BK * 2, y, at);
    int wrong = 0;
    for (int i = 0; i < 64 * N; i++) {
        int want = 0;
        for (int k = at * 8; k < at * 8 + 16 * DEEP; k++) want += small(i / N * BK + k) * small((64 + i % N) * BK + k);
        if (got[i] == float(want)) continue;
        if (wrong++ == 0) {
            fprintf(stderr, "P-1 descriptor, %s m64n%d, %d deep from byte %d: element (%d,%d) is %g, not %d\n", type, N, 16 * DEEP, at * 16, i / N, i % N,
                got[i], want);
        }
    }
    return wrong;
}

template <class E, int N>
void describe(Card& c, const char* type, float* y) {
    char name[96];
    snprintf(name, sizeof name, "P-1 descriptor, %s m64n%d, 64 deep", type, N);
    c.verdict(name, wrong_elements<E, N, STEPS>(type, y, 0), "wrong elements");
    for (int at = 0; at < 8; at += 2) {
        snprintf(name, sizeof name, "P-1 descriptor, %s m64n%d, 16 deep from byte %d", type, N, at * 16);
        c.verdict(name, wrong_elements<E, N, 1>(type, y, at), "wrong elements");
    }
}

template <class E>
void describe_all(Card& c, const char* type, float* y) {
    describe<E, 16>(c, type, y);
    describe<E, 64>(c, type, y);
    describe<E, 80>(c, type, y);
    describe<E, 128>(c, type, y);
    describe<E, 160>(c, type, y);
    describe<E, 256>(c, type, y);
}

// Element k of column n of a matrix that lies in rows of 64 columns, and the next 64 `deep` rows further on.
DEV int place_by_rows(int k, int n, int deep) { return n / 64 * deep * BK + place(k, n % 64 / 8) + n % 8; }

// y (64,N) = a (64,16·DEEP) · b (16·DEEP,N): a in registers, b in rows.
template <class E, int N, int DEEP>
__global__ void __launch_bounds__(GROUP) described_by_rows(float* y) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int K = 16 * DEEP;
    struct Operand {
        E b[(N + 63) / 64 * K * BK];
    };
    Operand& s = smem_dynamic<Operand>();
    for (int i = thread_x(); i < K * N; i += GROUP) s.b[place_by_rows(i / N, i % N, K)] = from_float<E>(float(small(64 * K + i)));
    fence_proxy_async();
    sync_block();
    const int row = warp() * 16 + lane() / 4;
    float acc[N / 8][4] = {};
    const unsigned long long b = wgmma_rows_descriptor(s.b, K * BK * 2);
    unsigned a[DEEP][4];
    UNROLL
    for (int i = 0; i < DEEP * 4; i++) {
        const int k = (row + i % 2 * 8) * K + i / 4 * 16 + i % 4 / 2 * 8 + lane() % 4 * 2;
        a[i / 4][i % 4] = pack2<E>(float(small(k)), float(small(k + 1)));
    }
    wgmma_fence();
    UNROLL
    for (int step = 0; step < DEEP; step++) wgmma_rows<E, N>(acc, a[step], b + 128 * step);
    wgmma_commit();
    wgmma_wait_all(acc);
    UNROLL
    for (int i = 0; i < N / 2; i++) store(y + (row + i % 4 / 2 * 8) * N + i / 4 * 8 + lane() % 4 * 2 + i % 2, acc[i / 4][i % 4]);
#endif
}

template <class E, int N>
void describe_by_rows(Card& c, const char* type, float* y) {
    constexpr int K = 16 * STEPS;
    const std::vector<float> got = product<N>(described_by_rows<E, N, STEPS>, (N + 63) / 64 * K * BK * 2, y);
    char name[96];
    snprintf(name, sizeof name, "P-1 descriptor by rows, %s m64n%d, %d deep", type, N, K);
    int wrong = 0;
    for (int i = 0; i < 64 * N; i++) {
        int want = 0;
        for (int k = 0; k < K; k++) want += small(i / N * K + k) * small(64 * K + k * N + i % N);
        if (got[i] == float(want)) continue;
        if (wrong++ == 0) fprintf(stderr, "%s: element (%d,%d) is %g, not %d\n", name, i / N, i % N, got[i], want);
    }
    c.verdict(name, wrong, "wrong elements");
}

template <class E>
void describe_all_by_rows(Card& c, const char* type, float* y) {
    describe_by_rows<E, 40>(c, type, y);
    describe_by_rows<E, 64>(c, type, y);
    describe_by_rows<E, 80>(c, type, y);
    describe_by_rows<E, 160>(c, type, y);
}

// As `resident`, by rows.
template <int N, int PENDING>
__global__ void __launch_bounds__(2 * GROUP, N > 160 ? 1 : 2) resident_by_rows(Out out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    struct Operand {
        T b[(N + 63) / 64 * BK * BK];
    };
    Operand& s = smem_dynamic<Operand>();
    fill_rows(s.b, (N + 63) / 64 * BK, 0);
    fence_proxy_async();
    sync_block();
    float acc[N / 8][4] = {};
    const unsigned long long b = wgmma_rows_descriptor(s.b, BK * BK * 2);
    unsigned a[STEPS][4];
    UNROLL
    for (int i = 0; i < STEPS * 4; i++) a[i / 4][i % 4] = pack2<T>(float(small(i)), float(small(i + lane())));
    const long long start = begin();
    ROLLED
    for (int r = 0; r < ROUNDS; r++) {
        wgmma_fence();
        UNROLL
        for (int step = 0; step < STEPS; step++) wgmma_rows<T, N>(acc, a[step], b + 128 * step);
        wgmma_commit();
        wgmma_wait<PENDING>();
    }
    wgmma_wait_all(acc);
    end(out, start, total(acc));
#endif
}

// Products of one or two warpgroups, each with 64 rows of its own and the same N columns, the same four over and over; those of
// PENDING turns run on while the next ones are issued. No barrier, no copies.
template <int N, int PENDING>
__global__ void __launch_bounds__(2 * GROUP, N > 160 ? 1 : 2) resident(Out out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    struct Operands {
        T a[2 * 64 * BK];
        T b[N * BK];
    };
    Operands& s = smem_dynamic<Operands>();
    fill_rows(s.a, 2 * 64, 0);
    fill_rows(s.b, N, 2 * 64 * BK);
    fence_proxy_async();
    float acc[N / 8][4] = {};
    const unsigned long long a = wgmma_descriptor(s.a + warp() / 4 * 64 * BK), b = wgmma_descriptor(s.b);
    const long long start = begin();
    ROLLED
    for (int r = 0; r < ROUNDS; r++) {
        wgmma_fence();
        UNROLL
        for (int step = 0; step < STEPS; step++) wgmma<T, N>(acc, a + 2 * step, b + 2 * step);
        wgmma_commit();
        wgmma_wait<PENDING>();
    }
    wgmma_wait_all(acc);
    end(out, start, total(acc));
#endif
}

// Shared memory that lets `beside` blocks and no more onto a multiprocessor of 228 KB, if they need less.
int room(int need, int beside) { return std::max(need, beside == 1 ? 118 << 10 : 80 << 10); }

template <int N, int PENDING>
void rates(Card& c, bool by_rows = false) {
    for (int groups = 1; groups <= 2; groups++) {
        for (int beside = 1; beside <= (N > 160 ? 3 - groups : 2); beside++) {
            char name[96];
            snprintf(name, sizeof name, "P-1 wgmma%s m64n%dk16, %d x %d warpgroup%s, %d turn%s pending", by_rows ? " by rows" : "", N, beside, groups,
                plural(groups), PENDING, plural(PENDING));
            const double work = 2.0 * 64 * N * BK * groups * ROUNDS;
            const int smem = room((128 + (N + 63) / 64 * 64) * BK * 2, beside);
            if constexpr (N == 40 || N == 64 || N == 80 || N == 160) {
                if (by_rows) c.probe(name, "FLOP", work, beside, groups * GROUP, smem, resident_by_rows<N, PENDING>);
            }
            if constexpr (N != 40) {
                if (!by_rows) c.probe(name, "FLOP", work, beside, groups * GROUP, smem, resident<N, PENDING>);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ P-3

// Parts of the loop.
enum With { PRODUCTS = 1, BARRIER = 2, FENCE = 4, COPIES = 8 };

// Operands of P-3 as of the 3×3 convolution of 320 channels: a block has BM rows of x of 5 k-blocks, which come again for each tap; all
// blocks have the same rows of w, of 45 k-blocks.
constexpr int BM = 128, X_ROW = 5 * BK, W_ROW = 45 * BK;

// sums: of the accumulators of each thread.
template <int BN, int STAGES, int PENDING, int BLOCKS, int WITH>
__global__ void __launch_bounds__(BM * 2, BLOCKS) tile(Out out, const T* x, const T* w, float* sums) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int SLOT = (BM + BN) * BK, AHEAD = STAGES - 1 - PENDING;
    constexpr int LOAD_ROWS = BM * 2 / 8;
    struct Ring {
        T slot[STAGES][SLOT];
    };
    Ring& s = smem_dynamic<Ring>();
    fill_rows(s.slot[0], STAGES * SLOT / BK, 0);
    fence_proxy_async();
    sync_block();
    const int row = thread_x() / 8, to = place(row, thread_x() % 8);
    const T* from_x = x + (block_x() * BM + row) * X_ROW + thread_x() % 8 * 8;
    const T* from_w = w + row * W_ROW + thread_x() % 8 * 8;
    int k_x = 0, k_w = 0;
    const auto copy = [&](T* slot) {
        UNROLL
        for (int i = 0; i < BM / LOAD_ROWS; i++) cp_async(slot + to + i * LOAD_ROWS * BK, from_x + i * LOAD_ROWS * X_ROW + k_x, true);
        UNROLL
        for (int i = 0; i < BN / LOAD_ROWS; i++) cp_async(slot + to + (BM + i * LOAD_ROWS) * BK, from_w + i * LOAD_ROWS * W_ROW + k_w, true);
        k_x = k_x + BK == X_ROW ? 0 : k_x + BK;
        k_w = k_w + BK == W_ROW ? 0 : k_w + BK;
        cp_async_commit();
    };
    if (WITH & COPIES) {
        ROLLED
        for (int i = 0; i < AHEAD; i++) copy(s.slot[i]);
    }
    float acc[BN / 8][4] = {};
    const unsigned long long a = wgmma_descriptor(s.slot[0] + warp() / 4 * 64 * BK), b = wgmma_descriptor(s.slot[0] + BM * BK);
    int slot = 0;
    const long long start = begin();
    ROLLED
    for (int r = 0; r < ROUNDS; r++) {
        if (WITH & COPIES) cp_async_wait<AHEAD - 1>();
        if (WITH & FENCE) fence_proxy_async();
        if (WITH & BARRIER) sync_block();
        if (WITH & PRODUCTS) {
            wgmma_fence();
            const int at = slot * (SLOT * 2 / 16);
            UNROLL
            for (int step = 0; step < STEPS; step++) wgmma<T, BN>(acc, a + at + 2 * step, b + at + 2 * step);
            wgmma_commit();
        }
        if (WITH & COPIES) copy(s.slot[slot <= PENDING ? slot + AHEAD : slot - 1 - PENDING]);
        if (WITH & PRODUCTS) wgmma_wait<PENDING>();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    wgmma_wait_all(acc);
    cp_async_wait<0>();
    const float sum = total(acc);
    end(out, start, sum);
    store(sums + block_x() * block_dim_x() + thread_x(), sum);
#endif
}

// How many threads' sums are not the host's: thread t has rows 16(t/32) + t%32/4 and 8 more, and of eight columns 2(t%4) and + 1. Turn i
// multiplied the k-blocks i % 5 of x and i % 45 of w. All are integers below 2^24, so that floats hold them.
template <int BN>
int wrong_sums(int blocks, const float* sums, unsigned x0, unsigned w0) {
    std::vector<float> got(blocks * BM * 2);
    CHECK(cudaMemcpy(got.data(), sums, got.size() * sizeof(float), cudaMemcpyDeviceToHost));
    // What each element of a row of x is multiplied by in all, for each pair of columns.
    std::vector<int> w(4 * X_ROW);
    for (int i = 0; i < ROUNDS * BK; i++) {
        for (int n = 0; n < BN; n++) w[n % 8 / 2 * X_ROW + i % X_ROW] += small(w0 + n * W_ROW + i % W_ROW);
    }
    int wrong = 0;
    for (int i = 0; i < blocks * BM * 2; i++) {
        const int t = i % (BM * 2), row = i / (BM * 2) * BM + t / 32 * 16 + t % 32 / 4;
        long long want = 0;
        for (int k = 0; k < X_ROW; k++) {
            want += w[t % 4 * X_ROW + k] * (small(x0 + row * X_ROW + k) + small(x0 + (row + 8) * X_ROW + k));
        }
        if (double(got[i]) == double(want)) continue;
        if (wrong++ == 0) fprintf(stderr, "P-3 wgmma, 128x%d, block %d, thread %d: sum %g, not %lld\n", BN, i / (BM * 2), t, got[i], want);
    }
    return wrong;
}

// A tile with the ring, the pending turns and the blocks beside each other of its variant of conv2d_wgmma.
template <int BN, int STAGES, int PENDING, int BLOCKS>
void tiles(Card& c) {
    const unsigned count_x = c.about.multiProcessorCount * BLOCKS * BM * X_ROW, count = count_x + BN * W_ROW;
    const int blocks = c.about.multiProcessorCount * BLOCKS, smem = room(STAGES * (BM + BN) * BK * 2, BLOCKS);
    T* x;
    float* sums;
    CHECK(cudaMalloc(&x, count * sizeof(T)));
    CHECK(cudaMalloc(&sums, blocks * BM * 2 * sizeof(float)));
    fill_small<<<1024, 256>>>(x, count);
    CHECK(cudaGetLastError());
    char name[96];
    const auto turn = [&](const char* what, auto kernel) {
        snprintf(name, sizeof name, "P-3 wgmma, %d x 128x%d: %s", BLOCKS, BN, what);
        CHECK(cudaMemset(sums, 0xff, blocks * BM * 2 * sizeof(float)));
        const double spent = c.clocks(name, BLOCKS, BM * 2, smem, kernel, x, x + count_x, sums) / ROUNDS;
        c.say(name, spent, "clocks per turn");
        return spent;
    };
    turn("products", tile<BN, STAGES, PENDING, BLOCKS, PRODUCTS>);
    turn("products and barrier", tile<BN, STAGES, PENDING, BLOCKS, PRODUCTS | BARRIER>);
    turn("products, barrier and fence", tile<BN, STAGES, PENDING, BLOCKS, PRODUCTS | BARRIER | FENCE>);
    turn("copies and barrier", tile<BN, STAGES, PENDING, BLOCKS, BARRIER | COPIES>);
    turn("copies, barrier and fence", tile<BN, STAGES, PENDING, BLOCKS, BARRIER | FENCE | COPIES>);
    // These products may read what is not there yet: their sums are no one's.
    turn("products, copies and barrier", tile<BN, STAGES, PENDING, BLOCKS, PRODUCTS | BARRIER | COPIES>);
    const double whole = turn("products, copies, barrier and fence", tile<BN, STAGES, PENDING, BLOCKS, PRODUCTS | BARRIER | FENCE | COPIES>);
    c.say(name, whole > 0.0 ? 2.0 * BM * BN * BK * BLOCKS / whole : 0.0, "FLOP per clock and multiprocessor");
    if (whole > 0.0) c.verdict(name, wrong_sums<BN>(blocks, sums, 0, count_x), "wrong sums");
    CHECK(cudaFree(x));
    CHECK(cudaFree(sums));
}

// What stands between the two readings of the clock, before a barrier: in machine code the fence is not waited for until there.
enum Timed { NOTHING, THE_FENCE, LANDING };

// A group of copies lands; FLYING more begin and are not waited for; clocks of what is timed, the mean over rounds and warps.
template <int WARPS, int FLYING, Timed WHAT>
__global__ void __launch_bounds__(WARPS * WARP) flying(Out out, const T* from) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int COPIES_EACH = 4, SLOT = WARPS * WARP * COPIES_EACH * 8;
    struct Ring {
        T slot[4][SLOT];
        float scratch[WARPS];
    };
    Ring& s = smem_dynamic<Ring>();
    const T* source = from + (block_x() * 4 % 256) * SLOT;
    const auto copy = [&](int slot, const T* first) {
        UNROLL
        for (int i = 0; i < COPIES_EACH; i++) {
            const int e = (i * WARPS * WARP + thread_x()) * 8;
            cp_async(s.slot[slot] + e, first + slot * SLOT + e, true);
        }
        cp_async_commit();
    };
    long long spent = 0;
    ROLLED
    for (int r = 0; r < ROUNDS; r++) {
        const T* first = source + r % 16 * 4 * SLOT;
        copy(0, first);
        cp_async_wait<0>();
        sync_block();
        UNROLL
        for (int i = 1; i <= FLYING; i++) copy(i, first);
        cp_async_wait<FLYING>();
        const long long start = clock64();
        if (WHAT == THE_FENCE) fence_proxy_async();
        if (WHAT == LANDING) cp_async_wait<0>();
        sync_block();
        spent += clock64() - start;
        cp_async_wait<0>();
        sync_block();
    }
    const float mean = block_sum<WARPS * WARP>(float(spent), s.scratch) / (WARPS * WARP * ROUNDS);
    if (thread_x() == 0) store(out.clocks + block_x(), (long long)(mean + 0.5f));
#endif
}

template <int WARPS, int FLYING>
void fences(Card& c) {
    const auto timed = [&](const char* what, auto kernel) {
        char name[96];
        snprintf(name, sizeof name, "P-3 %s, %d warp%s, %d group%s of copies in flight", what, WARPS, plural(WARPS), FLYING, plural(FLYING));
        c.say(name, c.clocks(name, 1, WARPS * WARP, room(WARPS * (4 * WARP * 4 * 16 + 4), 1), kernel, c.operands), "clocks");
    };
    timed("barrier", flying<WARPS, FLYING, NOTHING>);
    timed("fence and barrier", flying<WARPS, FLYING, THE_FENCE>);
    timed("landing and barrier", flying<WARPS, FLYING, LANDING>);
}

void wgmma_probes(Card& c) {
    if (c.about.major != 9) {
        fprintf(stderr, "P-1 and P-3 of wgmma: not on this card\n");
        return;
    }
    float* y;
    CHECK(cudaMalloc(&y, 64 * 256 * sizeof(float)));
    describe_all<f16>(c, "f16", y);
    describe_all<bf16>(c, "bf16", y);
    describe_all_by_rows<f16>(c, "f16", y);
    describe_all_by_rows<bf16>(c, "bf16", y);
    CHECK(cudaFree(y));
    rates<16, 0>(c);
    rates<16, 1>(c);
    rates<80, 0>(c);
    rates<80, 1>(c);
    rates<128, 0>(c);
    rates<128, 1>(c);
    rates<160, 0>(c);
    rates<160, 1>(c);
    rates<256, 0>(c);
    rates<256, 1>(c);
    rates<40, 0>(c, true);
    rates<40, 1>(c, true);
    rates<64, 1>(c, true);
    rates<80, 1>(c, true);
    rates<160, 1>(c, true);
    tiles<160, 5, 1, 1>(c);
    tiles<128, 3, 0, 2>(c);
    fences<1, 0>(c);
    fences<1, 1>(c);
    fences<1, 2>(c);
    fences<1, 3>(c);
    fences<8, 0>(c);
    fences<8, 1>(c);
    fences<8, 2>(c);
    fences<8, 3>(c);
}
