// The cores that an engine's threads work on.
#pragma once

#include <atomic>
#include <cstddef>
#include <vector>

namespace asyncload {

// Keeps threads that work from sharing a core where they have no more cores than there are of them. Linux puts threads
// that wake up together on one core at times, and of a few cores among many it does not find out for tens of
// milliseconds that another one is idle. What counts is where a thread began: also while it sleeps in a read, or has
// been moved since; two that move at once may meet again, until one of them begins the next time.
class Cores {
  public:
    explicit Cores(std::size_t threads);

    // The calling thread, of this number, begins to work. Where another began on the same core, it moves to one that it
    // may use and on which none began, if there is one; its affinity is the same afterwards.
    void begin(std::size_t thread) noexcept;
    // It has nothing to do, or waits for copies.
    void end(std::size_t thread) noexcept;

  private:
    static constexpr int none = -1;
    bool shared(int core, std::size_t thread) const noexcept;

    std::vector<std::atomic<int>> working_;  // on which core each thread began
};

}  // namespace asyncload
