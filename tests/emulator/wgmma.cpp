// Products of warpgroups. When one is done is the adversary's choice (`async`), between the issue by the last of its 128 threads and the
// `wgmma_wait` that covers it: late, it finds in shared memory what lies there then. Until it has been waited for, its accumulators hold
// poison. And what the async proxy may read: 16 bytes that a thread wrote, by a copy that it has waited for or by `store_shared`, after a
// `fence_proxy_async` of that thread and a barrier of the block behind it; and what a tensor copy wrote, where each thread of the
// warpgroup has waited for its phase. Tensor copies write through that proxy too.

#include <deque>

#include "block.h"
#include "dev.cuh"
#include "matrix.h"

namespace {
constexpr unsigned GROUP = 128, WINDOW = 1024;  // threads of a warpgroup; where a block's memory begins in the window of addresses
constexpr unsigned CHUNKS = SMEM_MOST / 16;

// Accumulators (64,n) that products in flight add to, and the registers that they came from and go to.
struct Sums {
    int n;
    float* to[GROUP] = {};
    unsigned products = 0;  // that have not been waited for
    std::vector<float> d;
};

struct Product {
    uint64_t a, b;
    Sums* sums;
    int n, bfloat, line;
    unsigned group, threads, barriers;
    bool done;
    std::vector<uint16_t> left;  // (64,16) where a came in registers: b is then in rows of columns
};

struct Warpgroup {
    std::deque<Product> products;  // oldest first
    std::vector<std::unique_ptr<Sums>> sums;
    uint64_t over = 0;             // products before the first of them
    uint64_t issued[GROUP] = {};   // by each thread
    unsigned open[GROUP] = {};     // number of the group that the next one belongs to; those before are committed
    bool fenced[GROUP] = {};       // since its last wait
};

enum State : uint8_t { NOTHING, COPYING, WRITTEN, FENCED, TENSOR };
struct Chunk {
    uint32_t block;     // by its number, in which the rest holds
    uint32_t barriers;  // TENSOR: its phase
    uint16_t by;        // TENSOR: the number of its barrier
    State state;
};

// Why the async proxy may not go over what a thread wrote; null where it may.
const char* objection(const Chunk& chunk, uint32_t barriers) {
    if (chunk.state == COPYING) return "has not waited for its copy";
    if (chunk.state == WRITTEN) return "has no fence_proxy_async since";
    return chunk.state == FENCED && chunk.barriers == barriers ? "has met no barrier since its fence_proxy_async" : nullptr;
}

struct Wgmma {
    bool on = false;
    unsigned threads = 0;
    uint32_t block = 0, barriers = 0;
    Warpgroup groups[8];
    Chunk chunks[CHUNKS] = {};
    std::vector<unsigned> written[1024];  // chunks of each thread, since its last fence
    Random random{1};
};
thread_local Wgmma* local = nullptr;
#define L (*local)

Warpgroup& mine() { return L.groups[ldm_thread.thread / GROUP]; }

// A matrix in shared memory: `lines` lines of `chunks` times 8 elements, in rows of 128 bytes, whose chunks are exchanged by the row's
// place in 1024 bytes. Of a, and of b by columns, a line is a row or column, and its two chunks lie in one row of 128 bytes. Of b by rows a
// line is one of its 16 rows, and after eight chunks it goes on elsewhere.
struct Matrix {
    const char* name;
    uint64_t descriptor;
    int lines, chunks;
    bool by_rows;

