#include "gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

namespace asyncload {

namespace {

static_assert(std::endian::native == std::endian::little);  // as the format is

// Takes numbers off the front, as long as there are enough bytes.
class Cursor {
  public:
    Cursor(std::span<const std::byte> bytes, std::uint64_t position)
        : bytes_(bytes), at_(std::min<std::uint64_t>(position, bytes.size())) {}

    template <typename Number>
    bool take(Number& number) {
        if (bytes_.size() - at_ < sizeof number) return false;
        std::memcpy(&number, bytes_.data() + at_, sizeof number);
        at_ += sizeof number;
        return true;
    }

    bool take(std::string_view& text, std::uint64_t length) {
        if (bytes_.size() - at_ < length) return false;
        text = {reinterpret_cast<const char*>(bytes_.data() + at_), static_cast<std::size_t>(length)};
        at_ += length;
        return true;
    }

    std::uint64_t position() const { return at_; }

  private:
    const std::span<const std::byte> bytes_;
    std::uint64_t at_;
};

}  // namespace

SkippedStrings skip_strings(std::span<const std::byte> bytes, std::uint64_t position, std::uint64_t first,
                            std::uint64_t count, std::uint64_t every) {
    SkippedStrings skipped{.end = position, .last = position, .marks = {}};
    std::uint64_t until_mark = (every - first % every) % every;
    for (; skipped.count < count; ++skipped.count) {
        std::uint64_t length = 0;
        Cursor cursor(bytes, skipped.end);
        if (!cursor.take(length)) break;
        if (until_mark == 0) {
            skipped.marks.push_back(skipped.end);
            until_mark = every;
        }
        --until_mark;
        skipped.last = skipped.end;
        const std::uint64_t begin = cursor.position();
        skipped.end = length > std::numeric_limits<std::uint64_t>::max() - begin
                          ? std::numeric_limits<std::uint64_t>::max()  // no file is that long
                          : begin + length;
    }
    return skipped;
}

std::optional<TensorEntry> read_entry(std::span<const std::byte> bytes, std::uint64_t position, std::uint64_t longest) {
    TensorEntry entry;
    Cursor cursor(bytes, position);
    std::uint64_t length = 0;
    if (!cursor.take(length) || length == 0 || length > longest || !cursor.take(entry.name, length) ||
        entry.name.find('\0') != std::string_view::npos || !cursor.take(entry.n_dimensions) ||
        entry.n_dimensions > entry.dimensions.size())
        return std::nullopt;
    std::uint64_t room = std::numeric_limits<std::int64_t>::max();
    for (std::uint64_t& dimension : std::span(entry.dimensions).first(entry.n_dimensions)) {
        if (!cursor.take(dimension) || dimension > room) return std::nullopt;
        room /= std::max<std::uint64_t>(dimension, 1);
    }
    if (!cursor.take(entry.type) || !cursor.take(entry.offset)) return std::nullopt;
    entry.end = cursor.position();
    return entry;
}

}  // namespace asyncload
