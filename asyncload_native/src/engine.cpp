#include "engine.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

#include "worker.h"

namespace asyncload {

Engine::Engine(std::shared_ptr<Device> device, std::byte* ring, const Options& options)
    : device_(std::move(device)), options_(options), cores_(options.threads) {
    device_->attach();
    if (device_->combines_copies()) copies_ = std::make_unique<CopyQueue>(*device_);
    std::uint32_t first = 0;
    for (std::uint32_t index = 0; index < options_.threads; ++index) {  // shares differ by one at most
        const std::uint32_t end = options_.buffers * (index + 1) / options_.threads;
        workers_.push_back(std::make_unique<Worker>(*this, index, ring, first, end - first));
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
    if (!scratch.empty() && scratch.size() < options_.buffers)
        throw std::out_of_range("each buffer needs a scratch of its own");
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
    settle_elsewhere(ended);
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
    settle_elsewhere(ended);
}

void Engine::settle_elsewhere(const std::shared_ptr<Job>& ended) {
    if (!ended) return;
    try {
        calls_.call([ended] { ended->settle(); });
    } catch (const std::exception&) {  // no memory is left for it
        ended->settle();
    }
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
    calls_.close();
    try {
        device_->attach();
    } catch (const DeviceError&) {  // then there is no context to give anything back to
    }
    workers_.clear();
    copies_.reset();
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
    const auto until = Spans::Clock::now() + std::chrono::duration<double>(seconds);
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
