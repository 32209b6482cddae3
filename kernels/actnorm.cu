// y = scale · (x + loc) by channel, and its gradients: dx = scale · dy, dloc = scale · sum dy, dscale = sum dy · (x + loc) over
// the rows.
//
// Everything is computed in f32 and rounded once. Sums take two launches: actnorm_sums adds up parts of `each` rows, actnorm_total
// adds the parts; the order of both is fixed, so that the result always has the same bits. In actnorm_sums a warp stands on
// 32 neighbouring channels of a row, so that it reads them together, and takes every 8th row of the part. Its sums go through
// shared memory (2 KB; a row of 32 words per warp, no conflicts) to warp 0: the one barrier makes them visible. Threads beyond C
// read nothing but reach the barrier.
//
// Edges: the last part may be short or empty (zeros). Wants: elements aligned to their own size, no null pointer, C > 0;
// parts · each below 2^31, at most 65535 parts. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int COLUMNS = 32;
constexpr int ROWS = 8;

struct ActnormFwd {
    T* y;            // (rows,C)
    const T* x;      // (rows,C)
    const T* loc;    // (C)
    const T* scale;  // (C)
    long long n;     // rows · C
    int c;
};

// Grid: ceil(n / BLOCK); a thread owns one element.
extern "C" __global__ void __launch_bounds__(BLOCK) actnorm_fwd(const __grid_constant__ ActnormFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const int c = int(i % p.c);
    const float moved = to_float(load(p.x + i)) + to_float(load(p.loc + c));
    store(p.y + i, from_float<T>(to_float(load(p.scale + c)) * moved));
}

struct ActnormDx {
    T* dx;           // (rows,C)
    const T* dy;     // (rows,C)
    const T* scale;  // (C)
    long long n;     // rows · C
    int c;
};

// Grid: ceil(n / BLOCK); a thread owns one element.
extern "C" __global__ void __launch_bounds__(BLOCK) actnorm_dx(const __grid_constant__ ActnormDx p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    store(p.dx + i, from_float<T>(to_float(load(p.scale + int(i % p.c))) * to_float(load(p.dy + i))));
}

struct ActnormSums {
    float* partial;  // (parts,C,2): sum dy, sum dy · (x + loc)
    const T* x;      // (rows,C)
    const T* loc;    // (C)
    const T* dy;     // (rows,C)
    int rows, c, each;  // each: rows of a part
};

struct ActnormSmem {
    float dy[ROWS][COLUMNS], moved[ROWS][COLUMNS];
};

// Grid: (ceil(C / COLUMNS), parts); a block owns COLUMNS channels of a part, each added up by ROWS threads.
extern "C" __global__ void __launch_bounds__(BLOCK) actnorm_sums(const __grid_constant__ ActnormSums p) {
    griddep_wait();
    ActnormSmem& s = smem<ActnormSmem>();
    const int lane_c = thread_x() % COLUMNS, r = thread_x() / COLUMNS, c = block_x() * COLUMNS + lane_c;
    const int first = block_y() * p.each, end = first + p.each, last = end < p.rows ? end : p.rows;
    float sum = 0.0f, moved = 0.0f;
    if (c < p.c) {
        const float loc = to_float(load(p.loc + c));
        for (int row = first + r; row < last; row += ROWS) {
            const long long at = (long long)row * p.c + c;
            const float dy = to_float(load(p.dy + at));
            moved = fma_f(dy, to_float(load(p.x + at)) + loc, moved);
            sum += dy;
        }
    }
    s.dy[r][lane_c] = sum;
    s.moved[r][lane_c] = moved;
    sync_block();
    if (r != 0 || c >= p.c) return;
    for (int i = 1; i < ROWS; i++) {
        sum += s.dy[i][lane_c];
        moved += s.moved[i][lane_c];
    }
    const long long at = 2 * ((long long)block_y() * p.c + c);
    store(p.partial + at, sum);
    store(p.partial + at + 1, moved);
}

struct ActnormTotal {
    float* dloc;           // (C)
    float* dscale;         // (C)
    const float* partial;  // (parts,C,2)
    const T* scale;        // (C)
    int c, parts;
};

// Grid: ceil(C / BLOCK); a thread owns a channel.
extern "C" __global__ void __launch_bounds__(BLOCK) actnorm_total(const __grid_constant__ ActnormTotal p) {
    griddep_wait();
    const int c = block_x() * BLOCK + thread_x();
    if (c >= p.c) return;
    float sum = 0.0f, moved = 0.0f;
    for (int part = 0; part < p.parts; part++) {
        const long long at = 2 * ((long long)part * p.c + c);
        sum += load(p.partial + at);
        moved += load(p.partial + at + 1);
    }
    store(p.dloc + c, to_float(load(p.scale + c)) * sum);
    store(p.dscale + c, moved);
}
