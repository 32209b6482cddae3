// y[g,c] = the sum over the rows of group g of x[g,row,c]. Grid: (ceil(C / COLUMNS), splits, G); a block owns COLUMNS columns
// of one part of a group's rows: thread t adds up column t % COLUMNS of rows t / COLUMNS, + ROWS, …; then the first COLUMNS
// threads add the ROWS sums in order, behind the one barrier. Where `partial` is given the sums go there, and `sum_parts` adds
// them up in order; without it splits is 1. Parts may be short or empty (zeros). Occupancy: by threads; shared
// memory is 1 KB, a row of 32 words per warp, without conflicts. Wants: splits and G at most 65535, G · C and splits · each below 2^31.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int COLUMNS = 32;
constexpr int ROWS = 8;

struct SumRowsFwd {
    T* y;            // (G,C), or null where `wide` or `partial` takes the sums
    float* wide;     // (G,C) or null: the result in f32
    float* partial;  // (G,splits,C) or null
    const T* x;      // (G,rows,C)
    int rows, c, each;  // each: rows of a part
};

struct SumRowsSmem {
    float sums[ROWS][COLUMNS];
};

extern "C" __global__ void __launch_bounds__(BLOCK) sum_rows_fwd(const __grid_constant__ SumRowsFwd p) {
    griddep_wait();
    SumRowsSmem& s = smem<SumRowsSmem>();
    const int lane_c = thread_x() % COLUMNS, r = thread_x() / COLUMNS, c = block_x() * COLUMNS + lane_c;
    const int group = block_z(), first = block_y() * p.each;
    const int last = first + p.each < p.rows ? first + p.each : p.rows;
    float sum = 0.0f;
    if (c < p.c) {
        for (int row = first + r; row < last; row += ROWS) {
            sum += to_float(load(p.x + ((long long)group * p.rows + row) * p.c + c));
        }
    }
    s.sums[r][lane_c] = sum;
    sync_block();
    if (r != 0 || c >= p.c) return;
    for (int i = 1; i < ROWS; i++) sum += s.sums[i][lane_c];
    const long long at = (long long)group * p.c + c;
    if (p.partial) {
        store(p.partial + ((long long)group * grid_y() + block_y()) * p.c + c, sum);
    } else if (p.wide) {
        store(p.wide + at, sum);
    } else {
        store(p.y + at, from_float<T>(sum));
    }
}

struct SumParts {
    T* y;                  // (G,C) or null
    float* wide;           // (G,C) or null
    float* second;         // (C) or null: takes what `wide` would of group 1
    const float* partial;  // (G,splits,C)
    int n, c, splits;      // n: G·C
};

constexpr int PARTS_FLIGHT = 8;  // parts of a thread that are in flight

// Grid: ceil(n / BLOCK); a thread owns one element of y.
extern "C" __global__ void __launch_bounds__(BLOCK) sum_parts(const __grid_constant__ SumParts p) {
    griddep_wait();
    const int i = block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const int group = i / p.c;
    const float* from = p.partial + (long long)group * p.splits * p.c + (i - group * p.c);
    float sum = 0.0f;
    for (int k = 0; k < p.splits; k += PARTS_FLIGHT) {
        float part[PARTS_FLIGHT];
        UNROLL
        for (int j = 0; j < PARTS_FLIGHT; j++) {
            if (k + j < p.splits) part[j] = load(from + (long long)(k + j) * p.c);
        }
        UNROLL
        for (int j = 0; j < PARTS_FLIGHT; j++) {
            if (k + j < p.splits) sum += part[j];
        }
    }
    if (p.second && group == 1) {
        store(p.second + (i - p.c), sum);
    } else if (p.wide) {
        store(p.wide + i, sum);
    } else {
        store(p.y + i, from_float<T>(sum));
    }
}
