// What a kernel may use: types, memory accesses, barriers, shuffles, reductions, asynchronous copies, matrices, mathematics.
// The only include of a kernel. Every primitive has two halves: one for nvcc (dev_gpu.cuh, the only place with inline PTX),
// and a host twin that calls the emulator of tests/emulator (dev_emu.cuh). A kernel that keeps to these runs on both.
//
// The first statement of every kernel is `griddep_wait();`: a kernel may be launched so that its blocks are placed while the one
// before it still ends, and nothing in global memory is read or written before that one, and so all before it, are over.
#pragma once

#ifdef __CUDACC__
#define DEV static __device__ __forceinline__
#define DEV_CONST constexpr __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
// Source lines travel to the emulator's reports only.
#define LDM_LINE
#define LDM_LINE_ONLY
#define LDM_HERE
#else
#define DEV static inline __attribute__((always_inline))
#define DEV_CONST constexpr inline
#define UNROLL
#define ROLLED
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

// How a tensor lies in global memory and which box of it `tma_load` takes: made by the driver (cuTensorMapEncodeTiled). A kernel
// has it in its arguments, and gives its address there.
struct alignas(128) TensorMap {
    unsigned long long opaque[16];
};
// A barrier in shared memory that counts arrivals of threads and bytes of copies: a phase is over when both are complete, and
// the next one begins by itself.
struct Mbarrier {
    unsigned long long state;
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

#ifdef __CUDACC__
#include "dev_gpu.cuh"
#else
#include "dev_emu.cuh"
#endif

// ------------------------------------------------------------------------------------------------- for both halves

// Rounds to nearest even; a NaN stays one.
template <class E>
DEV E from_float(float x) {
    return FromFloat<E>::of(x);
}

// N elements that were loaded and wait for their use: as words, in half the registers that elements of 16 bits take one by one.
template <class E, int N>
struct Loaded {
    Vec<unsigned, N * int(sizeof(E)) / 4> words;
    __device__ __forceinline__ void load_from(const E* p) {
        words = load<N * int(sizeof(E)) / 4>(reinterpret_cast<const unsigned*>(p));
    }
    __device__ __forceinline__ Vec<E, N> get() const {
        Vec<E, N> v;
        __builtin_memcpy(&v, &words, sizeof v);
        return v;
    }
};
template <class E>
struct Loaded<E, 1> {
    Vec<E, 1> v;
    __device__ __forceinline__ void load_from(const E* p) { v = load<1>(p); }
    __device__ __forceinline__ Vec<E, 1> get() const { return v; }
};

// How `wgmma` is told of a matrix in shared memory: rows of 128 bytes, 64 elements, whose 16-byte chunk c stands at c ^ (row % 8).
// `first` is its first row and lies at a multiple of 1024 bytes, since the hardware takes row % 8 from the address. The next 16
// elements of each row: 2 more. PTX ISA, "Matrix Descriptor Format": address and strides in units of 16 bytes; the stride between
// groups of eight rows in bits 32 to 45; 1 in bits 62 and 63 for this swizzle, with which bits 16 to 29 do not matter.
DEV unsigned long long wgmma_descriptor(const void* first) {
    return (unsigned long long)(shared_address(first) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// The same of the right operand of `wgmma_rows`, (K,N) with the columns of a row beside each other: 64 of them, in rows of 128 bytes as
// above, and the next 64 `beside` bytes further on, a multiple of 1024. The next 16 rows: 128 more. (The stride between such blocks
// of columns stands in bits 16 to 29.)
DEV unsigned long long wgmma_rows_descriptor(const void* first, int beside) {
    return (unsigned long long)(shared_address(first) >> 4) | (unsigned long long)(beside >> 4) << 16 | 64ull << 32 | 1ull << 62;
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
// The same of two, to 6 ulp and the rounding of the exponents, with one reciprocal: that of a product, times the other factor, is that of a
// factor. Exponents end at 60, so that the product is finite: below -41 a result is at most |x| · 2^-60 from the true one.
DEV void silu_fast_pair(float& x, float& y) {
    const float a = 1.0f + exp2_fast_f(min_f(x * -1.44269504f, 60.0f));
    const float b = 1.0f + exp2_fast_f(min_f(y * -1.44269504f, 60.0f));
    const float both = rcp_fast_f(a * b);
    x *= both * b;
    y *= both * a;
}
// Their derivatives, sigma(x) + x · sigma(x) · sigma(-x), in the same way: below -41 off by |x| · 2^-59.
DEV void silu_slope_fast_pair(float& x, float& y) {
    const float e = exp2_fast_f(min_f(x * -1.44269504f, 60.0f)), f = exp2_fast_f(min_f(y * -1.44269504f, 60.0f));
    const float both = rcp_fast_f((1.0f + e) * (1.0f + f)), s = both * (1.0f + f), t = both * (1.0f + e);
    x = fma_f(x * s, e * s, s);
    y = fma_f(y * t, f * t, t);
}
// GELU by Abramowitz and Stegun, 7.1.26: the tail is a product, so nothing cancels for x below zero; to |x| · 1e-7.
DEV float gelu_fast_f(float x) {
    const float t = rcp_fast_f(fma_f(0.3275911f * 0.707106781f, abs_f(x), 1.0f));
    float q = fma_f(t, 0.5f * 1.061405429f, 0.5f * -1.453152027f);
    q = fma_f(t, q, 0.5f * 1.421413741f);
    q = fma_f(t, q, 0.5f * -0.284496736f);
    q = fma_f(t, q, 0.5f * 0.254829592f);
    q = q * t * exp2_fast_f(x * x * -0.721347520f);
    return x * (x < 0.0f ? q : 1.0f - q);
}
DEV float gelu_f(float x) { return 0.5f * x * (1.0f + erf_f(x * 0.707106781f)); }

// The activations by number: 0 none, 1 SiLU, 2 GELU, 3 quick GELU, 4 GELU by tanh, 5 ReLU, 6 leaky ReLU. NaN stays.
DEV float activate_f(int act, float x) {
    switch (act) {
        case 1: return silu_f(x);
        case 2: return gelu_f(x);
        case 3: return x / (1.0f + exp_f(-1.702f * x));
        case 4: return 0.5f * x * (1.0f + tanh_f(0.797884561f * fma_f(0.044715f * x * x, x, x)));
        case 5: return x < 0.0f ? 0.0f : x;
        case 6: return x < 0.0f ? 0.2f * x : x;
        default: return x;
    }
}

// sigma(z) + x sigma(z) sigma(-z) dz, where sigma(-z) = e^-z sigma(z): 1 - sigma(z) would have no digits left for large z.
DEV float gated_slope_f(float x, float z, float dz) {
    // Below -80, where both terms are zero in f32, the exponential would be infinite.
    const float e = exp_f(-max_f(z, -80.0f)), s = 1.0f / (1.0f + e);
    return fma_f(x * dz, s * (e * s), s);
}

// Their derivatives, by the same numbers.
DEV float slope_f(int act, float x) {
    switch (act) {
        case 1: return gated_slope_f(x, x, 1.0f);
        // Phi(x) + x phi(x)
        case 2: return fma_f(0.398942280f * x, exp_f(-0.5f * x * x), 0.5f * (1.0f + erf_f(x * 0.707106781f)));
        case 3: return gated_slope_f(x, 1.702f * x, 1.702f);
        case 4: {
            const float z = 1.59576912f * fma_f(0.044715f * x * x, x, x);
            return gated_slope_f(x, z, 1.59576912f * fma_f(0.134145f * x, x, 1.0f));
        }
        case 5: return x > 0.0f ? 1.0f : 0.0f;
        case 6: return x > 0.0f ? 1.0f : 0.2f;
        default: return 1.0f;
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

// Count, mean, and sum of squares about it, of a set of numbers; merged without cancellation (Chan, Golub, LeVeque 1979).
struct Moments {
    float n, mean, m2;
};
DEV Moments merged(Moments a, Moments b) {
    const float n = a.n + b.n, share = n > 0.0f ? b.n * rcp_fast_f(n) : 0.0f, d = b.mean - a.mean;
    return {n, fma_f(d, share, a.mean), fma_f(d * d, a.n * share, a.m2 + b.m2)};
}
// Of each LANES lanes in a row, a power of two, together; all of them hold the same bits.
template <int LANES>
DEV float lanes_sum(float v) {
    UNROLL
    for (int m = LANES / 2; m > 0; m >>= 1) v += shfl_xor(v, m);
    return v;
}
// The sets of a warp's lanes as one; all lanes hold the same bits.
DEV Moments warp_merged(Moments m) {
    const float n = warp_sum(m.n), sum = warp_sum(m.n * m.mean);
    const float mean = n > 0.0f ? sum * rcp_fast_f(n) : 0.0f, d = m.mean - mean;
    return {n, mean, warp_sum(fma_f(m.n * d, d, m.m2))};
}
// The same of a few sets of equal size, taken in one by one: sums of means less the first one. What cancels is at most
// their number times the variance, so dozens are sound in f32; more are merged.
struct EqualSets {
    float sets = 0.0f, first = 0.0f, sum = 0.0f, square = 0.0f, m2 = 0.0f;
    // Where `in` is false nothing is taken in: a select in place of a branch.
    __device__ __forceinline__ void add(float mean, float m2_of_set, bool in = true) {
        first = sets == 0.0f ? mean : first;
        const float d = in ? mean - first : 0.0f;
        sets += in ? 1.0f : 0.0f;
        sum += d;
        square = fma_f(d, d, square);
        m2 += in ? m2_of_set : 0.0f;
    }
    // With `each` numbers in a set.
    __device__ __forceinline__ Moments moments(float each) const {
        const float mean = sets > 0.0f ? sum * rcp_fast_f(sets) : 0.0f;
        return {sets * each, first + mean, fma_f(each, max_f(fma_f(-sum, mean, square), 0.0f), m2)};
    }
};
