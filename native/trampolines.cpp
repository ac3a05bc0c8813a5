// Capture trampolines, recording sessions and the eval-frame shim.
//
// A twin (accel.rewriter.twin) calls the trampolines of this file in place of its
// interesting instructions. Each asks the recorder's Python handler what to do and
// then does it *from C*, so that no recorder frame stands between two user frames:
// super(), globals(), sys._getframe and tracebacks stay what they are in eager.
//
// A handler answers
//   None                                      do the instruction's own operation
//   (value,)                                  the instruction's result is value
//   (mode, f, args, kwargs, post, token)      a step, see Mode
// A handler never raises: an exception in it is our own error, it voids the
// recording, and the instruction's own operation is done.
//
// Ownership: unless a comment says otherwise, parameters are borrowed and results
// are new references. Everything needs the GIL. A session belongs to one thread.
#include "trampolines.h"

#include <new>
#include <optional>
#include <unordered_set>

#include "cpython_compat.h"
#include "dispatch.h"
#include "islands.h"
#include "signals.h"
#include "tensors.h"

namespace accel {
namespace {

// How a step is carried out. The numbers are known to accel.capture.steps.
enum Mode : long {
  INLINE = 0,     // f is a twin function: call it
  OPERATION = 1,  // f is a torch operation: call it with the watch informed
  FOLD = 2,       // f may run Python frames without a twin: they are part of the fold
  NATIVE = 3,     // f is C code: frames it starts are redirected to twins
  CONSTRUCT = 4,  // f is a class: type.__call__'s steps, the object reported as fresh
};

// One row per handler the recorder must offer, in the order of its `handlers` tuple.
#define ACCEL_HANDLERS(X)                                                              \
  X(call) X(attr) X(glob) X(deref) X(store_deref) X(store_global)                      \
  X(delete_global) X(delete_deref) X(binary) X(compare) X(contains) X(is_) X(subscr)   \
  X(setitem) X(delitem) X(setattr) X(delattr) X(unary) X(not_) X(test) X(get_iter)     \
  X(unpack) X(consume) X(hashed) X(grown) X(caught) X(with_) X(imported) X(format_)    \
  X(match) X(redirect) X(fresh)                                                        \
  X(finish) X(void) X(checkpoint)

enum Handler : int {
#define X(name) H_##name,
  ACCEL_HANDLERS(X)
#undef X
  HANDLER_COUNT
};

const char* const HANDLER_NAMES[] = {
#define X(name) #name,
    ACCEL_HANDLERS(X)
#undef X
};

struct Session {
  PyObject* handlers = nullptr;  // owned tuple of HANDLER_COUNT callables
  PyObject* islands = nullptr;   // owned: the recorder of a root with islands; else NULL
  bool suspended = false;        // between two stretches: what runs is the program's own
  bool displaced = false;        // the frame may hold what stands for its numbers
  bool dead = false;             // voided: every trampoline does the plain operation
  int in_recorder = 0;           // >0 while handler code runs
  int in_fold = 0;               // >0 while a fold's own Python frames run
  long events = 0;
  // While the run is recorded: what the handler of a signal does is no part of the call.
  std::optional<SignalHold> hold;

