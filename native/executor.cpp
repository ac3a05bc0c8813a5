// Executors: the run loop, the commit, and the Python type.
//
// A run changes no user-visible memory before the commit, so that it can be thrown away:
// speculations are checked after the steps and before the commit steps.
#include "executor.h"

#include "cuda_generator.h"
#include "forced_failures.h"
#include "frame.h"
#include "launch_graphs.h"
#include "output_pool.h"
#include "run_errors.h"
#include "tensors.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <dlfcn.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>

namespace accel {
namespace {

// libgomp's threads do not survive a fork, and starting new ones in the child may hang.
std::atomic<bool> in_forked_child{false};

struct LibraryCloser {
  void operator()(void* handle) const { dlclose(handle); }
};
using Library = std::unique_ptr<void, LibraryCloser>;

bool verifying() {
  static const bool on = [] {
    const char* value = std::getenv("ACCEL_VERIFY");
    return value && *value && std::string_view(value) != "0";
  }();
  return on;
}

}  // namespace

class Executor {
 public:
  Executor(Library library, Plan plan)
      : library_(std::move(library)), plan_(std::move(plan)), graphs_(plan_) {
    size_t pooled = 0;
    for (uint32_t id : plan_.output_buffers) {
      size_t bytes = plan_.buffers[id].layout.storage_bytes;
      if (bytes >= POOL_MIN_BYTES) pooled += bytes;
    }
    raise_pool_limit(pooled);
  }
  ~Executor() { delete idle_.load(); }

  const Plan& plan() const { return plan_; }
  LaunchGraphs& graphs() const { return graphs_; }

  // The kept frame, or a new one while that is in use (another thread, or a run inside a
  // run). No lock: a fork in the middle leaves nothing locked.
  std::unique_ptr<Frame> take_frame() const {
    Frame* frame = idle_.exchange(nullptr, std::memory_order_acquire);
    return frame ? std::unique_ptr<Frame>(frame) : std::make_unique<Frame>(plan_);
  }

  void keep_frame(std::unique_ptr<Frame> frame) const {
    Frame* none = nullptr;
    if (idle_.compare_exchange_strong(none, frame.get(), std::memory_order_release)) {
      frame.release();
    }
  }

 private:
  Library library_;  // outlives the plan's kernel pointers
  Plan plan_;
  mutable LaunchGraphs graphs_;
  mutable std::atomic<Frame*> idle_{nullptr};
};

namespace {

// A frame for the duration of a run.
class FrameLease {
 public:
  explicit FrameLease(const Executor& executor)
      : executor_(executor), frame_(executor.take_frame()) {}
  ~FrameLease() {
    frame_->end();
    if (keeps_ && frame_->reusable()) executor_.keep_frame(std::move(frame_));
  }
  FrameLease(const FrameLease&) = delete;
  Frame& operator*() { return *frame_; }
  // Of a run that fails the memory is freed: the body runs next, and may want it.
  void keep() { keeps_ = true; }

