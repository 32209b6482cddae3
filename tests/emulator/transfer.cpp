// Allocations, copies and fills, as the driver's interface names them.
//
// What an asynchronous copy does with host memory follows the driver's documentation: a source in pageable memory is
// staged at the call, a copy into pageable memory has happened when the call returns, and page-locked memory is read or
// written whenever the stream gets there. Until then a page-locked destination holds poison.

#include <cstring>

#include "emu.h"

namespace {
enum class Kind { ToDevice, ToHost, Inside };

Result live(uint64_t at, uint64_t bytes, const char* whose) {
    if (memory_check(at, bytes, whose) == SUCCESS) return SUCCESS;
    return violation(ILLEGAL_ADDRESS, format("%s runs after its memory was freed: %#llx %s", whose, (unsigned long long)at,
                                             memory_describe(at).c_str()));
}

Result copy(Kind kind, uint64_t to, uint64_t from, size_t bytes, void* stream_handle, bool wait, const char* whose) {
    if (Result e = injected(Call::Copy)) return e;
    Stream* stream = stream_of(stream_handle);
    if (!stream) return refuse(INVALID_HANDLE, format("%s: a stream that is none, or destroyed", whose));
    if (bytes == 0) return SUCCESS;
    if (!to || !from) return refuse(INVALID_VALUE, format("%s: a null pointer", whose));
    if (wait)
        if (Result e = capture_forbids(whose)) return e;
    if (kind != Kind::ToHost)
        if (Result e = memory_check(to, bytes, whose)) return e;
    if (kind != Kind::ToDevice)
        if (Result e = memory_check(from, bytes, whose)) return e;
    if (kind == Kind::Inside && to < from + bytes && from < to + bytes)
        return refuse(INVALID_VALUE, format("%s: source and destination overlap", whose));
    std::shared_ptr<std::vector<char>> staged;
    if (kind == Kind::ToDevice && !wait && !host_is_pinned((void*)from, bytes))
        staged = std::make_shared<std::vector<char>>((char*)from, (char*)from + bytes);
    if (kind == Kind::ToHost && !host_is_pinned((void*)to, bytes)) wait = true;
    if (kind == Kind::ToHost && wait && stream_capturing(stream))
        return refuse(CAPTURE_UNSUPPORTED, format("%s: a copy to pageable memory cannot be captured", whose));
    if (kind == Kind::ToHost && !stream_capturing(stream)) memset((void*)to, 0xff, bytes);
    const Result pushed = stream_push(stream, Operation{whose, [=] {
        const char* source = staged ? staged->data() : (const char*)from;
        if (kind != Kind::ToHost) {
            if (Result e = live(to, bytes, whose)) return e;
            if (Result e = memory_guards(to, whose)) return e;
        }
        if (kind != Kind::ToDevice) {
            if (Result e = live(from, bytes, whose)) return e;
            if (Result e = memory_guards(from, whose)) return e;
        }
        memcpy((void*)to, source, bytes);
        if (kind == Kind::ToDevice) memory_written(to, bytes);
        if (kind == Kind::Inside) memory_copy_shadow(to, from, bytes);
        return SUCCESS;
    }});
    if (pushed) return pushed;
    return wait ? stream_drain(stream) : SUCCESS;
}

Result fill(uint64_t to, unsigned value, unsigned size, size_t count, void* stream_handle, bool wait, const char* whose) {
    if (Result e = injected(Call::Copy)) return e;
    Stream* stream = stream_of(stream_handle);
    if (!stream) return refuse(INVALID_HANDLE, format("%s: a stream that is none, or destroyed", whose));
    if (count == 0) return SUCCESS;
    if (to % size) return refuse(INVALID_VALUE, format("%s: %#llx is not aligned to %u", whose, (unsigned long long)to, size));
    const uint64_t bytes = uint64_t(count) * size;
    if (Result e = memory_check(to, bytes, whose)) return e;
    const Result pushed = stream_push(stream, Operation{whose, [=] {
        if (Result e = live(to, bytes, whose)) return e;
        if (Result e = memory_guards(to, whose)) return e;
        if (size == 1) {
            memset((void*)to, int(value), bytes);
        } else {
            for (uint64_t i = 0; i < bytes; i += size) memcpy((char*)to + i, &value, size);
        }
        memory_written(to, bytes);
        return SUCCESS;
    }});
    if (pushed) return pushed;
    return wait ? stream_drain(stream) : SUCCESS;
}
}  // namespace

