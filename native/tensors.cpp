// Python <-> ATen conversion, tensor metadata guards, the tensor table, memory identity.
// The only file of accel that includes python_variable.h.
#include "tensors.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <unordered_map>

namespace accel {
namespace {

// Types whose instances behave as plain tensors. The first two are torch.Tensor and
// torch.nn.Parameter; each entry holds a strong reference for the life of the process.
constexpr size_t MAX_PLAIN_TYPES = 16;
PyTypeObject* plain_types[MAX_PLAIN_TYPES];
size_t plain_type_count = 0;

bool is_plain_type(PyTypeObject* type) {
  if (type == plain_types[0] || type == plain_types[1]) return true;
  for (size_t i = 2; i < plain_type_count; ++i) {
    if (type == plain_types[i]) return true;
  }
  return false;
}

// Autograd's part of the metadata, read without virtual calls.
enum Flag : uint8_t {
  REQUIRES_GRAD = 1,
  HAS_TANGENT = 2,  // forward-mode AD
  HAS_HOOKS = 4,    // register_hook or register_post_accumulate_grad_hook
};

uint8_t read_flags(const THPVariable* object, const c10::TensorImpl* impl) {
  uint8_t flags = object->backward_hooks || object->post_accumulate_grad_hooks ? HAS_HOOKS : 0;
  auto* meta = static_cast<torch::autograd::AutogradMeta*>(impl->autograd_meta());
  if (meta) {
    if (meta->requires_grad_ || meta->grad_fn_) flags |= REQUIRES_GRAD;
    if (meta->fw_grad_ && !meta->fw_grad_->empty()) flags |= HAS_TANGENT;
  }
  return flags;
}

// The thread's own part, what it includes and excludes, is in the ambient state: it may be another
// where a recording meets the tensor (under torch.autocast) than where guards are checked.
uint64_t own_keys(const c10::TensorImpl* impl) { return impl->key_set().raw_repr(); }

uint32_t pack_device(c10::Device device) {
  return static_cast<uint32_t>(static_cast<uint8_t>(device.type())) << 8 |
         static_cast<uint8_t>(device.index());
}

// The dispatch keys a plan's tensors may have. Everything else (sparse, nested,
// quantized, functorch, functionalization, Python, named, ...) is refused at capture.
c10::DispatchKeySet allowed_keys() {
  using Key = c10::DispatchKey;
  return c10::DispatchKeySet({Key::CPU, Key::CUDA, Key::AutogradCPU, Key::AutogradCUDA,
                              Key::ADInplaceOrView, Key::Conjugate, Key::Negative,
                              Key::AutocastCPU, Key::AutocastCUDA});
}

const char* refusal(const THPVariable* object, const c10::TensorImpl* impl) {
  if (impl->key_set().raw_repr() & ~allowed_keys().raw_repr()) return "its dispatch keys are not plain dense";
  if (impl->layout() != c10::kStrided) return "its layout is not strided";
  if (impl->has_symbolic_sizes_strides()) return "its sizes are symbolic";
  if (!impl->has_storage()) return "it has no storage";
  if (read_flags(object, impl) & HAS_TANGENT) return "it carries a forward-mode tangent";
  return nullptr;
}

}  // namespace

bool is_plain_tensor(PyObject* object) { return is_plain_type(Py_TYPE(object)); }

bool is_tensor(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  return is_plain_type(type) || PyType_IsSubtype(type, plain_types[0]);
}

c10::TensorImpl* unwrap(PyObject* object) {
  if (!is_plain_type(Py_TYPE(object))) return nullptr;
  return reinterpret_cast<THPVariable*>(object)->cdata.unsafeGetTensorImpl();
}

const at::Tensor& unpack(PyObject* object) { return reinterpret_cast<THPVariable*>(object)->cdata; }

PyObject* wrap(const at::Tensor& tensor) { return THPVariable_Wrap(tensor); }
PyObject* wrap(at::Tensor&& tensor) { return THPVariable_Wrap(std::move(tensor)); }

// ---- metadata guard -------------------------------------------------------------

std::optional<TensorMetaGuard> TensorMetaGuard::capture(PyObject* object, Options options,
                                                        std::string* why) {
  auto refuse = [&](const char* reason) -> std::optional<TensorMetaGuard> {
    if (why) *why = reason;
    return std::nullopt;
  };
  c10::TensorImpl* impl = unwrap(object);
  if (!impl) return refuse("it is not a plain tensor");
  auto* variable = reinterpret_cast<THPVariable*>(object);
  if (const char* reason = refusal(variable, impl)) return refuse(reason);
  if (impl->dim() > 64) return refuse("it has more than 64 dimensions");

  TensorMetaGuard guard;
  guard.type_ = Py_TYPE(object);
  guard.keys_ = own_keys(impl);
  guard.device_ = pack_device(impl->device());
  if (impl->device().is_cuda()) note_gpus_used();
  guard.dtype_ = static_cast<uint16_t>(impl->dtype().toScalarType());
  guard.ndim_ = static_cast<uint8_t>(impl->dim());
  guard.flags_ = read_flags(variable, impl);
  guard.layout_ = options.layout;
  if (options.storage_offset) guard.storage_offset_ = impl->storage_offset();
  int64_t* dims = guard.dims_;
  if (guard.ndim_ > INLINE_DIMS) {
    guard.many_dims_.resize(2 * guard.ndim_);
    dims = guard.many_dims_.data();
  }
  for (int i = 0; i < guard.ndim_; ++i) {
    dims[i] = impl->sizes()[i];
    dims[guard.ndim_ + i] = impl->strides()[i];
  }
  return guard;
}

bool TensorMetaGuard::check(PyObject* object) const {
  if (Py_TYPE(object) != type_) return false;
  auto* variable = reinterpret_cast<THPVariable*>(object);
  const c10::TensorImpl* impl = variable->cdata.unsafeGetTensorImpl();
  // The keys come first: with other keys even asking for the sizes may be an error.
  if (own_keys(impl) != keys_) return false;
  if (static_cast<uint16_t>(impl->dtype().toScalarType()) != dtype_) return false;
  if (read_flags(variable, impl) != flags_) return false;
  if (pack_device(impl->device()) != device_) return false;
  c10::IntArrayRef sizes = impl->sizes();
  if (sizes.size() != ndim_) return false;
  const int64_t* strides = impl->strides().data();
  const int64_t* expected = dims();
  for (int i = 0; layout_ && i < ndim_; ++i) {
    if (sizes[i] != expected[i] || strides[i] != expected[ndim_ + i]) return false;
  }
  return storage_offset_ < 0 || impl->storage_offset() == storage_offset_;
}

std::string TensorMetaGuard::difference(PyObject* object) const {
  if (Py_TYPE(object) != type_) {
    return std::string("type is ") + Py_TYPE(object)->tp_name + ", was " + type_->tp_name;
  }
  auto* variable = reinterpret_cast<THPVariable*>(object);
  const c10::TensorImpl* impl = variable->cdata.unsafeGetTensorImpl();
  if (own_keys(impl) != keys_) return "dispatch keys (layout, inference, functorch, ...)";
  if (static_cast<uint16_t>(impl->dtype().toScalarType()) != dtype_) {
    return std::string("dtype is ") + c10::toString(impl->dtype().toScalarType()) + ", was " +
           c10::toString(static_cast<c10::ScalarType>(dtype_));
  }
  uint8_t changed = read_flags(variable, impl) ^ flags_;
  if (changed & REQUIRES_GRAD) return "requires_grad";
  if (changed & HAS_TANGENT) return "forward-mode tangent";
  if (changed & HAS_HOOKS) return "tensor hooks";
  if (pack_device(impl->device()) != device_) return "device is " + impl->device().str();
  auto text = [](const int64_t* values, size_t count) {
    std::string joined = "[";
    for (size_t i = 0; i < count; ++i) joined += (i ? ", " : "") + std::to_string(values[i]);
    return joined + "]";
  };
  c10::IntArrayRef sizes = impl->sizes();
  c10::IntArrayRef expected_sizes(dims(), ndim_);
  if (layout_ ? sizes != expected_sizes : sizes.size() != ndim_) {
    return "sizes are " + text(sizes.data(), sizes.size()) + ", were " + text(dims(), ndim_);
  }
  c10::IntArrayRef strides = impl->strides();
  if (layout_ && strides != c10::IntArrayRef(dims() + ndim_, ndim_)) {
    return "strides are " + text(strides.data(), strides.size()) + ", were " +
           text(dims() + ndim_, ndim_);
  }
  if (storage_offset_ >= 0 && impl->storage_offset() != storage_offset_) return "storage offset";
  return "";
}

// ---- memory identity ------------------------------------------------------------

namespace {

// The half-open address range that the elements of `tensor` lie in.
std::pair<uintptr_t, uintptr_t> byte_range(const at::Tensor& tensor) {
  auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {begin, begin};
  int64_t last = 0;  // strides are never negative
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {begin, begin + static_cast<uintptr_t>(last + 1) * tensor.element_size()};
}

}  // namespace

bool storage_overlaps(const at::Tensor& a, const at::Tensor& b) {
  auto [a_begin, a_end] = byte_range(a);
  auto [b_begin, b_end] = byte_range(b);
  return a_begin < a_end && b_begin < b_end && a_begin < b_end && b_begin < a_end;
}

uint32_t tensor_version(PyObject* tensor) {
  const at::Tensor& value = unpack(tensor);
  return value.is_inference() ? 0 : static_cast<uint32_t>(value._version());
}

// ---- Python names ---------------------------------------------------------------

namespace {

PyObject* not_a_tensor(PyObject* object) {
  return PyErr_Format(PyExc_TypeError, "expected a torch.Tensor, got %s", Py_TYPE(object)->tp_name);
}

// Runs `body`, turning a C++ exception into a Python one.
template <typename Body>
PyObject* guarded(Body body) {
  try {
    return body();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// A map from tensors to numbers by TensorImpl address. The weak reference keeps the
// address from being used again while the table lives, without keeping the storage.
struct TensorTable {
  PyObject_HEAD
  struct Slot {
    c10::weak_intrusive_ptr<c10::TensorImpl> impl;
    int64_t number;
  };
  std::unordered_map<const c10::TensorImpl*, Slot>* slots;
};

PyObject* table_new(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* self = type->tp_alloc(type, 0);
  if (self) {
    auto* table = reinterpret_cast<TensorTable*>(self);
    table->slots = new std::unordered_map<const c10::TensorImpl*, TensorTable::Slot>();
  }
  return self;
}

void table_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<TensorTable*>(self)->slots;
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* table_get(PyObject* self, PyObject* tensor) {
  if (!is_tensor(tensor)) return not_a_tensor(tensor);
  auto& slots = *reinterpret_cast<TensorTable*>(self)->slots;
  auto found = slots.find(unpack(tensor).unsafeGetTensorImpl());
  if (found == slots.end()) Py_RETURN_NONE;
  return PyLong_FromLongLong(found->second.number);
}

PyObject* table_set(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2) return PyErr_Format(PyExc_TypeError, "set() takes a tensor and a number");
  if (!is_tensor(args[0])) return not_a_tensor(args[0]);
  int64_t number = PyLong_AsLongLong(args[1]);
  if (number == -1 && PyErr_Occurred()) return nullptr;
  auto& slots = *reinterpret_cast<TensorTable*>(self)->slots;
  const at::Tensor& value = unpack(args[0]);
  auto found = slots.find(value.unsafeGetTensorImpl());
  if (found != slots.end()) {
    found->second.number = number;
  } else {
    c10::weak_intrusive_ptr<c10::TensorImpl> weak(value.getIntrusivePtr());
    slots.emplace(value.unsafeGetTensorImpl(), TensorTable::Slot{std::move(weak), number});
  }
  Py_RETURN_NONE;
}

Py_ssize_t table_len(PyObject* self) {
  return static_cast<Py_ssize_t>(reinterpret_cast<TensorTable*>(self)->slots->size());
}

PyMethodDef TABLE_METHODS[] = {
    {"get", table_get, METH_O, "The tensor's number, or None."},
    {"set", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(table_set)), METH_FASTCALL,
     "Give the tensor a number."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot TABLE_SLOTS[] = {
    {Py_tp_new, reinterpret_cast<void*>(table_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(table_dealloc)},
    {Py_tp_methods, TABLE_METHODS},
    {Py_sq_length, reinterpret_cast<void*>(table_len)},
    {Py_tp_doc, const_cast<char*>("Numbers for tensors, by identity, keeping none alive.")},
    {0, nullptr},
};

PyType_Spec TABLE_SPEC = {"accel._native.TensorTable", sizeof(TensorTable), 0, Py_TPFLAGS_DEFAULT,
                          TABLE_SLOTS};

struct MetaGuardObject {
  PyObject_HEAD
  TensorMetaGuard* guard;
};

PyObject* guard_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"tensor", "storage_offset", nullptr};
  PyObject* tensor;
  int with_offset = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|p", const_cast<char**>(names), &tensor,
                                   &with_offset)) {
    return nullptr;
  }
  std::string why;
  auto guard = TensorMetaGuard::capture(tensor, {.storage_offset = with_offset != 0}, &why);
  if (!guard) {
    return PyErr_Format(PyExc_ValueError, "cannot guard this tensor: %s", why.c_str());
  }
  PyObject* self = type->tp_alloc(type, 0);
  if (self) {
    reinterpret_cast<MetaGuardObject*>(self)->guard = new TensorMetaGuard(std::move(*guard));
  }
  return self;
}

void guard_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<MetaGuardObject*>(self)->guard;
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* guard_check(PyObject* self, PyObject* tensor) {
  return PyBool_FromLong(reinterpret_cast<MetaGuardObject*>(self)->guard->check(tensor));
}

PyObject* guard_difference(PyObject* self, PyObject* tensor) {
  return PyUnicode_FromString(
      reinterpret_cast<MetaGuardObject*>(self)->guard->difference(tensor).c_str());
}

PyMethodDef GUARD_METHODS[] = {
    {"check", guard_check, METH_O, "True when the tensor has the captured metadata."},
    {"difference", guard_difference, METH_O, "The first difference; empty when none."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot GUARD_SLOTS[] = {
    {Py_tp_new, reinterpret_cast<void*>(guard_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(guard_dealloc)},
    {Py_tp_methods, GUARD_METHODS},
    {Py_tp_doc, const_cast<char*>("A plain tensor's metadata, to compare others with.")},
    {0, nullptr},
};

PyType_Spec GUARD_SPEC = {"accel._native.TensorMetaGuard", sizeof(MetaGuardObject), 0,
                          Py_TPFLAGS_DEFAULT, GUARD_SLOTS};

PyObject* py_register_type(PyObject*, PyObject* type) {
  if (!PyType_Check(type) ||
      !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type), plain_types[0])) {
    return PyErr_Format(PyExc_TypeError, "expected a subclass of torch.Tensor");
  }
  if (is_plain_type(reinterpret_cast<PyTypeObject*>(type))) Py_RETURN_NONE;
  if (plain_type_count == MAX_PLAIN_TYPES) {
    return PyErr_Format(PyExc_ValueError, "too many plain tensor types");
  }
  Py_INCREF(type);
  plain_types[plain_type_count++] = reinterpret_cast<PyTypeObject*>(type);
  Py_RETURN_NONE;
}

PyObject* py_is_plain(PyObject*, PyObject* object) {
  return PyBool_FromLong(is_plain_tensor(object));
}

PyObject* py_version(PyObject*, PyObject* object) {
  if (!is_tensor(object)) return not_a_tensor(object);
  return guarded([&] { return PyLong_FromUnsignedLong(tensor_version(object)); });
}

PyObject* py_storage_key(PyObject*, PyObject* object) {
  if (!is_tensor(object)) return not_a_tensor(object);
  return guarded([&] {
    const at::Tensor& tensor = unpack(object);
    TORCH_CHECK(tensor.has_storage(), "the tensor has no storage");
    return PyLong_FromVoidPtr(tensor.storage().unsafeGetStorageImpl());
  });
}

PyObject* py_storage_nbytes(PyObject*, PyObject* object) {
  if (!is_tensor(object)) return not_a_tensor(object);
  return guarded([&] {
    const at::Tensor& tensor = unpack(object);
    TORCH_CHECK(tensor.has_storage(), "the tensor has no storage");
    return PyLong_FromSize_t(tensor.storage().nbytes());
  });
}

PyObject* py_overlaps(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2) return PyErr_Format(PyExc_TypeError, "storage_overlaps() takes two tensors");
  for (int i = 0; i < 2; ++i) {
    if (!is_tensor(args[i])) return not_a_tensor(args[i]);
  }
  return guarded(
      [&] { return PyBool_FromLong(storage_overlaps(unpack(args[0]), unpack(args[1]))); });
}

PyMethodDef MODULE_METHODS[] = {
    {"register_tensor_type", py_register_type, METH_O,
     "Treat exact instances of this torch.Tensor subclass as plain tensors."},
    {"is_plain_tensor", py_is_plain, METH_O,
     "True for exactly torch.Tensor, torch.nn.Parameter and registered types."},
    {"tensor_version", py_version, METH_O, "The in-place version; 0 for inference tensors."},
    {"storage_key", py_storage_key, METH_O, "The identity of the tensor's storage."},
    {"storage_nbytes", py_storage_nbytes, METH_O, "The size of the tensor's storage in bytes."},
    {"storage_overlaps", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_overlaps)),
     METH_FASTCALL, "True when the bytes of two tensors overlap."},
    {nullptr, nullptr, 0, nullptr},
};

