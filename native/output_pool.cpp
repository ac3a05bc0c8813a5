// The pool of freed output blocks: size classes of an eighth of a power of two.
#include "output_pool.h"

#include <c10/core/impl/alloc_cpu.h>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <memory>
#include <vector>

namespace accel {
namespace {

struct Block {
  void* memory;
  size_t capacity;
};

struct Pool {
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  std::vector<Block*> free_blocks;  // oldest first
  size_t free_bytes = 0;
  size_t limit = POOL_FREE_BYTES;
  size_t reused = 0;
  size_t allocated = 0;
};

// Never destroyed: storages may be freed after static destructors have run.
Pool& pool() {
  static Pool* instance = new Pool();
  return *instance;
}

// Tries to own the pool for a scope; false when someone else does.
class PoolLock {
 public:
  PoolLock() : owned_(!pool().busy.test_and_set(std::memory_order_acquire)) {}
  ~PoolLock() {
    if (owned_) pool().busy.clear(std::memory_order_release);
  }
  PoolLock(const PoolLock&) = delete;
  explicit operator bool() const { return owned_; }

 private:
  bool owned_;
};

size_t capacity_for(size_t bytes) {
  size_t step = std::bit_floor(bytes) / 8;
  return (bytes + step - 1) / step * step;
}

void destroy(Block* block) {
  c10::free_cpu(block->memory);
  delete block;
}

void give_back(void* context) {
  auto* block = static_cast<Block*>(context);
  std::vector<Block*> evicted;
  {
    PoolLock lock;
    Pool& p = pool();
    if (lock && block->capacity <= p.limit) {
      p.free_blocks.push_back(block);
      p.free_bytes += block->capacity;
      while (p.free_bytes > p.limit) {
        p.free_bytes -= p.free_blocks.front()->capacity;
        evicted.push_back(p.free_blocks.front());
        p.free_blocks.erase(p.free_blocks.begin());
      }
    } else {
      evicted.push_back(block);
    }
  }
  for (Block* old : evicted) destroy(old);
}

// The youngest free block of exactly this capacity (its pages are the warmest).
Block* take(size_t capacity) {
  PoolLock lock;
  if (!lock) return nullptr;
  Pool& p = pool();
  for (size_t i = p.free_blocks.size(); i-- > 0;) {
    Block* block = p.free_blocks[i];
    if (block->capacity != capacity) continue;
    p.free_blocks.erase(p.free_blocks.begin() + static_cast<ptrdiff_t>(i));
    p.free_bytes -= capacity;
    ++p.reused;
    return block;
  }
  ++p.allocated;
  return nullptr;
}

// When memory is short the free blocks are the first to go.
Block* make(size_t capacity) {
  auto block = std::make_unique<Block>();
  block->capacity = capacity;
  try {
    block->memory = c10::alloc_cpu(capacity);
  } catch (const c10::Error&) {
    trim_pool();
    block->memory = c10::alloc_cpu(capacity);
  }
  return block.release();
}

}  // namespace

c10::DataPtr allocate_pooled(size_t bytes) {
  size_t capacity = capacity_for(bytes);
  Block* block = take(capacity);
  if (!block) block = make(capacity);
  return {block->memory, block, give_back, c10::Device(c10::kCPU)};
}

void raise_pool_limit(size_t bytes) {
  static const size_t ceiling =
      std::max(POOL_FREE_BYTES, static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) / 8 *
                                    static_cast<size_t>(sysconf(_SC_PAGESIZE)));
  // Room for the classes' rounding.
  size_t wanted = std::min(bytes + bytes / 8, ceiling);
  PoolLock lock;
  if (lock && wanted > pool().limit) pool().limit = wanted;
}

PoolFacts pool_facts() {
  PoolLock lock;
  if (!lock) return {0, 0, 0, 0};
  Pool& p = pool();
  return {p.free_bytes, p.free_blocks.size(), p.reused, p.allocated};
}

void trim_pool() {
  std::vector<Block*> blocks;
  {
    PoolLock lock;
    if (!lock) return;
    blocks.swap(pool().free_blocks);
    pool().free_bytes = 0;
  }
  for (Block* block : blocks) destroy(block);
}

}  // namespace accel
