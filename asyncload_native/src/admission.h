// How a load begins before all of its memory is there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "device.h"
#include "engine.h"
#include "job.h"

namespace asyncload {

// Has the tensors of a job moved as those that are `awaited`, by their numbers and in order, get their memory. The job
// has been submitted, and nobody else admits anything of it meanwhile.
class Admission final : public Recipient {
  public:
    // `targets`: of all tensors; what stands there for the awaited ones does not count. Throws `std::out_of_range`
    // unless there is one for each tensor, and the awaited ones are among them, in order.
    Admission(std::shared_ptr<Engine> engine, std::shared_ptr<Job> job, std::vector<Address> targets,
              std::vector<std::uint32_t> awaited);

    // Takes the memory of the next one; throws `std::out_of_range` where all have theirs. There is no hurry with more
    // while chunks of the job wait for a thread.
    bool give(Address address) override;

    // The engine knows the targets of so many tensors, the first ones.
    std::size_t admitted() const noexcept { return admitted_; }
    const Engine& engine() const noexcept { return *engine_; }

  private:
    const std::shared_ptr<Engine> engine_;
    const std::shared_ptr<Job> job_;
    std::vector<Address> targets_;
    const std::vector<std::uint32_t> awaited_;
    std::size_t given_ = 0;     // of those awaited
    std::size_t admitted_ = 0;  // tensors
};

}  // namespace asyncload
