#include "build_info.h"

namespace asyncload {

const char* version() noexcept {
    return ASYNCLOAD_VERSION;
}

const char* compiler() noexcept {
#if defined(__clang__)
    return "clang " __clang_version__;
#else
    return "gcc " __VERSION__;
#endif
}

}  // namespace asyncload
