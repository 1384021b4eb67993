#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <system_error>
#include <utility>

namespace asyncload {

namespace {

std::string describe(int error_number) {
    return std::generic_category().message(error_number);
}

// A FIFO would hold its opener until somebody writes to it. Throws errno.
Descriptor open_for_reading(const std::string& path, int flags) {
    Descriptor descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | flags));
    if (descriptor.get() < 0) throw std::system_error(errno, std::generic_category());
    return descriptor;
}

// io_uring takes O_NONBLOCK at its word, and fails where it would have to wait for the disk.
void let_wait(const Descriptor& descriptor) {
    const int flags = ::fcntl(descriptor.get(), F_GETFL);
    ::fcntl(descriptor.get(), F_SETFL, flags & ~O_NONBLOCK);
}

// Tries them out where the file system does not tell them.
Alignment probe_alignment(int fd) {
    constexpr std::size_t most = 4096;
    alignas(most) std::array<std::byte, most> memory;
    for (std::size_t alignment = 512;; alignment *= 2) {
        if (::pread(fd, memory.data(), alignment, 0) >= 0) return {alignment, alignment};
        if (errno == EINTR)
            alignment /= 2;
        else if (errno != EINVAL || alignment == most)
            throw Unavailable("no direct I/O", errno);
    }
}

Alignment find_alignment(int fd) {
#ifdef STATX_DIOALIGN
    struct statx status{};
    if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN) != 0) {
        if (status.stx_dio_offset_align == 0)
            throw Unavailable("no direct I/O: the file system has none for this file");
        return {status.stx_dio_offset_align, status.stx_dio_mem_align};
    }
#endif
    return probe_alignment(fd);
}

}  // namespace

bool ReadError::transient() const noexcept {
    // what a disk, a network file system or a signal makes pass by itself
    constexpr std::array passing{EAGAIN, EINTR, EIO, ENOMEM, ENOBUFS, ETIMEDOUT, EREMOTEIO};
    return std::ranges::find(passing, error_number) != passing.end();
}

Unavailable::Unavailable(const std::string& what, int number)
    : ReadError(Kind::failed, number == 0 ? what : what + ": " + describe(number), number) {}

std::shared_ptr<File> File::open(const std::string& path) {
    if (path.find('\0') != std::string::npos) throw ReadError(ReadError::Kind::failed, path + ": embedded null byte");
    try {
        return std::shared_ptr<File>(new File(path, open_for_reading(path, 0)));
    } catch (const std::system_error& error) {
        const int number = error.code().value();
        throw ReadError(ReadError::Kind::failed, path + ": " + describe(number), number);
    }
}

std::shared_ptr<File> File::share(const std::string& path, int fd) {
    Descriptor descriptor(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (descriptor.get() < 0) throw ReadError(ReadError::Kind::failed, path + ": " + describe(errno), errno);
    return std::shared_ptr<File>(new File(path, std::move(descriptor)));
}

File::File(std::string path, Descriptor descriptor)
    : path_(std::move(path)), descriptor_(std::move(descriptor)), identity_(identify(descriptor_.get())) {
    let_wait(descriptor_);
}

const File::Direct& File::direct() const {
    const std::lock_guard lock(mutex_);
    if (std::holds_alternative<std::monostate>(direct_)) {
        try {
            direct_ = open_direct();
        } catch (const Unavailable& reason) {
            direct_ = reason;
        }
    }
    if (const auto* const reason = std::get_if<Unavailable>(&direct_)) throw *reason;
    return std::get<Direct>(direct_);
}

File::Direct File::open_direct() const {
    Direct direct{};
    try {
        direct.descriptor = open_for_reading(path_, O_DIRECT);
    } catch (const std::system_error& error) {
        const int number = error.code().value();
        if (number == ENOENT || number == ENOTDIR) throw changed();
        throw Unavailable("no direct I/O", number);
    }
    if (identify(direct.descriptor.get()) != identity_) throw changed();
    let_wait(direct.descriptor);
    direct.alignment = find_alignment(direct.descriptor.get());
    const auto [offset, memory] = direct.alignment;
    if (std::max(offset, memory) > most_alignment || !std::has_single_bit(offset) || !std::has_single_bit(memory))
        throw Unavailable("no direct I/O: it wants to be aligned to " + std::to_string(std::max(offset, memory)));
    return direct;
}

void File::check_unchanged() const {
    struct stat status{};
    if (::stat(path_.c_str(), &status) != 0) {
        if (errno == ENOENT || errno == ENOTDIR) throw changed();
        throw failed(errno);
    }
    if (identify(status) != identity_ || identify(fd()) != identity_) throw changed();
}

void File::fail_read(std::uint64_t number, int error_number) {
    const std::lock_guard lock(mutex_);
    failing_[reads_ + number] = error_number;
}

void File::count_read(std::uint64_t offset) const {
    const std::lock_guard lock(mutex_);
    const auto found = failing_.find(++reads_);
    if (found != failing_.end()) throw failed(found->second, offset);
}

ReadError File::failed(int error_number, std::optional<std::uint64_t> offset) const {
    return {ReadError::Kind::failed, path_ + ": " + describe(error_number), error_number, offset};
}

ReadError File::changed() const {
    return {ReadError::Kind::changed, path_ + ": the file changed while it was being loaded"};
}

File::Identity File::identify(int fd) const {
    struct stat status{};
    if (::fstat(fd, &status) != 0) throw failed(errno);
    if (!S_ISREG(status.st_mode)) throw ReadError(ReadError::Kind::failed, path_ + ": not a regular file");
    return identify(status);
}

File::Identity File::identify(const struct stat& status) {
    constexpr std::int64_t nanoseconds = 1'000'000'000;
    return {status.st_dev, status.st_ino, static_cast<std::uint64_t>(status.st_size),
            status.st_mtim.tv_sec * nanoseconds + status.st_mtim.tv_nsec};
}

}  // namespace asyncload
