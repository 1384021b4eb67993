// Copies of several threads', which go to the device together, and the kernels that decode what was copied.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "device.h"

namespace asyncload {

// One stream for copies of all threads, and one for kernels. What comes while enough is under way is enqueued later,
// its copies in one call, by whoever next asks for some or waits for some.
class CopyQueue {
  public:
    // Copies and kernels that belong together, and what became of them. The kernels read what any of the copies wrote.
    struct Request {
        std::vector<Copy> copies;  // in no order among them and those of other requests
        std::vector<Decoding> decodings;
        bool ended = false;
        std::optional<DeviceError> failure;
    };

    explicit CopyQueue(Device& device);
    CopyQueue(const CopyQueue&) = delete;
    CopyQueue& operator=(const CopyQueue&) = delete;

    // Has a request done. It has to be awaited, and until then it stays where it is, and what it copies from and to,
    // too. Both on a thread that has attached to the device.
    void upload(Request& request);
    // Sleeps until it has ended. Raises `DeviceError` if something of it failed.
    void await(Request& request);

  private:
    using Lock = std::unique_lock<std::mutex>;

    // Requests that were enqueued together, and the events behind their copies and behind everything.
    struct Batch {
        std::vector<Request*> requests;
        std::shared_ptr<Event> copied, ended;
        bool drained = false;  // as one of these could not be recorded
    };

    // These are called with the lock, and give it up while they call the driver.

    // Brings on whatever can be, unless another thread is at it, which will see what there is.
    void advance(Lock& lock) noexcept;
    // Takes the oldest batch back if it has ended; whether it has.
    bool retire(Lock& lock);
    // Enqueues what has come, if there is any and not enough under way; whether it has.
    bool send(Lock& lock);

    // These are called without.

    // Enqueues a batch, and its events.
    void enqueue(Batch& batch);
    // All copies in one call; false if that is refused. Each is enqueued by itself then, so that whose failure it is
    // shows.
    bool copy_together(const Batch& batch);
    static void try_each(const Batch& batch, const std::function<void(const Request&)>& enqueue);
    // Whether a batch has ended, or failed.
    bool done(Batch& batch);
    // Waits for all that was enqueued, as an event of a batch has failed, and its requests have with it.
    void drain(Batch& batch, const DeviceError& error);

    const std::unique_ptr<Stream> copying_, decoding_;
    std::mutex mutex_;
    bool advancing_ = false;         // a thread is at it: it alone uses the streams, the batches and `copies_`
    std::vector<Request*> waiting_;  // to be enqueued
    std::array<Batch, 3> batches_;   // a ring of those under way
    std::size_t oldest_ = 0, under_way_ = 0;
    std::vector<Copy> copies_;  // of the batch that is being enqueued
};

}  // namespace asyncload
