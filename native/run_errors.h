// What becomes of an exception in a run: whose affair it is, and how it is told.
#pragma once

#include "executor.h"

#include <exception>
#include <stdexcept>
#include <string>

namespace accel {

struct RunError {
  std::string text;
  // torch's own, for what is the program's affair: no memory on a GPU, a GPU that is lost. For a
  // caller that cannot rerun; null for others.
  std::exception_ptr of_torch;
};

// What a run is refused for, here and now.
struct Declined : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Inside of a handler: fills in `why` for the exception that is being handled, and answers what the
// run's status is if nothing was committed. Needs the GIL; leaves no Python error set, but an
// interrupt, which comes once, is announced again.
RunStatus explain_exception(RunError& why);

// Sets the Python error: torch's own where there is one, else `type` with the text. Needs the GIL.
void raise(const RunError& error, PyObject* type);

}  // namespace accel
