// The CUDA driver's functions, found at run time: this library is built without CUDA's headers and is imported on
// machines without a driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "device.h"

namespace asyncload {

// The driver's types and constants, as far as they are used here, by their names in cuda.h.

using CUresult = int;
inline constexpr CUresult CUDA_SUCCESS = 0;
inline constexpr CUresult CUDA_ERROR_OUT_OF_MEMORY = 2;
inline constexpr CUresult CUDA_ERROR_NOT_READY = 600;

using CUdevice = int;
using CUdeviceptr = std::uint64_t;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUfunction = struct CUfunc_st*;

inline constexpr unsigned CU_STREAM_NON_BLOCKING = 1;
inline constexpr int CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1;
inline constexpr unsigned CU_EVENT_BLOCKING_SYNC = 1;
inline constexpr unsigned CU_EVENT_DISABLE_TIMING = 2;
inline constexpr unsigned CU_MEMHOSTALLOC_PORTABLE = 1;
inline constexpr unsigned CU_MEMHOSTREGISTER_PORTABLE = 1;
inline constexpr int CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1;

struct CUmemLocation {
    int type;
    int id;
};

struct CUmemcpyAttributes {
    int srcAccessOrder;
    CUmemLocation srcLocHint;
    CUmemLocation dstLocHint;
    unsigned flags;
};

// There is no driver, or it lacks a function that is needed; what() says which.
class DriverUnavailableError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// A function of the driver failed.
class CudaError : public DeviceError {
  public:
    CudaError(const char* function, CUresult code, const char* name, const char* description, bool of_copy);

    const char* function() const noexcept { return function_; }  // such as "cuMemAlloc_v2"
    CUresult code() const noexcept { return code_; }             // such as 2, of the name CUDA_ERROR_OUT_OF_MEMORY

  private:
    const char* function_;
    CUresult code_;
};

class Driver;

// Whether every driver that this works with has a function.
enum class Presence : std::uint8_t { always, maybe };

// What has failed where a function fails: a copy, or work that copies are among, of which the driver does not say what
// it was; or something else.
enum class Blame : std::uint8_t { other, copy };

// One function of the driver: called, it throws CudaError where the driver does not return CUDA_SUCCESS.
template <typename... Arguments>
class DriverFunction {
  public:
    // Throws DriverUnavailableError where the driver has no such symbol and needs it. `symbol` has static storage.
    DriverFunction(const Driver& driver, const char* symbol, Presence presence = Presence::always,
                   Blame blame = Blame::other);
    DriverFunction(const Driver& driver, const char* symbol, Blame blame)
        : DriverFunction(driver, symbol, Presence::always, blame) {}
    DriverFunction(const DriverFunction&) = delete;
    DriverFunction& operator=(const DriverFunction&) = delete;

    // Whether it may be called; asked where its presence is not certain.
    explicit operator bool() const noexcept { return address_ != nullptr; }

    void operator()(Arguments... arguments) const;

    // What the driver returns, for where more than one result is right.
    CUresult result(Arguments... arguments) const noexcept { return address_(arguments...); }

    // Throws CudaError for what `result` returned.
    [[noreturn]] void fail(CUresult code) const;

  private:
    const Driver& driver_;
    const char* symbol_;
    const Blame blame_;
    CUresult (*address_)(Arguments...);
};

// The table of functions. It is not started (cuInit) and never unloaded: the driver has threads of its own.
class Driver : public std::enable_shared_from_this<Driver> {
    void* library_;  // before the functions, which are found in it

  public:
    static constexpr const char* LIBRARY = "libcuda.so.1";

    // Loads a library by its name or path. Throws DriverUnavailableError.
    explicit Driver(const char* library = LIBRARY);
    Driver(const Driver&) = delete;
    Driver& operator=(const Driver&) = delete;

    // The address of a function; nothing where the driver lacks one that it may lack.
    void* find(const char* symbol, Presence presence) const;
    [[noreturn]] void fail(const char* function, CUresult code, Blame blame = Blame::other) const;

    // Where a symbol has a suffix, it is the function's present form, to which cuda.h maps the plain name.

    const DriverFunction<unsigned> cuInit{*this, "cuInit"};
    const DriverFunction<int*> cuDriverGetVersion{*this, "cuDriverGetVersion"};
    const DriverFunction<CUresult, const char**> cuGetErrorName{*this, "cuGetErrorName"};
    const DriverFunction<CUresult, const char**> cuGetErrorString{*this, "cuGetErrorString"};

