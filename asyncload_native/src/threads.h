// What the engine's threads are called, and how important they are.
#pragma once

#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

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

}  // namespace asyncload
