// Copies of boxes of tensors, the barriers in shared memory at which they and threads arrive, and the maps that say how a tensor
// lies. When a copy lands is the adversary's choice (`async`): at once, at random, or late, when no thread can go on without it. Until
// then its destination holds poison, and who has not waited for its phase may not read it, however long ago it has landed.

#include <algorithm>
#include <cstring>
#include <deque>

#include "block.h"
#include "dev.cuh"

namespace {
constexpr unsigned MOST = 64;       // barriers of a block
constexpr uint32_t MAGIC = 0x50414d54;
constexpr int RANK = 5, SWIZZLE_128 = 3;

// The emulator's form of what the driver keeps opaque.
struct Map {
    uint32_t magic;
    uint8_t size, rank, swizzle;  // bytes of an element
    uint8_t steps[RANK];
    uint16_t box[RANK];
    uint32_t last[RANK];          // of each axis, its extent less one
    uint64_t address, strides[RANK - 1];
    unsigned along(int axis) const { return axis < rank ? unsigned(box[axis] + steps[axis] - 1) / steps[axis] : 1; }
    unsigned bytes() const {
        unsigned n = size;
        for (int axis = 0; axis < rank; axis++) n *= along(axis);
        return n;
    }
};
static_assert(sizeof(Map) <= sizeof(TensorMap), "a map has 128 bytes");

struct Barrier {
    unsigned at;             // in shared memory
    int count, pending, line;
    long long bytes;         // that the phase still waits for
    uint32_t phase, met;     // phases that are over; barriers of the block before it was made
    unsigned by;
    bool fenced;
    std::vector<unsigned> waiting;
};

struct Copy {
    Map map;
    int at[4];
    unsigned char* to;
    unsigned barrier;
};

struct Tensors {
    unsigned count = 0, threads = 0;
    uint32_t met = 0;
    Barrier barriers[MOST];
    uint32_t seen[MOST][1024];   // phases of each barrier that a thread knows to be over
    uint32_t strayed[32];        // lanes of each warp that may be by themselves
    struct {
        unsigned barrier;
        int line;                // 0: does not wait
    } waits[1024];
    std::deque<Copy> copies;     // on their way, oldest first
    Random random{1};
};
thread_local Tensors* local = nullptr;
#define V (*local)

void stray() { V.strayed[ldm_thread.warp] |= 1u << ldm_thread.lane; }

unsigned find(const void* bar, const char* what, int line) {
    const unsigned at = shared_offset(bar, 8, what, line), t = ldm_thread.thread;
    unsigned i = 0;
    while (i < V.count && V.barriers[i].at != at) i++;
    if (i == V.count) kernel_violation(LAUNCH_FAILED, line, format("%s: no mbarrier_init of byte %u of shared memory has been met in a barrier", what, at));
    const Barrier& b = V.barriers[i];
    if (b.by != t && b.met == V.met)
        kernel_violation(LAUNCH_FAILED, line, format("%s: the mbarrier_init by thread %u has been met in no barrier", what, b.by));
    return i;
}

void turn(Barrier& b) {
    if (b.pending || b.bytes) return;
    b.phase++;
    b.pending = b.count;
    for (const unsigned t : b.waiting) thread_ready(t);
    b.waiting.clear();
}

// Rows of the innermost axis, in the order in which they stand in shared memory: `f(row, address, first, end)`, where the bytes
// from `first` to `end` of the row lie in the tensor, from `address` on.
template <class F>
void each_row(const Map& map, const int* at, F f) {
    const unsigned n1 = map.along(1), n2 = map.along(2), n3 = map.along(3);
    const long long from = std::max(0, -at[0]), to = std::min<long long>(map.box[0], (long long)map.last[0] + 1 - at[0]);
    for (unsigned row = 0; row < n1 * n2 * n3; row++) {
        const unsigned index[4] = {0, row % n1, row / n1 % n2, row / n1 / n2};
        bool in = from < to;
        uint64_t address = map.address + uint64_t((long long)(at[0] + from) * map.size);
        for (int axis = 1; axis < map.rank; axis++) {
            const long long i = at[axis] + (long long)index[axis] * map.steps[axis];
            in = in && i >= 0 && i <= (long long)map.last[axis];
            if (in) address += uint64_t(i) * map.strides[axis - 1];
        }
        f(row, address, in ? unsigned(from) * map.size : 0, in ? unsigned(to) * map.size : 0);
    }
}

void land(size_t which) {
    const Copy copy = V.copies[which];
    V.copies.erase(V.copies.begin() + long(which));
    const unsigned width = unsigned(copy.map.box[0]) * copy.map.size;
    each_row(copy.map, copy.at, [&](unsigned row, uint64_t address, unsigned first, unsigned end) {
        unsigned char bytes[1024] = {};
        memcpy(bytes + first, (const void*)address, end - first);
        unsigned char* to = copy.to + row * width;
        for (unsigned chunk = 0; chunk < width / 16; chunk++)
            memcpy(to + 16 * (copy.map.swizzle == SWIZZLE_128 ? chunk ^ (row & 7) : chunk), bytes + 16 * chunk, 16);
    });
    Barrier& b = V.barriers[copy.barrier];
    b.bytes -= copy.map.bytes();
    if (b.bytes < 0)
        kernel_violation(LAUNCH_FAILED, b.line, format("tma_load: %lld bytes more than mbarrier_expect has said arrive at the mbarrier at byte %u", -b.bytes,
                                                       b.at));
    turn(b);
}

void play() {
    if (settings.async == Async::Random && !V.copies.empty() && V.random.next() % 4 == 0) land(V.random.next() % V.copies.size());
}

// Every byte that it reads must be there: as `load`, in strides that the shadow answers at once.
void check_row(uint64_t address, unsigned bytes, int line) {
    const uint64_t at = address - ldm_thread.base;
    if (at < ldm_thread.size && at % 4 == 0 && bytes % 4 == 0) {
        const unsigned char* s = ldm_thread.shadow + at / 4;
        unsigned i = 0;
        while (i < bytes / 4 && s[i] == 0xff) i++;
        if (i == bytes / 4) return;
    }
    ldm_emu_access((const void*)address, bytes, 1, 0, line);
}
}  // namespace

