// How this library was built.
#pragma once

namespace asyncload {

// The version of the package that it was built from.
const char* version() noexcept;

// The compiler's name and version.
const char* compiler() noexcept;

}  // namespace asyncload
