// Rows of eight 16-bit elements, as doubles: products of them are exact.
#pragma once

#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

typedef double Row __attribute__((vector_size(64)));
typedef float Row32 __attribute__((vector_size(32)));
typedef unsigned Wide __attribute__((vector_size(32)));
typedef unsigned short Narrow __attribute__((vector_size(16)));

// Eight elements as doubles.
template <bool BFLOAT>
inline Row convert(const void* from) {
    Narrow bits;
    memcpy(&bits, from, sizeof bits);
#ifdef __F16C__
    if (!BFLOAT) return __builtin_convertvector((Row32)_mm256_cvtph_ps((__m128i)bits), Row);
#endif
    const Wide x = __builtin_convertvector(bits, Wide);
    if (BFLOAT) return __builtin_convertvector((Row32)(x << 16), Row);
    // As `to_float` of dev_emu.cuh; scaling by a power of two is exact.
    const Wide sign = (x & 0x8000u) << 16, magnitude = (x & 0x7fffu) << 13;
    const Wide infinite = (Wide)(magnitude >= 0x0f800000u);
    const Row32 scaled = (Row32)magnitude * 0x1p112f;
    const Wide word = sign | (infinite & (magnitude | 0x70000000u)) | (~infinite & (Wide)scaled);
    return __builtin_convertvector((Row32)word, Row);
}
