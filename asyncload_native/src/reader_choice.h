// How the bytes of a load are read, by what shows while it runs.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "race.h"
#include "reader.h"

namespace asyncload {

// A thread's readers, each made when first used.
class Readers {
  public:
    // Throws `Unavailable`.
    Reader& get(Strategy strategy);

  private:
    std::array<std::unique_ptr<Reader>, std::size(all_strategies)> readers_;
};

// Reads by pread until something is not in the page cache; from there on by each strategy that the files allow, until
// one has won. Whoever wins, what is in the page cache is not read past it, and what is too small is not worth a
// thought. Any number of threads may use it.
class ReaderChoice {
  public:
    static constexpr std::uint64_t small_file = 64 << 20;
    static constexpr std::size_t small_read = 1 << 20;

    // `files`: all that the load reads. Looks at none of them before the first read that misses the page cache.
    explicit ReaderChoice(std::vector<std::shared_ptr<const File>> files) : files_(std::move(files)) {}

    // As `Reader::read`. Where another strategy fails, it is given up and pread has the last word.
    void read(Readers& readers, const File& file, std::uint64_t offset, std::span<std::byte> buffer);

    // What was chosen until now, and why.
    std::string reason() const;

    // The parts of `read`. The strategy for some bytes, which is to be reported on; nothing for pread, which is not.
    std::optional<Strategy> choose(const File& file, std::uint64_t offset, std::size_t nbytes);
    void report(Strategy strategy, std::uint64_t nbytes, double seconds);
    void drop(Strategy strategy, const std::string& why);

  private:
    // Nothing has missed the page cache; a race is on; pread, or another, has won it.
    enum class Phase : std::uint8_t { before, race, pread, other };

    Race begin_race() const;
    void settle();

    const std::vector<std::shared_ptr<const File>> files_;
    std::atomic<Phase> phase_ = Phase::before;
    std::atomic<bool> small_ = false;        // something was too small
    std::atomic<std::uint64_t> cached_ = 0;  // bytes read by pread because the page cache had them
    mutable std::mutex mutex_;
    std::optional<Race> race_;  // under the lock
};

}  // namespace asyncload
