// Optimizer updates: all parameters of a group in one walk over memory.
//
// update() takes what torch.optim's functional forms take and does what they do, operation
// by operation in the same order, for every parameter whose tensors are plain, dense, of one
// layout and apart from each other. The positions of the others are handed back.
//
// Rules for a new row of UPDATES:
// 1. The formula follows the single-tensor function of torch.optim line by line, fused
//    multiply-adds where ATen has them and nowhere else, so that the results are the same
//    bits (but for the last few elements of a tensor, where ATen's loops fuse nothing);
//    scalars are computed in double, as Python does, and rounded to the tensors' dtype.
// 2. What depends on options is a template parameter, so that the loop has no branches.
// 3. tensors[0] is the parameter, tensors[1] the gradient; all but the gradient are written.
#include "native.h"

#include "tensors.h"
#include "threads.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

namespace accel {
namespace {

constexpr size_t MAX_TENSORS = 5;
constexpr size_t MAX_NUMBERS = 8;
constexpr int64_t CHUNK = 16384;                // elements a thread takes at once
constexpr int64_t RELEASE_GIL_ABOVE = 1 << 18;  // elements

// One parameter's update: its memory, and the scalars for its present step.
struct Job {
  void* memory[MAX_TENSORS] = {};
  int64_t numel = 0;
  double numbers[MAX_NUMBERS] = {};
};

// The same source for several instruction sets; GCC picks one when the module is loaded.
// (The build sets -fno-math-errno, which no pragma can.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("O3", "no-trapping-math", "fp-contract=off")
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

template <typename T>
INLINE T* restricted(const Job& job, size_t k) {
  return static_cast<T*>(job.memory[k]);
}

INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double root(double x) { return __builtin_sqrt(x); }

// a * b + c, rounded once: what ATen's add with alpha and lerp do.
INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// `small`: the weight's magnitude is below a half.
template <typename T>
INLINE T lerp(T from, T to, T weight, bool small) {
  return small ? fused(weight, to - from, from) : fused(weight - T(1), to - from, to);
}

// numbers: sign, decay (factor, or the L2 coefficient), 1-beta1, beta2, 1-beta2,
// sqrt(bias correction 2), eps, -step size.
template <typename T, bool L2, bool AMSGRAD>
INLINE void adam(const Job& job, int64_t begin, int64_t end) {
  T* __restrict p = restricted<T>(job, 0);
  const T* __restrict g = restricted<T>(job, 1);
  T* __restrict m = restricted<T>(job, 2);
  T* __restrict v = restricted<T>(job, 3);
  T* __restrict top = restricted<T>(job, 4);
  const T sign(job.numbers[0]), decay(job.numbers[1]), weight(job.numbers[2]);
  const T beta2(job.numbers[3]), rest2(job.numbers[4]), correction(job.numbers[5]);
  const T eps(job.numbers[6]), step(job.numbers[7]);
  const bool small = weight < T(0.5) && weight > T(-0.5);
  for (int64_t i = begin; i < end; ++i) {
    T grad = sign * g[i];
    T param = p[i];
    if (L2) grad = fused(param, decay, grad);
    else param = param * decay;
    T mean = lerp(m[i], grad, weight, small);
    T square = fused(rest2 * grad, grad, v[i] * beta2);
    m[i] = mean;
    v[i] = square;
    if (AMSGRAD) {
      // As maximum: a NaN on either side wins.
      T before = top[i];
      square = before != before ? before : (square > before || square != square ? square : before);
      top[i] = square;
    }
    T denominator = root(square) / correction + eps;
    p[i] = param + step * mean / denominator;
  }
}

// numbers: sign, weight decay, momentum, 1-dampening, -lr.
template <typename T, bool L2, bool MOMENTUM, bool NESTEROV>
INLINE void sgd(const Job& job, int64_t begin, int64_t end) {
  T* __restrict p = restricted<T>(job, 0);
  const T* __restrict g = restricted<T>(job, 1);
  T* __restrict b = restricted<T>(job, 2);
  const T sign(job.numbers[0]), decay(job.numbers[1]), momentum(job.numbers[2]);
  const T rest(job.numbers[3]), step(job.numbers[4]);
  for (int64_t i = begin; i < end; ++i) {
    T grad = sign * g[i];
    if (L2) grad = fused(p[i], decay, grad);
    if (MOMENTUM) {
      T buffer = fused(grad, rest, b[i] * momentum);
      b[i] = buffer;
      grad = NESTEROV ? fused(buffer, momentum, grad) : buffer;
    }
    p[i] = fused(grad, step, p[i]);
  }
}

// numbers: sign, weight decay, eps, -lr with decay.
template <typename T, bool L2>
INLINE void adagrad(const Job& job, int64_t begin, int64_t end) {
  T* __restrict p = restricted<T>(job, 0);
  const T* __restrict g = restricted<T>(job, 1);
  T* __restrict s = restricted<T>(job, 2);
  const T sign(job.numbers[0]), decay(job.numbers[1]), eps(job.numbers[2]), step(job.numbers[3]);
  for (int64_t i = begin; i < end; ++i) {
    T grad = sign * g[i];
    if (L2) grad = fused(p[i], decay, grad);
    T sum = fused(grad, grad, s[i]);
    s[i] = sum;
    p[i] = p[i] + step * grad / (root(sum) + eps);
  }
}

// numbers: sign, weight decay, alpha, 1-alpha, eps, momentum, -lr.
// tensors: parameter, gradient, square average, gradient average, momentum buffer.
template <typename T, bool L2, bool CENTERED, bool MOMENTUM>
INLINE void rmsprop(const Job& job, int64_t begin, int64_t end) {
  T* __restrict p = restricted<T>(job, 0);
  const T* __restrict g = restricted<T>(job, 1);
  T* __restrict s = restricted<T>(job, 2);
  T* __restrict a = restricted<T>(job, 3);
  T* __restrict b = restricted<T>(job, 4);
  const T sign(job.numbers[0]), decay(job.numbers[1]), alpha(job.numbers[2]);
  const T rest(job.numbers[3]), eps(job.numbers[4]), momentum(job.numbers[5]);
  const T step(job.numbers[6]);
  const bool small = rest < T(0.5) && rest > T(-0.5);
  for (int64_t i = begin; i < end; ++i) {
    T grad = sign * g[i];
    if (L2) grad = fused(p[i], decay, grad);
    T square = fused(rest * grad, grad, s[i] * alpha);
    s[i] = square;
    T average = square;
    if (CENTERED) {
      T mean = lerp(a[i], grad, rest, small);
      a[i] = mean;
      average = fused(-mean, mean, square);
    }
    average = root(average) + eps;
    if (MOMENTUM) {
      T buffer = b[i] * momentum + grad / average;
      b[i] = buffer;
      p[i] = fused(buffer, step, p[i]);
    } else {
      p[i] = p[i] + step * grad / average;
    }
  }
}

using Loop = void (*)(const Job&, int64_t begin, int64_t end);

#define PAIR(name, function, ...)                                       \
  CLONES void name##_f(const Job& j, int64_t a, int64_t b) {            \
    function<float __VA_OPT__(, ) __VA_ARGS__>(j, a, b);                \
  }                                                                     \
  CLONES void name##_d(const Job& j, int64_t a, int64_t b) {            \
    function<double __VA_OPT__(, ) __VA_ARGS__>(j, a, b);               \
  }                                                                     \
  constexpr Loop name[2] = {name##_f, name##_d}

PAIR(adam_decoupled, adam, false, false);
PAIR(adam_decoupled_top, adam, false, true);
PAIR(adam_l2, adam, true, false);
PAIR(adam_l2_top, adam, true, true);
PAIR(sgd_plain, sgd, false, false, false);
PAIR(sgd_momentum, sgd, false, true, false);
PAIR(sgd_nesterov, sgd, false, true, true);
PAIR(sgd_l2, sgd, true, false, false);
PAIR(sgd_l2_momentum, sgd, true, true, false);
PAIR(sgd_l2_nesterov, sgd, true, true, true);
PAIR(adagrad_plain, adagrad, false);
PAIR(adagrad_l2, adagrad, true);
PAIR(rmsprop_plain, rmsprop, false, false, false);
PAIR(rmsprop_momentum, rmsprop, false, false, true);
PAIR(rmsprop_centered, rmsprop, false, true, false);
PAIR(rmsprop_centered_momentum, rmsprop, false, true, true);
PAIR(rmsprop_l2, rmsprop, true, false, false);
PAIR(rmsprop_l2_momentum, rmsprop, true, false, true);
PAIR(rmsprop_l2_centered, rmsprop, true, true, false);
PAIR(rmsprop_l2_centered_momentum, rmsprop, true, true, true);
#undef PAIR
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// The options of a call, by position in the row's `numbers`.
using Numbers = const double*;

// numbers: lr, beta1, beta2, weight_decay, eps, amsgrad, maximize, decoupled_weight_decay
const Loop* plan_adam(Numbers n, double step, double* out) {
  bool decay = n[3] != 0, decoupled = n[7] != 0 || !decay;
  out[0] = n[6] != 0 ? -1 : 1;
  out[1] = decoupled ? (decay ? 1 - n[0] * n[3] : 1) : n[3];
  out[2] = 1 - n[1];
  out[3] = n[2];
  out[4] = 1 - n[2];
  out[5] = std::pow(1 - std::pow(n[2], step), 0.5);
  out[6] = n[4];
  out[7] = -(n[0] / (1 - std::pow(n[1], step)));
  if (decoupled) return n[5] != 0 ? adam_decoupled_top : adam_decoupled;
  return n[5] != 0 ? adam_l2_top : adam_l2;
}

// numbers: lr, momentum, dampening, weight_decay, nesterov, maximize
const Loop* plan_sgd(Numbers n, double, double* out) {
  out[0] = n[5] != 0 ? -1 : 1;
  out[1] = n[3];
  out[2] = n[1];
  out[3] = 1 - n[2];
  out[4] = -n[0];
  if (n[1] == 0) return n[3] != 0 ? sgd_l2 : sgd_plain;
  if (n[4] != 0) return n[3] != 0 ? sgd_l2_nesterov : sgd_nesterov;
  return n[3] != 0 ? sgd_l2_momentum : sgd_momentum;
}

// numbers: lr, lr_decay, weight_decay, eps, maximize
const Loop* plan_adagrad(Numbers n, double step, double* out) {
  out[0] = n[4] != 0 ? -1 : 1;
  out[1] = n[2];
  out[2] = n[3];
  out[3] = -(n[0] / (1 + (step - 1) * n[1]));
  return n[2] != 0 ? adagrad_l2 : adagrad_plain;
}

// numbers: lr, alpha, eps, weight_decay, momentum, centered, maximize
const Loop* plan_rmsprop(Numbers n, double, double* out) {
  out[0] = n[6] != 0 ? -1 : 1;
  out[1] = n[3];
  out[2] = n[1];
  out[3] = 1 - n[1];
  out[4] = n[2];
  out[5] = n[4];
  out[6] = -n[0];
  bool centered = n[5] != 0;
  if (n[4] > 0) {
    if (n[3] != 0) return centered ? rmsprop_l2_centered_momentum : rmsprop_l2_momentum;
    return centered ? rmsprop_centered_momentum : rmsprop_momentum;
  }
  if (n[3] != 0) return centered ? rmsprop_l2_centered : rmsprop_l2;
  return centered ? rmsprop_centered : rmsprop_plain;
}

struct Update {
  std::string_view name;
  size_t tensors;  // lists of tensors, the unused ones given as None
  size_t numbers;
  const Loop* (*plan)(Numbers numbers, double step, double* out);
};

constexpr Update UPDATES[] = {
    {"adam", 5, 8, plan_adam},
    {"sgd", 3, 6, plan_sgd},
    {"adagrad", 3, 5, plan_adagrad},
    {"rmsprop", 5, 7, plan_rmsprop},
};

// ---- one call ------------------------------------------------------------------------

// The tensors of one parameter (borrowed objects; NULL: not used).
struct Candidate {
  PyObject* objects[MAX_TENSORS] = {};
  PyObject* step = nullptr;
  Py_ssize_t position = 0;
};

const c10::TensorImpl* plain_impl(PyObject* object) {
  c10::TensorImpl* impl = unwrap(object);
  if (!impl) return nullptr;
  auto allowed = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                      c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::AutocastCPU});
  if (impl->key_set().raw_repr() & ~allowed.raw_repr()) return nullptr;
  if (!impl->device().is_cpu() || impl->layout() != at::kStrided || impl->is_inference() ||
      impl->has_symbolic_sizes_strides() || !impl->has_storage()) {
    return nullptr;
  }
  return impl;
}