int add_type(PyObject* module, const char* name, PyType_Spec* spec) {
  PyObject* type = PyType_FromSpec(spec);
  if (!type) return -1;
  int status = PyModule_AddObjectRef(module, name, type);
  Py_DECREF(type);
  return status;
}

}  // namespace

const TensorMetaGuard* meta_guard_of(PyObject* object) {
  bool is_one = Py_TYPE(object)->tp_dealloc == guard_dealloc;  // the type cannot be subclassed
  return is_one ? reinterpret_cast<MetaGuardObject*>(object)->guard : nullptr;
}

int init_tensors(PyObject* module) {
  if (!THPVariableClass || !ParameterClass) {
    PyErr_SetString(PyExc_ImportError, "import torch before accel._native");
    return -1;
  }
  plain_types[0] = reinterpret_cast<PyTypeObject*>(Py_NewRef(THPVariableClass));
  plain_types[1] = reinterpret_cast<PyTypeObject*>(Py_NewRef(ParameterClass));
  plain_type_count = 2;
  if (add_type(module, "TensorTable", &TABLE_SPEC) < 0 ||
      add_type(module, "TensorMetaGuard", &GUARD_SPEC) < 0 ||
      PyModule_AddFunctions(module, MODULE_METHODS) < 0) {
    return -1;
  }
  return init_ambient(module) < 0 || init_op_watch(module) < 0 ? -1 : 0;
}

}  // namespace accel
