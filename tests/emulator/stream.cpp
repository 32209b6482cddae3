// Streams and events. What a stream is given waits in a queue; when it runs is the adversary's choice (`async`), within
// what the stream, its events, and the legacy default stream allow. Graphs are recorded queues.

#include <chrono>
#include <deque>
#include <set>
#include <thread>

#include "emu.h"

const char* const freeing = "free";
const char* const launching = "launch";

struct Queued {
    uint64_t number;
    Operation operation;
    std::vector<std::pair<Stream*, uint64_t>> after;  // (stream, number): runs only after that one has
};

struct Stream {
    bool blocking = true;       // waits for the legacy default stream, and it for this one
    std::deque<Queued> queue;
    uint64_t given = 0, done = 0;
    std::unique_ptr<Graph> capture;
    int capture_mode = 0;       // 0 global, 1 of one thread, 2 relaxed: who may call what meanwhile
    std::thread::id capture_thread;
    bool capture_broken = false;
    bool asked = false;         // a query said "not ready" once: the next one finishes the work
    bool after_kernel = false;  // the newest that it was given, or has captured, is a kernel
};

struct Event {
    Stream* stream = nullptr;
    uint64_t number = 0;
    bool asked = false, captured = false;
    double time = 0;
};

namespace {
Stream default_stream;
std::set<Stream*> streams;
std::set<Event*> events;
std::set<Graph*> graphs;
Random chance{1};
uint64_t chance_seed = 0;

double now() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs what the stream was given, up to and with `number`, and first what that waits for.
Result drain(Stream* stream, uint64_t number) {
    Result first = SUCCESS;
    while (!stream->queue.empty() && stream->done < number) {
        Queued next = std::move(stream->queue.front());
        stream->queue.pop_front();
        for (const auto& [other, until] : next.after) {
            const bool alive = other == &default_stream || streams.count(other);
            if (alive && other->done < until) drain(other, until);
        }
        // A broken context runs nothing more, but gives memory back.
        const Result broken = sticky();
        if (broken) first = broken;
        if (broken && next.operation.what != freeing) stream->done = next.number;
        else if (Result e = next.operation.run()) first = first ? first : e;
        stream->done = next.number;
    }
    return first;
}

// The adversary's move after each new operation.
void play(Stream* stream) {
    if (settings.async == Async::Late) return;
    if (settings.async == Async::Early) {
        drain(stream, stream->given);
        return;
    }
    if (chance_seed != settings.async_seed) chance.state = chance_seed = settings.async_seed;
    if (chance.next() & 1) return;
    std::vector<Stream*> all(streams.begin(), streams.end());
    all.push_back(&default_stream);
    Stream* chosen = all[chance.next() % all.size()];
    if (!chosen->queue.empty()) drain(chosen, chosen->done + 1 + chance.next() % chosen->queue.size());
}
}  // namespace

Stream* stream_of(void* handle) {
    // 1 and 2 are the legacy and the per-thread default stream.
    if (uintptr_t(handle) <= 2) return &default_stream;
    return streams.count((Stream*)handle) ? (Stream*)handle : nullptr;
}

bool stream_capturing(Stream* stream) { return stream->capture != nullptr; }
bool stream_after_kernel(Stream* stream) { return stream->after_kernel; }

Result capture_forbids(const char* whose) {
    for (Stream* stream : streams) {
        if (!stream->capture || stream->capture_mode == 2) continue;
        if (stream->capture_mode == 1 && stream->capture_thread != std::this_thread::get_id()) continue;
        stream->capture_broken = true;
        return refuse(CAPTURE_UNSUPPORTED, format("%s: not while a stream captures", whose));
    }
    return SUCCESS;
}

Result stream_push(Stream* stream, Operation operation) {
    stream->after_kernel = operation.what == launching;
    if (stream->capture) {
        stream->capture->operations.push_back(std::move(operation));
        return SUCCESS;
    }
    Queued queued{++stream->given, std::move(operation), {}};
    if (stream == &default_stream) {
        for (Stream* other : streams)
            if (other->blocking && other->given > other->done) queued.after.push_back({other, other->given});
    } else if (stream->blocking && default_stream.given > default_stream.done) {
        queued.after.push_back({&default_stream, default_stream.given});
    }
    stream->queue.push_back(std::move(queued));
    stream->asked = false;
    play(stream);
    return sticky();
}

Result stream_drain(Stream* stream) {
    Result e = drain(stream, stream->given);
    return e ? e : sticky();
}

Result stream_drain_all() {
    Result first = drain(&default_stream, default_stream.given);
    for (Stream* stream : std::vector<Stream*>(streams.begin(), streams.end()))
        if (Result e = drain(stream, stream->given)) first = first ? first : e;
    return first ? first : sticky();
}

