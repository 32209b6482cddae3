// One block of threads on one OS thread. A thread that never waits costs a function call: the loop that starts threads
// takes the next one on the same stack. Only who waits keeps a stack, and the next thread gets another one.

#include "block.h"

#include <csignal>
#include <cstdlib>
#include <cstring>

#include "dev.cuh"

namespace {
constexpr unsigned BAND_BYTES = 64, SMEM_ALIGN = 1024;
constexpr unsigned char BAND = 0xfd;

const char* const op_names[] = {"shfl_xor", "shfl_down", "shfl", "ballot", "warp_sum", "warp_max"};
const char* const block_names[] = {"", "", "", "", "block_sum", "block_max"};
constexpr int SYNC_WARP = 100, SYNC_BLOCK = 101;

const char* name_of(int op) {
    switch (op) {
        case SYNC_WARP: return "sync_warp";
        case SYNC_BLOCK: return "sync_block";
        case OP_LDMATRIX: return "ldmatrix";
        case OP_LDMATRIX_TRANS: return "ldmatrix_trans";
        case OP_MMA: return "mma";
        case OP_WGMMA_WAIT: return "wgmma_wait";
        default: return op >= 200 ? block_names[op - 200] : op_names[op];
    }
}

struct Warp {
    uint32_t all, ready, unstarted, arrived, done, waited;
    uint32_t grouped;  // lanes that wait for their warpgroup
    int op, line;
    uint32_t values[32], results[32];
    int arguments[32];
};

// Everything that one OS thread needs to run blocks; made once per thread.
struct Runner {
    Stacks stacks;
    Context main, dead, contexts[1024];
    Stack* held[1024];
    Stack* current_stack = nullptr;
    Warp warps[32];
    float values[1024];
    float block_result = 0;
    uint32_t ready_warps = 0;
    unsigned threads = 0, arrived = 0, finished = 0, warp_count = 0, last_warp = 0;
    int barrier_op = 0, barrier_line = 0, group_lines[8];
    float* scratch = nullptr;
    const Launch* launch = nullptr;
    uint64_t chance = 1;
    bool running = false, failed = false;
    alignas(SMEM_ALIGN) unsigned char smem[SMEM_ALIGN + SMEM_MOST + BAND_BYTES];  // the block's part starts at SMEM_ALIGN
    unsigned smem_bytes = 0;
    int drop_line = 0;  // of the kernel that runs, where one of its sites is dropped
};

thread_local Runner* runner = nullptr;
#define R (*runner)

void set_current(unsigned t) {
    ldm_thread.thread = t;
    ldm_thread.lane = t & 31;
    ldm_thread.warp = t >> 5;
}

unsigned choose(uint32_t mask) {
    switch (settings.order) {
        case Order::Forward: return unsigned(__builtin_ctz(mask));
        case Order::Reverse: return 31u - unsigned(__builtin_clz(mask));
        case Order::Random: break;
    }
    R.chance = R.chance * 0x5851f42d4c957f2dull + 0x14057b7ef767814full;  // the cheapest generator: this runs at each switch
    const unsigned turn = unsigned(R.chance >> 59);
    const uint32_t turned = turn ? mask >> turn | mask << (32 - turn) : mask;
    return (unsigned(__builtin_ctz(turned)) + turn) & 31;
}

// The thread to run next, or -1. A warp goes on while it can: that keeps few stacks alive. Where none can, the tensor copies land
// that are on their way.
int pick() {
    while (!R.ready_warps)
        if (R.finished == R.threads || !tensors_land()) return -1;
    unsigned w = R.last_warp;
    if (!(R.ready_warps >> w & 1) || settings.order == Order::Random) w = choose(R.ready_warps);
    R.last_warp = w;
    return int(w * 32 + choose(R.warps[w].ready));
}

void set_ready(unsigned w, uint32_t lanes) {
    R.warps[w].ready |= lanes;
    if (R.warps[w].ready) R.ready_warps |= 1u << w;
}

void take(unsigned t) {
    Warp& warp = R.warps[t >> 5];
    warp.ready &= ~(1u << (t & 31));
    if (!warp.ready) R.ready_warps &= ~(1u << (t >> 5));
}

[[noreturn]] void leave() {
    R.running = false;
    ldm_switch(&R.dead, &R.main);
    abort();
}

[[noreturn]] void deadlock() {
    std::string text = "deadlock: no thread can go on;";
    int shown = 0, last_op = -1, last_line = -1;
    for (unsigned t = 0; t < R.threads && shown < 6; t++) {
        const Warp& warp = R.warps[t >> 5];
        if (warp.done >> (t & 31) & 1) continue;
        if (const std::string waits = tensors_waits(t); !waits.empty()) {
            if (last_op != OP_MBARRIER) text += waits, shown++;
            last_op = OP_MBARRIER;
            continue;
        }
        // Who does not wait for its warp waits for the block.
        const bool in_warp = warp.arrived >> (t & 31) & 1, in_group = warp.grouped >> (t & 31) & 1;
        const int op = in_warp ? warp.op : in_group ? OP_WGMMA_WAIT : R.barrier_op;
        const int line = in_warp ? warp.line : in_group ? R.group_lines[t / 128] : R.barrier_line;
        if (op == last_op && line == last_line) continue;
        text += format(" thread %u waits in %s of line %d;", t, name_of(op), line);
        last_op = op;
        last_line = line;
        shown++;
    }
    kernel_violation(LAUNCH_FAILED, 0, text);
}

void run_threads();

// Goes on with another thread; returns when this one was released and chosen again.
void wait_as(unsigned t) {
    Warp* warp = &R.warps[t >> 5];
    unsigned next;
    if (warp->ready && settings.order != Order::Random) {
        // What `pick` and `take` do here: the first, or last, lane of the same warp.
        const unsigned lane = choose(warp->ready);
        next = (t & ~31u) + lane;
        warp->ready &= ~(1u << lane);
        if (!warp->ready) R.ready_warps &= ~(1u << (t >> 5));
    } else {
        const int chosen = pick();
        if (chosen < 0) deadlock();
        next = unsigned(chosen);
        take(next);
        if (next == t) return;  // what it waits for has landed meanwhile
        warp = &R.warps[next >> 5];
    }
    R.held[t] = R.current_stack;
    set_current(next);
    if (warp->unstarted >> (next & 31) & 1) {
        Context fresh;
        R.current_stack = R.stacks.take(&fresh, run_threads);
        ldm_switch(&R.contexts[t], &fresh);
    } else {
        R.current_stack = R.held[next];
        ldm_switch(&R.contexts[t], &R.contexts[next]);
    }
}

void finish(unsigned t) {
    Warp& warp = R.warps[t >> 5];
    if (warp.arrived)
        kernel_violation(LAUNCH_FAILED, warp.line, format("thread %u exits while lane %d of its warp waits in %s", t,
                                                          __builtin_ctz(warp.arrived), name_of(warp.op)));
    if (R.arrived)
        kernel_violation(LAUNCH_FAILED, R.barrier_line, format("thread %u exits while others wait in %s: every thread must reach it",
                                                               t, name_of(R.barrier_op)));
    for (unsigned w = t / 128 * 4; w < R.warp_count && w < t / 128 * 4 + 4; w++)
        if (R.warps[w].grouped)
            kernel_violation(LAUNCH_FAILED, R.group_lines[t / 128], format("thread %u exits while others of its warpgroup wait in wgmma_wait", t));
    copies_exit();
    wgmma_exit();
    if (R.launch->programmatic && !(warp.waited >> (t & 31) & 1))
        kernel_violation(LAUNCH_FAILED, 0, format("thread %u of a programmatic launch exits and has not waited (griddep_wait)", t));
    warp.done |= 1u << (t & 31);
    R.finished++;
}

void check_smem() {
    if (!R.smem_bytes) return;
    const unsigned char* low = R.smem + SMEM_ALIGN - BAND_BYTES;
    const unsigned char* high = R.smem + SMEM_ALIGN + R.smem_bytes;
    for (unsigned i = 0; i < BAND_BYTES; i++)
        if (low[i] != BAND || high[i] != BAND)
            kernel_violation(ILLEGAL_ADDRESS, 0, format("something wrote %s the block's %u bytes of shared memory",
                                                        high[i] != BAND ? "past" : "before", R.smem_bytes));
}

// The body of every stack: runs threads that have not started; leaves for another stack when there are none.
void run_threads() {
    const void* params = R.launch->params.data();
    auto entry = R.launch->kernel->entry;
    for (;;) {
        const unsigned t = ldm_thread.thread;
        R.warps[t >> 5].unstarted &= ~(1u << (t & 31));
        entry(params);
        const unsigned over = ldm_thread.thread;
        finish(over);
        // Most kernels never wait: the next lane of the same warp, without asking further.
        Warp& warp = R.warps[over >> 5];
        if (warp.ready && warp.ready == warp.unstarted && settings.order == Order::Forward) {
            const unsigned lane = unsigned(__builtin_ctz(warp.ready));
            warp.ready &= warp.ready - 1;
            if (!warp.ready) R.ready_warps &= ~(1u << (over >> 5));
            set_current((over & ~31u) + lane);
            continue;
        }
        const int next = pick();
        if (next < 0) {
            if (R.finished != R.threads) deadlock();
            check_smem();
            tensors_end();
            leave();
        }
        take(unsigned(next));
        set_current(unsigned(next));
        if (R.warps[next >> 5].unstarted >> (next & 31) & 1) continue;
        R.stacks.give(R.current_stack);
        R.current_stack = R.held[next];
        ldm_switch(&R.dead, &R.contexts[next]);
    }
}

// The last lane of a warp's rendezvous computes for all.
void complete(Warp& warp) {
    switch (warp.op) {
        case LDM_XOR:
        case LDM_DOWN:
        case LDM_INDEX:
            for (int i = 0; i < 32; i++) {
                const int a = warp.arguments[i];
                int from = warp.op == LDM_XOR ? i ^ a : warp.op == LDM_DOWN ? i + a : a & 31;
                if (from < 0 || from > 31) from = i;
                warp.results[i] = warp.values[from];
            }
            break;
        case LDM_BALLOT: {
            uint32_t mask = 0;
            for (int i = 0; i < 32; i++) mask |= uint32_t(warp.values[i] != 0) << i;
            for (int i = 0; i < 32; i++) warp.results[i] = mask;
            break;
        }
        case LDM_SUM:
        case LDM_MAX: {
            float v[32];
            memcpy(v, warp.values, sizeof v);
            for (int m = 16; m > 0; m >>= 1)
                for (int i = 0; i < m; i++) v[i] = warp.op == LDM_SUM ? v[i] + v[i + m] : max_f(v[i], v[i + m]);
            for (int i = 0; i < 32; i++) memcpy(&warp.results[i], v, 4);
            break;
        }
        default: break;
    }
}

// True for the lane that came last: it goes on without a switch.
bool arrive_warp(unsigned t, int op, int line) {
    Warp& warp = R.warps[t >> 5];
    const uint32_t bit = 1u << (t & 31);
    if (__builtin_expect(warp.done != 0, 0))
        kernel_violation(LAUNCH_FAILED, line, format("%s with inactive lanes: lane %d of warp %u has exited", name_of(op),
                                                     __builtin_ctz(warp.done), t >> 5));
    if (op != SYNC_WARP && warp.all != ~0u)
        kernel_violation(LAUNCH_FAILED, line, format("%s with inactive lanes: warp %u has %d threads", name_of(op), t >> 5,
                                                     __builtin_popcount(warp.all)));
    if (warp.arrived == 0) {
        warp.op = op;
        warp.line = line;
    } else if (warp.op != op || warp.line != line) {
        kernel_violation(LAUNCH_FAILED, line,
                         format("diverged warp %u: lane %d waits in %s of line %d, lane %u comes to %s", t >> 5,
                                __builtin_ctz(warp.arrived), name_of(warp.op), warp.line, t & 31, name_of(op)));
    }
    warp.arrived |= bit;
    if (warp.arrived != warp.all) return false;
    complete(warp);
    if (op == SYNC_WARP) {
        visibility_warp(t >> 5);
        tensors_meet(t & ~31u, unsigned(__builtin_popcount(warp.all)));
    }
    warp.arrived = 0;
    set_ready(t >> 5, warp.all & ~bit);
    return true;
}

bool arrive_block(unsigned t, int op, int line) {
    if (R.finished)
        for (unsigned w = 0; w < R.warp_count; w++)
            if (R.warps[w].done)
                kernel_violation(LAUNCH_FAILED, line, format("thread %u has exited before %s: every thread must reach it",
                                                             w * 32 + unsigned(__builtin_ctz(R.warps[w].done)), name_of(op)));
    if (R.arrived == 0) {
        R.barrier_op = op;
        R.barrier_line = line;
    } else if (R.barrier_op != op || R.barrier_line != line) {
        kernel_violation(LAUNCH_FAILED, line, format("divergent barrier: others wait in %s of line %d, this thread comes to %s",
                                                     name_of(R.barrier_op), R.barrier_line, name_of(op)));
    }
    if (++R.arrived != R.threads) return false;
    visibility_barrier();
    proxy_barrier();
    tensors_meet(0, R.threads);
    R.arrived = 0;
    for (unsigned w = 0; w < R.warp_count; w++) set_ready(w, R.warps[w].all);
    take(t);
    return true;
}

// A plain pointer went astray: say where, and end the block instead of the process.
struct sigaction before_segv, before_bus;
void on_fault(int signal, siginfo_t* info, void* context) {
    if (runner && runner->running) {
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, signal);
        pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
        kernel_violation(ILLEGAL_ADDRESS, 0, format("access through a plain pointer to %p, or a stack of a thread that is full", info->si_addr));
    }
    const struct sigaction& old = signal == SIGSEGV ? before_segv : before_bus;
    if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(signal, info, context);
    if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) return old.sa_handler(signal);
    ::signal(signal, SIG_DFL);
}

