#include "cuda_device.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include "threads.h"

namespace asyncload {

namespace {

using namespace std::chrono_literals;

// How long who allocates leaves the driver to others, at the least: the kernel adds some 50 microseconds.
constexpr auto allocation_pause = 50us;

constexpr unsigned threads_per_group = 256;  // as the kernels are bounded to: asyncload/quant/cuda

class CudaEvent final : public Event {
  public:
    using Release = std::function<void(CUevent)>;

    // `release` has the event when nobody holds it any more, if it is ours.
    CudaEvent(std::shared_ptr<const Driver> driver, CUevent event, Wait wait, Release release)
        : driver_(std::move(driver)), event_(event), wait_(wait), release_(std::move(release)) {}
    ~CudaEvent() override {
        if (release_) release_(event_);
    }
    CudaEvent(const CudaEvent&) = delete;
    CudaEvent& operator=(const CudaEvent&) = delete;

    bool done() override {
        const CUresult code = driver_->cuEventQuery.result(event_);
        if (code == CUDA_ERROR_NOT_READY) return false;
        if (code != CUDA_SUCCESS) driver_->cuEventQuery.fail(code);
        return true;
    }

    void synchronize() override {
        if (wait_ == Wait::interrupt) {
            driver_->cuEventSynchronize(event_);
            return;
        }
        poll_until([this] { return done(); });
    }

    double seconds_since(Event& earlier) override {
        float milliseconds = 0;
        driver_->cuEventElapsedTime(&milliseconds, static_cast<CudaEvent&>(earlier).event_, event_);
        return static_cast<double>(milliseconds) / 1e3;
    }

    std::uint64_t handle() const noexcept override { return reinterpret_cast<std::uint64_t>(event_); }

    CUevent event() const noexcept { return event_; }

  private:
    const std::shared_ptr<const Driver> driver_;
    const CUevent event_;
    const Wait wait_;
    const Release release_;
};

// A stream that does not wait for the legacy default stream, nor it for this one; or another library's.
class CudaStream final : public Stream {
  public:
    explicit CudaStream(const Driver& driver) : driver_(driver), owned_(true) {
        driver.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING);
    }
    CudaStream(const Driver& driver, std::uint64_t handle)
        : driver_(driver), owned_(false), stream_(reinterpret_cast<CUstream>(handle)) {}
    ~CudaStream() override {
        if (!owned_) return;
        driver_.cuStreamSynchronize.result(stream_);
        driver_.cuStreamDestroy.result(stream_);
    }
    CudaStream(const CudaStream&) = delete;
    CudaStream& operator=(const CudaStream&) = delete;

    void upload(const Copy& copy) override {
        driver_.cuMemcpyHtoDAsync(copy.target, copy.source, copy.nbytes, stream_);
    }

    void upload_all(std::span<const Copy> copies) override {
        if (!driver_.cuMemcpyBatchAsync) return Stream::upload_all(copies);
        std::vector<CUdeviceptr> targets, sources;
        std::vector<std::size_t> sizes;
        for (const Copy& copy : copies) {
            targets.push_back(copy.target);
            sources.push_back(reinterpret_cast<CUdeviceptr>(copy.source));
            sizes.push_back(copy.nbytes);
        }
        CUmemcpyAttributes attributes{CU_MEMCPY_SRC_ACCESS_ORDER_STREAM, {}, {}, 0};
        std::size_t first = 0, refused = 0;
        driver_.cuMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), copies.size(), &attributes, &first, 1,
                                   &refused, stream_);
    }

    void decode(const Decoding& decoding) override {
        auto [kernel, source, target, n_blocks] = decoding;
        const auto groups =
            (static_cast<std::uint64_t>(n_blocks) + kernel.blocks_per_group - 1) / kernel.blocks_per_group;
        void* arguments[] = {&source, &target, &n_blocks};
        driver_.cuLaunchKernel(reinterpret_cast<CUfunction>(kernel.handle), static_cast<unsigned>(groups), 1, 1,
                               threads_per_group, 1, 1, 0, stream_, arguments, nullptr);
    }

    void wait(Event& event) override { driver_.cuStreamWaitEvent(stream_, static_cast<CudaEvent&>(event).event(), 0); }

    void record(Event& event) override { driver_.cuEventRecord(static_cast<CudaEvent&>(event).event(), stream_); }

    void synchronize() override { driver_.cuStreamSynchronize(stream_); }

    std::uint64_t handle() const noexcept override { return reinterpret_cast<std::uint64_t>(stream_); }

  private:
    const Driver& driver_;
    const bool owned_;
    CUstream stream_ = nullptr;
};

}  // namespace