void streams_forget() {
    auto forget = [](Stream* stream) {
        for (Queued& queued : stream->queue)
            if (queued.operation.what == freeing) queued.operation.run();
        stream->queue.clear();
        stream->done = stream->given;
        stream->capture.reset();
    };
    forget(&default_stream);
    for (Stream* stream : streams) forget(stream);
}

#define STREAM(name, handle)                                                        \
    Stream* name = stream_of(handle);                                               \
    if (!name) return refuse(INVALID_HANDLE, "a stream that is none, or destroyed")
#define EVENT(name, handle)                                                         \
    Event* name = (Event*)(handle);                                                 \
    if (!events.count(name)) return refuse(INVALID_HANDLE, "an event that is none, or destroyed")

API Result cuStreamCreate(void** out, unsigned flags) {
    WORKING;
    Stream* stream = new Stream;
    stream->blocking = !(flags & 1);
    streams.insert(stream);
    *out = stream;
    return SUCCESS;
}
API Result cuStreamCreateWithPriority(void** out, unsigned flags, int) { return cuStreamCreate(out, flags); }

API Result cuStreamDestroy_v2(void* handle) {
    LOCKED;
    STREAM(stream, handle);
    if (stream == &default_stream) return refuse(INVALID_HANDLE, "cuStreamDestroy: the default stream");
    drain(stream, stream->given);  // what was given still runs
    streams.erase(stream);
    for (Event* event : events)
        if (event->stream == stream) event->stream = nullptr;
    delete stream;
    return SUCCESS;
}

API Result cuStreamSynchronize(void* handle) {
    WORKING;
    STREAM(stream, handle);
    if (Result e = injected(Call::Sync)) return e;
    if (stream->capture) {
        stream->capture_broken = true;
        return refuse(CAPTURE_UNSUPPORTED, "cuStreamSynchronize: the stream is capturing");
    }
    if (stream == &default_stream)
        for (Stream* other : std::vector<Stream*>(streams.begin(), streams.end()))
            if (other->blocking) drain(other, other->given);
    if (Result e = stream_drain(stream)) return e;
    return memory_all_guards("cuStreamSynchronize");
}

API Result cuCtxSynchronize() {
    WORKING;
    if (Result e = capture_forbids("cuCtxSynchronize")) return e;
    if (Result e = injected(Call::Sync)) return e;
    if (Result e = stream_drain_all()) return e;
    return memory_all_guards("cuCtxSynchronize");
}

API Result cuStreamQuery(void* handle) {
    WORKING;
    STREAM(stream, handle);
    if (stream->queue.empty()) return SUCCESS;
    if (!stream->asked && settings.async != Async::Early) return stream->asked = true, NOT_READY;
    return stream_drain(stream);
}

API Result cuStreamWaitEvent(void* handle, void* event_handle, unsigned) {
    WORKING;
    STREAM(stream, handle);
    EVENT(event, event_handle);
    stream->after_kernel = false;
    if (stream->capture) {
        if (!event->stream || event->captured) return SUCCESS;
        stream->capture_broken = true;
        return refuse(CAPTURE_ISOLATION, "cuStreamWaitEvent: a capturing stream waits for an event of work outside the capture");
    }
    if (event->captured) return refuse(CAPTURED_EVENT, "cuStreamWaitEvent: the event belongs to a capture");
    if (!event->stream || event->stream == stream) return SUCCESS;
    Queued queued{++stream->given, Operation{"wait", [] { return SUCCESS; }}, {{event->stream, event->number}}};
    stream->queue.push_back(std::move(queued));
    play(stream);
    return sticky();
}

API Result cuStreamGetPriority(void*, int* out) { return *out = 0, SUCCESS; }
API Result cuCtxGetStreamPriorityRange(int* least, int* most) { return *least = 0, *most = -5, SUCCESS; }
API Result cuStreamAttachMemAsync(void*, uint64_t, size_t, unsigned) { return SUCCESS; }

API Result cuLaunchHostFunc(void* handle, void (*call)(void*), void* data) {
    WORKING;
    STREAM(stream, handle);
    return stream_push(stream, Operation{"host function", [=] { return call(data), SUCCESS; }});
}

// ------------------------------------------------------------------------------------------------------- events

API Result cuEventCreate(void** out, unsigned) {
    WORKING;
    Event* event = new Event;
    events.insert(event);
    *out = event;
    return SUCCESS;
}

API Result cuEventDestroy_v2(void* handle) {
    LOCKED;
    EVENT(event, handle);
    events.erase(event);
    delete event;
    return SUCCESS;
}

