// A CUDA driver for tests, on the host's memory: the functions of asyncload_native/src/driver.h by their names.
//
// With STUB_CUDA_OLD it is one of before CUDA 12.8, which lacks cuMemcpyBatchAsync.
//
// Each stream is a thread, so that work is as asynchronous as on a device: a copy reads its source when the thread
// comes to it. What a device would punish at some time, or never, is an error or a violation here. The functions
// `stub_...` are the tests' own.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "driver.h"

using asyncload::CUcontext;
using asyncload::CUdevice;
using asyncload::CUdeviceptr;
using asyncload::CUevent;
using asyncload::CUfunction;
using asyncload::CUmemcpyAttributes;
using asyncload::CUresult;
using asyncload::CUstream;

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t ALIGNMENT = 256;  // of device memory
constexpr CUresult SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101,
                   INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_READY = 600, ALREADY_REGISTERED = 712,
                   NOT_REGISTERED = 713, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900;

const std::map<CUresult, std::pair<const char*, const char*>> RESULTS = {
    {SUCCESS, {"CUDA_SUCCESS", "no error"}},
    {INVALID_VALUE, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {OUT_OF_MEMORY, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {NOT_INITIALIZED, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {INVALID_DEVICE, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {INVALID_CONTEXT, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {INVALID_HANDLE, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {NOT_READY, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {ALREADY_REGISTERED, {"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the memory is registered"}},
    {NOT_REGISTERED, {"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "the pointer is of no registered memory"}},
    {LAUNCH_FAILED, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    {CAPTURE_UNSUPPORTED, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not permitted when a stream is capturing"}},
};

struct Range {
    std::uint64_t address = 0;
    std::size_t nbytes = 0;

    bool overlaps(const Range& other) const {
        return address < other.address + other.nbytes && other.address < address + nbytes;
    }
};

template <typename Pointer>
Range range_of(Pointer address, std::size_t nbytes) {
    if constexpr (std::is_pointer_v<Pointer>) {
        return {reinterpret_cast<std::uint64_t>(address), nbytes};
    } else {
        return {address, nbytes};
    }
}

template <typename Pointer>
Pointer pointer(std::uint64_t address) {
    return reinterpret_cast<Pointer>(address);
}

// One recording of an event.
struct Mark {
    bool passed = false;
    Clock::time_point at;
};

struct Event {
    bool timed = false;
    std::shared_ptr<Mark> mark;  // of the last recording
};

struct Work {
    std::function<CUresult()> run;      // without the lock
    std::vector<Range> ranges;          // what it reads and writes
    bool upload = false;                // it comes over the bus
    std::shared_ptr<Mark> passes = {};  // the recording that it is
    std::shared_ptr<Mark> awaits = {};  // the recording that it waits for
};

struct Stream {
    std::deque<Work> work;
    std::uint64_t enqueued = 0, ended = 0;  // work, ever
    bool closed = false;
};

// A kernel that decodes blocks, as a function of the host.
struct Kernel {
    asyncload::HostKernel run;
    std::uint64_t blocks_per_group;
};

struct Fault {
    std::size_t calls = 0;  // until it strikes
    CUresult code = SUCCESS;
    bool lasting = false;  // it strikes all calls after that, too
};

// All of it under one lock. It is never destroyed, as the streams' threads may outlive main.
struct State {
    std::mutex lock;
    std::condition_variable changed;
    bool started = false;
    int contexts = 0;
    CUresult broken = SUCCESS;  // what failed on the device: every call returns it from then on
    std::size_t capacity = 0;
    std::map<std::uint64_t, std::unique_ptr<void, decltype(&std::free)>> memory;
    std::map<std::uint64_t, std::size_t> sizes;       // of the memory
    std::map<std::uint64_t, std::size_t> registered;  // host memory
    std::map<CUstream, std::shared_ptr<Stream>> streams;
    std::set<std::shared_ptr<Stream>> threads;  // of the streams, and of those destroyed that still work
    std::map<CUevent, std::unique_ptr<Event>> events;
    std::vector<std::unique_ptr<Kernel>> kernels;
    bool held = false;
    bool stalled = false;
    std::optional<std::thread::id> capturing;  // the thread that captures a graph
    std::chrono::nanoseconds delay{0};
    std::map<std::string, Fault> faults;
    std::map<std::string, std::size_t> calls;
    std::map<std::string, std::set<std::thread::id>> callers;
    std::vector<std::string> violations;
};

State& state = *new State;
thread_local CUcontext current = nullptr;
thread_local std::size_t calls_here = 0;  // that this thread has made
thread_local int capture_mode = 0;        // of this thread; it is CU_STREAM_CAPTURE_MODE_GLOBAL at first
const CUcontext the_context = reinterpret_cast<CUcontext>(&state);

using Lock = std::unique_lock<std::mutex>;

// Counts a call, and returns the fault that strikes it.
CUresult count(const std::string& function) {
    ++calls_here;
    ++state.calls[function];
    state.callers[function].insert(std::this_thread::get_id());
    if (const auto fault = state.faults.find(function); fault != state.faults.end() && --fault->second.calls == 0) {
        const CUresult code = fault->second.code;
        if (fault->second.lasting)
            fault->second.calls = 1;
        else
            state.faults.erase(fault);
        return code;
    }
    return SUCCESS;
}

// What every call that gives something back begins with; it does so whatever failed on the device.
CUresult enter_to_free(const char* function) {
    if (const CUresult code = count(function)) return code;
    if (!state.started) return NOT_INITIALIZED;
    if (state.capturing && *state.capturing != std::this_thread::get_id() && capture_mode == 0) {
        state.violations.push_back(std::string(function) + " would have ended another thread's capture");
        return CAPTURE_UNSUPPORTED;
    }
    return current == nullptr ? INVALID_CONTEXT : SUCCESS;
}

// What every other call on a context begins with.
CUresult enter(const char* function) {
    const CUresult code = enter_to_free(function);
    return code ? code : state.broken;
}

void run(const std::shared_ptr<Stream>& stream) {
    Lock lock(state.lock);
    for (;;) {
        state.changed.wait(lock, [&] {
            if (stream->work.empty()) return stream->closed;
            const auto& awaits = stream->work.front().awaits;
            return !state.held && (!awaits || awaits->passed);
        });
        if (stream->work.empty()) break;
        Work& work = stream->work.front();  // stays where it is: until then the stream is not done
        if (work.run && state.broken == SUCCESS) {
            CUresult code = count("work");
            const auto delay = work.upload ? state.delay : std::chrono::nanoseconds{0};
            lock.unlock();
            if (delay.count() > 0) std::this_thread::sleep_for(delay);
            if (code == SUCCESS) code = work.run();
            lock.lock();
            if (code != SUCCESS && state.broken == SUCCESS) state.broken = code;
        }
        if (work.passes) {
            work.passes->passed = true;
            work.passes->at = Clock::now();
        }
        stream->work.pop_front();
        ++stream->ended;
        state.changed.notify_all();
    }
    state.threads.erase(stream);
    state.changed.notify_all();
}

CUresult enqueue(CUstream stream, Work work) {
    const auto found = state.streams.find(stream);
    if (found == state.streams.end()) return INVALID_HANDLE;
    found->second->work.push_back(std::move(work));
    ++found->second->enqueued;
    state.changed.notify_all();
    return SUCCESS;
}

bool in_device_memory(const Range& range) {
    const auto next = state.sizes.upper_bound(range.address);
    if (next == state.sizes.begin()) return false;
    const auto& [address, nbytes] = *std::prev(next);
    return range.address + range.nbytes <= address + nbytes;
}

// What is given back must have no work on it any more.
void expect_no_work_on(const Range& range, const char* what) {
    for (const auto& stream : state.threads) {
        for (const Work& work : stream->work) {
            if (std::ranges::any_of(work.ranges, [&](const Range& used) { return used.overlaps(range); })) {
                state.violations.push_back(what);
                return;
            }
        }
    }
}

CUresult copy(CUstream stream, Range target, Range source, bool upload) {
    if (upload) ++state.calls["upload"];
    return enqueue(stream, {[target, source] {
                                std::memcpy(pointer<void*>(target.address), pointer<const void*>(source.address),
                                            source.nbytes);
                                return SUCCESS;
                            },
                            {target, source},
                            upload});
}

}  // namespace

extern "C" {

// --- the driver -----------------------------------------------------------------------------------------------------

CUresult cuInit(unsigned) {
    const Lock lock(state.lock);
    if (const CUresult code = count(__func__)) return code;
    state.started = true;
    return SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
    const Lock lock(state.lock);
    if (const CUresult code = count(__func__)) return code;
    *version = 13000;
    return SUCCESS;
}

CUresult cuGetErrorName(CUresult code, const char** name) {
    const auto found = RESULTS.find(code);
    *name = found == RESULTS.end() ? nullptr : found->second.first;
    return *name ? SUCCESS : INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult code, const char** description) {
    const auto found = RESULTS.find(code);
    *description = found == RESULTS.end() ? nullptr : found->second.second;
    return *description ? SUCCESS : INVALID_VALUE;
}

CUresult cuDeviceGetCount(int* n_devices) {
    const Lock lock(state.lock);
    if (const CUresult code = count(__func__)) return code;
    *n_devices = 1;
    return state.started ? SUCCESS : NOT_INITIALIZED;
}

CUresult cuDeviceGet(CUdevice* device, int index) {
    const Lock lock(state.lock);
    if (const CUresult code = count(__func__)) return code;
    if (!state.started) return NOT_INITIALIZED;
    *device = index;
    return index == 0 ? SUCCESS : INVALID_DEVICE;
}

CUresult cuDeviceGetName(char* name, int nbytes, CUdevice device) {
    const Lock lock(state.lock);
    if (const CUresult code = count(__func__)) return code;
    std::strncpy(name, "stub", static_cast<std::size_t>(nbytes));
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

CUresult cuDeviceTotalMem_v2(std::size_t* nbytes, CUdevice device) {
    const Lock lock(state.lock);
    if (const CUresult code = count(__func__)) return code;
    *nbytes = state.capacity;
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    const Lock lock(state.lock);
    if (const CUresult code = count(__func__)) return code;
    if (!state.started) return NOT_INITIALIZED;
    if (device != 0) return INVALID_DEVICE;
    ++state.contexts;
    *context = the_context;
    return SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    const Lock lock(state.lock);
    if (const CUresult code = count(__func__)) return code;
    if (device != 0) return INVALID_DEVICE;
    if (state.contexts == 0) return INVALID_CONTEXT;
    --state.contexts;
    return SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    const Lock lock(state.lock);
    *context = current;
    return count(__func__);
}

CUresult cuCtxSetCurrent(CUcontext context) {
    const Lock lock(state.lock);
    if (const CUresult code = count(__func__)) return code;
    if (context != nullptr && context != the_context) return INVALID_CONTEXT;
    current = context;
    return SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
    const Lock lock(state.lock);
    if (const CUresult code = count(__func__)) return code;
    std::swap(*mode, capture_mode);
    return SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr* address, std::size_t nbytes) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    if (nbytes == 0) return INVALID_VALUE;
    std::size_t allocated = 0;
    for (const auto& [_, size] : state.sizes) allocated += size;
    if (nbytes > state.capacity - allocated) return OUT_OF_MEMORY;
    void* block = std::aligned_alloc(ALIGNMENT, (nbytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (block == nullptr) return OUT_OF_MEMORY;
    std::memset(block, 0xA5, nbytes);  // what was never written shows
    *address = range_of(block, nbytes).address;
    state.memory.emplace(*address, std::unique_ptr<void, decltype(&std::free)>(block, &std::free));
    state.sizes[*address] = nbytes;
    return SUCCESS;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    const Lock lock(state.lock);
    if (const CUresult code = enter_to_free(__func__)) return code;
    const auto found = state.sizes.find(address);
    if (found == state.sizes.end()) return INVALID_VALUE;
    expect_no_work_on({address, found->second}, "device memory was freed under work on it");
    state.sizes.erase(found);
    state.memory.erase(address);
    return state.broken;
}

CUresult cuMemHostRegister_v2(void* address, std::size_t nbytes, unsigned) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    const Range range = range_of(address, nbytes);
    for (const auto& [other, size] : state.registered) {
        if (range.overlaps({other, size})) return ALREADY_REGISTERED;
    }
    state.registered[range.address] = nbytes;
    return SUCCESS;
}

CUresult cuMemHostUnregister(void* address) {
    const Lock lock(state.lock);
    if (const CUresult code = enter_to_free(__func__)) return code;
    const auto found = state.registered.find(range_of(address, 0).address);
    if (found == state.registered.end()) return NOT_REGISTERED;
    expect_no_work_on({found->first, found->second}, "host memory was unregistered under work on it");
    state.registered.erase(found);
    return state.broken;
}

CUresult cuStreamCreate(CUstream* handle, unsigned) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    auto stream = std::make_shared<Stream>();
    *handle = reinterpret_cast<CUstream>(stream.get());
    state.streams[*handle] = stream;
    state.threads.insert(stream);
    std::thread(run, std::move(stream)).detach();
    return SUCCESS;
}

// As on a device it does not wait: what is enqueued is done yet.
CUresult cuStreamDestroy_v2(CUstream handle) {
    const Lock lock(state.lock);
    if (const CUresult code = enter_to_free(__func__)) return code;
    const auto found = state.streams.find(handle);
    if (found == state.streams.end()) return INVALID_HANDLE;
    found->second->closed = true;
    state.streams.erase(found);
    state.changed.notify_all();
    return state.broken;
}

CUresult cuStreamQuery(CUstream handle) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    const auto found = state.streams.find(handle);
    if (found == state.streams.end()) return INVALID_HANDLE;
    return found->second->work.empty() ? SUCCESS : NOT_READY;
}

CUresult cuStreamSynchronize(CUstream handle) {
    Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    const auto found = state.streams.find(handle);
    if (found == state.streams.end()) return INVALID_HANDLE;
    const auto stream = found->second;
    state.changed.wait(lock, [&] { return stream->work.empty(); });
    return state.broken;
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent handle, unsigned) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    const auto event = state.events.find(handle);
    if (event == state.events.end()) return INVALID_HANDLE;
    return enqueue(stream, {.run = {}, .ranges = {}, .awaits = event->second->mark});
}

CUresult cuEventCreate(CUevent* handle, unsigned flags) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    auto event = std::make_unique<Event>();
    event->timed = (flags & asyncload::CU_EVENT_DISABLE_TIMING) == 0;
    *handle = reinterpret_cast<CUevent>(event.get());
    state.events[*handle] = std::move(event);
    return SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent handle) {
    const Lock lock(state.lock);
    if (const CUresult code = enter_to_free(__func__)) return code;
    return state.events.erase(handle) ? state.broken : INVALID_HANDLE;
}

CUresult cuEventRecord(CUevent handle, CUstream stream) {
    Lock lock(state.lock);
    state.changed.wait(lock, [] { return !state.stalled; });
    if (const CUresult code = enter(__func__)) return code;
    const auto event = state.events.find(handle);
    if (event == state.events.end()) return INVALID_HANDLE;
    auto mark = std::make_shared<Mark>();
    if (const CUresult code = enqueue(stream, {.run = {}, .ranges = {}, .passes = mark})) return code;
    event->second->mark = std::move(mark);
    return SUCCESS;
}

CUresult cuEventQuery(CUevent handle) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    const auto event = state.events.find(handle);
    if (event == state.events.end()) return INVALID_HANDLE;
    const auto& mark = event->second->mark;
    return !mark || mark->passed ? SUCCESS : NOT_READY;
}

CUresult cuEventSynchronize(CUevent handle) {
    Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    const auto event = state.events.find(handle);
    if (event == state.events.end()) return INVALID_HANDLE;
    const auto mark = event->second->mark;
    state.changed.wait(lock, [&] { return !mark || mark->passed; });
    return state.broken;
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent from, CUevent to) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    const auto begin = state.events.find(from), end = state.events.find(to);
    for (const auto& event : {begin, end}) {
        if (event == state.events.end() || !event->second->timed || !event->second->mark) return INVALID_HANDLE;
        if (!event->second->mark->passed) return NOT_READY;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->second->mark->at - begin->second->mark->at).count();
    return SUCCESS;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void* source, std::size_t nbytes, CUstream stream) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    if (!in_device_memory({target, nbytes})) return INVALID_VALUE;
    return copy(stream, {target, nbytes}, range_of(source, nbytes), true);
}

#ifndef STUB_CUDA_OLD
CUresult cuMemcpyBatchAsync(CUdeviceptr* targets, CUdeviceptr* sources, std::size_t* sizes, std::size_t n_copies,
                            CUmemcpyAttributes* attributes, std::size_t* first, std::size_t n_attributes,
                            std::size_t* refused, CUstream stream) {
    const Lock lock(state.lock);
    *refused = SIZE_MAX;
    if (const CUresult code = enter(__func__)) return code;
    if (n_copies == 0 || n_attributes != 1 || *first != 0) return INVALID_VALUE;
    if (attributes->srcAccessOrder != asyncload::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM) return INVALID_VALUE;
    for (std::size_t at = 0; at < n_copies; ++at) {
        *refused = at;
        if (!in_device_memory({targets[at], sizes[at]})) return INVALID_VALUE;
        if (const CUresult code = copy(stream, {targets[at], sizes[at]}, {sources[at], sizes[at]}, true)) return code;
    }
    return SUCCESS;
}
#endif

CUresult cuMemcpyDtoHAsync_v2(void* target, CUdeviceptr source, std::size_t nbytes, CUstream stream) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    if (!in_device_memory({source, nbytes})) return INVALID_VALUE;
    return copy(stream, range_of(target, nbytes), {source, nbytes}, false);
}

CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, std::size_t nbytes, CUstream stream) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    if (!in_device_memory({target, nbytes})) return INVALID_VALUE;
    return enqueue(stream, {[=] {
                                std::memset(pointer<void*>(target), value, nbytes);
                                return SUCCESS;
                            },
                            {{target, nbytes}}});
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned, unsigned, unsigned, unsigned, unsigned,
                        unsigned, CUstream stream, void** arguments, void**) {
    const Lock lock(state.lock);
    if (const CUresult code = enter(__func__)) return code;
    const auto kernel = std::ranges::find_if(
        state.kernels, [&](const auto& known) { return reinterpret_cast<CUfunction>(known.get()) == function; });
    if (kernel == state.kernels.end()) return INVALID_HANDLE;
    std::uint64_t source = 0, target = 0, n_blocks = 0;
    std::memcpy(&source, arguments[0], sizeof source);
    std::memcpy(&target, arguments[1], sizeof target);
    std::memcpy(&n_blocks, arguments[2], sizeof n_blocks);
    if (!in_device_memory({source, 1}) || !in_device_memory({target, 1})) return INVALID_VALUE;
    const std::uint64_t reached = std::min(n_blocks, grid_x * (*kernel)->blocks_per_group);
    return enqueue(stream, {[=, run = (*kernel)->run] {
                                const auto word = [](std::uint64_t value) { return static_cast<std::intptr_t>(value); };
                                return run(word(source), word(target), word(reached)) == 1 ? SUCCESS : LAUNCH_FAILED;
                            },
                            {{source, 1}, {target, 1}}});
}

// --- the tests' own -------------------------------------------------------------------------------------------------

// As it was when it was loaded, with this much device memory; what is left of the tests before is dropped.
void stub_reset(std::size_t capacity) {
    Lock lock(state.lock);
    state.held = state.stalled = false;
    state.capturing.reset();
    state.delay = {};
    for (const auto& [_, stream] : state.streams) stream->closed = true;
    state.streams.clear();
    state.changed.notify_all();
    state.changed.wait(lock, [] { return state.threads.empty(); });
    state.events.clear();
    state.memory.clear();
    state.sizes.clear();
    state.registered.clear();
    state.kernels.clear();
    state.contexts = 0;
    state.broken = SUCCESS;
    state.started = false;
    state.capacity = capacity;
    state.faults.clear();
    state.calls.clear();
    state.callers.clear();
    state.violations.clear();
}

// Has the n-th call (from 1) from now on of a function fail, or with "work" the n-th copy or kernel on any stream; if
// it lasts, all that follow, too.
void stub_fail(const char* function, std::size_t nth, CUresult code, bool lasting) {
    const Lock lock(state.lock);
    state.faults[function] = {nth, code, lasting};
}

// How often a function was called; with "work" how many copies and kernels were begun, with "upload" how many copies to
// the device were enqueued.
std::size_t stub_calls(const char* function) {
    const Lock lock(state.lock);
    return state.calls[function];
}

// How many threads have called a function since they were forgotten.
std::size_t stub_callers(const char* function) {
    const Lock lock(state.lock);
    return state.callers[function].size();
}

void stub_forget_callers() {
    const Lock lock(state.lock);
    state.callers.clear();
}

// While it is held, no stream begins anything.
void stub_hold(bool held) {
    const Lock lock(state.lock);
    state.held = held;
    state.changed.notify_all();
}

// While it is stalled, a call of cuEventRecord does not return, as one does not behind another thread's allocation.
void stub_stall(bool stalled) {
    const Lock lock(state.lock);
    state.stalled = stalled;
    state.changed.notify_all();
}

// While the calling thread captures a graph, in the global mode, calls of threads that have not left that mode are
// refused: all that a thread of ours may make but those that say who it is.
void stub_capture(bool begins) {
    const Lock lock(state.lock);
    if (begins)
        state.capturing = std::this_thread::get_id();
    else
        state.capturing.reset();
}

// Returns when all has ended that is enqueued by now, on whatever stream.
void stub_barrier() {
    Lock lock(state.lock);
    std::vector<std::pair<std::shared_ptr<Stream>, std::uint64_t>> before;
    for (const auto& stream : state.threads) before.emplace_back(stream, stream->enqueued);
    state.changed.wait(lock, [&] {
        return std::ranges::all_of(before, [](const auto& each) { return each.first->ended >= each.second; });
    });
}

// How many calls of the driver the calling thread has made.
std::size_t stub_calls_here() {
    return calls_here;
}

// Each copy to the device takes this much longer.
void stub_delay(std::uint64_t nanoseconds) {
    const Lock lock(state.lock);
    state.delay = std::chrono::nanoseconds(nanoseconds);
}

// A kernel that is a function of the host, called once a launch with the source, the target and the number of blocks,
// at most as many as the launched groups decode: so a grid that is too small shows.
CUfunction stub_kernel(asyncload::HostKernel run, std::uint64_t blocks_per_group) {
    const Lock lock(state.lock);
    state.kernels.push_back(std::make_unique<Kernel>(Kernel{run, blocks_per_group}));
    return reinterpret_cast<CUfunction>(state.kernels.back().get());
}

// A host kernel: each byte becomes two. Fails when it is told to.
std::int32_t stub_double(const unsigned char* source, unsigned char* target, std::intptr_t n_blocks) {
    {
        const Lock lock(state.lock);
        if (count(__func__) != SUCCESS) return 0;
    }
    for (std::intptr_t at = 0; at < n_blocks; ++at) target[2 * at] = target[2 * at + 1] = source[at];
    return 1;
}

// A host kernel: sleeps for a microsecond a block.
std::int32_t stub_sleep(const unsigned char*, unsigned char*, std::intptr_t n_blocks) {
    std::this_thread::sleep_for(std::chrono::microseconds(n_blocks));
    return 1;
}

// How many there are of "contexts" (retained), "memory", "registered", "streams" or "events".
std::size_t stub_live(const char* what) {
    const Lock lock(state.lock);
    const std::map<std::string, std::size_t> live = {{"contexts", static_cast<std::size_t>(state.contexts)},
                                                     {"memory", state.sizes.size()},
                                                     {"registered", state.registered.size()},
                                                     {"streams", state.streams.size()},
                                                     {"events", state.events.size()}};
    return live.at(what);
}

// The n-th thing (from 0) that was done and must not be, or null.
const char* stub_violation(std::size_t n) {
    const Lock lock(state.lock);
    return n < state.violations.size() ? state.violations[n].c_str() : nullptr;
}

// --- what sanitizers must find: sanitize.py
// ---------------------------------------------------------------------------

int stub_race() {
    int count = 0;
    std::thread other([&] { ++count; });
    ++count;
    other.join();
    return count;
}

int stub_overflow(std::size_t n) {
    const auto bytes = std::make_unique<unsigned char[]>(n);
    return static_cast<volatile unsigned char*>(bytes.get())[n];
}

bool stub_leak(std::size_t n) {
    unsigned char* volatile bytes = new unsigned char[n];
    const bool made = bytes != nullptr;
    bytes = nullptr;
    return made;
}

}  // extern "C"
