#include "cuda_device.h"

#include <utility>

namespace asyncload {

namespace {

constexpr unsigned threads_per_group = 256;  // as the kernels are bounded to: asyncload/quant/cuda

class CudaEvent final : public Event {
  public:
    CudaEvent(std::shared_ptr<const Driver> driver, CUevent event, bool owned)
        : driver_(std::move(driver)), event_(event), owned_(owned) {}
    ~CudaEvent() override {
        if (owned_) driver_->cuEventDestroy.result(event_);
    }
    CudaEvent(const CudaEvent&) = delete;
    CudaEvent& operator=(const CudaEvent&) = delete;

    bool done() override {
        const CUresult code = driver_->cuEventQuery.result(event_);
        if (code == CUDA_ERROR_NOT_READY) return false;
        if (code != CUDA_SUCCESS) driver_->cuEventQuery.fail(code);
        return true;
    }

    void synchronize() override { driver_->cuEventSynchronize(event_); }

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
    const bool owned_;
};

// A stream that does not wait for the legacy default stream, nor it for this one.
class CudaStream final : public Stream {
  public:
    explicit CudaStream(const Driver& driver) : driver_(driver) {
        driver.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING);
    }
    ~CudaStream() override {
        driver_.cuStreamSynchronize.result(stream_);
        driver_.cuStreamDestroy.result(stream_);
    }
    CudaStream(const CudaStream&) = delete;
    CudaStream& operator=(const CudaStream&) = delete;

    void upload(Address target, const std::byte* source, std::size_t nbytes) override {
        driver_.cuMemcpyHtoDAsync(target, source, nbytes, stream_);
    }

    void decode(const Kernel& kernel, Address source, Address target, std::int64_t n_blocks) override {
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
    CUstream stream_ = nullptr;
};

}  // namespace

CudaDevice::CudaDevice(std::shared_ptr<const Driver> driver, int index) : driver_(std::move(driver)) {
    driver_->cuInit(0);
    driver_->cuDeviceGet(&device_, index);
    driver_->cuDevicePrimaryCtxRetain(&context_, device_);
}

CudaDevice::~CudaDevice() {
    driver_->cuDevicePrimaryCtxRelease.result(device_);
}

void CudaDevice::attach() {
    CUcontext current = nullptr;
    driver_->cuCtxGetCurrent(&current);
    if (current != context_) driver_->cuCtxSetCurrent(context_);
}

std::vector<Address> CudaDevice::allocate(const std::vector<std::size_t>& sizes) {
    attach();
    std::vector<Address> addresses;
    addresses.reserve(sizes.size());
    for (const std::size_t nbytes : sizes) {
        CUdeviceptr address = 0;
        if (const CUresult code = nbytes ? driver_->cuMemAlloc.result(&address, nbytes) : CUDA_SUCCESS;
            code != CUDA_SUCCESS) {
            for (const Address allocated : addresses)
                if (allocated) driver_->cuMemFree.result(allocated);
            driver_->cuMemAlloc.fail(code);
        }
        addresses.push_back(address);
    }
    return addresses;
}

std::unique_ptr<Stream> CudaDevice::open_stream() {
    return std::make_unique<CudaStream>(*driver_);
}

std::shared_ptr<Event> CudaDevice::make_event(bool timing) {
    CUevent event = nullptr;  // whoever waits for it sleeps
    driver_->cuEventCreate(&event, CU_EVENT_BLOCKING_SYNC | (timing ? 0 : CU_EVENT_DISABLE_TIMING));
    return std::make_shared<CudaEvent>(driver_, event, true);
}

std::shared_ptr<Event> CudaDevice::adopt_event(std::uint64_t handle) {
    return std::make_shared<CudaEvent>(driver_, reinterpret_cast<CUevent>(handle), false);
}

}  // namespace asyncload