 private:
  const Executor& executor_;
  std::unique_ptr<Frame> frame_;
  bool keeps_ = false;
};

// Releases the GIL for a scope if asked to.
class GilRelease {
 public:
  explicit GilRelease(bool wanted) : state_(wanted ? PyEval_SaveThread() : nullptr) {}
  ~GilRelease() {
    if (state_) PyEval_RestoreThread(state_);
  }
  GilRelease(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

// Puts torch's CPU random stream back unless told to keep what was drawn, so that the
// eager rerun draws the same numbers.
class RandomStateGuard {
 public:
  explicit RandomStateGuard(bool wanted) {
    if (!wanted) return;
    generator_ = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(generator_.mutex());
    state_ = generator_.get_state();
  }
  ~RandomStateGuard() {
    if (!state_.defined()) return;
    std::lock_guard<std::mutex> lock(generator_.mutex());
    generator_.set_state(state_);
  }
  RandomStateGuard(const RandomStateGuard&) = delete;
  void keep_drawn() { state_ = at::Tensor(); }

 private:
  at::Generator generator_;
  at::Tensor state_;
};

// Plans are below autograd and autocast: the compiler has seen to both.
c10::DispatchKeySet excluded_keys() {
  static const c10::DispatchKeySet keys =
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
  return keys;
}

// Where Executor.profile() wants the nanoseconds of each step; nullptr at other times.
thread_local std::vector<int64_t>* step_times = nullptr;

int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// `graphs`: those of these steps, if there may be some. They write nothing that the program can see.
void run_steps(const Plan& plan, Frame& frame, const std::vector<Step>& steps, long threads,
               size_t& finished, void* stream, LaunchGraphs* graphs) {
  std::vector<int64_t>* const times = step_times;
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    if (graphs && step.kind == StepKind::launch && !times) {
      if (size_t count = graphs->launch(i, frame, stream)) {
        finished += count;
        i += count - 1;
        continue;
      }
    }
    int64_t start = times ? nanoseconds() : 0;
    switch (step.kind) {
      case StepKind::kernel: {
        const KernelStep& kernel = plan.kernels[step.index];
        frame.run_kernel(kernel, kernel.parallel ? threads : 1);
        break;
      }
      case StepKind::launch: frame.run_launch(plan.launches[step.index], stream); break;
      case StepKind::extern_: frame.run_extern(plan.externs[step.index]); break;
      case StepKind::free: frame.free_dynamic(step.index); break;
    }
    for (uint32_t id : step.writes) frame.bump_version(id);
    ++finished;
    if (times) times->push_back(nanoseconds() - start);
  }
}

long thread_count(const Plan& plan) {
  if (!plan.parallel || in_forked_child.load(std::memory_order_relaxed) ||
      at::in_parallel_region()) {
    return 1;
  }
  return at::get_num_threads();
}

void verify_inputs(const Plan& plan, c10::TensorImpl* const* inputs) {
  for (size_t i = 0; i < plan.inputs.size(); ++i) {
    const Layout& expected = plan.inputs[i];
    const c10::TensorImpl* impl = inputs[i];
    c10::Device device = expected.host ? c10::Device(c10::kCPU) : plan.device;
    TORCH_CHECK(impl->device() == device && impl->layout() == at::kStrided, "input ", i,
                " is not a dense tensor on ", device);
    TORCH_CHECK(impl->sizes() == c10::IntArrayRef(expected.sizes) &&
                    impl->strides() == c10::IntArrayRef(expected.strides) &&
                    impl->dtype().toScalarType() == expected.dtype,
                "input ", i, " is ", impl->dtype().toScalarType(), impl->sizes(), impl->strides(),
                ", the plan expects ", expected.dtype, c10::IntArrayRef(expected.sizes),
                c10::IntArrayRef(expected.strides));
  }
}

// A graph that is recorded from the stream would draw the same numbers whenever it is replayed, and
// whoever waits for a stream ends its recording.
void check_capture(const Plan& plan) {
  if (plan.draws == 0 && (plan.device.is_cpu() || plan.speculations.empty())) return;
  if (!is_capturing(current_cuda_stream(plan.device.index()))) return;
  throw Declined(plan.draws ? "random numbers while a stream is captured"
                            : "a value is asked for while a stream is captured");
}

RunStatus run_work(const Executor& executor, Frame& frame, c10::TensorImpl* const* inputs,
                   size_t& committed) {
  const Plan& plan = executor.plan();
  GilRelease release(plan.releases_gil);
  c10::OptionalDeviceGuard device;
  if (plan.device.is_cuda()) device.reset_device(plan.device);
  void* stream = plan.device.is_cuda() ? current_cuda_stream(plan.device.index()) : nullptr;
  c10::impl::ExcludeDispatchKeyGuard below(excluded_keys());
  c10::AutoGradMode no_grad(false);
  frame.begin(inputs);
  long threads = thread_count(plan);
  size_t steps = 0;
  run_steps(plan, frame, plan.steps, threads, steps, stream, &executor.graphs());
  for (const Speculation& speculation : plan.speculations) {
    if (frame.truth(speculation.buffer) != speculation.expected) return RunStatus::misspeculated;
  }
  // Up to here everything can be thrown away: any run may fail now.
  if (must_fail(Failure::speculation)) return RunStatus::misspeculated;
  TORCH_CHECK(!must_fail(Failure::executor), "a failure that a test has asked for");
  if (!plan.commit.empty()) {
    frame.check_writable();
    run_steps(plan, frame, plan.commit, threads, committed, stream, nullptr);
  }
  return RunStatus::ok;
}

// ATen's warnings become Python warnings at the program's present line, as in eager.
// A filter may turn one into an error: then the handler's destructor throws, which it
// must not do while another exception is under way.
RunStatus run_with_warnings(const Executor& executor, Frame& frame,
                            c10::TensorImpl* const* inputs, size_t& committed) {
  torch::PyWarningHandler warnings;
  try {
    return run_work(executor, frame, inputs, committed);
  } catch (...) {
    warnings.set_in_exception();
    throw;
  }
}

RunStatus run_plan(const Executor& executor, c10::TensorImpl* const* inputs,
                   std::vector<at::Tensor>& outputs, size_t& committed) {
  const Plan& plan = executor.plan();
  check_capture(plan);
  FrameLease lease(executor);
  Frame& frame = *lease;
  RandomStateGuard random(plan.random);
  GpuDraws drawn(plan.device, plan.draws);
  if (plan.draws) frame.set_stream(drawn.seed(), drawn.block());
  auto work = plan.externs.empty() ? run_work : run_with_warnings;
  RunStatus status = work(executor, frame, inputs, committed);
  if (status == RunStatus::ok) {
    frame.collect(outputs);
    random.keep_drawn();
    drawn.keep_drawn();
  }
  lease.keep();
  return status;
}

}  // namespace

RunStatus run(const Executor& executor, c10::TensorImpl* const* inputs, size_t count,
              std::vector<at::Tensor>& outputs, RunError& why) {
  outputs.clear();
  const Plan& plan = executor.plan();
  size_t committed = 0;
  RunStatus failed = RunStatus::error;
  try {
    TORCH_CHECK(count == plan.inputs.size(), "the plan takes ", plan.inputs.size(),
                " inputs, not ", count);
    if (verifying()) verify_inputs(plan, inputs);
    if (!plan.holds_inputs) return run_plan(executor, inputs, outputs, committed);
    // Other Python code may drop the program's references meanwhile.
    std::vector<c10::intrusive_ptr<c10::TensorImpl>> held;
    held.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      held.push_back(c10::intrusive_ptr<c10::TensorImpl>::unsafe_reclaim_from_nonowning(inputs[i]));
    }
    return run_plan(executor, inputs, outputs, committed);
  } catch (...) {
    failed = explain_exception(why);
  }
  outputs.clear();
  // It may have been for memory: the processor's allocator raises no error of its own for that.
  if (plan.device.is_cpu()) trim_pool();
  if (!committed) return failed;
  // Memory may be had again, and the program go on with what is half written, as if it were eager's.
  if (failed == RunStatus::exhausted) why.of_torch = nullptr;
  return RunStatus::torn;
}

bool may_be_captured(const Plan& plan) noexcept {
  try {
    return plan.device.is_cuda() && is_capturing(current_cuda_stream(plan.device.index()));
  } catch (const DriverError&) {
    return true;
  }
}

// ---- Python ---------------------------------------------------------------------

namespace {

struct ExecutorObject {
  PyObject_HEAD
  Executor* executor;
};

PyTypeObject* executor_type = nullptr;     // owned for the life of the process
PyObject* executor_error = nullptr;        // accel._native.ExecutorError, likewise
PyObject* declined_error = nullptr;        // accel._native.DeclinedError, likewise
PyObject* no_memory_error = nullptr;       // accel._native.NoMemoryError, likewise
PyObject* torn_commit_error = nullptr;     // accel._native.TornCommitError, likewise

// Both return false with an OSError set.
bool load_library(const char* path, Library& library) {
  library.reset(dlopen(path, RTLD_NOW | RTLD_LOCAL));
  if (!library) PyErr_Format(PyExc_OSError, "cannot load kernels: %s", dlerror());
  return library != nullptr;
}

bool read_file(const char* path, std::string& content) {
  std::ifstream file(path, std::ios::binary);
  content.assign(std::istreambuf_iterator<char>(file), {});
  if (!file.is_open() || file.bad()) {
    PyErr_Format(PyExc_OSError, "cannot load kernels: %s cannot be read", path);
    return false;
  }
  return true;
}

PyObject* executor_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"plan", "library", nullptr};
  PyObject* source;
  PyObject* path = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O", const_cast<char**>(names), &source,
                                   &path)) {
    return nullptr;
  }
  Library library;
  std::string images;
  if (path != Py_None) {
    PyObject* encoded = nullptr;
    if (!PyUnicode_FSConverter(path, &encoded)) return nullptr;
    bool of_gpu = PyDict_Check(source) && PyDict_GetItemString(source, "kernels") != nullptr;
    bool loaded = of_gpu ? read_file(PyBytes_AS_STRING(encoded), images)
                         : load_library(PyBytes_AS_STRING(encoded), library);
    Py_DECREF(encoded);
    if (!loaded) return nullptr;
  }
  try {
    Plan plan = parse_plan(source, library.get(), images);
    PyObject* self = type->tp_alloc(type, 0);
    if (self) {
      auto* object = reinterpret_cast<ExecutorObject*>(self);
      object->executor = new Executor(std::move(library), std::move(plan));
    }
    return self;
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const PlanError& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const DriverError& error) {
    PyErr_SetString(PyExc_OSError, error.what());
  } catch (const c10::Error& error) {
    PyErr_Format(PyExc_ValueError, "plan: %s", error.what_without_backtrace());
  } catch (const std::exception& error) {
    PyErr_Format(PyExc_ValueError, "plan: %s", error.what());
  }
  return nullptr;
}

