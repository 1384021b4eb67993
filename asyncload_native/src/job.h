// One load as the engine sees it: what is to be moved, how far that is, and how it ended.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cut.h"
#include "file.h"
#include "reader_choice.h"
#include "signal.h"
#include "spans.h"

namespace asyncload {

// Why a load ended early.
struct Failure {
    enum class Kind : std::uint8_t { read, ended, changed, copy, device };
    Kind kind = Kind::device;
    std::uint32_t tensor = 0;
    std::uint32_t file = 0;
    std::optional<std::uint64_t> offset;  // in the file: of the read, if there was one, or where the chunk begins
    int error_number = 0;                 // of a read
    bool transient = false;               // it may pass by itself
    std::string code;                     // the driver's
    std::string what;
};

// Where a load's time went; seconds are summed over the threads, those of uploads count when any is under way.
struct Times {
    double read = 0;
    double decode = 0;
    double upload = 0;
    std::uint64_t read_nbytes = 0;
    std::uint64_t decoded_nbytes = 0;
    std::uint64_t uploaded_nbytes = 0;
    std::uint64_t retries = 0;
};

class Job : public std::enable_shared_from_this<Job> {
  public:
    // When whoever waits for the descriptor is woken: once, at the end; for each tensor; for each chunk. What comes
    // before he has asked is told along.
    enum class Wake : std::uint8_t { end, tensor, chunk };

    struct News {
        std::vector<std::uint32_t> landed;  // tensors
        std::uint64_t moved = 0;            // bytes of tensors
        bool ended = false;                 // nothing of it is under way any more
        std::optional<Failure> failure;
    };

    // Cuts the tensors into chunks, as `cut` does, and throws as it does, and `std::system_error` where there is no
    // descriptor left. `to_host`: the targets are memory of the host, whatever the device. `timed`: events are recorded
    // around the copies of each chunk, and what the threads do is noted. `ahead`: as all of it will be admitted
    // without waiting for what has come, threads that have nothing else to do may read chunks into their buffers
    // before.
    Job(std::vector<std::shared_ptr<const File>> files, std::vector<TensorWork> tensors, std::uint64_t chunk_size,
        std::uint32_t rising, Wake wake, bool to_host, bool timed, bool ahead);
    Job(const Job&) = delete;
    Job& operator=(const Job&) = delete;

    // An eventfd; readable when there is news.
    int descriptor() const noexcept { return signal_.descriptor(); }
    // For each tensor, the group that it is moved in; that of a tensor that is skipped is the next one's.
    const std::vector<std::uint32_t>& groups() const noexcept { return groups_; }
    // What has happened since it was last asked.
    News poll();
    // How its files are read, and why.
    std::string reading() const;
    // Closes the descriptor; for who has heard of the end.
    void close();
    Times times() const;
    // What the threads did, by the first of a chunk's tensors, if it is timed.
    Spans& spans() noexcept { return spans_; }
    // By the engine's thread, the events before and behind each chunk's copies and kernels, where they are timed.
    using Copies = std::vector<std::vector<std::pair<std::shared_ptr<Event>, std::shared_ptr<Event>>>>;
    Copies copies() const;

  private:
    friend class Engine;
    using Clock = std::chrono::steady_clock;

    // Under the lock.
    void arrived(const Chunk& chunk);
    void fail(Failure failure);
    // It has ended: lets the files go and tells, without any lock. Once, when nothing of it is under way.
    void settle() noexcept;

    // Until its end:
    std::vector<std::shared_ptr<const File>> files_;
    std::shared_ptr<ReaderChoice> choice_;
    const std::vector<TensorWork> tensors_;
    const Cut cut_;
    const Wake wake_;
    const bool to_host_;
    const bool timed_;
    const bool ahead_;
    std::vector<std::uint32_t> groups_;

    // Written, under the engine's lock, before the first of a group's chunks is copied.
    std::vector<Address> targets_;               // by tensor
    std::vector<Address> scratch_;               // by the engine's buffer
    std::vector<std::shared_ptr<Event>> after_;  // that the streams wait for, on the device, before the first chunk
    std::vector<char> begun_;  // by the engine's thread, which alone touches it: its stream waits for them

    // The engine's, under its lock.
    std::size_t next_ = 0;         // chunk
    std::set<std::size_t> left_;   // chunks before that, which were read ahead and left for another job
    std::uint32_t admitted_ = 0;   // groups
    std::uint32_t under_way_ = 0;  // chunks
    std::atomic<bool> stopped_ = false;

    Spans spans_;

    mutable std::mutex mutex_;            // over the rest; never held while another is taken
    std::vector<std::uint64_t> missing_;  // bytes, by tensor
    std::uint32_t tensors_left_ = 0;
    Signal signal_;
    News news_;
    Times times_;
    Copies copies_;
    std::string reading_;  // at the end
    Clock::time_point uploading_until_{};
};

}  // namespace asyncload
