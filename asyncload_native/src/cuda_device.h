// A CUDA device, in its primary context, which torch, CuPy and `cuda.core` use too.
#pragma once

#include <memory>
#include <vector>

#include "device.h"
#include "driver.h"

namespace asyncload {

class CudaDevice final : public Device {
  public:
    // Starts the driver and retains the primary context of the device of number `index`.
    CudaDevice(std::shared_ptr<const Driver> driver, int index);
    ~CudaDevice() override;
    CudaDevice(const CudaDevice&) = delete;
    CudaDevice& operator=(const CudaDevice&) = delete;

    void attach() override;
    std::unique_ptr<Stream> open_stream() override;
    std::shared_ptr<Event> make_event(bool timing) override;
    std::shared_ptr<Event> adopt_event(std::uint64_t handle) override;
    bool in_place() const noexcept override { return false; }

    // Allocates memory of these sizes, all or none; 0 for none.
    std::vector<Address> allocate(const std::vector<std::size_t>& sizes);

  private:
    const std::shared_ptr<const Driver> driver_;
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
};

}  // namespace asyncload
