// Which stores other blocks of the same launch may rely on. In a kernel with atomic operations, a first store to a word is
// held back: its own block may read it, others find it unwritten, until an atomic operation tells of it. That one tells of
// what comes before it: stores behind which the same thread has fenced, or another one before a barrier of both. And a
// thread may read what it was told of behind a fence that comes after an atomic operation, its own or, before a barrier,
// another thread's. So both halves of "the last block combines" are checked. What was never told of is there for the next
// launch.

#include <algorithm>
#include <atomic>
#include <unordered_map>

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
    bool told;
};

struct Thread {
    uint32_t clock;              // what happened before a barrier has a smaller one than what comes after it
    uint32_t heard, may_read;    // numbers of atomic operations: the newest before now, and before the last fence
};

struct Visibility {
    bool on = false, sorted = false;
    std::vector<Held> held;
    Thread threads[1024];
    unsigned count = 0;
    Thread& mine() { return threads[ldm_thread.thread]; }
};
thread_local Visibility* local = nullptr;
#define V (*local)

struct Told {
    uint32_t number;
    uint8_t bytes;
};
std::atomic<uint32_t> number{0};  // of the newest atomic operation
std::mutex lock;
std::unordered_map<uint64_t, Told> told;
std::vector<Held> untold;  // of blocks that are over

void join(unsigned from, unsigned to) {
    Thread all = {0, 0, 0};
    for (unsigned t = from; t < to; t++) {
        all.clock = std::max(all.clock, V.threads[t].clock + 1);
        all.heard = std::max(all.heard, V.threads[t].heard);
        all.may_read = std::max(all.may_read, V.threads[t].may_read);
    }
    std::fill(V.threads + from, V.threads + to, all);
}

bool own(uint64_t word, unsigned bytes) {
    auto less = [](const Held& a, const Held& b) { return a.word < b.word; };
    if (!V.sorted) std::stable_sort(V.held.begin(), V.held.end(), less);
    V.sorted = true;
    const auto [from, to] = std::equal_range(V.held.begin(), V.held.end(), Held{word, 0, 0, 0, 0, 0, false}, less);
    for (auto it = from; it != to; ++it) bytes &= ~unsigned(it->bytes);
    return bytes == 0;
}
}  // namespace

void visibility_start(const Launch& launch) {
    if (!local) local = new Visibility;
    V.on = launch.kernel->combines;
    V.count = launch.block;
    V.held.clear();
    if (V.on) std::fill(V.threads, V.threads + V.count, Thread{1, 0, 0});
}

void visibility_barrier() {
    if (V.on) join(0, V.count);
}

void visibility_warp(unsigned warp) {
    if (V.on) join(32 * warp, std::min(32 * warp + 32, V.count));
}

void visibility_end() {
    if (V.held.empty()) return;
    std::lock_guard<std::mutex> hold(lock);
    std::copy_if(V.held.begin(), V.held.end(), std::back_inserter(untold), [](const Held& held) { return !held.told; });
}

void visibility_finish() {
    for (const Held& held : untold) ldm_thread.shadow[held.word] |= held.bytes;
    for (const auto& [word, of] : told) ldm_thread.shadow[word] |= of.bytes;
    untold.clear();
    told.clear();
    number = 0;
}

bool visibility_holds(uint64_t word, unsigned bytes) {
    if (!V.on) return false;
    V.held.push_back({word, V.mine().clock, 0, uint16_t(ldm_thread.thread), NOBODY, uint8_t(bytes), false});
    V.sorted = false;
    return true;
}

const char* visibility_objection(uint64_t word, unsigned bytes) {
    if (V.on && own(word, bytes)) return nullptr;
    std::lock_guard<std::mutex> hold(lock);
    const auto it = told.find(word);
    if (it != told.end() && (bytes & ~unsigned(it->second.bytes)) == 0)
        return it->second.number <= V.mine().may_read ? nullptr : "another block has written: the reader lacks a fence after an atomic operation";
    if (std::any_of(untold.begin(), untold.end(), [&](const Held& held) { return held.word == word; }))
        return "another block has written without a fence and an atomic operation after it";
    return "nothing has written";
}

API void ldm_emu_fence(int line) {
    if (dropped(Site::Fence, line)) return;
    const uint16_t t = uint16_t(ldm_thread.thread);
    Thread& thread = V.mine();
    for (Held& held : V.held) {
        if (held.fenced_by != NOBODY || (held.stored_by != t && held.stored_at >= thread.clock)) continue;
        held.fenced_by = t;
        held.fenced_at = thread.clock;
    }
    thread.may_read = thread.heard;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// Before and after an atomic operation.
API void ldm_emu_atomic(int done) {
    if (!V.on) return;
    const uint16_t t = uint16_t(ldm_thread.thread);
    Thread& thread = V.mine();
    if (done) {
        thread.heard = number;
        return;
    }
    std::lock_guard<std::mutex> hold(lock);
    const uint32_t mine = ++number;
    for (Held& held : V.held) {
        if (held.told || held.fenced_by == NOBODY || (held.fenced_by != t && held.fenced_at >= thread.clock)) continue;
        held.told = true;
        Told& of = told[held.word];
        of.number = mine;
        of.bytes |= held.bytes;
    }
}
