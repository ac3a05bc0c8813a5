// Memory for outputs: blocks that the program has freed, used again.
//
// Fresh pages cost more than the kernel that fills them, and an aligned allocation and its
// release cost a tenth of a small call, so outputs get their memory here and give it back
// when torch frees them. A block is handed out only while nobody holds it. Thread-safe, needs
// no GIL, and never waits: when the pool is busy (or was, in the parent of a fork) plain
// allocation is used.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace accel {

constexpr size_t POOL_MIN_BYTES = size_t{1} << 20;
// At most this much, or one run's outputs of the largest plan (raise_pool_limit), is
// kept free; never more than an eighth of the machine's memory beyond the constant.
constexpr size_t POOL_FREE_BYTES = size_t{512} << 20;

// Of smaller blocks, this much in all and of each size is kept free.
constexpr size_t SMALL_FREE_BYTES = size_t{8} << 20;
constexpr size_t SMALL_FREE_OF_A_SIZE = 16;

// Memory for a CPU storage of `bytes`, 64-byte aligned, not zeroed.
c10::DataPtr allocate_pooled(size_t bytes);

// Lets the pool keep the outputs of a plan that makes `bytes` of large ones.
void raise_pool_limit(size_t bytes);

// Of large blocks; `small_bytes`: of small ones that are free.
struct PoolFacts {
  size_t free_bytes, free_blocks, reused, allocated, small_bytes;
};
PoolFacts pool_facts();
// Gives every free block back to the system.
void trim_pool();
// Before a body runs eagerly where compiled code has served: it takes its memory elsewhere, and what
// the pool holds free for the next compiled call would lie beside it.
void make_room_for_eager();

}  // namespace accel
