#include "consumer.h"

#include <chrono>
#include <memory>
#include <utility>

namespace asyncload {

double consume(LayerFeed& feed, Device& device, const std::vector<Address>& slots, unsigned passes, const Kernel& work,
               std::int64_t amount) {
    using Clock = std::chrono::steady_clock;
    device.attach();
    const auto stream = device.open_stream();
    const std::size_t total = feed.layers() * passes;
    std::vector<LayerFeed::Feeding> asked(slots.size());
    std::vector<SharedEvent> ended(slots.size());
    const auto ask = [&](std::size_t use) {
        const std::size_t slot = use % slots.size();
        if (use >= total) return;
        std::vector<SharedEvent> after;
        if (ended[slot]) after.push_back(ended[slot]);
        asked[slot] = feed.feed(use % feed.layers(), slots[slot], std::move(after));
    };
    const auto begin = Clock::now();
    for (std::size_t use = 0; use < slots.size(); ++use) ask(use);
    for (std::size_t use = 0; use < total; ++use) {
        const std::size_t slot = use % slots.size();
        feed.wait(asked[slot].number);
        if (ended[slot]) ended[slot]->synchronize();
        for (const SharedEvent& event : asked[slot].arrived) stream->wait(*event);
        stream->decode(work, slots[slot], slots[slot], amount);
        ended[slot] = device.make_event(false);
        stream->record(*ended[slot]);
        ask(use + slots.size());
    }
    for (const SharedEvent& event : ended)
        if (event) event->synchronize();
    feed.poll();  // it was told here
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace asyncload
