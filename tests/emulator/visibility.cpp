// Which stores other blocks of the same launch may rely on. In a kernel with atomic operations, a first store to a word is
// held back: its own block may read it, others find it unwritten, until an atomic operation tells of it. That one publishes
// what comes before it: stores behind which the same thread has fenced, or another one before a barrier of both. What is
// never published is there for the next launch. So the writer's half of "the last block combines" is checked; what the
// reader may not do before its own fence is not.

#include <algorithm>

#include "block.h"
#include "dev.cuh"

namespace {
constexpr uint16_t NOBODY = 0xffff;

// Bytes of one word, by the bits of its shadow; clocks of the threads that stored and fenced.
struct Held {
    uint64_t word;
    uint32_t stored_at, fenced_at;
    uint16_t stored_by, fenced_by;
    uint8_t bytes;
};

struct Visibility {
    bool on = false, sorted = false;
    std::vector<Held> held;
    uint32_t clocks[1024];  // what happened before a barrier has a smaller clock than what comes after it
    unsigned threads = 0;
};
thread_local Visibility* local = nullptr;
#define V (*local)

std::mutex lock;
std::vector<Held> unpublished;  // of blocks that are over

void publish(const Held& held) { __atomic_fetch_or(ldm_thread.shadow + held.word, held.bytes, __ATOMIC_RELAXED); }

void join(unsigned from, unsigned to) {
    const uint32_t next = *std::max_element(V.clocks + from, V.clocks + to) + 1;
    std::fill(V.clocks + from, V.clocks + to, next);
}
}  // namespace

void visibility_start(const Launch& launch) {
    if (!local) local = new Visibility;
    V.on = launch.kernel->combines;
    V.threads = launch.block;
    V.held.clear();
    if (V.on) std::fill(V.clocks, V.clocks + V.threads, 1u);
}

void visibility_barrier() {
    if (V.on) join(0, V.threads);
}

void visibility_warp(unsigned warp) {
    if (V.on) join(32 * warp, std::min(32 * warp + 32, V.threads));
}

void visibility_end() {
    if (V.held.empty()) return;
    std::lock_guard<std::mutex> hold(lock);
    unpublished.insert(unpublished.end(), V.held.begin(), V.held.end());
}

void visibility_finish() {
    for (const Held& held : unpublished) publish(held);
    unpublished.clear();
}

bool visibility_holds(uint64_t word, unsigned bytes) {
    if (!V.on) return false;
    V.held.push_back({word, V.clocks[ldm_thread.thread], 0, uint16_t(ldm_thread.thread), NOBODY, uint8_t(bytes)});
    V.sorted = false;
    return true;
}

bool visibility_own(uint64_t word, unsigned bytes) {
    if (V.held.empty()) return false;
    auto less = [](const Held& a, const Held& b) { return a.word < b.word; };
    if (!V.sorted) std::stable_sort(V.held.begin(), V.held.end(), less);
    V.sorted = true;
    const auto [from, to] = std::equal_range(V.held.begin(), V.held.end(), Held{word, 0, 0, 0, 0, 0}, less);
    for (auto it = from; it != to; ++it) bytes &= ~unsigned(it->bytes);
    return bytes == 0;
}

bool visibility_foreign(uint64_t word) {
    std::lock_guard<std::mutex> hold(lock);
    return std::any_of(unpublished.begin(), unpublished.end(), [&](const Held& held) { return held.word == word; });
}

API void ldm_emu_fence(int line) {
    if (dropped(Site::Fence, line)) return;
    const uint16_t thread = uint16_t(ldm_thread.thread);
    for (Held& held : V.held) {
        if (held.fenced_by != NOBODY || (held.stored_by != thread && held.stored_at >= V.clocks[thread])) continue;
        held.fenced_by = thread;
        held.fenced_at = V.clocks[thread];
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

API void ldm_emu_atomic() {
    if (V.held.empty()) return;
    const uint16_t thread = uint16_t(ldm_thread.thread);
    auto told = [&](const Held& held) {
        if (held.fenced_by == NOBODY || (held.fenced_by != thread && held.fenced_at >= V.clocks[thread])) return false;
        publish(held);
        return true;
    };
    V.held.erase(std::remove_if(V.held.begin(), V.held.end(), told), V.held.end());
}
