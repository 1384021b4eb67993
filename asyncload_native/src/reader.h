// Ways of reading a file, behind one interface.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "file.h"

namespace asyncload {

// Through the page cache or past it (`direct`); by one call after another, or with several requests in flight
// (`uring`).
enum class Strategy : std::uint8_t { pread, direct, uring, uring_direct };

inline constexpr Strategy all_strategies[] = {Strategy::pread, Strategy::direct, Strategy::uring,
                                              Strategy::uring_direct};

const char* name(Strategy strategy);

constexpr bool is_direct(Strategy strategy) {
    return strategy == Strategy::direct || strategy == Strategy::uring_direct;
}

// One thread's way of reading.
class Reader {
  public:
    virtual ~Reader() = default;
    // Fills all of `buffer` from byte `offset` on, or throws `ReadError`, and nothing else; `Unavailable` where the
    // file does not serve it. Once it has returned or thrown, nothing writes to the buffer. Whether the file is still
    // the one that was opened is for `File::check_unchanged` to say. Reading direct is fastest where `offset` and the
    // buffer's address leave the same remainder by 4096: else the bytes go through memory of the reader's own.
    virtual void read(const File& file, std::uint64_t offset, std::span<std::byte> buffer) = 0;
};

// Throws `Unavailable` where the system does not serve it.
std::unique_ptr<Reader> make_reader(Strategy strategy);

// Why a file cannot be read like this here, or nothing. Throws `ReadError` if the file has changed.
std::optional<std::string> unavailable(Strategy strategy, const File& file);

}  // namespace asyncload
