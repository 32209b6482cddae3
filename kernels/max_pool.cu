// y = the largest of each 2x2 pixels of x, the first of them where several are; a NaN is larger than all, the last of
// several NaN counts. A last odd row or column is left out. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;

// Which of the four elements at `at`, in reading order, is the one that counts.
DEV int largest(const T* x, long long at, int line, int c) {
    int best = 0;
    float most = to_float(load(x + at));
    UNROLL
    for (int k = 1; k < 4; k++) {
        const float v = to_float(load(x + at + (long long)(k / 2) * line + (k % 2) * c));
        if (v > most || v != v) {
            most = v;
            best = k;
        }
    }
    return best;
}

struct MaxPoolFwd {
    T* y;           // (B,H/2,W/2,C)
    const T* x;     // (B,H,W,C)
    long long n;    // elements of y
    int h, w, c;
};

// Grid: ceil(n / BLOCK); a thread owns one element of y.
extern "C" __global__ void __launch_bounds__(BLOCK) max_pool_fwd(const __grid_constant__ MaxPoolFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const long long pixel = i / p.c, row = pixel / (p.w / 2), image = row / (p.h / 2);
    const int line = p.w * p.c;
    const long long at = (image * p.h + row % (p.h / 2) * 2) * line + pixel % (p.w / 2) * 2 * p.c + i % p.c;
    const int k = largest(p.x, at, line, p.c);
    store(p.y + i, load(p.x + at + (long long)(k / 2) * line + (k % 2) * p.c));
}

struct MaxPoolGrad {
    T* dx;          // (B,H,W,C)
    const T* x;     // (B,H,W,C)
    const T* dy;    // (B,H/2,W/2,C)
    long long n;    // elements of x
    int h, w, c;
};

// dx = dy where x was the largest, else 0. Grid: ceil(n / BLOCK); a thread owns one element of dx.
extern "C" __global__ void __launch_bounds__(BLOCK) max_pool_grad(const __grid_constant__ MaxPoolGrad p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const long long pixel = i / p.c, row = pixel / p.w, image = row / p.h;
    const int line = p.w * p.c, h = int(row % p.h), w = int(pixel % p.w), c = int(i % p.c);
    float d = 0.0f;
    if (h / 2 < p.h / 2 && w / 2 < p.w / 2) {
        const long long first = (image * p.h + h / 2 * 2) * line + w / 2 * 2 * p.c + c;
        if (largest(p.x, first, line, p.c) == h % 2 * 2 + w % 2) {
            d = to_float(load(p.dy + ((image * (p.h / 2) + h / 2) * (p.w / 2) + w / 2) * p.c + c));
        }
    }
    store(p.dx + i, from_float<T>(d));
}
