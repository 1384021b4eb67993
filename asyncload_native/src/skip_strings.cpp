#include "skip_strings.h"

#include <bit>
#include <cstring>
#include <limits>

namespace asyncload {

SkippedStrings skip_strings(std::span<const std::byte> bytes, std::uint64_t position, std::uint64_t first,
                            std::uint64_t count, std::uint64_t every) {
    static_assert(std::endian::native == std::endian::little);
    SkippedStrings skipped{.end = position, .last = position, .marks = {}};
    std::uint64_t until_mark = (every - first % every) % every;
    for (; skipped.count < count; ++skipped.count) {
        std::uint64_t length = 0;
        if (bytes.size() < sizeof length || skipped.end > bytes.size() - sizeof length) break;
        if (until_mark == 0) {
            skipped.marks.push_back(skipped.end);
            until_mark = every;
        }
        --until_mark;
        std::memcpy(&length, &bytes[skipped.end], sizeof length);
        skipped.last = skipped.end;
        const std::uint64_t begin = skipped.end + sizeof length;
        skipped.end = length > std::numeric_limits<std::uint64_t>::max() - begin
                          ? std::numeric_limits<std::uint64_t>::max()  // no file is that long
                          : begin + length;
    }
    return skipped;
}

}  // namespace asyncload
