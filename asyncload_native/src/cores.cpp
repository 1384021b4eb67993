#include "cores.h"

#include <sched.h>

#include <cstring>
#include <optional>

namespace asyncload {

namespace {

void clear(cpu_set_t& cores, int core) {
    CPU_CLR(static_cast<std::size_t>(core), &cores);
}

// The next core of a set, which is not empty, in a circle.
int after(int core, const cpu_set_t& cores) {
    do core = (core + 1) % CPU_SETSIZE;
    while (!CPU_ISSET(static_cast<std::size_t>(core), &cores));
    return core;
}

bool allow(const cpu_set_t& cores) {
    return sched_setaffinity(0, sizeof cores, &cores) == 0;
}

std::optional<cpu_set_t> allowed() {
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof cores, &cores) == 0 ? std::optional(cores) : std::nullopt;
}

// Since Linux 6.2 cores that were asked for are kept to, also where the process may use others later. So all are asked
// for first, which are those that the process may use, and the former ones only where they were fewer.
void allow_again(const cpu_set_t& former) {
    cpu_set_t all;
    std::memset(&all, 0xFF, sizeof all);
    allow(all);
    if (const auto now = allowed(); !now || !CPU_EQUAL(&*now, &former)) allow(former);
}

}  // namespace

Cores::Cores(std::size_t threads) : working_(threads) {
    for (auto& core : working_) core = none;
}

void Cores::begin(std::size_t thread) noexcept {
    const int core = sched_getcpu();
    working_[thread] = core;
    if (core < 0 || !shared(core, thread)) return;
    const auto former = allowed();
    if (!former || static_cast<std::size_t>(CPU_COUNT(&*former)) > working_.size()) return;
    cpu_set_t free = *former;
    for (const auto& other : working_)
        if (const int taken = other; taken != none) clear(free, taken);
    if (CPU_COUNT(&free) == 0) return;
    const int to = after(core, free);
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(static_cast<std::size_t>(to), &only);
    working_[thread] = to;  // before it leaves: who runs here next would move for its sake otherwise
    if (allow(only))
        allow_again(*former);
    else
        working_[thread] = core;
}

void Cores::end(std::size_t thread) noexcept {
    working_[thread] = none;
}

bool Cores::shared(int core, std::size_t thread) const noexcept {
    for (std::size_t other = 0; other < working_.size(); ++other)
        if (other != thread && working_[other] == core) return true;
    return false;
}

}  // namespace asyncload
