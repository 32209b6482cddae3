// What the card's units do in a clock, where the kernels' tiles and the model of `src/ops/launch.rs` lean on it. Standalone:
//
//   tools/gpu.sh probes FILE    compiles it and probes_wgmma.cu, with nvcc
//   FILE                        one JSON object on stdout: name, value, unit of each
//   FILE wgmma                  the same of probes_wgmma.cu: P-1, and P-3 for wgmma
//
// A probe is a kernel that fills every multiprocessor, does one thing a known number of times, and says how many clocks each
// block took (`clock64`); the rate is that of the slowest block, the best of five launches. Primitives are those of
// kernels/dev.cuh, so that what is measured is what the kernels run.
//
// P-2  special functions: ex2, rcp (tanh and pairs of f16 are used nowhere).
// P-3  mma.sync fed by ldmatrix from shared memory, in the fragments of the tiles of `conv2d_mma`, alone and while cp.async
//      fills other slots: do copies take the port from the reads?
// P-4  operands from the second-level cache into shared memory by cp.async, by all multiprocessors at once.
// P-7  mma.sync from registers: the instruction's own peak; that of the whole product is in `ldm bench --roofline`.
// P-11 float units: fma from registers; and 16-byte reads of shared memory in the lane order of `conv2d_f32`, where sixteen
//      lanes may share a pass, beside an order where they cannot.
// P-12 what lies between two kernels of a graph, from sm_90 on: one after the other; each started when the blocks of the one before
//      have returned, which is what launches ask for unless `LDM_CUDA_OVERLAP=off`; when they have done their work; when they have begun.
//
// Nowhere: P-1b (operands of wgmma that are not K-major), P-6 and P-4's multicast (clusters), P-10 (fp8): no kernel uses any of these
// yet; P-9 (tensor copies), which `./gpu.sh wgmma` tests and measures in the products of `conv2d_tma`. P-5 is `LDM_CUDA_GRAPH=on|off ldm bench`, P-8 `gpu_torch.py`.
#include "probes.cuh"

#include <cstring>

enum Scalar { EX2, RCP, FMA };

// Eight chains in each of 1024 threads, eight links of each a round.
template <Scalar WHAT>
__global__ void __launch_bounds__(1024) scalar(Out out) {
    float x[8];
    UNROLL
    for (int i = 0; i < 8; i++) x[i] = 0.5f + 0.01f * (thread_x() + i);
    const long long start = begin();
    ROLLED
    for (int r = 0; r < ROUNDS; r++) {
        UNROLL
        for (int i = 0; i < 64; i++) {
            float& chain = x[i % 8];
            if (WHAT == EX2) chain = exp2_fast_f(chain);
            if (WHAT == RCP) chain = rcp_fast_f(1.0f + chain);  // the compiler takes 1 / (1 / x) for x
            if (WHAT == FMA) chain = fma_f(chain, 0.5f, 1.0f);
        }
    }
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < 8; i++) sum += x[i];
    end(out, start, sum);
}

// Products of MT×NT fragments a round, the fragments from registers.
template <int MT, int NT>
__global__ void __launch_bounds__(128, 2) mma_registers(Out out) {
    float acc[MT][NT][4] = {};
    unsigned a[MT][4], b[NT][2];
    UNROLL
    for (int i = 0; i < MT * 4; i++) a[i / 4][i % 4] = 0x3f803f80u + thread_x();
    UNROLL
    for (int i = 0; i < NT * 2; i++) b[i / 2][i % 2] = 0x3f803f80u - thread_x();
    const long long start = begin();
    ROLLED
    for (int r = 0; r < ROUNDS; r++) {
        UNROLL
        for (int i = 0; i < MT * NT; i++) mma<T>(acc[i / NT][i % NT], a[i / NT], b[i % NT]);
    }
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < MT * NT; i++) sum += acc[i / NT][i % NT][0] + acc[i / NT][i % NT][3];
    end(out, start, sum);
}

