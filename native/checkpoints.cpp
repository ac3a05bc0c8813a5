// See checkpoints.h.
//
// Ownership: the code objects and the callables that `set_checkpoints` was given are owned.
#include "checkpoints.h"

#include <ATen/SavedTensorHooks.h>

namespace accel {
namespace {

// The code of the functions that unpack, in the first run's hooks and in the second's.
PyObject *first_code = nullptr, *again_code = nullptr;
// Of accel/checkpoints.py: place(pack), log(pack, place, callee, variant), served(pack, callee),
// refuse(name, why).
PyObject *place_of = nullptr, *log_call = nullptr, *served_call = nullptr, *refusal = nullptr;
bool is_logged = false;  // since the process began

struct Hooks {
  PyObject *pack = nullptr, *unpack = nullptr;  // borrowed from torch's stack
};

// The uppermost hooks, if they apply.
Hooks uppermost() {
  const auto& state = at::SavedTensorDefaultHooks::get_tls_state();
  if (state.stack.empty() || state.disabled_error_message.has_value() || state.is_tracing) return {};
  const auto& top = state.stack.top();
  return {top.first.ptr(&top.first.pyinterpreter()), top.second.ptr(&top.second.pyinterpreter())};
}

PyObject* code_of(PyObject* function) {
  return function && PyFunction_Check(function) ? PyFunction_GET_CODE(function) : nullptr;
}

PyObject* py_set(PyObject*, PyObject* args) {
  PyObject *first, *again, *place, *log, *served, *refuse;
  if (!PyArg_ParseTuple(args, "OOOOOO:set_checkpoints", &first, &again, &place, &log, &served,
                        &refuse)) {
    return nullptr;
  }
  if (first == Py_None) {
    Py_CLEAR(first_code);
    Py_RETURN_NONE;
  }
  if (!PyCode_Check(first) || !PyCode_Check(again)) {
    return PyErr_Format(PyExc_TypeError, "set_checkpoints() takes two code objects first");
  }
  Py_XSETREF(first_code, Py_NewRef(first));
  Py_XSETREF(again_code, Py_NewRef(again));
  Py_XSETREF(place_of, Py_NewRef(place));
  Py_XSETREF(log_call, Py_NewRef(log));
  Py_XSETREF(served_call, Py_NewRef(served));
  Py_XSETREF(refusal, Py_NewRef(refuse));
  Py_RETURN_NONE;
}

PyMethodDef FUNCTIONS[] = {
    {"set_checkpoints", py_set, METH_VARARGS,
     "set_checkpoints(first, again, place, log, served, refuse): see accel/checkpoints.py; six times "
     "None: nothing is served."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

CheckpointRun checkpoint_run() {
  if (!first_code) return CheckpointRun::none;
  PyObject* code = code_of(uppermost().unpack);
  if (!code) return CheckpointRun::none;
  if (code == first_code) return CheckpointRun::first;
  return code == again_code ? CheckpointRun::again : CheckpointRun::none;
}

uint64_t hooks_of_others() {
  size_t count = at::SavedTensorDefaultHooks::get_tls_state().stack.size();
  if (__builtin_expect(count == 0, 1)) return 0;
  return checkpoint_run() == CheckpointRun::none ? count : 0;
}

bool checkpoints_are_logged() { return is_logged; }

PyObject* checkpoint_place(bool* draws_again) {
  PyObject* answer = PyObject_CallOneArg(place_of, uppermost().pack);
  if (!answer) return nullptr;
  if (!PyTuple_Check(answer) || PyTuple_GET_SIZE(answer) != 2) {
    Py_DECREF(answer);
    return PyErr_Format(PyExc_SystemError, "place() answers a pair");
  }
  PyObject* place = Py_NewRef(PyTuple_GET_ITEM(answer, 0));
  *draws_again = PyTuple_GET_ITEM(answer, 1) == Py_True;
  Py_DECREF(answer);
  return place;
}

bool log_served(PyObject* place, PyObject* callee, PyObject* variant) {
  is_logged = is_logged || variant != Py_None;
  PyObject* arguments[4] = {uppermost().pack, place, callee, variant};
  PyObject* done = PyObject_Vectorcall(log_call, arguments, 4, nullptr);
  Py_XDECREF(done);
  return done != nullptr;
}

void close_log() {
  if (checkpoint_run() != CheckpointRun::first) return;
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  if (!log_served(Py_None, Py_None, Py_None)) PyErr_Clear();
  PyErr_Restore(type, value, trace);
}

bool is_within_other_hooks() { return at::SavedTensorDefaultHooks::get_tls_state().stack.size() > 1; }

PyObject* served_before(PyObject* callee) {
  PyObject* arguments[2] = {uppermost().pack, callee};
  return PyObject_Vectorcall(served_call, arguments, 2, nullptr);
}

void cannot_serve_again(PyObject* name, const char* why) {
  PyObject* done = PyObject_CallFunction(refusal, "Os", name, why);
  if (done) PyErr_SetString(PyExc_SystemError, "refuse() has to raise");
  Py_XDECREF(done);
}

int init_checkpoints(PyObject* module) { return PyModule_AddFunctions(module, FUNCTIONS); }

}  // namespace accel
