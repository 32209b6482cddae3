// What the files of probes share: how a probe is launched, timed and said.
#pragma once
#include "dev.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

constexpr int ROUNDS = 512;

#define CHECK(call)                                                                       \
    do {                                                                                  \
        const cudaError_t e = (call);                                                     \
        if (e != cudaSuccess) {                                                           \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e)); \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

// Clocks of a block between two barriers. The store, which never happens, keeps the compiler from leaving the work out, or
// from doing it after the second one.
struct Out {
    long long* clocks;  // per block
    float* sink;
};
DEV long long begin() {
    sync_block();
    return clock64();
}
DEV void end(const Out& out, long long start, float value) {
    if (value == 12345.678f) store(out.sink + thread_x(), value);
    sync_block();
    if (thread_x() == 0) store(out.clocks + block_x(), clock64() - start);
}

struct Card {
    cudaDeviceProp about;
    Out out;
    T* operands;
    const char* sep = "";
    bool wrong = false;  // a result was not what it must be

    // How many results are not what they must be.
    void verdict(const char* name, int count, const char* what) {
        say(name, count, what);
        wrong = wrong || count > 0;
    }
    void say(const char* name, double value, const char* unit) {
        printf("%s\n  {\"name\": \"%s\", \"value\": %.4f, \"unit\": \"%s\"}", sep, name, value, unit);
        sep = ",";
    }

    // Clocks of the slowest block, the fewest of five launches with `beside` blocks on each multiprocessor; 0 where they do not fit.
    template <class K, class... A>
    double clocks(const char* name, int beside, int threads, int smem, K kernel, A... more) {
        const int blocks = about.multiProcessorCount * beside;
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        int fit = 0;
        CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, threads, smem));
        if (fit < beside) {
            fprintf(stderr, "%s: %d blocks do not fit beside each other\n", name, beside);
            return 0.0;
        }
        double best = 0.0;
        for (int run = 0; run < 6; run++) {
            kernel<<<blocks, threads, smem>>>(out, more...);
            CHECK(cudaGetLastError());
            CHECK(cudaDeviceSynchronize());
            static long long each[4096];
            CHECK(cudaMemcpy(each, out.clocks, blocks * sizeof *each, cudaMemcpyDeviceToHost));
            const double slowest = double(*std::max_element(each, each + blocks));
            if (run > 0) best = run == 1 ? slowest : std::min(best, slowest);
        }
        return best;
    }

    // Work of a launch per multiprocessor in a clock: `work` is that of a block.
    template <class K, class... A>
    void probe(const char* name, const char* what, double work, int beside, int threads, int smem, K kernel, A... more) {
        const double spent = clocks(name, beside, threads, smem, kernel, more...);
        char unit[96];
        snprintf(unit, sizeof unit, "%s per clock and multiprocessor", what);
        say(name, spent > 0.0 ? work * beside / spent : 0.0, unit);
    }
};

// Those of probes_wgmma.cu; on a card that is not of Hopper's kind it says so and does nothing.
void wgmma_probes(Card& c);
