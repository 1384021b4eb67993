// Giving memory back to the system, which for hundreds of megabytes of small pages takes many milliseconds.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>

#include "device.h"
#include "threads.h"

namespace asyncload {

// Unmaps whole pages, and makes way after each few of them. A huge page goes at once.
inline void unmap(Address begin, std::size_t nbytes) {
    constexpr std::size_t piece = 4 << 20;  // 0.15 ms in pages of 4 KiB
    for (const Address end = begin + nbytes; begin < end;) {
        const Address next = std::min(end, (begin / piece + 1) * piece);
        munmap(pointer(begin), next - begin);
        begin = next;
        make_way();
    }
}

}  // namespace asyncload
