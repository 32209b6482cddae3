// The transposes of doubling by nearest neighbour, and of taking every stride-th pixel. Grid: ceil(n / BLOCK); a thread owns one
// element of y.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct SumPoolFwd {
    T* y;         // (B,H,W,C)
    const T* x;   // (B,2H,2W,C)
    long long n;  // B·H·W·C
    int w, c;
};

// y = the sum of the four pixels of x that doubling made of one.
extern "C" __global__ void __launch_bounds__(BLOCK) sum_pool_fwd(const __grid_constant__ SumPoolFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const long long pixel = i / p.c, row = pixel / p.w;
    const long long line = 2LL * p.w * p.c;
    const T* x = p.x + row * 2 * line + (pixel - row * p.w) * 2 * p.c + (i - pixel * p.c);
    const float above = to_float(load(x)) + to_float(load(x + p.c));
    const float below = to_float(load(x + line)) + to_float(load(x + line + p.c));
    store(p.y + i, from_float<T>(above + below));
}

struct DilateFwd {
    T* y;         // (B,OUT_H,OUT_W,C)
    const T* x;   // (B,H,W,C)
    long long n;  // B·OUT_H·OUT_W·C
    int h, w, c, out_h, out_w, stride;
};

// y = x on every stride-th pixel, zeros between. Wants: x has a pixel for each, H >= ceil(OUT_H / stride), W likewise.
extern "C" __global__ void __launch_bounds__(BLOCK) dilate_fwd(const __grid_constant__ DilateFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const long long pixel = i / p.c, row = pixel / p.out_w, image = row / p.out_h;
    const int iw = int(pixel - row * p.out_w), ih = int(row - image * p.out_h);
    T v = from_float<T>(0.0f);
    if (ih % p.stride == 0 && iw % p.stride == 0) {
        v = load(p.x + ((image * p.h + ih / p.stride) * p.w + iw / p.stride) * p.c + (i - pixel * p.c));
    }
    store(p.y + i, v);
}
