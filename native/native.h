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
int init_cuda_driver(PyObject* module);
int init_launch_graphs(PyObject* module);
int init_cuda_generator(PyObject* module);
int init_hidden_gpus(PyObject* module);
int init_gradients(PyObject* module);
int init_checkpoints(PyObject* module);
int init_optimizers(PyObject* module);
int init_guards(PyObject* module);
int init_dispatch(PyObject* module);
int init_trampolines(PyObject* module);
int init_session(PyObject* module);
int init_frame_shim(PyObject* module);

}  // namespace accel
