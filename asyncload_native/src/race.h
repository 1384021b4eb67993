// Which way of reading is the fastest, found out on bytes that have to be read anyway.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "reader.h"

namespace asyncload {

// Knows neither files nor clocks, and no lock: its owner's.
class Race {
  public:
    // Bytes that each strategy reads before one of them wins.
    static constexpr std::uint64_t distance = 16 << 20;
    // How many times as fast as pread another must be: what pread reads stays in the page cache for the next load.
    static constexpr double margin = 1.2;

    // Whose turn it is. One after the other, so that what the page cache reads ahead helps whoever asked for it.
    Strategy next() const;
    // It reads these bytes now.
    void give(Strategy strategy, std::uint64_t nbytes) { runner(strategy).given += nbytes; }
    // What came of it; `seconds` is one thread's.
    void report(Strategy strategy, std::uint64_t nbytes, double seconds);
    // It cannot be used, for a reason. Not for pread, which is what remains.
    void drop(Strategy strategy, std::string reason);

    std::optional<Strategy> winner() const noexcept { return winner_; }
    // The winner, or that there is none yet, and the figures, in words.
    std::string describe() const;

  private:
    struct Runner {
        std::uint64_t given = 0;  // bytes
        std::uint64_t nbytes = 0;
        double seconds = 0;
        std::optional<std::string> dropped;

        double rate() const noexcept { return seconds > 0 ? static_cast<double>(nbytes) / seconds : 0; }
    };

    Runner& runner(Strategy strategy) { return runners_[static_cast<std::size_t>(strategy)]; }
    const Runner& runner(Strategy strategy) const { return runners_[static_cast<std::size_t>(strategy)]; }
    Strategy best() const;
    void settle();

    std::array<Runner, std::size(all_strategies)> runners_;
    std::optional<Strategy> winner_;
};

}  // namespace asyncload
