// The memory one run of a plan works in: the arena, data pointers, and the tensors that
// externs take. A frame serves one run at a time; an executor keeps one between runs, unless
// its memory is a GPU's: that belongs to the stream it was allocated on, and torch's caching
// allocator, which knows, makes taking it anew cheap.
#pragma once

#include "plan.h"

namespace accel {

// Invariant between runs: a frame holds no reference to a tensor or storage of the
// program, and every prepared tensor is known to nobody else.
class Frame {
 public:
  explicit Frame(const Plan& plan);
  ~Frame();
  Frame(const Frame&) = delete;

  // Binds inputs (borrowed for the run) and allocates outputs. Throws when an input is
  // not what kernels can read: conjugated or negated lazily, or without memory.
  void begin(c10::TensorImpl* const* inputs);
  // Drops everything bound since begin.
  void end() noexcept;
  // After end: false when an extern kept a tensor of this frame, which then belongs to it.
  bool reusable() const;

  // Where the run's part of the random stream begins: the seed, and its first block.
  void set_stream(uint64_t seed, uint64_t block) { seed_ = seed, block_ = block; }

  void run_kernel(const KernelStep& kernel, long threads);
  void run_launch(const LaunchStep& launch, void* stream);
  // With what it is given in this run.
  void prepare_launch(const LaunchStep& launch, KernelLaunch& prepared) const;
  void run_extern(const ExternStep& step);
  void free_dynamic(uint32_t id) { tensors_[id] = at::Tensor(); }
  bool truth(uint32_t id) const;
  // Bumps the version of a written input, as eager's in-place operation does.
  void bump_version(uint32_t input_buffer);
  // Makes sure that bump_version will not throw.
  void check_writable() const;

  // The tensors to return; to be called where autograd's dispatch keys are not excluded.
  void collect(std::vector<at::Tensor>& outputs);

 private:
  uint64_t value_of(const LaunchNumber& number) const;
  const Layout& layout(uint32_t id) const { return plan_.buffers[id].layout; }
  c10::Storage cpu_arena() const;
  c10::Storage gpu_arena() const;
  void prepare_arena();
  void bind_views(uint32_t root);
  void bind_dynamic(uint32_t id);
  void prepare_view(uint32_t id);
  at::Tensor output_of(uint32_t id);
  at::Tensor view_output(uint32_t id);
  at::Tensor severed_output(uint32_t id);
  at::Tensor dynamic_output(const at::Tensor& tensor);

  const Plan& plan_;
  at::Tensor arena_;                 // bytes over the whole arena
  uint32_t arena_uses_ = 0;          // references to its storage that are the frame's own
  std::vector<void*> pointers_;      // by buffer id; a view's offset added
  std::vector<at::Tensor> tensors_;  // by buffer id; inputs are borrowed, see end()
  std::vector<std::pair<uint32_t, at::Tensor>> severed_;  // outputs of this run, see plan.h
  std::vector<void*> arguments_;     // of the kernel being called
  KernelLaunch launch_;              // the one being launched
  uint64_t seed_ = 0, block_ = 0;    // of the random numbers that launches are given
  c10::TensorImpl* const* inputs_ = nullptr;
};

// A new strided tensor over fresh memory, its storage exactly as large as needed, resizable
// and of torch's own allocator. An inference tensor exactly in inference mode.
at::Tensor allocate_output(const Layout& layout, c10::Device device);

}  // namespace accel
