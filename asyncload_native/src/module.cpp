// The only file that knows Python: what the engine gives, as `asyncload_native._native`.
#include <nanobind/nanobind.h>

#include "build_info.h"

namespace nb = nanobind;

NB_MODULE(_native, module) {
    module.doc() = "The data path of asyncload in C++ threads, which never need the interpreter lock.";
    module.attr("version") = asyncload::version();
    module.attr("compiler") = asyncload::compiler();
}
