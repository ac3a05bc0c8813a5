#include "cuda_generator.h"

#include "cuda_driver.h"

#include <ATen/Context.h>
#include <dlfcn.h>

#include <mutex>

namespace accel {
namespace {

// The generator's own setter. The virtual `set_offset` also has cuDNN's dropout begin anew, which draws a seed
// from the processor's stream.
void move_to(const at::Generator& generator, uint64_t offset) {
  using Setter = void (*)(c10::GeneratorImpl*, uint64_t);
  static const auto setter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    const char* name = "_ZN2at17CUDAGeneratorImpl28set_philox_offset_per_threadEm";
    return library ? reinterpret_cast<Setter>(dlsym(library, name)) : nullptr;
  }();
  if (!setter) throw DriverError("this torch has no generator for GPUs");
  setter(generator.unsafeGetGeneratorImpl(), offset);
}

}  // namespace

GpuDraws::GpuDraws(c10::Device device, uint64_t words) {
  if (words == 0) return;
  generator_ = at::globalContext().defaultGenerator(device);
  std::lock_guard<std::mutex> lock(generator_.mutex());
  seed_ = generator_.current_seed();
  before_ = after_ = generator_.get_offset();
  TORCH_CHECK(before_ % 4 == 0, "the generator stands in the middle of a block");
  move_to(generator_, before_ + words);
  after_ = before_ + words;
}

GpuDraws::~GpuDraws() {
  if (after_ == before_) return;
  try {
    std::lock_guard<std::mutex> lock(generator_.mutex());
    if (generator_.current_seed() == seed_ && generator_.get_offset() == after_) {
      move_to(generator_, before_);
    }
  } catch (const c10::Error&) {
    // Somebody has begun to capture: the generator cannot be asked now.
  }
}

}  // namespace accel
