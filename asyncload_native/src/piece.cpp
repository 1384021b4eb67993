#include "piece.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace asyncload {

void Bounce::Free::operator()(std::byte* memory) const noexcept {
    std::free(memory);
}

std::span<std::byte> Bounce::memory() {
    static_assert(size % File::most_alignment == 0);
    if (memory_ == nullptr) memory_.reset(static_cast<std::byte*>(std::aligned_alloc(File::most_alignment, size)));
    if (memory_ == nullptr) throw Unavailable("no memory to read through", ENOMEM);
    return {memory_.get(), size};
}

std::size_t Piece::land(std::size_t count) const {
    if (memory.data() == wanted.data()) return count;
    const std::size_t landed = std::min(count - std::min(count, skip), wanted.size());
    std::memcpy(wanted.data(), memory.data() + skip, landed);
    return landed;
}

Piece first_piece(std::uint64_t offset, std::span<std::byte> buffer, const Alignment& alignment, std::size_t most,
                  Bounce& bounce) {
    const std::size_t block = alignment.offset, skip = offset % block;
    const std::size_t to_block = (block - skip) % block;
    // whether addresses are aligned where offsets are
    const bool in_step = (reinterpret_cast<std::uintptr_t>(buffer.data()) + to_block) % alignment.memory == 0;
    if (skip == 0 && in_step && buffer.size() >= block) {
        const auto memory = buffer.first(std::min(buffer.size(), most) / block * block);
        return {offset, memory, memory, 0};
    }
    const auto wanted = buffer.first(std::min(buffer.size(), (in_step ? block : Bounce::size) - skip));
    const std::size_t blocks = (skip + wanted.size() + block - 1) / block;
    return {offset - skip, bounce.memory().first(blocks * block), wanted, skip};
}

}  // namespace asyncload
