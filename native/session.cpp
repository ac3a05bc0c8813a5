// See session.h. Steps are carried out *from C*, so that no frame of the recorder's stands between
// two of the user's: super(), globals(), sys._getframe and tracebacks stay what they are in eager.
#include "session.h"

#include "cpython_compat.h"
#include "dispatch.h"
#include "frame_shim.h"

namespace accel {

__thread Session* session = nullptr;

const char* const HANDLER_NAMES[] = {
#define X(name) #name,
    ACCEL_HANDLERS(X)
#undef X
};

namespace {

// How a step is carried out. The numbers are known to accel.capture.steps.
enum Mode : long {
  INLINE = 0,     // f is a twin function: call it
  OPERATION = 1,  // f is a torch operation: call it with the watch informed
  FOLD = 2,       // f may run Python frames without a twin: they are part of the fold
  NATIVE = 3,     // f is C code: frames it starts are redirected to twins
  CONSTRUCT = 4,  // f is a class: type.__call__'s steps, the object reported as fresh
};

constexpr long EVENTS_PER_CHECKPOINT = 4096;

}  // namespace

void void_recording(const char* kind, PyObject* detail) {
  Session* s = session;
  if (!s || s->dead) return;
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  {
    RecorderScope scope(s);
    PyObject* name = PyUnicode_FromString(kind);
    PyObject* args[2] = {name, detail ? detail : Py_None};
    PyObject* done =
        name ? PyObject_Vectorcall(PyTuple_GET_ITEM(s->handlers, H_void), args, 2, nullptr)
             : nullptr;
    if (!done) PyErr_Clear();
    Py_XDECREF(done);
    Py_XDECREF(name);
  }
  s->end();
  PyErr_Restore(type, value, trace);
}

void handler_failed() {
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  if (value && trace) PyException_SetTraceback(value, trace);
  void_recording("recorder_error", value);
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(trace);
}

PyObject* ask(Handler which, PyObject* const* args, Py_ssize_t count) {
  Session* s = session;
  PyObject* answer;
  {
    RecorderScope scope(s);
    answer = ++s->events % EVENTS_PER_CHECKPOINT == 0
                 ? PyObject_CallNoArgs(PyTuple_GET_ITEM(s->handlers, H_checkpoint))
                 : Py_NewRef(Py_None);
    if (answer) {
      Py_SETREF(answer, PyObject_Vectorcall(PyTuple_GET_ITEM(s->handlers, which), args, count,
                                            nullptr));
    }
  }
  if (signal_waits()) void_recording("interrupted", nullptr);  // its handler runs next
  if (!answer) {
    if (PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
      // A signal handler ran inside our code; hand the interrupt to the program.
      void_recording("interrupted", nullptr);
      return nullptr;
    }
    handler_failed();
  }
  return answer;
}

namespace {

PyObject* construct(PyObject* cls, PyObject* args, PyObject* kwargs) {
  PyTypeObject* type = (PyTypeObject*)cls;
  if (!PyType_Check(cls) || !type->tp_new) return PyObject_Call(cls, args, kwargs);
  PyObject* object = type->tp_new(type, args, kwargs);
  if (!object || !PyObject_TypeCheck(object, type)) return object;
  if (live()) {
    PyObject* reported[1] = {object};
    PyObject* answer = ask(H_fresh, reported, 1);
    if (!answer && PyErr_Occurred()) {
      Py_DECREF(object);
      return nullptr;
    }
    Py_XDECREF(answer);
  }
  initproc init = Py_TYPE(object)->tp_init;
  if (init && init(object, args, kwargs) < 0) {
    Py_DECREF(object);
    return nullptr;
  }
  return object;
}

// Carries out a step (borrowed 6-tuple).
PyObject* perform(PyObject* step) {
  long mode = PyLong_AsLong(PyTuple_GET_ITEM(step, 0));
  PyObject* f = PyTuple_GET_ITEM(step, 1);
  PyObject* args = PyTuple_GET_ITEM(step, 2);
  PyObject* kwargs = PyTuple_GET_ITEM(step, 3);
  PyObject* post = PyTuple_GET_ITEM(step, 4);
  if (kwargs == Py_None) kwargs = nullptr;
  Session* s = session;
  PyObject* result = nullptr;
  switch (mode) {
    case OPERATION:
      announce_begin();
      s->in_fold++;
      result = PyObject_Call(f, args, kwargs);
      s->in_fold--;
      announce_end();
      break;
    case FOLD:
      s->in_fold++;
      result = PyObject_Call(f, args, kwargs);
      s->in_fold--;
      break;
    case CONSTRUCT:
      result = construct(f, args, kwargs);
      break;
    default:
      result = PyObject_Call(f, args, kwargs);
  }
  // Whether it raises may hang on values and on sizes left open: no later call is known to.
  if (!result && mode == OPERATION) void_recording("operation_raised", f);
  if (!result || post == Py_None || !live()) return result;
  PyObject* told[2] = {result, PyTuple_GET_ITEM(step, 5)};
  PyObject* answer;
  {
    RecorderScope scope(s);
    answer = PyObject_Vectorcall(post, told, 2, nullptr);
  }
  if (!answer) {
    if (PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
      void_recording("interrupted", nullptr);
      Py_DECREF(result);
      return nullptr;
    }
    handler_failed();
    return result;
  }
  if (PyTuple_CheckExact(answer) && PyTuple_GET_SIZE(answer) == 1) {
    Py_SETREF(result, Py_NewRef(PyTuple_GET_ITEM(answer, 0)));
  }
  Py_DECREF(answer);
  return result;
}

}  // namespace

Verdict act(Handler which, PyObject* const* args, Py_ssize_t count, PyObject** result) {
  PyObject* answer = ask(which, args, count);
  if (!answer) {
    *result = nullptr;
    return PyErr_Occurred() ? Verdict::done : Verdict::plain;
  }
  if (answer == Py_None || !PyTuple_CheckExact(answer)) {
    Py_DECREF(answer);
    return Verdict::plain;
  }
  if (PyTuple_GET_SIZE(answer) == 1) {
    *result = Py_NewRef(PyTuple_GET_ITEM(answer, 0));
  } else {
    *result = perform(answer);
  }
  Py_DECREF(answer);
  return Verdict::done;
}

PyObject* run_recorded(PyObject* recorder, PyObject* callable, PyObject* args, PyObject* kwargs) {
  if (session) return PyObject_Call(callable, args, kwargs);
  Session own;
  own.handlers = PyObject_GetAttrString(recorder, "handlers");
  if (!own.handlers) return nullptr;
  if (!PyTuple_CheckExact(own.handlers) || PyTuple_GET_SIZE(own.handlers) != HANDLER_COUNT) {
    Py_DECREF(own.handlers);
    PyErr_SetString(PyExc_SystemError, "recorder.handlers does not match HANDLER_NAMES");
    return nullptr;
  }
  if (PyObject_HasAttrString(recorder, "at_node")) {
    own.islands = Py_NewRef(recorder);
    own.dead = true;  // until its first node
  } else {
    own.hold.emplace();
  }
  DispatchPause pause;  // prologues answer "run the body" while we record
  session = &own;
  op_watch_start();
  if (!install_shim()) void_recording("interrupted", nullptr);
  PyObject* result = PyObject_Call(callable, args, kwargs);
  remove_shim();
  std::pair<long, std::string> watched = op_watch_stop();
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  if (watched.first && !own.dead && !own.suspended) {
    PyObject* name = PyUnicode_FromString(watched.second.c_str());
    void_recording("escaped_operation", name);
    Py_XDECREF(name);
    PyErr_Clear();
  }
  {
    RecorderScope scope(&own);
    PyObject* unseen = PyLong_FromLong(watched.first);
    PyObject* told[3] = {result ? result : Py_None, result ? Py_False : Py_True, unseen};
    PyObject* done =
        PyObject_Vectorcall(PyTuple_GET_ITEM(own.handlers, H_finish), told, 3, nullptr);
    Py_XDECREF(unseen);
    if (!done) PyErr_WriteUnraisable(recorder);
    // What `finish` returns is nothing, or the exception that the user asked for.
    if (done && result && PyExceptionInstance_Check(done)) {
      Py_CLEAR(result);
      type = Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(done)));
      value = Py_NewRef(done);
    }
    Py_XDECREF(done);
  }
  own.suspend(false);
  own.hold.reset();
  session = nullptr;
  Py_DECREF(own.handlers);
  Py_XDECREF(own.islands);
  PyErr_Restore(type, value, trace);
  return result;
}

