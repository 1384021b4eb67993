// Giving memory back to the system, which for hundreds of megabytes of small pages takes many milliseconds.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstddef>

#include "device.h"
#include "threads.h"

namespace asyncload {

// Unmaps whole pages, and makes way between pieces when 0.1 ms have passed. Pieces end at multiples of 4 MiB, so that
// no huge page is split.
inline void unmap(Address begin, std::size_t nbytes) {
    using Clock = std::chrono::steady_clock;
    constexpr std::size_t piece = 4 << 20;
    constexpr std::chrono::microseconds most{100};
    const Address end = begin + nbytes;
    for (auto since = Clock::now(); begin < end;) {
        const Address next = std::min(end, (begin / piece + 1) * piece);
        munmap(pointer(begin), next - begin);
        begin = next;
        if (begin == end || Clock::now() - since < most) continue;
        make_way();
        since = Clock::now();
    }
}

}  // namespace asyncload
