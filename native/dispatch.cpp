// Entries, the prologue's C function, and what decides between variant, body and driver.
//
// Ownership: the table of entries borrows (an entry removes itself when it dies; indices
// are never reused, because code objects carry them). A running call holds its entry, its
// tuple of variants and its roots, so that anything may be replaced meanwhile.
#include "dispatch.h"

#include "checkpoints.h"
#include "cpython_compat.h"
#include "entry.h"
#include "forced_failures.h"
#include "frame_shim.h"
#include "guards.h"
#include "islands.h"
#include "output_pool.h"
#include "session.h"
#include "signals.h"
#include "variant.h"

#include <cstddef>
#include <cstring>
#include <ctime>
#include <optional>
#include <structmember.h>
#include <vector>

namespace accel {

PyObject* run_body = nullptr;
bool dispatch_enabled = true;

namespace {

constexpr long MAX_ERRORS = 3;  // failures of its executor after which a variant is dropped

PyTypeObject* entry_type = nullptr;
std::vector<Entry*>* entries = nullptr;  // index -> entry, NULL when it is gone

// Sum over all threads, so that the usual call asks no thread-local variable.
long pauses = 0;
thread_local long own_pauses = 0;

inline bool paused() {
  if (__builtin_expect(pauses != 0, 0) && own_pauses != 0) return true;
  return __builtin_expect(frames_are_anothers(), 0);
}

Entry* self_of(PyObject* self) { return reinterpret_cast<Entry*>(self); }

bool is_set(PyObject* object) { return object && object != Py_None; }

// ---- a call ------------------------------------------------------------------------

// All roots as one tuple (new).
PyObject* pack_roots(PyObject* const* roots, size_t count, PyObject* last) {
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(count + (last ? 1 : 0)));
  if (!tuple) return nullptr;
  for (size_t k = 0; k < count; k++) {
    PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(k), Py_NewRef(roots[k] ? roots[k] : unbound));
  }
  if (last) PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(count), Py_NewRef(last));
  return tuple;
}

// The program's own call; its nanoseconds go to `times`.
PyObject* run_timed(PyObject* times, PyObject* callable, PyObject* args, PyObject* kwargs) {
  int64_t start = now_ns();
  PyObject* result = PyObject_Call(callable, args, kwargs);
  int64_t ns = now_ns() - start;
  if (!result) return nullptr;
  PyObject* number = PyLong_FromLongLong(ns);
  if (!number || PyList_Append(times, number) < 0) PyErr_Clear();
  Py_XDECREF(number);
  return result;
}

// The driver's answer to a notification: None, what to record, or what to measure.
PyObject* follow(PyObject* answer) {
  if (answer == Py_None) return answer_run_body();
  Py_ssize_t size = PyTuple_CheckExact(answer) ? PyTuple_GET_SIZE(answer) : 0;
  bool timed = size >= 4 && PyList_CheckExact(PyTuple_GET_ITEM(answer, 0));
  if (size != 4 && !(timed && size == 5)) {
    return PyErr_Format(PyExc_TypeError,
                        "on_call must return None, (recorder, callable, args, kwargs) or "
                        "(list, callable, args, kwargs[, dispatches]), not %R",
                        answer);
  }
  PyObject* kwargs = PyTuple_GET_ITEM(answer, 3);
  if (timed) {
    // Eagerly to the last callee, unless the callees are to be served as always.
    std::optional<DispatchPause> pause;
    if (size == 4 || PyTuple_GET_ITEM(answer, 4) != Py_True) pause.emplace();
    return run_timed(PyTuple_GET_ITEM(answer, 0), PyTuple_GET_ITEM(answer, 1),
                     PyTuple_GET_ITEM(answer, 2), kwargs == Py_None ? nullptr : kwargs);
  }
  return run_recorded(PyTuple_GET_ITEM(answer, 0), PyTuple_GET_ITEM(answer, 1),
                      PyTuple_GET_ITEM(answer, 2), kwargs == Py_None ? nullptr : kwargs);
}

