#include "consumer.h"

#include <chrono>
#include <deque>
#include <memory>
#include <utility>

namespace asyncload {

double consume(LayerFeed& feed, Device& device, const std::vector<Address>& slots, unsigned passes, const Kernel& work,
               std::int64_t amount) {
    using Clock = std::chrono::steady_clock;
    device.attach();
    const auto stream = device.open_stream();
    const std::size_t total = feed.layers() * passes;
    std::vector<SharedEvent> ended(slots.size());
    std::deque<LayerFeed::News> fed;
    const auto ask = [&](std::size_t use) {
        const std::size_t slot = use % slots.size();
        if (use >= total) return;
        std::vector<SharedEvent> after;
        if (ended[slot]) after.push_back(ended[slot]);
        feed.feed(use % feed.layers(), slots[slot], std::move(after));
    };
    const auto begin = Clock::now();
    for (std::size_t use = 0; use < slots.size(); ++use) ask(use);
    for (std::size_t use = 0; use < total; ++use) {
        while (fed.empty())
            for (LayerFeed::News& news : feed.wait()) {
                if (news.failure) throw DeviceError(*news.failure);
                if (!news.has_arrived) fed.push_back(std::move(news));
            }
        for (const SharedEvent& event : fed.front().arrived) stream->wait(*event);
        fed.pop_front();
        const std::size_t slot = use % slots.size();
        stream->decode({work, slots[slot], slots[slot], amount});
        ended[slot] = device.make_event(false, Wait::interrupt);
        stream->record(*ended[slot]);
        ask(use + slots.size());
    }
    for (const SharedEvent& event : ended)
        if (event) event->synchronize();
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace asyncload
