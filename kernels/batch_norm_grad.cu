// Gradients of batch_norm.cu. With n = (x - mean) * rstd: dbias = sum dy and dw = sum dy * n over the rows, and dx = w * rstd * (dy
// - dbias / rows - n * dw / rows), or w * rstd * dy where the statistics are given (a NaN or an inf in x or dy of a channel makes
// all of its dx NaN there too, as 0 · dw). batch_norm_grad_sums, batch_norm_grad_total, batch_norm_grad_apply, in this order.
// Occupancy: by threads; shared memory is 2 KB, a row of 32 words per warp, without conflicts. Wants: rows > 0; parts · each below
// 2^31 − 8, at most 65535 parts.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int COLUMNS = 32;
constexpr int ROWS = 8;

struct BatchNormGradSums {
    float* partial;     // (parts,C,2): sum dy * n, sum dy
    const T* x;         // (rows,C)
    const T* dy;        // (rows,C)
    const float* mean;  // (C)
    const float* var;   // (C)
    int rows, c, each;  // each: rows of a part
    float eps;
};

struct BatchNormGradSmem {
    float dw[ROWS][COLUMNS], dbias[ROWS][COLUMNS];
};

// Grid: (ceil(C / COLUMNS), parts); a block owns COLUMNS channels of a part: thread t takes channel t % COLUMNS of rows
// t / COLUMNS, + ROWS, …; behind the one barrier the first COLUMNS threads add the ROWS sums in order.
extern "C" __global__ void __launch_bounds__(BLOCK) batch_norm_grad_sums(const __grid_constant__ BatchNormGradSums p) {
    griddep_wait();
    BatchNormGradSmem& s = smem<BatchNormGradSmem>();
    const int lane_c = thread_x() % COLUMNS, r = thread_x() / COLUMNS, c = block_x() * COLUMNS + lane_c;
    const int first = block_y() * p.each, end = first + p.each, last = end < p.rows ? end : p.rows;
    float dw = 0.0f, dbias = 0.0f;
    if (c < p.c) {
        const float mean = load(p.mean + c), rstd = rsqrt_f(load(p.var + c) + p.eps);
        for (int row = first + r; row < last; row += ROWS) {
            const long long at = (long long)row * p.c + c;
            const float dy = to_float(load(p.dy + at));
            dw = fma_f(dy, (to_float(load(p.x + at)) - mean) * rstd, dw);
            dbias += dy;
        }
    }
    s.dw[r][lane_c] = dw;
    s.dbias[r][lane_c] = dbias;
    sync_block();
    if (r != 0 || c >= p.c) return;
    for (int i = 1; i < ROWS; i++) {
        dw += s.dw[i][lane_c];
        dbias += s.dbias[i][lane_c];
    }
    const long long at = 2 * ((long long)block_y() * p.c + c);
    store(p.partial + at, dw);
    store(p.partial + at + 1, dbias);
}

struct BatchNormGradTotal {
    float* dw;             // (C)
    float* dbias;          // (C)
    const float* partial;  // (parts,C,2)
    int c, parts;
};

// Grid: ceil(C / BLOCK); a thread owns a channel.
extern "C" __global__ void __launch_bounds__(BLOCK) batch_norm_grad_total(const __grid_constant__ BatchNormGradTotal p) {
    griddep_wait();
    const int c = block_x() * BLOCK + thread_x();
    if (c >= p.c) return;
    float dw = 0.0f, dbias = 0.0f;
    for (int part = 0; part < p.parts; part++) {
        const long long at = 2 * ((long long)part * p.c + c);
        dw += load(p.partial + at);
        dbias += load(p.partial + at + 1);
    }
    store(p.dw + c, dw);
    store(p.dbias + c, dbias);
}

struct BatchNormGradApply {
    T* dx;               // (rows,C)
    const T* x;          // (rows,C)
    const T* w;          // (C)
    const T* dy;         // (rows,C)
    const float* mean;   // (C)
    const float* var;    // (C)
    const float* dw;     // (C)
    const float* dbias;  // (C)
    long long n;         // rows · C
    int c;
    float eps, share;    // share: 1 / rows, or 0 where the statistics are given
};

// Grid: ceil(n / BLOCK); a thread owns one element.
extern "C" __global__ void __launch_bounds__(BLOCK) batch_norm_grad_apply(const __grid_constant__ BatchNormGradApply p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const int c = int(i % p.c);
    const float rstd = rsqrt_f(load(p.var + c) + p.eps), v = (to_float(load(p.x + i)) - load(p.mean + c)) * rstd;
    const float d = to_float(load(p.dy + i)) - p.share * load(p.dbias + c) - v * (p.share * load(p.dw + c));
    store(p.dx + i, from_float<T>(to_float(load(p.w + c)) * rstd * d));
}
