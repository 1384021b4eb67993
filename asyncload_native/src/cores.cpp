#include "cores.h"

#include <sched.h>

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

}  // namespace

Cores::Cores(std::size_t threads) : working_(threads) {
    for (auto& core : working_) core = none;
}

void Cores::begin(std::size_t thread) noexcept {
    const int core = sched_getcpu();
    working_[thread] = core;
    cpu_set_t allowed;
    if (core < 0 || !shared(core, thread) || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    cpu_set_t free = allowed;
    for (const auto& other : working_)
        if (const int taken = other; taken != none) clear(free, taken);
    if (CPU_COUNT(&free) == 0) return;
    const int to = after(core, free);
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(static_cast<std::size_t>(to), &only);
    working_[thread] = to;  // before it leaves: who runs here next would move for its sake otherwise
    if (!allow(only)) working_[thread] = core;
    allow(allowed);
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
