#include "admission.h"

#include <algorithm>
#include <functional>
#include <span>
#include <stdexcept>
#include <utility>

namespace asyncload {

Admission::Admission(std::shared_ptr<Engine> engine, std::shared_ptr<Job> job, std::vector<Address> targets,
                     std::vector<std::uint32_t> awaited)
    : engine_(std::move(engine)), job_(std::move(job)), targets_(std::move(targets)), awaited_(std::move(awaited)) {
    const bool in_order = std::ranges::adjacent_find(awaited_, std::ranges::greater_equal()) == awaited_.end();
    if (targets_.size() != job_->groups().size() || !in_order ||
        (!awaited_.empty() && awaited_.back() >= targets_.size()))
        throw std::out_of_range("there are not such tensors");
}

bool Admission::give(Address address) {
    targets_[awaited_.at(given_)] = address;
    ++given_;
    const auto& groups = job_->groups();
    const std::size_t end = given_ < awaited_.size() ? awaited_[given_] : targets_.size();  // all below have a target
    const bool last = end == targets_.size();
    if (!last && groups[end] == groups[admitted_]) return false;  // the next one shares a chunk with it
    const std::uint32_t below = last ? std::ranges::max(groups) + 1 : groups[end];
    const auto targets = std::span(targets_).subspan(admitted_, end - admitted_);
    const bool others = engine_->admit(*job_, below, admitted_, targets);
    admitted_ = end;
    return others && !last;
}

}  // namespace asyncload
