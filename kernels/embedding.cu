// y[b,t] = table[ids[b,t]] + positions[t]. Grid: B·T; a block owns one token. An id outside the table gives NaN, which
// the engine's check for non-finite values reports. Wants: T <= P. (T: tokens; in the code the type of an element.)
// Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 128;

struct EmbeddingFwd {
    T* y;                // (B,T,C)
    const int* ids;      // (B,T)
    const T* table;      // (V,C)
    const T* positions;  // (P,C) or null
    int tokens, v, c;    // T, V, C
};

extern "C" __global__ void __launch_bounds__(BLOCK) embedding_fwd(const __grid_constant__ EmbeddingFwd p) {
    griddep_wait();
    const int token = block_x(), id = load(p.ids + token), t = token % p.tokens;
    const bool known = id >= 0 && id < p.v;
    for (int c = thread_x(); c < p.c; c += BLOCK) {
        float y = known ? to_float(load(p.table + (long long)id * p.c + c)) : bits_float(0x7fc00000u);
        if (p.positions) y += to_float(load(p.positions + (long long)t * p.c + c));
        store(p.y + (long long)token * p.c + c, from_float<T>(y));
    }
}