void executor_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<ExecutorObject*>(self)->executor;
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* wrap_all(std::vector<at::Tensor>& outputs) {
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(outputs.size()));
  if (!list) return nullptr;
  for (size_t i = 0; i < outputs.size(); ++i) {
    PyObject* item = wrap(std::move(outputs[i]));
    if (!item) {
      Py_DECREF(list);
      return nullptr;
    }
    PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), item);
  }
  return list;
}

// run(tensors): the sequence holds the tensors while the plan runs.
PyObject* executor_run(PyObject* self, PyObject* tensors) {
  if (!PyList_CheckExact(tensors) && !PyTuple_CheckExact(tensors)) {
    return PyErr_Format(PyExc_TypeError, "run() takes a list or tuple of tensors");
  }
  auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(tensors));
  std::vector<c10::TensorImpl*> inputs(count);
  for (size_t i = 0; i < count; ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(tensors, static_cast<Py_ssize_t>(i));
    inputs[i] = unwrap(item);
    if (!inputs[i]) {
      return PyErr_Format(PyExc_TypeError, "input %zu is not a plain tensor but %s", i,
                          Py_TYPE(item)->tp_name);
    }
  }
  std::vector<at::Tensor> outputs;
  RunError why;
  const Executor& executor = *reinterpret_cast<ExecutorObject*>(self)->executor;
  switch (run(executor, inputs.data(), count, outputs, why)) {
    case RunStatus::ok: return wrap_all(outputs);
    case RunStatus::misspeculated: Py_RETURN_NONE;
    case RunStatus::declined: return PyErr_Format(declined_error, "%s", why.text.c_str());
    case RunStatus::exhausted: return PyErr_Format(no_memory_error, "%s", why.text.c_str());
    case RunStatus::error: return PyErr_Format(executor_error, "%s", why.text.c_str());
    case RunStatus::torn: return PyErr_Format(torn_commit_error, "%s", why.text.c_str());
  }
  Py_UNREACHABLE();
}

