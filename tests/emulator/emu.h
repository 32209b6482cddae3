// The parts of the emulator, and what they say to each other. Everything that a driver call touches lies behind one
// lock; kernels run on several OS threads, one block on one of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    ECC_UNCORRECTABLE = 214,
    SHARED_OBJECT_INIT_FAILED = 303,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    ASSERT = 710,
    MISALIGNED_ADDRESS = 716,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907,
    UNKNOWN = 999,
};

constexpr unsigned SMEM_STATIC = 48 * 1024, SMEM_MOST = 227 * 1024;  // shared memory of a block: without and with asking
constexpr unsigned char POISON = 0xff;

// ------------------------------------------------------------------------------------------------------ settings

enum class Order { Forward, Reverse, Random };
enum class Async { Late, Early, Random };
// What orders the accesses of threads: each source line with one is a site, which the setting `drop` can take away.
enum class Site {
    SyncBlock,
    SyncWarp,
    CopyWait,
    CopyCommit,
    Fence,
    FenceProxy,
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait,
    FenceMbarriers,
    MbarrierArrive,
    MbarrierExpect,
    MbarrierWait,
    COUNT
};

struct Settings {
    Order order = Order::Forward;
    uint64_t order_seed = 1;
    Async async = Async::Late;
    uint64_t async_seed = 1;
    bool uninitialised_is_error = true;
    unsigned threads = 0;              // OS threads that run blocks; 0: as many as the machine has, for large launches
    uint64_t memory = 16ull << 30;     // what the device says it has
    uint64_t shared = SMEM_MOST;       // most shared memory that it says a block may ask for
    unsigned timeout = 300;            // seconds that one launch may take before the process is ended; 0: for ever
    std::string units;                 // folder of the compiled kernels
    bool banks = false;                // count bank conflicts
    Site drop = Site::COUNT;           // with stem and line of a kernel file: this site does nothing
    std::string drop_stem;
    int drop_line = 0;
};
extern Settings settings;

// A small generator (splitmix64): the seeds of `settings` make a run repeatable.
struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
};

// ------------------------------------------------------------------------------------------------------- reports

// Kinds of call that can be made to fail, and that are counted.
enum class Call { Alloc, Copy, Load, Launch, Sync, Host, Graph, Programmatic, COUNT };

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
// Remembers a violation, prints it, and makes it the context's sticky error. The first one wins. Any thread may call it.
Result violation(Result code, const std::string& text);
// Remembers and prints why a call is refused; the context stays usable.
Result refuse(Result code, const std::string& text);
Result sticky();
// Counts the call; an error if this one is to fail.
Result injected(Call call);
uint64_t counted(Call call);

// The lock of the driver: held by every exported call.
extern std::recursive_mutex driver_lock;
#define LOCKED std::lock_guard<std::recursive_mutex> locked_(driver_lock)
// A call that a broken context refuses.
#define WORKING                               \
    LOCKED;                                   \
    if (Result e_ = sticky()) return e_

// -------------------------------------------------------------------------------------------------------- memory

// Device memory. `whose` names the caller in reports.
Result memory_alloc(uint64_t bytes, uint64_t* out);
Result memory_free(uint64_t at, const char* whose);
// Is [at, at+bytes) inside one live allocation?
Result memory_check(uint64_t at, uint64_t bytes, const char* whose);
// Looks at the guard bands of the allocation that holds `at`, or of all.
Result memory_guards(uint64_t at, const char* whose);
Result memory_all_guards(const char* whose);
void memory_written(uint64_t at, uint64_t bytes);
void memory_poison(uint64_t at, uint64_t bytes);
void memory_copy_shadow(uint64_t to, uint64_t from, uint64_t bytes);
bool memory_is_device(uint64_t at);
// What lies at an address, in words.
std::string memory_describe(uint64_t at);
void memory_bind_thread();
struct MemoryUse {
    uint64_t live, bytes, peak;
};
MemoryUse memory_use();

// Page-locked host memory.
Result host_alloc(size_t bytes, void** out);
Result host_free(void* at);
bool host_is_pinned(const void* at, size_t bytes);

// -------------------------------------------------------------------------------------------------------- kernels

// The sites of a kernel file that were reached: a bit per kind, by line.
constexpr unsigned LINES = 2048;
struct Sites {
    uint16_t kinds[LINES] = {};
};
Sites* sites_of(const std::string& stem);
bool sites_drop(const std::string& value);          // parses the setting; false if it is not understood
void sites_forget();

struct Kernel {
    std::string name, unit, stem, file;
    Sites* sites = nullptr;
    bool combines = false;  // its file has atomic operations
    bool wgmma = false;     // and products of warpgroups, or tensor copies: something goes by the async proxy
    void (*entry)(const void* params) = nullptr;
    unsigned params = 0, bounds = 1024, dynamic = SMEM_STATIC;  // `dynamic`: bytes of shared memory that a launch may pass
};

struct Module {
    void* library = nullptr;
    std::string unit, stem;
    std::vector<std::unique_ptr<Kernel>> kernels;
};

Result module_load(const void* image, Module** out);
Result module_kernel(Module* module, const char* name, Kernel** out);

// Arguments are aligned as the strictest of them wants.
struct alignas(128) Arguments {
    char bytes[128];
};

struct Launch {
    Kernel* kernel;
    unsigned grid[3], block, shared;
    std::vector<Arguments> params;
    bool programmatic;  // may start before the kernel before it has ended: each thread must wait before it touches memory
};
// Runs all blocks; the answer is the violation, if one happened.
Result launch_run(const Launch& launch);

// Reports a violation of the kernel thread that runs now, and leaves its block. Does not return.
[[noreturn]] void kernel_violation(Result code, int line, const std::string& text);
// A store writes these bytes of a word (by the bits of its shadow) for the first time: true if it is held back from other
// blocks. Why a load may not have such bytes, which the shadow does not show; null if it may. And the end of a launch.
bool visibility_holds(uint64_t word, unsigned bytes);
const char* visibility_objection(uint64_t word, unsigned bytes);
void visibility_finish();
// What the setting `banks` has counted is forgotten.
void banks_forget();
// Is a kernel thread running on this OS thread?
bool in_kernel();

// -------------------------------------------------------------------------------------------------------- streams

struct Operation {
    const char* what;
    std::function<Result()> run;
};
extern const char* const freeing;                   // the `what` of an operation that gives memory back
extern const char* const launching;                 // and of one that runs a kernel
struct Stream;
struct Graph {
    std::vector<Operation> operations;
};

Stream* stream_of(void* handle);                    // null, for a handle that is none
Result stream_push(Stream* stream, Operation operation);
Result stream_drain(Stream* stream);
Result stream_drain_all();
bool stream_capturing(Stream* stream);
bool stream_after_kernel(Stream* stream);           // is a kernel the newest that it was given, or has captured?
// Refuses a call that may not be made while a stream captures, and spoils that capture, as a driver does.
Result capture_forbids(const char* whose);
void streams_forget();                              // drops what is queued, after a reset
