// Device memory: one reserved range of addresses, a shadow byte for every 4 bytes of it, guard bands around each
// allocation, and a quarantine, so that a freed address stays dead for a while.

#include "block.h"

#include <sys/mman.h>

#include <cstring>
#include <deque>
#include <map>

#include "dev.cuh"

extern "C" __attribute__((visibility("default"))) __thread LdmThread ldm_thread
    __attribute__((tls_model("initial-exec")));
__thread LdmThread ldm_thread;

namespace {
constexpr uint64_t GUARD = 256, ALIGN = 256, QUARANTINE = 64ull << 20, KEEP = 1ull << 20;
constexpr unsigned char BAND = 0xfd;

struct Block {
    uint64_t bytes, whole;  // asked for; with bands and padding
};

unsigned char* base = nullptr;
unsigned char* shadow = nullptr;
uint64_t reserved = 0;
std::map<uint64_t, Block> live;                     // by the address that the caller sees
std::map<uint64_t, uint64_t> gaps;                  // free ranges: start, length
std::deque<std::pair<uint64_t, Block>> quarantine;  // freed, not yet reusable
uint64_t quarantined = 0;
MemoryUse use = {0, 0, 0};
std::map<uint64_t, uint64_t> pinned;

bool reserve() {
    if (base) return true;
    for (uint64_t size = 1ull << 38; size >= (1ull << 30); size >>= 1) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
        void* marks = mmap(nullptr, size / 4, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory != MAP_FAILED && marks != MAP_FAILED) {
            base = (unsigned char*)memory;
            shadow = (unsigned char*)marks;
            reserved = size;
            gaps[uint64_t(base)] = size;
            return true;
        }
        if (memory != MAP_FAILED) munmap(memory, size);
        if (marks != MAP_FAILED) munmap(marks, size / 4);
    }
    return false;
}

void add_gap(uint64_t start, uint64_t length) {
    auto next = gaps.lower_bound(start);
    if (next != gaps.end() && start + length == next->first) {
        length += next->second;
        next = gaps.erase(next);
    }
    if (next != gaps.begin()) {
        auto before = std::prev(next);
        if (before->first + before->second == start) {
            before->second += length;
            return;
        }
    }
    gaps[start] = length;
}

// Sets or clears bits of the shadow for a range of bytes: `allocated` picks the high nibble, `written` the low one.
void mark(uint64_t at, uint64_t bytes, bool allocated, bool written, bool value) {
    uint64_t from = at - uint64_t(base), to = from + bytes;
    auto one = [&](uint64_t byte) {
        const unsigned bit = unsigned(byte & 3);
        const unsigned char m = (unsigned char)((allocated ? 0x10u << bit : 0) | (written ? 1u << bit : 0));
        if (value) shadow[byte >> 2] |= m;
        else shadow[byte >> 2] &= (unsigned char)~m;
    };
    while (from < to && from % 4) one(from++);
    while (to > from && to % 4) one(--to);
    if (from >= to) return;
    if (allocated) {
        memset(shadow + from / 4, value ? (written ? 0xff : 0xf0) : 0, (to - from) / 4);
    } else {
        memset(shadow + from / 4, value ? 0xff : 0xf0, (to - from) / 4);
    }
}

std::map<uint64_t, Block>::iterator holder(uint64_t at) {
    auto after = live.upper_bound(at);
    if (after == live.begin()) return live.end();
    auto it = std::prev(after);
    return at < it->first + it->second.bytes || (it->second.bytes == 0 && at == it->first) ? it : live.end();
}

Result look(uint64_t start, const Block& block, const char* whose) {
    const unsigned char* low = (const unsigned char*)start - GUARD;
    const unsigned char* high = (const unsigned char*)start + block.bytes;
    const unsigned char* end = low + block.whole;
    for (const unsigned char* p = low; p < (const unsigned char*)start; p++)
        if (*p != BAND)
            return violation(ILLEGAL_ADDRESS, format("%s: something wrote %llu bytes before the allocation of %llu bytes at %#llx",
                                                     whose, (unsigned long long)(start - uint64_t(p)),
                                                     (unsigned long long)block.bytes, (unsigned long long)start));
    for (const unsigned char* p = high; p < end; p++)
        if (*p != BAND)
            return violation(ILLEGAL_ADDRESS, format("%s: something wrote %llu bytes past the end of the allocation of %llu bytes at %#llx",
                                                     whose, (unsigned long long)(p - high), (unsigned long long)block.bytes,
                                                     (unsigned long long)start));
    return SUCCESS;
}
}  // namespace