PyObject* notify(Entry* entry, PyObject* const* roots, size_t count, PyObject* last) {
  PyObject* handler = is_set(entry->on_call) ? entry->on_call : module_hook;
  if (!is_set(handler)) return answer_run_body();
  PyObject* tuple = pack_roots(roots, count, last);
  if (!tuple) return nullptr;
  close_log();
  Py_INCREF(handler);
  PyObject* answer;
  {
    DispatchPause pause;
    SignalHold hold;
    PyObject* arguments[2] = {reinterpret_cast<PyObject*>(entry), tuple};
    answer = PyObject_Vectorcall(handler, arguments, 2, nullptr);
  }
  Py_DECREF(handler);
  Py_DECREF(tuple);
  entry->sampled = nullptr;
  if (!answer) return nullptr;
  PyObject* result = follow(answer);
  Py_DECREF(answer);
  return result;
}

// Tells whoever listens; an error there is not the program's.
void tell(Entry* entry, const char* kind, const std::string& message) {
  if (!is_set(entry->on_event)) return;
  DispatchPause pause;
  SignalHold hold;
  PyObject* handler = Py_NewRef(entry->on_event);
  PyObject* done = PyObject_CallFunction(handler, "Oss#", entry, kind, message.data(),
                                         static_cast<Py_ssize_t>(message.size()));
  if (!done) PyErr_WriteUnraisable(handler);
  Py_XDECREF(done);
  Py_DECREF(handler);
}

// Takes a variant out of the entry's tuple, which others may be reading.
void drop_variant(Entry* entry, PyObject* variant) {
  std::vector<PyObject*> kept;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(entry->variants); k++) {
    PyObject* other = PyTuple_GET_ITEM(entry->variants, k);
    if (other != variant) kept.push_back(other);
  }
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(kept.size()));
  if (!tuple) return PyErr_Clear();
  for (size_t k = 0; k < kept.size(); k++) {
    PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(k), Py_NewRef(kept[k]));
  }
  Py_SETREF(entry->variants, tuple);
}

// What a checkpoint's log knows a call by: a function may get another entry in between.
PyObject* callee_of(Entry* entry, PyObject* last) {
  return last ? last : reinterpret_cast<PyObject*>(entry);
}

// What a call is answered that was served: for a node, its landing with it. NULL: error set.
PyObject* answer(const Serving& serving) {
  PyObject* result = serving.result;
  if (serving.landing && serving.landing != Py_None) {
    // The variant may be gone when its landing is read.
    Py_SETREF(result, PyTuple_Pack(2, serving.landing, result));
  }
  return result;
}

// The result of the first variant that serves the call; `*settled` is false when none
// did and the driver may be asked. `place`: in the first run of a checkpoint, or NULL.
PyObject* try_variants(Entry* entry, PyObject* const* roots, size_t count, PyObject* last,
                       PyObject* place, bool draws_again, bool* settled) {
  PyObject* variants = Py_NewRef(entry->variants);
  PyObject* result = nullptr;
  *settled = true;
  bool done = false;
  for (Py_ssize_t k = 0; !done && k < PyTuple_GET_SIZE(variants); k++) {
    PyObject* object = PyTuple_GET_ITEM(variants, k);
    auto* variant = reinterpret_cast<Variant*>(object);
    Serving serving;
    if (place) serving.run = CheckpointRun::first;
    serving.draws_again = draws_again;
    switch (serve(variant, roots, count, last, serving)) {
      case Outcome::guarded: continue;
      case Outcome::misspeculated:
        if (doubt_due(variant)) tell(entry, "misspeculated", "");
        continue;
      case Outcome::served:
        entry->hits++;
        result = answer(serving);
        if (place && result && !log_served(place, callee_of(entry, last), object)) {
          Py_CLEAR(result);
        }
        if (review_due(variant)) tell(entry, "review", "");
        break;
      case Outcome::skipped:
        make_room_for_eager();
        entry->sampled = object;
        result = notify(entry, roots, count, last);
        break;
      case Outcome::raised: break;
      case Outcome::declined: result = answer_run_body(); break;
      case Outcome::failed:
        if (error_count(variant) >= MAX_ERRORS) drop_variant(entry, object);
        tell(entry, "error", serving.why);
        result = answer_run_body();
        break;
    }
    done = true;
  }
  Py_DECREF(variants);
  *settled = done;
  return result;
}

