// How a read is cut into requests that direct I/O takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "file.h"

namespace asyncload {

// Aligned memory of a reader's own, for what cannot be read in place; allocated when first used.
class Bounce {
  public:
    static constexpr std::size_t size = 512 << 10;

    // Throws `ReadError` if there is no memory.
    std::span<std::byte> memory();

  private:
    struct Free {
        void operator()(std::byte* memory) const noexcept;
    };
    std::unique_ptr<std::byte, Free> memory_;
};

// A request to the kernel, which serves the beginning of what is left to be read.
struct Piece {
    std::uint64_t offset;         // in the file
    std::span<std::byte> memory;  // where the kernel writes: the buffer itself, or a bounce
    std::span<std::byte> wanted;  // what of the buffer is served
    std::size_t skip;             // bytes in `memory` before those wanted

    // The kernel has written `count` bytes. Returns how many of those wanted are there now, copied out of the bounce.
    std::size_t land(std::size_t count) const;
};

// Where offset and address are aligned, up to `most` bytes are read in place. What there is of a block before and
// behind these goes through the bounce, and so does, in larger pieces, all of a buffer that is not aligned where the
// file is. `most` is at least `File::most_alignment`.
Piece first_piece(std::uint64_t offset, std::span<std::byte> buffer, const Alignment& alignment, std::size_t most,
                  Bounce& bounce);

}  // namespace asyncload
