// When launches become graphs, and what becomes of those that cannot.
#include "launch_graphs.h"

#include "frame.h"
#include "run_errors.h"

#include <algorithm>
#include <cstdio>

namespace accel {
namespace {

constexpr size_t MIN_LAUNCHES = 4;    // fewer are not worth a graph
constexpr unsigned WARM_RUNS = 3;     // launched one by one in a stream before a graph is made
constexpr long MAX_GRAPHS = 256;      // of the process: each takes some memory of the GPU
constexpr int MAX_DEVICES = 64;

std::atomic<uint64_t> wanted_on{0};  // a bit for each device
std::atomic<long> alive{0}, made{0}, launched{0}, failed{0};

bool is_wanted(c10::Device device) {
  return device.is_cuda() && device.index() < MAX_DEVICES &&
         wanted_on.load(std::memory_order_relaxed) >> device.index() & 1;
}

// Leaves the flag clear.
class Released {
 public:
  explicit Released(std::atomic_flag& flag) : flag_(flag) {}
  ~Released() { flag_.clear(std::memory_order_release); }
  Released(const Released&) = delete;

 private:
  std::atomic_flag& flag_;
};

}  // namespace

LaunchGraphs::LaunchGraphs(const Plan& plan) : plan_(plan) {
  const std::vector<Step>& steps = plan.steps;
  for (size_t first = 0; first < steps.size();) {
    size_t end = first;
    while (end < steps.size() && steps[end].kind == StepKind::launch) ++end;
    if (end - first >= MIN_LAUNCHES) {
      Stretch& stretch = stretches_.emplace_back();
      stretch.first = first;
      stretch.count = end - first;
    }
    first = end + 1;
  }
}

LaunchGraphs::~LaunchGraphs() { drop(); }

size_t LaunchGraphs::launch(size_t first, Frame& frame, void* stream) {
  if (stretches_.empty() || !is_wanted(plan_.device)) return 0;
  auto stretch = std::lower_bound(stretches_.begin(), stretches_.end(), first,
                                  [](const Stretch& s, size_t at) { return s.first < at; });
  if (stretch == stretches_.end() || stretch->first != first) return 0;
  if (busy_.test_and_set(std::memory_order_acquire)) return 0;
  Released released(busy_);
  return !given_up_ && launch(*stretch, frame, stream) ? stretch->count : 0;
}

bool LaunchGraphs::launch(Stretch& stretch, Frame& frame, void* stream) {
  if (stretch.stream != stream) {
    stretch.stream = stream;
    stretch.runs = 0;
  }
  if (stretch.runs < WARM_RUNS) {
    ++stretch.runs;
    return false;
  }
  if (is_capturing(stream)) return false;
  stretch.launches.resize(stretch.count);
  for (size_t i = 0; i < stretch.count; ++i) {
    const Step& step = plan_.steps[stretch.first + i];
    frame.prepare_launch(plan_.launches[step.index], stretch.launches[i]);
  }
  try {
    if (!make_ready(stretch)) return false;
  } catch (const DriverError& error) {
    if (is_final(error.code)) throw;
    give_up(error.what());
    return false;
  }
  try {
    stretch.graph->launch(stream);
  } catch (const DriverError& error) {
    if (is_final(error.code)) throw;
    std::string why = error.what();
    give_up(why.c_str());
    throw Declined(why);
  }
  ++launched;
  return true;
}

bool LaunchGraphs::make_ready(Stretch& stretch) {
  if (stretch.graph) {
    if (!stretch.graph->fits(stretch.launches)) return false;
    stretch.graph->set(stretch.launches);
    return true;
  }
  auto works = [](const KernelLaunch& launch) { return launch.function != nullptr; };
  if (std::none_of(stretch.launches.begin(), stretch.launches.end(), works)) return false;
  if (alive.fetch_add(1) >= MAX_GRAPHS) {
    --alive;
    return false;
  }
  try {
    stretch.graph = std::make_unique<CudaGraph>(stretch.launches);
  } catch (...) {
    --alive;
    throw;
  }
  ++made;
  return true;
}

void LaunchGraphs::drop() noexcept {
  for (Stretch& stretch : stretches_) {
    if (stretch.graph) --alive;
    stretch.graph.reset();
  }
}

// For this plan, and for good: what the driver has refused once it would refuse in each run.
void LaunchGraphs::give_up(const char* why) noexcept {
  given_up_ = true;
  drop();
  if (failed++ == 0) {
    std::fprintf(stderr, "accel: kernels are launched one by one, without a CUDA graph: %s\n", why);
  }
}

// ---- Python ---------------------------------------------------------------------

namespace {

PyObject* py_set_cuda_graphs(PyObject*, PyObject* args) {
  int device, wanted;
  if (!PyArg_ParseTuple(args, "ip", &device, &wanted)) return nullptr;
  if (device < 0 || device >= MAX_DEVICES) {
    return PyErr_Format(PyExc_ValueError, "there is no GPU %d", device);
  }
  uint64_t bit = uint64_t{1} << device;
  if (wanted) {
    wanted_on.fetch_or(bit);
  } else {
    wanted_on.fetch_and(~bit);
  }
  Py_RETURN_NONE;
}

PyObject* py_cuda_graphs(PyObject*, PyObject*) {
  return Py_BuildValue("{s:l,s:l,s:l,s:l}", "alive", alive.load(), "made", made.load(), "launched",
                       launched.load(), "failed", failed.load());
}

PyMethodDef METHODS[] = {
    {"set_cuda_graphs", py_set_cuda_graphs, METH_VARARGS,
     "set_cuda_graphs(device, wanted): whether plans launch graphs there. Nowhere at first."},
    {"cuda_graphs", py_cuda_graphs, METH_NOARGS,
     "Of all plans: graphs alive, made and launched; plans that have given them up (failed)."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int init_launch_graphs(PyObject* module) { return PyModule_AddFunctions(module, METHODS); }

}  // namespace accel
