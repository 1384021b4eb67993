#include "reader_choice.h"

#include <sys/uio.h>

#include <algorithm>
#include <chrono>
#include <random>

namespace asyncload {

namespace {

using Clock = std::chrono::steady_clock;

// Whether the page cache has some bytes, judged by a few of them. Always others: to ask for a page brings it in, so
// that the same ones would be there the next time.
bool in_page_cache(const File& file, std::uint64_t offset, std::size_t nbytes) {
    constexpr int samples = 4;
    thread_local std::minstd_rand random(static_cast<unsigned>(Clock::now().time_since_epoch().count()));
    std::uniform_int_distribution<std::uint64_t> anywhere(offset, offset + nbytes - 1);
    for (int sample = 0; sample < samples; ++sample) {
        char byte = 0;
        const iovec target{&byte, 1};
        if (::preadv2(file.fd(), &target, 1, static_cast<off_t>(anywhere(random)), RWF_NOWAIT) < 0) return false;
    }
    return true;
}

}  // namespace

Reader& Readers::get(Strategy strategy) {
    auto& reader = readers_[static_cast<std::size_t>(strategy)];
    if (reader == nullptr) reader = make_reader(strategy);
    return *reader;
}

void ReaderChoice::read(Readers& readers, const File& file, std::uint64_t offset, std::span<std::byte> buffer) {
    file.count_read(offset);
    const auto strategy = choose(file, offset, buffer.size());
    if (!strategy) return readers.get(Strategy::pread).read(file, offset, buffer);
    try {
        Reader& reader = readers.get(*strategy);
        const auto begin = Clock::now();
        reader.read(file, offset, buffer);
        report(*strategy, buffer.size(), std::chrono::duration<double>(Clock::now() - begin).count());
    } catch (const ReadError& error) {
        if (*strategy == Strategy::pread || error.kind != ReadError::Kind::failed) throw;
        drop(*strategy, error.what());
        readers.get(Strategy::pread).read(file, offset, buffer);
    }
}

std::optional<Strategy> ReaderChoice::choose(const File& file, std::uint64_t offset, std::size_t nbytes) {
    const Phase phase = phase_;
    if (phase == Phase::pread) return std::nullopt;
    if (file.size() < small_file || nbytes < small_read) {
        small_ = true;
        return std::nullopt;
    }
    // during a race it may be what others have had read ahead, and would not let it come to an end
    if (phase != Phase::race && in_page_cache(file, offset, nbytes)) {
        cached_ += nbytes;
        return std::nullopt;
    }
    const std::lock_guard lock(mutex_);
    if (!race_) race_ = begin_race();
    settle();
    const Strategy strategy = race_->next();
    race_->give(strategy, nbytes);
    return strategy;
}

// All strategies that every file allows.
Race ReaderChoice::begin_race() const {
    Race race;
    for (const Strategy strategy : all_strategies) {
        for (const auto& file : files_) {
            if (file->size() < small_file) continue;
            if (const auto why = unavailable(strategy, *file)) {
                race.drop(strategy, *why);
                break;
            }
        }
    }
    return race;
}

void ReaderChoice::report(Strategy strategy, std::uint64_t nbytes, double seconds) {
    const std::lock_guard lock(mutex_);
    race_->report(strategy, nbytes, seconds);
    settle();
}

void ReaderChoice::drop(Strategy strategy, const std::string& why) {
    const std::lock_guard lock(mutex_);
    race_->drop(strategy, why);
    settle();
}

void ReaderChoice::settle() {
    const auto winner = race_->winner();
    phase_ = !winner ? Phase::race : *winner == Strategy::pread ? Phase::pread : Phase::other;
}

std::string ReaderChoice::reason() const {
    const std::lock_guard lock(mutex_);
    if (!race_) {
        if (cached_ > 0) return "pread: in the page cache";
        return small_ ? "pread: too small to measure" : "nothing read";
    }
    std::string text = race_->describe();
    if (cached_ > 0) text += "; " + std::to_string(cached_ >> 20) + " MiB in the page cache, read by pread";
    return text;
}

}  // namespace asyncload
