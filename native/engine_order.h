// In what order autograd's engine visits the leaves behind one node.
#pragma once

#include <cstdint>
#include <vector>

namespace accel {

// The engine puts the nodes behind a node's edges into a queue of equals, in which leaves come
// first, and takes them out again in the order of a binary heap. `is_leaf`: of what the edges
// shall lead to, in the order in which it is to be visited. Answers at which place of the node's
// edges each has to stand. No GIL needed.
std::vector<uint32_t> edge_places(const std::vector<bool>& is_leaf);

}  // namespace accel
