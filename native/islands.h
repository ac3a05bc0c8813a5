// Nodes: the places in the middle of a function where compiled code may take over.
#pragma once

#include "native.h"

namespace accel {

// A tuple (new) of the calling Python frame's locals (UNBOUND where there is none) and of
// the `depth` lowest slots of its operand stack; NULL with a Python error set.
PyObject* calling_frame_values(Py_ssize_t depth);

// Puts objects into the calling Python frame: `pairs` is a tuple of (index, object), indices as
// in `calling_frame_values`, none of which is a cell's. False with a Python error set.
bool set_calling_frame_values(PyObject* pairs);

int init_islands(PyObject* module);

}  // namespace accel
