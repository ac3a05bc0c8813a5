// See frame_shim.h.
//
// Ownership: unless a comment says otherwise, parameters are borrowed and results
// are new references. Everything needs the GIL.
#include "frame_shim.h"

#include <unordered_set>

#include "cpython_compat.h"
#include "islands.h"
#include "session.h"

namespace accel {
namespace {

int session_count = 0;  // of all threads; guarded by the GIL
_PyFrameEvalFunction previous_eval = nullptr;
std::unordered_set<PyCodeObject*>* twin_codes = nullptr;  // strong references, kept for good

// The arguments a fresh frame was called with, as (args, kwargs); false: error set.
bool frame_arguments(_PyInterpreterFrame* frame, PyObject** args, PyObject** kwargs) {
  PyCodeObject* code = frame_code(frame);
  PyObject** locals = frame->localsplus;
  int positional = code->co_argcount, kwonly = code->co_kwonlyargcount;
  bool has_star = code->co_flags & CO_VARARGS, has_kw = code->co_flags & CO_VARKEYWORDS;
  PyObject* star = has_star ? locals[positional + kwonly] : nullptr;
  PyObject* extra = has_kw ? locals[positional + kwonly + has_star] : nullptr;
  Py_ssize_t tail = star ? PyTuple_GET_SIZE(star) : 0;
  *kwargs = nullptr;
  *args = PyTuple_New(positional + tail);
  if (!*args) return false;
  for (int i = 0; i < positional; i++) PyTuple_SET_ITEM(*args, i, Py_NewRef(locals[i]));
  for (Py_ssize_t i = 0; i < tail; i++)
    PyTuple_SET_ITEM(*args, positional + i, Py_NewRef(PyTuple_GET_ITEM(star, i)));
  if (!kwonly && !(extra && PyDict_GET_SIZE(extra))) return true;
  *kwargs = extra ? PyDict_Copy(extra) : PyDict_New();
  PyObject* names = *kwargs ? PyCode_GetVarnames(code) : nullptr;
  bool ok = names != nullptr;
  for (int i = 0; ok && i < kwonly; i++) {
    ok = PyDict_SetItem(*kwargs, PyTuple_GET_ITEM(names, positional + i),
                        locals[positional + i]) == 0;
  }
  Py_XDECREF(names);
  if (!ok) {
    Py_CLEAR(*args);
    Py_CLEAR(*kwargs);
  }
  return ok;
}

PyObject* evaluate(PyThreadState* ts, _PyInterpreterFrame* frame, int throwing) {
  return previous_eval ? previous_eval(ts, frame, throwing)
                       : _PyEval_EvalFrameDefault(ts, frame, throwing);
}

PyObject* shim(PyThreadState* ts, _PyInterpreterFrame* frame, int throwing) {
  if (!live()) return evaluate(ts, frame, throwing);
  PyCodeObject* code = frame_code(frame);
  if (is_collecting()) {  // a finaliser or callback: it would not run at the next call
    void_recording("interrupted", nullptr);
    return evaluate(ts, frame, throwing);
  }
  if (session->in_fold) return evaluate(ts, frame, throwing);
  if (twin_codes->count(code)) return evaluate(ts, frame, throwing);
  PyObject* function = frame_function(frame);
  if (throwing || !frame_owned_by_thread(frame) || !function || !PyFunction_Check(function)) {
    void_recording("foreign_frame", (PyObject*)code);
    return evaluate(ts, frame, throwing);
  }
  PyObject *args, *kwargs;
  if (!frame_arguments(frame, &args, &kwargs)) {
    handler_failed();
    return evaluate(ts, frame, throwing);
  }
  Py_INCREF(function);
  PyObject* asked[3] = {function, args, kwargs ? kwargs : Py_None};
  PyObject* result = nullptr;
  Verdict verdict = act(H_redirect, asked, 3, &result);
  Py_DECREF(args);
  Py_XDECREF(kwargs);
  Py_DECREF(function);
  if (verdict == Verdict::plain) return evaluate(ts, frame, throwing);
  frame_discard(ts, frame);  // 3.12+: the evaluator owns the frame; 3.11: the caller does
  return result;
}

// Whether somebody put an evaluator above the shim and took it for the one before: it cannot be
// taken out from below, and putting it in once more above would be a circle.
bool left_behind = false;

}  // namespace

bool frames_are_anothers() {
  _PyFrameEvalFunction current = _PyInterpreterState_GetEvalFrameFunc(PyInterpreterState_Get());
  return current != _PyEval_EvalFrameDefault && current != shim;
}

bool install_shim() {
  if (session_count++ > 0) return true;
  PyInterpreterState* interpreter = PyInterpreterState_Get();
  _PyFrameEvalFunction current = _PyInterpreterState_GetEvalFrameFunc(interpreter);
  if (current == shim) return true;
  if (current == _PyEval_EvalFrameDefault) left_behind = false;
  if (left_behind) return false;
  previous_eval = current == _PyEval_EvalFrameDefault ? nullptr : current;
  _PyInterpreterState_SetEvalFrameFunc(interpreter, shim);
  return true;
}

void remove_shim() {
  if (--session_count > 0) return;
  PyInterpreterState* interpreter = PyInterpreterState_Get();
  _PyFrameEvalFunction current = _PyInterpreterState_GetEvalFrameFunc(interpreter);
  left_behind = current != shim && current != _PyEval_EvalFrameDefault && current != previous_eval;
  if (current == shim) {
    _PyInterpreterState_SetEvalFrameFunc(
        interpreter, previous_eval ? previous_eval : _PyEval_EvalFrameDefault);
  }
}

namespace {

PyObject* py_mark_twin(PyObject*, PyObject* code) {
  if (!PyCode_Check(code)) {
    PyErr_SetString(PyExc_TypeError, "mark_twin() takes a code object");
    return nullptr;
  }
  if (twin_codes->insert((PyCodeObject*)code).second) Py_INCREF(code);
  Py_RETURN_NONE;
}

PyObject* py_is_twin(PyObject*, PyObject* code) {
  return PyBool_FromLong(PyCode_Check(code) && twin_codes->count((PyCodeObject*)code));
}

PyMethodDef FUNCTIONS[] = {
    {"mark_twin", py_mark_twin, METH_O, "mark_twin(code): frames of this code are twins."},
    {"is_twin", py_is_twin, METH_O, "is_twin(code) -> bool."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int init_frame_shim(PyObject* module) {
  twin_codes = new std::unordered_set<PyCodeObject*>();
  return PyModule_AddFunctions(module, FUNCTIONS);
}

}  // namespace accel
