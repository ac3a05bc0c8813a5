// Entries: one root of dispatch each. Shared by dispatch.cpp and module_roots.cpp only.
// Everything here needs the GIL.
#pragma once

#include "native.h"

#include <cstdint>

namespace accel {

enum class EntryState : uint8_t {
  off,    // prologues answer at once, nothing is counted
  count,  // calls are counted, no variant is tried
  armed,  // variants are tried
};

// The Python object accel._native.Entry.
struct Entry {
  PyObject_HEAD
  PyObject* name;
  PyObject* on_call;   // asked when no variant serves; NULL or None: the hook of modules
  PyObject* on_event;  // told of failures; NULL or None: nobody
  PyObject* variants;  // tuple of Variant, replaced as a whole
  PyObject* weak_references;
  Py_ssize_t index;    // in the table of prologues; never given to another entry
  EntryState state;
  char disarm;         // while off: functions that call lose their prologue
  long calls, hits, misses;
  long threshold;      // calls without a variant until on_call is asked; 0: never
  long since;          // such calls since it was asked last
  Py_ssize_t stack_depth;  // of a node: so many slots of the frame's stack are roots
  PyObject* sampled;   // the variant whose eager run on_call is asked for (borrowed); or NULL
};

extern PyObject* run_body;          // the sentinel (immortal for the process)
extern bool dispatch_enabled;       // the global switch
extern PyObject* module_hook;       // owned: on_call of the entries of modules; NULL: off

// The clock of measured times.
int64_t now_ns();

// New reference, or NULL with a Python error set. `name` is borrowed.
Entry* new_entry(PyObject* name);

// The entry of this index (borrowed); NULL when there is none any more.
Entry* entry_at(Py_ssize_t index);

// A call of `entry` (kept alive here) with these roots, `last` possibly NULL: the call's
// result or the sentinel (new reference; a root may be NULL: unbound), or NULL with the program's own error set.
PyObject* dispatch_call(Entry* entry, PyObject* const* roots, size_t count, PyObject* last);

inline PyObject* answer_run_body() { return Py_NewRef(run_body); }

}  // namespace accel
