#include "worker.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "threads.h"

namespace asyncload {

namespace {

using Clock = Spans::Clock;

constexpr std::byte poison{0xA5};

std::intptr_t address(const std::byte* bytes) {
    return reinterpret_cast<std::intptr_t>(bytes);
}

double since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

Engine::Worker::Worker(Engine& engine, std::uint32_t index, std::byte* ring, std::uint32_t first, std::uint32_t count)
    : engine_(engine), device_(*engine.device_), index_(index), stream_(device_.open_stream()) {
    const std::uint64_t size = engine.options_.chunk_size;
    for (std::uint32_t number = first; number < first + count; ++number)
        lanes_.push_back(
            {number, {ring + number * size, size}, device_.make_event(false, Wait::poll), {}, std::nullopt});
}

void Engine::Worker::run() {
    name_thread("asyncload-worker");
    lower_priority(engine_.options_.nice);
    for (;;) {
        Lane& lane = lanes_[next_];
        if (lane.flight) land(lane);
        const bool idle = !under_way();
        if (auto task = engine_.take(idle)) {
            land_others(*task->job);
            engine_.cores_.begin(index_);
            move(lane, std::move(*task));
            engine_.cores_.end(index_);
            next_ = (next_ + 1) % lanes_.size();
        } else if (idle) {
            return;
        } else {
            land_oldest();
        }
    }
}

void Engine::Worker::move(Lane& lane, Task task) {
    Job& job = *task.job;
    const Chunk& chunk = *task.chunk;
    const std::span segments(&job.cut_.segments[chunk.first_segment], chunk.n_segments);
    const std::uint32_t tensor = segments.front().tensor;
    Flight flight{task, {}, 0, false, std::nullopt, false, nullptr, lane.event};
    try {
        device_.attach();
        const auto bytes = place(lane, task, segments);
        Next next = read(task, bytes);
        if (next == Next::go_on && !decode(lane, task, segments)) {
            flight.failure = describe(DeviceError("the decoding kernel failed", ""), task);
        } else if (next == Next::go_on) {
            while (task.ahead && under_way()) land_oldest();  // or it would be heard of late
            next = engine_.await_targets(task);
            if (next == Next::go_on) upload(lane, task, segments, bytes, flight);
        }
        if (next == Next::left) return;
        if (next == Next::give_up) return engine_.report(task, End::given_up);
    } catch (const ReadError& error) {
        flight.failure = describe(error, tensor, chunk.file);
    } catch (const std::exception& error) {
        flight.failure = describe(of_device(error), task);
    }
    if (!flight.enqueued) return land(std::move(flight));
    if (!flight.queued) record(flight);
    lane.flight = std::move(flight);
}

void Engine::Worker::record(Flight& flight) {
    try {
        if (flight.begun) flight.event = device_.make_event(true, Wait::poll);
        stream_->record(*flight.event);
    } catch (const DeviceError& error) {
        if (!flight.failure) flight.failure = describe(error, flight.task);
        stream_->drain();
        flight.event = nullptr;  // it says nothing of this
    }
}

std::span<std::byte> Engine::Worker::place(const Lane& lane, const Task& task, std::span<const Segment> segments) {
    const Job& job = *task.job;
    const Segment& segment = segments.front();
    if (task.in_place && segments.size() == 1 && job.tensors_[segment.tensor].decode == Decode::none)
        return {pointer(job.targets_[segment.tensor] + segment.target_offset), task.chunk->nbytes};
    return lane.buffer.first(task.chunk->nbytes);
}

Engine::Next Engine::Worker::read(const Task& task, std::span<std::byte> bytes) {
    Job& job = *task.job;
    const Chunk& chunk = *task.chunk;
    const auto begin = Clock::now();
    for (std::uint32_t attempt = 0;; ++attempt) {
        if (job.stopped_) return Next::give_up;
        try {
            job.choice_->read(readers_, *job.files_[chunk.file], chunk.offset, bytes);
            job.files_[chunk.file]->check_unchanged();
            break;
        } catch (const ReadError& error) {
            if (!error.transient() || attempt == engine_.options_.retries) throw;
        }
        {
            const std::lock_guard lock(job.mutex_);
            ++job.times_.retries;
        }
        while (under_way()) land_oldest();
        const double delay = std::ldexp(engine_.options_.retry_delay, static_cast<int>(attempt));
        if (const Next next = engine_.pause(task, delay); next != Next::go_on) return next;
    }
    job.spans_.note(Span::What::read, index_, job.cut_.segments[chunk.first_segment].tensor, begin);
    {
        const std::lock_guard lock(job.mutex_);
        job.times_.read += since(begin);
        job.times_.read_nbytes += chunk.nbytes;
    }
    make_way();
    return Next::go_on;
}

bool Engine::Worker::decode(const Lane& lane, const Task& task, std::span<const Segment> segments) {
    Job& job = *task.job;
    const auto begin = Clock::now();
    std::uint64_t nbytes = 0;
    for (const Segment& segment : segments) {
        const TensorWork& tensor = job.tensors_[segment.tensor];
        if (tensor.decode != Decode::host || segment.target_nbytes == 0) continue;
        const auto first = Clock::now();
        const auto function = reinterpret_cast<HostKernel>(tensor.kernel.handle);
        std::byte* const target = task.in_place ? pointer(job.targets_[segment.tensor] + segment.target_offset)
                                                : &lane.buffer[segment.upload_offset];
        const std::uint64_t blocks = segment.source_nbytes / tensor.block_nbytes;
        const std::uint64_t decoded = tensor.decoded_block_nbytes, most = std::max(stretch / decoded, 1UL);
        for (std::uint64_t block = 0; block < blocks; block += most) {
            const std::byte* const source = &lane.buffer[segment.source_offset + block * tensor.block_nbytes];
            if (function(address(source), address(target + block * decoded),
                         static_cast<std::intptr_t>(std::min(most, blocks - block))) != 1)
                return false;
            make_way();
        }
        job.spans_.note(Span::What::decode, index_, segment.tensor, first);
        nbytes += segment.target_nbytes;
    }
    if (nbytes == 0) return true;
    const std::lock_guard lock(job.mutex_);
    job.times_.decode += since(begin);
    job.times_.decoded_nbytes += nbytes;
    return true;
}

void Engine::Worker::enqueue(const Job& job, CopyQueue::Request& request, Flight& flight) {
    if (engine_.copies_ && job.after_.empty() && !job.timed_) {
        engine_.copies_->upload(request);
        flight.enqueued = flight.queued = true;
        return;
    }
    flight.enqueued = true;  // whatever fails
    for (const Copy& copy : request.copies) stream_->upload(copy);
    for (const Decoding& decoding : request.decodings) stream_->decode(decoding);
}

void Engine::Worker::upload(Lane& lane, const Task& task, std::span<const Segment> segments, std::span<std::byte> bytes,
                            Flight& flight) {
    Job& job = *task.job;
    flight.begin = Clock::now();
    if (job.begun_[index_] == 0) {
        for (const auto& event : job.after_) stream_->wait(*event);
        job.begun_[index_] = 1;
    }
    if (job.timed_) stream_->record(*(flight.begun = device_.make_event(true, Wait::poll)));
    auto& copies = lane.request.copies;
    auto& decodings = lane.request.decodings;
    copies.clear();
    decodings.clear();
    for (const Segment& segment : segments) {
        if (segment.target_nbytes == 0) continue;
        const TensorWork& tensor = job.tensors_[segment.tensor];
        const Address target = job.targets_[segment.tensor] + segment.target_offset;
        const std::byte* const source = &lane.buffer[segment.upload_offset];
        if (tensor.decode == Decode::device) {
            const Address packed = job.scratch_[lane.number] + segment.source_offset;
            copies.push_back({packed, source, segment.upload_nbytes});
            decodings.push_back({tensor.kernel, packed, target,
                                 static_cast<std::int64_t>(segment.source_nbytes / tensor.block_nbytes)});
        } else if (!task.in_place) {
            copies.push_back({target, source, segment.upload_nbytes});
        } else if (tensor.decode == Decode::none && bytes.data() == lane.buffer.data()) {
            std::copy_n(source, segment.upload_nbytes, pointer(target));
        }
        flight.nbytes += segment.upload_nbytes;
    }
    if (!copies.empty()) enqueue(job, lane.request, flight);
    job.spans_.note(Span::What::enqueue, index_, segments.front().tensor, flight.begin);
}

void Engine::Worker::land(Lane& lane) {
    Flight flight = std::move(*lane.flight);
    lane.flight.reset();
    Job& job = *flight.task.job;
    const auto tensor = job.cut_.segments[flight.task.chunk->first_segment].tensor;
    const auto begin = Clock::now();
    try {
        if (flight.queued)
            engine_.copies_->await(lane.request);
        else if (flight.event)
            flight.event->synchronize();
    } catch (const DeviceError& error) {
        if (!flight.failure) flight.failure = describe(error, flight.task);
        if (!flight.queued) stream_->drain();
    }
    job.spans_.note(Span::What::await_copies, index_, tensor, begin);
    if (flight.begun && flight.event) {
        const std::lock_guard lock(job.mutex_);
        job.copies_[index_].emplace_back(flight.begun, flight.event);
    }
    if (device_.poisons()) std::ranges::fill(lane.buffer, poison);
    land(std::move(flight));
}

void Engine::Worker::land(Flight flight) {
    {
        Job& job = *flight.task.job;
        const std::lock_guard lock(job.mutex_);
        if (flight.enqueued) {
            const auto end = Clock::now(), begin = std::max(flight.begin, job.uploading_until_);
            if (end > begin) job.times_.upload += std::chrono::duration<double>(end - begin).count();
            job.uploading_until_ = std::max(job.uploading_until_, end);
        }
        job.times_.uploaded_nbytes += flight.nbytes;
    }
    if (flight.failure)
        engine_.report(flight.task, End::failed, std::move(*flight.failure));
    else
        engine_.report(flight.task, End::arrived);
}

bool Engine::Worker::under_way() const {
    return std::ranges::any_of(lanes_, [](const Lane& lane) { return lane.flight.has_value(); });
}

void Engine::Worker::land_others(const Job& job) {
    for (Lane& lane : lanes_)
        if (lane.flight && lane.flight->task.job.get() != &job) land(lane);
}

void Engine::Worker::land_oldest() {
    for (std::size_t at = 0; at < lanes_.size(); ++at) {
        Lane& lane = lanes_[(next_ + at) % lanes_.size()];
        if (lane.flight) return land(lane);
    }
}

Failure Engine::Worker::describe(const ReadError& error, std::uint32_t tensor, std::uint32_t file) {
    using enum ReadError::Kind;
    const auto kind = error.kind == ended     ? Failure::Kind::ended
                      : error.kind == changed ? Failure::Kind::changed
                                              : Failure::Kind::read;
    return {kind, tensor, file, error.offset, error.error_number, error.transient(), {}, error.what()};
}

Failure Engine::Worker::describe(const DeviceError& error, const Task& task) {
    const auto kind = error.of_copy() ? Failure::Kind::copy : Failure::Kind::device;
    const Chunk& chunk = *task.chunk;
    const auto tensor = task.job->cut_.segments[chunk.first_segment].tensor;
    return {kind, tensor, chunk.file, chunk.offset, 0, false, error.name(), error.what()};
}

}  // namespace asyncload
