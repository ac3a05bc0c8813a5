// A run's part of torch's random stream of a GPU.
#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>

namespace accel {

// Takes `words` numbers of 32 bits of the device's default generator, as ATen's kernels would one after the
// other, and gives them back unless told that they were drawn. Others may have drawn behind them meanwhile,
// and a failed run is followed by the body, which draws from where the generator stands: then it stays.
class GpuDraws {
 public:
  // With 0 words nothing happens. Throws c10::Error or DriverError before anything has moved.
  GpuDraws(c10::Device device, uint64_t words);
  ~GpuDraws();
  GpuDraws(const GpuDraws&) = delete;

  uint64_t seed() const { return seed_; }
  uint64_t block() const { return before_ / 4; }  // of four words, the first one
  void keep_drawn() { after_ = before_; }

 private:
  at::Generator generator_;
  uint64_t seed_ = 0, before_ = 0, after_ = 0;
};

}  // namespace accel
