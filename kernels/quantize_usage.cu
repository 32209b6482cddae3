// How a codebook is used: with p the share of the codes (n) that are code v, used = the number of v with p > 0 and
// perplexity = exp(-sum p ln(p + 1e-10)). Wants: n > 0. Codes outside the book count in n alone.
// Occupancy: by threads; shared memory is 32 bytes.
// types: f32
#include "dev.cuh"

constexpr int BLOCK = 256;

struct CodeUsageFwd {
    float* partial;    // (grid,2): the sum of p ln(p + 1e-10), and the number of codes that are used
    const int* codes;  // (n)
    int n, v;
};

struct UsageSmem {
    float scratch[BLOCK / WARP];
};

// Grid: ceil(V / BLOCK); a thread owns one entry of the codebook, which it counts.
extern "C" __global__ void __launch_bounds__(BLOCK) code_usage_fwd(const __grid_constant__ CodeUsageFwd p) {
    griddep_wait();
    UsageSmem& s = smem<UsageSmem>();
    const int v = block_x() * BLOCK + thread_x();
    int count = 0;
    for (int i = 0; i < p.n; i++) count += load(p.codes + i) == v ? 1 : 0;
    const float share = v < p.v ? float(count) / float(p.n) : 0.0f;
    // Each block_sum ends with a barrier of its own.
    const float sum = block_sum<BLOCK>(share * log_f(share + 1e-10f), s.scratch);
    const float used = block_sum<BLOCK>(share > 0.0f ? 1.0f : 0.0f, s.scratch);
    if (thread_x() != 0) return;
    store(p.partial + 2 * block_x(), sum);
    store(p.partial + 2 * block_x() + 1, used);
}

struct CodeUsageTotal {
    float* perplexity;     // (1)
    float* used;           // (1)
    const float* partial;  // (parts,2)
    int parts;
};

// Grid: 1; its first thread works.
extern "C" __global__ void __launch_bounds__(BLOCK) code_usage_total(const __grid_constant__ CodeUsageTotal p) {
    griddep_wait();
    if (thread_x() != 0) return;
    float sum = 0.0f, used = 0.0f;
    for (int i = 0; i < p.parts; i++) {
        sum += load(p.partial + 2 * i);
        used += load(p.partial + 2 * i + 1);
    }
    store(p.perplexity, exp_f(-sum));
    store(p.used, used);
}
