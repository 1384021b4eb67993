// A load cut into chunks, each of which one staging buffer takes, by the same rules as asyncload/plan/_chunks.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device.h"

namespace asyncload {

// Where a tensor's blocks become numbers.
enum class Decode : std::uint8_t { none, host, device };

// One tensor of a plan; sizes in bytes.
struct TensorWork {
    std::uint32_t file;
    std::uint64_t offset;
    std::uint64_t nbytes;         // in the file
    std::uint64_t target_nbytes;  // where it goes
    Decode decode;
    std::uint32_t block_nbytes;          // of the file, for each block
    std::uint32_t decoded_block_nbytes;  // and where it goes
    Kernel kernel;                       // where it is decoded
    bool skip;                           // it is there already
};

// One tensor's share of a chunk. `source_*`: its packed bytes within the buffer; `upload_*`: what leaves the buffer for
// the device; `target_*`: what that is of the tensor.
struct Segment {
    std::uint32_t tensor;
    std::uint64_t source_offset;
    std::uint64_t source_nbytes;
    std::uint64_t upload_offset;
    std::uint64_t upload_nbytes;
    std::uint64_t target_offset;
    std::uint64_t target_nbytes;
};

// One read, and what becomes of it. `group` counts up whenever all tensors of the chunks before are complete.
struct Chunk {
    std::uint32_t group;
    std::uint32_t file;
    std::uint64_t offset;
    std::uint64_t nbytes;
    std::uint32_t first_segment;
    std::uint32_t n_segments;
};

struct Cut {
    std::vector<Chunk> chunks;
    std::vector<Segment> segments;
};

// Cuts tensors, given in file order. Where they have the bytes of `rising` chunks at least, so many rise in size step
// by step, the first ones, as far as large tensors are cut into them: so the first copy does not wait for a whole
// chunk, and that many threads, which begin together, do not end their reads together. Throws `std::invalid_argument`
// if a block and its decoded form do not fit a buffer.
Cut cut(const std::vector<TensorWork>& tensors, std::uint64_t chunk_size, std::uint32_t rising);

}  // namespace asyncload
