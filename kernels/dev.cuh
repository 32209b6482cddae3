// What a kernel may use: types, memory accesses, barriers, shuffles, reductions, mathematics. The only include of a
// kernel, and the only place with inline PTX. Every primitive has two halves: one for nvcc (sm_80 and later), and a host
// twin that calls the emulator of tests/emulator. A kernel that keeps to this file runs on both.
#pragma once

#ifdef __CUDACC__
#define DEV static __device__ __forceinline__
#define DEV_CONST constexpr __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
// Source lines travel to the emulator's reports only.
#define LDM_LINE
#define LDM_LINE_ONLY
#define LDM_HERE
#else
#define DEV static inline __attribute__((always_inline))
#define DEV_CONST constexpr inline
#define UNROLL
#define LDM_LINE , int line = __builtin_LINE()
#define LDM_LINE_ONLY int line = __builtin_LINE()
#define LDM_HERE , line
#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#endif

// ---------------------------------------------------------------------------------------------------------- types

// IEEE binary16 and bfloat16, as bits: arithmetic is done in float.
struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};

// N elements that move as one access.
template <class E, int N>
struct alignas(sizeof(E) * N) Vec {
    E v[N];
    __device__ __forceinline__ E& operator[](int i) { return v[i]; }
    __device__ __forceinline__ const E& operator[](int i) const { return v[i]; }
};

#if defined(T_F32)
typedef float T;
#elif defined(T_F16)
typedef f16 T;
#elif defined(T_BF16)
typedef bf16 T;
#endif
#if defined(U_F32)
typedef float U;
#elif defined(U_F16)
typedef f16 U;
#elif defined(U_BF16)
typedef bf16 U;
#endif

// Elements of type E in the widest access, 16 bytes.
template <class E>
constexpr int vec_width = 16 / int(sizeof(E));

constexpr float FLOAT_INF = __builtin_huge_valf();
constexpr float FLOAT_MAX = 3.402823466e+38f;
constexpr int WARP = 32;

template <class A>
DEV_CONST A ceil_div(A a, A b) {
    return (a + b - 1) / b;
}

// ------------------------------------------------------------------------------------------------- the device half
#ifdef __CUDACC__

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
    __shared__ S storage;
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

// --------------------------------------------------------------------------------------------------- the host half
#else

// The running thread, as the emulator sees it; one per OS thread, rewritten at each switch of fibers.
struct LdmThread {
    unsigned thread, lane, warp, block_dim;
    unsigned block[3], grid[3];
    const void* smem_key;
    void* smem;
    // One byte per 4 bytes of device memory: high nibble, which of them are allocated; low nibble, which are written.
    unsigned char* shadow;
    unsigned long long base, size;
};
#pragma GCC visibility push(default)
extern "C" {
extern __thread LdmThread ldm_thread __attribute__((tls_model("initial-exec")));
void ldm_emu_access(const void* p, unsigned bytes, unsigned align, int write, int line);
void* ldm_emu_smem(const void* key, unsigned long long bytes, unsigned align, int line);
void ldm_emu_sync_block(int line);
void ldm_emu_sync_warp(int line);
unsigned ldm_emu_warp(int what, unsigned value, int argument, int line);
float ldm_emu_block(int what, float value, float* scratch, unsigned block, int line);
}
#pragma GCC visibility pop
// What `ldm_emu_warp` and `ldm_emu_block` are asked for.
enum { LDM_XOR, LDM_DOWN, LDM_INDEX, LDM_BALLOT, LDM_SUM, LDM_MAX };

DEV unsigned thread_x() { return ldm_thread.thread; }
DEV unsigned block_x() { return ldm_thread.block[0]; }
DEV unsigned block_y() { return ldm_thread.block[1]; }
DEV unsigned block_z() { return ldm_thread.block[2]; }
DEV unsigned grid_x() { return ldm_thread.grid[0]; }
DEV unsigned grid_y() { return ldm_thread.grid[1]; }
DEV unsigned grid_z() { return ldm_thread.grid[2]; }
DEV unsigned block_dim_x() { return ldm_thread.block_dim; }
DEV unsigned lane() { return ldm_thread.lane; }
DEV unsigned warp() { return ldm_thread.warp; }

DEV unsigned float_bits(float x) {
    unsigned b;
    __builtin_memcpy(&b, &x, 4);
    return b;
}
DEV float bits_float(unsigned b) {
    float x;
    __builtin_memcpy(&x, &b, 4);
    return x;
}

DEV float to_float(float x) { return x; }
DEV float to_float(f16 x) {
    const unsigned s = unsigned(x.bits & 0x8000u) << 16, m = unsigned(x.bits & 0x7fffu) << 13;
    if (m >= 0x0f800000u) return bits_float(s | 0x70000000u | m);   // infinity, NaN: the exponent becomes 255
    return bits_float(s | float_bits(bits_float(m) * 0x1p112f));    // scaling by a power of two is exact
}
DEV float to_float(bf16 x) { return bits_float(unsigned(x.bits) << 16); }