// profile(tensors): a run whose outputs are dropped.
PyObject* executor_profile(PyObject* self, PyObject* tensors) {
  std::vector<int64_t> times;
  step_times = &times;
  PyObject* outputs = executor_run(self, tensors);
  step_times = nullptr;
  if (!outputs) return nullptr;
  Py_DECREF(outputs);
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(times.size()));
  for (size_t i = 0; list && i < times.size(); ++i) {
    PyObject* item = PyLong_FromLongLong(times[i]);
    if (!item) {
      Py_CLEAR(list);
      break;
    }
    PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), item);
  }
  return list;
}

PyObject* executor_describe(PyObject* self, PyObject*) {
  const Plan& plan = reinterpret_cast<ExecutorObject*>(self)->executor->plan();
  size_t direct = 0;
  for (const ExternStep& step : plan.externs) direct += step.direct != nullptr;
  return Py_BuildValue(
      "{s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:O}", "kernels",
      static_cast<Py_ssize_t>(plan.kernels.size()), "launches",
      static_cast<Py_ssize_t>(plan.launches.size()), "externs", static_cast<Py_ssize_t>(plan.externs.size()), "direct_externs",
      static_cast<Py_ssize_t>(direct), "arena_bytes", static_cast<Py_ssize_t>(plan.arena_bytes),
      "inputs", static_cast<Py_ssize_t>(plan.inputs.size()), "outputs",
      static_cast<Py_ssize_t>(plan.outputs.size()), "commit_steps",
      static_cast<Py_ssize_t>(plan.commit.size()), "releases_gil",
      plan.releases_gil ? Py_True : Py_False);
}