void tensors_start(const Launch& launch, uint64_t block) {
    if (!local) local = new Tensors;
    V.threads = launch.block;
    V.count = 0;
    V.met = 0;
    V.copies.clear();
    memset(V.strayed, 0, sizeof V.strayed);
    memset(V.waits, 0, sizeof V.waits);
    V.random.state = settings.async_seed * 0x9e3779b97f4a7c15ull + block + 2;
}

bool tensors_land() {
    if (V.copies.empty()) return false;
    land(settings.async == Async::Random ? V.random.next() % V.copies.size() : 0);
    return true;
}

void tensors_end() {
    if (V.copies.empty()) return;
    const Barrier& b = V.barriers[V.copies[0].barrier];
    kernel_violation(LAUNCH_FAILED, b.line, format("the block ends, and nobody has waited for %zu of its tensor copies", V.copies.size()));
}

void tensors_meet(unsigned first, unsigned count) {
    if (count == V.threads) V.met++;
    for (unsigned w = first / 32; w < (first + count + 31) / 32; w++) V.strayed[w] = 0;
    for (unsigned i = 0; i < V.count; i++) {
        uint32_t* own = V.seen[i] + first;
        std::fill(own, own + count, *std::max_element(own, own + count));
    }
}

void tensors_together(const char* what, int line) {
    const uint32_t lanes = V.strayed[ldm_thread.warp];
    if (lanes)
        kernel_violation(LAUNCH_FAILED, line, format("diverged warp: %s, and lane %d was by itself at an mbarrier or a tma_load: want a sync_warp between",
                                                     what, __builtin_ctz(lanes)));
}

int tensors_unseen(unsigned barrier, uint32_t phase, unsigned first, unsigned count) {
    for (unsigned t = first; t < first + count; t++)
        if (V.seen[barrier][t] <= phase) return int(t);
    return -1;
}

std::string tensors_waits(unsigned thread) {
    if (!V.waits[thread].line) return {};
    const Barrier& b = V.barriers[V.waits[thread].barrier];
    return format(" thread %u waits in mbarrier_wait of line %d, for %d of %d arrivals and %lld bytes in phase %u of the mbarrier at byte %u;", thread,
                  V.waits[thread].line, b.pending, b.count, b.bytes, b.phase, b.at);
}

