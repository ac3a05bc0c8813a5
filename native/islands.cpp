// Nodes: what resumable code (accel.rewriter.islands) asks in the middle of a function.
//
// The roots of a node's variants are the frame's locals and the slots of its operand stack,
// read in place. A variant that serves has committed its effects when its locals are written
// into the frame; then the code jumps to the pad of its landing, which pushes the stack.
//
// Ownership: a frame owns what its locals refer to. What is replaced is let go last, when the
// frame is whole again: that may run any code. Everything here needs the GIL.
#include "islands.h"

#include "cpython_compat.h"
#include "dispatch.h"
#include "entry.h"
#include "guards.h"
#include "pointers.h"

#include <vector>

namespace accel {
namespace {

bool broken_landing() {
  PyErr_SetString(PyExc_SystemError, "a node's variant has a landing that does not fit");
  return false;
}

// The indices in a tuple of ints, each below `limit`.
bool take_locals(PyObject* tuple, size_t limit, std::vector<size_t>& into) {
  if (!PyTuple_Check(tuple)) return broken_landing();
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(tuple); k++) {
    size_t index = PyLong_AsSize_t(PyTuple_GET_ITEM(tuple, k));
    if (index == static_cast<size_t>(-1) && PyErr_Occurred()) return false;
    if (index >= limit) return broken_landing();
    into.push_back(index);
  }
  return true;
}

// values[first:] as nested pairs (rest, value), the last one bare; None when there are none.
PyObject* chained(PyObject* values, Py_ssize_t first) {
  Py_ssize_t last = PyTuple_GET_SIZE(values) - 1;
  if (last < first) return Py_NewRef(Py_None);
  PyObject* chain = Py_NewRef(PyTuple_GET_ITEM(values, last));
  for (Py_ssize_t k = last - 1; chain && k >= first; k--) {
    Py_SETREF(chain, PyTuple_Pack(2, chain, PyTuple_GET_ITEM(values, k)));
  }
  return chain;
}

// Lets Python go on where `served` says: a pair (landing, values) with the values of the
// locals that are written and then those of the stack. The answer to the code is a pair
// (pad, stack values as nested pairs).
PyObject* land(_PyInterpreterFrame* frame, PyObject* served) {
  PyObject* landing = PyTuple_CheckExact(served) && PyTuple_GET_SIZE(served) == 2
                          ? PyTuple_GET_ITEM(served, 0)
                          : nullptr;
  PyObject* values = landing ? PyTuple_GET_ITEM(served, 1) : nullptr;
  if (!landing || !PyTuple_Check(landing) || PyTuple_GET_SIZE(landing) != 3 ||
      !PyTuple_Check(values)) {
    broken_landing();
    return nullptr;
  }
  size_t count = frame_local_count(frame);
  std::vector<size_t> written, unset;
  if (!take_locals(PyTuple_GET_ITEM(landing, 1), count, written) ||
      !take_locals(PyTuple_GET_ITEM(landing, 2), count, unset)) {
    return nullptr;
  }
  if (static_cast<size_t>(PyTuple_GET_SIZE(values)) < written.size()) {
    broken_landing();
    return nullptr;
  }
  PyObject* chain = chained(values, static_cast<Py_ssize_t>(written.size()));
  PyObject* answer = chain ? PyTuple_Pack(2, PyTuple_GET_ITEM(landing, 0), chain) : nullptr;
  Py_XDECREF(chain);
  if (!answer) return nullptr;
  PyObject** locals = frame_locals(frame);
  std::vector<PyObject*> replaced;
  replaced.reserve(written.size() + unset.size());
  PyCodeObject* code = frame_code(frame);
  auto assign = [&](size_t index, PyObject* value) {  // steals value, which may be NULL
    PyObject** place = &locals[index];
    if (is_own_cell(code, index)) {
      place = &reinterpret_cast<PyCellObject*>(locals[index])->ob_ref;
    }
    replaced.push_back(*place);
    *place = value;
  };
  for (size_t k = 0; k < written.size(); k++) {
    assign(written[k], Py_NewRef(PyTuple_GET_ITEM(values, static_cast<Py_ssize_t>(k))));
  }
  for (size_t index : unset) assign(index, nullptr);
  for (PyObject* old : replaced) Py_XDECREF(old);
  return answer;
}

// node(index): what resumable code asks at a node. "Run the body", or (pad, values).
PyObject* py_node(PyObject*, PyObject* number) {
  Py_ssize_t index = PyLong_AsSsize_t(number);
  if (index == -1 && PyErr_Occurred()) return nullptr;
  Entry* entry = entry_at(index);
  if (!entry || !dispatch_enabled || entry->state == EntryState::off || dispatch_paused()) {
    return answer_run_body();
  }
  _PyInterpreterFrame* frame = calling_frame(PyThreadState_Get());
  if (!frame) return PyErr_Format(PyExc_TypeError, "node() is called by functions only");
  size_t count = frame_local_count(frame) + static_cast<size_t>(entry->stack_depth);
  Pointers<PyObject*> roots(count);
  PyObject** locals = frame_locals(frame);
  for (size_t k = 0; k < count; k++) roots[k] = locals[k];
  PyObject* served = dispatch_call(entry, roots.data(), count, frame_function(frame));
  if (!served || served == run_body) return served;
  PyObject* answer = land(frame, served);
  Py_DECREF(served);
  return answer;
}

PyMethodDef FUNCTIONS[] = {
    {"node", py_node, METH_O, "node(index): RUN_BODY, or (pad, values) for the code that asks."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyObject* calling_frame_values(Py_ssize_t depth) {
  _PyInterpreterFrame* frame = calling_frame(PyThreadState_Get());
  if (!frame) return PyErr_Format(PyExc_SystemError, "no Python frame calls");
  auto locals = static_cast<Py_ssize_t>(frame_local_count(frame));
  PyObject* values = PyTuple_New(locals + depth);
  for (Py_ssize_t k = 0; values && k < locals + depth; k++) {
    PyObject* value = frame_locals(frame)[k];
    PyTuple_SET_ITEM(values, k, Py_NewRef(value ? value : unbound));
  }
  return values;
}

bool set_calling_frame_values(PyObject* pairs) {
  _PyInterpreterFrame* frame = calling_frame(PyThreadState_Get());
  if (!frame || !PyTuple_Check(pairs)) {
    PyErr_SetString(PyExc_SystemError, "values for a frame are a tuple of pairs");
    return false;
  }
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(pairs); k++) {
    PyObject* value;
    Py_ssize_t index;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(pairs, k), "nO", &index, &value)) return false;
    PyObject** place = &frame_locals(frame)[index];
    PyObject* old = *place;
    *place = Py_NewRef(value);
    Py_XDECREF(old);
  }
  return true;
}

int init_islands(PyObject* module) { return PyModule_AddFunctions(module, FUNCTIONS); }

}  // namespace accel
