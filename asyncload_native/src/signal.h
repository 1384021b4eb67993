// A descriptor by which threads tell an event loop that there is something to hear.
#pragma once

namespace asyncload {

// An eventfd. Its owner sees to it that no two calls of `set` and `clear` are made at once.
class Signal {
  public:
    Signal();  // throws `std::system_error` where there is no descriptor left
    ~Signal();
    Signal(const Signal&) = delete;
    Signal& operator=(const Signal&) = delete;

    int descriptor() const noexcept { return descriptor_; }
    void set();  // readable, until it is cleared
    void clear();
    void close();  // for good

  private:
    int descriptor_ = -1;
    bool set_ = false;
};

}  // namespace asyncload