API void ldm_emu_mbarrier_init(void* bar, int count, int line) {
    const unsigned at = shared_offset(bar, 8, "mbarrier_init", line), t = ldm_thread.thread;
    stray();
    if (count < 1 || count >= 1 << 20) kernel_violation(LAUNCH_FAILED, line, format("mbarrier_init: a count of %d", count));
    for (unsigned i = 0; i < V.count; i++)
        if (V.barriers[i].at == at) kernel_violation(LAUNCH_FAILED, line, format("mbarrier_init: there is one at byte %u already", at));
    if (V.count == MOST) kernel_violation(LAUNCH_FAILED, line, format("mbarrier_init: more than %u in a block", MOST));
    memset(V.seen[V.count], 0, V.threads * sizeof(uint32_t));
    V.barriers[V.count++] = {at, count, count, line, 0, 0, V.met, t, false, {}};
}

API void ldm_emu_fence_mbarriers(int line) {
    if (dropped(Site::FenceMbarriers, line)) return;
    for (unsigned i = 0; i < V.count; i++) V.barriers[i].fenced |= V.barriers[i].by == ldm_thread.thread;
}

// With bytes that the phase is to wait for, or -1.
API void ldm_emu_mbarrier_arrive(void* bar, int bytes, int line) {
    const char* what = bytes < 0 ? "mbarrier_arrive" : "mbarrier_expect";
    stray();
    play();
    if (dropped(bytes < 0 ? Site::MbarrierArrive : Site::MbarrierExpect, line)) return;
    Barrier& b = V.barriers[find(bar, what, line)];
    b.line = line;
    if (b.pending == 0) kernel_violation(LAUNCH_FAILED, line, format("%s: more than %d arrivals in phase %u of the mbarrier", what, b.count, b.phase));
    b.pending--;
    if (bytes > 0) b.bytes += bytes;
    if (b.bytes >= 1 << 20) kernel_violation(LAUNCH_FAILED, line, format("%s: a phase of %lld bytes", what, b.bytes));
    turn(b);
}

API void ldm_emu_mbarrier_wait(void* bar, int parity, int line) {
    const unsigned t = ldm_thread.thread;
    stray();
    play();
    wgmma_play();
    if (dropped(Site::MbarrierWait, line)) return;
    const unsigned i = find(bar, "mbarrier_wait", line);
    Barrier& b = V.barriers[i];
    if (parity != 0 && parity != 1) kernel_violation(LAUNCH_FAILED, line, format("mbarrier_wait: parity %d", parity));
    while ((b.phase & 1) == unsigned(parity)) {
        V.waits[t] = {i, line};
        b.waiting.push_back(t);
        warp_waits();
    }
    V.waits[t].line = 0;
    V.seen[i][t] = b.phase;
}

API void ldm_emu_tma_load(void* to, const void* map, const int* at, void* bar, int line) {
    stray();
    if (uintptr_t(map) % 64) kernel_violation(MISALIGNED_ADDRESS, line, "misaligned tma_load: its map does not lie at a multiple of 64 bytes");
    Copy copy = {{}, {at[0], at[1], at[2], at[3]}, (unsigned char*)to, find(bar, "tma_load", line)};
    memcpy(&copy.map, map, sizeof copy.map);
    Barrier& b = V.barriers[copy.barrier];
    if (copy.map.magic != MAGIC) kernel_violation(LAUNCH_FAILED, line, "tma_load: no map that cuTensorMapEncodeTiled has made");
    if (copy.map.rank != 4) kernel_violation(LAUNCH_FAILED, line, format("tma_load: coordinates of 4 axes, and a map of %d", copy.map.rank));
    if (!b.fenced) kernel_violation(LAUNCH_FAILED, line, "tma_load: no fence_mbarriers since the mbarrier_init of its mbarrier");
    const unsigned place = shared_offset(to, 128, "tma_load", line), bytes = copy.map.bytes();
    if (place + bytes > shared_bytes())
        kernel_violation(ILLEGAL_ADDRESS, line, format("tma_load of %u bytes outside the block's %u bytes of shared memory: %u bytes from their start",
                                                       bytes, shared_bytes(), place));
    if (copy.map.swizzle == SWIZZLE_128 && place % 1024)
        kernel_violation(MISALIGNED_ADDRESS, line, format("misaligned tma_load at byte %u of shared memory: with a swizzle, want a multiple of 1024", place));
    if (wgmma_reads(place, bytes)) kernel_violation(LAUNCH_FAILED, line, format("tma_load to byte %u of shared memory, which a wgmma in flight reads", place));
    proxy_tensor(place, bytes, copy.barrier, b.phase, line);
    each_row(copy.map, at, [&](unsigned, uint64_t address, unsigned first, unsigned end) {
        if (first < end) check_row(address, end - first, line);
    });
    b.line = line;
    memset(to, POISON, bytes);
    V.copies.push_back(copy);
    if (settings.async == Async::Early) land(V.copies.size() - 1);
    else play();
}

