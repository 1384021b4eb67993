// Strings as a GGUF header has them, one behind the other: each is its length in eight bytes, then its bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace asyncload {

struct SkippedStrings {
    std::uint64_t count = 0;           // that were passed over
    std::uint64_t end = 0;             // the position behind the last one; beyond all bytes if that is not all there
    std::uint64_t last = 0;            // that of the last one
    std::vector<std::uint64_t> marks;  // those of strings whose index is a multiple of `every`
};

// Passes over at most `count` strings from a position on, the first of which has the index `first`, as long as the
// lengths are there.
SkippedStrings skip_strings(std::span<const std::byte> bytes, std::uint64_t position, std::uint64_t first,
                            std::uint64_t count, std::uint64_t every);

}  // namespace asyncload
