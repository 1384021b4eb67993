// What threads did and when, for traces.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

namespace asyncload {

// What a thread did for a layer or a tensor, by its index; in seconds of the steady clock.
struct Span {
    enum class What : std::uint8_t { read, decode, enqueue, await_copies, await_slot };
    What what;
    std::uint32_t thread;  // by its index, where several do the same
    std::size_t subject;
    double begin;
    double end;
};

// Spans that are kept until they are taken, if that is wanted: the last ones of very many.
class Spans {
  public:
    using Clock = std::chrono::steady_clock;

    explicit Spans(bool wanted) : wanted_(wanted) {}

    // From a moment until now.
    void note(Span::What what, std::uint32_t thread, std::size_t subject, Clock::time_point begin) {
        if (!wanted_) return;
        const auto end = Clock::now();
        const std::lock_guard lock(mutex_);
        kept_.push_back({what, thread, subject, seconds(begin), seconds(end)});
        if (kept_.size() > most) kept_.pop_front();
    }

    // Those since it was last asked, in the order of their ends.
    std::vector<Span> take() {
        std::deque<Span> kept;
        {
            const std::lock_guard lock(mutex_);
            kept.swap(kept_);
        }
        return {kept.begin(), kept.end()};
    }

  private:
    static constexpr std::size_t most = 1 << 16;  // asyncload/pipeline/_spans.py keeps no more

    static double seconds(Clock::time_point moment) {
        return std::chrono::duration<double>(moment.time_since_epoch()).count();
    }

    const bool wanted_;
    std::mutex mutex_;  // a leaf: no other is taken under it
    std::deque<Span> kept_;
};

}  // namespace asyncload