  void end() {
    dead = true;
    hold.reset();
  }
};

constexpr long EVENTS_PER_CHECKPOINT = 4096;

thread_local Session* session = nullptr;
int session_count = 0;  // of all threads; guarded by the GIL
_PyFrameEvalFunction previous_eval = nullptr;
std::unordered_set<PyCodeObject*>* twin_codes = nullptr;  // strong references, kept for good
PyObject* EX = nullptr;
PyObject* EXKW = nullptr;

inline bool live() {
  return session && !session->dead && !session->suspended && !session->in_recorder;
}

// Code of the recorder itself runs: its frames and torch calls are not the program's.
struct RecorderScope {
  Session* s;
  SignalHold hold;
  explicit RecorderScope(Session* s) : s(s) {
    s->in_recorder++;
    announce_begin();
  }
  ~RecorderScope() {
    announce_end();
    s->in_recorder--;
  }
};

// Tells the recorder that the recording is void. Keeps the current Python error.
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

// Our own error in a handler: take it away from the program, void the recording.
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

// Asks a handler. Returns its answer (new), or NULL when it failed (no error left set).
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

enum class Verdict { plain, done };

// Asks and acts. `done`: *result is the instruction's result (NULL: error set).
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

// ------------------------------------------------------------------ trampolines

bool expect(Py_ssize_t got, Py_ssize_t wanted, const char* name) {
  if (got == wanted) return true;
  PyErr_Format(PyExc_SystemError, "trampoline %s got %zd arguments", name, got);
  return false;
}

PyObject* t_call(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  if (count < 1) {
    PyErr_SetString(PyExc_SystemError, "trampoline call got nothing to call");
    return nullptr;
  }
  PyObject* f = args[0];
  PyObject* last = args[count - 1];
  bool ex = !names && count == 3 && last == EX;
  bool exkw = !names && count == 4 && last == EXKW;
  if (!live()) {
    if (ex || exkw) {
      PyObject* positional = PySequence_Tuple(args[1]);
      if (!positional) return nullptr;
      PyObject* result = PyObject_Call(f, positional, exkw ? args[2] : nullptr);
      Py_DECREF(positional);
      return result;
    }
    return PyObject_Vectorcall(f, args + 1, count - 1, names);
  }
  PyObject* positional;
  PyObject* keywords = nullptr;
  if (ex || exkw) {
    // The unpacked containers are read whole, by us.
    for (int i = 1; i <= (exkw ? 2 : 1); i++) {
      PyObject* told = ask(H_consume, &args[i], 1);
      if (!told && PyErr_Occurred()) return nullptr;
      Py_XDECREF(told);
    }
    positional = PySequence_Tuple(args[1]);
    if (exkw && positional) {
      keywords = PyDict_New();
      if (!keywords || PyDict_Update(keywords, args[2]) < 0) Py_CLEAR(positional);
    }
  } else {
    Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
    Py_ssize_t plain = count - 1;  // count never includes the keyword values
    positional = PyTuple_New(plain);
    if (positional) {
      for (Py_ssize_t i = 0; i < plain; i++)
        PyTuple_SET_ITEM(positional, i, Py_NewRef(args[1 + i]));
      if (named) {
        keywords = PyDict_New();
        for (Py_ssize_t i = 0; keywords && i < named; i++) {
          if (PyDict_SetItem(keywords, PyTuple_GET_ITEM(names, i), args[count + i]) < 0)
            Py_CLEAR(keywords);
        }
        if (!keywords) Py_CLEAR(positional);
      }
    }
  }
  if (!positional) {
    Py_XDECREF(keywords);
    return nullptr;
  }
  PyObject* asked[3] = {f, positional, keywords ? keywords : Py_None};
  PyObject* result = nullptr;
  if (act(H_call, asked, 3, &result) == Verdict::plain)
    result = PyObject_Call(f, positional, keywords);
  Py_DECREF(positional);
  Py_XDECREF(keywords);
  return result;
}

PyObject* t_attr(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "attr")) return nullptr;
  PyObject* result;
  if (live() && act(H_attr, args, 2, &result) == Verdict::done) return result;
  return PyObject_GetAttr(args[0], args[1]);
}

// Notes that need the running frame's globals as a third argument.
PyObject* t_glob(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "glob")) return nullptr;
  if (live()) {
    PyObject* asked[3] = {args[0], args[1], PyEval_GetGlobals()};
    PyObject* result;
    if (act(H_glob, asked, 3, &result) == Verdict::done) return result;
  }
  return Py_NewRef(args[0]);
}

// Trampolines whose plain result is their first argument.
template <Handler which, Py_ssize_t arity>
PyObject* t_pass(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, arity, HANDLER_NAMES[which])) return nullptr;
  PyObject* result;
  if (live() && act(which, args, arity, &result) == Verdict::done) return result;
  return Py_NewRef(args[0]);
}

// Trampolines whose plain result is None.
template <Handler which, Py_ssize_t arity>
PyObject* t_none(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, arity, HANDLER_NAMES[which])) return nullptr;
  PyObject* result;
  if (live() && act(which, args, arity, &result) == Verdict::done) return result;
  Py_RETURN_NONE;
}

using BinaryFunc = PyObject* (*)(PyObject*, PyObject*);

