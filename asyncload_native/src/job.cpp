#include "job.h"

#include <algorithm>
#include <utility>

namespace asyncload {

Job::Job(std::vector<std::shared_ptr<const File>> files, std::vector<TensorWork> tensors, std::uint64_t chunk_size,
         std::uint32_t rising, Wake wake, bool to_host, bool timed, bool ahead)
    : files_(std::move(files)),
      tensors_(std::move(tensors)),
      cut_(cut(tensors_, chunk_size, rising)),
      wake_(wake),
      to_host_(to_host),
      timed_(timed),
      ahead_(ahead),
      groups_(tensors_.size()),
      targets_(tensors_.size()),
      spans_(timed) {
    for (const Chunk& chunk : cut_.chunks)
        for (std::uint32_t at = 0; at < chunk.n_segments; ++at)
            groups_[cut_.segments[chunk.first_segment + at].tensor] = chunk.group;
    std::uint32_t group = cut_.chunks.empty() ? 0 : cut_.chunks.back().group + 1;
    for (std::size_t tensor = tensors_.size(); tensor-- > 0;)
        if (tensors_[tensor].skip)
            groups_[tensor] = group;
        else
            group = groups_[tensor];
    for (const TensorWork& tensor : tensors_) {
        missing_.push_back(tensor.target_nbytes);
        tensors_left_ += !tensor.skip;
    }
    choice_ = std::make_shared<ReaderChoice>(files_);
}

void Job::close() {
    const std::lock_guard lock(mutex_);
    signal_.close();
}

Job::News Job::poll() {
    const std::lock_guard lock(mutex_);
    News news = std::move(news_);
    signal_.clear();
    news_ = {};
    news_.ended = news.ended;
    news_.failure = news.failure;
    return news;
}

std::string Job::reading() const {
    std::shared_ptr<const ReaderChoice> choice;
    {
        const std::lock_guard lock(mutex_);
        if (!choice_) return reading_;
        choice = choice_;
    }
    return choice->reason();
}

Job::Copies Job::copies() const {
    const std::lock_guard lock(mutex_);
    return copies_;
}

Times Job::times() const {
    const std::lock_guard lock(mutex_);
    return times_;
}

void Job::arrived(const Chunk& chunk) {
    bool landed = false;
    for (std::uint32_t at = 0; at < chunk.n_segments; ++at) {
        const Segment& segment = cut_.segments[chunk.first_segment + at];
        news_.moved += segment.target_nbytes;
        if ((missing_[segment.tensor] -= segment.target_nbytes) == 0) {
            news_.landed.push_back(segment.tensor);
            --tensors_left_;
            landed = true;
        }
    }
    if (wake_ == Wake::chunk || (wake_ == Wake::tensor && landed)) signal_.set();
}

void Job::fail(Failure failure) {
    if (!news_.failure) news_.failure = std::move(failure);
}

void Job::settle() noexcept {
    std::string reading = choice_->reason();
    {
        std::shared_ptr<ReaderChoice> choice;
        std::vector<std::shared_ptr<const File>> files;
        {
            const std::lock_guard lock(mutex_);
            reading_ = std::move(reading);
            choice.swap(choice_);
            files.swap(files_);
        }
    }  // closes them without the lock, as that may take long
    const std::lock_guard lock(mutex_);
    news_.ended = true;
    signal_.set();
}

}  // namespace asyncload
