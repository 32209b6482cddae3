// y = act(conv(x, w) + bias + time) + residual as implicit GEMM: rows m are output pixels, columns o output channels, the
// sum runs over k = (kh·KW + kw)·C + c. Grid: (ceil(M / BM), ceil(O / BN)); a block owns a BM×BN tile of y, a thread a
// 4×4 part of it. Tiles of x and w pass through shared memory as f32, BK of the sum at a time.
//
// Barriers: in a turn the first makes both tiles visible, the second says that they are read.
// Edges: k from KH·KW·C on, rows from M on, columns from O on and pixels outside the image are zeros in the tiles; rows and
// columns beyond are not stored.
// Occupancy: by registers (48), five blocks on a multiprocessor; shared memory, 17 KB, allows as many on every card.
// Wants: C > 0; M, and K = KH·KW·C, below 2^31, less a tile.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int BM = 64;
constexpr int BN = 64;
constexpr int BK = 32;

struct Conv2dFwd {
    T* y;               // (B,OUT_H,OUT_W,O) = (M,O)
    const T* x;         // (B,H,W,C)
    const T* w;         // (O,KH,KW,C)
    const T* bias;      // (O) or null
    const T* time;      // (time_rows,O) or null
    const int* counter; // null, or the row of time that serves every image
    const T* residual;  // (M,O) or null
    int m, o;
    int h, w_, c;       // size of x in memory
    int kh, kw, out_h, out_w;
    int stride, top, left;
    int upsample;       // x counts as doubled by nearest neighbour
    int time_rows;      // 1, or one per image; any number with a counter
    int act;            // by the numbers of activate_f
};

struct ConvSmem {
    float x[BK][BM + 4];  // a warp writes a column: with four more it meets 8 banks, not one; rows stay aligned to 16 bytes
    float w[BK][BN + 4];
};

// Where output pixel m reads: image, and the row and column of its window's corner.
struct Pixel {
    int image, row, col;
};

DEV Pixel pixel(const Conv2dFwd& p, int m) {
    const int image = m / (p.out_h * p.out_w), rest = m - image * (p.out_h * p.out_w);
    const int row = rest / p.out_w;
    return {image, row * p.stride - p.top, (rest - row * p.out_w) * p.stride - p.left};
}

extern "C" __global__ void __launch_bounds__(BLOCK) conv2d_fwd(const __grid_constant__ Conv2dFwd p) {
    griddep_wait();
    ConvSmem& s = smem<ConvSmem>();
    const int thread = thread_x(), m0 = block_x() * BM, o0 = block_y() * BN;
    const int k_total = p.kh * p.kw * p.c, up = p.upsample ? 1 : 0;
    // A thread loads column `lk` of both tiles, for rows lr, lr + 8, …
    const int lk = thread % BK, lr = thread / BK;
    constexpr int STEP = BLOCK / BK;
    // and computes rows ty·4 … and columns tx·4 … of the product.
    const int tx = thread % 16, ty = thread / 16;
    float acc[4][4] = {};

    for (int k0 = 0; k0 < k_total; k0 += BK) {
        const int k = k0 + lk, window = k / p.c, c = k - window * p.c;
        const int kh = window / p.kw, kw = window - kh * p.kw;
        for (int r = lr; r < BM; r += STEP) {
            float v = 0.0f;
            if (k < k_total && m0 + r < p.m) {
                const Pixel at = pixel(p, m0 + r);
                const int row = at.row + kh, col = at.col + kw;
                if (row >= 0 && row < (p.h << up) && col >= 0 && col < (p.w_ << up)) {
                    const long long i = ((long long)at.image * p.h + (row >> up)) * p.w_ + (col >> up);
                    v = to_float(load(p.x + i * p.c + c));
                }
            }
            s.x[lk][r] = v;
        }
        for (int r = lr; r < BN; r += STEP) {
            const bool in = k < k_total && o0 + r < p.o;
            s.w[lk][r] = in ? to_float(load(p.w + (long long)(o0 + r) * k_total + k)) : 0.0f;
        }
        sync_block();
        for (int j = 0; j < BK; j++) {
            float a[4], b[4];
            UNROLL
            for (int i = 0; i < 4; i++) a[i] = s.x[j][ty * 4 + i];
            UNROLL
            for (int i = 0; i < 4; i++) b[i] = s.w[j][tx * 4 + i];
            UNROLL
            for (int i = 0; i < 4; i++) {
                UNROLL
                for (int l = 0; l < 4; l++) acc[i][l] = fma_f(a[i], b[l], acc[i][l]);
            }
        }
        sync_block();
    }

    UNROLL
    for (int i = 0; i < 4; i++) {
        const int m = m0 + ty * 4 + i;
        if (m >= p.m) continue;
        const int image = p.counter ? load(p.counter) : p.time_rows > 1 ? m / (p.out_h * p.out_w) : 0;
        UNROLL
        for (int l = 0; l < 4; l++) {
            const int o = o0 + tx * 4 + l;
            if (o >= p.o) continue;
            const long long at = (long long)m * p.o + o;
            float v = acc[i][l];
            if (p.bias) v += to_float(load(p.bias + o));
            if (p.time) v += to_float(load(p.time + (long long)image * p.o + o));
            v = activate_f(p.act, v);
            if (p.residual) v += to_float(load(p.residual + at));
            store(p.y + at, from_float<T>(v));
        }
    }
}
