// A consumer of layers that needs no interpreter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device.h"
#include "layer_feed.h"

namespace asyncload {

// Goes `passes` times through all of a feed's layers, in order, with one kernel for each: `work`, which is given the
// slot's address twice and `amount`. The copies of a layer wait, on the device, for the work on the one that had its
// slot before, and the work for the copies; the host is never further ahead than the slots. Returns the seconds from
// the first layer that is asked for to the end of the last one's work. Nobody else uses feed and slots meanwhile.
double consume(LayerFeed& feed, Device& device, const std::vector<Address>& slots, unsigned passes, const Kernel& work,
               std::int64_t amount);

}  // namespace asyncload
