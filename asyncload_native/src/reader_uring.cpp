#include <algorithm>
#include <array>
#include <cerrno>

#include "piece.h"
#include "readers.h"
#include "ring.h"

namespace asyncload {

namespace {

constexpr unsigned depth = 8;                  // requests in flight
constexpr std::size_t piece_size = 512 << 10;  // of each, at most

class UringReader final : public Reader {
  public:
    explicit UringReader(bool direct) : direct_(direct) {}

    void read(const File& file, std::uint64_t offset, std::span<std::byte> buffer) override {
        try {
            move(file, offset, buffer);
        } catch (...) {
            ring_.drain();
            for (Slot& slot : slots_) slot.rest = {};
            throw;
        }
    }

  private:
    // A request in flight, or, where nothing is left, idle.
    struct Slot {
        std::span<std::byte> rest;  // to be read, with this request and further ones
        std::uint64_t offset;       // of that in the file
        Piece piece;
        iovec target;
        bool sleeping;
        Bounce bounce;
    };

    void move(const File& file, std::uint64_t offset, std::span<std::byte> buffer) {
        const std::uint64_t begin = offset;
        fd_ = direct_ ? file.direct().descriptor.get() : file.fd();
        alignment_ = direct_ ? file.direct().alignment : Alignment{};
        while (!buffer.empty() || ring_.busy()) {
            for (Slot& slot : slots_) {
                if (buffer.empty()) break;
                if (!slot.rest.empty()) continue;
                const std::size_t taken = start(slot, offset, buffer);
                slot.rest = buffer.first(taken);
                offset += taken;
                buffer = buffer.subspan(taken);
            }
            if (const int error = ring_.wait(); error != 0) throw file.failed(error, begin);
            while (const auto completion = ring_.pop()) finish(file, slots_[completion->tag], completion->result);
        }
    }

    // Makes a request for the beginning of a buffer; returns how many bytes of it.
    std::size_t start(Slot& slot, std::uint64_t offset, std::span<std::byte> buffer) {
        slot.offset = offset;
        slot.piece = first_piece(offset, buffer, alignment_, piece_size, slot.bounce);
        slot.target = {slot.piece.memory.data(), slot.piece.memory.size()};
        slot.sleeping = false;
        push(slot);
        return slot.piece.wanted.size();
    }

    void push(const Slot& slot) {
        ring_.push(fd_, slot.target, slot.piece.offset, static_cast<std::uint64_t>(&slot - slots_.data()),
                   slot.sleeping);
    }

    // A request has ended, well or not: makes the next one for what is left.
    void finish(const File& file, Slot& slot, int result) {
        if (result == -EINTR || (result == -EAGAIN && !slot.sleeping)) {
            slot.sleeping = result == -EAGAIN;
            return push(slot);
        }
        if (result < 0) throw file.failed(-result, slot.offset);
        std::size_t landed = slot.piece.land(static_cast<std::size_t>(result));
        if (landed == 0) {
            pread_all(file, slot.offset, slot.rest);
            landed = slot.rest.size();
        }
        slot.rest = slot.rest.subspan(landed);
        if (!slot.rest.empty()) start(slot, slot.offset + landed, slot.rest);
    }

    const bool direct_;
    int fd_ = -1;          // of the read under way
    Alignment alignment_;  // of the read under way
    std::array<Slot, depth> slots_{};
    Ring ring_{depth};
};

}  // namespace

std::unique_ptr<Reader> make_uring_reader(bool direct) {
    return std::make_unique<UringReader>(direct);
}

}  // namespace asyncload
