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
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "device.h"
#include "signal.h"
#include "spans.h"

namespace asyncload {

// A point in a stream's work that several may hold.
using SharedEvent = std::shared_ptr<Event>;

// Copies layers into slots, and decodes what comes packed, in the order in which it is asked. One thread enqueues, and
// two wait: for what a slot had before, and for the copies. What has come is told through a descriptor, and only what
// somebody waits for wakes him: the rest is told along.
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

    struct Options {
        std::uint32_t streams;
        // Device memory for each stream that the largest piece with a kernel fits, or nothing where there is none.
        std::vector<Address> scratch;
        // Whether a layer is waited for until it has arrived; else until it is enqueued, and then for the last one's
        // arrival, by which all have arrived.
        bool each_arrival;
        bool trace;  // whether spans are noted
        int nice;
    };

    // What has come of a feeding, told twice unless it failed: first as enqueued, with one event for each stream before
    // its copies and one behind them, once what it comes behind has ended and the arrival of the slot's layer before
    // has been told; then as arrived.
    struct News {
        std::uint64_t number;
        bool has_arrived;
        std::optional<DeviceError> failure;
        std::vector<SharedEvent> begun;
        std::vector<SharedEvent> arrived;
    };

    LayerFeed(std::shared_ptr<Device> device, std::vector<Layer> layers, Options options);
    ~LayerFeed();
    LayerFeed(const LayerFeed&) = delete;
    LayerFeed& operator=(const LayerFeed&) = delete;

    // Has a layer, by its index, enqueued into a slot, behind events that are recorded by now and that the caller keeps
    // until he is told; returns the feeding's number. Throws `std::out_of_range` for a layer that is not there.
    std::uint64_t feed(std::size_t layer, Address slot, std::vector<SharedEvent> after);

    // An eventfd; readable when something is to be told.
    int descriptor() const noexcept { return signal_.descriptor(); }
    // What has come since it was last asked.
    std::vector<News> poll();
    // The same, once something is to be told; for who has no event loop.
    std::vector<News> wait();
    std::size_t layers() const noexcept { return layers_.size(); }
    // What the threads did for layers, if that is noted.
    Spans& spans() noexcept { return spans_; }
    // What other libraries know the streams by.
    std::vector<std::uint64_t> streams() const;
    // Does what it was asked to, waits for the device, and ends the threads.
    void close();

  private:
    using Clock = Spans::Clock;

    struct Feeding {
        std::uint64_t number;
        std::size_t layer;
        Address slot;
        std::vector<SharedEvent> after;
        std::optional<std::uint64_t> before;  // which had the slot
        std::vector<SharedEvent> begun;
        std::vector<SharedEvent> arrived;
    };

    // A thread that takes feedings in order.
    class Worker {
      public:
        using Work = std::function<void(Feeding&)>;

        void start(const char* name, int nice, Work work);
        void push(Feeding feeding);
        void close();  // after all that was pushed

      private:
        void run();

        Work work_;
        std::mutex mutex_;
        std::condition_variable changed_;
        std::deque<Feeding> feedings_;
        bool closing_ = false;
        std::thread thread_;
    };

    // The threads' work.
    void enqueue(Feeding& feeding);
    void await_slot(Feeding& feeding);
    void await_copies(Feeding& feeding);

    void enqueue_on_streams(Feeding& feeding);
    void copy(const Layer& layer, Address slot);
    void tell(News news, bool wakes);
    std::vector<News> take_news();  // under the lock

    const std::shared_ptr<Device> device_;
    const std::vector<Layer> layers_;
    const Options options_;
    std::vector<std::unique_ptr<Stream>> streams_;
    std::uint64_t next_ = 0;                           // the caller's thread's, as is the next
    std::unordered_map<Address, std::uint64_t> last_;  // feeding, by slot
    std::mutex mutex_;                                 // over the next five
    std::condition_variable told_;
    std::unordered_set<std::uint64_t> under_way_;  // that are to be told of as arrived
    std::vector<News> news_;
    bool due_ = false;  // somebody waits for some of it
    Signal signal_;
    Spans spans_;
    Worker enqueuing_;
    Worker awaiting_slots_;
    Worker awaiting_copies_;
};

}  // namespace asyncload
