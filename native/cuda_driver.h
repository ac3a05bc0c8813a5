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

  // Starts `grid` programs behind what `stream` (a CUstream, nullptr: the default one) already
  // does. `values` are the bits of the kernel's parameters, of which the first `pointers` are
  // addresses; null scratch pointers are put behind them. `arguments` is working memory.
  // Throws DriverError.
  void launch(void* stream, uint64_t grid, std::vector<uint64_t>& values, size_t pointers,
              std::vector<void*>& arguments) const;

 private:
  struct Loaded {
    unsigned alignment;
    unsigned shared_bytes;
    void* function;
  };
  const Loaded& image_for(const std::vector<uint64_t>& values, size_t pointers) const;

  std::string symbol_;
  void* context_ = nullptr;  // the device's primary one, retained for good
  unsigned threads_, scratch_pointers_;
  std::vector<Loaded> loaded_;  // the greatest alignment first
};

}  // namespace accel
