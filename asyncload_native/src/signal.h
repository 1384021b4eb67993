// A descriptor by which threads tell an event loop that there is something to hear.
#pragma once

#include <chrono>

namespace asyncload {

// An eventfd. Its owner sees to it that no two calls of `set` and `clear` are made at once.
class Signal {
  public:
    Signal();  // throws `std::system_error` where there is no descriptor left
    ~Signal();
    Signal(const Signal&) = delete;
    Signal& operator=(const Signal&) = delete;

    int descriptor() const noexcept { return descriptor_; }
    void set();      // readable, until it is cleared
    double clear();  // returns the seconds since it was set, 0 where it was not
    void close();    // for good

  private:
    int descriptor_ = -1;
    bool set_ = false;
    std::chrono::steady_clock::time_point since_{};
};

}  // namespace asyncload