// The main loop of `conv2d_mma` for a BM×BN tile, four slots of 32 channels, the same swizzle; copies only with COPY.
template <int BM, int BN, bool COPY>
__global__ void __launch_bounds__(128, 2) mma_shared(Out out, const T* from) {
    constexpr int BK = 32, STAGES = 4, SLOT = (BM + BN) * BK;
    constexpr int WARPS_N = 2, MT = BM / 2 / 16, NT = BN / WARPS_N / 8;
    struct Ring {
        T slot[STAGES][SLOT];
    };
    Ring& s = smem_dynamic<Ring>();
    for (int i = thread_x(); i < STAGES * SLOT; i += 128) s.slot[i / SLOT][i % SLOT].bits = 0x3f80;
    float acc[MT][NT][4] = {};
    const int l = lane(), warp_m = warp() / WARPS_N, warp_n = warp() % WARPS_N;
    const T* source = from + (long long)(block_x() % 64) * STAGES * SLOT;
    const auto place = [](int row, int chunk) { return row * BK + ((chunk ^ (row >> 1 & 3)) << 3); };
    const long long start = begin();
    ROLLED
    for (int r = 0; r < ROUNDS; r++) {
        if (COPY) {
            cp_async_wait<STAGES - 2>();
            sync_block();
            T* to = s.slot[(r + STAGES - 1) % STAGES];
            UNROLL
            for (int i = 0; i < (BM + BN) / 32; i++) {
                const int row = thread_x() / 4 + i * 32;
                cp_async(to + place(row, thread_x() % 4), source + row * BK + thread_x() % 4 * 8, true);
            }
            cp_async_commit();
        }
        const T* slot = s.slot[r % STAGES];
        UNROLL
        for (int k = 0; k < BK / 16; k++) {
            unsigned a[MT][4], b[NT / 2][4];
            UNROLL
            for (int i = 0; i < MT; i++) ldmatrix(a[i], slot + place(warp_m * (BM / 2) + i * 16 + l % 16, 2 * k + l / 16));
            UNROLL
            for (int j = 0; j < NT / 2; j++) {
                const int row = BM + warp_n * (BN / WARPS_N) + j * 16 + l / 16 * 8 + l % 8;
                ldmatrix(b[j], slot + place(row, 2 * k + l / 8 % 2));
            }
            UNROLL
            for (int j = 0; j < NT; j++) {
                const unsigned pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                UNROLL
                for (int i = 0; i < MT; i++) mma<T>(acc[i][j], a[i], pair);
            }
        }
    }
    cp_async_wait<0>();
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < MT * NT; i++) sum += acc[i / NT][i % NT][0];
    end(out, start, sum);
}

// A ring of four slots of 16 KB, filled over and over from `span` elements, a power of two, that all blocks read.
__global__ void __launch_bounds__(128, 2) cache_to_shared(Out out, const T* from, int span) {
    constexpr int SLOT = 8192, STAGES = 4;
    struct Ring {
        T slot[STAGES][SLOT];
    };
    Ring& s = smem_dynamic<Ring>();
    const long long start = begin();
    ROLLED
    for (int r = 0; r < ROUNDS; r++) {
        cp_async_wait<STAGES - 2>();
        sync_block();
        const int at = (int(block_x()) * 5 + r) * SLOT & (span - 1);
        UNROLL
        for (int i = 0; i < 8; i++) {
            const int e = (i * 128 + thread_x()) * 8;
            cp_async(s.slot[r % STAGES] + e, from + at + e, true);
        }
        cp_async_commit();
    }
    cp_async_wait<0>();
    end(out, start, to_float(s.slot[0][thread_x()]));
}

