// Giving memory back to the system, which for hundreds of megabytes of small pages takes many milliseconds.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <thread>

#include "device.h"

namespace asyncload {

// Unmaps whole pages, and pauses between pieces when 0.1 ms have passed: whoever maps memory meanwhile, which `malloc`
// may do, sleeps until the kernel's lock is free, and wakes up too late if it is taken again at once. Pieces end at
// multiples of 4 MiB, so that no huge page is split.
inline void unmap(Address begin, std::size_t nbytes) {
    using Clock = std::chrono::steady_clock;
    constexpr std::size_t piece = 4 << 20;
    constexpr std::chrono::microseconds most{100}, pause{20};
    const Address end = begin + nbytes;
    for (auto since = Clock::now(); begin < end;) {
        const Address next = std::min(end, (begin / piece + 1) * piece);
        munmap(pointer(begin), next - begin);
        begin = next;
        if (begin == end || Clock::now() - since < most) continue;
        std::this_thread::sleep_for(pause);
        since = Clock::now();
    }
}

}  // namespace asyncload
