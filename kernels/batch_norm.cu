// Batch normalisation of x (rows,C): mean and biased variance of each channel, y = (x - mean) * rstd * w + bias, and averages of
// such statistics over batches. Parts of the rows are summed by themselves and merged in order: batch_norm_stats, batch_norm_merge,
// batch_norm_apply, in this order; running_fwd averages.
// Occupancy: by threads; shared memory is 3 KB, a row of 32 words per warp, without conflicts. Wants: every part has a row; parts ·
// each below 2^31 − 8, at most 65535 parts. The last part may be short: a thread without a row hands in an empty set (n = 0), which
// `merged` passes over.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int COLUMNS = 32;
constexpr int ROWS = 8;

struct BatchNormStats {
    float* partial;     // (parts,C,2): mean, and sum of squares about it
    const T* x;         // (rows,C)
    int rows, c, each;  // each: rows of a part
};

struct BatchNormSmem {
    float n[ROWS][COLUMNS], mean[ROWS][COLUMNS], m2[ROWS][COLUMNS];
};

// Grid: (ceil(C / COLUMNS), parts); a block owns COLUMNS channels of a part: thread t takes channel t % COLUMNS of rows
// t / COLUMNS, + ROWS, …, as differences from the first of them; behind the one barrier the first COLUMNS threads merge.
extern "C" __global__ void __launch_bounds__(BLOCK) batch_norm_stats(const __grid_constant__ BatchNormStats p) {
    griddep_wait();
    BatchNormSmem& s = smem<BatchNormSmem>();
    const int lane_c = thread_x() % COLUMNS, r = thread_x() / COLUMNS, c = block_x() * COLUMNS + lane_c;
    const int first = block_y() * p.each + r, end = block_y() * p.each + p.each;
    const int last = end < p.rows ? end : p.rows;
    float n = 0.0f, sum = 0.0f, square = 0.0f, pivot = 0.0f;
    if (c < p.c && first < last) {
        pivot = to_float(load(p.x + (long long)first * p.c + c));
        for (int row = first; row < last; row += ROWS) {
            const float d = to_float(load(p.x + (long long)row * p.c + c)) - pivot;
            n += 1.0f;
            sum += d;
            square = fma_f(d, d, square);
        }
    }
    const float mean = n > 0.0f ? sum / n : 0.0f;
    Moments m = {n, pivot + mean, max_f(fma_f(-sum, mean, square), 0.0f)};
    s.n[r][lane_c] = m.n;
    s.mean[r][lane_c] = m.mean;
    s.m2[r][lane_c] = m.m2;
    sync_block();
    if (r != 0 || c >= p.c) return;
    for (int i = 1; i < ROWS; i++) m = merged(m, {s.n[i][lane_c], s.mean[i][lane_c], s.m2[i][lane_c]});
    const long long at = 2 * ((long long)block_y() * p.c + c);
    store(p.partial + at, m.mean);
    store(p.partial + at + 1, m.m2);
}

struct BatchNormMerge {
    float* mean;           // (C)
    float* var;            // (C)
    const float* partial;  // (parts,C,2)
    int rows, c, each, parts;
};

// Grid: ceil(C / BLOCK); a thread owns a channel.
extern "C" __global__ void __launch_bounds__(BLOCK) batch_norm_merge(const __grid_constant__ BatchNormMerge p) {
    griddep_wait();
    const int c = block_x() * BLOCK + thread_x();
    if (c >= p.c) return;
    Moments m = {0.0f, 0.0f, 0.0f};
    for (int part = 0; part < p.parts; part++) {
        const int left = p.rows - part * p.each;
        const long long at = 2 * ((long long)part * p.c + c);
        m = merged(m, {float(left < p.each ? left : p.each), load(p.partial + at), load(p.partial + at + 1)});
    }
    store(p.mean + c, m.mean);
    store(p.var + c, m.m2 / float(p.rows));
}

struct BatchNormApply {
    T* y;               // (rows,C)
    const T* x;         // (rows,C)
    const T* w;         // (C)
    const T* bias;      // (C)
    const float* mean;  // (C)
    const float* var;   // (C)
    long long n;        // rows · C
    int c;
    float eps;
};

// Grid: ceil(n / BLOCK); a thread owns one element.
extern "C" __global__ void __launch_bounds__(BLOCK) batch_norm_apply(const __grid_constant__ BatchNormApply p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const int c = int(i % p.c);
    const float v = (to_float(load(p.x + i)) - load(p.mean + c)) * rsqrt_f(load(p.var + c) + p.eps);
    store(p.y + i, from_float<T>(fma_f(v, to_float(load(p.w + c)), to_float(load(p.bias + c)))));
}

struct RunningFwd {
    float* state;        // (n), updated
    const float* value;  // (n)
    int n;
    float momentum, factor;  // factor: of the value; a variance counts as rows / (rows - 1) times itself, a mean once
};

// state += momentum · (factor · value - state). Grid: ceil(n / BLOCK); a thread owns one element.
extern "C" __global__ void __launch_bounds__(BLOCK) running_fwd(const __grid_constant__ RunningFwd p) {
    griddep_wait();
    const int i = block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const float state = load(p.state + i);
    store(p.state + i, fma_f(p.momentum, fma_f(p.factor, load(p.value + i), -state), state));
}