void catch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &before_segv);
        sigaction(SIGBUS, &action, &before_bus);
    });
    // A stack of our own for the handler: those that Rust gives its threads are too small to print on.
    stack_t stack = {};
    stack.ss_size = 128 * 1024;
    stack.ss_sp = malloc(stack.ss_size);
    sigaltstack(&stack, nullptr);
}
}  // namespace

bool in_kernel() { return runner && runner->running; }

bool dropped(Site kind, int line) {
    uint16_t& seen = R.launch->kernel->sites->kinds[unsigned(line) % LINES];
    const uint16_t bit = uint16_t(1u << int(kind));
    if (!(__atomic_load_n(&seen, __ATOMIC_RELAXED) & bit)) __atomic_fetch_or(&seen, bit, __ATOMIC_RELAXED);
    return line == R.drop_line && kind == settings.drop;
}

void griddep_check(const char* what, int line) {
    const unsigned t = ldm_thread.thread;
    if (R.launch->programmatic && !(R.warps[t >> 5].waited >> (t & 31) & 1))
        kernel_violation(LAUNCH_FAILED, line, format("%s before griddep_wait, in a programmatic launch: the kernel before it may still run", what));
}

bool warp_arrives(int op, int line) { return arrive_warp(ldm_thread.thread, op, line); }
void warp_waits() { wait_as(ldm_thread.thread); }

