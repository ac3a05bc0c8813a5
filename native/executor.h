// Runs plans. See docs/architecture.md, "Compiling -> executing", for the plan.
#pragma once

#include "native.h"

#include <ATen/core/Tensor.h>

#include <vector>

namespace accel {

// An immutable plan with its library and memory. Owned by its Python object.
class Executor;
struct Plan;

enum class RunStatus {
  ok,
  misspeculated,  // a speculation did not hold; nothing was committed
  declined,       // not here and now, and no fault of the plan; as error otherwise
  exhausted,      // there was no memory on a GPU; as error otherwise
  error,          // an operation failed; nothing was committed: the caller reruns eagerly
  torn,           // an operation failed after some user memory was written: the caller raises
};

struct RunError;  // run_errors.h

// The Executor inside `object` (borrowed: lives as long as the object), or nullptr when
// `object` is no accel._native.Executor. No Python error is set.
const Executor* as_executor(PyObject* object);

// Its plan, which lives as long.
const Plan& plan_of(const Executor& executor);

// The state of the generator of the plan's device, if it draws from it; undefined otherwise.
at::Tensor random_state(const Executor& executor);

// Runs the plan on `inputs` (borrowed, alive for the call; guards have checked them) and
// replaces `outputs`. The caller holds the executor's Python object meanwhile. Reentrant and
// thread-safe. Needs the GIL, which it releases while a big plan runs; `outputs` must not be shared.
// On a GPU all goes to the stream that torch's operations of this thread use on the plan's device.
// Unless the status is ok, `outputs` is empty, what the run has allocated is free again, and torch's
// random stream is where it was; beyond misspeculated `why` says what failed. Never throws and sets
// no Python error.
RunStatus run(const Executor& executor, c10::TensorImpl* const* inputs, size_t count,
              std::vector<at::Tensor>& outputs, RunError& why);

// Whether the stream that the plan would run on is captured as a graph now; true also where the driver
// does not say, which torch's next operation will report.
bool may_be_captured(const Plan& plan) noexcept;

}  // namespace accel
