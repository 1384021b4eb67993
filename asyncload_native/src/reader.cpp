#include "reader.h"

#include "readers.h"

namespace asyncload {

const char* name(Strategy strategy) {
    constexpr const char* names[] = {"pread", "direct", "uring", "uring-direct"};
    return names[static_cast<std::size_t>(strategy)];
}

std::unique_ptr<Reader> make_reader(Strategy strategy) {
    if (strategy == Strategy::pread) return make_pread_reader();
    if (strategy == Strategy::direct) return make_direct_reader();
    return make_uring_reader(strategy == Strategy::uring_direct);
}

std::optional<std::string> unavailable(Strategy strategy, const File& file) {
    try {
        make_reader(strategy);
        if (is_direct(strategy)) file.direct();
    } catch (const Unavailable& reason) {
        return reason.what();
    }
    return std::nullopt;
}

}  // namespace asyncload