// A call in the second run of a checkpoint: served as in the first, by the same variant, or not
// at all. The driver is not asked: recordings end early there.
PyObject* serve_again(Entry* entry, PyObject* const* roots, size_t count, PyObject* last) {
  PyObject* variant = served_before(callee_of(entry, last));
  if (!variant || variant == Py_None) {
    Py_XDECREF(variant);
    return variant ? answer_run_body() : nullptr;
  }
  Serving serving;
  serving.run = CheckpointRun::again;
  Unfailing unfailing;
  PyObject* result = nullptr;
  switch (serve(reinterpret_cast<Variant*>(variant), roots, count, last, serving)) {
    case Outcome::served:
      entry->hits++;
      result = answer(serving);
      break;
    case Outcome::raised: entry->hits++; break;
    case Outcome::failed: cannot_serve_again(entry->name, serving.why.c_str()); break;
    default:
      cannot_serve_again(entry->name, serving.why.empty() ? "what it reads has changed"
                                                          : serving.why.c_str());
  }
  Py_DECREF(variant);
  return result;
}

// ---- the Python type Entry -----------------------------------------------------------

const char* const STATE_NAMES[] = {"off", "count", "armed"};

PyObject* get_state(PyObject* self, void*) {
  return PyUnicode_FromString(STATE_NAMES[static_cast<int>(self_of(self)->state)]);
}

int set_state(PyObject* self, PyObject* value, void*) {
  for (int k = 0; value && k < 3; k++) {
    if (PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, STATE_NAMES[k]) == 0) {
      self_of(self)->state = static_cast<EntryState>(k);
      return 0;
    }
  }
  PyErr_SetString(PyExc_ValueError, "a state is \"off\", \"count\" or \"armed\"");
  return -1;
}

PyObject* get_variants(PyObject* self, void*) { return Py_NewRef(self_of(self)->variants); }

int set_variants(PyObject* self, PyObject* value, void*) {
  if (!value || !PyTuple_CheckExact(value)) {
    PyErr_SetString(PyExc_TypeError, "variants must be a tuple");
    return -1;
  }
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(value); k++) {
    if (!is_variant(PyTuple_GET_ITEM(value, k))) {
      PyErr_SetString(PyExc_TypeError, "variants must be a tuple of Variant");
      return -1;
    }
  }
  Py_INCREF(value);
  Py_SETREF(self_of(self)->variants, value);
  return 0;
}

// The variant whose eager run is wanted, while on_call is being asked for it.
PyObject* get_sampled(PyObject* self, void*) {
  PyObject* sampled = self_of(self)->sampled;
  return Py_NewRef(sampled ? sampled : Py_None);
}

PyObject* entry_py_new(PyTypeObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"name", "on_call", nullptr};
  PyObject *name, *on_call = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "U|O:Entry", const_cast<char**>(names), &name,
                                   &on_call)) {
    return nullptr;
  }
  Entry* entry = new_entry(name);
  if (entry && on_call) entry->on_call = Py_NewRef(on_call);
  return reinterpret_cast<PyObject*>(entry);
}

int entry_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self_of(self)->on_call);
  Py_VISIT(self_of(self)->on_event);
  Py_VISIT(self_of(self)->variants);
  return 0;
}

int entry_clear(PyObject* self) {
  Entry* entry = self_of(self);
  entry->state = EntryState::off;
  Py_CLEAR(entry->on_call);
  Py_CLEAR(entry->on_event);
  PyObject* empty = PyTuple_New(0);
  if (empty) Py_XSETREF(entry->variants, empty);
  return 0;
}

