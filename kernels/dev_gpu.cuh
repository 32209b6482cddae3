// The device half of dev.cuh: for nvcc, sm_80 and later. The only place with inline PTX.
#pragma once

DEV unsigned thread_x() { return threadIdx.x; }
DEV unsigned block_x() { return blockIdx.x; }
DEV unsigned block_y() { return blockIdx.y; }
DEV unsigned block_z() { return blockIdx.z; }
DEV unsigned grid_x() { return gridDim.x; }
DEV unsigned grid_y() { return gridDim.y; }
DEV unsigned grid_z() { return gridDim.z; }
DEV unsigned block_dim_x() { return blockDim.x; }
DEV unsigned lane() { return threadIdx.x & 31u; }
DEV unsigned warp() { return threadIdx.x >> 5; }

// Waits until the kernels before this one in its stream have ended and what they wrote is seen. Where the launch did not allow this
// kernel to start before that (sm_90 and later; driver.rs says when), there is nothing to wait for.
DEV void griddep_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEV unsigned float_bits(float x) { return __float_as_uint(x); }
DEV float bits_float(unsigned b) { return __uint_as_float(b); }

DEV float to_float(float x) { return x; }
DEV float to_float(f16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
    return r;
}
DEV float to_float(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

template <class E>
struct FromFloat;
template <>
struct FromFloat<float> {
    DEV float of(float x) { return x; }
};
template <>
struct FromFloat<f16> {
    DEV f16 of(float x) {
        f16 r;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
        return r;
    }
};
template <>
struct FromFloat<bf16> {
    DEV bf16 of(float x) {
        bf16 r;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
        return r;
    }
};

template <int BYTES>
struct Raw;
template <>
struct Raw<2> {
    typedef unsigned short Type;
};
template <>
struct Raw<4> {
    typedef unsigned Type;
};
template <>
struct Raw<8> {
    typedef uint2 Type;
};
template <>
struct Raw<16> {
    typedef uint4 Type;
};

template <int N, class E>
DEV Vec<E, N> load(const E* p) {
    constexpr int BYTES = N * int(sizeof(E));
    static_assert(BYTES <= 16 || BYTES % 16 == 0, "an access is 2, 4, 8 or 16 bytes, or a few of 16");
    constexpr int STEP = BYTES < 16 ? BYTES : 16;
    typedef typename Raw<STEP>::Type R;
    Vec<E, N> r;
    UNROLL
    for (int i = 0; i < BYTES / STEP; i++) {
        const R raw = reinterpret_cast<const R*>(p)[i];
        __builtin_memcpy(reinterpret_cast<char*>(&r) + i * STEP, &raw, STEP);
    }
    return r;
}
template <class E>
DEV E load(const E* p) {
    return *p;
}
template <class E, int N>
DEV void store(E* p, const Vec<E, N>& v) {
    constexpr int BYTES = N * int(sizeof(E));
    static_assert(BYTES <= 16 || BYTES % 16 == 0, "an access is 2, 4, 8 or 16 bytes, or a few of 16");
    constexpr int STEP = BYTES < 16 ? BYTES : 16;
    typedef typename Raw<STEP>::Type R;
    UNROLL
    for (int i = 0; i < BYTES / STEP; i++) {
        R raw;
        __builtin_memcpy(&raw, reinterpret_cast<const char*>(&v) + i * STEP, STEP);
        reinterpret_cast<R*>(p)[i] = raw;
    }
}
template <class E>
DEV void store(E* p, E v) {
    *p = v;
}

template <class S>
DEV S& smem() {
    static_assert(sizeof(S) <= 48 * 1024, "static shared memory ends at 48 KB");
    __shared__ __align__(16) S storage;  // the widest access
    return storage;
}

DEV void sync_block() { __syncthreads(); }
DEV void sync_warp() { __syncwarp(); }

template <class V>
DEV V shfl_xor(V v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class V>
DEV V shfl_down(V v, int delta) {
    return __shfl_down_sync(0xffffffffu, v, delta);
}
template <class V>
DEV V shfl(V v, int from) {
    return __shfl_sync(0xffffffffu, v, from);
}
// The toolkit still holds the name `ballot`, for something that Volta removed.
#define ballot(pred) __ballot_sync(0xffffffffu, pred)

DEV float exp_f(float x) { return expf(x); }
DEV float exp2_f(float x) { return exp2f(x); }
DEV float log_f(float x) { return logf(x); }
DEV float sqrt_f(float x) { return sqrtf(x); }
DEV float erf_f(float x) { return erff(x); }
DEV float tanh_f(float x) { return tanhf(x); }
DEV float fma_f(float a, float b, float c) { return fmaf(a, b, c); }
DEV float min_f(float a, float b) { return fminf(a, b); }
DEV float max_f(float a, float b) { return fmaxf(a, b); }
DEV float abs_f(float x) { return fabsf(x); }
DEV float round_even_f(float x) { return rintf(x); }
// A product that is rounded by itself, never contracted into a fused multiply-add.
DEV float mul_rn_f(float a, float b) { return __fmul_rn(a, b); }
DEV double exp_d(double x) { return exp(x); }

// Each returns what was there before.
DEV unsigned long long atomic_min_u64(unsigned long long* p, unsigned long long v) { return atomicMin(p, v); }
DEV unsigned atomic_or_u32(unsigned* p, unsigned v) { return atomicOr(p, v); }
DEV unsigned atomic_add_u32(unsigned* p, unsigned v) { return atomicAdd(p, v); }

DEV float warp_sum(float v) {
    UNROLL
    for (int m = 16; m > 0; m >>= 1) v += shfl_xor(v, m);
    return v;
}
DEV float warp_max(float v) {
    UNROLL
    for (int m = 16; m > 0; m >>= 1) v = max_f(v, shfl_xor(v, m));
    return v;
}
template <int BLOCK>
DEV float block_sum(float v, float* scratch) {
    static_assert(BLOCK % WARP == 0, "whole warps");
    v = warp_sum(v);
    if (lane() == 0) scratch[warp()] = v;
    __syncthreads();
    float s = scratch[0];
    UNROLL
    for (int w = 1; w < BLOCK / WARP; w++) s += scratch[w];
    __syncthreads();
    return s;
}
template <int BLOCK>
DEV float block_max(float v, float* scratch) {
    static_assert(BLOCK % WARP == 0, "whole warps");
    v = warp_max(v);
    if (lane() == 0) scratch[warp()] = v;
    __syncthreads();
    float s = scratch[0];
    UNROLL
    for (int w = 1; w < BLOCK / WARP; w++) s = max_f(s, scratch[w]);
    __syncthreads();
    return s;
}

// ------------------------------------------------------------------------------ shared memory that is asked for at launch

// Shared memory beyond 48 KB. A file that uses it has a `constexpr int SMEM_BYTES`, which build.rs reads and the launch
// passes on; `static_assert(sizeof(S) == SMEM_BYTES)` beside it.
template <class S>
DEV S& smem_dynamic() {
    extern __shared__ __align__(1024) unsigned char storage[];
    return *reinterpret_cast<S*>(storage);
}

// Wide accesses to shared memory, N elements of up to 16 bytes in all.
template <int N, class E>
DEV Vec<E, N> load_shared(const E* p) {
    typedef typename Raw<N * int(sizeof(E))>::Type R;
    const R raw = *reinterpret_cast<const R*>(p);
    Vec<E, N> r;
    __builtin_memcpy(&r, &raw, sizeof raw);
    return r;
}
template <class E, int N>
DEV void store_shared(E* p, const Vec<E, N>& v) {
    typedef typename Raw<N * int(sizeof(E))>::Type R;
    R raw;
    __builtin_memcpy(&raw, &v, sizeof raw);
    *reinterpret_cast<R*>(p) = raw;
}

// ------------------------------------------------------------------------------------------------- asynchronous copies

DEV unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// Starts to copy 16 bytes from global to shared memory; where `in` is false nothing is read and zeros are written. Lands at
// any time until a `cp_async_wait` of this thread has waited for its group; other threads see it behind a barrier after that.
template <class E>
DEV void cp_async(E* to, const E* from, bool in) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(in ? 16 : 0)
                 : "memory");
}
// Closes the group of this thread's copies since the last commit; the group may be empty.
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's groups, the newest ones, have not landed.
template <int PENDING>
DEV void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --------------------------------------------------------------------------------------- matrices of 16-bit elements

