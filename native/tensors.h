// Tensor services for the other files of this folder: Python <-> ATen conversion,
// tensor metadata guards, the ambient state of torch, and the operation watch.
// Only tensors.cpp includes python_variable.h (it costs most of a build).
//
// Everything here needs the GIL unless it says otherwise, and concerns the calling
// thread. No function keeps a strong reference to an object or tensor of the program.
#pragma once

#include "native.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace accel {

// ---- Python objects and tensors -------------------------------------------------

// True for exactly torch.Tensor, torch.nn.Parameter and types added by
// `_native.register_tensor_type`; never calls Python.
bool is_plain_tensor(PyObject* object);

// True for any instance of torch.Tensor, subclasses included, decided by the type
// alone (a user's __instancecheck__ or __class__ is not asked).
bool is_tensor(PyObject* object);

// The tensor inside a plain tensor object (borrowed: lives as long as the object
// holds it), or nullptr when `object` is not a plain tensor. No Python error is set.
c10::TensorImpl* unwrap(PyObject* object);

// As unwrap, for callers that know is_tensor(object).
const at::Tensor& unpack(PyObject* object);

// New reference to the tensor's own Python object (made on first need); NULL with a
// Python error set when that fails.
PyObject* wrap(const at::Tensor& tensor);
PyObject* wrap(at::Tensor&& tensor);

// ---- metadata guard -------------------------------------------------------------

// Everything a plan relies on about one plain dense tensor, except its values.
// Holds no reference. `check` is exact: it answers true only for a plain tensor of
// the same Python type whose metadata are all equal.
class TensorMetaGuard {
 public:
  struct Options {
    bool storage_offset = false;  // compare the storage offset as well
    bool layout = true;           // compare sizes and strides; else only how many there are
  };

  // nullopt with a reason in `*why` when `object` is no tensor a plan can take
  // (subclass, sparse, nested, quantized, functorch wrapper, symbolic sizes, ...).
  static std::optional<TensorMetaGuard> capture(PyObject* object, Options options,
                                                std::string* why);

  // The same metadata, with or without sizes and strides.
  TensorMetaGuard with_layout(bool layout) const {
    TensorMetaGuard other = *this;
    other.layout_ = layout;
    return other;
  }

  bool check(PyObject* object) const;
  // Names the first difference; empty when check(object) holds.
  std::string difference(PyObject* object) const;

 private:
  static constexpr int INLINE_DIMS = 5;

  const int64_t* dims() const { return many_dims_.empty() ? dims_ : many_dims_.data(); }

  PyTypeObject* type_ = nullptr;  // borrowed; a tensor type registered here never dies
  uint64_t keys_ = 0;             // the tensor's dispatch keys, without the thread's
  uint32_t device_ = 0;
  uint16_t dtype_ = 0;
  uint8_t ndim_ = 0;
  uint8_t flags_ = 0;
  bool layout_ = true;
  int64_t storage_offset_ = -1;     // -1: not compared
  int64_t dims_[2 * INLINE_DIMS];   // sizes, then strides
  std::vector<int64_t> many_dims_;  // the same for tensors of more dimensions
};

// What a Python `TensorMetaGuard` captured; NULL for other objects. Borrowed.
const TensorMetaGuard* meta_guard_of(PyObject* object);

// ---- memory identity (no GIL needed) ---------------------------------------------

// True when the bytes reachable through `a` and `b` overlap (by address ranges, so
// two storages over the same memory count).
bool storage_overlaps(const at::Tensor& a, const at::Tensor& b);

// The in-place version counter; 0 for inference tensors, which have none.
uint32_t tensor_version(PyObject* tensor);

// ---- ambient state ---------------------------------------------------------------

// What torch operations depend on besides their arguments: a row per fact, see the
// table in ambient.cpp. Modes on torch's stacks are known by weak references.
struct AmbientState {
  std::vector<uint64_t> rows;
  std::vector<std::weak_ptr<void>> modes;
};

// Tensors on a GPU have been seen: which GPU is the current one is a fact from now on.
void note_gpus_used();
AmbientState capture_ambient();
bool ambient_equal(const AmbientState& state);
// Names the first difference with the thread's present state; empty when equal.
std::string ambient_difference(const AmbientState& state);

// ---- operation watch (no GIL needed) -----------------------------------------------

// Between start and stop, counts the outermost dispatcher operations of this thread
// that begin while nothing is announced. Not reentrant: start while started restarts.
void op_watch_start();
// The count and the name of the first such operation.
std::pair<long, std::string> op_watch_stop();
// The count so far.
long op_watch_count();

// Operations between these two are expected. They nest; the depth is the thread's.
void announce_begin();
void announce_end();

// ---- called by init_tensors --------------------------------------------------------

int init_ambient(PyObject* module);
int init_op_watch(PyObject* module);

}  // namespace accel
