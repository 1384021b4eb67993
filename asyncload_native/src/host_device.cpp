#include "host_device.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <optional>
#include <thread>
#include <utility>

#include "threads.h"

namespace asyncload {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::byte poison{0xA5};        // as asyncload/device/_host.py has it
constexpr double piece_seconds = 0.002;  // of a slowed copy: it reads its source until shortly before its end

Address address(const std::byte* bytes) {
    return reinterpret_cast<Address>(bytes);
}

Clock::duration seconds(double count) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(count));
}

// What an event and those that wait for it share.
class Point {
  public:
    void pass(const std::optional<DeviceError>& error) {
        const std::lock_guard lock(mutex_);
        passed_ = true;
        passed_at_ = Clock::now();
        error_ = error;
        changed_.notify_all();
    }

    bool passed() {
        const std::lock_guard lock(mutex_);
        raise();
        return passed_;
    }

    void wait() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return passed_; });
        raise();
    }

    // For a stream, which goes on whatever failed before.
    void wait_for_end() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return passed_; });
    }

    std::optional<double> passed_at() {
        const std::lock_guard lock(mutex_);
        if (!passed_) return std::nullopt;
        return std::chrono::duration<double>(passed_at_.time_since_epoch()).count();
    }

  private:
    void raise() const {
        if (error_) throw DeviceError(*error_);
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    bool passed_ = false;
    Clock::time_point passed_at_{};
    std::optional<DeviceError> error_;
};

class HostEvent final : public Event {
  public:
    bool done() override { return point_ == nullptr || point_->passed(); }
    void synchronize() override {
        if (point_ != nullptr) point_->wait();
    }
    double seconds_since(Event& earlier) override {
        const auto end = passed_at(), begin = earlier.passed_at();
        if (!begin || !end) throw DeviceError("there is no time between events that have not passed", "");
        return *end - *begin;
    }
    std::optional<double> passed_at() const override { return point_ ? point_->passed_at() : std::nullopt; }
    std::uint64_t handle() const noexcept override { return 0; }

    std::shared_ptr<Point> begin() { return point_ = std::make_shared<Point>(); }
    std::shared_ptr<Point> point() const { return point_; }

  private:
    std::shared_ptr<Point> point_;  // of the last recording
};

class HostStream final : public Stream {
  public:
    explicit HostStream(HostDevice& device) : device_(device), thread_([this] { run(); }) {}

    ~HostStream() override {
        push(nullptr);
        thread_.join();
    }

    void upload(const Copy& copy) override {
        push([this, copy, enqueued = Clock::now(), use = device_.use(copy.target, address(copy.source), copy.nbytes)] {
            ended_ = device_.copy(pointer(copy.target), copy.source, copy.nbytes, enqueued, ended_);
        });
    }

    void decode(const Decoding& decoding) override {
        push([decoding, function = reinterpret_cast<HostKernel>(decoding.kernel.handle),
              use = device_.use(decoding.target, decoding.source, 1)] {  // of each, as much as says which it is
            if (function(static_cast<std::intptr_t>(decoding.source), static_cast<std::intptr_t>(decoding.target),
                         decoding.n_blocks) != 1)
                throw DeviceError("a decoding kernel failed", "");
        });
    }

    void wait(Event& event) override {
        if (auto point = static_cast<HostEvent&>(event).point()) push([point] { point->wait_for_end(); });
    }

    void record(Event& event) override {
        push([this, point = static_cast<HostEvent&>(event).begin()] {
            point->pass(std::exchange(error_, std::nullopt));
        });
    }

    void synchronize() override {
        HostEvent event;
        record(event);
        event.synchronize();
    }

    std::uint64_t handle() const noexcept override { return 0; }

  private:
    using Work = std::function<void()>;

    void push(Work work) {
        const std::lock_guard lock(mutex_);
        work_.push_back(std::move(work));
        changed_.notify_one();
    }