bool warpgroup_arrives(int line) {
    const unsigned t = ldm_thread.thread, first = t / 128 * 4;
    uint32_t arrived = 0, all = ~0u;
    for (unsigned w = first; w < first + 4; w++) {
        if (w >= R.warp_count || R.warps[w].all != ~0u)
            kernel_violation(LAUNCH_FAILED, line, format("wgmma_wait in a block of %u threads: a warpgroup has 128", R.threads));
        if (R.warps[w].done)
            kernel_violation(LAUNCH_FAILED, line, format("thread %u has exited before wgmma_wait of its warpgroup",
                                                         w * 32 + unsigned(__builtin_ctz(R.warps[w].done))));
        arrived |= R.warps[w].grouped;
    }
    if (!arrived) R.group_lines[t / 128] = line;
    if (R.group_lines[t / 128] != line)
        kernel_violation(LAUNCH_FAILED, line, format("diverged warpgroup: others wait in wgmma_wait of line %d", R.group_lines[t / 128]));
    R.warps[t >> 5].grouped |= 1u << (t & 31);
    for (unsigned w = first; w < first + 4; w++) all &= R.warps[w].grouped;
    if (all != ~0u) return false;
    for (unsigned w = first; w < first + 4; w++) {
        R.warps[w].grouped = 0;
        set_ready(w, ~0u);
    }
    take(t);
    return true;
}

