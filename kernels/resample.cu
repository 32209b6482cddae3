// The transposes of doubling by nearest neighbour, and of taking every stride-th pixel. Grid: ceil(n / BLOCK); a thread owns N
// channels of a pixel of y: 16 bytes where C is a multiple of them, else one. Wants: pointers aligned to 16 bytes.
// Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct SumPoolFwd {
    T* y;         // (B,H,W,C)
    const T* x;   // (B,2H,2W,C)
    int n;        // B·H·W·C / N
    int w, c;
};

template <int N>
DEV void pooled(const SumPoolFwd& p) {
    const unsigned i = block_x() * BLOCK + thread_x(), per_pixel = p.c / N;
    if (i >= unsigned(p.n)) return;
    const unsigned pixel = i / per_pixel, row = pixel / p.w;
    const long long line = 2LL * p.w * p.c;
    const T* x = p.x + row * 2 * line + (long long)(pixel - row * p.w) * 2 * p.c + (i - pixel * per_pixel) * N;
    const Vec<T, N> a = load<N>(x), b = load<N>(x + p.c), c = load<N>(x + line), d = load<N>(x + line + p.c);
    Vec<T, N> y;
    UNROLL
    for (int k = 0; k < N; k++) {
        const float above = to_float(a[k]) + to_float(b[k]), below = to_float(c[k]) + to_float(d[k]);
        y[k] = from_float<T>(above + below);
    }
    store(p.y + (long long)i * N, y);
}

// y = the sum of the four pixels of x that doubling made of one.
extern "C" __global__ void __launch_bounds__(BLOCK) sum_pool_fwd(const __grid_constant__ SumPoolFwd p) {
    griddep_wait();
    if (p.c % vec_width<T> == 0) {
        pooled<vec_width<T>>(p);
    } else {
        pooled<1>(p);
    }
}

struct DilateFwd {
    T* y;         // (B,OUT_H,OUT_W,C)
    const T* x;   // (B,H,W,C)
    int n;        // B·OUT_H·OUT_W·C / N
    int h, w, c, out_h, out_w, stride;
};

template <int N>
DEV void dilated(const DilateFwd& p) {
    const unsigned i = block_x() * BLOCK + thread_x(), per_pixel = p.c / N;
    if (i >= unsigned(p.n)) return;
    const unsigned pixel = i / per_pixel, row = pixel / p.out_w, image = row / p.out_h;
    const unsigned ow = pixel - row * p.out_w, oh = row - image * p.out_h, iw = ow / p.stride, ih = oh / p.stride;
    Vec<T, N> v;
    UNROLL
    for (int k = 0; k < N; k++) v[k] = from_float<T>(0.0f);
    if (ih * p.stride == oh && iw * p.stride == ow) {
        v = load<N>(p.x + (((long long)image * p.h + ih) * p.w + iw) * p.c + (i - pixel * per_pixel) * N);
    }
    store(p.y + (long long)i * N, v);
}

// y = x on every stride-th pixel, zeros between. Wants: x has a pixel for each, H >= ceil(OUT_H / stride), W likewise.
extern "C" __global__ void __launch_bounds__(BLOCK) dilate_fwd(const __grid_constant__ DilateFwd p) {
    griddep_wait();
    if (p.c % vec_width<T> == 0) {
        dilated<vec_width<T>>(p);
    } else {
        dilated<1>(p);
    }
}
