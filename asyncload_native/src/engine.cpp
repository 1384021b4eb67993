#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
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

// A chunk on its way behind the buffer.
struct Engine::Flight {
    Task task;
    Clock::time_point begin;  // of enqueuing
    std::uint64_t nbytes;     // that leave the buffer
    bool enqueued;            // the buffer is in use until the event has passed
    std::optional<Failure> failure;
    std::shared_ptr<Event> begun;  // where the job is timed
    std::shared_ptr<Event> event;  // behind it
};

// A staging buffer, and an event for what is enqueued from it.
struct Engine::Lane {
    std::span<std::byte> buffer;
    std::shared_ptr<Event> event;
    std::optional<Flight> flight;
};

class Engine::Worker {
  public:
    Worker(Engine& engine, std::uint32_t index, std::byte* buffers, std::uint32_t count)
        : engine_(engine), device_(*engine.device_), index_(index), stream_(device_.open_stream()) {
        const std::uint64_t size = engine.options_.chunk_size;
        for (std::uint32_t lane = 0; lane < count; ++lane)
            lanes_.push_back({{buffers + lane * size, size}, device_.make_event(false, Wait::poll), std::nullopt});
    }

    void run() {
        name_thread("asyncload-worker");
        lower_priority(engine_.options_.nice);
        for (;;) {
            Lane& lane = lanes_[next_];
            if (lane.flight) land(lane);
            const bool idle = !under_way();
            if (auto task = engine_.take(idle)) {
                land_others(*task->job);
                move(lane, std::move(*task));
                next_ = (next_ + 1) % lanes_.size();
            } else if (idle) {
                return;
            } else {
                land_oldest();
            }
        }
    }

