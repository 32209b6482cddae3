// y[i,kh,kw,o] = w[o,KH-1-kh,KW-1-kw,i]: weights of the convolution that carries a gradient back to the input. Grid:
// (ceil(I / 32), ceil(O / 32), KH·KW); a block turns a 32×32 tile of one window position through shared memory, whose rows
// are one longer, so that the 32 elements of a column lie in 32 banks. The one barrier makes the tile visible. Edges: what lies
// beyond O and I is neither loaded nor stored, and its places in the tile are never read.
// Occupancy: by threads; shared memory is 4.1 KB.
#include "dev.cuh"

constexpr int BLOCK = 256;
constexpr int TILE = 32;

struct Conv2dTranspose {
    T* y;        // (I,KH,KW,O)
    const T* w;  // (O,KH,KW,I)
    int o, i, windows;  // O, I, KH·KW
};

struct TransposeSmem {
    float tile[TILE][TILE + 1];
};

extern "C" __global__ void __launch_bounds__(BLOCK) conv2d_transpose(const __grid_constant__ Conv2dTranspose p) {
    griddep_wait();
    TransposeSmem& s = smem<TransposeSmem>();
    const int column = thread_x() % TILE, first = thread_x() / TILE, window = block_z();
    const int i0 = block_x() * TILE, o0 = block_y() * TILE;
    for (int r = first; r < TILE; r += BLOCK / TILE) {
        if (o0 + r < p.o && i0 + column < p.i) {
            s.tile[r][column] = to_float(load(p.w + ((long long)(o0 + r) * p.windows + window) * p.i + i0 + column));
        }
    }
    sync_block();
    for (int r = first; r < TILE; r += BLOCK / TILE) {
        if (i0 + r < p.i && o0 + column < p.o) {
            const long long row = (long long)(i0 + r) * p.windows + (p.windows - 1 - window);
            store(p.y + row * p.o + o0 + column, from_float<T>(s.tile[column][r]));
        }
    }
}