PyObject* power(PyObject* a, PyObject* b) { return PyNumber_Power(a, b, Py_None); }
PyObject* inplace_power(PyObject* a, PyObject* b) { return PyNumber_InPlacePower(a, b, Py_None); }

// Indexed by the NB_* numbers of CPython's opcode.h (3.11 to 3.13).
const BinaryFunc BINARY[26] = {
    PyNumber_Add,           PyNumber_And,
    PyNumber_FloorDivide,   PyNumber_Lshift,
    PyNumber_MatrixMultiply, PyNumber_Multiply,
    PyNumber_Remainder,     PyNumber_Or,
    power,                  PyNumber_Rshift,
    PyNumber_Subtract,      PyNumber_TrueDivide,
    PyNumber_Xor,           PyNumber_InPlaceAdd,
    PyNumber_InPlaceAnd,    PyNumber_InPlaceFloorDivide,
    PyNumber_InPlaceLshift, PyNumber_InPlaceMatrixMultiply,
    PyNumber_InPlaceMultiply, PyNumber_InPlaceRemainder,
    PyNumber_InPlaceOr,     inplace_power,
    PyNumber_InPlaceRshift, PyNumber_InPlaceSubtract,
    PyNumber_InPlaceTrueDivide, PyNumber_InPlaceXor,
};

PyObject* t_binary(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 3, "binary")) return nullptr;
  PyObject* result;
  if (live() && act(H_binary, args, 3, &result) == Verdict::done) return result;
  long op = PyLong_AsLong(args[2]);
  if (op < 0 || op >= 26) {
    PyErr_Format(PyExc_SystemError, "unknown binary operation %ld", op);
    return nullptr;
  }
  return BINARY[op](args[0], args[1]);
}

int compare_op(PyObject* text) {
  const char* s = PyUnicode_AsUTF8(text);
  if (!s) return -1;
  bool equal = s[1] == '=';
  switch (s[0]) {
    case '<': return equal ? Py_LE : Py_LT;
    case '>': return equal ? Py_GE : Py_GT;
    case '=': return Py_EQ;
    case '!': return Py_NE;
  }
  PyErr_Format(PyExc_SystemError, "unknown comparison %R", text);
  return -1;
}

PyObject* t_compare(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 3, "compare")) return nullptr;
  PyObject* result;
  if (live() && act(H_compare, args, 3, &result) == Verdict::done) return result;
  int op = compare_op(args[2]);
  return op < 0 ? nullptr : PyObject_RichCompare(args[0], args[1], op);
}

PyObject* t_contains(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "contains")) return nullptr;
  PyObject* result;
  if (live() && act(H_contains, args, 2, &result) == Verdict::done) return result;
  int found = PySequence_Contains(args[1], args[0]);
  return found < 0 ? nullptr : PyBool_FromLong(found);
}

PyObject* t_is(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "is_")) return nullptr;
  PyObject* result;
  if (live() && act(H_is_, args, 2, &result) == Verdict::done) return result;
  return PyBool_FromLong(args[0] == args[1]);
}

PyObject* t_subscr(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "subscr")) return nullptr;
  PyObject* result;
  if (live() && act(H_subscr, args, 2, &result) == Verdict::done) return result;
  return PyObject_GetItem(args[0], args[1]);
}

PyObject* none_or_error(int status) { return status < 0 ? nullptr : Py_NewRef(Py_None); }

PyObject* t_setitem(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 3, "setitem")) return nullptr;
  PyObject* result;
  if (live() && act(H_setitem, args, 3, &result) == Verdict::done) return result;
  return none_or_error(PyObject_SetItem(args[0], args[1], args[2]));
}

PyObject* t_delitem(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "delitem")) return nullptr;
  PyObject* result;
  if (live() && act(H_delitem, args, 2, &result) == Verdict::done) return result;
  return none_or_error(PyObject_DelItem(args[0], args[1]));
}

PyObject* t_setattr(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 3, "setattr")) return nullptr;
  PyObject* result;
  if (live() && act(H_setattr, args, 3, &result) == Verdict::done) return result;
  return none_or_error(PyObject_SetAttr(args[0], args[2], args[1]));
}

PyObject* t_delattr(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "delattr")) return nullptr;
  PyObject* result;
  if (live() && act(H_delattr, args, 2, &result) == Verdict::done) return result;
  return none_or_error(PyObject_SetAttr(args[0], args[1], nullptr));
}

