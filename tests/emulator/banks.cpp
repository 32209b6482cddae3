// Bank conflicts of shared memory, by source line. It has 32 banks of 4-byte words; an access of 16 bytes per lane is served
// in four parts of 8 lanes, one of 8 bytes in two of 16, and a part costs as many passes (wavefronts) as the fullest bank
// has different words. The lanes of a warp run one after the other, so their k-th accesses of a line are taken as one.

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>

#include "block.h"
#include "dev.cuh"

namespace {
const char* const access_names[int(Access::COUNT)] = {"load_shared", "store_shared", "cp_async", "ldmatrix"};

struct Counts {
    uint64_t accesses = 0, ideal = 0, actual = 0;
};

// The k-th access of a line by one warp.
struct Gathered {
    uint32_t lanes = 0;
    unsigned bytes = 0, offsets[32];
};

struct Line {
    unsigned seen[32] = {}, first = 0;  // accesses per lane; the number of `waiting[0]`
    std::deque<Gathered> waiting;
};

struct Banks {
    std::map<std::pair<int, Access>, Counts> counts;
    std::map<std::pair<int, Access>, Line> lines[32];
};
thread_local Banks* banks = nullptr;

std::mutex lock;
std::map<std::pair<std::string, std::pair<int, Access>>, Counts> table;
std::string shown;

Banks& mine() {
    if (!banks) banks = new Banks;
    return *banks;
}

// Wavefronts of what is served together: the most different words in one bank.
unsigned wavefronts(const unsigned* offsets, unsigned lanes, uint32_t active, unsigned bytes) {
    unsigned words[32], n = 0, of_bank[32] = {}, most = 0;
    for (unsigned l = 0; l < lanes; l++)
        if (active >> l & 1)
            for (unsigned i = 0; i < std::max(1u, bytes / 4); i++) words[n++] = offsets[l] / 4 + i;
    std::sort(words, words + n);
    for (unsigned i = 0; i < n; i++)
        if (i == 0 || words[i] != words[i - 1]) most = std::max(most, ++of_bank[words[i] % 32]);
    return most;
}

void count(Counts& counts, const Gathered& access) {
    const unsigned lanes = access.bytes == 16 ? 8 : access.bytes == 8 ? 16 : 32;
    counts.accesses++;
    for (unsigned l = 0; l < 32; l += lanes) {
        const unsigned n = wavefronts(access.offsets + l, lanes, access.lanes >> l, access.bytes);
        counts.ideal += n > 0;
        counts.actual += n;
    }
}
}  // namespace

void banks_access(Access what, unsigned offset, unsigned bytes, int line) {
    const unsigned l = ldm_thread.lane;
    Line& of = mine().lines[ldm_thread.warp][{line, what}];
    const unsigned at = of.seen[l]++ - of.first;
    if (at >= of.waiting.size()) of.waiting.resize(at + 1);
    Gathered& access = of.waiting[at];
    access.bytes = bytes;
    access.offsets[l] = offset;
    access.lanes |= 1u << l;
    while (!of.waiting.empty() && of.waiting[0].lanes == ~0u) {
        count(mine().counts[{line, what}], of.waiting[0]);
        of.waiting.pop_front();
        of.first++;
    }
}

void banks_matrix(const unsigned* offsets, unsigned matrices, int line) {
    Counts& counts = mine().counts[{line, Access::Matrix}];
    counts.accesses++;
    counts.ideal += matrices;
    for (unsigned i = 0; i < matrices; i++) counts.actual += wavefronts(offsets + 8 * i, 8, 0xff, 16);
}

void banks_end(const Kernel& kernel) {
    Banks& all = mine();
    for (auto& lines : all.lines) {
        for (auto& [key, line] : lines)  // what not all lanes of a warp have done
            for (const Gathered& access : line.waiting) count(all.counts[key], access);
        lines.clear();
    }
    std::lock_guard<std::mutex> hold(lock);
    for (const auto& [key, counts] : all.counts) {
        Counts& sum = table[{kernel.unit, key}];
        sum.accesses += counts.accesses;
        sum.ideal += counts.ideal;
        sum.actual += counts.actual;
    }
    all.counts.clear();
}

void banks_forget() {
    std::lock_guard<std::mutex> hold(lock);
    table.clear();
}

// What was counted since the last reset, one `UNIT LINE ACCESS COUNT IDEAL ACTUAL` a line: accesses of warps, and the
// wavefronts that they would take without conflicts and do take. Valid until the next call.
API const char* ldm_emulator_banks() {
    LOCKED;
    std::lock_guard<std::mutex> hold(lock);
    shown.clear();
    for (const auto& [key, counts] : table) {
        const auto& [line, what] = key.second;
        shown += format("%s %d %s %llu %llu %llu\n", key.first.c_str(), line, access_names[int(what)], (unsigned long long)counts.accesses,
                        (unsigned long long)counts.ideal, (unsigned long long)counts.actual);
    }
    return shown.c_str();
}
