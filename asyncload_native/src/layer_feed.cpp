#include "layer_feed.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "threads.h"

namespace asyncload {

namespace {

// Sleeps until all of some events have passed; throws the first error of work before one.
void await(const std::vector<SharedEvent>& events) {
    std::optional<DeviceError> failure;
    for (const SharedEvent& event : events) {
        try {
            event->synchronize();
        } catch (const DeviceError& error) {
            if (!failure) failure = error;
        }
    }
    if (failure) throw DeviceError(*failure);
}

}  // namespace

LayerFeed::LayerFeed(std::shared_ptr<Device> device, std::vector<Layer> layers, Options options)
    : device_(std::move(device)), layers_(std::move(layers)), options_(std::move(options)), spans_(options_.trace) {
    device_->attach();
    for (std::uint32_t index = 0; index < options_.streams; ++index) streams_.push_back(device_->open_stream());
    try {
        enqueuing_.start("asyncload-feed", options_.nice, [this](Feeding& feeding) { enqueue(feeding); });
        awaiting_slots_.start("asyncload-slots", options_.nice, [this](Feeding& feeding) { await_slot(feeding); });
        awaiting_copies_.start("asyncload-copy", options_.nice, [this](Feeding& feeding) { await_copies(feeding); });
    } catch (...) {  // no thread is left for it
        close();
        throw;
    }
}

LayerFeed::~LayerFeed() {
    close();
}

std::uint64_t LayerFeed::feed(std::size_t layer, Address slot, std::vector<SharedEvent> after) {
    if (layer >= layers_.size()) throw std::out_of_range("there are not so many layers");
    const auto last = last_.find(slot);
    const auto before = last == last_.end() ? std::nullopt : std::optional(last->second);
    const std::uint64_t number = last_[slot] = next_++;
    {
        const std::lock_guard lock(mutex_);
        under_way_.insert(number);
    }
    enqueuing_.push({number, layer, slot, std::move(after), before, {}, {}});
    return number;
}

void LayerFeed::enqueue(Feeding& feeding) {
    const auto begin = Clock::now();
    std::optional<DeviceError> failure;
    try {
        device_->attach();
        enqueue_on_streams(feeding);
    } catch (const std::exception& error) {
        failure = of_device(error);
    }
    spans_.note(Span::What::enqueue, 0, feeding.layer, begin);
    if (failure)
        tell({feeding.number, false, std::move(failure), feeding.begun, feeding.arrived}, true);
    else
        awaiting_slots_.push(std::move(feeding));
}

void LayerFeed::enqueue_on_streams(Feeding& feeding) {
    for (const auto& stream : streams_) {
        for (const SharedEvent& event : feeding.after) stream->wait(*event);
        feeding.begun.push_back(device_->make_event(true, Wait::interrupt));
        stream->record(*feeding.begun.back());
    }
    std::optional<DeviceError> failure;
    try {
        copy(layers_[feeding.layer], feeding.slot);
    } catch (const std::exception& error) {
        failure = of_device(error);
    }
    for (const auto& stream : streams_) {  // also after a failure: what was enqueued uses the slot
        try {
            const auto arrived = device_->make_event(true, Wait::interrupt);
            stream->record(*arrived);
            feeding.arrived.push_back(arrived);
        } catch (const std::exception& error) {
            if (!failure) failure = of_device(error);
            stream->drain();
        }
    }
    if (failure) throw DeviceError(*failure);
}

void LayerFeed::copy(const Layer& layer, Address slot) {
    std::size_t lane = 0;
    for (const Piece& piece : layer) {
        Stream& stream = *streams_[lane];
        if (piece.n_blocks > 0) {
            const Address packed = options_.scratch[lane];
            stream.upload({packed, pointer(piece.source), piece.nbytes});
            stream.decode({piece.kernel, packed, slot + piece.offset, piece.n_blocks});
        } else {
            stream.upload({slot + piece.offset, pointer(piece.source), piece.nbytes});
        }
        lane = (lane + 1) % streams_.size();
    }
}

void LayerFeed::await_slot(Feeding& feeding) {
    const auto begin = Clock::now();
    try {
        device_->attach();
        await(feeding.after);
    } catch (const DeviceError&) {  // the work's, whose own stream reports it
    }
    if (feeding.before) {
        std::unique_lock lock(mutex_);
        told_.wait(lock, [&] { return !under_way_.contains(*feeding.before); });
    }
    spans_.note(Span::What::await_slot, 0, feeding.layer, begin);
    tell({feeding.number, false, std::nullopt, feeding.begun, feeding.arrived}, !options_.each_arrival);
    awaiting_copies_.push(std::move(feeding));
}

void LayerFeed::await_copies(Feeding& feeding) {
    const auto begin = Clock::now();
    News news{feeding.number, true, std::nullopt, {}, {}};
    try {
        device_->attach();
        await(feeding.arrived);
    } catch (const DeviceError& error) {
        news.failure = error;
    }
    spans_.note(Span::What::await_copies, 0, feeding.layer, begin);
    const bool wakes = news.failure || options_.each_arrival || feeding.layer + 1 == layers_.size();
    tell(std::move(news), wakes);
}

void LayerFeed::tell(News news, bool wakes) {
    const std::lock_guard lock(mutex_);
    if (news.has_arrived || news.failure) under_way_.erase(news.number);
    news_.push_back(std::move(news));
    if (wakes) {
        due_ = true;
        signal_.set();
    }
    told_.notify_all();
}

std::vector<LayerFeed::News> LayerFeed::poll() {
    const std::lock_guard lock(mutex_);
    return take_news();
}

std::vector<LayerFeed::News> LayerFeed::wait() {
    std::unique_lock lock(mutex_);
    told_.wait(lock, [this] { return due_; });
    return take_news();
}

std::vector<LayerFeed::News> LayerFeed::take_news() {
    due_ = false;
    signal_.clear();
    return std::exchange(news_, {});
}

std::vector<std::uint64_t> LayerFeed::streams() const {
    std::vector<std::uint64_t> handles;
    for (const auto& stream : streams_) handles.push_back(stream->handle());
    return handles;
}

void LayerFeed::close() {
    if (streams_.empty()) return;
    enqueuing_.close();
    awaiting_slots_.close();
    awaiting_copies_.close();
    try {
        device_->attach();
    } catch (const DeviceError&) {  // then there is no context to give anything back to
    }
    streams_.clear();  // waits for their work
    const std::lock_guard lock(mutex_);
    signal_.close();
}

void LayerFeed::Worker::start(const char* name, int nice, Work work) {
    work_ = std::move(work);
    thread_ = std::thread([this, name, nice] {
        name_thread(name);
        lower_priority(nice);
        run();
    });
}

void LayerFeed::Worker::push(Feeding feeding) {
    const std::lock_guard lock(mutex_);
    feedings_.push_back(std::move(feeding));
    changed_.notify_one();
}

void LayerFeed::Worker::close() {
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
        changed_.notify_one();
    }
    if (thread_.joinable()) thread_.join();
}

void LayerFeed::Worker::run() {
    for (;;) {
        std::optional<Feeding> feeding;
        {
            std::unique_lock lock(mutex_);
            changed_.wait(lock, [this] { return closing_ || !feedings_.empty(); });
            if (feedings_.empty()) return;
            feeding = std::move(feedings_.front());
            feedings_.pop_front();
        }
        work_(*feeding);
    }
}

}  // namespace asyncload