// Reads of 16 bytes: eight rows of w and eight of x, as in a chunk of `conv2d_f32`. SHARED: its lane order, in which the
// address of each lane is that of lane ^ 1 or lane ^ 2; otherwise eight lanes read eight rows of w.
template <bool SHARED>
__global__ void __launch_bounds__(256, 2) read_shared(Out out) {
    struct Ring {
        float slot[256 * 16];
    };
    Ring& s = smem<Ring>();
    for (int i = thread_x(); i < 256 * 16; i += 256) s.slot[i] = float(i);
    const int l = lane();
    const int m = SHARED ? l % 2 + l / 16 * 2 : l / 8, n = SHARED ? l / 2 % 8 : l % 8;
    const float* x = s.slot + (warp() / 2 * 32 + m) * 16;
    const float* w = s.slot + (128 + warp() % 2 * 64 + n) * 16;
    float sum[16] = {};
    const long long start = begin();
    ROLLED
    for (int r = 0; r < ROUNDS; r++) {
        const int k = r % 4;
        UNROLL
        for (int j = 0; j < 8; j++) {
            const Vec<float, 4> b = load_shared<4>(w + j * 8 * 16 + ((k ^ (n >> 1 & 3)) << 2));
            const Vec<float, 4> a = load_shared<4>(x + j * 4 * 16 + k * 4);
            sum[j] += b[0] + b[1] + b[2] + b[3];
            sum[8 + j] += a[0] + a[1] + a[2] + a[3];
        }
    }
    float all = 0.0f;
    UNROLL
    for (int i = 0; i < 16; i++) all += sum[i];
    end(out, start, all);
}

// When a kernel lets the next one start: SERIAL when it is over, RETURNED when its blocks have returned, and by itself when they have
// done their work (WORKED) or have begun (BEGUN).
enum Next { SERIAL, RETURNED, WORKED, BEGUN };

// One link of a chain: work that two blocks on a multiprocessor share, then a store that the next kernel's wait is for.
template <Next NEXT>
__global__ void __launch_bounds__(512, 2) chained(Out out, int rounds) {
#if __CUDA_ARCH__ >= 900
    if (NEXT == BEGUN) cudaTriggerProgrammaticLaunchCompletion();
#endif
    griddep_wait();
    float x[8];
    UNROLL
    for (int i = 0; i < 8; i++) x[i] = out.sink[thread_x()] + 0.01f * i;
    ROLLED
    for (int r = 0; r < rounds; r++) {
        UNROLL
        for (int i = 0; i < 64; i++) x[i % 8] = fma_f(x[i % 8], 0.5f, 1.0f);
    }
#if __CUDA_ARCH__ >= 900
    if (NEXT == WORKED) cudaTriggerProgrammaticLaunchCompletion();
#endif
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < 8; i++) sum += x[i];
    if (thread_x() == 0) out.clocks[block_x()] = (long long)(sum);
}

