// The cores that an engine's threads work on.
#pragma once

#include <atomic>
#include <cstddef>
#include <vector>

namespace asyncload {

// Keeps threads that work from sharing a core while they may use another one. Linux puts threads that wake up together
// on one core at times, and with many cores that they may not use it leaves them there for tens of milliseconds.
class Cores {
  public:
    explicit Cores(std::size_t threads);

    // The calling thread, of this number, begins to work. Where another works on the same core, it moves to one on
    // which none of them works, if its affinity has one; that is the same afterwards.
    void begin(std::size_t thread) noexcept;
    // It sleeps, or has nothing to do.
    void end(std::size_t thread) noexcept;

  private:
    static constexpr int none = -1;
    bool shared(int core, std::size_t thread) const noexcept;

    std::vector<std::atomic<int>> working_;  // on which core each thread began
};

}  // namespace asyncload
