#include "driver.h"

#include <dlfcn.h>

namespace asyncload {

namespace {

void* load(const char* library) {
    if (void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL)) return handle;
    const char* reason = dlerror();
    throw DriverUnavailableError(reason ? reason : std::string(library) + " cannot be loaded");
}

}  // namespace

CudaError::CudaError(const char* function, CUresult code, const char* name, const char* description, bool of_copy)
    : DeviceError(std::string(function) + ": " + name + " (" + std::to_string(code) + "): " + description, name,
                  of_copy),
      function_(function),
      code_(code) {}

Driver::Driver(const char* library) : library_(load(library)) {}

void* Driver::find(const char* symbol, Presence presence) const {
    if (void* address = dlsym(library_, symbol); address || presence == Presence::maybe) return address;
    const char* reason = dlerror();
    throw DriverUnavailableError(reason ? reason : std::string("the driver has no ") + symbol);
}

void Driver::fail(const char* function, CUresult code, Blame blame) const {
    const char* name = nullptr;
    const char* description = nullptr;
    cuGetErrorName.result(code, &name);
    cuGetErrorString.result(code, &description);
    throw CudaError(function, code, name ? name : "an unknown error", description ? description : "no description",
                    blame == Blame::copy);
}

}  // namespace asyncload
