// Asynchronous copies into shared memory. When one lands is the adversary's choice (`async`), between its issue and the
// wait of its thread that covers it; until then its destination holds poison.

#include <cstring>

#include "block.h"
#include "dev.cuh"

namespace {
struct Copy {
    void* to;
    unsigned at;        // where that is in shared memory
    const void* from;   // null: zeros
    unsigned group;
    int line;
    bool landed;
};

// The copies that a thread has issued and not waited for, oldest first.
struct Queue {
    std::vector<Copy> copies;
    unsigned open = 0;  // number of the group that the next copy belongs to; those before are committed
};

struct Copies {
    Queue queues[1024];
    unsigned in_flight = 0;
    Random random{1};
};
thread_local Copies* copies = nullptr;

Queue& mine() { return copies->queues[ldm_thread.thread]; }

void land(Copy& copy) {
    if (copy.landed) return;
    copy.landed = true;
    if (copy.from) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
}
}  // namespace

void copies_start(uint64_t block) {
    if (!copies) copies = new Copies;
    if (copies->in_flight)  // the block before broke a rule
        for (Queue& queue : copies->queues) queue.copies.clear();
    copies->in_flight = 0;
    copies->random.state = settings.async_seed * 0x9e3779b97f4a7c15ull + block;
}

void copies_play() {
    if (!copies->in_flight || settings.async != Async::Random) return;
    for (Copy& copy : mine().copies)
        if (copies->random.next() % 4 == 0) land(copy);
}

void copies_exit() {
    if (!copies->in_flight || mine().copies.empty()) return;
    const Copy& first = mine().copies[0];
    kernel_violation(LAUNCH_FAILED, first.line, format("thread %u exits and has not waited for %zu of its asynchronous copies", ldm_thread.thread,
                                                       mine().copies.size()));
}

API void ldm_emu_cp_async(void* to, const void* from, int in, int line) {
    if (uintptr_t(from) % 16)
        kernel_violation(MISALIGNED_ADDRESS, line, format("misaligned cp_async of 16 bytes from %p", from));
    const unsigned at = shared_offset(to, 16, "cp_async", line);
    if (settings.banks) banks_access(Access::Copy, at, 16, line);
    Queue& queue = mine();
    queue.copies.push_back({to, at, in ? from : nullptr, queue.open, line, false});
    copies->in_flight++;
    proxy_copying(at);
    if (settings.async == Async::Early || (settings.async == Async::Random && copies->random.next() % 4 == 0)) land(queue.copies.back());
    else memset(to, POISON, 16);
}

API void ldm_emu_cp_async_commit(int line) {
    if (dropped(Site::CopyCommit, line)) return;
    mine().open++;
    copies_play();
}

API void ldm_emu_cp_async_wait(int pending, int line) {
    if (dropped(Site::CopyWait, line)) return;
    Queue& queue = mine();
    size_t n = 0;
    for (; n < queue.copies.size() && queue.copies[n].group + unsigned(pending) < queue.open; n++) {
        land(queue.copies[n]);
        proxy_written(queue.copies[n].at);
    }
    queue.copies.erase(queue.copies.begin(), queue.copies.begin() + long(n));
    copies->in_flight -= unsigned(n);
}
