// A stand-in for torch's CUDA library: a generator that counts, and a device that is always current.
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/GeneratorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

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
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

extern "C" {
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
