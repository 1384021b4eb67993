#include <unistd.h>

#include <cerrno>

#include "piece.h"
#include "readers.h"

namespace asyncload {

namespace {

constexpr std::size_t most = 1 << 30;  // the kernel takes little more at once

class DirectReader final : public Reader {
  public:
    void read(const File& file, std::uint64_t offset, std::span<std::byte> buffer) override {
        const File::Direct& direct = file.direct();
        while (!buffer.empty()) {
            const Piece piece = first_piece(offset, buffer, direct.alignment, most, bounce_);
            const ssize_t count = ::pread(direct.descriptor.get(), piece.memory.data(), piece.memory.size(),
                                          static_cast<off_t>(piece.offset));
            if (count < 0) {
                if (errno == EINTR) continue;
                throw file.failed(errno, offset);
            }
            std::size_t landed = piece.land(static_cast<std::size_t>(count));
            if (landed == 0) {
                pread_all(file, offset, piece.wanted);
                landed = piece.wanted.size();
            }
            offset += landed;
            buffer = buffer.subspan(landed);
        }
    }

  private:
    Bounce bounce_;
};

}  // namespace

std::unique_ptr<Reader> make_direct_reader() {
    return std::make_unique<DirectReader>();
}

}  // namespace asyncload
