// Copies of several threads', which go to the device together.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "device.h"

namespace asyncload {

// One stream for copies of all threads. What comes while enough is under way is enqueued later, in one call, by whoever
// next asks for a copy or waits for one.
class CopyQueue {
  public:
    // Copies that belong together, and what became of them.
    struct Request {
        std::vector<Copy> copies;  // none of them of what another one, of any request, writes
        bool ended = false;
        std::optional<DeviceError> failure;
    };

    explicit CopyQueue(Device& device);
    CopyQueue(const CopyQueue&) = delete;
    CopyQueue& operator=(const CopyQueue&) = delete;

    // Has copies made. They have to be awaited, and until then the request and what it copies stay where they are. Both
    // on a thread that has attached to the device.
    void upload(Request& request);
    // Sleeps until the copies have ended. Raises `DeviceError` if one of them failed.
    void await(Request& request);

  private:
    using Lock = std::unique_lock<std::mutex>;

    // Requests whose copies were enqueued together, and the event behind these.
    struct Batch {
        std::vector<Request*> requests;
        std::shared_ptr<Event> event;
        bool drained = false;  // as the event could not be recorded
    };

    // These are called with the lock, and give it up while they call the driver.

    // Brings on whatever can be, unless another thread is at it, which will see what there is.
    void advance(Lock& lock) noexcept;
    // Takes the oldest batch back if its copies have ended; whether they have.
    bool retire(Lock& lock);
    // Enqueues what has come, if there is any and not enough under way; whether it has.
    bool send(Lock& lock);

    // These are called without.

    // Enqueues the copies of a batch, and its event.
    void enqueue(Batch& batch);
    // In one call; false if that is refused. Each is enqueued by itself then, so that whose failure it is shows.
    bool enqueue_together(const Batch& batch);
    // Whether the copies of a batch have ended, or failed.
    bool done(Batch& batch);
    // Waits for all copies, as the event of a batch has failed, and its requests have with it.
    void drain(Batch& batch, const DeviceError& error);

    const std::unique_ptr<Stream> stream_;
    std::mutex mutex_;
    bool advancing_ = false;         // a thread is at it: it alone uses the stream, the batches and `copies_`
    std::vector<Request*> waiting_;  // to be enqueued
    std::array<Batch, 3> batches_;   // a ring of those under way
    std::size_t oldest_ = 0, under_way_ = 0;
    std::vector<Copy> copies_;  // of the batch that is being enqueued
};

}  // namespace asyncload