API Result cuTensorMapEncodeTiled(void* out, int type, unsigned rank, void* address, const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                                  const uint32_t* steps, int interleave, int swizzle, int promotion, int fill) {
    LOCKED;
    const char* const who = "cuTensorMapEncodeTiled";
    const uint8_t sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
    if (!out || uintptr_t(out) % 64) return refuse(INVALID_VALUE, format("%s: the map's place: want a multiple of 64", who));
    if (type < 0 || type > 9) return refuse(INVALID_VALUE, format("%s: type of elements %d", who, type));
    if (rank < 1 || rank > RANK) return refuse(INVALID_VALUE, format("%s: %u axes", who, rank));
    if (interleave || (swizzle != 0 && swizzle != SWIZZLE_128) || promotion < 0 || promotion > 3 || fill < 0 || fill > 1)
        return refuse(INVALID_VALUE, format("%s: interleave %d, swizzle %d, promotion %d, fill %d: the emulator knows 0; 0 and 3; 0 to 3; 0 and 1", who,
                                            interleave, swizzle, promotion, fill));
    const uint64_t at = uint64_t(address);
    if (at % 16 || !memory_is_device(at))
        return refuse(INVALID_VALUE, format("%s: address %#llx: want one of the device, a multiple of 16", who, (unsigned long long)at));
    Map map = {MAGIC, sizes[type], uint8_t(rank), uint8_t(swizzle), {}, {}, {}, at, {}};
    for (unsigned i = 0; i < rank; i++) {
        if (dims[i] < 1 || dims[i] > 1ull << 32)
            return refuse(INVALID_VALUE, format("%s: axis %u has an extent of %llu", who, i, (unsigned long long)dims[i]));
        if (box[i] < 1 || box[i] > 256) return refuse(INVALID_VALUE, format("%s: axis %u of the box: %u, want 1 to 256", who, i, box[i]));
        if (steps[i] < 1 || steps[i] > 8) return refuse(INVALID_VALUE, format("%s: axis %u: elements in steps of %u, want 1 to 8", who, i, steps[i]));
        if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40 || !strides[i]))
            return refuse(INVALID_VALUE, format("%s: axis %u has a stride of %llu bytes: want a multiple of 16 below 2^40", who, i + 1,
                                                (unsigned long long)strides[i]));
        map.last[i] = uint32_t(dims[i] - 1);
        map.box[i] = uint16_t(box[i]);
        map.steps[i] = uint8_t(i ? steps[i] : 1);
        if (i + 1 < rank) map.strides[i] = strides[i];
    }
    const unsigned width = box[0] * map.size;
    if (width % 16) return refuse(INVALID_VALUE, format("%s: rows of %u bytes in the box: want a multiple of 16", who, width));
    if (swizzle == SWIZZLE_128 && width > 128) return refuse(INVALID_VALUE, format("%s: rows of %u bytes in a swizzle of 128", who, width));
    if (swizzle == SWIZZLE_128 && width < 128) return refuse(NOT_SUPPORTED, format("%s: rows of %u bytes in a swizzle of 128 are not emulated", who, width));
    memset(out, 0, sizeof(TensorMap));
    memcpy(out, &map, sizeof map);
    return SUCCESS;
}
