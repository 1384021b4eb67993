// Calls that others have made for them, so as not to wait themselves: in the driver, or for a file to be closed.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace asyncload {

// Threads that make calls, as many as there have been at once: none stands behind another. They are started when they
// are first needed.
class CallThreads {
  public:
    CallThreads() = default;
    ~CallThreads() { close(); }
    CallThreads(const CallThreads&) = delete;
    CallThreads& operator=(const CallThreads&) = delete;

    // Has a function called; the future has what it returns or throws. On the caller's own thread where there can be no
    // other: after `close`, and where the system has no thread left.
    template <typename Function>
    auto call(Function function) -> std::future<std::invoke_result_t<Function&>> {
        auto task = std::make_shared<std::packaged_task<std::invoke_result_t<Function&>()>>(std::move(function));
        auto result = task->get_future();
        if (!push([task] { (*task)(); })) (*task)();
        return result;
    }

    // Makes the calls that were asked for, and ends the threads.
    void close();

  private:
    using Task = std::function<void()>;

    bool push(Task task);
    void run();

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Task> tasks_;
    std::size_t idle_ = 0;  // threads
    bool closing_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace asyncload