    unsigned start() const { return unsigned(descriptor & 0x3fff) << 4; }
    // Byte of a chunk.
    unsigned place(int line, int chunk) const {
        const unsigned stride = unsigned(descriptor >> 32 & 0x3fff) << 4, beside = unsigned(descriptor >> 16 & 0x3fff) << 4;
        const unsigned at = start() + unsigned(line / 8) * stride + unsigned(chunk / 8) * beside + unsigned(line % 8) * 128 + unsigned(chunk % 8) * 16;
        return (at ^ (at >> 7 & 7) << 4) - WINDOW;
    }
};

Matrix left(uint64_t descriptor) { return {"a", descriptor, 64, 2, false}; }
Matrix right(uint64_t descriptor, int columns, bool by_rows) {
    return by_rows ? Matrix{"b", descriptor, 16, columns / 8, true} : Matrix{"b", descriptor, columns, 2, false};
}

void check_matrix(const Matrix& m, int line) {
    const Chunk* seen = nullptr;
    const unsigned beside = unsigned(m.descriptor >> 16 & 0x3fff) << 4;
    if (m.by_rows && m.chunks > 8 && beside % 1024)
        kernel_violation(MISALIGNED_ADDRESS, line, format("wgmma: columns 64 of %s lie %u bytes beside the first ones: want a multiple of 1024", m.name, beside));
    if (m.descriptor >> 62 != 1 || (m.descriptor >> 49 & 7) != 0)
        kernel_violation(LAUNCH_FAILED, line, format("wgmma: descriptor of %s: swizzle %u, base offset %u; the emulator knows 1, rows of 128 bytes, "
                                                     "and 0", m.name, unsigned(m.descriptor >> 62), unsigned(m.descriptor >> 49 & 7)));
    if (m.by_rows ? m.start() % 1024 : m.start() % 1024 >= 128 || m.start() % 32)
        kernel_violation(MISALIGNED_ADDRESS, line, format("wgmma: %s begins at %u: want a multiple of 1024%s", m.name, m.start(),
                                                          m.by_rows ? "" : ", and 0, 32, 64 or 96"));
    for (int row = 0; row < m.lines; row++)
        for (int part = 0; part < m.chunks; part++) {
            const unsigned at = m.place(row, part);
            if (at >= shared_bytes() || at + 16 > shared_bytes())
                kernel_violation(ILLEGAL_ADDRESS, line, format("wgmma: row %d of %s lies outside the block's %u bytes of shared memory", row, m.name,
                                                              shared_bytes()));
            const Chunk& chunk = L.chunks[at / 16];
            if (chunk.block != L.block || chunk.state == NOTHING) continue;
            if (chunk.state == TENSOR && !(seen && seen->by == chunk.by && seen->barriers == chunk.barriers)) {
                const int who = tensors_unseen(chunk.by, chunk.barriers, ldm_thread.thread / GROUP * GROUP, GROUP);
                if (who >= 0)
                    kernel_violation(LAUNCH_FAILED, line, format("wgmma reads row %d of %s, at byte %u of shared memory, which a tensor copy writes: thread "
                                                                 "%d has not waited for its phase", row, m.name, at, who));
                seen = &chunk;
            }
            if (const char* why = objection(chunk, L.barriers))
                kernel_violation(LAUNCH_FAILED, line, format("wgmma reads row %d of %s, at byte %u of shared memory, which thread %u wrote, who %s", row,
                                                             m.name, at, chunk.by, why));
        }
}

template <bool BFLOAT>
void multiply(const Product& p) {
    const Matrix first = left(p.a), second = right(p.b, p.n, !p.left.empty());
    std::vector<Row> b(size_t(p.n) / 8 * 16);
    for (int k = 0; k < 16 && !p.left.empty(); k++)
        for (int j = 0; j < p.n / 8; j++) b[size_t(j) * 16 + size_t(k)] = convert<BFLOAT>(shared_at(second.place(k, j)));
    for (int n = 0; n < p.n && p.left.empty(); n++) {
        double row[16];
        for (int half = 0; half < 2; half++) {
            const Row values = convert<BFLOAT>(shared_at(second.place(n, half)));
            memcpy(row + 8 * half, &values, sizeof values);
        }
        for (int k = 0; k < 16; k++) b[size_t(n / 8) * 16 + size_t(k)][n % 8] = row[k];
    }
    for (int m = 0; m < 64; m++) {
        double a[16];
        for (int half = 0; half < 2; half++) {
            const void* from = p.left.empty() ? shared_at(first.place(m, half)) : (const void*)(p.left.data() + 16 * m + 8 * half);
            const Row values = convert<BFLOAT>(from);
            memcpy(a + 8 * half, &values, sizeof values);
        }
        // As `mma`: exact products, sums in double, even and odd ones apart, rounded once.
        for (int j = 0; j < p.n / 8; j++) {
            float* to = p.sums->d.data() + m * p.n + 8 * j;
            Row32 d;
            memcpy(&d, to, sizeof d);
            Row even = __builtin_convertvector(d, Row), odd = {};
            const Row* columns = b.data() + 16 * j;
            for (int k = 0; k < 16; k += 2) {
                even += a[k] * columns[k];
                odd += a[k + 1] * columns[k + 1];
            }
            d = __builtin_convertvector(even + odd, Row32);
            memcpy(to, &d, sizeof d);
        }
    }
}

// Products are done in their order: all up to the `count`-th of those in flight.
void run(Warpgroup& group, size_t count) {
    for (size_t i = 0; i < count; i++) {
        Product& p = group.products[i];
        if (p.done) continue;
        p.done = true;
        if (p.bfloat) multiply<true>(p);
        else multiply<false>(p);
    }
}

// Between a thread's registers and the matrix.
template <class F>
void each(const Sums& sums, unsigned thread, F f) {
    const unsigned row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (int i = 0; i < sums.n / 2; i++)
        f(sums.to[thread][i], size_t(row + 8 * (unsigned(i) / 2 % 2)) * size_t(sums.n) + column + unsigned(i) / 4 * 8 + unsigned(i) % 2);
}

bool poisoned(float v) { return float_bits(v) == 0xffffffffu; }
}  // namespace

