// A file to read from, and what can go wrong with it; by the same rules as asyncload/source/_file.py.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>

#include "descriptor.h"

namespace asyncload {

// The bytes of a file could not be had.
struct ReadError : std::runtime_error {
    // The system refused, with `error_number`, or what is there is no regular file; the file ended inside the range; it
    // is not the one that was opened.
    enum class Kind : std::uint8_t { failed, ended, changed };

    ReadError(Kind what_kind, const std::string& what, int number = 0, std::optional<std::uint64_t> at = std::nullopt)
        : std::runtime_error(what), kind(what_kind), error_number(number), offset(at) {}

    // Whether the same read may succeed when it is made again.
    bool transient() const noexcept;

    Kind kind;
    int error_number;
    std::optional<std::uint64_t> offset;  // of a byte that did not come, where there was a read
};

// A way of reading does not serve here, and another does; `what` says why.
struct Unavailable : ReadError {
    // `what` with the system's words for `number`, where there is one.
    explicit Unavailable(const std::string& what, int number = 0);
};

// What a request to the kernel has to be a multiple of; 1 where it need not.
struct Alignment {
    std::size_t offset = 1;  // its offset in the file and its length
    std::size_t memory = 1;  // its address
};

// A regular file, held open; its identity is device, inode, size and modification time. The descriptors close with the
// last owner. Any number of threads may use it.
class File : public std::enable_shared_from_this<File> {
  public:
    // Throws `ReadError` if it cannot be opened, with ENOENT if it is not there. Never waits for the writer of a FIFO.
    static std::shared_ptr<File> open(const std::string& path);
    // The file that somebody holds open, by a descriptor of its own. Throws `ReadError` if it is no regular file.
    static std::shared_ptr<File> share(const std::string& path, int fd);

    const std::string& path() const noexcept { return path_; }
    std::uint64_t size() const noexcept { return identity_.size; }  // in bytes, when it was opened
    int fd() const noexcept { return descriptor_.get(); }

    // A second descriptor, whose reads go past the page cache.
    struct Direct {
        Descriptor descriptor;
        Alignment alignment;
    };
    static constexpr std::size_t most_alignment = 64 << 10;

    // Opens it when first asked. Throws `Unavailable` where there is no direct I/O, `ReadError` if the path now leads
    // to another file.
    const Direct& direct() const;

    // Throws `ReadError` unless both what is open and what stands at the path are what was opened: a file replaced by
    // another shows only there.
    void check_unchanged() const;

    // For tests: has the `number`-th read of loads from now on (1 is the next) fail with `error_number`.
    void fail_read(std::uint64_t number, int error_number);
    // Counts a load's read; throws what `fail_read` asked for.
    void count_read(std::uint64_t offset) const;

    // A system call on this file failed with `error_number`.
    ReadError failed(int error_number, std::optional<std::uint64_t> offset = std::nullopt) const;

    struct Identity {
        std::uint64_t device;
        std::uint64_t inode;
        std::uint64_t size;
        std::int64_t modified;  // in nanoseconds
        bool operator==(const Identity&) const = default;
    };
    const Identity& identity() const noexcept { return identity_; }

  private:
    File(std::string path, Descriptor descriptor);

    static Identity identify(const struct stat& status);
    Identity identify(int fd) const;
    ReadError changed() const;
    Direct open_direct() const;

    const std::string path_;
    const Descriptor descriptor_;
    const Identity identity_;
    mutable std::mutex mutex_;
    mutable std::variant<std::monostate, Direct, Unavailable> direct_;
    mutable std::uint64_t reads_ = 0;
    std::map<std::uint64_t, int> failing_;  // by their number in `reads_`
};

}  // namespace asyncload