    void run() {
        name_thread("asyncload-host");
        while (const Work work = next()) {  // which has gone before the next: then its memory is not in use any more
            try {
                work();
            } catch (const DeviceError& error) {  // the stream goes on, and the next event tells
                if (!error_) error_ = error;
            }
        }
    }

    Work next() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return !work_.empty(); });
        Work work = std::move(work_.front());
        work_.pop_front();
        return work;
    }

    HostDevice& device_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Work> work_;
    std::optional<DeviceError> error_;  // of work since the last event; the thread's alone, as is the next
    HostDevice::Moment ended_{};        // when the last copy was to
    std::thread thread_;                // last: it uses all of the above
};

}  // namespace

std::unique_ptr<Stream> HostDevice::open_stream() {
    return std::make_unique<HostStream>(*this);
}

std::shared_ptr<Event> HostDevice::make_event(bool, Wait) {
    return std::make_shared<HostEvent>();
}

// The host has no handles: who needs to wait for an event of another's does so before he submits.
std::shared_ptr<Event> HostDevice::adopt_event(std::uint64_t) {
    return std::make_shared<HostEvent>();
}

void HostDevice::set_pace(const Pace& pace) {
    const std::lock_guard lock(mutex_);
    pace_ = pace;
}

void HostDevice::fail_copy(std::uint64_t number) {
    const std::lock_guard lock(mutex_);
    failing_.push_back(copies_ + number);
}

bool HostDevice::in_place() const noexcept {
    const std::lock_guard lock(mutex_);
    return pace_.bandwidth == 0 && pace_.latency == 0 && !pace_.poison &&
           std::ranges::none_of(failing_, [this](auto number) { return number > copies_; });
}

bool HostDevice::poisons() const noexcept {
    const std::lock_guard lock(mutex_);
    return pace_.poison;
}

std::shared_ptr<const void> HostDevice::use(Address target, Address source, std::size_t nbytes) {
    const std::lock_guard lock(mutex_);
    const auto used = uses_.insert(uses_.end(), {target, source, nbytes});
    return {&*used, [this, used](const void*) {
                const std::lock_guard ending(mutex_);
                uses_.erase(used);
            }};
}

std::ptrdiff_t HostDevice::uses(Address address, std::size_t nbytes) const {
    const std::lock_guard lock(mutex_);
    return std::ranges::count_if(uses_, [&](const Use& use) {
        const auto overlaps = [&](Address begin) { return begin < address + nbytes && address < begin + use.nbytes; };
        return overlaps(use.target) || overlaps(use.source);
    });
}

HostDevice::Moment HostDevice::copy(std::byte* target, const std::byte* source, std::size_t nbytes, Moment enqueued,
                                    Moment not_before) {
    Moment begin = std::max(enqueued, not_before);
    double bandwidth = 0;
    bool poisons = false, fails = false;
    {
        const std::lock_guard lock(mutex_);
        bandwidth = pace_.bandwidth;
        poisons = pace_.poison;
        fails = std::ranges::find(failing_, ++copies_) != failing_.end();
        begin += seconds(pace_.latency);
        if (bandwidth > 0) {  // a timetable: a late waking does not add up
            begin = std::max(begin, busy_until_);
            busy_until_ = begin + seconds(static_cast<double>(nbytes) / bandwidth);
        }
    }
    if (fails) throw DeviceError("a copy failed, as a test asked", "", true);
    if (poisons) std::fill_n(target, nbytes, poison);
    std::this_thread::sleep_until(begin);
    if (bandwidth == 0) {
        std::copy_n(source, nbytes, target);
        return begin;
    }
    const auto piece = std::max<std::size_t>(1, static_cast<std::size_t>(bandwidth * piece_seconds));
    for (std::size_t at = 0; at < nbytes;) {
        const std::size_t count = std::min(piece, nbytes - at);
        std::this_thread::sleep_until(begin + seconds(static_cast<double>(at + count) / bandwidth));
        std::copy_n(source + at, count, target + at);
        at += count;
    }
    return begin + seconds(static_cast<double>(nbytes) / bandwidth);
}

}  // namespace asyncload
