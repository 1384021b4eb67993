// Layers out of host memory into slots, enqueued by a thread of their own as fast as they are asked for.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "device.h"
#include "signal.h"

namespace asyncload {

// A point in a stream's work that several may hold.
using SharedEvent = std::shared_ptr<Event>;

// Copies layers into slots, and decodes what comes packed. One thread enqueues, in the order in which it is asked;
// others wait for events. What has been done is told through a descriptor, any number at a time.
class LayerFeed : public std::enable_shared_from_this<LayerFeed> {
  public:
    // A piece of a layer: registered host memory, and where it goes in a slot; with a kernel, by way of the scratch.
    struct Piece {
        Address source;
        std::uint64_t nbytes;
        std::uint64_t offset;  // in the slot
        Kernel kernel;
        std::int64_t n_blocks;  // 0: as it is
    };
    using Layer = std::vector<Piece>;

    // What was asked, and what came of it.
    struct Ticket {
        std::uint64_t number;
        std::optional<std::string> failure;  // what the device said
        std::string code;                    // and its name for it
    };

    // `scratch`: device memory for each stream that the largest piece with a kernel fits, or nothing where there is
    // none. `waiters`: threads that wait for events.
    LayerFeed(std::shared_ptr<Device> device, std::vector<Layer> layers, std::uint32_t streams,
              std::vector<Address> scratch, std::uint32_t waiters, int nice);
    ~LayerFeed();
    LayerFeed(const LayerFeed&) = delete;
    LayerFeed& operator=(const LayerFeed&) = delete;

    // The events of a feeding, one for each stream: before its copies and behind them. They count as passed until it is
    // told as done, which is when they are recorded.
    struct Feeding {
        std::uint64_t number;
        std::vector<SharedEvent> begun;
        std::vector<SharedEvent> arrived;
    };
    // Has a layer, by its index, enqueued into a slot, behind events that are recorded by then.
    Feeding feed(std::size_t layer, Address slot, std::vector<SharedEvent> after);
    // Waits until a feeding is enqueued, or has failed.
    void wait(std::uint64_t number);
    std::size_t layers() const noexcept { return layers_.size(); }
    // Has somebody wait until events have passed.
    std::uint64_t settle(std::vector<SharedEvent> events);

    // An eventfd; readable when something is done.
    int descriptor() const noexcept { return signal_.descriptor(); }
    // What was done since it was last asked.
    std::vector<Ticket> poll();
    // Does what it was asked to, waits for the device, and ends the threads.
    void close();

  private:
    // Threads that take work from one queue.
    class Queue {
      public:
        using Work = std::function<void()>;

        void start(std::uint32_t threads, const std::function<void()>& begin);
        void push(Work work);
        void close();  // after all that was pushed

      private:
        void run();

        std::mutex mutex_;
        std::condition_variable changed_;
        std::deque<Work> work_;
        bool closing_ = false;
        std::vector<std::thread> threads_;
    };

    void copy(const Layer& layer, Address slot);
    // Does some work, and tells how it went.
    void perform(std::uint64_t number, const std::function<void()>& work);

    const std::shared_ptr<Device> device_;
    const std::vector<Layer> layers_;
    const std::vector<Address> scratch_;
    std::vector<std::unique_ptr<Stream>> streams_;
    std::mutex mutex_;  // over the next four
    std::condition_variable changed_;
    std::uint64_t next_ = 0;
    std::uint64_t enqueued_ = 0;  // feedings below this number are
    std::vector<Ticket> done_;
    Signal signal_;
    Queue enqueuing_;
    Queue waiting_;
};

}  // namespace asyncload
