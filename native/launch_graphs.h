// A plan's launches that follow each other directly, handed to the GPU as CUDA graphs.
//
// A graph owns no memory: its kernels get the run's addresses, as launches would, in memory of torch's
// caching allocator. So nothing that the program holds is written by a later run, inputs are not
// copied, and two runs share nothing but the graph, which one of them uses at a time.
#pragma once

#include "cuda_driver.h"
#include "native.h"
#include "plan.h"

#include <atomic>
#include <memory>
#include <vector>

namespace accel {

class Frame;

// Thread-safe. Owned by the plan's executor; its graphs go with it.
class LaunchGraphs {
 public:
  explicit LaunchGraphs(const Plan& plan);  // which outlives it
  ~LaunchGraphs();
  LaunchGraphs(const LaunchGraphs&) = delete;

  // How many of the plan's steps, from `first` on, have been launched as a graph; 0 where they have to be
  // launched one by one: graphs are not wanted on this device, the stretch has not run often enough in this stream,
  // the program captures the stream, another run uses the graph, or there is none. Throws DriverError as
  // a launch would, Declined where it is not known what has been launched.
  size_t launch(size_t first, Frame& frame, void* stream);

 private:
  // Launches that follow each other.
  struct Stretch {
    size_t first, count;
    void* stream = nullptr;  // that of the last run
    unsigned runs = 0;       // one after the other in that stream
    std::unique_ptr<CudaGraph> graph;
    std::vector<KernelLaunch> launches;  // of this run
  };

  bool launch(Stretch& stretch, Frame& frame, void* stream);
  bool make_ready(Stretch& stretch);
  void drop() noexcept;
  void give_up(const char* why) noexcept;

  const Plan& plan_;
  std::vector<Stretch> stretches_;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;  // of everything here
  bool given_up_ = false;
};

}  // namespace accel