// -------------------------------------------------------------------------------------------------------- memory

API Result cuMemAlloc_v2(uint64_t* out, size_t bytes) {
    WORKING;
    if (Result e = capture_forbids("cuMemAlloc")) return e;
    if (Result e = injected(Call::Alloc)) return e;
    return memory_alloc(bytes, out);
}
// The address is there at once, as on a device; what the memory is used for before the stream gets there is not checked.
API Result cuMemAllocAsync(uint64_t* out, size_t bytes, void* stream) {
    WORKING;
    if (!stream_of(stream)) return refuse(INVALID_HANDLE, "cuMemAllocAsync: a stream that is none, or destroyed");
    if (Result e = injected(Call::Alloc)) return e;
    return memory_alloc(bytes, out);
}
API Result cuMemAllocFromPoolAsync(uint64_t* out, size_t bytes, void*, void* stream) { return cuMemAllocAsync(out, bytes, stream); }

// At once, whatever is queued: work that still needs the memory must have been waited for.
API Result cuMemFree_v2(uint64_t at) {
    LOCKED;
    const Result broken = sticky();
    if (at == 0) return broken;
    if (Result e = capture_forbids("cuMemFree")) return e;
    const Result result = memory_free(at, "cuMemFree");
    return broken ? broken : result;
}
API Result cuMemFreeAsync(uint64_t at, void* handle) {
    LOCKED;
    if (at == 0) return sticky();
    Stream* stream = stream_of(handle);
    if (!stream) return refuse(INVALID_HANDLE, "cuMemFreeAsync: a stream that is none, or destroyed");
    return stream_push(stream, Operation{freeing, [at] { return memory_free(at, "cuMemFreeAsync"); }});
}
API Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    WORKING;
    const uint64_t used = memory_use().bytes;
    *total = settings.memory;
    *free = used < settings.memory ? settings.memory - used : 0;
    return SUCCESS;
}

API Result cuMemHostAlloc(void** out, size_t bytes, unsigned) {
    WORKING;
    if (Result e = capture_forbids("cuMemHostAlloc")) return e;
    if (Result e = injected(Call::Host)) return e;
    return host_alloc(bytes, out);
}
API Result cuMemAllocHost_v2(void** out, size_t bytes) { return cuMemHostAlloc(out, bytes, 0); }
API Result cuMemFreeHost(void* at) {
    LOCKED;
    return host_free(at);
}

// -------------------------------------------------------------------------------------------------------- copies

API Result cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    WORKING;
    return copy(Kind::ToDevice, to, uint64_t(from), bytes, nullptr, true, "cuMemcpyHtoD");
}
API Result cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    WORKING;
    return copy(Kind::ToDevice, to, uint64_t(from), bytes, stream, false, "cuMemcpyHtoDAsync");
}
API Result cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    WORKING;
    return copy(Kind::ToHost, uint64_t(to), from, bytes, nullptr, true, "cuMemcpyDtoH");
}
API Result cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    WORKING;
    return copy(Kind::ToHost, uint64_t(to), from, bytes, stream, false, "cuMemcpyDtoHAsync");
}
// Not a synchronising call, for all that its name lacks `Async`.
API Result cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
    WORKING;
    return copy(Kind::Inside, to, from, bytes, nullptr, false, "cuMemcpyDtoD");
}
API Result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    WORKING;
    return copy(Kind::Inside, to, from, bytes, stream, false, "cuMemcpyDtoDAsync");
}

API Result cuMemsetD8_v2(uint64_t to, unsigned char value, size_t count) {
    WORKING;
    return fill(to, value, 1, count, nullptr, false, "cuMemsetD8");
}
API Result cuMemsetD8Async(uint64_t to, unsigned char value, size_t count, void* stream) {
    WORKING;
    return fill(to, value, 1, count, stream, false, "cuMemsetD8Async");
}
API Result cuMemsetD32_v2(uint64_t to, unsigned value, size_t count) {
    WORKING;
    return fill(to, value, 4, count, nullptr, false, "cuMemsetD32");
}
API Result cuMemsetD32Async(uint64_t to, unsigned value, size_t count, void* stream) {
    WORKING;
    return fill(to, value, 4, count, stream, false, "cuMemsetD32Async");
}
API Result cuMemsetD16Async(uint64_t to, unsigned short value, size_t count, void* stream) {
    WORKING;
    return fill(to, value, 2, count, stream, false, "cuMemsetD16Async");
}