    const DriverFunction<int*> cuDeviceGetCount{*this, "cuDeviceGetCount"};
    const DriverFunction<CUdevice*, int> cuDeviceGet{*this, "cuDeviceGet"};
    const DriverFunction<char*, int, CUdevice> cuDeviceGetName{*this, "cuDeviceGetName"};
    const DriverFunction<std::size_t*, CUdevice> cuDeviceTotalMem{*this, "cuDeviceTotalMem_v2"};
    const DriverFunction<CUcontext*, CUdevice> cuDevicePrimaryCtxRetain{*this, "cuDevicePrimaryCtxRetain"};
    const DriverFunction<CUdevice> cuDevicePrimaryCtxRelease{*this, "cuDevicePrimaryCtxRelease_v2"};
    const DriverFunction<CUcontext*> cuCtxGetCurrent{*this, "cuCtxGetCurrent"};
    const DriverFunction<CUcontext> cuCtxSetCurrent{*this, "cuCtxSetCurrent"};
    const DriverFunction<int*> cuThreadExchangeStreamCaptureMode{*this, "cuThreadExchangeStreamCaptureMode"};

    const DriverFunction<CUdeviceptr*, std::size_t> cuMemAlloc{*this, "cuMemAlloc_v2"};
    const DriverFunction<CUdeviceptr> cuMemFree{*this, "cuMemFree_v2"};
    const DriverFunction<void*, std::size_t, unsigned> cuMemHostRegister{*this, "cuMemHostRegister_v2"};
    const DriverFunction<void*> cuMemHostUnregister{*this, "cuMemHostUnregister"};

    const DriverFunction<CUstream*, unsigned> cuStreamCreate{*this, "cuStreamCreate"};
    const DriverFunction<CUstream> cuStreamDestroy{*this, "cuStreamDestroy_v2"};
    const DriverFunction<CUstream> cuStreamQuery{*this, "cuStreamQuery"};
    const DriverFunction<CUstream> cuStreamSynchronize{*this, "cuStreamSynchronize"};
    const DriverFunction<CUstream, CUevent, unsigned> cuStreamWaitEvent{*this, "cuStreamWaitEvent"};

    const DriverFunction<CUevent*, unsigned> cuEventCreate{*this, "cuEventCreate"};
    const DriverFunction<CUevent> cuEventDestroy{*this, "cuEventDestroy_v2"};
    const DriverFunction<CUevent, CUstream> cuEventRecord{*this, "cuEventRecord"};
    const DriverFunction<CUevent> cuEventQuery{*this, "cuEventQuery", Blame::copy};
    const DriverFunction<CUevent> cuEventSynchronize{*this, "cuEventSynchronize", Blame::copy};
    const DriverFunction<float*, CUevent, CUevent> cuEventElapsedTime{*this, "cuEventElapsedTime"};

    const DriverFunction<CUdeviceptr, const void*, std::size_t, CUstream> cuMemcpyHtoDAsync{
        *this, "cuMemcpyHtoDAsync_v2", Blame::copy};
    // Targets, sources and sizes; how many; attributes, the copy from which on each holds, how many; where the number
    // of the copy that was refused goes; the stream. From CUDA 12.8 on, and since 13.0 not the one that cuda.h maps the
    // name to.
    const DriverFunction<CUdeviceptr*, CUdeviceptr*, std::size_t*, std::size_t, CUmemcpyAttributes*, std::size_t*,
                         std::size_t, std::size_t*, CUstream>
        cuMemcpyBatchAsync{*this, "cuMemcpyBatchAsync", Presence::maybe, Blame::copy};
    const DriverFunction<void*, CUdeviceptr, std::size_t, CUstream> cuMemcpyDtoHAsync{*this, "cuMemcpyDtoHAsync_v2"};
    const DriverFunction<CUdeviceptr, unsigned char, std::size_t, CUstream> cuMemsetD8Async{*this, "cuMemsetD8Async"};
    // Grid and block by x, y, z; bytes of shared memory; the stream; the arguments' addresses; nullptr.
    const DriverFunction<CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                         void**, void**>
        cuLaunchKernel{*this, "cuLaunchKernel"};
};

template <typename... Arguments>
DriverFunction<Arguments...>::DriverFunction(const Driver& driver, const char* symbol, Presence presence, Blame blame)
    : driver_(driver),
      symbol_(symbol),
      blame_(blame),
      address_(reinterpret_cast<CUresult (*)(Arguments...)>(driver.find(symbol, presence))) {}

template <typename... Arguments>
void DriverFunction<Arguments...>::operator()(Arguments... arguments) const {
    if (const CUresult code = address_(arguments...); code != CUDA_SUCCESS) fail(code);
}

template <typename... Arguments>
void DriverFunction<Arguments...>::fail(CUresult code) const {
    driver_.fail(symbol_, code, blame_);
}

}  // namespace asyncload