template <class E>
struct FromFloat;
template <>
struct FromFloat<float> {
    DEV float of(float x) { return x; }
};
template <>
struct FromFloat<f16> {
    DEV f16 of(float x) {
        const unsigned b = float_bits(x), s = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
        if (a > 0x7f800000u) return f16{0x7fff};
        if (a >= 0x477ff000u) return f16{(unsigned short)(s | 0x7c00u)};
        if (a < 0x38800000u) {
            // Subnormal: adding 0.5 leaves a multiple of 2^-24 in the low bits, rounded to nearest even.
            const unsigned r = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;
            return f16{(unsigned short)(s | r)};
        }
        return f16{(unsigned short)(s | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13))};
    }
};
template <>
struct FromFloat<bf16> {
    DEV bf16 of(float x) {
        const unsigned b = float_bits(x);
        if ((b & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
        return bf16{(unsigned short)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16)};
    }
};

// Are `BYTES` at `p` allocated, written (for a read), and aligned? The common answer costs one look at the shadow.
template <int BYTES>
DEV void ldm_check(const void* p, bool write, int line) {
    typedef unsigned __attribute__((may_alias)) Word;
    const unsigned long long at = (unsigned long long)p - ldm_thread.base;
    if (at < ldm_thread.size && at % BYTES == 0) {
        const unsigned char* s = ldm_thread.shadow + (at >> 2);
        if (BYTES == 16 && *(const Word*)s == 0xffffffffu) return;
        if (BYTES == 8 && *(const unsigned short __attribute__((may_alias))*)s == 0xffffu) return;
        if (BYTES == 4 && *s == 0xffu) return;
        if (BYTES == 2) {
            const unsigned need = 0x33u << (at & 2);
            if ((*s & need) == need) return;
        }
    }
    ldm_emu_access(p, BYTES, BYTES, write, line);
}

template <int N, class E>
DEV Vec<E, N> load(const E* p LDM_LINE) {
    constexpr int BYTES = N * int(sizeof(E));
    static_assert(BYTES <= 16 || BYTES % 16 == 0, "an access is 2, 4, 8 or 16 bytes, or a few of 16");
    constexpr int STEP = BYTES < 16 ? BYTES : 16;
    for (int i = 0; i < BYTES / STEP; i++) ldm_check<STEP>((const char*)p + i * STEP, false, line);
    Vec<E, N> r;
    __builtin_memcpy(&r, p, BYTES);
    return r;
}
template <class E>
DEV E load(const E* p LDM_LINE) {
    ldm_check<int(sizeof(E))>(p, false, line);
    E r;
    __builtin_memcpy(&r, p, sizeof(E));
    return r;
}
template <class E, int N>
DEV void store(E* p, const Vec<E, N>& v LDM_LINE) {
    constexpr int BYTES = N * int(sizeof(E));
    static_assert(BYTES <= 16 || BYTES % 16 == 0, "an access is 2, 4, 8 or 16 bytes, or a few of 16");
    constexpr int STEP = BYTES < 16 ? BYTES : 16;
    for (int i = 0; i < BYTES / STEP; i++) ldm_check<STEP>((char*)p + i * STEP, true, line);
    __builtin_memcpy(p, &v, BYTES);
}
template <class E>
DEV void store(E* p, E v LDM_LINE) {
    ldm_check<int(sizeof(E))>(p, true, line);
    __builtin_memcpy(p, &v, sizeof(E));
}

template <class S>
inline char ldm_smem_key = 0;
template <class S>
DEV S& smem(LDM_LINE_ONLY) {
    static_assert(sizeof(S) <= 48 * 1024, "static shared memory ends at 48 KB");
    if (ldm_thread.smem_key != &ldm_smem_key<S>) return *(S*)ldm_emu_smem(&ldm_smem_key<S>, sizeof(S), alignof(S), line);
    return *(S*)ldm_thread.smem;
}

DEV void sync_block(LDM_LINE_ONLY) { ldm_emu_sync_block(line); }
DEV void sync_warp(LDM_LINE_ONLY) { ldm_emu_sync_warp(line); }

template <class V>
DEV V ldm_warp(int what, V v, int argument, int line) {
    static_assert(sizeof(V) == 4, "float, int or unsigned");
    unsigned b;
    __builtin_memcpy(&b, &v, 4);
    b = ldm_emu_warp(what, b, argument, line);
    __builtin_memcpy(&v, &b, 4);
    return v;
}
template <class V>
DEV V shfl_xor(V v, int mask LDM_LINE) {
    return ldm_warp(LDM_XOR, v, mask LDM_HERE);
}
template <class V>
DEV V shfl_down(V v, int delta LDM_LINE) {
    return ldm_warp(LDM_DOWN, v, delta LDM_HERE);
}
template <class V>
DEV V shfl(V v, int from LDM_LINE) {
    return ldm_warp(LDM_INDEX, v, from LDM_HERE);
}
DEV unsigned ballot(bool pred LDM_LINE) { return ldm_warp(LDM_BALLOT, unsigned(pred), 0 LDM_HERE); }

DEV float exp_f(float x) { return __builtin_expf(x); }
DEV float exp2_f(float x) { return __builtin_exp2f(x); }
DEV float log_f(float x) { return __builtin_logf(x); }
DEV float sqrt_f(float x) { return __builtin_sqrtf(x); }
DEV float erf_f(float x) { return __builtin_erff(x); }
DEV float tanh_f(float x) { return __builtin_tanhf(x); }
DEV float fma_f(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEV float min_f(float a, float b) { return a < b || b != b ? a : b; }
DEV float max_f(float a, float b) { return a > b || b != b ? a : b; }
DEV float abs_f(float x) { return __builtin_fabsf(x); }
DEV float round_even_f(float x) { return __builtin_rintf(x); }
DEV float mul_rn_f(float a, float b) { return a * b; }
DEV double exp_d(double x) { return __builtin_exp(x); }

DEV unsigned long long atomic_min_u64(unsigned long long* p, unsigned long long v LDM_LINE) {
    ldm_check<8>(p, false, line);
    unsigned long long old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (v < old && !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
DEV unsigned atomic_or_u32(unsigned* p, unsigned v LDM_LINE) {
    ldm_check<4>(p, false, line);
    return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
DEV unsigned atomic_add_u32(unsigned* p, unsigned v LDM_LINE) {
    ldm_check<4>(p, false, line);
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}

// One rendezvous in place of five shuffles; the additions are those of the device, in its order.
DEV float warp_sum(float v LDM_LINE) { return ldm_warp(LDM_SUM, v, 0 LDM_HERE); }
DEV float warp_max(float v LDM_LINE) { return ldm_warp(LDM_MAX, v, 0 LDM_HERE); }
template <int BLOCK>
DEV float block_sum(float v, float* scratch LDM_LINE) {
    static_assert(BLOCK % WARP == 0, "whole warps");
    return ldm_emu_block(LDM_SUM, v, scratch, BLOCK LDM_HERE);
}
template <int BLOCK>
DEV float block_max(float v, float* scratch LDM_LINE) {
    static_assert(BLOCK % WARP == 0, "whole warps");
    return ldm_emu_block(LDM_MAX, v, scratch, BLOCK LDM_HERE);
}
#endif

// ------------------------------------------------------------------------------------------------- for both halves

// Rounds to nearest even; a NaN stays one.
template <class E>
DEV E from_float(float x) {
    return FromFloat<E>::of(x);
}

DEV float rsqrt_f(float x) { return 1.0f / sqrt_f(x); }
DEV bool is_finite_f(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

// sin(x + quarter · π/2), to 2 ulp for |x| < 1e5. Written out because the library's reduction for huge arguments needs a
// stack frame in local memory.
DEV float sin_quarter(float x, int quarter) {
    const float j = round_even_f(x * 0.636619772f);
    float r = fma_f(j, -1.57079601287841796875f, x);
    r = fma_f(j, -3.1391647326017846e-7f, r);
    r = fma_f(j, -5.3903025299577648e-15f, r);
    const float q = r * r;
    const int turn = int(j) + quarter;
    float s;
    if (turn & 1) {
        s = fma_f(q, 2.443315711809948e-5f, -1.388731625493765e-3f);
        s = fma_f(s, q, 4.166664568298827e-2f);
        s = fma_f(s, q, -0.5f);
        s = fma_f(s, q, 1.0f);
    } else {
        s = fma_f(q, -1.9515295891e-4f, 8.3321608736e-3f);
        s = fma_f(s, q, -1.6666654611e-1f);
        s = fma_f(s * q, r, r);
    }
    return turn & 2 ? -s : s;
}
DEV float sin_f(float x) { return sin_quarter(x, 0); }
DEV float cos_f(float x) { return sin_quarter(x, 1); }

// x · sigmoid(x); for x far below zero the exponential is infinite and the quotient zero.
DEV float silu_f(float x) { return x / (1.0f + exp_f(-x)); }
DEV float gelu_f(float x) { return 0.5f * x * (1.0f + erf_f(x * 0.707106781f)); }

// The activations by number: 0 none, 1 SiLU, 2 GELU, 3 quick GELU, 4 GELU by tanh.
DEV float activate_f(int act, float x) {
    switch (act) {
        case 1: return silu_f(x);
        case 2: return gelu_f(x);
        case 3: return x / (1.0f + exp_f(-1.702f * x));
        case 4: return 0.5f * x * (1.0f + tanh_f(0.797884561f * fma_f(0.044715f * x * x, x, x)));
        default: return x;
    }
}

// a + b as a rounded sum and what the rounding lost (Knuth's two-sum).
struct Pair {
    float high, low;
};
DEV Pair two_sum(float a, float b) {
    const float high = a + b, t = high - a;
    return {high, (a - (high - t)) + (b - t)};
}
