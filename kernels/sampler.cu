// The two ends of a model evaluation. A table with one row per evaluation says what to do; the counter picks the row.
// Grid: ceil(n / BLOCK); a thread owns one element of the latents, n = B·H·W·C of them.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int COLUMNS = 24;

// Columns of the table.
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
    wait_for_inputs();
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
    const float* table;  // (R,COLUMNS)
    const float* noise;  // (Z,n)
    long long n;
    int copies, count;   // count: slots that c_s may name
};

// m = u + guidance · (c - u); d = clamp(dx · X + dm · m); next = sum c_s slots_s + cm m + cd d + cz noise. After a row with a
// non-finite m, slots and counter stay as that row left them: whoever looks later can repeat it.
extern "C" __global__ void __launch_bounds__(BLOCK) advance_fwd(const __grid_constant__ AdvanceFwd p) {
    wait_for_inputs();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    const int k = load(p.counter);
    // Blocks of this launch may have marked row k already.
    const int bad = load(p.counter + 2);
    const bool stopped = bad != 0 && bad != k + 1;
    const float* row = p.table + (long long)k * COLUMNS;
    if (i < p.n) {
        float m = to_float(load(p.model + i));
        if (p.copies == 2) m = fma_f(load(row + GUIDANCE), to_float(load(p.model + p.n + i)) - m, m);
        store(p.guided + i, m);
        if (stopped) return;
        if (!is_finite_f(m)) atomic_or_u32((unsigned*)p.counter + 2, unsigned(k + 1));
        const float x = load(p.slots + (long long)load(row + X_SLOT) * p.n + i);
        float d = load(row + DX) * x + load(row + DM) * m;
        const float clip = load(row + CLIP);
        if (clip > 0.0f) d = min_f(max_f(d, -clip), clip);
        float next = load(row + CM) * m + load(row + CD) * d;
        for (int s = 0; s < p.count; s++) {
            const float c = load(row + C0 + s);
            if (c != 0.0f) next += c * load(p.slots + s * p.n + i);
        }
        const float z = load(row + NOISE);
        if (z >= 0.0f) next += load(row + CZ) * load(p.noise + (long long)z * p.n + i);
        const float keep_m = load(row + KEEP_M), keep_d = load(row + KEEP_D);
        if (keep_m >= 0.0f) store(p.slots + (long long)keep_m * p.n + i, m);
        if (keep_d >= 0.0f) store(p.slots + (long long)keep_d * p.n + i, d);
        store(p.slots + (long long)load(row + NEXT) * p.n + i, next);
    }
    if (i == 0 && !stopped) store(p.counter + 1, k + 1);
}
