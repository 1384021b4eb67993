#include "cut.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace asyncload {

namespace {

constexpr std::uint64_t alignment = 64;   // decoded bytes start on a cache line, and so does every read
constexpr std::uint64_t gap = 64 << 10;   // reading a gap of this size costs less than another read
constexpr std::size_t most_shared = 256;  // tensors that share a chunk

std::uint64_t align(std::uint64_t offset) {
    return (offset + alignment - 1) / alignment * alignment;
}

// What a tensor's decoded form takes of a buffer.
std::uint64_t decoded_nbytes(const TensorWork& tensor) {
    return tensor.decode == Decode::host ? align(tensor.target_nbytes) : 0;
}

class Cutter {
  public:
    Cutter(const std::vector<TensorWork>& tensors, std::uint64_t chunk_size, std::uint32_t rising)
        : tensors_(tensors), chunk_size_(chunk_size), rising_(total() < rising * chunk_size ? 0 : rising) {}

    Cut run() {
        for (std::uint32_t index = 0; index < tensors_.size(); ++index) {
            const TensorWork& tensor = tensors_[index];
            if (tensor.skip) continue;
            const std::uint64_t after = decoded_nbytes(tensor);
            const bool large = align(tensor.nbytes) + after > chunk_size_ / 2;
            if (!shared_.empty() && (large || !joins(tensor, after))) flush();
            if (large) {
                split(tensor, index);
                ++group_;
            } else {
                shared_.push_back(index);
                decoded_ += after;
            }
        }
        if (!shared_.empty()) flush();
        return std::move(cut_);
    }

  private:
    std::uint64_t total() const {
        std::uint64_t nbytes = 0;
        for (const TensorWork& tensor : tensors_)
            if (!tensor.skip) nbytes += tensor.nbytes;
        return nbytes;
    }

    // Whether a small tensor lies close enough behind the others for one read.
    bool joins(const TensorWork& tensor, std::uint64_t after) const {
        const TensorWork &first = tensors_[shared_.front()], &last = tensors_[shared_.back()];
        const std::uint64_t end = last.offset + last.nbytes;
        if (shared_.size() >= most_shared || tensor.file != first.file) return false;
        if (tensor.offset < end || tensor.offset - end > gap) return false;
        return align(tensor.offset + tensor.nbytes - first.offset) + decoded_ + after <= chunk_size_;
    }

    // A chunk of the small tensors that were gathered.
    void flush() {
        const TensorWork &first = tensors_[shared_.front()], &last = tensors_[shared_.back()];
        const std::uint64_t nbytes = last.offset + last.nbytes - first.offset;
        std::uint64_t decoded_at = align(nbytes);
        begin_chunk(first.file, first.offset, nbytes);
        for (const std::uint32_t index : shared_) {
            const TensorWork& tensor = tensors_[index];
            const std::uint64_t offset = tensor.offset - first.offset;
            const bool by_host = tensor.decode == Decode::host;
            add({index, offset, tensor.nbytes, by_host ? decoded_at : offset,
                 by_host ? tensor.target_nbytes : tensor.nbytes, 0, tensor.target_nbytes});
            decoded_at += decoded_nbytes(tensor);
        }
        shared_.clear();
        decoded_ = 0;
        ++group_;
    }

    // Chunks of one large tensor.
    void split(const TensorWork& tensor, std::uint32_t index) {
        const bool by_host = tensor.decode == Decode::host, whole = tensor.decode == Decode::none;
        // what is not decoded may be cut anywhere
        const std::uint64_t before = whole ? alignment : tensor.block_nbytes;
        const std::uint64_t after = whole ? alignment : tensor.decoded_block_nbytes;
        const std::uint64_t needed = before + (by_host ? after : 0);
        const std::uint64_t most = (chunk_size_ - (by_host ? alignment : 0)) / needed;  // blocks
        if (most == 0)
            throw std::invalid_argument("one block takes " + std::to_string(needed) + " bytes, more than a chunk of " +
                                        std::to_string(chunk_size_));
        for (std::uint64_t start = 0, nbytes = 0; start < tensor.nbytes; start += nbytes) {
            const std::uint64_t made = cut_.chunks.size();
            const std::uint64_t blocks = made < rising_ ? std::max(most * (made + 1) / rising_, 1UL) : most;
            nbytes = std::min(blocks * before, tensor.nbytes - start);
            const std::uint64_t target_offset = start / before * after, target_nbytes = nbytes * after / before;
            begin_chunk(tensor.file, tensor.offset + start, nbytes);
            add({index, 0, nbytes, by_host ? align(nbytes) : 0, by_host ? target_nbytes : nbytes, target_offset,
                 target_nbytes});
        }
    }

    void begin_chunk(std::uint32_t file, std::uint64_t offset, std::uint64_t nbytes) {
        const auto first = static_cast<std::uint32_t>(cut_.segments.size());
        cut_.chunks.push_back({group_, file, offset, nbytes, first, 0});
    }

    void add(const Segment& segment) {
        cut_.segments.push_back(segment);
        ++cut_.chunks.back().n_segments;
    }

    const std::vector<TensorWork>& tensors_;
    const std::uint64_t chunk_size_;
    const std::uint32_t rising_;
    Cut cut_;
    std::uint32_t group_ = 0;
    std::vector<std::uint32_t> shared_;  // the small tensors of the chunk being gathered
    std::uint64_t decoded_ = 0;          // bytes that these take once decoded
};

}  // namespace

Cut cut(const std::vector<TensorWork>& tensors, std::uint64_t chunk_size, std::uint32_t rising) {
    return Cutter(tensors, chunk_size, rising).run();
}

}  // namespace asyncload
