// accel._native: the module object. Each file of this folder adds its own names
// through one init function; none of them knows another's Python-visible names.
#include "native.h"

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_native, m) {
  m.doc() = "Trampolines, guards, dispatch and executor of accel.";
  PyObject* module = m.ptr();
  if (accel::init_tensors(module) < 0 || accel::init_executor(module) < 0 ||
      accel::init_cuda_driver(module) < 0 || accel::init_cuda_generator(module) < 0 ||
      accel::init_launch_graphs(module) < 0 || accel::init_hidden_gpus(module) < 0 ||
      accel::init_gradients(module) < 0 || accel::init_optimizers(module) < 0 || accel::init_guards(module) < 0 ||
      accel::init_forced_failures(module) < 0 || accel::init_checkpoints(module) < 0 ||
      accel::init_dispatch(module) < 0 ||
      accel::init_session(module) < 0 || accel::init_frame_shim(module) < 0 ||
      accel::init_trampolines(module) < 0) {
    throw pybind11::error_already_set();
  }
}
