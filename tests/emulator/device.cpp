// The device, its context, modules, kernels and launches, as the driver's interface names them.

#include <cstring>
#include <set>

#include "emu.h"

namespace {
int context_object, device_pool;
bool initialised = false;
thread_local void* current = nullptr;
std::set<Module*> modules;
std::set<void*> kernels;

// The H100's answers where an engine may ask; 0 elsewhere.
int attribute(int which) {
    switch (which) {
        case 1: return 1024;        // threads per block
        case 2: case 3: return 1024;
        case 4: return 64;
        case 5: return 0x7fffffff;  // grid
        case 6: case 7: return 65535;
        case 8: return SMEM_STATIC; // shared memory per block
        case 9: return 65536;       // constant memory
        case 10: return 32;         // warp
        case 11: return 0x7fffffff;
        case 12: return 65536;      // registers per block
        case 13: return 1755000;    // clock, kHz
        case 14: return 512;        // texture alignment
        case 15: return 1;          // overlap
        case 16: return 132;        // multiprocessors
        case 19: return 1;          // can map host memory
        case 31: return 1;          // concurrent kernels
        case 36: return 2619000;    // memory clock, kHz
        case 37: return 5120;       // bus width
        case 38: return 50 << 20;   // L2
        case 39: return 2048;       // threads per multiprocessor
        case 40: return 3;          // copy engines
        case 41: return 1;          // unified addressing
        case 75: return 9;          // compute capability
        case 76: return 0;
        case 78: return 1;          // stream priorities
        case 81: return 228 * 1024; // shared memory per multiprocessor
        case 82: return 65536;      // registers per multiprocessor
        case 97: return int(settings.shared);  // shared memory per block, on request
        case 106: return 32;        // blocks per multiprocessor
        case 115: return 1;         // memory pools
        default: return 0;
    }
}

struct Name {
    int code;
    const char *name, *text;
};
const Name names[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {303, "CUDA_ERROR_SHARED_OBJECT_INIT_FAILED", "shared object initialization failed"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {710, "CUDA_ERROR_ASSERT", "device-side assert triggered"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {907, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

Result launch(void* function, const unsigned grid[3], const unsigned block[3], unsigned shared, void* stream_handle, void** params, void** extra,
              bool programmatic = false) {
    if (!kernels.count(function)) return refuse(INVALID_HANDLE, "cuLaunchKernel: a function that is none, or of an unloaded module");
    Kernel* kernel = (Kernel*)function;
    Stream* stream = stream_of(stream_handle);
    if (!stream) return refuse(INVALID_HANDLE, "cuLaunchKernel: a stream that is none, or destroyed");
    if (Result e = injected(Call::Launch)) return e;
    const std::string who = format("launch of %s (%s), grid (%u,%u,%u), block (%u,%u,%u)", kernel->name.c_str(), kernel->unit.c_str(),
                                   grid[0], grid[1], grid[2], block[0], block[1], block[2]);
    for (int i = 0; i < 3; i++) {
        if (grid[i] == 0 || block[i] == 0) return refuse(INVALID_VALUE, who + ": a size is 0");
        if (grid[i] > unsigned(attribute(5 + i))) return refuse(INVALID_VALUE, who + ": the grid is too large");
    }
    if (block[1] != 1 || block[2] != 1) return refuse(INVALID_VALUE, who + ": blocks of these kernels have one dimension");
    if (block[0] > 1024) return refuse(INVALID_VALUE, who + ": more than 1024 threads in a block");
    if (block[0] > kernel->bounds)
        return refuse(LAUNCH_OUT_OF_RESOURCES, who + format(": more threads than its __launch_bounds__, %u", kernel->bounds));
    if (shared > kernel->dynamic)
        return refuse(INVALID_VALUE, who + format(": %u bytes of dynamic shared memory, and cuFuncSetAttribute allowed %u", shared, kernel->dynamic));
    if (extra || !params || !params[0]) return refuse(INVALID_VALUE, who + ": a kernel takes one struct, by `kernelParams`");
    // A driver takes it, and then orders it as any other launch: an engine that asks for it has lost count of its stream.
    if (programmatic && !stream_after_kernel(stream))
        return refuse(INVALID_VALUE, who + ": a programmatic launch, and the last that its stream was given is no kernel");
    if (programmatic)
        if (Result e = injected(Call::Programmatic)) return e;
    Launch launch{kernel, {grid[0], grid[1], grid[2]}, block[0], shared, std::vector<Arguments>((kernel->params + sizeof(Arguments) - 1) / sizeof(Arguments)),
                  programmatic};
    memcpy(launch.params.data(), params[0], kernel->params);
    return stream_push(stream, Operation{launching, [launch, who] {
                                             if (!kernels.count(launch.kernel))
                                                 return violation(LAUNCH_FAILED, who + ": the module was unloaded before it ran");
                                             return launch_run(launch);
                                         }});
}
}  // namespace

API Result cuInit(unsigned flags) {
    LOCKED;
    if (flags) return INVALID_VALUE;
    initialised = true;
    return SUCCESS;
}
API Result cuDriverGetVersion(int* out) { return *out = 13000, SUCCESS; }

API Result cuGetErrorName(int code, const char** out) {
    for (const Name& n : names)
        if (n.code == code) return *out = n.name, SUCCESS;
    return *out = "CUDA_ERROR_UNKNOWN", INVALID_VALUE;
}
API Result cuGetErrorString(int code, const char** out) {
    for (const Name& n : names)
        if (n.code == code) return *out = n.text, SUCCESS;
    return *out = "unknown error", INVALID_VALUE;
}

// ------------------------------------------------------------------------------------------------------- device

API Result cuDeviceGetCount(int* out) { return *out = 1, initialised ? SUCCESS : NOT_INITIALIZED; }
API Result cuDeviceGet(int* out, int ordinal) {
    if (!initialised) return NOT_INITIALIZED;
    if (ordinal != 0) return INVALID_DEVICE;
    return *out = 0, SUCCESS;
}
API Result cuDeviceGetName(char* out, int bytes, int device) {
    if (device != 0 || bytes < 1) return INVALID_DEVICE;
    strncpy(out, "ldm emulator", size_t(bytes));
    out[bytes - 1] = 0;
    return SUCCESS;
}
API Result cuDeviceGetUuid_v2(char* out, int) { return memcpy(out, "ldm-emulator-000", 16), SUCCESS; }
API Result cuDeviceGetUuid(char* out, int device) { return cuDeviceGetUuid_v2(out, device); }
API Result cuDeviceTotalMem_v2(size_t* out, int) { return *out = settings.memory, SUCCESS; }
API Result cuDeviceGetAttribute(int* out, int which, int device) {
    if (device != 0) return INVALID_DEVICE;
    return *out = attribute(which), SUCCESS;
}
API Result cuDeviceGetDefaultMemPool(void** out, int) { return *out = &device_pool, SUCCESS; }
API Result cuDeviceGetMemPool(void** out, int) { return *out = &device_pool, SUCCESS; }
API Result cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
API Result cuMemPoolTrimTo(void*, size_t) { return SUCCESS; }
API Result cuMemPoolGetAttribute(void*, int, void* out) {
    LOCKED;
    *(uint64_t*)out = memory_use().bytes;
    return SUCCESS;
}

// ------------------------------------------------------------------------------------------------------ context

API Result cuDevicePrimaryCtxRetain(void** out, int device) {
    if (!initialised) return NOT_INITIALIZED;
    if (device != 0) return INVALID_DEVICE;
    return *out = &context_object, SUCCESS;
}
API Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API Result cuDevicePrimaryCtxSetFlags_v2(int, unsigned) { return SUCCESS; }
API Result cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, SUCCESS; }
API Result cuCtxGetCurrent(void** out) { return *out = current, SUCCESS; }
API Result cuCtxSetCurrent(void* context) {
    if (context && context != &context_object) return INVALID_CONTEXT;
    return current = context, SUCCESS;
}
API Result cuCtxPushCurrent_v2(void* context) { return cuCtxSetCurrent(context); }
API Result cuCtxPopCurrent_v2(void** out) {
    if (out) *out = current;
    return current = nullptr, SUCCESS;
}
API Result cuCtxGetDevice(int* out) { return *out = 0, current ? SUCCESS : INVALID_CONTEXT; }
API Result cuCtxSetFlags(unsigned) { return SUCCESS; }
API Result cuCtxGetFlags(unsigned* out) { return *out = 0, SUCCESS; }
API Result cuCtxGetLimit(size_t* out, int) { return *out = 0, SUCCESS; }
API Result cuCtxSetLimit(int, size_t) { return SUCCESS; }
API Result cuCtxGetCacheConfig(int* out) { return *out = 0, SUCCESS; }
API Result cuCtxSetCacheConfig(int) { return SUCCESS; }

// ------------------------------------------------------------------------------------------------------ modules

API Result cuModuleLoadData(void** out, const void* image) {
    WORKING;
    if (Result e = injected(Call::Load)) return e;
    Module* module = nullptr;
    if (Result e = module_load(image, &module)) return e;
    modules.insert(module);
    *out = module;
    return SUCCESS;
}
API Result cuModuleLoadDataEx(void** out, const void* image, unsigned, void*, void*) { return cuModuleLoadData(out, image); }

API Result cuModuleUnload(void* handle) {
    LOCKED;
    if (!modules.erase((Module*)handle)) return refuse(INVALID_HANDLE, "cuModuleUnload: a module that is none");
    for (auto& kernel : ((Module*)handle)->kernels) kernels.erase(kernel.get());
    // Its names stay, for reports of launches that are still queued; so does the library, whose code may run again.
    return SUCCESS;
}

API Result cuModuleGetFunction(void** out, void* handle, const char* name) {
    WORKING;
    if (!modules.count((Module*)handle)) return refuse(INVALID_HANDLE, "cuModuleGetFunction: a module that is none");
    Kernel* kernel = nullptr;
    if (Result e = module_kernel((Module*)handle, name, &kernel)) return e;
    kernels.insert(kernel);
    *out = kernel;
    return SUCCESS;
}
API Result cuModuleGetGlobal_v2(uint64_t*, size_t*, void*, const char* name) {
    return refuse(NOT_FOUND, format("cuModuleGetGlobal: kernels have no global `%s`", name));
}

constexpr int DYNAMIC_SMEM = 8;
API Result cuFuncGetAttribute(int* out, int which, void* function) {
    LOCKED;
    if (!kernels.count(function)) return INVALID_HANDLE;
    const Kernel& kernel = *(Kernel*)function;
    // 0 threads per block, 4 registers, 5 and 6 versions; the emulator has no other answer.
    *out = which == 0 ? int(kernel.bounds) : which == DYNAMIC_SMEM ? int(kernel.dynamic) : which == 4 ? 32 : which == 5 || which == 6 ? 90 : 0;
    return SUCCESS;
}
API Result cuFuncSetAttribute(void* function, int which, int value) {
    LOCKED;
    if (!kernels.count(function)) return INVALID_HANDLE;
    if (which != DYNAMIC_SMEM) return SUCCESS;
    if (value < 0 || unsigned(value) > SMEM_MOST)
        return refuse(INVALID_VALUE, format("cuFuncSetAttribute: %d bytes of dynamic shared memory; a block has %u", value, SMEM_MOST));
    ((Kernel*)function)->dynamic = unsigned(value);
    return SUCCESS;
}
API Result cuFuncSetCacheConfig(void*, int) { return SUCCESS; }
API Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* out, void*, int block, size_t) {
    if (block < 1 || block > 1024) return INVALID_VALUE;
    return *out = 2048 / ((block + 31) / 32 * 32), SUCCESS;
}
API Result cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* out, void* f, int block, size_t shared, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(out, f, block, shared);
}

// ------------------------------------------------------------------------------------------------------ launches

API Result cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                          void* stream, void** params, void** extra) {
    WORKING;
    const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    return launch(function, grid, block, shared, stream, params, extra);
}

struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    void* stream;
    void* attributes;
    unsigned count;
};
// A programmatic launch runs when any other would, and its threads are held to their wait (griddep_wait); other attributes change
// time, which the emulator has none of; clusters it does not run.
API Result cuLaunchKernelEx(const LaunchConfig* config, void* function, void** params, void** extra) {
    WORKING;
    constexpr int CLUSTER = 4, PROGRAMMATIC = 6, STRIDE = 72;
    bool programmatic = false;
    for (unsigned i = 0; i < config->count; i++) {
        const char* at = (const char*)config->attributes + i * STRIDE;
        int id;
        unsigned size[3];
        memcpy(&id, at, 4);
        memcpy(size, at + 8, 12);
        if (id == PROGRAMMATIC) programmatic = size[0] != 0;
        if (id == CLUSTER && size[0] * size[1] * size[2] > 1) return refuse(NOT_SUPPORTED, "cuLaunchKernelEx: clusters are not emulated");
    }
    return launch(function, config->grid, config->block, config->shared, config->stream, params, extra, programmatic);
}
