// Modules (compiled units, found by the header of a kernel image) and launches: blocks in an order that may be asked for,
// on one OS thread when there are few of them, and on all otherwise.

#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "block.h"

namespace {
constexpr uint64_t SMALL = 1 << 14;  // threads of a launch that is not worth a second OS thread

struct Job {
    const Launch* launch;
    uint64_t blocks, step, offset;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
};

struct Pool {
    std::mutex lock;
    std::condition_variable wake, idle;
    Job* job = nullptr;
    uint64_t round = 0;
    unsigned wanted = 0, busy = 0, started = 0;
};

void work(Job& job) {
    for (;;) {
        const uint64_t i = job.next.fetch_add(1, std::memory_order_relaxed);
        if (i >= job.blocks || job.failed.load(std::memory_order_relaxed)) return;
        uint64_t index = i;
        if (settings.order == Order::Reverse) index = job.blocks - 1 - i;
        if (settings.order == Order::Random) index = uint64_t((unsigned __int128)(i)*job.step % job.blocks + job.offset) % job.blocks;
        if (!block_run(*job.launch, index)) job.failed = true;
    }
}

Pool& pool() {
    static Pool* p = new Pool;  // never destroyed: its threads outlive `main`
    return *p;
}

void worker(unsigned number) {
    Pool& p = pool();
    uint64_t seen = 0;
    for (;;) {
        std::unique_lock<std::mutex> hold(p.lock);
        p.wake.wait(hold, [&] { return p.job && p.round != seen && number < p.wanted; });
        seen = p.round;
        Job* job = p.job;
        p.busy++;
        hold.unlock();
        work(*job);
        hold.lock();
        if (--p.busy == 0) p.idle.notify_all();
    }
}

// A kernel that spins for ever cannot be stopped from outside; at least the process ends, and says where it was.
std::mutex watched_lock;
const Launch* watched = nullptr;
std::chrono::steady_clock::time_point watched_since;

void watch() {
    for (;;) {
        std::this_thread::sleep_for(std::chrono::milliseconds(500));
        std::lock_guard<std::mutex> hold(watched_lock);
        if (!watched || settings.timeout == 0) continue;
        if (std::chrono::steady_clock::now() - watched_since < std::chrono::seconds(settings.timeout)) continue;
        fprintf(stderr, "ldm emulator: kernel %s (%s), grid (%u,%u,%u), block %u, runs for more than %u s (setting `timeout`)\n",
                watched->kernel->name.c_str(), watched->kernel->unit.c_str(), watched->grid[0], watched->grid[1], watched->grid[2],
                watched->block, settings.timeout);
        abort();
    }
}

void set_watched(const Launch* launch) {
    static std::once_flag once;
    std::call_once(once, [] { std::thread(watch).detach(); });
    std::lock_guard<std::mutex> hold(watched_lock);
    watched = launch;
    watched_since = std::chrono::steady_clock::now();
}

uint64_t common_divisor(uint64_t a, uint64_t b) {
    while (b) {
        const uint64_t c = a % b;
        a = b;
        b = c;
    }
    return a;
}

std::string text_of(const char* at, size_t bytes) { return std::string(at, strnlen(at, bytes)); }

// The units that the emulator loads refer to the functions of this library.
void make_global() {
    static std::once_flag once;
    std::call_once(once, [] {
        Dl_info info;
        if (dladdr((void*)&make_global, &info)) dlopen(info.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
    });
}
}  // namespace

Result launch_run(const Launch& launch) {
    const uint64_t blocks = uint64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    Job job;
    job.launch = &launch;
    job.blocks = blocks;
    Random random{settings.order_seed};
    job.offset = random.next() % blocks;
    job.step = random.next() % blocks + 1;
    while (common_divisor(job.step, blocks) != 1) job.step++;
    unsigned threads = settings.threads ? settings.threads : std::thread::hardware_concurrency();
    if (threads > 16) threads = 16;
    if (blocks < 2 || (!settings.threads && blocks * launch.block < SMALL)) threads = 1;
    set_watched(&launch);
    if (threads <= 1) {
        work(job);
    } else {
        Pool& p = pool();
        {
            std::lock_guard<std::mutex> hold(p.lock);
            for (; p.started < threads - 1; p.started++) std::thread(worker, p.started).detach();
            p.job = &job;
            p.wanted = threads - 1;
            p.round++;
        }
        p.wake.notify_all();
        work(job);
        std::unique_lock<std::mutex> hold(p.lock);
        p.job = nullptr;
        p.idle.wait(hold, [&] { return p.busy == 0; });
    }
    set_watched(nullptr);
    visibility_finish();
    if (job.failed) return sticky();
    const MemoryUse use = memory_use();
    if (use.live > 256) return SUCCESS;
    return memory_all_guards(format("after kernel %s (%s)", launch.kernel->name.c_str(), launch.kernel->unit.c_str()).c_str());
}

Result module_load(const void* image, Module** out) {
    if (!image) return refuse(INVALID_VALUE, "cuModuleLoadData: no image");
    const char* header = (const char*)image - 64;
    if (memcmp(header, "LDMKERN1", 8) != 0) return refuse(INVALID_IMAGE, "cuModuleLoadData: no `LDMKERN1` header before the image");
    const std::string stem = text_of(header + 8, 32);
    std::string type = text_of(header + 40, 8), variant = text_of(header + 48, 16);
    for (char& c : type)
        if (c == '>') c = '-';
    if (variant.empty()) variant = "base";
    if (settings.units.empty()) return refuse(SHARED_OBJECT_INIT_FAILED, "LDM_EMULATOR_UNITS does not say where the compiled kernels are");
    make_global();
    const std::string unit = stem + "." + type + "." + variant, path = settings.units + "/" + unit + ".so";
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) return refuse(NO_BINARY_FOR_GPU, format("unit %s: %s", unit.c_str(), dlerror()));
    *out = new Module{library, unit, stem, {}};
    return SUCCESS;
}

Result module_kernel(Module* module, const char* name, Kernel** out) {
    for (auto& kernel : module->kernels)
        if (kernel->name == name) return *out = kernel.get(), SUCCESS;
    auto kernel = std::make_unique<Kernel>();
    kernel->name = name;
    kernel->unit = module->unit;
    kernel->stem = module->stem;
    kernel->file = module->stem + ".cu";
    kernel->sites = sites_of(module->stem);
    kernel->entry = (void (*)(const void*))dlsym(module->library, ("ldm_entry_" + kernel->name).c_str());
    const unsigned* size = (const unsigned*)dlsym(module->library, ("ldm_size_" + kernel->name).c_str());
    const unsigned* bounds = (const unsigned*)dlsym(module->library, ("ldm_bounds_" + kernel->name).c_str());
    if (!kernel->entry || !size) return refuse(NOT_FOUND, format("unit %s has no kernel `%s`", module->unit.c_str(), name));
    kernel->params = *size;
    if (bounds) kernel->bounds = *bounds;
    const unsigned* combines = (const unsigned*)dlsym(module->library, "ldm_combines");
    kernel->combines = combines && *combines;
    const unsigned* wgmma = (const unsigned*)dlsym(module->library, "ldm_wgmma");
    kernel->wgmma = wgmma && *wgmma;
    *out = kernel.get();
    module->kernels.push_back(std::move(kernel));
    return SUCCESS;
}
