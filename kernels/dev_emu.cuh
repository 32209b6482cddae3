// The host half of dev.cuh: each primitive as a call of the emulator in tests/emulator.
#pragma once

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
void* ldm_emu_smem_dynamic(const void* key, unsigned long long bytes, unsigned align, int line);
void ldm_emu_shared(const void* p, unsigned bytes, int write, int line);
void ldm_emu_cp_async(void* to, const void* from, int in, int line);
void ldm_emu_cp_async_commit(int line);
void ldm_emu_cp_async_wait(int pending, int line);
void ldm_emu_ldmatrix(unsigned* r, const void* row, int count, int trans, int line);
void ldm_emu_mma(float* d, const unsigned* a, const unsigned* b, int bfloat, int line);
void ldm_emu_fence(int line);
unsigned ldm_emu_shared_address(const void* p);
void ldm_emu_fence_proxy(int line);
void ldm_emu_wgmma(float* d, const unsigned* left, unsigned long long a, unsigned long long b, int columns, int bfloat, int line);
void ldm_emu_wgmma_fence(int line);
void ldm_emu_wgmma_commit(int line);
void ldm_emu_wgmma_wait(int pending, int line);
void ldm_emu_mbarrier_init(void* bar, int count, int line);
void ldm_emu_fence_mbarriers(int line);
void ldm_emu_mbarrier_arrive(void* bar, int bytes, int line);
void ldm_emu_mbarrier_wait(void* bar, int parity, int line);
void ldm_emu_tma_load(void* to, const void* map, const int* at, void* bar, int line);
void ldm_emu_atomic(int done);
void ldm_emu_griddep_wait();
}
#pragma GCC visibility pop
// What `ldm_emu_warp` and `ldm_emu_block` are asked for.
enum { LDM_XOR, LDM_DOWN, LDM_INDEX, LDM_BALLOT, LDM_SUM, LDM_MAX };
DEV bool ldm_is_bf16(f16) { return false; }
DEV bool ldm_is_bf16(bf16) { return true; }

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

DEV void griddep_wait() { ldm_emu_griddep_wait(); }

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

