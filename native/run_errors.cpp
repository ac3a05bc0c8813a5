// The errors of runs, by their types.
#include "run_errors.h"

#include "cuda_driver.h"

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

namespace accel {
namespace {

// An operation written in Python raised. The eager rerun will raise the same, but for an interrupt.
template <typename PythonError>
void take_python_error(PythonError& error, std::string& why) {
  error.restore();
  bool interrupt = PyErr_ExceptionMatches(PyExc_KeyboardInterrupt);
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyObject* text = value ? PyObject_Repr(value) : nullptr;
  const char* characters = text ? PyUnicode_AsUTF8(text) : nullptr;
  why = characters ? characters : "an operation written in Python raised";
  Py_XDECREF(text);
  PyErr_Clear();
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(traceback);
  if (interrupt) PyErr_SetInterrupt();
}

// A lost GPU gives everybody the same answer from now on. The rerun meets it at the place where torch
// would have, and torch reports it.
RunStatus status_of(int code) { return is_final(code) ? RunStatus::declined : RunStatus::error; }

}  // namespace

RunStatus explain_exception(RunError& why) {
  try {
    throw;
  } catch (python_error& error) {
    take_python_error(error, why.text);
  } catch (pybind11::error_already_set& error) {
    take_python_error(error, why.text);
  } catch (const Declined& error) {
    why.text = error.what();
    return RunStatus::declined;
  } catch (const DriverError& error) {
    why.text = error.what();
    if (is_final(error.code)) why.of_torch = error_of_torch(error.code);
    return status_of(error.code);
  } catch (const c10::OutOfMemoryError& error) {
    why = {error.what_without_backtrace(), std::current_exception()};
    return RunStatus::exhausted;
  } catch (const c10::AcceleratorError& error) {
    why.text = error.what_without_backtrace();
    if (is_final(error.get_error_code())) why.of_torch = std::current_exception();
    return status_of(error.get_error_code());
  } catch (const c10::Error& error) {
    why.text = error.what_without_backtrace();
  } catch (const std::exception& error) {
    why.text = error.what();
  }
  return RunStatus::error;
}

void raise(const RunError& error, PyObject* type) {
  if (error.of_torch) {
    torch::translate_exception_to_python(error.of_torch);
  } else {
    PyErr_SetString(type, error.text.c_str());
  }
}

}  // namespace accel