// The primary context of a device, held.
class CudaDevice::Context {
  public:
    Context(std::shared_ptr<const Driver> driver_table, int index) : driver(std::move(driver_table)) {
        driver->cuInit(0);
        driver->cuDeviceGet(&device_, index);
        driver->cuDevicePrimaryCtxRetain(&context_, device_);
    }
    ~Context() { driver->cuDevicePrimaryCtxRelease.result(device_); }
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    // A thread that is given the context here, one of ours as a rule, is apart from other threads' captures of CUDA
    // graphs from then on: what it calls does not end them, and is not refused because of them.
    void attach() const {
        CUcontext before = nullptr;
        driver->cuCtxGetCurrent(&before);
        if (before == context_) return;
        driver->cuCtxSetCurrent(context_);
        int mode = CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        if (const CUresult code = driver->cuThreadExchangeStreamCaptureMode.result(&mode); code != CUDA_SUCCESS) {
            driver->cuCtxSetCurrent.result(before);
            driver->cuThreadExchangeStreamCaptureMode.fail(code);
        }
    }

    // Attached for a function, whatever thread it is.
    template <typename Function>
    void within(Function function) const noexcept {
        CUcontext before = nullptr;
        driver->cuCtxGetCurrent.result(&before);
        if (before != context_) driver->cuCtxSetCurrent.result(context_);
        function();
        if (before != context_) driver->cuCtxSetCurrent.result(before);
    }

    const std::shared_ptr<const Driver> driver;

  private:
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
};

// Events that nobody holds any more, for the next who want one: who lets one go does not call the driver, which may let
// him wait. One that was recorded before is recorded anew.
class CudaDevice::EventPool : public std::enable_shared_from_this<EventPool> {
  public:
    explicit EventPool(std::shared_ptr<const Context> context) : context_(std::move(context)) {}
    ~EventPool() {
        context_->within([this] {
            for (const auto& events : free_)
                for (const CUevent event : events) driver().cuEventDestroy.result(event);
        });
    }
    EventPool(const EventPool&) = delete;
    EventPool& operator=(const EventPool&) = delete;

    std::shared_ptr<Event> take(bool timing, Wait wait) {
        const unsigned flags =
            (timing ? 0 : CU_EVENT_DISABLE_TIMING) | (wait == Wait::poll ? 0 : CU_EVENT_BLOCKING_SYNC);
        auto release = [pool = shared_from_this(), flags](CUevent event) {
            const std::lock_guard lock(pool->mutex_);
            pool->free_[flags].push_back(event);
        };
        return std::make_shared<CudaEvent>(context_->driver, find(flags), wait, std::move(release));
    }

  private:
    CUevent find(unsigned flags) {
        {
            const std::lock_guard lock(mutex_);
            if (auto& events = free_[flags]; !events.empty()) {
                const CUevent event = events.back();
                events.pop_back();
                return event;
            }
        }
        CUevent event = nullptr;
        driver().cuEventCreate(&event, flags);
        return event;
    }

    const Driver& driver() const { return *context_->driver; }

    const std::shared_ptr<const Context> context_;
    std::mutex mutex_;
    std::array<std::vector<CUevent>, 4> free_;  // by their flags
};