  private:
    // Brings a chunk on its way. Whatever happens, the engine hears of it once nothing of it is under way.
    void move(Lane& lane, Task task) {
        Job& job = *task.job;
        const Chunk& chunk = *task.chunk;
        const std::span segments(&job.cut_.segments[chunk.first_segment], chunk.n_segments);
        const std::uint32_t tensor = segments.front().tensor;
        Flight flight{task, {}, 0, false, std::nullopt, nullptr, lane.event};
        auto kind = Failure::Kind::device;
        try {
            device_.attach();
            kind = Failure::Kind::copy;
            const auto bytes = place(lane, task, segments);
            Next next = read(task, bytes);
            if (next == Next::go_on && !decode(lane, task, segments)) {
                flight.failure = describe(DeviceError("the decoding kernel failed", ""), Failure::Kind::decode, task);
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
            flight.failure = describe(of_device(error), kind, task);
        }
        if (!flight.enqueued) return land(std::move(flight));
        try {
            if (flight.begun) flight.event = device_.make_event(true, Wait::poll);
            stream_->record(*flight.event);  // also after a failure: what was enqueued uses the buffer
        } catch (const DeviceError& error) {
            if (!flight.failure) flight.failure = describe(error, Failure::Kind::device, task);
            stream_->drain();
            flight.event = nullptr;  // it says nothing of this
        }
        lane.flight = std::move(flight);
    }

    // Where a chunk is read to: the target, if it may be written there and lies in one piece, or else the buffer.
    static std::span<std::byte> place(const Lane& lane, const Task& task, std::span<const Segment> segments) {
        const Job& job = *task.job;
        const Segment& segment = segments.front();
        if (task.in_place && segments.size() == 1 && job.tensors_[segment.tensor].decode == Decode::none)
            return {pointer(job.targets_[segment.tensor] + segment.target_offset), task.chunk->nbytes};
        return lane.buffer.first(task.chunk->nbytes);
    }

    // Reads, as often as the options say where the reason of a failure may pass.
    Next read(const Task& task, std::span<std::byte> bytes) {
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

    // Decodes what the host decodes, into the target where it may write that, or else behind the packed bytes; false if
    // a kernel fails.
    bool decode(const Lane& lane, const Task& task, std::span<const Segment> segments) {
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

    // Enqueues copies and kernels, or copies in place.
    void upload(const Lane& lane, const Task& task, std::span<const Segment> segments, std::span<std::byte> bytes,
                Flight& flight) {
        Job& job = *task.job;
        flight.begin = Clock::now();
        if (job.begun_[index_] == 0) {
            for (const auto& event : job.after_) stream_->wait(*event);
            job.begun_[index_] = 1;
        }
        if (job.timed_) stream_->record(*(flight.begun = device_.make_event(true, Wait::poll)));
        for (const Segment& segment : segments) {
            if (segment.target_nbytes == 0) continue;
            const TensorWork& tensor = job.tensors_[segment.tensor];
            const Address target = job.targets_[segment.tensor] + segment.target_offset;
            const std::byte* const source = &lane.buffer[segment.upload_offset];
            if (tensor.decode == Decode::device) {
                const Address packed = job.scratch_[index_] + segment.source_offset;
                flight.enqueued = true;
                stream_->upload(packed, source, segment.upload_nbytes);
                stream_->decode(tensor.kernel, packed, target,
                                static_cast<std::int64_t>(segment.source_nbytes / tensor.block_nbytes));
            } else if (!task.in_place) {
                flight.enqueued = true;
                stream_->upload(target, source, segment.upload_nbytes);
            } else if (tensor.decode == Decode::none && bytes.data() == lane.buffer.data()) {
                std::copy_n(source, segment.upload_nbytes, pointer(target));
            }
            flight.nbytes += segment.upload_nbytes;
        }
        job.spans_.note(Span::What::enqueue, index_, segments.front().tensor, flight.begin);
    }

    // Waits for a lane's work, and reports it.
    void land(Lane& lane) {
        Flight flight = std::move(*lane.flight);
        lane.flight.reset();
        Job& job = *flight.task.job;
        const auto tensor = job.cut_.segments[flight.task.chunk->first_segment].tensor;
        const auto begin = Clock::now();
        try {
            if (flight.event) flight.event->synchronize();
        } catch (const DeviceError& error) {
            if (!flight.failure) flight.failure = describe(error, Failure::Kind::copy, flight.task);
            stream_->drain();
        }
        job.spans_.note(Span::What::await_copies, index_, tensor, begin);
        if (flight.begun && flight.event) {
            const std::lock_guard lock(job.mutex_);
            job.copies_[index_].emplace_back(flight.begun, flight.event);
        }
        if (device_.poisons()) std::ranges::fill(lane.buffer, poison);
        land(std::move(flight));
    }

    void land(Flight flight) {
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

    bool under_way() const {
        return std::ranges::any_of(lanes_, [](const Lane& lane) { return lane.flight.has_value(); });
    }

    // No job hears late of what has come of it because another's file is slow.
    void land_others(const Job& job) {
        for (Lane& lane : lanes_)
            if (lane.flight && lane.flight->task.job.get() != &job) land(lane);
    }

    void land_oldest() {
        for (std::size_t at = 0; at < lanes_.size(); ++at) {
            Lane& lane = lanes_[(next_ + at) % lanes_.size()];
            if (lane.flight) return land(lane);
        }
    }

    static Failure describe(const ReadError& error, std::uint32_t tensor, std::uint32_t file) {
        using enum ReadError::Kind;
        const auto kind = error.kind == ended     ? Failure::Kind::ended
                          : error.kind == changed ? Failure::Kind::changed
                                                  : Failure::Kind::read;
        return {kind, tensor, file, error.offset, error.error_number, error.transient(), {}, error.what()};
    }

    static Failure describe(const DeviceError& error, Failure::Kind kind, const Task& task) {
        const Chunk& chunk = *task.chunk;
        const auto tensor = task.job->cut_.segments[chunk.first_segment].tensor;
        return {kind, tensor, chunk.file, chunk.offset, 0, false, error.name(), error.what()};
    }

    Engine& engine_;
    Device& device_;
    const std::uint32_t index_;
    Readers readers_;
    std::vector<Lane> lanes_;
    const std::unique_ptr<Stream> stream_;  // ends its work before the lanes' events go
    std::size_t next_ = 0;
};

Engine::Engine(std::shared_ptr<Device> device, std::byte* ring, const Options& options)
    : device_(std::move(device)), options_(options) {
    device_->attach();
    std::uint32_t first = 0;
    for (std::uint32_t index = 0; index < options_.threads; ++index) {  // shares differ by one at most
        const std::uint32_t end = options_.buffers * (index + 1) / options_.threads;
        workers_.push_back(std::make_unique<Worker>(*this, index, ring + first * options_.chunk_size, end - first));
        first = end;
    }
    try {
        for (auto& worker : workers_) threads_.emplace_back([&worker] { worker->run(); });
    } catch (...) {  // no thread is left for it
        close();
        throw;
    }
}

Engine::~Engine() {
    close();
}

void Engine::submit(std::shared_ptr<Job> job, std::vector<Address> scratch, std::vector<std::shared_ptr<Event>> after) {
    std::shared_ptr<Job> ended;
    {
        const std::lock_guard lock(mutex_);
        job->scratch_ = std::move(scratch);
        job->after_ = std::move(after);
        job->begun_.assign(options_.threads, 0);
        job->copies_.resize(options_.threads);
        jobs_.push_back(job);
        ended = closing_ ? stop(*job) : take_ended(*job);
        changed_.notify_all();
    }
    if (ended) ended->settle();
}

bool Engine::admit(Job& job, std::uint32_t groups, std::size_t first, std::span<const Address> targets) {
    const std::lock_guard lock(mutex_);
    if (first > job.targets_.size() || targets.size() > job.targets_.size() - first)
        throw std::out_of_range("there are not so many tensors");
    const bool others = waits(job);
    std::ranges::copy(targets, job.targets_.begin() + static_cast<std::ptrdiff_t>(first));
    job.admitted_ = std::max(job.admitted_, groups);
    changed_.notify_all();
    return others;
}

void Engine::cancel(Job& job) {
    std::shared_ptr<Job> ended;
    {
        const std::lock_guard lock(mutex_);
        ended = stop(job);
        changed_.notify_all();  // what waits to read again
    }
    if (ended) ended->settle();
}

std::shared_ptr<Job> Engine::stop(Job& job) {
    job.stopped_ = true;
    job.next_ = job.cut_.chunks.size();
    job.left_.clear();
    return take_ended(job);
}

std::shared_ptr<Job> Engine::take_ended(Job& job) {
    if (next(job) || job.under_way_ > 0) return nullptr;
    const auto found = std::ranges::find_if(jobs_, [&](const auto& other) { return other.get() == &job; });
    if (found == jobs_.end()) return nullptr;
    auto ended = std::move(*found);
    jobs_.erase(found);
    return ended;
}

bool Engine::busy() const {
    const std::lock_guard lock(mutex_);
    return std::ranges::any_of(jobs_, [](const auto& job) { return job->under_way_ > 0; });
}

bool Engine::contended() const {
    return !std::unique_lock(mutex_, std::try_to_lock).owns_lock();
}

void Engine::close() {
    if (workers_.empty()) return;
    std::vector<std::shared_ptr<Job>> ended;
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
        for (const auto& job : std::deque(jobs_)) ended.push_back(stop(*job));
        changed_.notify_all();
    }
    for (const auto& job : ended)
        if (job) job->settle();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    try {
        device_->attach();
    } catch (const DeviceError&) {  // then there is no context to give anything back to
    }
    workers_.clear();
}

std::optional<std::size_t> Engine::next(const Job& job) {
    if (!job.left_.empty()) return *job.left_.begin();
    return job.next_ < job.cut_.chunks.size() ? std::optional(job.next_) : std::nullopt;
}

bool Engine::waits(const Job& job) {
    const auto chunk = next(job);
    return chunk && job.cut_.chunks[*chunk].group < job.admitted_;
}

bool Engine::waits_to_be_read(const Job& job) const {
    return job.ahead_ && next(job) && !in_place(job);
}

bool Engine::in_place(const Job& job) const {
    return job.to_host_ || (device_->in_place() && job.after_.empty() && !job.timed_);
}

std::optional<Engine::Task> Engine::take(bool wait) {
    std::unique_lock lock(mutex_);
    if (std::exchange(leaving_, false)) changed_.notify_all();
    for (;;) {
        // Of the jobs that have something to do, the one with the least under way, so that a small one beside a large
        // one has its share at once; of equal ones, in turn.
        const auto find = [this](const auto& has_work) {
            auto best = jobs_.end();
            for (auto job = jobs_.begin(); job != jobs_.end(); ++job)
                if (has_work(**job) && (best == jobs_.end() || (*job)->under_way_ < (*best)->under_way_)) best = job;
            return best;
        };
        auto best = find(waits);
        const bool ahead = best == jobs_.end();
        if (ahead) best = find([this](const Job& job) { return waits_to_be_read(job); });
        if (best != jobs_.end()) {
            const auto job = *best;
            std::rotate(best, best + 1, jobs_.end());
            ++job->under_way_;
            const std::size_t chunk = *next(*job);
            if (job->left_.erase(chunk) == 0) ++job->next_;
            return Task{job, &job->cut_.chunks[chunk], !ahead && in_place(*job), ahead};
        }
        if (!wait || closing_) return std::nullopt;
        changed_.wait(lock);
    }
}

bool Engine::leave(const Task& task) {
    Job& job = *task.job;
    if (!task.ahead || leaving_ || task.chunk->group < job.admitted_) return false;
    if (std::ranges::none_of(jobs_, [](const auto& other) { return waits(*other); })) return false;
    job.left_.insert(static_cast<std::size_t>(task.chunk - job.cut_.chunks.data()));
    --job.under_way_;
    return leaving_ = true;
}

Engine::Next Engine::await_targets(const Task& task) {
    const Job& job = *task.job;
    if (!task.ahead) return job.stopped_ ? Next::give_up : Next::go_on;
    std::unique_lock lock(mutex_);
    for (;;) {
        if (job.stopped_) return Next::give_up;
        if (task.chunk->group < job.admitted_) return Next::go_on;
        if (leave(task)) return Next::left;
        changed_.wait(lock);
    }
}

Engine::Next Engine::pause(const Task& task, double seconds) {
    const Job& job = *task.job;
    std::unique_lock lock(mutex_);
    const auto until = Clock::now() + std::chrono::duration<double>(seconds);
    for (;;) {
        if (job.stopped_) return Next::give_up;
        if (leave(task)) return Next::left;
        if (changed_.wait_until(lock, until) == std::cv_status::timeout)
            return job.stopped_ ? Next::give_up : Next::go_on;
    }
}

void Engine::report(const Task& task, End end, Failure failure) {
    std::shared_ptr<Job> ended;
    {
        const std::lock_guard lock(mutex_);
        Job& job = *task.job;
        --job.under_way_;
        {
            const std::lock_guard job_lock(job.mutex_);
            if (end == End::failed)
                job.fail(std::move(failure));
            else if (end == End::arrived)
                job.arrived(*task.chunk);
        }
        if (end == End::failed) changed_.notify_all();  // others may wait to read again
        ended = end == End::failed ? stop(job) : take_ended(job);
    }
    if (ended) ended->settle();
}

}  // namespace asyncload