void thread_ready(unsigned thread) { set_ready(thread / 32, 1u << thread % 32); }

const unsigned char* shared_at(unsigned offset) { return R.smem + SMEM_ALIGN + offset; }
unsigned shared_bytes() { return R.smem_bytes; }

unsigned shared_offset(const void* p, unsigned bytes, const char* what, int line) {
    const uintptr_t at = uintptr_t(p) - uintptr_t(R.smem + SMEM_ALIGN);
    if (at + bytes > R.smem_bytes || at > R.smem_bytes)
        kernel_violation(ILLEGAL_ADDRESS, line, format("%s of %u bytes outside the block's %u bytes of shared memory: %lld bytes from their start",
                                                       what, bytes, R.smem_bytes, (long long)at));
    if (at % bytes) kernel_violation(MISALIGNED_ADDRESS, line, format("misaligned %s of %u bytes at byte %u of shared memory", what, bytes, unsigned(at)));
    return unsigned(at);
}

void kernel_violation(Result code, int line, const std::string& text) {
    const Launch& launch = *R.launch;
    const std::string where = line ? format("%s:%d: ", launch.kernel->file.c_str(), line) : std::string();
    violation(code, format("kernel %s (%s), block (%u,%u,%u), thread %u: %s%s", launch.kernel->name.c_str(),
                           launch.kernel->unit.c_str(), ldm_thread.block[0], ldm_thread.block[1], ldm_thread.block[2],
                           ldm_thread.thread, where.c_str(), text.c_str()));
    R.failed = true;
    leave();
}

