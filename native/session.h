// Recording sessions: what the trampolines and the eval-frame shim ask the recorder, and how its
// answers are carried out.
//
// A handler of the recorder answers
//   None                                      do the instruction's own operation
//   (value,)                                  the instruction's result is value
//   (mode, f, args, kwargs, post, token)      a step, see Mode in session.cpp
// A handler never raises: an exception in it is our own error, it voids the
// recording, and the instruction's own operation is done.
//
// Ownership: unless a comment says otherwise, parameters are borrowed and results
// are new references. Everything needs the GIL. A session belongs to one thread.
#pragma once

#include <optional>

#include "native.h"
#include "signals.h"
#include "tensors.h"

namespace accel {

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

extern const char* const HANDLER_NAMES[];

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

  // Between two stretches operations are the program's own, and signals its handlers'.
  void suspend(bool on) {
    if (suspended == on) return;
    suspended = on;
    if (on) {
      announce_begin();
      hold.reset();
    } else {
      announce_end();
      hold.emplace();
    }
  }
};

extern __thread Session* session;  // of this thread; NULL: it does not record

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
void void_recording(const char* kind, PyObject* detail);

// Our own error in a handler: take it away from the program, void the recording.
void handler_failed();

// Asks a handler. Returns its answer (new), or NULL when it failed (no error left set).
PyObject* ask(Handler which, PyObject* const* args, Py_ssize_t count);

enum class Verdict { plain, done };

// Asks and acts. `done`: *result is the instruction's result (NULL: error set).
Verdict act(Handler which, PyObject* const* args, Py_ssize_t count, PyObject** result);

// Runs `callable(*args, **kwargs)` as a recording by `recorder` (all borrowed) on
// this thread and returns its result (new reference) or NULL with the program's
// own error set. Afterwards `recorder.finish(result, failed, unseen_operations)` has been
// called; if it returned an exception and the call did not fail, that is raised instead.
// Needs the GIL; must not be entered while this thread records already.
PyObject* run_recorded(PyObject* recorder, PyObject* callable, PyObject* args, PyObject* kwargs);

// True while this thread records (also when the recording has been voided).
inline bool is_recording() { return session != nullptr; }

}  // namespace accel