PyObject* t_unary(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "unary")) return nullptr;
  PyObject* result;
  if (live() && act(H_unary, args, 2, &result) == Verdict::done) return result;
  const char* op = PyUnicode_AsUTF8(args[1]);
  if (!op) return nullptr;
  return op[0] == '-'   ? PyNumber_Negative(args[0])
         : op[0] == '+' ? PyNumber_Positive(args[0])
                        : PyNumber_Invert(args[0]);
}

PyObject* t_not(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 1, "not_")) return nullptr;
  PyObject* result;
  if (live() && act(H_not_, args, 1, &result) == Verdict::done) return result;
  int truth = PyObject_IsTrue(args[0]);
  return truth < 0 ? nullptr : PyBool_FromLong(!truth);
}

// A special method as CPython finds it: on the type, bound. New reference; NULL without an
// error when there is none.
PyObject* lookup_special(PyObject* object, const char* name) {
  PyObject* text = PyUnicode_InternFromString(name);
  if (!text) return nullptr;
  PyObject* found = _PyType_Lookup(Py_TYPE(object), text);  // borrowed
  Py_DECREF(text);
  if (!found) return nullptr;
  descrgetfunc bind = Py_TYPE(found)->tp_descr_get;
  return bind ? bind(found, object, (PyObject*)Py_TYPE(object)) : Py_NewRef(found);
}

// with_(manager) -> (result of __enter__, callable for the exit).
PyObject* t_with(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 1, "with_")) return nullptr;
  PyObject* result;
  if (live() && act(H_with_, args, 1, &result) == Verdict::done) {
    Py_XDECREF(result);
    if (!result) return nullptr;
  }
  PyObject* manager = args[0];
  PyObject* enter = lookup_special(manager, "__enter__");
  if (!enter) {
    if (!PyErr_Occurred())
      PyErr_Format(PyExc_TypeError, "'%.200s' object does not support the context manager protocol",
                   Py_TYPE(manager)->tp_name);
    return nullptr;
  }
  PyObject* leave = lookup_special(manager, "__exit__");
  if (!leave) {
    if (!PyErr_Occurred())
      PyErr_Format(PyExc_TypeError,
                   "'%.200s' object does not support the context manager protocol "
                   "(missed __exit__ method)",
                   Py_TYPE(manager)->tp_name);
    Py_DECREF(enter);
    return nullptr;
  }
  PyObject* call[1] = {enter};
  PyObject* value = t_call(nullptr, call, 1, nullptr);
  Py_DECREF(enter);
  if (!value) {
    Py_DECREF(leave);
    return nullptr;
  }
  PyObject* both = PyTuple_Pack(2, value, leave);
  Py_DECREF(value);
  Py_DECREF(leave);
  return both;
}

PyObject* t_format(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 3, "format_")) return nullptr;
  PyObject* result;
  if (live() && act(H_format_, args, 3, &result) == Verdict::done) return result;
  long conversion = PyLong_Check(args[1]) ? PyLong_AsLong(args[1]) : 0;
  PyObject* value;
  switch (conversion) {
    case 1: value = PyObject_Str(args[0]); break;
    case 2: value = PyObject_Repr(args[0]); break;
    case 3: value = PyObject_ASCII(args[0]); break;
    default: value = Py_NewRef(args[0]);
  }
  if (!value) return nullptr;
  PyObject* spec = args[2] == Py_None ? nullptr : args[2];
  PyObject* text = PyUnicode_CheckExact(value) && !spec ? Py_NewRef(value)
                                                        : PyObject_Format(value, spec);
  Py_DECREF(value);
  return text;
}

// ------------------------------------------------------------------------ islands

// Asks the recorder of a root with islands, with the values in the root's frame. NULL: an
// error that is the program's (an interrupt) is set, or none: our own, the run is void.
PyObject* ask_islands(const char* method, PyObject* const* args) {
  Session* s = session;
  Py_ssize_t depth = PyLong_AsSsize_t(args[1]);
  PyObject* values = calling_frame_values(depth);
  if (!values) return nullptr;
  PyObject* answer;
  {
    RecorderScope scope(s);
    answer = PyObject_CallMethod(s->islands, method, "OOl", args[0], values, op_watch_count());
  }
  Py_DECREF(values);
  if (!answer && PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
    void_recording("interrupted", nullptr);
  } else if (!answer) {
    handler_failed();
  }
  return answer;
}