bool is_simple(const Candidate& candidate) {
  const c10::TensorImpl* first = plain_impl(candidate.objects[0]);
  if (!first || !first->is_non_overlapping_and_dense()) return false;
  auto dtype = first->dtype().toScalarType();
  if (dtype != at::kFloat && dtype != at::kDouble) return false;
  for (size_t k = 1; k < MAX_TENSORS; ++k) {
    if (!candidate.objects[k]) continue;
    const c10::TensorImpl* other = plain_impl(candidate.objects[k]);
    if (!other || other->dtype().toScalarType() != dtype || other->sizes() != first->sizes()) {
      return false;
    }
    if (other->strides() != first->strides() && first->numel() > 1) return false;
  }
  if (!candidate.step) return true;
  const c10::TensorImpl* step = plain_impl(candidate.step);
  if (!step || step->numel() != 1) return false;
  auto step_dtype = step->dtype().toScalarType();
  return step_dtype == at::kFloat || step_dtype == at::kDouble;
}

struct Range {
  uintptr_t begin, end;
  bool written;
};

Range range_of(PyObject* object, bool written) {
  const at::Tensor& tensor = unpack(object);
  auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + tensor.nbytes(), written};
}

// True when nothing that is written overlaps anything else.
bool are_apart(const std::vector<Candidate>& candidates) {
  std::vector<Range> ranges;
  ranges.reserve(candidates.size() * 5);
  for (const Candidate& c : candidates) {
    for (size_t k = 0; k < MAX_TENSORS; ++k) {
      if (c.objects[k]) ranges.push_back(range_of(c.objects[k], k != 1));
    }
    if (c.step) ranges.push_back(range_of(c.step, true));
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  uintptr_t end = 0, written_end = 0;
  for (const Range& range : ranges) {
    if (range.begin == range.end) continue;
    if (range.begin < written_end || (range.written && range.begin < end)) return false;
    end = std::max(end, range.end);
    if (range.written) written_end = std::max(written_end, range.end);
  }
  return true;
}

double advance(PyObject* step) {
  const at::Tensor& tensor = unpack(step);
  void* memory = tensor.mutable_data_ptr();
  tensor.unsafeGetTensorImpl()->bump_version();
  if (tensor.scalar_type() == at::kDouble) return *static_cast<double*>(memory) += 1;
  return *static_cast<float*>(memory) += 1;
}

struct Piece {
  uint32_t job;
  int64_t begin, end;
};

void run(const std::vector<Job>& jobs, const std::vector<Loop>& loops) {
  std::vector<Piece> pieces;
  for (uint32_t k = 0; k < jobs.size(); ++k) {
    for (int64_t at = 0; at < jobs[k].numel; at += CHUNK) {
      pieces.push_back({k, at, std::min(at + CHUNK, jobs[k].numel)});
    }
  }
  share(static_cast<int64_t>(pieces.size()), 2, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Piece& piece = pieces[static_cast<size_t>(i)];
      loops[piece.job](jobs[piece.job], piece.begin, piece.end);
    }
  });
}

