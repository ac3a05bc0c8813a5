// Memory for large outputs: blocks that the program has freed, used again.
//
// Fresh pages cost more than the kernel that fills them, so storages of at least
// POOL_MIN_BYTES get their memory here and give it back when torch frees them. A block
// is handed out only while nobody holds it. Thread-safe, needs no GIL, and never waits:
// when the pool is busy (or was, in the parent of a fork) plain allocation is used.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace accel {

constexpr size_t POOL_MIN_BYTES = size_t{1} << 20;
// At most this much, or one run's outputs of the largest plan (raise_pool_limit), is
// kept free; never more than an eighth of the machine's memory beyond the constant.
constexpr size_t POOL_FREE_BYTES = size_t{512} << 20;

// Memory for a CPU storage of `bytes` >= POOL_MIN_BYTES, 64-byte aligned, not zeroed.
c10::DataPtr allocate_pooled(size_t bytes);

// Lets the pool keep the outputs of a plan that makes `bytes` of large ones.
void raise_pool_limit(size_t bytes);

struct PoolFacts {
  size_t free_bytes, free_blocks, reused, allocated;
};
PoolFacts pool_facts();
// Gives every free block back to the system.
void trim_pool();

}  // namespace accel
