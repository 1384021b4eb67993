// The readers, a file for each; only reader.cpp names them.
#pragma once

#include <memory>

#include "reader.h"

namespace asyncload {

std::unique_ptr<Reader> make_pread_reader();
std::unique_ptr<Reader> make_direct_reader();
std::unique_ptr<Reader> make_uring_reader(bool direct);

// Reads through the page cache, by one call after another. What another way of reading leaves over is read so, too: it
// says where a file ends.
void pread_all(const File& file, std::uint64_t offset, std::span<std::byte> buffer);

}  // namespace asyncload