// N matrices of 8×8 elements from shared memory: lane l names row l % 8 of matrix l / 8 (16 bytes, aligned); word i of lane
// l becomes elements 2(l % 4) and + 1 of row l / 4 of matrix i. With N = 2, lanes 16 to 31 name nothing that is read.
DEV void ldmatrix(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEV void ldmatrix(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same of the transposed matrices: word i of lane l becomes rows 2(l % 4) and + 1 of column l / 4 of matrix i.
DEV void ldmatrix_trans(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEV void ldmatrix_trans(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

template <class E>
struct Mma;
#define LDM_MMA(E, NAME)                                                                                              \
    template <>                                                                                                       \
    struct Mma<E> {                                                                                                   \
        DEV void run(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {                                 \
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                       \
                         ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                         \
        }                                                                                                             \
        DEV void run(float (&d)[4], const unsigned (&a)[2], unsigned b) {                                             \
            asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME                                        \
                         ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                                   \
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                         : "r"(a[0]), "r"(a[1]), "r"(b));                                                             \
        }                                                                                                             \
        DEV unsigned pack(float low, float high) {                                                                    \
            unsigned r;                                                                                               \
            asm("cvt.rn." NAME "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));                                 \
            return r;                                                                                                 \
        }                                                                                                             \
    }
LDM_MMA(f16, "f16");
LDM_MMA(bf16, "bf16");
#undef LDM_MMA

// d (16,8) += a (16,16) · b (16,8), in float. Lane l holds: of a, word r: row l/4 + 8(r%2), columns 2(l%4) + 8(r/2) and + 1;
// of b, word r: column l/4, rows 2(l%4) + 8r and + 1; of d, element i: row l/4 + 8(i/2), column 2(l%4) + i%2.
template <class E>
DEV void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    Mma<E>::run(d, a, b);
}
// The same with a (16,8) and b (8,8): the first two words of a and the first of b.
template <class E>
DEV void mma(float (&d)[4], const unsigned (&a)[2], unsigned b) {
    Mma<E>::run(d, a, b);
}
// Two floats as two E in a word, each rounded to nearest even.
template <class E>
DEV unsigned pack2(float low, float high) {
    return Mma<E>::pack(low, high);
}

// ------------------------------------------------------------------- products of a warpgroup, by the tensor cores of sm_90a

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What this thread wrote to shared memory before, itself or by copies that it has waited for, is there for the `wgmma`s behind the
// next barrier of the block: they read through the async proxy, which plain writes do not pass.
DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Before the first `wgmma` into or, as `wgmma_rows`, from registers that this thread has touched since a `wgmma_wait`.
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of the `wgmma`s since the last commit.
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING of the warpgroup's groups, the newest ones, are not done.
template <int PENDING>
DEV void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Waits for all of them, into d: what reads d stays behind the wait.
template <int TILES>
DEV void wgmma_wait_all(float (&d)[TILES][4]) {
    wgmma_wait<0>();
    UNROLL
    for (int i = 0; i < TILES * 4; i++) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}

template <class E, int N>
struct Wgmma;
// The registers of 16 columns in the text of an instruction, and as its operands.
#define LDM_D0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LDM_D1 LDM_D0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LDM_D2 LDM_D1 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define LDM_D3 LDM_D2 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define LDM_D4 LDM_D3 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define LDM_D5 LDM_D4 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define LDM_D6 LDM_D5 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define LDM_D7 LDM_D6 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define LDM_D8 LDM_D7 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define LDM_D9 LDM_D8 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define LDM_D10 LDM_D9 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define LDM_D11 LDM_D10 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define LDM_D12 LDM_D11 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define LDM_D13 LDM_D12 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define LDM_D14 LDM_D13 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define LDM_D15 LDM_D14 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define LDM_TILE(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define LDM_O0 LDM_TILE(0), LDM_TILE(1)
#define LDM_O3 LDM_O0, LDM_TILE(2), LDM_TILE(3), LDM_TILE(4), LDM_TILE(5), LDM_TILE(6), LDM_TILE(7)
#define LDM_O4 LDM_O3, LDM_TILE(8), LDM_TILE(9)
#define LDM_O7 LDM_O4, LDM_TILE(10), LDM_TILE(11), LDM_TILE(12), LDM_TILE(13), LDM_TILE(14), LDM_TILE(15)
#define LDM_O9 LDM_O7, LDM_TILE(16), LDM_TILE(17), LDM_TILE(18), LDM_TILE(19)
#define LDM_O12 LDM_O9, LDM_TILE(20), LDM_TILE(21), LDM_TILE(22), LDM_TILE(23), LDM_TILE(24), LDM_TILE(25)
#define LDM_O15 LDM_O12, LDM_TILE(26), LDM_TILE(27), LDM_TILE(28), LDM_TILE(29), LDM_TILE(30), LDM_TILE(31)
// A and B are the numbers of the operands behind those of d.
#define LDM_WGMMA(E, NAME, N, D, O, A, B)                                                                             \
    template <>                                                                                                       \
    struct Wgmma<E, N> {                                                                                              \
        DEV void run(float (&d)[N / 8][4], unsigned long long a, unsigned long long b) {                              \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                              \
                         " {" D "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}"                                              \
                         : O                                                                                          \
                         : "l"(a), "l"(b));                                                                           \
        }                                                                                                             \
    }
#define LDM_WGMMAS(E, NAME)                          \
    LDM_WGMMA(E, NAME, 16, LDM_D0, LDM_O0, 8, 9);    \
    LDM_WGMMA(E, NAME, 64, LDM_D3, LDM_O3, 32, 33);  \
    LDM_WGMMA(E, NAME, 80, LDM_D4, LDM_O4, 40, 41);  \
    LDM_WGMMA(E, NAME, 128, LDM_D7, LDM_O7, 64, 65); \
    LDM_WGMMA(E, NAME, 160, LDM_D9, LDM_O9, 80, 81); \
    LDM_WGMMA(E, NAME, 256, LDM_D15, LDM_O15, 128, 129)
LDM_WGMMAS(f16, "f16");
LDM_WGMMAS(bf16, "bf16");

template <class E, int N>
struct WgmmaRows;
#define LDM_D1_5 LDM_D1 ", %16, %17, %18, %19"
#define LDM_O1_5 LDM_O0, LDM_TILE(2), LDM_TILE(3), LDM_TILE(4)
// A to A3 and B are the numbers of the operands behind those of d; the last 1 transposes b.
#define LDM_WGMMA_ROWS(E, NAME, N, D, O, A, A1, A2, A3, B)                                                            \
    template <>                                                                                                       \
    struct WgmmaRows<E, N> {                                                                                          \
        DEV void run(float (&d)[N / 8][4], const unsigned (&a)[4], unsigned long long b) {                            \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                              \
                         " {" D "}, {%" #A ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 1;\n}"                 \
                         : O                                                                                          \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                       \
        }                                                                                                             \
    }
#define LDM_WGMMAS_ROWS(E, NAME)                                          \
    LDM_WGMMA_ROWS(E, NAME, 40, LDM_D1_5, LDM_O1_5, 20, 21, 22, 23, 24);  \
    LDM_WGMMA_ROWS(E, NAME, 64, LDM_D3, LDM_O3, 32, 33, 34, 35, 36);      \
    LDM_WGMMA_ROWS(E, NAME, 80, LDM_D4, LDM_O4, 40, 41, 42, 43, 44);      \
    LDM_WGMMA_ROWS(E, NAME, 160, LDM_D9, LDM_O9, 80, 81, 82, 83, 84)
LDM_WGMMAS_ROWS(f16, "f16");
LDM_WGMMAS_ROWS(bf16, "bf16");

// d (64,N) += a (64,16) · b (N,16)ᵀ, in float, by the four warps of a warpgroup together, all of whose threads name the same a and
// b by a `wgmma_descriptor`. Done at any time until a `wgmma_wait` for its group; until then d is nobody's to touch, nor the rows
// anybody's to write. Element [j][i] of thread t: row 16(t/32) + t%32/4 + 8(i/2), column 8j + 2(t%4) + i%2, as `mma` has it.
template <class E, int N>
DEV void wgmma(float (&d)[N / 8][4], unsigned long long a, unsigned long long b) {
    Wgmma<E, N>::run(d, a, b);
}

// d (64,N) += a (64,16) · b (16,N), of which a lies in registers, as that of `mma` does: register i of thread t has two columns, from
// 2(t%4) + 8(i/2) on, of row 16(t/32) + t%32/4 + 8(i%2). b by a `wgmma_rows_descriptor`. Until a
// `wgmma_wait` for its group nobody is to touch d or a, nor write b's rows.
template <class E, int N>
DEV void wgmma_rows(float (&d)[N / 8][4], const unsigned (&a)[4], unsigned long long b) {
    WgmmaRows<E, N>::run(d, a, b);
}
#endif

// ------------------------------------------------------------ copies by the memory accelerator (TMA), and what they arrive at

#if __CUDA_ARCH__ >= 900
// By one thread, once, before `fence_mbarriers` and a barrier of the block: `count` arrivals make a phase.
DEV void mbarrier_init(Mbarrier& bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&bar)), "r"(count) : "memory");
}
// What this thread has initialised is there for `tma_load`, which arrives through the async proxy.
DEV void fence_mbarriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
// One arrival. What this thread, and whoever it has met before, did is over for those who have waited for the phase.
DEV void mbarrier_arrive(Mbarrier& bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&bar)) : "memory");
}
// One arrival, and so many bytes of copies that belong to the phase and are begun after this.
DEV void mbarrier_expect(Mbarrier& bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&bar)), "r"(bytes) : "memory");
}
// Waits until a phase is over: 0 names the first, third, … and 1 the others, of which the newest is meant. Lanes come back one by
// one: `sync_warp` before what a warp does as a whole.
DEV void mbarrier_wait(Mbarrier& bar, int parity) {
    asm volatile("{\n.reg .pred over;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n@!over bra again;\n}" ::"r"(shared_address(&bar)),
                 "r"(parity)
                 : "memory");
}
// Starts to copy a box of a tensor of four axes, the innermost first, from these coordinates on; what lies outside the tensor is
// zeros, and counts. Lands at any time until a wait for the phase of `bar`. `to` lies at a multiple of 128 bytes, with a swizzle
// of 128 bytes (chunk c of each 128 at c ^ (row % 8)) of 1024. What threads wrote there themselves wants a `fence_proxy_async` before.
DEV void tma_load(void* to, const TensorMap& map, int c0, int c1, int c2, int c3, Mbarrier& bar) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
                     shared_address(to)),
                 "l"(&map), "r"(shared_address(&bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}
#endif

// 2^x to 2 ulp, zero where the result is subnormal.
DEV float exp2_fast_f(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// 1 / x to 1 ulp, zero where the result is subnormal.
DEV float rcp_fast_f(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// 1 / √x to 2^-22.9 of it; x normal.
DEV float rsqrt_fast_f(float x) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// old = *p; *p = old >= limit ? 0 : old + 1. Relaxed: put `fence_gpu` around it where it orders other accesses.
DEV unsigned atomic_inc_u32(unsigned* p, unsigned limit) { return atomicInc(p, limit); }
// What this thread wrote before is seen by all blocks before what it writes after; and it reads anew.
DEV void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
