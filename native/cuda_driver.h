// NVIDIA's driver, found when it is first wanted: nothing of CUDA is needed to build or to
// import this module, and a process without GPU work never loads it.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace accel {

// The driver is missing, too old, or said no. The text is one line; `code` is what the driver said, 0
// where it was not asked. Its numbers are those of CUDA's runtime.
struct DriverError : std::runtime_error {
  explicit DriverError(const std::string& text, int said = 0)
      : std::runtime_error(text), code(said) {}
  int code;
};

// Whether everything that is asked of the GPU from now on gets this error: an assert in a kernel, an
// illegal address. torch raises it, at its next call, as it would without us.
bool is_final(int code);

// What torch throws for a code: null where torch has no CUDA.
std::exception_ptr error_of_torch(int code);

class CudaKernel;

// What the driver says of itself. Throws DriverError when there is none that will do.
struct DriverFacts {
  int version;  // 1000 * major + 10 * minor of the newest CUDA it knows
  int devices;
};
DriverFacts driver_facts();

// The stream that torch's operations of this thread use on a device now. Throws DriverError.
void* current_cuda_stream(int device);

// Whether what goes to a stream is recorded as a graph now, or an earlier recording has failed. Throws
// DriverError.
bool is_capturing(void* stream);

// A kernel with all that one launch of it takes. Plain values; the function outlives it.
struct KernelLaunch {
  const CudaKernel* kernel = nullptr;
  void* function = nullptr;  // null: of no programs, nothing is launched
  unsigned grid = 0, shared_bytes = 0;
  std::vector<uint64_t> values;  // the bits of its parameters
};

// One function of a plan, compiled once or twice: for pointers that are multiples of
// `alignment` bytes. Its images are loaded on construction, so that a launch neither waits nor
// does what a stream that is being captured does not allow. An image is loaded once in a context and
// stays: graphs that the program has captured, and launches under way, outlive the plan.
// Immutable and thread-safe.
class CudaKernel {
 public:
  struct Image {
    unsigned alignment;
    unsigned shared_bytes;
    std::string code;
  };

  // Throws DriverError.
  CudaKernel(int device, const std::string& symbol, unsigned threads, unsigned scratch_pointers,
             const std::vector<Image>& images);
  CudaKernel(const CudaKernel&) = delete;

  // Makes `launch` one of `grid` programs. Its values are the bits of the kernel's parameters, of which
  // the first `pointers` are addresses; null scratch pointers are put behind them. Throws DriverError.
  void prepare(KernelLaunch& launch, uint64_t grid, size_t pointers) const;

  // Starts it behind what `stream` (a CUstream, nullptr: the default one) already does.
  // `arguments` is working memory. Throws DriverError.
  void launch(void* stream, KernelLaunch& launch, std::vector<void*>& arguments) const;

 private:
  struct Loaded {
    unsigned alignment;
    unsigned shared_bytes;
    void* function;
  };
  const Loaded& image_for(const std::vector<uint64_t>& values, size_t pointers) const;
  friend class CudaGraph;

  std::string symbol_;
  void* context_ = nullptr;  // the device's primary one, retained for good
  unsigned threads_, scratch_pointers_;
  std::vector<Loaded> loaded_;  // the greatest alignment first
};

// Launches one behind the other, handed to the GPU at once. It owns no memory that kernels see: the
// addresses are parameters, which each run sets. One thread at a time.
class CudaGraph {
 public:
  // Of at least one launch that is of some programs, all on one device. Throws DriverError.
  explicit CudaGraph(const std::vector<KernelLaunch>& launches);
  // What is under way goes on.
  ~CudaGraph();
  CudaGraph(const CudaGraph&) = delete;

  // Whether the functions and their numbers of programs are those that it was made of.
  bool fits(const std::vector<KernelLaunch>& launches) const;
  // Sets the parameters of later launches. Behind an error it is good for nothing. Throws DriverError.
  void set(const std::vector<KernelLaunch>& launches);
  // Behind what `stream`, which nobody captures, already does, and behind its own last launch.
  // Throws DriverError.
  void launch(void* stream) const;

 private:
  void add_nodes();

  std::vector<KernelLaunch> launches_;  // as they are set
  std::vector<void*> nodes_;            // by launch; null where nothing is launched
  void* context_ = nullptr;
  void* graph_ = nullptr;  // what nodes belong to
  void* ready_ = nullptr;  // what is launched
};

}  // namespace accel
