// `loss.backward()`: what torch's Python code does between the call and the engine.
//
// The prologue of torch.Tensor.backward comes here. In the common case (one plain tensor, a
// gradient of its own shape or none, no `inputs`, no second derivatives, nothing that overrides
// torch's functions) the two Python functions above `_engine_run_backward` only find out that it is
// that case; this is found out here instead. Then two functions with their names and lines call
// torch's own `_engine_run_backward` as they would: the stack looks the same from within.
// Everything else runs the body.
//
// Ownership: unless a comment says otherwise, parameters are borrowed and results are new
// references. Everything needs the GIL.
#include "dispatch.h"
#include "entry.h"
#include "session.h"
#include "tensors.h"

#include <ATen/Functions.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>


namespace accel {
namespace {

// What the calls below are a shortcut of; all owned, set together.
struct Chain {
  PyObject* torch = nullptr;     // the module's dict, where the body looks up `autograd`
  PyObject* autograd = nullptr;  // the module
  PyObject* globals = nullptr;   // its dict
  PyObject* expected = nullptr;  // tuple of (name in globals, function, its code)
  PyObject* outer = nullptr;     // outer(inner, tensors, gradients, retain_graph, create_graph, inputs)
  PyObject* ones_like = nullptr;  // torch's, which makes the gradient that is not given
  PyObject* inner = nullptr;     // inner(tensors, ...), which calls the engine
};

Chain chain;
PyObject *autograd_name, *ones_like_name, *no_inputs;  // immortal

// True when the body would call the very functions that this file stands for.
bool is_intact() {
  if (!chain.expected) return false;
  if (PyDict_GetItemWithError(chain.torch, autograd_name) != chain.autograd) return false;
  if (PyDict_GetItemWithError(chain.torch, ones_like_name) != chain.ones_like) return false;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(chain.expected); k++) {
    PyObject* row = PyTuple_GET_ITEM(chain.expected, k);
    PyObject* function = PyTuple_GET_ITEM(row, 1);
    if (PyDict_GetItemWithError(chain.globals, PyTuple_GET_ITEM(row, 0)) != function) return false;
    if (PyFunction_GET_CODE(function) != PyTuple_GET_ITEM(row, 2)) return false;
  }
  return true;
}

// Whether torch's functions might be anybody else's here, or somebody watches frames.
bool is_overridden() {
  using c10::DispatchKey;
  PyThreadState* thread = PyThreadState_Get();
  if (thread->c_tracefunc || thread->c_profilefunc) return true;
  if (at::impl::torch_function_mode_enabled()) return true;
  c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has_any(c10::DispatchKeySet({DispatchKey::FuncTorchDynamicLayerFrontMode,
                                               DispatchKey::FuncTorchDynamicLayerBackMode,
                                               DispatchKey::Functionalize, DispatchKey::Tracer,
                                               DispatchKey::Python}));
}

// A dense tensor whose sizes are numbers.
bool is_simple(const at::Tensor& t) {
  return t.defined() && t.layout() == at::kStrided && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
         !t.is_nested() && !t.key_set().has(c10::DispatchKey::Python) && !t.is_quantized();
}

// What the engine is given for `tensor` (new); NULL without an error set: the body is to run.
PyObject* gradient_of(const at::Tensor& tensor, PyObject* gradient) {
  if (gradient == Py_None) {
    bool implicit = tensor.requires_grad() && tensor.numel() == 1 && tensor.is_floating_point();
    return implicit ? wrap(at::ones_like(tensor, {}, at::MemoryFormat::Preserve)) : nullptr;
  }
  if (!is_plain_tensor(gradient)) return nullptr;
  const at::Tensor& given = unpack(gradient);
  bool fits = is_simple(given) && given.sizes() == tensor.sizes() &&
              given.is_complex() == tensor.is_complex();
  return fits ? Py_NewRef(gradient) : nullptr;
}

// None, or NULL with the program's own error set.
PyObject* run_engine(PyObject* self, PyObject* gradient, PyObject* retain) {
  PyObject* tensors = PyTuple_Pack(1, self);
  PyObject* gradients = PyTuple_Pack(1, gradient);
  PyObject* outer = Py_NewRef(chain.outer);  // the program's code runs: the chain may change
  PyObject* inner = Py_NewRef(chain.inner);
  PyObject* result = nullptr;
  if (tensors && gradients) {
    PyObject* passed[] = {nullptr, inner, tensors, gradients, retain == Py_True ? Py_True : Py_False,
                          Py_False, no_inputs};
    result = PyObject_Vectorcall(outer, passed + 1, 6 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  }
  for (PyObject* part : {tensors, gradients, outer, inner}) Py_XDECREF(part);
  return result;
}

// backward_prologue(self, gradient, retain_graph, create_graph, inputs)
PyObject* py_backward_prologue(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "backward_prologue() takes five arguments");
  PyObject *self = args[0], *gradient = args[1], *retain = args[2];
  bool common = args[3] == Py_False && args[4] == Py_None &&
                (retain == Py_None || retain == Py_False || retain == Py_True);
  if (!common || !dispatch_enabled || live() || !is_plain_tensor(self)) return answer_run_body();
  const at::Tensor& tensor = unpack(self);
  if (!is_simple(tensor) || is_overridden() || !is_intact()) {
    PyErr_Clear();
    return answer_run_body();
  }
  PyObject* given;
  try {
    given = gradient_of(tensor, gradient);
  } catch (const std::exception&) {
    given = nullptr;  // the body meets it too
  }
  if (!given) {
    PyErr_Clear();
    return answer_run_body();
  }
  PyObject* result = run_engine(self, given, retain);
  Py_DECREF(given);
  return result;
}

PyObject* py_set_chain(PyObject*, PyObject* args) {
  Chain next;
  if (!PyArg_ParseTuple(args, "O!OO!O!O!O!:set_backward_chain", &PyDict_Type, &next.torch,
                        &next.autograd, &PyDict_Type, &next.globals, &PyTuple_Type, &next.expected,
                        &PyFunction_Type, &next.outer, &PyFunction_Type, &next.inner)) {
    return nullptr;
  }
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(next.expected); k++) {
    PyObject *row = PyTuple_GET_ITEM(next.expected, k), *name, *function, *code;
    if (!PyArg_ParseTuple(row, "O!O!O!", &PyUnicode_Type, &name, &PyFunction_Type, &function,
                          &PyCode_Type, &code)) {
      return nullptr;
    }
  }
  next.ones_like = PyDict_GetItemWithError(next.torch, ones_like_name);
  if (!next.ones_like) return PyErr_Format(PyExc_ValueError, "torch has no ones_like");
  Chain old = chain;
  for (PyObject* part :
       {next.torch, next.autograd, next.globals, next.expected, next.outer, next.ones_like, next.inner}) {
    Py_INCREF(part);
  }
  chain = next;
  for (PyObject* part : {old.torch, old.autograd, old.globals, old.expected, old.outer, old.ones_like, old.inner}) {
    Py_XDECREF(part);
  }
  Py_RETURN_NONE;
}

PyMethodDef FUNCTIONS[] = {
    {"backward_prologue",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_backward_prologue)), METH_FASTCALL,
     "backward_prologue(self, gradient, retain_graph, create_graph, inputs): None, or RUN_BODY."},
    {"set_backward_chain", py_set_chain, METH_VARARGS,
     "set_backward_chain(torch's dict, torch.autograd, its dict, expected, outer, inner): what "
     "Tensor.backward calls on its way to the engine, see accel.backward_calls."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int init_backward_calls(PyObject* module) {
  autograd_name = PyUnicode_InternFromString("autograd");
  ones_like_name = PyUnicode_InternFromString("ones_like");
  no_inputs = PyTuple_New(0);
  if (!ones_like_name || !autograd_name || !no_inputs) return -1;
  return PyModule_AddFunctions(module, FUNCTIONS);
}

}  // namespace accel
