// What the files of this folder share: the init functions and the few C++ calls
// that cross file borders. Everything here needs the GIL unless it says otherwise.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace accel {

// Each adds its names to `module` (borrowed); returns -1 with a Python error set.
int init_tensors(PyObject* module);
int init_forced_failures(PyObject* module);
int init_executor(PyObject* module);
int init_autograd_node(PyObject* module);
int init_optimizers(PyObject* module);
int init_guards(PyObject* module);
int init_dispatch(PyObject* module);
int init_trampolines(PyObject* module);
int init_interrupts(PyObject* module);

// True when a signal handler raised `exception` (borrowed) while our code ran: then the
// program's next instruction raises it. Needs the GIL.
bool deliver_interrupt(PyObject* exception);
// The same for the current error; it stays set when this answers false. Needs the GIL.
bool take_interrupt();

}  // namespace accel
