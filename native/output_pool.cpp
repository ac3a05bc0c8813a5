// The pool of freed output blocks: size classes of an eighth of a power of two.
//
// Large blocks lie in one list, oldest first, so that the oldest go when there are too many;
// small ones in a list for each class, linked through a header before their memory.
#include "output_pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <memory>
#include <utility>
#include <vector>

namespace accel {
namespace {

struct Block {
  void* memory;
  size_t capacity;
};

struct alignas(64) Small {
  Small* next;  // while it is free
  uint32_t size_class;

  size_t capacity() const;
  void* memory() { return this + 1; }
};

struct Smalls {
  Small* first = nullptr;
  size_t count = 0;
};

constexpr size_t SMALL_CLASSES = 8 * std::bit_width(POOL_MIN_BYTES);

constexpr size_t EAGER_ROOM_BYTES = size_t{64} << 20;  // so much does not matter

struct Pool {
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  std::vector<Block*> free_blocks;  // oldest first
  size_t free_bytes = 0;
  size_t limit = POOL_FREE_BYTES;
  size_t reused = 0;
  size_t allocated = 0;
  std::array<Smalls, SMALL_CLASSES> smalls;
  size_t small_bytes = 0;  // free ones
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

// The classes of small blocks: eight for each power of two, the first for up to 64 bytes.
uint32_t small_class(size_t bytes) {
  if (bytes <= 64) return 0;
  size_t power = static_cast<size_t>(std::bit_width(bytes - 1)) - 1;  // 2^power < bytes
  return static_cast<uint32_t>(8 * (power - 6) + ((bytes - 1) >> (power - 3)) % 8 + 1);
}

size_t Small::capacity() const {
  if (size_class == 0) return 64;
  size_t power = 6 + (size_class - 1) / 8;
  return (size_t{8} + (size_class - 1) % 8 + 1) << (power - 3);
}

void give_back_small(void* context) {
  auto* block = static_cast<Small*>(context);
  {
    PoolLock lock;
    Pool& p = pool();
    Smalls& list = p.smalls[block->size_class];
    size_t bytes = block->capacity();
    if (lock && list.count < SMALL_FREE_OF_A_SIZE && p.small_bytes + bytes <= SMALL_FREE_BYTES) {
      block->next = list.first;
      list.first = block;
      ++list.count;
      p.small_bytes += bytes;
      return;
    }
  }
  c10::free_cpu(block);
}

c10::DataPtr allocate_small(size_t bytes) {
  uint32_t size_class = small_class(bytes);
  Small* block = nullptr;
  {
    PoolLock lock;
    Smalls& list = pool().smalls[size_class];
    if (lock && list.first) {
      block = list.first;
      list.first = block->next;
      --list.count;
      pool().small_bytes -= block->capacity();
    }
  }
  if (!block) {
    Small wanted{nullptr, size_class};
    block = new (c10::alloc_cpu(sizeof(Small) + wanted.capacity())) Small(wanted);
  }
  return {block->memory(), block, give_back_small, c10::Device(c10::kCPU)};
}

}  // namespace

c10::DataPtr allocate_pooled(size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  // Blocks that come back would hide a use of what was freed.
  if (bytes < POOL_MIN_BYTES) return c10::GetCPUAllocator()->allocate(bytes);
#endif
  if (bytes == 0) return c10::GetCPUAllocator()->allocate(0);
  if (bytes < POOL_MIN_BYTES) return allocate_small(bytes);
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
  if (!lock) return {};
  Pool& p = pool();
  return {p.free_bytes, p.free_blocks.size(), p.reused, p.allocated, p.small_bytes};
}

void make_room_for_eager() {
  bool much;
  {
    PoolLock lock;
    much = lock && pool().free_bytes > EAGER_ROOM_BYTES;
  }
  if (much) trim_pool();
}

void trim_pool() {
  std::vector<Block*> blocks;
  std::array<Smalls, SMALL_CLASSES> smalls;
  {
    PoolLock lock;
    if (!lock) return;
    blocks.swap(pool().free_blocks);
    pool().free_bytes = 0;
    smalls.swap(pool().smalls);
    pool().small_bytes = 0;
  }
  for (Block* block : blocks) destroy(block);
  for (const Smalls& list : smalls) {
    for (Small* block = list.first; block;) c10::free_cpu(std::exchange(block, block->next));
  }
}

}  // namespace accel
