// Ambient state: everything besides arguments that decides what a torch operation does.
//
// Rules for a new row of ROWS:
// 1. `read` is cheap (a few ns), reads one fact of the calling thread or of the process
//    and changes nothing.
// 2. Equal numbers must mean equal behaviour; if a fact does not fit 64 bits, hash
//    nothing: compare it like the mode stacks below.
// 3. A fact that matters only beside another (autocast's dtype) reads as 0 without it,
//    so that it cannot miss for nothing.
// 4. What changes most often comes first.
//
// Tracing by torch.jit, functionalization, functorch layers and the presence of dispatch
// modes are bits of the dispatch key rows.
#include "checkpoints.h"
#include "tensors.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/AutogradState.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/version.h>

#include <array>
#include <atomic>

namespace accel {
namespace {

using at::Float32Backend;
using at::Float32Op;

// The three modes that AutogradState keeps, in one read.
uint64_t autograd_modes() {
  const c10::AutogradState& state = c10::AutogradState::get_tls_state();
  return state.get_grad_mode() + 2 * state.get_inference_mode() + 4 * state.get_fw_grad_mode();
}

// Autocast's keys are excluded while it is off, so that being on shows in the key rows.
uint64_t autocast_details() {
  static const uint64_t KEYS =
      c10::DispatchKeySet({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA})
          .raw_repr();
  if ((c10::impl::raw_local_dispatch_key_set.excluded_ & KEYS) == 0) return 0;
  auto dtype = [](at::DeviceType device) {
    if (!at::autocast::is_autocast_enabled(device)) return uint64_t{0xff};
    return static_cast<uint64_t>(at::autocast::get_autocast_dtype(device));
  };
  return 1 + 2 * at::autocast::is_autocast_cache_enabled() + (dtype(at::kCPU) << 8) +
         (dtype(at::kCUDA) << 16);
}

// The process-wide flags. Each public accessor costs a call or two (5 ns, 30 of them per
// dispatch) and the precisions a walk through a hash map (40 ns), so for the torch this
// table was checked against they are read in place: naming a private member in an explicit
// instantiation is what the standard allows ([temp.spec.general]/6). The map's nodes never
// move. Any other torch is asked through the accessors.
at::Context* context = nullptr;  // set by init_ambient

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR == 13
template <typename Tag, auto Member>
struct PrivateMember {
  friend auto& member_of(Tag, at::Context& where) { return where.*Member; }
};

#define CONTEXT_FLAG(accessor, member)                          \
  struct accessor##_tag {};                                     \
  auto& member_of(accessor##_tag, at::Context&);                \
  template struct PrivateMember<accessor##_tag, &at::Context::member>; \
  uint64_t read_##accessor() {                                  \
    return static_cast<uint64_t>(member_of(accessor##_tag(), *context)); \
  }

struct precision_tag {};
auto& member_of(precision_tag, at::Context&);
template struct PrivateMember<precision_tag, &at::Context::fp32_precision>;

template <Float32Backend BACKEND, Float32Op OP>
const at::Float32Precision* precision_at = nullptr;

template <Float32Backend BACKEND, Float32Op OP>
uint64_t precision() {
  auto*& where = precision_at<BACKEND, OP>;
  if (!where) where = &member_of(precision_tag(), *context).at({BACKEND, OP});
  return static_cast<uint64_t>(*where);
}
#else
#define CONTEXT_FLAG(accessor, member) \
  uint64_t read_##accessor() { return static_cast<uint64_t>(context->accessor()); }

template <Float32Backend BACKEND, Float32Op OP>
uint64_t precision() {
  return static_cast<uint64_t>(context->float32Precision(BACKEND, OP));
}
#endif

CONTEXT_FLAG(deterministicAlgorithms, _deterministic_algorithms)
CONTEXT_FLAG(deterministicAlgorithmsWarnOnly, _deterministic_algorithms_warn_only)
CONTEXT_FLAG(deterministicFillUninitializedMemory, _deterministic_fill_uninitialized_memory)
CONTEXT_FLAG(userEnabledMkldnn, enabled_mkldnn)
CONTEXT_FLAG(deterministicMkldnn, deterministic_mkldnn)
CONTEXT_FLAG(allowTF32OneDNN, allow_tf32_onednn)
CONTEXT_FLAG(userEnabledNNPACK, enabled_nnpack)
CONTEXT_FLAG(userEnabledFlashSDP, enabled_flashSDP)
CONTEXT_FLAG(userEnabledMemEfficientSDP, enabled_mem_efficientSDP)
CONTEXT_FLAG(userEnabledMathSDP, enabled_mathSDP)
CONTEXT_FLAG(userEnabledCuDNNSDP, enabled_cudnnSDP)
CONTEXT_FLAG(allowFP16BF16ReductionMathSDP, allow_fp16_bf16_reduction_mathSDP)
CONTEXT_FLAG(userEnabledCuDNN, enabled_cudnn)
CONTEXT_FLAG(benchmarkCuDNN, benchmark_cudnn)
CONTEXT_FLAG(deterministicCuDNN, deterministic_cudnn)
CONTEXT_FLAG(allowFP16ReductionCuBLAS, allow_fp16_reduction_cublas)
CONTEXT_FLAG(allowBF16ReductionCuBLAS, allow_bf16_reduction_cublas)
CONTEXT_FLAG(allowFP16ReductionCPU, allow_fp16_reduction_cpu)
#undef CONTEXT_FLAG

std::atomic<bool> gpus_used{false};

// "cuda" without a number is this one. Asked of torch only where tensors on a GPU have been seen.
uint64_t current_gpu() {
  if (!gpus_used.load(std::memory_order_relaxed)) return 0;
  const auto* gpus = c10::impl::device_guard_impl_registry[static_cast<size_t>(at::kCUDA)].load();
  if (!gpus) return 0;
  try {
    return static_cast<uint64_t>(gpus->getDevice().index());
  } catch (const c10::Error&) {
    return ~uint64_t{0};  // nobody can say: no recording holds
  }
}

struct Row {
  const char* name;
  uint64_t (*read)();
};

#define FACT(expression) [] { return static_cast<uint64_t>(expression); }

constexpr Row ROWS[] = {
    {"dispatch keys included", FACT(c10::impl::raw_local_dispatch_key_set.included_)},
    {"dispatch keys excluded", FACT(c10::impl::raw_local_dispatch_key_set.excluded_)},
    {"grad, inference and forward AD modes", autograd_modes},
    {"autocast dtypes and cache", autocast_details},
    {"torch function state", FACT(at::impl::PythonTorchFunctionTLS::get_disabled_state())},
    {"torch function modes", FACT(at::impl::PythonTorchFunctionTLS::stack_len())},
    {"torch dispatch modes", FACT(c10::impl::TorchDispatchModeTLS::stack_len())},
    {"saved tensor hooks", hooks_of_others},
    {"anomaly mode", FACT(torch::autograd::AnomalyMode::is_enabled())},
    {"default dtype", FACT(c10::get_default_dtype().toScalarType())},
    {"threads", FACT(at::get_num_threads())},
    {"deterministic algorithms", read_deterministicAlgorithms},
    {"deterministic warn only", read_deterministicAlgorithmsWarnOnly},
    {"deterministic fill", read_deterministicFillUninitializedMemory},
    {"mkldnn enabled", read_userEnabledMkldnn},
    {"mkldnn deterministic", read_deterministicMkldnn},
    {"mkldnn tf32", read_allowTF32OneDNN},
    {"nnpack enabled", read_userEnabledNNPACK},
    {"flash attention enabled", read_userEnabledFlashSDP},
    {"memory-efficient attention enabled", read_userEnabledMemEfficientSDP},
    {"math attention enabled", read_userEnabledMathSDP},
    {"cudnn attention enabled", read_userEnabledCuDNNSDP},
    {"math attention reduced precision", read_allowFP16BF16ReductionMathSDP},
    {"cudnn enabled", read_userEnabledCuDNN},
    {"cudnn benchmark", read_benchmarkCuDNN},
    {"cudnn deterministic", read_deterministicCuDNN},
    {"cublas fp16 reduction", read_allowFP16ReductionCuBLAS},
    {"cublas bf16 reduction", read_allowBF16ReductionCuBLAS},
    {"cpu fp16 reduction", read_allowFP16ReductionCPU},
    {"float32 precision", precision<Float32Backend::GENERIC, Float32Op::ALL>},
    {"mkldnn precision", precision<Float32Backend::MKLDNN, Float32Op::ALL>},
    {"mkldnn matmul precision", precision<Float32Backend::MKLDNN, Float32Op::MATMUL>},
    {"mkldnn conv precision", precision<Float32Backend::MKLDNN, Float32Op::CONV>},
    {"mkldnn rnn precision", precision<Float32Backend::MKLDNN, Float32Op::RNN>},
    {"current GPU", current_gpu},
    {"cuda precision", precision<Float32Backend::CUDA, Float32Op::ALL>},
    {"cuda matmul precision", precision<Float32Backend::CUDA, Float32Op::MATMUL>},
    {"cuda conv precision", precision<Float32Backend::CUDA, Float32Op::CONV>},
};
#undef FACT
constexpr size_t ROW_COUNT = std::size(ROWS);

// The first row whose present value differs, or ROW_COUNT. Unrolled at compile time so
// that the readers are inlined.
template <size_t I = 0>
inline size_t first_difference(const uint64_t* expected) {
  if constexpr (I == ROW_COUNT) {
    return ROW_COUNT;
  } else {
    if (ROWS[I].read() != expected[I]) return I;
    return first_difference<I + 1>(expected);
  }
}

template <typename Visit>
bool each_mode(Visit visit) {
  using Functions = at::impl::PythonTorchFunctionTLS;
  using Dispatch = c10::impl::TorchDispatchModeTLS;
  for (int64_t i = 0, n = Functions::stack_len(); i < n; ++i) {
    if (!visit(std::shared_ptr<void>(Functions::get_stack_at(i)))) return false;
  }
  for (int64_t i = 0, n = Dispatch::stack_len(); i < n; ++i) {
    if (!visit(std::shared_ptr<void>(Dispatch::get_stack_at(i)))) return false;
  }
  return true;
}

// The same push of the same mode object: an address may be reused, a control block
// that a weak pointer holds may not.
bool modes_equal(const AmbientState& state) {
  size_t next = 0;
  return each_mode([&](const std::shared_ptr<void>& mode) {
    if (next >= state.modes.size()) return false;
    const auto& expected = state.modes[next++];
    return !expected.owner_before(mode) && !mode.owner_before(expected);
  });
}

struct Ambient {
  PyObject_HEAD
  AmbientState* state;
};

PyObject* py_new(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* self = type->tp_alloc(type, 0);
  if (self) reinterpret_cast<Ambient*>(self)->state = new AmbientState(capture_ambient());
  return self;
}

void py_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<Ambient*>(self)->state;
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* py_matches(PyObject* self, PyObject*) {
  return PyBool_FromLong(ambient_equal(*reinterpret_cast<Ambient*>(self)->state));
}

PyObject* py_difference(PyObject* self, PyObject*) {
  std::string name = ambient_difference(*reinterpret_cast<Ambient*>(self)->state);
  return PyUnicode_FromStringAndSize(name.data(), static_cast<Py_ssize_t>(name.size()));
}

PyObject* py_ambient(PyObject*, PyObject*) {
  PyObject* result = PyDict_New();
  if (!result) return nullptr;
  for (const Row& row : ROWS) {
    PyObject* value = PyLong_FromUnsignedLongLong(row.read());
    if (!value || PyDict_SetItemString(result, row.name, value) < 0) {
      Py_XDECREF(value);
      Py_DECREF(result);
      return nullptr;
    }
    Py_DECREF(value);
  }
  return result;
}

PyMethodDef AMBIENT_METHODS[] = {
    {"matches", py_matches, METH_NOARGS, "True when the thread's state is the captured one."},
    {"difference", py_difference, METH_NOARGS,
     "The name of the first fact that differs; empty when none does."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot AMBIENT_SLOTS[] = {
    {Py_tp_new, reinterpret_cast<void*>(py_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(py_dealloc)},
    {Py_tp_methods, AMBIENT_METHODS},
    {Py_tp_doc, const_cast<char*>("The ambient state of torch at the time of construction.")},
    {0, nullptr},
};

PyType_Spec AMBIENT_SPEC = {"accel._native.Ambient", sizeof(Ambient), 0, Py_TPFLAGS_DEFAULT,
                            AMBIENT_SLOTS};

PyMethodDef MODULE_METHODS[] = {
    {"ambient", py_ambient, METH_NOARGS, "The thread's ambient state: {name: number}."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void note_gpus_used() { gpus_used.store(true, std::memory_order_relaxed); }

AmbientState capture_ambient() {
  AmbientState state;
  state.rows.reserve(ROW_COUNT);
  for (const Row& row : ROWS) state.rows.push_back(row.read());
  each_mode([&](const std::shared_ptr<void>& mode) {
    state.modes.emplace_back(mode);
    return true;
  });
  return state;
}

bool ambient_equal(const AmbientState& state) {
  if (first_difference(state.rows.data()) != ROW_COUNT) return false;
  return state.modes.empty() || modes_equal(state);
}

std::string ambient_difference(const AmbientState& state) {
  size_t row = first_difference(state.rows.data());
  if (row != ROW_COUNT) return ROWS[row].name;
  return modes_equal(state) ? "" : "the modes on torch's stacks";
}

int init_ambient(PyObject* module) {
  context = &at::globalContext();
  PyObject* type = PyType_FromSpec(&AMBIENT_SPEC);
  if (!type) return -1;
  int status = PyModule_AddObjectRef(module, "Ambient", type);
  Py_DECREF(type);
  return status < 0 ? -1 : PyModule_AddFunctions(module, MODULE_METHODS);
}

}  // namespace accel