void entry_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  Entry* entry = self_of(self);
  (*entries)[static_cast<size_t>(entry->index)] = nullptr;
  if (entry->weak_references) PyObject_ClearWeakRefs(self);
  Py_XDECREF(entry->on_call);
  Py_XDECREF(entry->on_event);
  Py_XDECREF(entry->variants);
  Py_XDECREF(entry->name);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef MEMBERS[] = {
    {"name", T_OBJECT, offsetof(Entry, name), READONLY, nullptr},
    {"index", T_PYSSIZET, offsetof(Entry, index), READONLY, "what prologues carry"},
    {"on_call", T_OBJECT, offsetof(Entry, on_call), 0, "on_call(entry, roots)"},
    {"on_event", T_OBJECT, offsetof(Entry, on_event), 0, "on_event(entry, kind, message)"},
    {"calls", T_LONG, offsetof(Entry, calls), READONLY, "calls, those while off too"},
    {"disarm", T_BOOL, offsetof(Entry, disarm), 0,
     "while off, functions that call lose their prologue"},
    {"hits", T_LONG, offsetof(Entry, hits), READONLY, "calls that a variant served"},
    {"misses", T_LONG, offsetof(Entry, misses), READONLY, "calls that no variant matched"},
    {"threshold", T_LONG, offsetof(Entry, threshold), 0, "misses until on_call is asked"},
    {"stack_depth", T_PYSSIZET, offsetof(Entry, stack_depth), 0,
     "of a node: so many slots of the frame's stack are roots"},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Entry, weak_references), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyGetSetDef GETSETS[] = {
    {"state", get_state, set_state, "\"off\", \"count\" or \"armed\"", nullptr},
    {"variants", get_variants, set_variants, "tuple of Variant, tried in order", nullptr},
    {"sampled", get_sampled, nullptr, "the variant whose eager run is wanted, or None", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot SLOTS[] = {
    {Py_tp_new, reinterpret_cast<void*>(entry_py_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(entry_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(entry_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(entry_clear)},
    {Py_tp_members, MEMBERS},
    {Py_tp_getset, GETSETS},
    {Py_tp_doc, const_cast<char*>("Entry(name, on_call=None): a root of dispatch.")},
    {0, nullptr},
};

PyType_Spec SPEC = {"accel._native.Entry", sizeof(Entry), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, SLOTS};

// A class, because torch.compile takes only functions, classes and constants from builtins.
PyType_Slot RUN_BODY_SLOTS[] = {
    {Py_tp_doc, const_cast<char*>("What a prologue is answered when the body is to run.")},
    {0, nullptr},
};

PyType_Spec RUN_BODY_SPEC = {"accel._native.RUN_BODY", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT,
                             RUN_BODY_SLOTS};

// ---- module functions ----------------------------------------------------------------

// Gives a function (borrowed, may be NULL) the code under its prologue: the second half of
// the pair that is the last constant of rewritten code. The running frame keeps its own.
void remove_prologue(PyObject* function) {
  if (!function || !PyFunction_Check(function)) return;
  PyObject* consts =
      reinterpret_cast<PyCodeObject*>(PyFunction_GET_CODE(function))->co_consts;
  Py_ssize_t count = PyTuple_GET_SIZE(consts);
  PyObject* last = count ? PyTuple_GET_ITEM(consts, count - 1) : nullptr;
  if (!last || !PyTuple_CheckExact(last) || PyTuple_GET_SIZE(last) != 2) return;
  PyObject* code = PyTuple_GET_ITEM(last, 1);
  if (!PyCode_Check(code)) return;
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  if (PyObject_SetAttrString(function, "__code__", code) < 0) PyErr_Clear();
  PyErr_Restore(type, value, trace);
}

// prologue(index, *fast_locals). The function whose frame calls is the last root.
PyObject* py_prologue(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 1) return PyErr_Format(PyExc_TypeError, "prologue() takes an index");
  Py_ssize_t index = PyLong_AsSsize_t(args[0]);
  if (index < 0 || static_cast<size_t>(index) >= entries->size()) {
    if (index == -1 && PyErr_Occurred()) return nullptr;
    return answer_run_body();
  }
  Entry* entry = (*entries)[static_cast<size_t>(index)];
  if (!entry) return answer_run_body();
  if (!must_serve_again()) {
    if (!dispatch_enabled || paused()) return answer_run_body();
    if (entry->state == EntryState::off) {
      entry->calls++;
      // A checkpoint's second run may still have to be served.
      if (entry->disarm && !checkpoints_are_logged()) {
        remove_prologue(calling_function(PyThreadState_Get()));
      }
      return answer_run_body();
    }
  }
  PyObject* function = calling_function(PyThreadState_Get());
  if (!function) return PyErr_Format(PyExc_TypeError, "prologue() is called by functions only");
  return dispatch_call(entry, args + 1, static_cast<size_t>(count - 1), function);
}

PyObject* py_pause(PyObject*, PyObject*) {
  own_pauses++;
  pauses++;
  Py_RETURN_NONE;
}

PyObject* py_resume(PyObject*, PyObject*) {
  if (own_pauses == 0) {
    return PyErr_Format(PyExc_RuntimeError, "resume() without pause() on this thread");
  }
  own_pauses--;
  pauses--;
  Py_RETURN_NONE;
}

PyObject* py_is_paused(PyObject*, PyObject*) { return PyBool_FromLong(dispatch_paused()); }

PyObject* py_set_enabled(PyObject*, PyObject* flag) {
  int on = PyObject_IsTrue(flag);
  if (on < 0) return nullptr;
  bool before = dispatch_enabled;
  dispatch_enabled = on;
  return PyBool_FromLong(before);
}

PyObject* py_undisturbed(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 1) return PyErr_Format(PyExc_TypeError, "undisturbed() takes a callable");
  SignalHold hold;
  return PyObject_Vectorcall(args[0], args + 1, static_cast<size_t>(count - 1), nullptr);
}

PyObject* py_signal_waits(PyObject*, PyObject*) { return PyBool_FromLong(signal_waits()); }

PyObject* py_clock(PyObject*, PyObject*) { return PyLong_FromLongLong(now_ns()); }

PyMethodDef FUNCTIONS[] = {
    {"prologue", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_prologue)),
     METH_FASTCALL, "prologue(index, *locals): the call's result, or RUN_BODY."},
    {"pause", py_pause, METH_NOARGS, "Prologues of this thread answer RUN_BODY until resume()."},
    {"resume", py_resume, METH_NOARGS, "Ends the last pause() of this thread."},
    {"is_paused", py_is_paused, METH_NOARGS, "True between pause() and resume()."},
    {"set_enabled", py_set_enabled, METH_O,
     "set_enabled(flag): the switch for all threads; answers what it was."},
    {"undisturbed", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_undisturbed)),
     METH_FASTCALL, "undisturbed(f, *args): f(*args), while handlers of signals wait."},
    {"signal_waits", py_signal_waits, METH_NOARGS,
     "Whether a handler of a signal waits for code of ours to end."},
    {"clock_ns", py_clock, METH_NOARGS, "The clock of ns_compiled."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

DispatchPause::DispatchPause() {
  own_pauses++;
  pauses++;
}

DispatchPause::~DispatchPause() {
  own_pauses--;
  pauses--;
}

bool dispatch_paused() { return paused(); }

Entry* entry_at(Py_ssize_t index) {
  if (index < 0 || static_cast<size_t>(index) >= entries->size()) return nullptr;
  return (*entries)[static_cast<size_t>(index)];
}

Entry* new_entry(PyObject* name) {
  PyObject* variants = PyTuple_New(0);
  auto* entry = reinterpret_cast<Entry*>(variants ? entry_type->tp_alloc(entry_type, 0) : nullptr);
  if (!entry) {
    Py_XDECREF(variants);
    return nullptr;
  }
  entry->variants = variants;
  entry->name = Py_NewRef(name);
  entry->state = EntryState::count;
  entry->threshold = 1;
  entry->index = static_cast<Py_ssize_t>(entries->size());
  entries->push_back(entry);
  return entry;
}

PyObject* dispatch_call(Entry* entry, PyObject* const* roots, size_t count, PyObject* last) {
  Py_INCREF(entry);
  entry->calls++;
  PyObject* result = nullptr;
  PyObject* place = nullptr;
  bool settled = false, draws_again = true;
  CheckpointRun run = checkpoint_run();
  if (run == CheckpointRun::again) {
    result = serve_again(entry, roots, count, last);
    settled = true;
  } else if (run == CheckpointRun::first) {
    place = checkpoint_place(&draws_again);
    settled = !place;  // an error is set
  }
  if (!settled && entry->state == EntryState::armed && place != Py_None) {
    result = try_variants(entry, roots, count, last, place, draws_again, &settled);
  }
  bool is_eager = !settled || result == run_body;
  if (place && place != Py_None && is_eager &&
      !log_served(place, callee_of(entry, last), Py_None)) {
    Py_CLEAR(result);
    settled = true;
  }
  Py_XDECREF(place);
  if (!settled) {
    entry->misses++;
    bool ask = entry->threshold > 0 && ++entry->since >= entry->threshold;
    if (ask) entry->since = 0;
    result = ask ? notify(entry, roots, count, last) : answer_run_body();
  }
  Py_DECREF(entry);
  return result;
}

int init_dispatch(PyObject* module) {
  entries = new std::vector<Entry*>();
  run_body = PyType_FromSpec(&RUN_BODY_SPEC);
  entry_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&SPEC));
  if (!run_body || !entry_type) return -1;
  if (PyModule_AddObjectRef(module, "RUN_BODY", run_body) < 0 ||
      PyModule_AddObjectRef(module, "Entry", reinterpret_cast<PyObject*>(entry_type)) < 0 ||
      PyModule_AddFunctions(module, FUNCTIONS) < 0 || init_variant(module) < 0) {
    return -1;
  }
  if (init_islands(module) < 0) return -1;
  if (init_module_roots(module) < 0) return -1;
  return init_backward_calls(module);
}

}  // namespace accel