API Result cuEventRecord(void* handle, void* stream_handle) {
    WORKING;
    EVENT(event, handle);
    STREAM(stream, stream_handle);
    stream->after_kernel = false;
    event->captured = stream->capture != nullptr;
    if (event->captured) return SUCCESS;
    event->stream = stream;
    event->number = stream->given + 1;
    event->asked = false;
    return stream_push(stream, Operation{"event", [event] {
                                             if (events.count(event)) event->time = now();
                                             return SUCCESS;
                                         }});
}
API Result cuEventRecordWithFlags(void* handle, void* stream, unsigned) { return cuEventRecord(handle, stream); }

API Result cuEventSynchronize(void* handle) {
    WORKING;
    EVENT(event, handle);
    if (Result e = injected(Call::Sync)) return e;
    if (!event->stream) return SUCCESS;
    Result e = drain(event->stream, event->number);
    return e ? e : memory_all_guards("cuEventSynchronize");
}

API Result cuEventQuery(void* handle) {
    WORKING;
    EVENT(event, handle);
    if (!event->stream || event->stream->done >= event->number) return SUCCESS;
    if (!event->asked) return event->asked = true, NOT_READY;
    Result e = drain(event->stream, event->number);
    return e ? e : sticky();
}

API Result cuEventElapsedTime_v2(float* out, void* from, void* to) {
    WORKING;
    EVENT(a, from);
    EVENT(b, to);
    for (Event* event : {a, b})
        if (event->stream && event->stream->done < event->number) return NOT_READY;
    if (a->number == 0 || b->number == 0) return refuse(INVALID_HANDLE, "cuEventElapsedTime: an event that was never recorded");
    *out = float(b->time - a->time);
    return SUCCESS;
}
API Result cuEventElapsedTime(float* out, void* from, void* to) { return cuEventElapsedTime_v2(out, from, to); }

// ------------------------------------------------------------------------------------------------------- graphs

API Result cuStreamBeginCapture_v2(void* handle, int mode) {
    WORKING;
    STREAM(stream, handle);
    if (stream == &default_stream) return refuse(CAPTURE_UNSUPPORTED, "cuStreamBeginCapture: the default stream");
    if (stream->capture) return refuse(ILLEGAL_STATE, "cuStreamBeginCapture: the stream is capturing");
    stream->capture = std::make_unique<Graph>();
    stream->capture_mode = mode;
    stream->capture_thread = std::this_thread::get_id();
    stream->capture_broken = stream->after_kernel = false;
    return SUCCESS;
}

API Result cuStreamEndCapture(void* handle, void** out) {
    WORKING;
    STREAM(stream, handle);
    if (!stream->capture) return refuse(ILLEGAL_STATE, "cuStreamEndCapture: the stream is not capturing");
    Graph* graph = stream->capture.release();
    *out = nullptr;
    stream->after_kernel = false;
    if (stream->capture_broken) {
        delete graph;
        return refuse(CAPTURE_INVALIDATED, "cuStreamEndCapture: a forbidden call came in between");
    }
    graphs.insert(graph);
    *out = graph;
    return SUCCESS;
}

API Result cuStreamIsCapturing(void* handle, int* out) {
    LOCKED;
    STREAM(stream, handle);
    *out = stream->capture ? 1 : 0;
    return SUCCESS;
}
API Result cuThreadExchangeStreamCaptureMode(int*) { return SUCCESS; }

API Result cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long) {
    WORKING;
    if (!graphs.count((Graph*)graph)) return refuse(INVALID_HANDLE, "cuGraphInstantiate: a graph that is none");
    Graph* copy = new Graph(*(Graph*)graph);
    graphs.insert(copy);
    *out = copy;
    return SUCCESS;
}

API Result cuGraphLaunch(void* graph, void* handle) {
    WORKING;
    STREAM(stream, handle);
    if (!graphs.count((Graph*)graph)) return refuse(INVALID_HANDLE, "cuGraphLaunch: a graph that is none");
    if (Result e = injected(Call::Graph)) return e;
    for (const Operation& operation : ((Graph*)graph)->operations)
        if (Result e = stream_push(stream, operation)) return e;
    stream->after_kernel = false;
    return SUCCESS;
}
API Result cuGraphUpload(void*, void*) { return SUCCESS; }

API Result cuGraphGetNodes(void* graph, void**, size_t* count) {
    LOCKED;
    if (!graphs.count((Graph*)graph)) return refuse(INVALID_HANDLE, "cuGraphGetNodes: a graph that is none");
    *count = ((Graph*)graph)->operations.size();
    return SUCCESS;
}

static Result forget_graph(void* graph) {
    LOCKED;
    if (!graphs.erase((Graph*)graph)) return refuse(INVALID_HANDLE, "a graph that is none, or destroyed");
    delete (Graph*)graph;
    return SUCCESS;
}
API Result cuGraphDestroy(void* graph) { return forget_graph(graph); }
API Result cuGraphExecDestroy(void* graph) { return forget_graph(graph); }
