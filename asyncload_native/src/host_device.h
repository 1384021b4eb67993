// Host memory as a device: a thread a stream, copies that can be slowed, so that overlap and races show anywhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "device.h"

namespace asyncload {

class HostDevice final : public Device {
  public:
    using Moment = std::chrono::steady_clock::time_point;

    // What is done to copies, for tests. `bandwidth` in bytes a second is all streams' together, 0 for memory's own;
    // `latency` in seconds passes before each copy; with `poison` a copy's target is overwritten before it, and a
    // staging buffer once it is free.
    struct Pace {
        double bandwidth = 0;
        double latency = 0;
        bool poison = false;
    };

    void set_pace(const Pace& pace);
    // Has the `number`-th copy from now on (1 is the next), of all streams, fail.
    void fail_copy(std::uint64_t number);

    void attach() override {}
    std::unique_ptr<Stream> open_stream() override;
    std::shared_ptr<Event> make_event(bool timing, Wait wait) override;
    std::shared_ptr<Event> adopt_event(std::uint64_t handle) override;
    bool in_place() const noexcept override;
    bool poisons() const noexcept override;

    // How many pieces of work that were enqueued and have not ended read or write some memory.
    std::ptrdiff_t uses(Address address, std::size_t nbytes) const;
    // Counts such work, as long as what it returns is kept.
    std::shared_ptr<const void> use(Address target, Address source, std::size_t nbytes);

    // Does a copy that was enqueued at a moment, behind the stream's last one, which was to end at `not_before`;
    // returns when this one was to end. On the stream's thread.
    Moment copy(std::byte* target, const std::byte* source, std::size_t nbytes, Moment enqueued, Moment not_before);

  private:
    struct Use {
        Address target, source;
        std::size_t nbytes;
    };

    mutable std::mutex mutex_;
    std::list<Use> uses_;
    Pace pace_;
    std::uint64_t copies_ = 0;
    std::vector<std::uint64_t> failing_;  // by their number in `copies_`
    Moment busy_until_{};                 // of the one copy engine, where copies are slowed
};

}  // namespace asyncload
