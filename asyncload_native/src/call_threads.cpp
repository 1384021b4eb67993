#include "call_threads.h"

#include <system_error>

#include "threads.h"

namespace asyncload {

bool CallThreads::push(Task task) {
    const std::lock_guard lock(mutex_);
    if (closing_) return false;
    if (idle_ <= tasks_.size()) {
        try {
            threads_.emplace_back([this] { run(); });
        } catch (const std::system_error&) {
            return false;
        }
    }
    tasks_.push_back(std::move(task));
    changed_.notify_one();
    return true;
}

void CallThreads::run() {
    name_thread("asyncload-calls");
    std::unique_lock lock(mutex_);
    for (;;) {
        ++idle_;
        changed_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
        --idle_;
        if (tasks_.empty()) return;
        {
            const Task task = std::move(tasks_.front());
            tasks_.pop_front();
            lock.unlock();
            task();
        }
        lock.lock();
    }
}

void CallThreads::close() {
    std::vector<std::thread> threads;
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
        threads.swap(threads_);
        changed_.notify_all();
    }
    for (std::thread& thread : threads) thread.join();
}

}  // namespace asyncload
