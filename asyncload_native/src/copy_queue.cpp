#include "copy_queue.h"

#include <utility>

#include "threads.h"

namespace asyncload {

CopyQueue::CopyQueue(Device& device) : stream_(device.open_stream()) {
    for (Batch& batch : batches_) batch.event = device.make_event(false, Wait::poll);
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

bool CopyQueue::enqueue_together(const Batch& batch) {
    try {
        copies_.clear();
        for (const Request* const request : batch.requests)
            copies_.insert(copies_.end(), request->copies.begin(), request->copies.end());
        if (copies_.size() < 2) return false;
        stream_->upload_all(copies_);
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

void CopyQueue::enqueue(Batch& batch) {
    if (!enqueue_together(batch)) {
        for (Request* const request : batch.requests) {
            try {
                for (const Copy& copy : request->copies) stream_->upload(copy);
            } catch (const DeviceError& error) {
                request->failure = error;
            }
        }
    }
    try {
        stream_->record(*batch.event);  // also after a failure: there may be copies before it
        batch.drained = false;
    } catch (const DeviceError& error) {
        drain(batch, error);
        batch.drained = true;
    }
}

bool CopyQueue::done(Batch& batch) {
    if (batch.drained) return true;
    try {
        return batch.event->done();
    } catch (const DeviceError& error) {
        drain(batch, error);
        return true;
    }
}

void CopyQueue::drain(Batch& batch, const DeviceError& error) {
    stream_->drain();
    for (Request* const request : batch.requests)
        if (!request->failure) request->failure = error;
}

}  // namespace asyncload