// The emulator learns of an atomic operation before and after.
struct LdmAtomic {
    LdmAtomic() { ldm_emu_atomic(0); }
    ~LdmAtomic() { ldm_emu_atomic(1); }
};
DEV unsigned long long atomic_min_u64(unsigned long long* p, unsigned long long v LDM_LINE) {
    ldm_check<8>(p, false, line);
    const LdmAtomic around;
    unsigned long long old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (v < old && !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
DEV unsigned atomic_or_u32(unsigned* p, unsigned v LDM_LINE) {
    ldm_check<4>(p, false, line);
    const LdmAtomic around;
    return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
DEV unsigned atomic_add_u32(unsigned* p, unsigned v LDM_LINE) {
    ldm_check<4>(p, false, line);
    const LdmAtomic around;
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

template <class S>
DEV S& smem_dynamic(LDM_LINE_ONLY) {
    if (ldm_thread.smem_key != &ldm_smem_key<S>)
        return *(S*)ldm_emu_smem_dynamic(&ldm_smem_key<S>, sizeof(S), alignof(S), line);
    return *(S*)ldm_thread.smem;
}
template <int N, class E>
DEV Vec<E, N> load_shared(const E* p LDM_LINE) {
    ldm_emu_shared(p, N * int(sizeof(E)), 0, line);
    Vec<E, N> r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
}
template <class E, int N>
DEV void store_shared(E* p, const Vec<E, N>& v LDM_LINE) {
    ldm_emu_shared(p, N * int(sizeof(E)), 1, line);
    __builtin_memcpy(p, &v, sizeof v);
}

template <class E>
DEV void cp_async(E* to, const E* from, bool in LDM_LINE) {
    if (in) ldm_check<16>(from, false, line);
    ldm_emu_cp_async(to, from, in, line);
}
DEV void cp_async_commit(LDM_LINE_ONLY) { ldm_emu_cp_async_commit(line); }
template <int PENDING>
DEV void cp_async_wait(LDM_LINE_ONLY) {
    ldm_emu_cp_async_wait(PENDING, line);
}

DEV void ldmatrix(unsigned (&r)[4], const void* row LDM_LINE) { ldm_emu_ldmatrix(r, row, 4, 0, line); }
DEV void ldmatrix(unsigned (&r)[2], const void* row LDM_LINE) { ldm_emu_ldmatrix(r, row, 2, 0, line); }
DEV void ldmatrix_trans(unsigned (&r)[4], const void* row LDM_LINE) { ldm_emu_ldmatrix(r, row, 4, 1, line); }
DEV void ldmatrix_trans(unsigned (&r)[2], const void* row LDM_LINE) { ldm_emu_ldmatrix(r, row, 2, 1, line); }

template <class E>
DEV void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2] LDM_LINE) {
    static_assert(sizeof(E) == 2, "f16 or bf16");
    ldm_emu_mma(d, a, b, ldm_is_bf16(E{}), line);
}
template <class E>
DEV void mma(float (&d)[4], const unsigned (&a)[2], unsigned b LDM_LINE) {
    static_assert(sizeof(E) == 2, "f16 or bf16");
    const unsigned rows[4] = {a[0], a[1], 0, 0}, columns[2] = {b, 0};
    ldm_emu_mma(d, rows, columns, ldm_is_bf16(E{}), line);
}
template <class E>
DEV unsigned pack2(float low, float high) {
    return unsigned(FromFloat<E>::of(low).bits) | unsigned(FromFloat<E>::of(high).bits) << 16;
}

DEV unsigned shared_address(const void* p) { return ldm_emu_shared_address(p); }
DEV void fence_proxy_async(LDM_LINE_ONLY) { ldm_emu_fence_proxy(line); }
DEV void wgmma_fence(LDM_LINE_ONLY) { ldm_emu_wgmma_fence(line); }
DEV void wgmma_commit(LDM_LINE_ONLY) { ldm_emu_wgmma_commit(line); }
template <int PENDING>
DEV void wgmma_wait(LDM_LINE_ONLY) {
    ldm_emu_wgmma_wait(PENDING, line);
}
template <int TILES>
DEV void wgmma_wait_all(float (&)[TILES][4] LDM_LINE) {
    ldm_emu_wgmma_wait(0, line);
}
template <class E, int N>
DEV void wgmma(float (&d)[N / 8][4], unsigned long long a, unsigned long long b LDM_LINE) {
    static_assert(sizeof(E) == 2, "f16 or bf16");
    ldm_emu_wgmma(d[0], nullptr, a, b, N, ldm_is_bf16(E{}), line);
}
template <class E, int N>
DEV void wgmma_rows(float (&d)[N / 8][4], const unsigned (&a)[4], unsigned long long b LDM_LINE) {
    static_assert(sizeof(E) == 2, "f16 or bf16");
    ldm_emu_wgmma(d[0], a, 0, b, N, ldm_is_bf16(E{}), line);
}

DEV void mbarrier_init(Mbarrier& bar, int count LDM_LINE) { ldm_emu_mbarrier_init(&bar, count, line); }
DEV void fence_mbarriers(LDM_LINE_ONLY) { ldm_emu_fence_mbarriers(line); }
DEV void mbarrier_arrive(Mbarrier& bar LDM_LINE) { ldm_emu_mbarrier_arrive(&bar, -1, line); }
DEV void mbarrier_expect(Mbarrier& bar, int bytes LDM_LINE) { ldm_emu_mbarrier_arrive(&bar, bytes, line); }
DEV void mbarrier_wait(Mbarrier& bar, int parity LDM_LINE) { ldm_emu_mbarrier_wait(&bar, parity, line); }
DEV void tma_load(void* to, const TensorMap& map, int c0, int c1, int c2, int c3, Mbarrier& bar LDM_LINE) {
    const int at[4] = {c0, c1, c2, c3};
    ldm_emu_tma_load(to, &map, at, &bar, line);
}

DEV float exp2_fast_f(float x) { return x < -126.0f ? 0.0f : __builtin_exp2f(x); }
DEV float rcp_fast_f(float x) { return abs_f(x) > 0x1p126f ? 0.0f * x : 1.0f / x; }
DEV float rsqrt_fast_f(float x) { return 1.0f / __builtin_sqrtf(x); }

DEV unsigned atomic_inc_u32(unsigned* p, unsigned limit LDM_LINE) {
    ldm_check<4>(p, false, line);
    const LdmAtomic around;
    unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
DEV void fence_gpu(LDM_LINE_ONLY) { ldm_emu_fence(line); }