bool block_run(const Launch& launch, uint64_t index) {
    if (!runner) {
        runner = new Runner;
        catch_faults();
    }
    R.launch = &launch;
    R.chance = Random{settings.order_seed * 0x9e3779b97f4a7c15ull + index}.next();
    ldm_thread.block[0] = unsigned(index % launch.grid[0]);
    ldm_thread.block[1] = unsigned(index / launch.grid[0] % launch.grid[1]);
    ldm_thread.block[2] = unsigned(index / launch.grid[0] / launch.grid[1]);
    for (int i = 0; i < 3; i++) ldm_thread.grid[i] = launch.grid[i];
    ldm_thread.block_dim = launch.block;
    ldm_thread.smem_key = nullptr;
    ldm_thread.smem = nullptr;
    R.smem_bytes = 0;
    R.threads = launch.block;
    R.warp_count = (launch.block + 31) / 32;
    R.arrived = R.finished = 0;
    R.ready_warps = 0;
    R.failed = false;
    R.drop_line = settings.drop != Site::COUNT && settings.drop_stem == launch.kernel->stem ? settings.drop_line : 0;
    // Every access of a launch that must wait goes through ldm_emu_access, which looks whether its thread has.
    memory_bind_thread();
    if (launch.programmatic) ldm_thread.size = 0;
    copies_start(index);
    wgmma_start(launch, index);
    tensors_start(launch, index);
    visibility_start(launch);
    for (unsigned w = 0; w < R.warp_count; w++) {
        Warp& warp = R.warps[w];
        const unsigned lanes = launch.block - w * 32 < 32 ? launch.block - w * 32 : 32;
        warp.all = warp.unstarted = lanes == 32 ? ~0u : (1u << lanes) - 1;
        warp.ready = warp.arrived = warp.done = warp.waited = warp.grouped = 0;
        set_ready(w, warp.all);
    }
    R.last_warp = choose(R.ready_warps);
    const unsigned first = unsigned(pick());
    take(first);
    set_current(first);
    Context start;
    R.current_stack = R.stacks.take(&start, run_threads);
    R.running = true;
    ldm_switch(&R.main, &start);
    R.stacks.give_all();
    visibility_end();
    if (settings.banks) banks_end(*launch.kernel);
    return !R.failed;
}

