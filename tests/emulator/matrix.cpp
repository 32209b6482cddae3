// ldmatrix and mma: the lanes of a warp meet, and the last one computes for all, straight into their registers, which lie on
// the stacks of the lanes that wait. Most of the time of a kernel with tensor cores is spent here.

#include "block.h"
#include "matrix.h"
#include "dev.cuh"

namespace {
// The fragments of one warp. Word r of a, over the lanes, is 8×8 elements in row-major order; so are pairs of d, in float.
// b comes transposed, so it is turned as the lanes bring it.
struct Warp {
    alignas(64) unsigned a[4][32];
    alignas(64) unsigned short b[16][8];
    alignas(64) float d[2][64];
    float* to[32];
    unsigned* words[32];
    const char* rows[32];
    unsigned offsets[32];
};
struct Warps {
    Warp of[32];
};
thread_local Warps* warps = nullptr;

Warp& mine() {
    if (!warps) warps = new Warps;
    return warps->of[ldm_thread.warp];
}

// d += a · b, with exact products and sums in double, rounded once: the hardware does not round each sum either.
template <bool BFLOAT>
void multiply(Warp& w) {
    Row b[16];
    for (int k = 0; k < 16; k++) b[k] = convert<BFLOAT>(w.b[k]);
    for (int i = 0; i < 8; i++) {
        // Rows i and i + 8; even and odd products apart, so that sums need not wait for each other.
        Row even[2], odd[2] = {};
        double a[2][16];
        for (int half = 0; half < 2; half++) {
            const Row left = convert<BFLOAT>(w.a[half] + 4 * i), right = convert<BFLOAT>(w.a[half + 2] + 4 * i);
            memcpy(a[half], &left, sizeof left);
            memcpy(a[half] + 8, &right, sizeof right);
            Row32 d;
            memcpy(&d, w.d[half] + 8 * i, sizeof d);
            even[half] = __builtin_convertvector(d, Row);
        }
        for (int k = 0; k < 16; k += 2) {
            for (int half = 0; half < 2; half++) {
                even[half] += a[half][k] * b[k];
                odd[half] += a[half][k + 1] * b[k + 1];
            }
        }
        for (int half = 0; half < 2; half++) {
            const Row32 d = __builtin_convertvector(even[half] + odd[half], Row32);
            memcpy(w.d[half] + 8 * i, &d, sizeof d);
        }
    }
    for (int l = 0; l < 32; l++) {
        memcpy(w.to[l], w.d[0] + 2 * l, 8);
        memcpy(w.to[l] + 2, w.d[1] + 2 * l, 8);
    }
}
}  // namespace

API void ldm_emu_mma(float* d, const unsigned* a, const unsigned* b, int bfloat, int line) {
    Warp& w = mine();
    const unsigned l = ldm_thread.lane;
    for (int r = 0; r < 4; r++) w.a[r][l] = a[r];
    unsigned short* column = &w.b[2 * (l % 4)][l / 4];
    column[0] = (unsigned short)b[0];
    column[8] = (unsigned short)(b[0] >> 16);
    column[64] = (unsigned short)b[1];
    column[72] = (unsigned short)(b[1] >> 16);
    memcpy(w.d[0] + 2 * l, d, 8);
    memcpy(w.d[1] + 2 * l, d + 2, 8);
    w.to[l] = d;
    if (!warp_arrives(OP_MMA, line)) return warp_waits();
    if (bfloat) multiply<true>(w);
    else multiply<false>(w);
}

API void ldm_emu_ldmatrix(unsigned* r, const void* row, int count, int trans, int line) {
    Warp& w = mine();
    const int op = trans ? OP_LDMATRIX_TRANS : OP_LDMATRIX;
    const unsigned lane = ldm_thread.lane;
    if (lane < unsigned(8 * count)) {
        const char* what = trans ? "ldmatrix_trans" : "ldmatrix";
        w.offsets[lane] = shared_offset(row, 16, what, line);
        proxy_read(w.offsets[lane], what, line);
    }
    w.rows[lane] = (const char*)row;
    w.words[lane] = r;
    if (!warp_arrives(op, line)) return warp_waits();
    if (settings.banks) banks_matrix(w.offsets, unsigned(count), line);
    for (int l = 0; l < 32; l++) {
        for (int i = 0; i < count; i++) {
            const char* const* rows = w.rows + 8 * i;
            if (trans) {
                unsigned short low, high;
                memcpy(&low, rows[2 * (l % 4)] + 2 * (l / 4), 2);
                memcpy(&high, rows[2 * (l % 4) + 1] + 2 * (l / 4), 2);
                w.words[l][i] = low | unsigned(high) << 16;
            } else {
                memcpy(w.words[l] + i, rows[l / 4] + 4 * (l % 4), 4);
            }
        }
    }
}