void wgmma_start(const Launch& launch, uint64_t block) {
    if (!local) local = new Wgmma;
    L.on = launch.kernel->wgmma;
    if (!L.on) return;
    L.threads = launch.block;
    L.block++;
    L.barriers = 0;
    for (Warpgroup& group : L.groups) group = Warpgroup();
    for (auto& chunks : L.written) chunks.clear();
    L.random.state = settings.async_seed * 0x9e3779b97f4a7c15ull + block + 1;
}

void wgmma_exit() {
    if (!L.on) return;
    const Warpgroup& group = mine();
    const uint64_t issued = group.issued[ldm_thread.thread % GROUP];
    if (issued > group.over)
        kernel_violation(LAUNCH_FAILED, group.products[0].line, format("thread %u exits and has not waited for %llu of its wgmma", ldm_thread.thread,
                                                                       (unsigned long long)(issued - group.over)));
}

void wgmma_play() {
    if (!L.on || settings.async != Async::Random || L.random.next() % 4) return;
    Warpgroup& group = mine();
    size_t whole = 0;
    while (whole < group.products.size() && group.products[whole].threads == GROUP) whole++;
    if (whole) run(group, L.random.next() % whole + 1);
}

void proxy_copying(unsigned offset) {
    if (L.on) L.chunks[offset / 16] = {L.block, 0, uint16_t(ldm_thread.thread), COPYING};
}

void proxy_written(unsigned offset) {
    if (!L.on) return;
    L.chunks[offset / 16] = {L.block, 0, uint16_t(ldm_thread.thread), WRITTEN};
    L.written[ldm_thread.thread].push_back(offset / 16);
}

void proxy_barrier() {
    if (L.on) L.barriers++;
}

bool wgmma_reads(unsigned offset, unsigned bytes) {
    auto overlaps = [&](const Matrix& m) {
        for (int row = 0; row < m.lines; row++)
            for (int part = 0; part < m.chunks; part++) {
                const unsigned at = m.place(row, part);
                if (at < offset + bytes && offset < at + 16) return true;
            }
        return false;
    };
    for (const Warpgroup& group : L.groups)
        for (const Product& p : group.products)
            if ((p.left.empty() && overlaps(left(p.a))) || overlaps(right(p.b, p.n, !p.left.empty()))) return true;
    return false;
}

void proxy_tensor(unsigned offset, unsigned bytes, unsigned barrier, uint32_t phase, int line) {
    for (unsigned i = offset / 16; i < (offset + bytes) / 16; i++) {
        Chunk& chunk = L.chunks[i];
        const char* why = chunk.block == L.block ? objection(chunk, L.barriers) : nullptr;
        if (why)
            kernel_violation(LAUNCH_FAILED, line, format("tma_load to byte %u of shared memory, which thread %u wrote, who %s", 16 * i, chunk.by, why));
        chunk = {L.block, phase, uint16_t(barrier), TENSOR};
    }
}

void proxy_read(unsigned offset, const char* what, int line) {
    if (!L.on) return;
    const Chunk& chunk = L.chunks[offset / 16];
    if (chunk.block == L.block && chunk.state == TENSOR && tensors_unseen(chunk.by, chunk.barriers, ldm_thread.thread, 1) >= 0)
        kernel_violation(LAUNCH_FAILED, line, format("%s of byte %u of shared memory, which a tensor copy writes: the thread has not waited for its phase",
                                                     what, offset));
}

API unsigned ldm_emu_shared_address(const void* p) { return WINDOW + shared_offset(p, 1, "shared_address", 0); }

API void ldm_emu_fence_proxy(int line) {
    if (dropped(Site::FenceProxy, line)) return;
    const unsigned t = ldm_thread.thread;
    for (const unsigned i : L.written[t]) {
        Chunk& chunk = L.chunks[i];
        if (chunk.by != t || chunk.state != WRITTEN) continue;
        chunk.state = FENCED;
        chunk.barriers = L.barriers;
    }
    L.written[t].clear();
}