void carry_out(const Update& update, const std::vector<Candidate>& candidates, Numbers numbers) {
  std::vector<Job> jobs;
  std::vector<Loop> loops;
  std::vector<at::Tensor> held;  // without the GIL another thread may drop them
  jobs.reserve(candidates.size());
  loops.reserve(candidates.size());
  int64_t total = 0;
  for (const Candidate& c : candidates) {
    Job job;
    for (size_t k = 0; k < MAX_TENSORS; ++k) {
      if (!c.objects[k]) continue;
      const at::Tensor& tensor = unpack(c.objects[k]);
      held.push_back(tensor);
      job.memory[k] = k == 1 ? const_cast<void*>(tensor.const_data_ptr())
                             : tensor.mutable_data_ptr();
      if (k != 1) tensor.unsafeGetTensorImpl()->bump_version();
    }
    const at::Tensor& param = unpack(c.objects[0]);
    job.numel = param.numel();
    total += job.numel;
    double step = c.step ? advance(c.step) : 0;
    loops.push_back(update.plan(numbers, step, job.numbers)[param.scalar_type() == at::kDouble]);
    jobs.push_back(job);
  }
  if (total <= RELEASE_GIL_ABOVE) return run(jobs, loops);
  PyThreadState* state = PyEval_SaveThread();
  run(jobs, loops);
  PyEval_RestoreThread(state);
}

