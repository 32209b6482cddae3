// dw[o,k] = the sum over output pixels m of dy[m,o] · x[m's window, k], k = (kh·KW + kw)·C + c, in f32: what
// conv2d_weight_grad_mma.cu refuses. Grid: (ceil(K / BN), ceil(O / BM), splits); a block owns a BM×BN tile of dw for one part of the
// pixels, a thread a 4×4 part of it.
// Tiles of dy and x pass through shared memory as f32, BK pixels at a time; pixels outside the image are zero. With more
// than one part, block z writes the z-th of `splits` partial results, and sum_parts (reduce.cu) adds them up in order.
//
// Barriers: in a turn the first makes both tiles visible, the second says that they are read.
// Edges: pixels from the part's end on, rows from O on and columns from K on are zeros in the tiles and are not stored.
// Occupancy: by registers, 40 on sm_80 and 47 on sm_90, six and five blocks on a multiprocessor; shared memory, 16 KB, allows five
// on sm_86 and sm_89. Wants: splits · each below 2^31 − 32.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int BM = 64;
constexpr int BN = 64;
constexpr int BK = 32;

struct Conv2dWeightGrad {
    float* dw;    // (splits,O,K)
    const T* x;   // (B,H,W,C)
    const T* dy;  // (B,OUT_H,OUT_W,O) = (M,O)
    int m, o, each;  // each: pixels of a part; a part past M writes zeros
    int h, w_, c;    // size of x in memory
    int kh, kw, out_h, out_w;
    int stride, top, left;
    int upsample;    // x counts as doubled by nearest neighbour
};

struct WeightGradSmem {
    float dy[BK][BM];
    float x[BK][BN];
};

extern "C" __global__ void __launch_bounds__(BLOCK) conv2d_weight_grad(const __grid_constant__ Conv2dWeightGrad p) {
    griddep_wait();
    WeightGradSmem& s = smem<WeightGradSmem>();
    const int thread = thread_x(), k0 = block_x() * BN, o0 = block_y() * BM;
    const int k_total = p.kh * p.kw * p.c, up = p.upsample ? 1 : 0;
    const int first = block_z() * p.each, last = first + p.each < p.m ? first + p.each : p.m;
    // A thread loads one column of both tiles, which are as wide as each other, for pixels lr, lr + 4, …
    static_assert(BM == BN, "one column of both");
    const int column = thread % BN, lr = thread / BN;
    constexpr int STEP = BLOCK / BN;
    const int k = k0 + column, window = k / p.c, c = k - window * p.c;
    const int kh = window / p.kw, kw = window - kh * p.kw;
    const bool in_k = k < k_total, in_o = o0 + column < p.o;
    // and computes rows ty·4 … and columns tx·4 … of the product.
    const int tx = thread % 16, ty = thread / 16;
    float acc[4][4] = {};

    for (int m0 = first; m0 < last; m0 += BK) {
        for (int r = lr; r < BK; r += STEP) {
            const int m = m0 + r;
            float x = 0.0f, dy = 0.0f;
            if (m < last) {
                if (in_o) dy = to_float(load(p.dy + (long long)m * p.o + o0 + column));
                const int image = m / (p.out_h * p.out_w), rest = m - image * (p.out_h * p.out_w);
                const int oh = rest / p.out_w;
                const int row = oh * p.stride - p.top + kh, col = (rest - oh * p.out_w) * p.stride - p.left + kw;
                if (in_k && row >= 0 && row < (p.h << up) && col >= 0 && col < (p.w_ << up)) {
                    x = to_float(load(p.x + (((long long)image * p.h + (row >> up)) * p.w_ + (col >> up)) * p.c + c));
                }
            }
            s.dy[r][column] = dy;
            s.x[r][column] = x;
        }
        sync_block();
        for (int j = 0; j < BK; j++) {
            float a[4], b[4];
            UNROLL
            for (int i = 0; i < 4; i++) a[i] = s.dy[j][ty * 4 + i];
            UNROLL
            for (int i = 0; i < 4; i++) b[i] = s.x[j][tx * 4 + i];
            UNROLL
            for (int i = 0; i < 4; i++) {
                UNROLL
                for (int l = 0; l < 4; l++) acc[i][l] = fma_f(a[i], b[l], acc[i][l]);
            }
        }
        sync_block();
    }

    float* dw = p.dw + (long long)block_z() * p.o * k_total;
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int l = 0; l < 4; l++) {
            const int row = o0 + ty * 4 + i, col = k0 + tx * 4 + l;
            if (row < p.o && col < k_total) store(dw + (long long)row * k_total + col, acc[i][l]);
        }
    }
}
