#include "layer_feed.h"

#include <utility>

#include "threads.h"

namespace asyncload {

LayerFeed::LayerFeed(std::shared_ptr<Device> device, std::vector<Layer> layers, std::uint32_t streams,
                     std::vector<Address> scratch, std::uint32_t waiters, int nice)
    : device_(std::move(device)), layers_(std::move(layers)), scratch_(std::move(scratch)) {
    device_->attach();
    for (std::uint32_t index = 0; index < streams; ++index) streams_.push_back(device_->open_stream());
    const auto begin = [nice] {
        name_thread("asyncload-layers");
        lower_priority(nice);
    };
    enqueuing_.start(1, begin);
    waiting_.start(waiters, begin);
}

LayerFeed::~LayerFeed() {
    close();
}

LayerFeed::Feeding LayerFeed::feed(std::size_t layer, Address slot, std::vector<SharedEvent> after) {
    Feeding feeding;
    for (std::size_t stream = 0; stream < streams_.size(); ++stream) {
        feeding.begun.push_back(device_->make_event(true));
        feeding.arrived.push_back(device_->make_event(true));
    }
    {
        const std::lock_guard lock(mutex_);
        feeding.number = next_++;
    }
    enqueuing_.push([this, feeding, layer, slot, after = std::move(after)] {
        perform(feeding.number, [&] {
            for (std::size_t index = 0; index < streams_.size(); ++index) {
                for (const SharedEvent& event : after) streams_[index]->wait(*event);
                streams_[index]->record(*feeding.begun[index]);
            }
            std::optional<DeviceError> failure;
            try {
                copy(layers_.at(layer), slot);
            } catch (const DeviceError& error) {
                failure = error;
            }
            // also after a failure: what was enqueued uses the slot
            for (std::size_t index = 0; index < streams_.size(); ++index) {
                try {
                    streams_[index]->record(*feeding.arrived[index]);
                } catch (const DeviceError& error) {
                    if (!failure) failure = error;
                    streams_[index]->drain();
                }
            }
            if (failure) throw DeviceError(*failure);
        });
        const std::lock_guard lock(mutex_);
        enqueued_ = feeding.number + 1;
        changed_.notify_all();
    });
    return feeding;
}

void LayerFeed::wait(std::uint64_t number) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return enqueued_ > number; });
}

std::uint64_t LayerFeed::settle(std::vector<SharedEvent> events) {
    std::uint64_t number = 0;
    {
        const std::lock_guard lock(mutex_);
        number = next_++;
    }
    waiting_.push([this, number, events = std::move(events)] {
        perform(number, [&] {
            std::optional<DeviceError> failure;
            for (const SharedEvent& event : events) {
                try {
                    event->synchronize();
                } catch (const DeviceError& error) {
                    if (!failure) failure = error;
                }
            }
            if (failure) throw DeviceError(*failure);
        });
    });
    return number;
}

void LayerFeed::copy(const Layer& layer, Address slot) {
    std::size_t lane = 0;
    for (const Piece& piece : layer) {
        Stream& stream = *streams_[lane];
        if (piece.n_blocks > 0) {
            stream.upload(scratch_[lane], pointer(piece.source), piece.nbytes);
            stream.decode(piece.kernel, scratch_[lane], slot + piece.offset, piece.n_blocks);
        } else {
            stream.upload(slot + piece.offset, pointer(piece.source), piece.nbytes);
        }
        lane = (lane + 1) % streams_.size();
    }
}

void LayerFeed::perform(std::uint64_t number, const std::function<void()>& work) {
    Ticket ticket{number, std::nullopt, {}};
    try {
        device_->attach();
        work();
    } catch (const DeviceError& error) {
        ticket.failure = error.what();
        ticket.code = error.name();
    }
    const std::lock_guard lock(mutex_);
    done_.push_back(std::move(ticket));
    signal_.set();
}

std::vector<LayerFeed::Ticket> LayerFeed::poll() {
    const std::lock_guard lock(mutex_);
    signal_.clear();
    return std::exchange(done_, {});
}

void LayerFeed::close() {
    enqueuing_.close();
    waiting_.close();
    try {
        device_->attach();
    } catch (const DeviceError&) {  // then there is no context to give anything back to
    }
    streams_.clear();  // waits for their work
    const std::lock_guard lock(mutex_);
    signal_.close();
}

void LayerFeed::Queue::start(std::uint32_t threads, const std::function<void()>& begin) {
    for (std::uint32_t index = 0; index < threads; ++index)
        threads_.emplace_back([this, begin] {
            begin();
            run();
        });
}

void LayerFeed::Queue::push(Work work) {
    const std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
    changed_.notify_one();
}

void LayerFeed::Queue::close() {
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
        changed_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void LayerFeed::Queue::run() {
    for (;;) {
        Work work;
        {
            std::unique_lock lock(mutex_);
            changed_.wait(lock, [this] { return closing_ || !work_.empty(); });
            if (work_.empty()) return;
            work = std::move(work_.front());
            work_.pop_front();
        }
        work();
    }
}

}  // namespace asyncload