API void ldm_emu_wgmma(float* d, const unsigned* registers, unsigned long long a, unsigned long long b, int columns, int bfloat, int line) {
    const unsigned t = ldm_thread.thread % GROUP;
    tensors_together("wgmma", line);
    if (L.threads % GROUP) kernel_violation(LAUNCH_FAILED, line, format("wgmma in a block of %u threads: a warpgroup has 128", L.threads));
    Warpgroup& group = mine();
    const uint64_t at = group.issued[t]++ - group.over;
    // What these registers already wait for.
    Sums* sums = nullptr;
    for (auto& s : group.sums)
        if (s->to[t] == d) sums = s.get();
    if (at == group.products.size()) {
        Sums* own = sums;
        if (!own) {
            group.sums.push_back(std::make_unique<Sums>());
            own = group.sums.back().get();
            own->n = columns;
            own->d.resize(size_t(64) * size_t(columns));
        }
        own->products++;
        group.products.push_back({a, b, own, columns, bfloat, line, group.open[t], 0, L.barriers, false, {}});
        if (registers) group.products.back().left.resize(64 * 16);
    }
    Product& p = group.products[at];
    if (p.a != a || p.b != b || p.n != columns || p.bfloat != bfloat || p.line != line || p.group != group.open[t] || p.barriers != L.barriers ||
        p.sums->n != columns || p.left.empty() != !registers || (sums ? sums != p.sums : p.sums->to[t] != nullptr))
        kernel_violation(LAUNCH_FAILED, line, format("diverged warpgroup: thread %u comes to a wgmma with other operands, or at another place, than that of "
                                                     "line %d which others of its warpgroup have issued", ldm_thread.thread, p.line));
    for (unsigned i = 0; registers && i < 4; i++)
        memcpy(p.left.data() + (t / 32 * 16 + t % 32 / 4 + 8 * (i % 2)) * 16 + t % 4 * 2 + 8 * (i / 2), registers + i, sizeof *registers);
    if ((registers || !sums) && !group.fenced[t])
        kernel_violation(LAUNCH_FAILED, line, "wgmma without a wgmma_fence since its registers were last free to be touched");
    if (sums) {
        for (int i = 0; i < columns / 2; i++)
            if (!poisoned(d[i])) kernel_violation(LAUNCH_FAILED, line, "wgmma: its accumulators were written while another wgmma was in flight on them");
    } else {
        p.sums->to[t] = d;
        each(*p.sums, t, [&](float& own, size_t i) {
            p.sums->d[i] = own;
            memset(&own, POISON, sizeof own);
        });
    }
    if (++p.threads != GROUP) return;
    if (!registers) check_matrix(left(a), line);
    check_matrix(right(b, columns, registers), line);
    if (settings.async == Async::Early || (settings.async == Async::Random && L.random.next() % 4 == 0)) run(group, at + 1);
}

API void ldm_emu_wgmma_fence(int line) {
    tensors_together("wgmma_fence", line);
    if (!dropped(Site::WgmmaFence, line)) mine().fenced[ldm_thread.thread % GROUP] = true;
}

API void ldm_emu_wgmma_commit(int line) {
    if (dropped(Site::WgmmaCommit, line)) return;
    mine().open[ldm_thread.thread % GROUP]++;
    wgmma_play();
}

API void ldm_emu_wgmma_wait(int pending, int line) {
    tensors_together("wgmma_wait", line);
    if (dropped(Site::WgmmaWait, line)) return;
    if (!warpgroup_arrives(line)) return warp_waits();
    Warpgroup& group = mine();
    for (unsigned t = 0; t < GROUP; t++) {
        if (group.issued[t] != group.issued[0] || group.open[t] != group.open[0])
            kernel_violation(LAUNCH_FAILED, line, "diverged warpgroup: its threads have not issued or committed as many wgmma");
        group.fenced[t] = false;
    }
    size_t n = 0;
    while (n < group.products.size() && group.products[n].group + unsigned(pending) < group.open[0]) n++;
    run(group, n);
    for (; n > 0; n--, group.over++) {
        Sums* sums = group.products[0].sums;
        group.products.pop_front();
        if (--sums->products) continue;
        for (unsigned t = 0; t < GROUP; t++) each(*sums, t, [&](float& own, size_t i) { own = sums->d[i]; });
        size_t i = 0;
        while (group.sums[i].get() != sums) i++;
        group.sums.erase(group.sums.begin() + long(i));
    }
}
