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

namespace accel {
namespace {

bool broken_landing() {
  PyErr_SetString(PyExc_SystemError, "a node's variant has a landing that does not fit");
  return false;
}

// The index at `k` in a tuple of ints, which lie below `limit`; -1 with an error set.
Py_ssize_t local_at(PyObject* tuple, Py_ssize_t k, size_t limit) {
  Py_ssize_t index = PyLong_AsSsize_t(PyTuple_GET_ITEM(tuple, k));
  if (index == -1 && PyErr_Occurred()) return -1;
  if (index >= 0 && static_cast<size_t>(index) < limit) return index;
  broken_landing();
  return -1;
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
  PyObject *written = PyTuple_GET_ITEM(landing, 1), *unset = PyTuple_GET_ITEM(landing, 2);
  if (!PyTuple_Check(written) || !PyTuple_Check(unset) ||
      PyTuple_GET_SIZE(values) < PyTuple_GET_SIZE(written)) {
    broken_landing();
    return nullptr;
  }
  const Py_ssize_t assigned = PyTuple_GET_SIZE(written), total = assigned + PyTuple_GET_SIZE(unset);
  Pointers<PyObject**> places(static_cast<size_t>(total));
  PyObject** locals = frame_locals(frame);
  PyCodeObject* code = frame_code(frame);
  for (Py_ssize_t k = 0; k < total; k++) {
    PyObject* indices = k < assigned ? written : unset;
    Py_ssize_t index = local_at(indices, k < assigned ? k : k - assigned, frame_local_count(frame));
    if (index < 0) return nullptr;
    PyObject** place = &locals[index];
    if (is_own_cell(code, static_cast<size_t>(index))) {
      place = &reinterpret_cast<PyCellObject*>(*place)->ob_ref;
    }
    places[static_cast<size_t>(k)] = place;
  }
  PyObject* chain = chained(values, assigned);
  PyObject* answer = chain ? PyTuple_Pack(2, PyTuple_GET_ITEM(landing, 0), chain) : nullptr;
  Py_XDECREF(chain);
  if (!answer) return nullptr;
  Pointers<PyObject*> replaced(static_cast<size_t>(total));
  for (Py_ssize_t k = 0; k < total; k++) {
    PyObject** place = places[static_cast<size_t>(k)];
    replaced[static_cast<size_t>(k)] = *place;
    *place = k < assigned ? Py_NewRef(PyTuple_GET_ITEM(values, k)) : nullptr;
  }
  for (Py_ssize_t k = 0; k < total; k++) Py_XDECREF(replaced[static_cast<size_t>(k)]);
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
