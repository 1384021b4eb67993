#include "race.h"

#include <algorithm>
#include <cstdio>
#include <utility>

namespace asyncload {

Strategy Race::next() const {
    if (winner_) return *winner_;
    for (const Strategy strategy : all_strategies) {
        const Runner& each = runner(strategy);
        if (!each.dropped && each.given < distance) return strategy;
    }
    return best();  // while the last ones are on their way, nobody waits for a slow one once more
}

void Race::report(Strategy strategy, std::uint64_t nbytes, double seconds) {
    if (winner_) return;
    runner(strategy).nbytes += nbytes;
    runner(strategy).seconds += seconds;
    settle();
}

void Race::drop(Strategy strategy, std::string reason) {
    runner(strategy).dropped = std::move(reason);
    winner_.reset();
    settle();
}

void Race::settle() {
    const auto runs = [](const Runner& each) { return !each.dropped; };
    const auto arrived = [](const Runner& each) { return each.dropped || each.nbytes >= distance; };
    if (std::ranges::count_if(runners_, runs) == 1 || std::ranges::all_of(runners_, arrived)) winner_ = best();
}

Strategy Race::best() const {
    Strategy best = Strategy::pread;
    double limit = runner(best).rate() * margin;
    for (const Strategy strategy : all_strategies) {
        const Runner& each = runner(strategy);
        if (each.dropped || each.rate() <= limit) continue;
        best = strategy;
        limit = each.rate();
    }
    return best;
}

std::string Race::describe() const {
    std::string text = winner_ ? name(*winner_) : "undecided";
    const char* separator = ": ";
    for (const Strategy strategy : all_strategies) {
        const Runner& each = runner(strategy);
        if (!each.dropped && each.nbytes == 0) continue;
        char rate[32];
        std::snprintf(rate, sizeof rate, "%.2f GB/s a thread", each.rate() / 1e9);
        text += std::exchange(separator, ", ") + std::string(name(strategy)) + ' ' +
                (each.dropped ? '(' + *each.dropped + ')' : rate);
    }
    return text;
}

}  // namespace asyncload
