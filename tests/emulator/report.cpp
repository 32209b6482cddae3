// Settings, reports, the sticky error, and faults on demand.

#include "emu.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

__attribute__((init_priority(101))) Settings settings;
std::recursive_mutex driver_lock;

namespace {
std::mutex report_lock;
std::string last_report, shown_report;
Result sticky_error = SUCCESS;

constexpr int CALLS = int(Call::COUNT);
const char* const call_names[CALLS] = {"alloc", "copy", "load", "launch", "sync", "host", "graph", "programmatic"};
const Result call_errors[CALLS] = {OUT_OF_MEMORY,     UNKNOWN,       NO_BINARY_FOR_GPU, LAUNCH_OUT_OF_RESOURCES,
                                   ECC_UNCORRECTABLE, OUT_OF_MEMORY, LAUNCH_OUT_OF_RESOURCES,
                                   INVALID_VALUE};
uint64_t total[CALLS], since[CALLS], fail_at[CALLS];

bool starts(const std::string& s, const char* prefix) { return s.compare(0, strlen(prefix), prefix) == 0; }

std::vector<std::string> split(const std::string& s, const char* separators) {
    std::vector<std::string> parts;
    size_t from = 0;
    while (from <= s.size()) {
        size_t to = s.find_first_of(separators, from);
        if (to == std::string::npos) to = s.size();
        if (to > from) parts.push_back(s.substr(from, to - from));
        from = to + 1;
    }
    return parts;
}

bool number(const std::string& s, uint64_t* out) {
    char* end;
    *out = strtoull(s.c_str(), &end, 0);
    return !s.empty() && *end == 0;
}

// `word` or `word:seed`
bool seeded(const std::string& value, const char* word, uint64_t* seed) {
    if (value == word) return true;
    return starts(value, word) && value[strlen(word)] == ':' && number(value.substr(strlen(word) + 1), seed);
}

bool set_fail(const std::string& value) {
    memset(fail_at, 0, sizeof fail_at);
    memset(since, 0, sizeof since);
    for (const std::string& part : split(value, ",|+")) {
        const size_t colon = part.find(':');
        uint64_t n = 0;
        if (colon == std::string::npos || !number(part.substr(colon + 1), &n)) return part == "none";
        int which = 0;
        while (which < CALLS && part.substr(0, colon) != call_names[which]) which++;
        if (which == CALLS) return false;
        fail_at[which] = n;
    }
    return true;
}

bool set(const std::string& key, const std::string& value) {
    uint64_t n = 0;
    if (key == "order") {
        if (value == "forward") settings.order = Order::Forward;
        else if (value == "reverse") settings.order = Order::Reverse;
        else if (seeded(value, "random", &settings.order_seed)) settings.order = Order::Random;
        else return false;
        return true;
    }
    if (key == "async") {
        if (value == "late") settings.async = Async::Late;
        else if (value == "early") settings.async = Async::Early;
        else if (seeded(value, "random", &settings.async_seed)) settings.async = Async::Random;
        else return false;
        return true;
    }
    if (key == "uninit") {
        settings.uninitialised_is_error = value == "error";
        return value == "error" || value == "ignore";
    }
    if (key == "banks") {
        settings.banks = value == "count";
        return value == "count" || value == "off";
    }
    if (key == "drop") return sites_drop(value);
    if (key == "units") return settings.units = value, true;
    if (key == "threads" && number(value, &n)) return settings.threads = unsigned(n), true;
    if (key == "timeout" && number(value, &n)) return settings.timeout = unsigned(n), true;
    if (key == "memory" && number(value, &n)) return settings.memory = n, true;
    if (key == "shared" && number(value, &n)) return settings.shared = n, n <= SMEM_MOST;
    return key == "fail" && set_fail(value);
}
}  // namespace

std::string format(const char* text, ...) {
    va_list a, b;
    va_start(a, text);
    va_copy(b, a);
    std::string s(size_t(vsnprintf(nullptr, 0, text, a)) + 1, 0);
    vsnprintf(&s[0], s.size(), text, b);
    va_end(a);
    va_end(b);
    s.pop_back();
    return s;
}

