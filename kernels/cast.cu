// y = scale * x, from type T to type U. Grid: ceil(n / BLOCK); a thread owns one element. Occupancy: by threads.
// types: f32>f32 f32>f16 f32>bf16 f16>f32 bf16>f32
#include "dev.cuh"

constexpr int BLOCK = 256;

struct CastFwd {
    U* y;        // (n)
    const T* x;  // (n)
    long long n;
    float scale;
};

extern "C" __global__ void __launch_bounds__(BLOCK) cast_fwd(const __grid_constant__ CastFwd p) {
    griddep_wait();
    const long long i = (long long)block_x() * BLOCK + thread_x();
    if (i < p.n) store(p.y + i, from_float<U>(to_float(load(p.x + i)) * p.scale));
}
