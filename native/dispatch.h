// Dispatch: which variant of a root serves a call, from prologues and nn.Module.__call__.
//
// Everything here needs the GIL and concerns the calling thread.
#pragma once

#include "native.h"

namespace accel {

// While one of these lives on a thread, every prologue on that thread answers "run the
// body" at once: recordings, driver code and guard callables are not roots themselves.
class DispatchPause {
 public:
  DispatchPause();
  ~DispatchPause();
  DispatchPause(const DispatchPause&) = delete;
  DispatchPause& operator=(const DispatchPause&) = delete;
};

bool dispatch_paused();

// ---- called by init_dispatch ---------------------------------------------------------

int init_module_roots(PyObject* module);
int init_backward_calls(PyObject* module);

}  // namespace accel