Result violation(Result code, const std::string& text) {
    std::lock_guard<std::mutex> lock(report_lock);
    if (sticky_error != SUCCESS) return sticky_error;
    sticky_error = code;
    last_report = text;
    fprintf(stderr, "ldm emulator: %s\n", text.c_str());
    return code;
}

Result refuse(Result code, const std::string& text) {
    std::lock_guard<std::mutex> lock(report_lock);
    if (sticky_error == SUCCESS) last_report = text;
    fprintf(stderr, "ldm emulator: %s\n", text.c_str());
    return code;
}

Result sticky() {
    std::lock_guard<std::mutex> lock(report_lock);
    return sticky_error;
}

Result injected(Call call) {
    const int i = int(call);
    total[i]++;
    since[i]++;
    if (fail_at[i] == 0 || since[i] != fail_at[i]) return SUCCESS;
    return refuse(call_errors[i], format("%s %llu fails as asked", call_names[i], (unsigned long long)since[i]));
}

uint64_t counted(Call call) { return total[int(call)]; }

__attribute__((constructor)) static void read_environment() {
    static const char* const names[][2] = {{"LDM_EMULATOR_ORDER", "order"}, {"LDM_EMULATOR_ASYNC", "async"},
                                           {"LDM_EMULATOR_FAIL", "fail"},   {"LDM_EMULATOR_UNINIT", "uninit"},
                                           {"LDM_EMULATOR_THREADS", "threads"}, {"LDM_EMULATOR_MEMORY", "memory"},
                                           {"LDM_EMULATOR_UNITS", "units"}, {"LDM_EMULATOR_TIMEOUT", "timeout"},
                                           {"LDM_EMULATOR_BANKS", "banks"}, {"LDM_EMULATOR_DROP", "drop"}};
    for (const auto& name : names) {
        const char* value = getenv(name[0]);
        if (value && *value && !set(name[1], value)) {
            fprintf(stderr, "ldm emulator: %s=%s is not understood\n", name[0], value);
            abort();
        }
    }
}

// "order=reverse;async=late;fail=alloc:3": what is not named stays. `fail` starts its counts anew; `fail=none` ends it.
// 0, or 1 for a text that is not understood.
API int ldm_emulator_configure(const char* text) {
    LOCKED;
    for (const std::string& part : split(text, ";")) {
        const size_t equals = part.find('=');
        if (equals == std::string::npos || !set(part.substr(0, equals), part.substr(equals + 1))) {
            refuse(INVALID_VALUE, "setting `" + part + "` is not understood");
            return 1;
        }
    }
    return 0;
}

// The text of the last violation or refusal; empty when there was none. Valid until the next call.
API const char* ldm_emulator_report() {
    LOCKED;
    std::lock_guard<std::mutex> lock(report_lock);
    shown_report = last_report;
    return shown_report.c_str();
}

// Forgets the sticky error, its report, what is still queued, the sites that were seen and the bank conflicts.
API void ldm_emulator_reset() {
    LOCKED;
    streams_forget();
    sites_forget();
    banks_forget();
    std::lock_guard<std::mutex> lock(report_lock);
    sticky_error = SUCCESS;
    last_report.clear();
}

// How often the process called: alloc, copy, load, launch, sync, host, graph, programmatic; or live (allocations), bytes (in them), peak.
API uint64_t ldm_emulator_count(const char* what) {
    LOCKED;
    for (int i = 0; i < CALLS; i++)
        if (!strcmp(what, call_names[i])) return total[i];
    const MemoryUse use = memory_use();
    if (!strcmp(what, "live")) return use.live;
    if (!strcmp(what, "bytes")) return use.bytes;
    if (!strcmp(what, "peak")) return use.peak;
    return ~0ull;
}

// Marks device memory as never written: an arena's owner may do so where a lifetime ends.
API int ldm_emulator_poison(uint64_t at, uint64_t bytes) {
    WORKING;
    if (Result e = memory_check(at, bytes, "ldm_emulator_poison")) return e;
    memory_poison(at, bytes);
    return SUCCESS;
}
