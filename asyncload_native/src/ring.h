// An io_uring of one thread, by its system calls: reads in flight, and what became of them.
#pragma once

#include <linux/io_uring.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "descriptor.h"

namespace asyncload {

class Ring {
  public:
    struct Completion {
        std::uint64_t tag;
        int result;  // bytes, or a negative errno
    };

    // For at most `entries` reads at a time. Throws `Unavailable` where the system has no io_uring, or none for this
    // process.
    explicit Ring(unsigned entries);

    // Makes a read ready for submission; `target` stays where it is until it has completed. With `sleeping` a thread of
    // the kernel's makes it, which may wait for anything.
    void push(int fd, const iovec& target, std::uint64_t offset, std::uint64_t tag, bool sleeping);
    // Submits what was pushed and sleeps until something has completed; returns 0, or an errno if the kernel takes
    // nothing and nothing is in flight.
    int wait();
    // What has completed, one by one.
    std::optional<Completion> pop();
    // Takes back what was pushed, and waits for what was submitted.
    void drain();
    // Whether a read was pushed that has not been popped.
    bool busy() const noexcept { return pushed_ + in_flight_ > 0; }

  private:
    // Memory shared with the kernel.
    class Mapping {
      public:
        Mapping(int fd, std::uint64_t offset, std::size_t size);
        Mapping(const Mapping&) = delete;
        Mapping& operator=(const Mapping&) = delete;
        ~Mapping();
        template <typename T>
        T* at(std::size_t offset) const {
            return reinterpret_cast<T*>(address_ + offset);
        }

      private:
        std::byte* address_;
        std::size_t size_;
    };

    static Descriptor open(unsigned entries, io_uring_params& parameters);

    io_uring_params parameters_{};
    const Descriptor descriptor_;
    const Mapping submissions_;
    const Mapping completions_;
    const Mapping entries_;
    unsigned pushed_ = 0;  // and not submitted
    unsigned in_flight_ = 0;
};

}  // namespace asyncload
