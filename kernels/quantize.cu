// The nearest code of each row of z: codes = argmin |z - e_k|^2, the lowest k of several, and y = e_k. Where no distance is finite
// the code is 0 and y is NaN. Wants: V > 0.
// Grid: ceil(rows / BLOCK); a thread owns one row, which it reads anew for each code, from the caches; a warp reads the same code
// together. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 128;

struct QuantizeFwd {
    T* y;           // (rows,C)
    int* codes;     // (rows)
    const T* z;     // (rows,C)
    const T* book;  // (V,C)
    int rows, v, c;
};

extern "C" __global__ void __launch_bounds__(BLOCK) quantize_fwd(const __grid_constant__ QuantizeFwd p) {
    griddep_wait();
    const int row = block_x() * BLOCK + thread_x();
    if (row >= p.rows) return;
    const T* z = p.z + (long long)row * p.c;
    float best = FLOAT_INF;
    int code = 0;
    for (int i = 0; i < p.v; i++) {
        const T* e = p.book + (long long)i * p.c;
        float d = 0.0f;
        for (int c = 0; c < p.c; c++) {
            const float diff = to_float(load(z + c)) - to_float(load(e + c));
            d = fma_f(diff, diff, d);
        }
        if (d < best) {
            best = d;
            code = i;
        }
    }
    store(p.codes + row, code);
    const T nan = from_float<T>(bits_float(0x7fc00000u));
    for (int c = 0; c < p.c; c++) {
        const T e = load(p.book + (long long)code * p.c + c);
        store(p.y + (long long)row * p.c + c, best < FLOAT_INF ? e : nan);
    }
}
