#include "copy_queue.h"

#include <algorithm>
#include <utility>

#include "threads.h"

namespace asyncload {

CopyQueue::CopyQueue(Device& device) : copying_(device.open_stream()), decoding_(device.open_stream()) {
    for (Batch& batch : batches_) {
        batch.copied = device.make_event(false, Wait::poll);
        batch.ended = device.make_event(false, Wait::poll);
    }
}

void CopyQueue::upload(Request& request) {
    Lock lock(mutex_);
    request.ended = false;
    request.failure.reset();
    waiting_.push_back(&request);
    advance(lock);
}

void CopyQueue::await(Request& request) {
    poll_until([&] {
        Lock lock(mutex_);
        if (!request.ended) advance(lock);
        return request.ended;
    });
    if (request.failure) throw DeviceError(*request.failure);
}

void CopyQueue::advance(Lock& lock) noexcept {
    if (std::exchange(advancing_, true)) return;
    while (retire(lock) || send(lock)) {
    }
    advancing_ = false;
}

bool CopyQueue::retire(Lock& lock) {
    if (under_way_ == 0) return false;
    Batch& batch = batches_[oldest_];
    lock.unlock();
    const bool ended = done(batch);
    lock.lock();
    if (!ended) return false;
    oldest_ = (oldest_ + 1) % batches_.size();
    --under_way_;
    for (Request* const request : batch.requests) request->ended = true;
    batch.requests.clear();
    return true;
}

bool CopyQueue::send(Lock& lock) {
    if (waiting_.empty() || under_way_ == batches_.size()) return false;
    Batch& batch = batches_[(oldest_ + under_way_) % batches_.size()];
    batch.requests.swap(waiting_);
    lock.unlock();
    enqueue(batch);
    lock.lock();
    ++under_way_;
    return true;
}

bool CopyQueue::copy_together(const Batch& batch) {
    try {
        copies_.clear();
        for (const Request* const request : batch.requests)
            copies_.insert(copies_.end(), request->copies.begin(), request->copies.end());
        if (copies_.size() < 2) return false;
        copying_->upload_all(copies_);
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

void CopyQueue::try_each(const Batch& batch, const std::function<void(const Request&)>& enqueue) {
    for (Request* const request : batch.requests) {
        if (request->failure) continue;
        try {
            enqueue(*request);
        } catch (const DeviceError& error) {
            request->failure = error;
        }
    }
}

void CopyQueue::enqueue(Batch& batch) {
    if (!copy_together(batch)) {
        try_each(batch, [this](const Request& request) {
            for (const Copy& copy : request.copies) copying_->upload(copy);
        });
    }
    const bool decodes =
        std::ranges::any_of(batch.requests, [](const Request* request) { return !request->decodings.empty(); });
    batch.drained = false;
    try {  // also after a failure: there may be copies before it
        if (!decodes) return copying_->record(*batch.ended);
        copying_->record(*batch.copied);
        decoding_->wait(*batch.copied);
        try_each(batch, [this](const Request& request) {
            for (const Decoding& decoding : request.decodings) decoding_->decode(decoding);
        });
        decoding_->record(*batch.ended);
    } catch (const DeviceError& error) {
        drain(batch, error);
        batch.drained = true;
    }
}

bool CopyQueue::done(Batch& batch) {
    if (batch.drained) return true;
    try {
        return batch.ended->done();
    } catch (const DeviceError& error) {
        drain(batch, error);
        return true;
    }
}

void CopyQueue::drain(Batch& batch, const DeviceError& error) {
    copying_->drain();
    decoding_->drain();
    for (Request* const request : batch.requests)
        if (!request->failure) request->failure = error;
}

}  // namespace asyncload
