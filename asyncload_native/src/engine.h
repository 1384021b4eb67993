// The data path: threads that read, decode, copy and report, and never need the interpreter lock.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "call_threads.h"
#include "copy_queue.h"
#include "cores.h"
#include "device.h"
#include "job.h"

namespace asyncload {

// Threads over one device and one ring of staging buffers. Each thread owns a stream, its share of the buffers, and for
// each of these an event: it reads into one while the others' copies are under way, and waits for nobody else. Where
// the device is faster with copies that come together, those that need not be timed and wait for nothing go through a
// queue of all threads' instead.
class Engine {
  public:
    struct Options {
        std::uint64_t chunk_size;
        std::uint32_t threads;
        std::uint32_t buffers;  // at least one a thread
        int nice;
        std::uint32_t retries;
        double retry_delay;  // seconds before the first repetition of a read; twice as long before each later one
    };

    // `ring`: memory for all buffers, registered with the device where it has that; it outlives the engine.
    Engine(std::shared_ptr<Device> device, std::byte* ring, const Options& options);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    const Options& options() const noexcept { return options_; }

    // Has a job's chunks moved as far as groups are admitted. `after`: see `Job`; `scratch`: device memory of a chunk's
    // size for each buffer, or nothing where the device decodes nothing. Throws `std::out_of_range` for fewer.
    void submit(std::shared_ptr<Job> job, std::vector<Address> scratch, std::vector<std::shared_ptr<Event>> after);
    // Lets the groups below `groups` be moved, for which the targets, from tensor `first` on, are given; whether others
    // of its chunks were waiting for a thread. Throws `std::out_of_range` for more than there are.
    bool admit(Job& job, std::uint32_t groups, std::size_t first, std::span<const Address> targets);
    // Takes no further chunk of it; it ends once nothing of it is under way.
    void cancel(Job& job);
    // Whether a job uses a staging buffer.
    bool busy() const;
    // Whether another thread is in the engine just now, where it may have lost its core: who calls may have to wait.
    bool contended() const;
    // Cancels all jobs, waits until nothing is under way, and ends the threads.
    void close();

  private:
    struct Flight;
    struct Lane;
    class Worker;

    struct Task {
        std::shared_ptr<Job> job;
        const Chunk* chunk;
        bool in_place;  // the host may write tensors where they go
        bool ahead;     // it is read before its targets are known
    };

    std::optional<Task> take(bool wait);
    // How a thread goes on with a chunk that it has waited with: its job may have been stopped; or the thread is needed
    // for another job, and has left the chunk, which will be taken once more.
    enum class Next : std::uint8_t { go_on, give_up, left };
    // Waits until the targets of a chunk that was taken ahead are known.
    Next await_targets(const Task& task);
    // Waits before a read is made again.
    Next pause(const Task& task, double seconds);
    // Under the lock: leaves a chunk that was taken ahead and has no targets yet, if another job has one to be moved.
    // One thread at a time: the next when that one has found work.
    bool leave(const Task& task);
    // Under the lock: the next chunk's number, if there is one; whether it may be moved, or at least be read.
    static std::optional<std::size_t> next(const Job& job);
    static bool waits(const Job& job);
    bool waits_to_be_read(const Job& job) const;
    // Under the lock: whether the host may write tensors where they go, as nothing on the device has to be waited for
    // or timed. Asked once for a chunk: a test may change the answer.
    bool in_place(const Job& job) const;
    // Under the lock; both return a job that has nothing left to do, once, to be settled without the lock.
    std::shared_ptr<Job> stop(Job& job);
    std::shared_ptr<Job> take_ended(Job& job);
    // Settles one, if there is one, on a thread that may wait for files to be closed; the caller may not.
    void settle_elsewhere(const std::shared_ptr<Job>& ended);
    // A chunk has ended: it arrived, or failed, or was given up.
    enum class End : std::uint8_t { arrived, failed, given_up };
    void report(const Task& task, End end, Failure failure = {});

    const std::shared_ptr<Device> device_;
    const Options options_;
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::shared_ptr<Job>> jobs_;  // that have not ended
    bool closing_ = false;
    bool leaving_ = false;  // a thread has left a chunk, and not yet taken another
    Cores cores_;
    std::unique_ptr<CopyQueue> copies_;  // where the device combines copies
    std::vector<std::unique_ptr<Worker>> workers_;
    std::vector<std::thread> threads_;
    CallThreads calls_;
};

}  // namespace asyncload
