// A CUDA device, in its primary context, which torch, CuPy and `cuda.core` use too.
#pragma once

#include <future>
#include <memory>
#include <variant>
#include <vector>

#include "call_threads.h"
#include "device.h"
#include "driver.h"

namespace asyncload {

class CudaDevice final : public Device {
  public:
    // Starts the driver and retains the primary context of the device of number `index`, as long as its events are
    // held.
    CudaDevice(std::shared_ptr<const Driver> driver, int index);
    ~CudaDevice() override;
    CudaDevice(const CudaDevice&) = delete;
    CudaDevice& operator=(const CudaDevice&) = delete;

    void attach() override;
    std::unique_ptr<Stream> open_stream() override;
    std::shared_ptr<Event> make_event(bool timing, Wait wait) override;
    std::shared_ptr<Event> adopt_event(std::uint64_t handle) override;
    bool combines_copies() const noexcept override;
    bool in_place() const noexcept override { return false; }

    // Allocates memory of these sizes, all or none; 0 for none.
    std::vector<Address> allocate(const std::vector<std::size_t>& sizes);
    // As many of these as there is memory for, from the first on; whoever asks for the next one learns why there are no
    // more. Each goes to `recipient` at once.
    std::vector<Address> allocate_some(const std::vector<std::size_t>& sizes, Recipient& recipient);
    // Frees memory that has been allocated, and returns what the driver said of each.
    std::vector<CUresult> free(const std::vector<Address>& addresses);

    // Work on another library's stream, by its handle. Threads of the device's call the driver for it, as the caller
    // may hold a lock that others want while the driver lets them wait.
    struct Begun {
        std::shared_ptr<Event> ready;  // when the stream had come to it
        std::shared_ptr<Event> began;  // behind what it waited for
    };
    // What the driver refused, as a value: exceptions stay on their threads.
    struct Refusal {
        const char* function;
        CUresult code;
    };
    template <typename Result>
    using Answer = std::future<std::variant<Result, Refusal>>;
    // Has what is enqueued from now on wait, on the device, for events; the new ones are timed.
    Answer<Begun> begin_work(std::uint64_t stream, std::vector<std::shared_ptr<Event>> after);
    // A timed event behind what is enqueued by now.
    Answer<std::shared_ptr<Event>> end_work(std::uint64_t stream);
    // Throws it as the driver's error.
    [[noreturn]] void raise(const Refusal& refusal) const { driver().fail(refusal.function, refusal.code); }
    // Ends these threads; afterwards the callers call the driver themselves.
    void close() { calls_.close(); }

  private:
    class Context;
    class EventPool;

    const Driver& driver() const;

    const std::shared_ptr<const Context> context_;
    const std::shared_ptr<EventPool> events_;
    CallThreads calls_;  // these end first
};

}  // namespace asyncload
