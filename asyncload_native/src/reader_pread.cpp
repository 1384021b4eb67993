#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>

#include "readers.h"
#include "threads.h"

namespace asyncload {

namespace {

class PreadReader final : public Reader {
  public:
    void read(const File& file, std::uint64_t offset, std::span<std::byte> buffer) override {
        pread_all(file, offset, buffer);
    }
};

}  // namespace

void pread_all(const File& file, std::uint64_t offset, std::span<std::byte> buffer) {
    while (!buffer.empty()) {
        const std::size_t most = std::min(buffer.size(), stretch);
        const ssize_t count = ::pread(file.fd(), buffer.data(), most, static_cast<off_t>(offset));
        if (count == 0) {
            file.check_unchanged();
            const std::uint64_t end = std::min(offset, file.size());  // which has not changed
            throw ReadError(ReadError::Kind::ended, file.path() + ": the file ended at byte " + std::to_string(end), 0,
                            end);
        }
        if (count > 0) {
            offset += static_cast<std::uint64_t>(count);
            buffer = buffer.subspan(static_cast<std::size_t>(count));
            if (!buffer.empty()) make_way();
        } else if (errno != EINTR) {
            throw file.failed(errno, offset);
        }
    }
}

std::unique_ptr<Reader> make_pread_reader() {
    return std::make_unique<PreadReader>();
}

}  // namespace asyncload