void suspend(Session* s, bool on) {
  if (s->suspended == on) return;
  s->suspended = on;
  if (on) {
    announce_begin();  // operations of the program's own
    s->hold.reset();
  } else {
    announce_end();
    s->hold.emplace();
  }
}

// land(number, depth): Python goes on here; the stretch that is being recorded ends.
PyObject* t_land(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "land")) return nullptr;
  Session* s = session;
  // A stretch that is void by now has left its stand-ins in the frame.
  bool recorded = live();
  if (!s || !s->islands || s->in_recorder || !(recorded || s->displaced)) Py_RETURN_NONE;
  s->displaced = false;
  PyObject* answer = ask_islands("at_landing", args);
  if (recorded) suspend(s, true);
  if (!answer && PyErr_Occurred()) return nullptr;
  bool ok = !answer || set_calling_frame_values(answer);
  Py_XDECREF(answer);
  if (!ok) return nullptr;
  Py_RETURN_NONE;
}

// node(number, depth): a stretch may begin here.
PyObject* t_node(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "node")) return nullptr;
  Session* s = session;
  if (!s || !s->islands || s->in_recorder || !(s->dead || s->suspended)) Py_RETURN_NONE;
  PyObject* answer = ask_islands("at_node", args);
  if (!answer && PyErr_Occurred()) return nullptr;
  bool told = answer && PyTuple_CheckExact(answer) && PyTuple_GET_SIZE(answer) == 2;
  if (told && !set_calling_frame_values(PyTuple_GET_ITEM(answer, 1))) {
    Py_DECREF(answer);
    return nullptr;
  }
  PyObject* handlers = told ? PyTuple_GET_ITEM(answer, 0) : nullptr;
  if (handlers && PyTuple_CheckExact(handlers) && PyTuple_GET_SIZE(handlers) == HANDLER_COUNT) {
    s->displaced = PyTuple_GET_SIZE(PyTuple_GET_ITEM(answer, 1)) > 0;
    Py_SETREF(s->handlers, Py_NewRef(handlers));
    s->dead = false;
    s->hold.emplace();
    suspend(s, false);
    op_watch_start();
  }
  Py_XDECREF(answer);
  Py_RETURN_NONE;
}