struct Units : Card {
    // Microseconds of one kernel in a graph of 64, the best of ten runs: `each` blocks for a multiprocessor, of which two fit.
    template <Next NEXT>
    void chain(const char* how, const char* of, int each, int rounds) {
        constexpr int LINKS = 64;
        cudaStream_t stream;
        cudaGraph_t graph;
        cudaGraphExec_t ready;
        cudaEvent_t from, to;
        CHECK(cudaStreamCreate(&stream));
        CHECK(cudaEventCreate(&from));
        CHECK(cudaEventCreate(&to));
        cudaLaunchAttribute early = {};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = about.multiProcessorCount * each;
        config.blockDim = 512;
        config.dynamicSmemBytes = 100 << 10;
        config.stream = stream;
        config.attrs = &early;
        CHECK(cudaFuncSetAttribute(chained<NEXT>, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10));
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < LINKS; i++) {
            config.numAttrs = NEXT != SERIAL && i > 0;
            CHECK(cudaLaunchKernelEx(&config, chained<NEXT>, out, rounds));
        }
        CHECK(cudaStreamEndCapture(stream, &graph));
        CHECK(cudaGraphInstantiate(&ready, graph, 0));
        float best = 1e30f;
        for (int run = 0; run < 10; run++) {
            float ms = 0.0f;
            CHECK(cudaEventRecord(from, stream));
            CHECK(cudaGraphLaunch(ready, stream));
            CHECK(cudaEventRecord(to, stream));
            CHECK(cudaEventSynchronize(to));
            CHECK(cudaEventElapsedTime(&ms, from, to));
            best = std::min(best, ms * 1e3f / LINKS);
        }
        char name[96];
        snprintf(name, sizeof name, "P-12 %s, %s", of, how);
        say(name, best, "us per kernel");
        CHECK(cudaGraphExecDestroy(ready));
        CHECK(cudaGraphDestroy(graph));
    }

    void chains(const char* of, int each, int rounds) {
        chain<SERIAL>("one after the other", of, each, rounds);
        chain<RETURNED>("next when blocks have returned", of, each, rounds);
        chain<WORKED>("next when they have done their work", of, each, rounds);
        chain<BEGUN>("next when they have begun", of, each, rounds);
    }

    template <int BM, int BN>
    void tile(const char* alone, const char* copying) {
        const int smem = 4 * (BM + BN) * 32 * 2;
        const double work = 2.0 * BM * BN * 32 * ROUNDS;
        probe(alone, "FLOP", work, 2, 128, smem, mma_shared<BM, BN, false>, operands);
        probe(copying, "FLOP", work, 2, 128, smem, mma_shared<BM, BN, true>, operands);
    }

    // span: elements of `operands` that P-4 reads.
    void all(int span) {
        const double scalars = 1024.0 * 64 * ROUNDS;
        probe("P-2 ex2", "results", scalars, 2, 1024, 0, scalar<EX2>);
        probe("P-2 rcp", "results", scalars, 2, 1024, 0, scalar<RCP>);
        tile<128, 160>("P-3 mma 128x160 from shared memory", "P-3 mma 128x160 and copies");
        tile<128, 128>("P-3 mma 128x128 from shared memory", "P-3 mma 128x128 and copies");
        tile<64, 160>("P-3 mma 64x160 from shared memory", "P-3 mma 64x160 and copies");
        tile<64, 64>("P-3 mma 64x64 from shared memory", "P-3 mma 64x64 and copies");
        const double copied = 16384.0 * ROUNDS;
        probe("P-4 second-level cache to shared memory", "bytes", copied, 2, 128, 65536, cache_to_shared, operands, span);
        probe("P-7 mma from registers", "FLOP", 4.0 * 4 * 4 * 4096 * ROUNDS, 2, 128, 0, mma_registers<4, 4>);
        probe("P-11 fma", "results", scalars, 2, 1024, 0, scalar<FMA>);
        const double reads = 256.0 * 16 * 16 * ROUNDS;
        probe("P-11 16-byte reads, lanes in pairs", "bytes to registers", reads, 2, 256, 0, read_shared<true>);
        probe("P-11 16-byte reads, lanes in a row", "bytes to registers", reads, 2, 256, 0, read_shared<false>);
        if (about.major >= 9) {
            chains("one block each, no work", 1, 0);
            chains("one block each", 1, 32);
            chains("four blocks each", 4, 32);
        }
    }
};

int main(int count, char** words) {
    const bool wgmma = count == 2 && !strcmp(words[1], "wgmma");
    if (count > 1 && !wgmma) {
        fprintf(stderr, "%s: the only argument is wgmma\n", words[0]);
        return 2;
    }
    int cards = 0;
    const cudaError_t none = cudaGetDeviceCount(&cards);
    if (none != cudaSuccess || cards == 0) {
        fprintf(stderr, "%s: no CUDA card: %s\n", words[0], cudaGetErrorString(none));
        return 1;
    }
    Units c;
    CHECK(cudaGetDeviceProperties(&c.about, 0));
    CHECK(cudaMalloc(&c.out.clocks, 4096 * sizeof(long long)));
    CHECK(cudaMalloc(&c.out.sink, 1024 * sizeof(float)));
    const int span = 1 << 23;  // 16 MB: beyond the multiprocessors' own caches, within the second-level one
    CHECK(cudaMalloc(&c.operands, (span + 8192) * sizeof(T)));
    CHECK(cudaMemset(c.operands, 0, (span + 8192) * sizeof(T)));
    printf("{\"card\": \"%s\", \"multiprocessors\": %d, \"probes\": [", c.about.name, c.about.multiProcessorCount);
    if (wgmma) wgmma_probes(c);
    else c.all(span);
    printf("\n]}\n");
    return c.wrong ? 1 : 0;
}
