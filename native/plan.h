// The plan: what the compiler hands over, checked and resolved (docs/architecture.md,
// "Compiling -> executing"). A Plan is immutable after parse_plan and holds no Python
// object, so a run may use it from any thread without the GIL.
#pragma once

#include "cuda_driver.h"
#include "native.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace accel {

// A fault of the plan itself; becomes a Python ValueError.
struct PlanError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

constexpr uint32_t NO_BUFFER = UINT32_MAX;

enum class BufferKind : uint8_t { input, arena, output, dynamic, view };

struct Layout {
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype = at::kFloat;
  int64_t numel = 0;
  size_t storage_bytes = 0;  // of the smallest storage that holds it at offset 0
  bool contiguous = false;
  bool host = false;  // of an input on a GPU's plan: a number in the processor's memory
};

// A buffer id is an index into Plan::buffers. `root` is the buffer whose memory it
// uses: itself, or for a view the buffer at the end of the chain of bases.
struct Buffer {
  BufferKind kind;
  bool has_layout = false;   // false: a dynamic buffer whose layout the plan does not say
  bool written = false;      // an input that some commit step writes
  bool as_tensor = false;    // some extern wants it as a tensor
  // A view that, as an output, does not know its base: it shares its version (Tensor.detach) or
  // has one of its own (Tensor.data).
  enum Severed : uint8_t { no, detach, data } severed = no;
  uint32_t of = NO_BUFFER;   // the severed view that it, as an output, is a view or alias of
  uint32_t index = 0;        // of an input: its position; of an output: its number
  uint32_t root = 0;
  int64_t offset_bytes = 0;  // arena: from its start; view: from its root's first element
  Layout layout;
};

// A library function: extern "C" void f(void* const* buffers, long threads).
using KernelFunction = void (*)(void* const*, long);

struct KernelStep {
  KernelFunction function = nullptr;
  bool parallel = false;
  std::vector<uint32_t> buffers;
};

// What a launch is given behind addresses: a value, or one of the generator's stream as the run
// begins: the seed, or the block of four numbers that is `value` blocks further on.
struct LaunchNumber {
  // Of a `host` the value is the input's buffer, whose bits the kernel gets.
  enum Kind : uint8_t { plain, seed, drawn, host } kind;
  int64_t value;
};

// A kernel of a GPU with its parameters: addresses of buffers, then numbers.
struct LaunchStep {
  std::shared_ptr<const CudaKernel> kernel;
  uint64_t grid = 0;
  std::vector<uint32_t> buffers;
  std::vector<LaunchNumber> numbers;
};

struct ExternStep;
// A direct call that takes its tensors from `tensors` (indexed by buffer id).
using DirectCall = void (*)(const ExternStep& step, at::Tensor* tensors, at::Tensor* results);

// One argument in schema order. Exactly one of: a buffer, a list of buffers, a constant.
struct ExternArgument {
  enum Kind : uint8_t { tensor, tensors, optional_tensors, constant } kind = constant;
  uint32_t buffer = NO_BUFFER;
  std::vector<uint32_t> list;  // NO_BUFFER: None
  c10::IValue value;
};

struct ExternStep {
  ExternStep(c10::OperatorHandle op) : handle(std::move(op)) {}
  c10::OperatorHandle handle;
  DirectCall direct = nullptr;  // nullptr: boxed call
  std::vector<ExternArgument> arguments;
  std::vector<uint32_t> results;  // NO_BUFFER: dropped
  // Constants in the forms direct calls want them, by argument position.
  std::vector<at::Scalar> scalars;
  std::vector<std::vector<int64_t>> integers;
};

enum class StepKind : uint8_t { kernel, launch, extern_, free };

struct Step {
  StepKind kind;
  uint32_t index;                // into kernels, launches or externs; of free: the buffer
  std::vector<uint32_t> writes;  // of a commit step: the input buffers it writes
};

struct Speculation {
  uint32_t buffer;
  bool expected;
};

struct Plan {
  std::vector<Layout> inputs;
  size_t arena_bytes = 0;
  std::vector<Buffer> buffers;
  c10::Device device{c10::kCPU};  // where every tensor of it lies
  std::vector<KernelStep> kernels;
  std::vector<LaunchStep> launches;
  std::vector<ExternStep> externs;
  std::vector<Step> steps, commit;
  std::vector<Speculation> speculations;
  std::vector<uint32_t> outputs;

  std::vector<uint32_t> input_buffers, output_buffers;  // ids by kind
  std::vector<std::vector<uint32_t>> views_of;          // by root: the views over it
  size_t max_kernel_buffers = 0;
  bool parallel = false;       // some kernel may use threads
  bool releases_gil = false;   // its work is big enough
  bool holds_inputs = false;   // other Python code may run during a run
  bool random = false;         // some extern draws from torch's CPU generator
  uint64_t draws = 0;          // by how much a run advances the offset of a GPU's generator
  bool boxed = false;          // some extern is unknown code, which may keep its arguments
};

// Parses `plan` (a borrowed dict). `library` is a dlopen handle or nullptr and must outlive
// the plan; `images` is the content of the file with machine code for a GPU, of which launches
// are made. Needs the GIL. Throws PlanError naming the fault, DriverError, or
// pybind11::error_already_set.
Plan parse_plan(PyObject* plan, void* library, const std::string& images);

}  // namespace accel
