// Exceptions of the program's signal handlers that arise while accel's own code runs.
//
// CPython runs a handler wherever the main thread is, so also in the driver and in the
// recorder. What it raises belongs to the program: it is handed over at the program's next
// instruction, with the traceback that begins in the handler.
#include "native.h"

#include <cstring>

namespace accel {
namespace {

// Whether `frame` (borrowed) is of a module of ours.
bool is_ours(PyFrameObject* frame) {
  PyObject* globals = PyFrame_GetGlobals(frame);
  PyObject* name = PyDict_GetItemString(globals, "__name__");  // borrowed
  const char* text = name && PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : nullptr;
  bool found = text && std::strncmp(text, "accel.", 6) == 0;
  Py_DECREF(globals);
  return found;
}

// True when `frame` (borrowed) runs a signal handler: CPython calls it with the frame that
// was interrupted, which is also the caller's.
bool runs_handler(PyFrameObject* frame) {
  PyFrameObject* caller = is_ours(frame) ? nullptr : PyFrame_GetBack(frame);
  if (!caller) return false;
  PyObject* locals = PyFrame_GetLocals(frame);
  PyObject* values = locals ? PyMapping_Values(locals) : nullptr;
  bool found = false;
  for (Py_ssize_t k = 0; values && k < PyList_GET_SIZE(values) && !found; k++) {
    PyObject* value = PyList_GET_ITEM(values, k);
    found = value == reinterpret_cast<PyObject*>(caller);
    if (!PyTuple_CheckExact(value)) continue;  // def handler(*args)
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value) && !found; i++) {
      found = PyTuple_GET_ITEM(value, i) == reinterpret_cast<PyObject*>(caller);
    }
  }
  PyErr_Clear();
  Py_XDECREF(values);
  Py_XDECREF(locals);
  Py_DECREF(caller);
  return found;
}

// The part of a traceback (borrowed) that begins in a signal handler; NULL: none.
PyTracebackObject* handler_part(PyObject* traceback) {
  if (!traceback || !PyTraceBack_Check(traceback)) return nullptr;
  auto* part = reinterpret_cast<PyTracebackObject*>(traceback);
  while (part && !runs_handler(part->tb_frame)) part = part->tb_next;
  return part;
}

bool in_main_thread() {
  PyObject* threading = PyImport_ImportModule("threading");
  PyObject* main = threading ? PyObject_CallMethod(threading, "main_thread", nullptr) : nullptr;
  PyObject* ident = main ? PyObject_GetAttrString(main, "ident") : nullptr;
  bool is_main = ident && PyLong_AsUnsignedLong(ident) == PyThread_get_thread_ident();
  PyErr_Clear();
  Py_XDECREF(ident);
  Py_XDECREF(main);
  Py_XDECREF(threading);
  return is_main;
}

int raise_pending(void* exception) {
  PyObject* value = static_cast<PyObject*>(exception);  // stolen
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value)), value);
  Py_DECREF(value);
  return -1;
}

PyObject* py_deliver_interrupt(PyObject*, PyObject* exception) {
  if (!PyExceptionInstance_Check(exception)) {
    return PyErr_Format(PyExc_TypeError, "deliver_interrupt() takes an exception");
  }
  return PyBool_FromLong(deliver_interrupt(exception));
}

PyMethodDef METHODS[] = {
    {"deliver_interrupt", py_deliver_interrupt, METH_O,
     "deliver_interrupt(exception): true when a signal handler raised it; then it is raised at\n"
     "the main thread's next instruction, without the frames between that and the handler."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool deliver_interrupt(PyObject* exception) {
  PyObject* traceback = PyException_GetTraceback(exception);
  PyTracebackObject* part = handler_part(traceback);
  bool is_interrupt = part || Py_IS_TYPE(exception, (PyTypeObject*)PyExc_KeyboardInterrupt);
  if (is_interrupt) is_interrupt = in_main_thread();  // where handlers and pending calls run
  if (is_interrupt) {
    PyException_SetTraceback(exception, part ? reinterpret_cast<PyObject*>(part) : Py_None);
    Py_INCREF(exception);
    if (Py_AddPendingCall(raise_pending, exception) < 0) {
      Py_DECREF(exception);
      is_interrupt = false;
    }
  }
  Py_XDECREF(traceback);
  return is_interrupt;
}

bool take_interrupt() {
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  if (value && trace) PyException_SetTraceback(value, trace);
  if (!value || !deliver_interrupt(value)) {
    PyErr_Restore(type, value, trace);
    return false;
  }
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(trace);
  return true;
}

int init_interrupts(PyObject* module) { return PyModule_AddFunctions(module, METHODS); }

}  // namespace accel
