// The two ends of a model evaluation. A table with one row per evaluation says what to do; the counter picks the row.
// Grid: ceil(n / BLOCK); a thread owns one element of the latents, n = B·H·W·C of them.
// No shared memory, no barrier. Occupancy: by threads, that of advance_fwd by registers.
// Wants: the row that comes into use below R, which advance_fwd leaves at R behind the last one; copies 1 or 2 in advance_fwd; slots that
// a row names below S, its noise below Z, and count at most S and TERMS.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int COLUMNS = 24;
constexpr int TERMS = 8;  // slots that a row may sum

// Columns of the table: the timestep, which other kernels read; the factor of the model's input; those of d, and the bound of |d|,
// none if it is not above 0; those of `next`; the factor of each slot; then slots: of X and of `next`, which must be given; where
// m and d are kept, and the row of noise, each none if negative; guidance. Columns 22 and 23, not named here, are those of blend.cu.
enum { TIMESTEP, SCALE_IN, DX, DM, CLIP, CM, CD, CZ, C0, X_SLOT = 16, NEXT, KEEP_M, KEEP_D, NOISE, GUIDANCE };

struct PrepareFwd {
    T* x;                // (copies·B,H,W,C)
    const float* slots;  // (S,n)
    const float* table;  // (R,COLUMNS)
    int* counter;        // row in use, next row, 1 + first row with a non-finite m, unused
    long long n;
    int copies;
};

// x = scale_in · X, once per copy; the next row comes into use. Nobody but the first thread touches counter[0] here.
extern "C" __global__ void __launch_bounds__(BLOCK) prepare_fwd(const __grid_constant__ PrepareFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    const int k = load(p.counter + 1);
    const float* row = p.table + (long long)k * COLUMNS;
    if (i < p.n) {
        const float x = load(p.slots + (long long)load(row + X_SLOT) * p.n + i) * load(row + SCALE_IN);
        for (int copy = 0; copy < p.copies; copy++) store(p.x + copy * p.n + i, from_float<T>(x));
    }
    if (i == 0) {
        store(p.counter, k);
    }
}

struct AdvanceFwd {
    float* slots;        // (S,n), updated
    int* counter;        // row in use, next row, 1 + first row with a non-finite m, unused
    float* guided;       // (n): m
    const T* model;      // (copies·n), unconditional half first
    const float* table;  // (R,COLUMNS), aligned to 16 bytes
    const float* noise;  // (Z,n)
    long long n;
    int copies, count;   // count: slots that c_s may name
};

// m = u + guidance · (c - u); d = clamp(dx · X + dm · m); next = sum c_s slots_s + cm m + cd d + cz noise. The first row with a
// non-finite m is carried out and marked; launches after it change neither slots, rows nor the marks, but write `guided`. With one copy m is the model's.
extern "C" __global__ void __launch_bounds__(BLOCK) advance_fwd(const __grid_constant__ AdvanceFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    const int k = load(p.counter);
    // Blocks of this launch may have marked row k already.
    const int bad = load(p.counter + 2);
    const bool stopped = bad != 0 && bad != k + 1;
    if (i < p.n) {
        // The whole row at once, then all that it names at once: otherwise each column would be waited for in turn.
        float row[COLUMNS];
        UNROLL
        for (int c = 0; c < COLUMNS; c += 4) {
            const Vec<float, 4> part = load<4>(p.table + (long long)k * COLUMNS + c);
            UNROLL
            for (int e = 0; e < 4; e++) row[c + e] = part[e];
        }
        float m = to_float(load(p.model + i));
        if (p.copies == 2) m = fma_f(row[GUIDANCE], to_float(load(p.model + p.n + i)) - m, m);
        store(p.guided + i, m);
        if (stopped) return;
        if (!is_finite_f(m)) atomic_or_u32((unsigned*)p.counter + 2, unsigned(k + 1));
        const float x = load(p.slots + (long long)row[X_SLOT] * p.n + i);
        float term[TERMS] = {};
        UNROLL
        for (int s = 0; s < TERMS; s++) {
            if (s < p.count && row[C0 + s] != 0.0f) term[s] = load(p.slots + s * p.n + i);
        }
        const float z = row[NOISE] >= 0.0f ? load(p.noise + (long long)row[NOISE] * p.n + i) : 0.0f;
        float d = row[DX] * x + row[DM] * m;
        if (row[CLIP] > 0.0f) d = min_f(max_f(d, -row[CLIP]), row[CLIP]);
        float next = row[CM] * m + row[CD] * d;
        UNROLL
        for (int s = 0; s < TERMS; s++) {
            if (s < p.count && row[C0 + s] != 0.0f) next += row[C0 + s] * term[s];
        }
        if (row[NOISE] >= 0.0f) next += row[CZ] * z;
        if (row[KEEP_M] >= 0.0f) store(p.slots + (long long)row[KEEP_M] * p.n + i, m);
        if (row[KEEP_D] >= 0.0f) store(p.slots + (long long)row[KEEP_D] * p.n + i, d);
        store(p.slots + (long long)row[NEXT] * p.n + i, next);
    }
    if (i == 0 && !stopped) store(p.counter + 1, k + 1);
}
