// What the engine's threads are called, how important they are, how they wait and how they make way.
#pragma once

#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <thread>

namespace asyncload {

// Names the calling thread; 15 characters are kept.
inline void name_thread(const char* name) {
    prctl(PR_SET_NAME, name);
}

// Adds to the calling thread's niceness, which Linux keeps for each thread.
inline void lower_priority(int nice) {
    const auto thread = static_cast<id_t>(gettid());
    errno = 0;
    const int now = getpriority(PRIO_PROCESS, thread);
    if (nice > 0 && errno == 0) setpriority(PRIO_PROCESS, thread, std::min(now + nice, 19));
}

// Bytes that a thread reads or writes before it offers its core to others: a few tenths of a millisecond. The scheduler
// lets it keep the core for some milliseconds otherwise, also where a thread of higher priority has woken up for it,
// such as an event loop's.
inline constexpr std::size_t stretch = 1 << 20;

inline void make_way() {
    sched_yield();
}

// Returns when `done()` does not say false any more: it is asked at once, after 20 microseconds, and then the more
// seldom the longer that takes.
template <typename Done>
void poll_until(Done done) {
    using Clock = std::chrono::steady_clock;
    using namespace std::chrono_literals;
    for (const auto begin = Clock::now(); !done();)
        std::this_thread::sleep_for(std::clamp<Clock::duration>((Clock::now() - begin) / 8, 20us, 1ms));
}

}  // namespace asyncload
