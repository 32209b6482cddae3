// Barriers, waits, commits and fences by source line: which were reached, and which the setting `drop` takes away. A test
// drops them one at a time; where nothing fails, either the site is redundant or the tests are too weak.

#include <cstdlib>
#include <map>

#include "emu.h"

namespace {
constexpr int KINDS = int(Site::COUNT);
const char* const kind_names[KINDS] = {"sync_block", "sync_warp", "cp_async_wait", "cp_async_commit", "fence_gpu",
                                       "fence_proxy_async", "wgmma_fence", "wgmma_commit", "wgmma_wait", "fence_mbarriers", "mbarrier_arrive",
                                       "mbarrier_expect", "mbarrier_wait"};

std::mutex lock;
std::map<std::string, std::unique_ptr<Sites>>& all() {
    static auto* sites = new std::map<std::string, std::unique_ptr<Sites>>;  // kernels point into it until the very end
    return *sites;
}
std::string shown;
}  // namespace

Sites* sites_of(const std::string& stem) {
    std::lock_guard<std::mutex> hold(lock);
    std::unique_ptr<Sites>& sites = all()[stem];
    if (!sites) sites = std::make_unique<Sites>();
    return sites.get();
}

void sites_forget() {
    std::lock_guard<std::mutex> hold(lock);
    for (auto& [stem, sites] : all()) *sites = Sites();
}

// `KIND:STEM:LINE` or `none`
bool sites_drop(const std::string& value) {
    settings.drop = Site::COUNT;
    if (value == "none") return true;
    const size_t first = value.find(':'), second = value.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) return false;
    for (int kind = 0; kind < KINDS; kind++)
        if (value.substr(0, first) == kind_names[kind]) settings.drop = Site(kind);
    settings.drop_stem = value.substr(first + 1, second - first - 1);
    settings.drop_line = atoi(value.c_str() + second + 1);
    return settings.drop != Site::COUNT && settings.drop_line > 0;
}

// The sites that launches have reached since the last reset, one `KIND:STEM:LINE` a line. Valid until the next call.
API const char* ldm_emulator_sites() {
    LOCKED;
    std::lock_guard<std::mutex> hold(lock);
    shown.clear();
    for (const auto& [stem, sites] : all())
        for (unsigned line = 0; line < LINES; line++)
            for (int kind = 0; kind < KINDS; kind++)
                if (sites->kinds[line] >> kind & 1) shown += format("%s:%s:%u\n", kind_names[kind], stem.c_str(), line);
    return shown.c_str();
}
