#include "ring.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "file.h"

namespace asyncload {

namespace {

// An index that the kernel writes too.
std::atomic_ref<unsigned> shared(unsigned* index) {
    return std::atomic_ref(*index);
}

}  // namespace

Ring::Mapping::Mapping(int fd, std::uint64_t offset, std::size_t size) : size_(size) {
    void* const address =
        ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, static_cast<off_t>(offset));
    if (address == MAP_FAILED) throw Unavailable("no io_uring", errno);
    address_ = static_cast<std::byte*>(address);
}

Ring::Mapping::~Mapping() {
    ::munmap(address_, size_);
}

Descriptor Ring::open(unsigned entries, io_uring_params& parameters) {
    const long fd = ::syscall(__NR_io_uring_setup, entries, &parameters);
    if (fd < 0) throw Unavailable("no io_uring", errno);
    return Descriptor(static_cast<int>(fd));
}

Ring::Ring(unsigned entries)
    : descriptor_(open(entries, parameters_)),
      submissions_(descriptor_.get(), IORING_OFF_SQ_RING,
                   parameters_.sq_off.array + parameters_.sq_entries * sizeof(unsigned)),
      completions_(descriptor_.get(), IORING_OFF_CQ_RING,
                   parameters_.cq_off.cqes + parameters_.cq_entries * sizeof(io_uring_cqe)),
      entries_(descriptor_.get(), IORING_OFF_SQES, parameters_.sq_entries * sizeof(io_uring_sqe)) {
    // who lets a ring be made may still refuse its use
    if (::syscall(__NR_io_uring_enter, descriptor_.get(), 0, 0, 0, nullptr, 0) < 0)
        throw Unavailable("no io_uring", errno);
}

void Ring::push(int fd, const iovec& target, std::uint64_t offset, std::uint64_t tag, bool sleeping) {
    const auto& at = parameters_.sq_off;
    const auto tail = shared(submissions_.at<unsigned>(at.tail));
    const unsigned position = tail.load(std::memory_order_relaxed);  // only we move it
    const unsigned index = position & *submissions_.at<unsigned>(at.ring_mask);
    io_uring_sqe entry{};
    entry.opcode = IORING_OP_READV;
    entry.flags = sleeping ? IOSQE_ASYNC : 0;
    entry.fd = fd;
    entry.off = offset;
    entry.addr = reinterpret_cast<std::uintptr_t>(&target);
    entry.len = 1;
    entry.user_data = tag;
    entries_.at<io_uring_sqe>(0)[index] = entry;
    submissions_.at<unsigned>(at.array)[index] = index;
    tail.store(position + 1, std::memory_order_release);
    ++pushed_;
}

int Ring::wait() {
    const auto& at = parameters_.cq_off;
    const auto completed = [&] {
        return shared(completions_.at<unsigned>(at.head)).load(std::memory_order_relaxed) !=
               shared(completions_.at<unsigned>(at.tail)).load(std::memory_order_acquire);
    };
    for (unsigned submit = pushed_; pushed_ > 0 || !completed();) {
        const long count =
            ::syscall(__NR_io_uring_enter, descriptor_.get(), submit, 1, IORING_ENTER_GETEVENTS, nullptr, 0);
        if (count >= 0) {
            pushed_ -= static_cast<unsigned>(count);
            in_flight_ += static_cast<unsigned>(count);
            submit = pushed_;
        } else if (errno != EINTR) {
            if (in_flight_ == 0) return errno;
            if (completed()) return 0;
            // with what is in flight the kernel may have the means for more; until then there is no leaving
            if (submit == 0) ::sched_yield();
            submit = 0;
        }
    }
    return 0;
}

std::optional<Ring::Completion> Ring::pop() {
    const auto& at = parameters_.cq_off;
    const auto head = shared(completions_.at<unsigned>(at.head));
    const unsigned position = head.load(std::memory_order_relaxed);  // only we move it
    if (position == shared(completions_.at<unsigned>(at.tail)).load(std::memory_order_acquire)) return std::nullopt;
    const unsigned index = position & *completions_.at<unsigned>(at.ring_mask);
    const io_uring_cqe& entry = completions_.at<io_uring_cqe>(at.cqes)[index];
    const Completion completion{entry.user_data, entry.res};
    head.store(position + 1, std::memory_order_release);
    --in_flight_;
    return completion;
}

void Ring::drain() {
    const auto tail = shared(submissions_.at<unsigned>(parameters_.sq_off.tail));
    tail.store(tail.load(std::memory_order_relaxed) - pushed_, std::memory_order_release);
    pushed_ = 0;
    while (busy()) {
        wait();
        while (pop()) {
        }
    }
}

}  // namespace asyncload