static void* smem_start(const void* key, unsigned long long bytes, unsigned align, int line) {
    if (ldm_thread.smem_key) kernel_violation(LAUNCH_FAILED, line, "a second struct of shared memory: a kernel has one");
    if (align > SMEM_ALIGN) kernel_violation(LAUNCH_FAILED, line, format("shared memory aligned to %u bytes", align));
    unsigned char* at = R.smem + SMEM_ALIGN;
    memset(at - BAND_BYTES, BAND, BAND_BYTES);
    memset(at, POISON, bytes);
    memset(at + bytes, BAND, BAND_BYTES);
    R.smem_bytes = unsigned(bytes);
    ldm_thread.smem_key = key;
    ldm_thread.smem = at;
    return at;
}

API void* ldm_emu_smem(const void* key, unsigned long long bytes, unsigned align, int line) {
    return smem_start(key, bytes, align, line);
}

API void* ldm_emu_smem_dynamic(const void* key, unsigned long long bytes, unsigned align, int line) {
    if (bytes != R.launch->shared)
        kernel_violation(LAUNCH_FAILED, line, format("smem_dynamic of %llu bytes, and the launch passed %u bytes of dynamic shared memory", bytes,
                                                     R.launch->shared));
    return smem_start(key, bytes, align, line);
}

API void ldm_emu_shared(const void* p, unsigned bytes, int write, int line) {
    const unsigned at = shared_offset(p, bytes, write ? "store_shared" : "load_shared", line);
    if (settings.banks) banks_access(write ? Access::Store : Access::Load, at, bytes, line);
    if (write) proxy_written(at);
    else proxy_read(at, "load_shared", line);
}

API void ldm_emu_griddep_wait() {
    const unsigned t = ldm_thread.thread;
    R.warps[t >> 5].waited |= 1u << (t & 31);
}

API void ldm_emu_sync_block(int line) {
    const unsigned t = ldm_thread.thread;
    copies_play();
    wgmma_play();
    if (dropped(Site::SyncBlock, line)) return;
    if (arrive_block(t, SYNC_BLOCK, line)) check_smem();
    else wait_as(t);
}

API void ldm_emu_sync_warp(int line) {
    const unsigned t = ldm_thread.thread;
    if (dropped(Site::SyncWarp, line)) return;
    if (!arrive_warp(t, SYNC_WARP, line)) wait_as(t);
}

API unsigned ldm_emu_warp(int what, unsigned value, int argument, int line) {
    const unsigned t = ldm_thread.thread;
    Warp& warp = R.warps[t >> 5];
    warp.values[t & 31] = value;
    warp.arguments[t & 31] = argument;
    if (!arrive_warp(t, what, line)) wait_as(t);
    return warp.results[t & 31];
}

API float ldm_emu_block(int what, float value, float* scratch, unsigned block, int line) {
    const unsigned t = ldm_thread.thread;
    const int op = 200 + what;
    if (block != R.threads)
        kernel_violation(LAUNCH_FAILED, line, format("%s<%u> in a block of %u threads", name_of(op), block, R.threads));
    R.values[t] = value;
    if (!arrive_block(t, op, line)) {
        wait_as(t);
        return R.block_result;
    }
    float result = 0;
    for (unsigned w = 0; w < block / 32; w++) {
        float v[32];
        memcpy(v, R.values + w * 32, sizeof v);
        for (int m = 16; m > 0; m >>= 1)
            for (int i = 0; i < m; i++) v[i] = what == LDM_SUM ? v[i] + v[i + m] : max_f(v[i], v[i + m]);
        scratch[w] = v[0];
        result = w == 0 ? v[0] : what == LDM_SUM ? result + v[0] : max_f(result, v[0]);
    }
    R.block_result = result;
    return result;
}
