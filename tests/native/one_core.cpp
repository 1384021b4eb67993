// A host kernel that has two threads of an engine go on from one core.

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

struct Meeting {
    std::atomic<int> core{-1};
    std::atomic<int> come{0}, moved{0};
};

std::vector<int> cores;  // on which each call began
std::vector<Meeting> meetings;
std::atomic<std::size_t> calls;

// Neither sleeps, so that nothing but a decision of somebody's takes them off their cores.
bool both(std::atomic<int>& count) {
    ++count;
    for (const auto until = Clock::now() + std::chrono::seconds(30); count < 2; sched_yield())
        if (Clock::now() > until) return false;
    return true;
}

bool go_to(int core) {
    cpu_set_t allowed, one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<std::size_t>(core), &one);
    return sched_getaffinity(0, sizeof allowed, &allowed) == 0 && sched_setaffinity(0, sizeof one, &one) == 0 &&
           sched_setaffinity(0, sizeof allowed, &allowed) == 0;
}

}  // namespace

extern "C" {

// Before so many calls, two for each time that the threads meet.
void one_core_reset(std::size_t n_calls) {
    calls = 0;
    cores.assign(n_calls, -1);
    meetings = std::vector<Meeting>(n_calls / 2);
}

// The core on which a call began.
int one_core_of(std::size_t call) {
    return cores.at(call);
}

// Decodes nothing: waits until both threads are in it, and has both on the core of the one that came first.
std::int32_t one_core(std::intptr_t, std::intptr_t, std::intptr_t) {
    const std::size_t call = calls++;
    Meeting& meeting = meetings.at(call / 2);
    int first = -1;
    cores[call] = sched_getcpu();
    meeting.core.compare_exchange_strong(first, cores[call]);
    return both(meeting.come) && go_to(meeting.core) && both(meeting.moved) ? 1 : 0;
}
}
