// The queue is a std::priority_queue by sequence number, highest first; all leaves have the
// highest there is (torch/csrc/autograd/engine.cpp: ReadyQueue, CompareNodeTaskTime). What libstdc++
// does with equals is fixed, so a heap of our own tells.
#include "engine_order.h"

#include <cstddef>
#include <queue>

namespace accel {

std::vector<uint32_t> edge_places(const std::vector<bool>& is_leaf) {
  struct Task {
    bool leaf;
    uint32_t place;
  };
  auto later = [](const Task& a, const Task& b) { return a.leaf < b.leaf; };
  std::priority_queue<Task, std::vector<Task>, decltype(later)> queue(later);
  uint32_t leaves = 0;
  for (bool leaf : is_leaf) leaves += leaf;
  // Leaves stand first, so that they are pushed on each other only.
  for (uint32_t place = 0; place < is_leaf.size(); ++place) queue.push({place < leaves, place});
  std::vector<uint32_t> visited;  // places of leaves
  for (; !queue.empty() && queue.top().leaf; queue.pop()) visited.push_back(queue.top().place);
  std::vector<uint32_t> places;
  uint32_t leaf = 0, other = leaves;
  for (bool is : is_leaf) places.push_back(is ? visited[leaf++] : other++);
  return places;
}

}  // namespace accel