PyMethodDef EXECUTOR_METHODS[] = {
    {"run", executor_run, METH_O,
     "Run on these tensors: the outputs, or None when a speculation did not hold.\n\n"
     "Errors: ExecutorError (an operation failed, nothing was committed), DeclinedError (which is one, and\n"
     "no fault of the plan), NoMemoryError (which is one of those), TornCommitError."},
    {"profile", executor_profile, METH_O,
     "Run on these tensors and drop the outputs: nanoseconds of each step, commit steps last."},
    {"describe", executor_describe, METH_NOARGS, "Numbers about the plan."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot EXECUTOR_SLOTS[] = {
    {Py_tp_new, reinterpret_cast<void*>(executor_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(executor_dealloc)},
    {Py_tp_methods, EXECUTOR_METHODS},
    {Py_tp_doc, const_cast<char*>("Executor(plan, library=None): a plan ready to run.")},
    {0, nullptr},
};

PyType_Spec EXECUTOR_SPEC = {"accel._native.Executor", sizeof(ExecutorObject), 0,
                             Py_TPFLAGS_DEFAULT, EXECUTOR_SLOTS};

PyObject* py_pool_facts(PyObject*, PyObject*) {
  PoolFacts facts = pool_facts();
  return Py_BuildValue("{s:n,s:n,s:n,s:n,s:n}", "free_bytes",
                       static_cast<Py_ssize_t>(facts.free_bytes),
                       "free_blocks", static_cast<Py_ssize_t>(facts.free_blocks), "reused",
                       static_cast<Py_ssize_t>(facts.reused), "allocated",
                       static_cast<Py_ssize_t>(facts.allocated), "small_bytes",
                       static_cast<Py_ssize_t>(facts.small_bytes));
}

PyObject* py_trim_pool(PyObject*, PyObject*) {
  trim_pool();
  Py_RETURN_NONE;
}

PyMethodDef MODULE_METHODS[] = {
    {"output_pool", py_pool_facts, METH_NOARGS, "Numbers about the pool of freed outputs."},
    {"trim_output_pool", py_trim_pool, METH_NOARGS, "Give free output blocks to the system."},
    {nullptr, nullptr, 0, nullptr},
};

void note_fork() { in_forked_child.store(true, std::memory_order_relaxed); }

}  // namespace

const Executor* as_executor(PyObject* object) {
  if (Py_TYPE(object) != executor_type) return nullptr;
  return reinterpret_cast<ExecutorObject*>(object)->executor;
}

const Plan& plan_of(const Executor& executor) { return executor.plan(); }

at::Tensor random_state(const Executor& executor) {
  const Plan& plan = executor.plan();
  if (!plan.random && plan.draws == 0) return at::Tensor();
  try {
    at::Generator generator = at::globalContext().defaultGenerator(plan.device);
    std::lock_guard<std::mutex> lock(generator.mutex());
    return generator.get_state();
  } catch (const c10::Error&) {
    return at::Tensor();  // a stream is captured: the plan will not run either
  }
}

int init_executor(PyObject* module) {
  if (pthread_atfork(nullptr, nullptr, note_fork) != 0) {
    PyErr_SetString(PyExc_OSError, "pthread_atfork failed");
    return -1;
  }
  executor_error =
      PyErr_NewException("accel._native.ExecutorError", PyExc_RuntimeError, nullptr);
  if (!executor_error) return -1;
  declined_error = PyErr_NewException("accel._native.DeclinedError", executor_error, nullptr);
  if (!declined_error) return -1;
  no_memory_error = PyErr_NewException("accel._native.NoMemoryError", declined_error, nullptr);
  torn_commit_error = PyErr_NewException("accel._native.TornCommitError", executor_error, nullptr);
  executor_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&EXECUTOR_SPEC));
  if (!no_memory_error || !torn_commit_error || !executor_type) return -1;
  if (PyModule_AddObjectRef(module, "ExecutorError", executor_error) < 0 ||
      PyModule_AddObjectRef(module, "DeclinedError", declined_error) < 0 ||
      PyModule_AddObjectRef(module, "NoMemoryError", no_memory_error) < 0 ||
      PyModule_AddObjectRef(module, "TornCommitError", torn_commit_error) < 0 ||
      PyModule_AddObjectRef(module, "Executor", reinterpret_cast<PyObject*>(executor_type)) < 0) {
    return -1;
  }
  return PyModule_AddFunctions(module, MODULE_METHODS);
}

}  // namespace accel