Result memory_alloc(uint64_t bytes, uint64_t* out) {
    if (bytes == 0) return refuse(INVALID_VALUE, "an allocation of 0 bytes");
    if (!reserve()) return refuse(OUT_OF_MEMORY, "the host gives no address space");
    if (bytes > settings.memory || use.bytes + bytes > settings.memory)
        return refuse(OUT_OF_MEMORY, format("out of device memory: %llu bytes asked, %llu of %llu in use",
                                            (unsigned long long)bytes, (unsigned long long)use.bytes,
                                            (unsigned long long)settings.memory));
    const uint64_t whole = GUARD + (bytes + ALIGN - 1) / ALIGN * ALIGN + GUARD;
    auto gap = gaps.begin();
    while (gap != gaps.end() && gap->second < whole) ++gap;
    if (gap == gaps.end()) return refuse(OUT_OF_MEMORY, "the emulator's range of addresses is full");
    const uint64_t start = gap->first, length = gap->second;
    gaps.erase(gap);
    if (length > whole) gaps[start + whole] = length - whole;
    const uint64_t at = start + GUARD;
    memset((void*)start, BAND, GUARD);
    memset((void*)at, POISON, bytes);
    memset((void*)(at + bytes), BAND, whole - GUARD - bytes);
    mark(at, bytes, true, false, true);
    live[at] = Block{bytes, whole};
    use.live++;
    use.bytes += bytes;
    if (use.bytes > use.peak) use.peak = use.bytes;
    *out = at;
    return SUCCESS;
}

Result memory_free(uint64_t at, const char* whose) {
    auto it = live.find(at);
    if (it == live.end()) return refuse(INVALID_VALUE, format("%s: %#llx %s", whose, (unsigned long long)at, memory_describe(at).c_str()));
    const Result damage = look(at, it->second, whose);
    const Block block = it->second;
    live.erase(it);
    use.live--;
    use.bytes -= block.bytes;
    mark(at, block.bytes, true, true, false);
    // What still reads it without asking finds poison, or zeros where the pages went back to the host.
    if (block.whole <= KEEP) {
        memset((void*)at, POISON, block.bytes);
    } else {
        const uint64_t from = (at - GUARD + 4095) / 4096 * 4096, to = (at - GUARD + block.whole) / 4096 * 4096;
        madvise((void*)from, to - from, MADV_DONTNEED);
        const uint64_t s = (uint64_t(shadow) + (from - uint64_t(base)) / 4 + 4095) / 4096 * 4096;
        const uint64_t e = (uint64_t(shadow) + (to - uint64_t(base)) / 4) / 4096 * 4096;
        if (e > s) madvise((void*)s, e - s, MADV_DONTNEED);
    }
    quarantine.push_back({at, block});
    quarantined += block.whole;
    while (quarantined > QUARANTINE && quarantine.size() > 16) {
        auto [old, gone] = quarantine.front();
        quarantine.pop_front();
        quarantined -= gone.whole;
        add_gap(old - GUARD, gone.whole);
    }
    return damage;
}

bool memory_is_device(uint64_t at) { return base && at - uint64_t(base) < reserved; }

std::string memory_describe(uint64_t at) {
    if (!memory_is_device(at)) return "is no device address";
    auto it = holder(at);
    if (it != live.end())
        return format("is byte %llu of the allocation of %llu bytes at %#llx", (unsigned long long)(at - it->first),
                      (unsigned long long)it->second.bytes, (unsigned long long)it->first);
    for (const auto& [start, block] : quarantine)
        if (at >= start - GUARD && at < start - GUARD + block.whole)
            return format("lies in the allocation of %llu bytes at %#llx, which was freed",
                          (unsigned long long)block.bytes, (unsigned long long)start);
    // The nearer neighbour.
    const uint64_t FAR = 65536;
    auto after = live.upper_bound(at), before = after == live.begin() ? live.end() : std::prev(after);
    const uint64_t past = before == live.end() ? FAR : at - before->first - before->second.bytes;
    const uint64_t ahead = after == live.end() ? FAR : after->first - at;
    if (past < FAR && past <= ahead)
        return format("is %llu bytes past the end of the allocation of %llu bytes at %#llx", (unsigned long long)past,
                      (unsigned long long)before->second.bytes, (unsigned long long)before->first);
    if (ahead < FAR)
        return format("is %llu bytes before the allocation of %llu bytes at %#llx", (unsigned long long)ahead,
                      (unsigned long long)after->second.bytes, (unsigned long long)after->first);
    return "is in no allocation";
}

