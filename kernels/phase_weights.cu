// y = the weights of a 3×3 convolution behind a nearest upsampling, as four 2×2 convolutions of the small image: phase
// 2·py + px makes the pixels of rows 2·i + py and columns 2·j + px. Along each axis two of the three taps fall on one pixel of the
// small image, so their weights are added, in float, and rounded once: tap d of parity p
// is that of the small image's pixel i − 1 + p + d. Grid: ceil(n / BLOCK); a thread owns one element. Occupancy: by registers.
#include "dev.cuh"

constexpr int BLOCK = 256;

struct PhaseWeightsFwd {
    T* y;         // (4,O,2,2,C)
    const T* w;   // (O,3,3,C)
    long long n;  // 16·O·C
    int o, c;
};

extern "C" __global__ void __launch_bounds__(BLOCK) phase_weights_fwd(const __grid_constant__ PhaseWeightsFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i >= p.n) return;
    const long long row = i / p.c;  // phase, output channel, tap
    const int c = int(i - row * p.c), tap = int(row % 4), dy = tap / 2, dx = tap % 2;
    const long long o = row / 4 % p.o;
    const int phase = int(row / 4 / p.o), py = phase / 2, px = phase % 2;
    // Along an axis parity 0 reads taps {0} and {1, 2}, parity 1 {0, 1} and {2}.
    const int y0 = dy ? 1 + py : 0, y1 = dy ? 3 : 1 + py, x0 = dx ? 1 + px : 0, x1 = dx ? 3 : 1 + px;
    float sum = 0.0f;
    for (int y = y0; y < y1; y++)
        for (int x = x0; x < x1; x++) sum += to_float(load(p.w + ((o * 3 + y) * 3 + x) * p.c + c));
    store(p.y + i, from_float<T>(sum));
}
