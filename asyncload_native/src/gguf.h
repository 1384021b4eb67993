// The loops of the parser of GGUF headers that are long: a vocabulary's strings, and the entries of tensors.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace asyncload {

// Strings one behind the other, each its length in eight bytes, then its bytes.
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

// A tensor's entry as it stands in a header: the dimensions are ggml's, the fastest first.
struct TensorEntry {
    std::string_view name;
    std::uint32_t n_dimensions = 0;
    std::array<std::uint64_t, 4> dimensions{};
    std::int32_t type = 0;
    std::uint64_t offset = 0;
    std::uint64_t end = 0;  // the position behind it
};

// The entry at a position, if it is all there, its name has 1 to `longest` bytes and no NUL, and it has at most four
// dimensions, whose product, zeros left out, is a signed number of 64 bits. Whether the name is UTF-8 is not looked at.
std::optional<TensorEntry> read_entry(std::span<const std::byte> bytes, std::uint64_t position, std::uint64_t longest);

}  // namespace asyncload