namespace {

// run_recorded(recorder, callable, args, kwargs or None)
PyObject* py_run_recorded(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "run_recorded(recorder, callable, args, kwargs)");
    return nullptr;
  }
  return run_recorded(args[0], args[1], args[2], args[3] == Py_None ? nullptr : args[3]);
}

PyObject* py_is_recording(PyObject*, PyObject*) { return PyBool_FromLong(is_recording()); }

// Called by a handler that voids: the rest of the run is plain.
PyObject* py_stop_recording(PyObject*, PyObject*) {
  if (session) session->end();
  Py_RETURN_NONE;
}

// A number that can be told from every other by its identity.
PyObject* py_own_number(PyObject*, PyObject* number) {
  if (PyLong_CheckExact(number)) return uncached_int(number);
  if (PyFloat_CheckExact(number)) return PyFloat_FromDouble(PyFloat_AS_DOUBLE(number));
  return PyErr_Format(PyExc_TypeError, "own_number() takes an int or a float, not a %s",
                      Py_TYPE(number)->tp_name);
}

PyMethodDef FUNCTIONS[] = {
    {"own_number", py_own_number, METH_O,
     "own_number(n): an equal int or float that is no other object."},
    {"run_recorded", (PyCFunction)(void*)py_run_recorded, METH_FASTCALL,
     "run_recorded(recorder, callable, args, kwargs): the result of the recorded run."},
    {"is_recording", py_is_recording, METH_NOARGS, "True while this thread records."},
    {"stop_recording", py_stop_recording, METH_NOARGS, "The rest of this recorded run is plain."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int init_session(PyObject* module) {
  PyObject* names = PyTuple_New(HANDLER_COUNT);
  if (!names) return -1;
  for (int i = 0; i < HANDLER_COUNT; i++)
    PyTuple_SET_ITEM(names, i, PyUnicode_FromString(HANDLER_NAMES[i]));
  if (PyModule_AddObject(module, "HANDLER_NAMES", names) < 0) return -1;
  return PyModule_AddFunctions(module, FUNCTIONS);
}

}  // namespace accel