CudaDevice::CudaDevice(std::shared_ptr<const Driver> driver, int index)
    : context_(std::make_shared<Context>(std::move(driver), index)), events_(std::make_shared<EventPool>(context_)) {}

CudaDevice::~CudaDevice() = default;

void CudaDevice::attach() {
    context_->attach();
}

std::vector<Address> CudaDevice::allocate(const std::vector<std::size_t>& sizes) {
    attach();
    std::vector<Address> addresses;
    addresses.reserve(sizes.size());
    for (const std::size_t nbytes : sizes) {
        CUdeviceptr address = 0;
        if (const CUresult code = nbytes ? driver().cuMemAlloc.result(&address, nbytes) : CUDA_SUCCESS;
            code != CUDA_SUCCESS) {
            for (const Address allocated : addresses)
                if (allocated) driver().cuMemFree.result(allocated);
            driver().cuMemAlloc.fail(code);
        }
        addresses.push_back(address);
    }
    return addresses;
}

std::vector<Address> CudaDevice::allocate_some(const std::vector<std::size_t>& sizes, Recipient& recipient) {
    attach();
    std::vector<Address> addresses;
    addresses.reserve(sizes.size());
    for (const std::size_t nbytes : sizes) {
        CUdeviceptr address = 0;
        if (nbytes && driver().cuMemAlloc.result(&address, nbytes) != CUDA_SUCCESS) break;
        addresses.push_back(address);
        try {
            // The driver allocates and takes copies under one lock, which who asks for it without a break keeps.
            if (recipient.give(address)) std::this_thread::sleep_for(allocation_pause);
        } catch (const std::exception&) {  // what there is goes to its owner, whatever it was
            break;
        }
    }
    return addresses;
}

std::vector<CUresult> CudaDevice::free(const std::vector<Address>& addresses) {
    try {
        attach();
    } catch (const CudaError& error) {
        return std::vector(addresses.size(), error.code());
    }
    std::vector<CUresult> results;
    results.reserve(addresses.size());
    for (const Address address : addresses) results.push_back(driver().cuMemFree.result(address));
    return results;
}

const Driver& CudaDevice::driver() const {
    return *context_->driver;
}

bool CudaDevice::combines_copies() const noexcept {
    return static_cast<bool>(driver().cuMemcpyBatchAsync);
}

std::unique_ptr<Stream> CudaDevice::open_stream() {
    return std::make_unique<CudaStream>(driver());
}

std::shared_ptr<Event> CudaDevice::make_event(bool timing, Wait wait) {
    return events_->take(timing, wait);
}

std::shared_ptr<Event> CudaDevice::adopt_event(std::uint64_t handle) {
    return std::make_shared<CudaEvent>(context_->driver, reinterpret_cast<CUevent>(handle), Wait::interrupt, nullptr);
}

CudaDevice::Answer<CudaDevice::Begun> CudaDevice::begin_work(std::uint64_t stream,
                                                             std::vector<std::shared_ptr<Event>> after) {
    return calls_.call([this, stream, after = std::move(after)]() -> std::variant<Begun, Refusal> {
        try {
            attach();
            CudaStream theirs(driver(), stream);
            Begun begun{make_event(true, Wait::interrupt), make_event(true, Wait::interrupt)};
            theirs.record(*begun.ready);
            for (const auto& event : after) theirs.wait(*event);
            theirs.record(*begun.began);
            return begun;
        } catch (const CudaError& error) {
            return Refusal{error.function(), error.code()};
        }
    });
}

CudaDevice::Answer<std::shared_ptr<Event>> CudaDevice::end_work(std::uint64_t stream) {
    return calls_.call([this, stream]() -> std::variant<std::shared_ptr<Event>, Refusal> {
        try {
            attach();
            auto ended = make_event(true, Wait::interrupt);
            CudaStream(driver(), stream).record(*ended);
            return ended;
        } catch (const CudaError& error) {
            return Refusal{error.function(), error.code()};
        }
    });
}

}  // namespace asyncload
