// A thread of the engine's, and what it does with a chunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine.h"
#include "reader_choice.h"
#include "spans.h"

namespace asyncload {

// A chunk on its way behind the buffer.
struct Engine::Flight {
    Task task;
    Spans::Clock::time_point begin;  // of enqueuing
    std::uint64_t nbytes;            // that leave the buffer
    bool enqueued;                   // the buffer is in use until the event has passed
    std::optional<Failure> failure;
    bool queued = false;           // it went through the queue of all threads' copies
    std::shared_ptr<Event> begun;  // where the job is timed
    std::shared_ptr<Event> event;  // behind it, where it was not queued
};

// A staging buffer, and what tells of the end of what is enqueued from it: an event, or a request.
struct Engine::Lane {
    std::uint32_t number;
    std::span<std::byte> buffer;
    std::shared_ptr<Event> event;
    CopyQueue::Request request;
    std::optional<Flight> flight;
};

class Engine::Worker {
  public:
    // `first`: the number of its first buffer.
    Worker(Engine& engine, std::uint32_t index, std::byte* ring, std::uint32_t first, std::uint32_t count);
    // Takes chunks until the engine is closed.
    void run();

  private:
    // Brings a chunk on its way. Whatever happens, the engine hears of it once nothing of it is under way.
    void move(Lane& lane, Task task);
    // Where a chunk is read to: the target, if it may be written there and lies in one piece, or else the buffer.
    static std::span<std::byte> place(const Lane& lane, const Task& task, std::span<const Segment> segments);
    // Reads, as often as the options say where the reason of a failure may pass.
    Next read(const Task& task, std::span<std::byte> bytes);
    // Decodes what the host decodes, into the target where it may write that, or else behind the packed bytes; false if
    // a kernel fails.
    bool decode(const Lane& lane, const Task& task, std::span<const Segment> segments);
    // Enqueues what there is to copy, and kernels behind it: with that of other threads, where nothing has to be waited
    // for or timed, or else on the thread's own stream.
    void enqueue(const Job& job, CopyQueue::Request& request, Flight& flight);
    // Enqueues copies and kernels, or copies in place.
    void upload(Lane& lane, const Task& task, std::span<const Segment> segments, std::span<std::byte> bytes,
                Flight& flight);
    // Puts the event behind what was enqueued on the thread's own stream, also after a failure: it uses the buffer.
    void record(Flight& flight);
    // Waits for a lane's work, and reports it.
    void land(Lane& lane);
    void land(Flight flight);
    bool under_way() const;
    // No job hears late of what has come of it because another's file is slow.
    void land_others(const Job& job);
    void land_oldest();
    static Failure describe(const ReadError& error, std::uint32_t tensor, std::uint32_t file);
    static Failure describe(const DeviceError& error, const Task& task);

    Engine& engine_;
    Device& device_;
    const std::uint32_t index_;
    Readers readers_;
    std::vector<Lane> lanes_;
    const std::unique_ptr<Stream> stream_;  // ends its work before the lanes' events go
    std::size_t next_ = 0;
};

}  // namespace asyncload