Result memory_check(uint64_t at, uint64_t bytes, const char* whose) {
    auto it = holder(at);
    if (it == live.end())
        return refuse(INVALID_VALUE, format("%s: %#llx %s", whose, (unsigned long long)at, memory_describe(at).c_str()));
    if (bytes > it->second.bytes - (at - it->first))
        return refuse(INVALID_VALUE, format("%s: %llu bytes from %#llx do not fit: it %s", whose, (unsigned long long)bytes,
                                            (unsigned long long)at, memory_describe(at).c_str()));
    return SUCCESS;
}

Result memory_guards(uint64_t at, const char* whose) {
    auto it = holder(at);
    return it == live.end() ? SUCCESS : look(it->first, it->second, whose);
}

Result memory_all_guards(const char* whose) {
    for (const auto& [start, block] : live)
        if (Result e = look(start, block, whose)) return e;
    return SUCCESS;
}

void memory_written(uint64_t at, uint64_t bytes) { mark(at, bytes, false, true, true); }

void memory_poison(uint64_t at, uint64_t bytes) {
    memset((void*)at, POISON, bytes);
    mark(at, bytes, false, true, false);
}

void memory_copy_shadow(uint64_t to, uint64_t from, uint64_t bytes) {
    const uint64_t t = to - uint64_t(base), f = from - uint64_t(base);
    if (t % 4 == 0 && f % 4 == 0 && bytes >= 4) {
        memmove(shadow + t / 4, shadow + f / 4, bytes / 4);
        if (bytes % 4) mark(to + bytes / 4 * 4, bytes % 4, false, true, true);
        return;
    }
    mark(to, bytes, false, true, true);
}

void memory_bind_thread() {
    reserve();
    ldm_thread.shadow = shadow;
    ldm_thread.base = uint64_t(base);
    ldm_thread.size = reserved;
}

MemoryUse memory_use() { return use; }

// The uncommon answers of `ldm_check`: a first write, a host address, a misaligned or dead or unwritten one.
API void ldm_emu_access(const void* p, unsigned bytes, unsigned align, int write, int line) {
    const uint64_t at = uint64_t(p);
    const char* what = write ? "store" : "load";
    griddep_check(what, line);
    if (!memory_is_device(at))
        kernel_violation(ILLEGAL_ADDRESS, line, format("%s of %u bytes at %#llx, which is no device address", what, bytes, (unsigned long long)at));
    if (at % align)
        kernel_violation(MISALIGNED_ADDRESS, line,
                         format("misaligned %s of %u bytes: %#llx %s", what, bytes, (unsigned long long)at, memory_describe(at).c_str()));
    const uint64_t offset = at - ldm_thread.base;
    for (unsigned i = 0; i < bytes;) {
        // The four bytes of one shadow byte at a time, or what of them is asked for.
        const unsigned first = unsigned((offset + i) & 3), n = bytes - i < 4 - first ? bytes - i : 4 - first;
        const unsigned low = ((1u << n) - 1) << first;
        unsigned char* s = shadow + ((offset + i) >> 2);
        const unsigned marks = __atomic_load_n(s, __ATOMIC_RELAXED);
        if (((marks >> 4) & low) != low)
            kernel_violation(ILLEGAL_ADDRESS, line,
                             format("%s of %u bytes at %#llx, out of bounds: it %s", what, bytes, (unsigned long long)at,
                                    memory_describe(at + i).c_str()));
        if (write) {
            if ((marks & low) != low && !visibility_holds((offset + i) >> 2, low)) __atomic_fetch_or(s, (unsigned char)low, __ATOMIC_RELAXED);
        } else if ((marks & low) != low && settings.uninitialised_is_error) {
            if (const char* why = visibility_objection((offset + i) >> 2, low & ~marks))
                kernel_violation(ASSERT, line,
                                 format("load of %u bytes at %#llx, which %s: it %s", bytes, (unsigned long long)at, why,
                                        memory_describe(at + i).c_str()));
        }
        i += n;
    }
}

Result host_alloc(size_t bytes, void** out) {
    if (bytes == 0) return refuse(INVALID_VALUE, "a host allocation of 0 bytes");
    void* p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!p) return OUT_OF_MEMORY;
    memset(p, POISON, bytes);
    pinned[uint64_t(p)] = bytes;
    *out = p;
    return SUCCESS;
}

Result host_free(void* at) {
    if (!pinned.erase(uint64_t(at))) return refuse(INVALID_VALUE, "cuMemFreeHost: no page-locked memory starts there");
    free(at);
    return SUCCESS;
}

bool host_is_pinned(const void* at, size_t bytes) {
    auto after = pinned.upper_bound(uint64_t(at));
    if (after == pinned.begin()) return false;
    auto it = std::prev(after);
    return uint64_t(at) + bytes <= it->first + it->second;
}
