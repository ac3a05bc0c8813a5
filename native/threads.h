// Work shared among torch's own OpenMP threads.
//
// `at::parallel_for` is a template that is compiled into its caller: without -fopenmp it does all
// on one thread, and with it a second OpenMP runtime may be linked. So the entry point of the
// runtime that torch has loaded is called, as generated kernels do (codegen/preamble.h).
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
extern "C" int omp_get_thread_num() __attribute__((weak));
extern "C" int omp_get_num_threads() __attribute__((weak));

namespace accel {

// Calls `part(begin, end)` for ranges that make up [0, units), at least `grain` units each, on
// torch's threads; where there is no such runtime, and inside of a parallel region, on this
// one. `part` must not throw, nor need the GIL.
template <typename Part>
void share(int64_t units, int64_t grain, const Part& part) {
  int64_t threads = std::min<int64_t>(at::get_num_threads(), units / grain);
  if (threads < 2 || at::in_parallel_region() || !GOMP_parallel || !omp_get_thread_num ||
      !omp_get_num_threads) {
    part(0, units);
    return;
  }
  struct Work {
    int64_t units;
    const Part& part;
  } work{units, part};
  auto run = [](void* data) {
    const Work& w = *static_cast<const Work*>(data);
    int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    w.part(w.units * me / all, w.units * (me + 1) / all);
  };
  GOMP_parallel(run, &work, static_cast<unsigned>(threads), 0);
}

}  // namespace accel
