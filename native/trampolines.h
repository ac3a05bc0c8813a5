// Capture: the thread's recording session, the trampolines that twins call, and
// the eval-frame shim that redirects frames without a twin while recording.
#pragma once

#include "native.h"

namespace accel {

// Runs `callable(*args, **kwargs)` as a recording by `recorder` (all borrowed) on
// this thread and returns its result (new reference) or NULL with the program's
// own error set. Afterwards `recorder.finish(result, failed, unseen_operations)` has been
// called;
// if it returned an exception and the call did not fail, that is raised instead.
// Needs the GIL; must not be entered while this thread records already.
PyObject* run_recorded(PyObject* recorder, PyObject* callable, PyObject* args, PyObject* kwargs);

// True while this thread records (also when the recording has been voided).
bool is_recording();

// True while the interpreter's frames are evaluated by neither CPython nor us: Dynamo is at work,
// or a debugger. Cheap; needs the GIL.
bool frames_are_anothers();

}  // namespace accel