PyMethodDef TRAMPOLINES[] = {
    {"call", (PyCFunction)(void*)t_call, METH_FASTCALL | METH_KEYWORDS, nullptr},
    {"attr", (PyCFunction)(void*)t_attr, METH_FASTCALL, nullptr},
    {"glob", (PyCFunction)(void*)t_glob, METH_FASTCALL, nullptr},
    {"deref", (PyCFunction)(void*)t_pass<H_deref, 2>, METH_FASTCALL, nullptr},
    {"store_deref", (PyCFunction)(void*)t_pass<H_store_deref, 2>, METH_FASTCALL, nullptr},
    {"store_global", (PyCFunction)(void*)t_pass<H_store_global, 2>, METH_FASTCALL, nullptr},
    {"delete_global", (PyCFunction)(void*)t_none<H_delete_global, 1>, METH_FASTCALL, nullptr},
    {"delete_deref", (PyCFunction)(void*)t_none<H_delete_deref, 1>, METH_FASTCALL, nullptr},
    {"binary", (PyCFunction)(void*)t_binary, METH_FASTCALL, nullptr},
    {"compare", (PyCFunction)(void*)t_compare, METH_FASTCALL, nullptr},
    {"contains", (PyCFunction)(void*)t_contains, METH_FASTCALL, nullptr},
    {"is_", (PyCFunction)(void*)t_is, METH_FASTCALL, nullptr},
    {"subscr", (PyCFunction)(void*)t_subscr, METH_FASTCALL, nullptr},
    {"setitem", (PyCFunction)(void*)t_setitem, METH_FASTCALL, nullptr},
    {"delitem", (PyCFunction)(void*)t_delitem, METH_FASTCALL, nullptr},
    {"setattr", (PyCFunction)(void*)t_setattr, METH_FASTCALL, nullptr},
    {"delattr", (PyCFunction)(void*)t_delattr, METH_FASTCALL, nullptr},
    {"unary", (PyCFunction)(void*)t_unary, METH_FASTCALL, nullptr},
    {"not_", (PyCFunction)(void*)t_not, METH_FASTCALL, nullptr},
    {"test", (PyCFunction)(void*)t_pass<H_test, 1>, METH_FASTCALL, nullptr},
    {"get_iter", (PyCFunction)(void*)t_pass<H_get_iter, 1>, METH_FASTCALL, nullptr},
    {"unpack", (PyCFunction)(void*)t_pass<H_unpack, 2>, METH_FASTCALL, nullptr},
    {"consume", (PyCFunction)(void*)t_pass<H_consume, 1>, METH_FASTCALL, nullptr},
    {"hashed", (PyCFunction)(void*)t_pass<H_hashed, 1>, METH_FASTCALL, nullptr},
    {"caught", (PyCFunction)(void*)t_pass<H_caught, 1>, METH_FASTCALL, nullptr},
    {"grown", (PyCFunction)(void*)t_pass<H_grown, 3>, METH_FASTCALL, nullptr},
    {"with_", (PyCFunction)(void*)t_with, METH_FASTCALL, nullptr},
    {"imported", (PyCFunction)(void*)t_pass<H_imported, 2>, METH_FASTCALL, nullptr},
    {"format_", (PyCFunction)(void*)t_format, METH_FASTCALL, nullptr},
    {"match", (PyCFunction)(void*)t_pass<H_match, 2>, METH_FASTCALL, nullptr},
    {"land", (PyCFunction)(void*)t_land, METH_FASTCALL, nullptr},
    {"node", (PyCFunction)(void*)t_node, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// ------------------------------------------------------------------------- shim

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

namespace {

// False where frames cannot be seen.
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

// --------------------------------------------------------------- Python-visible

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

// run_recorded(recorder, callable, args, kwargs or None)
PyObject* py_run_recorded(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 4, "run_recorded")) return nullptr;
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
    {"mark_twin", py_mark_twin, METH_O, "mark_twin(code): frames of this code are twins."},
    {"is_twin", py_is_twin, METH_O, "is_twin(code) -> bool."},
    {"run_recorded", (PyCFunction)(void*)py_run_recorded, METH_FASTCALL,
     "run_recorded(recorder, callable, args, kwargs): the result of the recorded run."},
    {"is_recording", py_is_recording, METH_NOARGS, "True while this thread records."},
    {"stop_recording", py_stop_recording, METH_NOARGS, "The rest of this recorded run is plain."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool is_recording() { return session != nullptr; }

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
  suspend(&own, false);
  own.hold.reset();
  session = nullptr;
  Py_DECREF(own.handlers);
  Py_XDECREF(own.islands);
  PyErr_Restore(type, value, trace);
  return result;
}

int init_trampolines(PyObject* module) {
  twin_codes = new std::unordered_set<PyCodeObject*>();
  EX = PyObject_CallNoArgs((PyObject*)&PyBaseObject_Type);
  EXKW = PyObject_CallNoArgs((PyObject*)&PyBaseObject_Type);
  if (!EX || !EXKW) return -1;
  PyObject* table = PyDict_New();
  if (!table) return -1;
  for (PyMethodDef* row = TRAMPOLINES; row->ml_name; row++) {
    PyObject* f = PyCFunction_New(row, nullptr);
    if (!f || PyDict_SetItemString(table, row->ml_name, f) < 0) return -1;
    Py_DECREF(f);
  }
  if (PyDict_SetItemString(table, "ex", EX) < 0 || PyDict_SetItemString(table, "exkw", EXKW) < 0)
    return -1;
  if (PyModule_AddObject(module, "TRAMPOLINES", table) < 0) return -1;
  PyObject* names = PyTuple_New(HANDLER_COUNT);
  if (!names) return -1;
  for (int i = 0; i < HANDLER_COUNT; i++)
    PyTuple_SET_ITEM(names, i, PyUnicode_FromString(HANDLER_NAMES[i]));
  if (PyModule_AddObject(module, "HANDLER_NAMES", names) < 0) return -1;
  return PyModule_AddFunctions(module, FUNCTIONS);
}

}  // namespace accel
