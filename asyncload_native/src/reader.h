#pragma once
#include <span>

#include "file.h"
namespace asyncload {
enum class Strategy { pread, direct, uring };
class Reader {
  public:
    virtual ~Reader() = default;
    virtual void read(const File&, std::uint64_t offset, std::span<std::byte> buffer) = 0;
};
std::unique_ptr<Reader> make_reader(Strategy);
}  // namespace asyncload
