// A stand-in for torch's CUDA library: a generator that counts, two devices, and an allocator that writes
// down on which device and for which stream it is asked.
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GeneratorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

namespace {

struct Counting : c10::GeneratorImpl {
  Counting()
      : GeneratorImpl(c10::Device(c10::kCUDA, 0), c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { seed_ = seed, offset_ = 0; }
  void set_offset(uint64_t offset) override { offset_ = offset, dropouts_begun_anew_++; }
  uint64_t get_offset() const override { return offset_; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override { return seed_; }
  void set_state(const c10::TensorImpl&) override {}
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return {}; }
  Counting* clone_impl() const override { return nullptr; }
  uint64_t seed_ = 0, offset_ = 0, dropouts_begun_anew_ = 0;
};

const at::Generator& generator() {
  static const at::Generator made = at::make_generator<Counting>();
  return made;
}

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
};

thread_local c10::DeviceIndex device = 0;

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device to) const override {
    c10::Device before = getDevice();
    device = to.index();
    return before;
  }
  c10::Device getDevice() const override { return {c10::kCUDA, device}; }
  void setDevice(c10::Device to) const override { device = to.index(); }
  void uncheckedSetDevice(c10::Device to) const noexcept override { device = to.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

int allocations_left = -1;  // any number
int allocation_error = 0;   // what torch says of those that fail; 0: no memory

void note(const char* what, size_t bytes) {
  using Ask = int (*)(int32_t, void**);
  static const auto ask = reinterpret_cast<Ask>(
      dlsym(dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD), "aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  ask(device, &stream);
  FILE* log = std::fopen(std::getenv("FAKE_CUDA_LOG"), "a");
  std::fprintf(log, "%s %zu on %d stream %p\n", what, bytes, device, stream);
  std::fclose(log);
}

struct Memory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (allocations_left == 0) {
      if (allocation_error) {
        throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, allocation_error,
                                    "CUDA error: of torch");
      }
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate a lot.");
    }
    if (allocations_left > 0) --allocations_left;
    note("allocate", bytes);
    void* memory = std::aligned_alloc(64, bytes + 64 & ~size_t{63});
    return {memory, new Block{memory, bytes}, release, {c10::kCUDA, device}};
  }
  struct Block {
    void* memory;
    size_t bytes;
  };
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    note("free", block->bytes);
    std::free(block->memory);
    delete block;
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void*, const void*, size_t) const override {}
} memory;

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> on, std::optional<bool>) {
  c10::DeviceGuard guard(*on);
  size_t bytes = at::detail::computeStorageNbytes(sizes, strides, c10::elementSize(*dtype));
  c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, memory.allocate(bytes), &memory, true));
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::scalarTypeToTypeMeta(*dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return tensor;
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) { library.impl("empty_strided", empty_strided); }

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

extern "C" {
int fake_device() { return device; }
void fake_set_device(int to) { device = static_cast<c10::DeviceIndex>(to); }
void fake_allocations(int left, int error) { allocations_left = left, allocation_error = error; }
void fake_generator_set(uint64_t seed, uint64_t offset) {
  generator().unsafeGetGeneratorImpl()->set_current_seed(seed);
  generator().unsafeGetGeneratorImpl()->set_offset(offset);
}
// The setter that leaves cuDNN's dropout alone.
void fake_generator_move(uint64_t offset) {
  static_cast<Counting*>(generator().unsafeGetGeneratorImpl())->offset_ = offset;
}
uint64_t fake_dropouts_begun_anew() {
  return static_cast<Counting*>(generator().unsafeGetGeneratorImpl())->dropouts_begun_anew_;
}
uint64_t fake_generator_offset() { return generator().unsafeGetGeneratorImpl()->get_offset(); }
}