bool read_numbers(PyObject* sequence, const Update& update, double* numbers) {
  if (!PyTuple_Check(sequence) ||
      PyTuple_GET_SIZE(sequence) != static_cast<Py_ssize_t>(update.numbers)) {
    PyErr_Format(PyExc_TypeError, "%s takes %zu numbers", update.name.data(), update.numbers);
    return false;
  }
  for (size_t k = 0; k < update.numbers; ++k) {
    numbers[k] = PyFloat_AsDouble(PyTuple_GET_ITEM(sequence, static_cast<Py_ssize_t>(k)));
    if (numbers[k] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

// Lists by tensor; None where the update does not use it. All of one length.
bool read_lists(PyObject* lists, const Update& update, PyObject* steps, Py_ssize_t& count) {
  bool ok = PyTuple_Check(lists) &&
            PyTuple_GET_SIZE(lists) == static_cast<Py_ssize_t>(update.tensors) &&
            PyList_Check(PyTuple_GET_ITEM(lists, 0));
  count = ok ? PyList_GET_SIZE(PyTuple_GET_ITEM(lists, 0)) : 0;
  for (Py_ssize_t k = 0; ok && k <= static_cast<Py_ssize_t>(update.tensors); ++k) {
    PyObject* list = k < static_cast<Py_ssize_t>(update.tensors) ? PyTuple_GET_ITEM(lists, k) : steps;
    ok = list == Py_None || (PyList_Check(list) && PyList_GET_SIZE(list) == count);
  }
  if (!ok) PyErr_Format(PyExc_TypeError, "%s takes lists of one length", update.name.data());
  return ok;
}

// False when some list has None (or no tensor) at this position.
bool pick(PyObject* lists, PyObject* steps, size_t tensors, Py_ssize_t i, Candidate& candidate) {
  candidate.position = i;
  for (size_t k = 0; k < tensors; ++k) {
    PyObject* list = PyTuple_GET_ITEM(lists, static_cast<Py_ssize_t>(k));
    if (list != Py_None) candidate.objects[k] = PyList_GET_ITEM(list, i);
  }
  if (steps != Py_None) candidate.step = PyList_GET_ITEM(steps, i);
  return is_simple(candidate);
}

PyObject* all_positions(Py_ssize_t count) {
  PyObject* rest = PyList_New(count);
  for (Py_ssize_t i = 0; rest && i < count; ++i) {
    PyObject* number = PyLong_FromSsize_t(i);
    if (number) PyList_SET_ITEM(rest, i, number);
    else Py_CLEAR(rest);
  }
  return rest;
}

// Elsewhere a fused multiply-add is a call.
bool has_fused_multiply_add() {
#if defined(__x86_64__)
  static const bool found = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
  return found;
#else
  return true;
#endif
}

// update(name, lists, steps, numbers) -> positions that were not updated
PyObject* py_update(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 4 || !PyUnicode_Check(args[0])) {
    return PyErr_Format(PyExc_TypeError, "optimizer_update(name, lists, steps, numbers)");
  }
  const char* name = PyUnicode_AsUTF8(args[0]);
  const Update* update = nullptr;
  for (const Update& row : UPDATES) {
    if (name && row.name == name) update = &row;
  }
  if (!update) return PyErr_Format(PyExc_ValueError, "there is no update called %R", args[0]);
  double numbers[MAX_NUMBERS];
  Py_ssize_t count;
  if (!read_numbers(args[3], *update, numbers)) return nullptr;
  if (!read_lists(args[1], *update, args[2], count)) return nullptr;
  if (c10::GradMode::is_enabled() || !has_fused_multiply_add()) return all_positions(count);
  try {
    std::vector<Candidate> candidates;
    candidates.reserve(static_cast<size_t>(count));
    PyObject* rest = PyList_New(0);
    if (!rest) return nullptr;
    for (Py_ssize_t i = 0; i < count; ++i) {
      Candidate candidate;
      if (pick(args[1], args[2], update->tensors, i, candidate)) {
        candidates.push_back(candidate);
        continue;
      }
      PyObject* number = PyLong_FromSsize_t(i);
      if (!number || PyList_Append(rest, number) < 0) Py_CLEAR(rest);
      Py_XDECREF(number);
      if (!rest) return nullptr;
    }
    if (!are_apart(candidates)) {
      Py_DECREF(rest);
      return all_positions(count);
    }
    carry_out(*update, candidates, numbers);
    return rest;
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
}

PyMethodDef METHODS[] = {
    {"optimizer_update", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_update)),
     METH_FASTCALL, "Update parameters in place; the positions of those that were left alone."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int init_optimizers(PyObject* module) { return PyModule_AddFunctions(module, METHODS); }

}  // namespace accel
