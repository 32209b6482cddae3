// Gradients of the tables of embedding.cu, in f32. Every row is added up by one block in order of the tokens, so that the
// bits are always the same. A block's threads own columns, and read all ids for each. Occupancy: by threads.
#include "dev.cuh"

constexpr int BLOCK = 128;

struct EmbeddingGrad {
    float* table;    // (V,C)
    const int* ids;  // (tokens)
    const T* dy;     // (tokens,C)
    int tokens, c;
};

// table[v] = the sum of dy over the tokens whose id is v; an id outside the table adds nothing. Grid: V.
extern "C" __global__ void __launch_bounds__(BLOCK) embedding_grad(const __grid_constant__ EmbeddingGrad p) {
    griddep_wait();
    const int v = block_x();
    for (int c = thread_x(); c < p.c; c += BLOCK) {
        float sum = 0.0f;
        for (int i = 0; i < p.tokens; i++) {
            if (load(p.ids + i) == v) sum += to_float(load(p.dy + (long long)i * p.c + c));
        }
        store(p.table + (long long)v * p.c + c, sum);
    }
}

struct PositionsGrad {
    float* positions;  // (P,C)
    const T* dy;       // (B,T,C)
    int batch, tokens, c;
};

// positions[t] = the sum of dy[b,t] over b; zero for t >= T. Grid: P.
extern "C" __global__ void __launch_bounds__(BLOCK) positions_grad(const __grid_constant__ PositionsGrad p) {
    griddep_wait();
    const int t = block_x();
    for (int c = thread_x(); c < p.c; c += BLOCK) {
        float sum = 0.0f;
        if (t < p.tokens) {
            for (int b = 0; b < p.batch; b++) {
                sum += to_float(load(p.dy + ((long long)b * p.tokens + t) * p.c + c));
            }
        }
        store(p.positions + (long long)t * p.c + c, sum);
    }
}
