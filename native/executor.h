// Runs plans. See docs/architecture.md, "Compiling -> executing", for the plan.
#pragma once

#include "native.h"

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace accel {

// An immutable plan with its library and memory. Owned by its Python object.
class Executor;
struct Plan;

enum class RunStatus {
  ok,
  misspeculated,  // a speculation did not hold; nothing was committed
  error,          // an operation failed; nothing was committed: the caller reruns eagerly
  torn,           // an operation failed after some user memory was written: the caller raises
};

// The Executor inside `object` (borrowed: lives as long as the object), or nullptr when
// `object` is no accel._native.Executor. No Python error is set.
const Executor* as_executor(PyObject* object);

// Its plan, which lives as long.
const Plan& plan_of(const Executor& executor);

// The state of the generator of the plan's device, if it draws from it; undefined otherwise.
at::Tensor random_state(const Executor& executor);

// Runs the plan on `inputs` (borrowed, alive for the call; guards have checked them) and
// replaces `outputs`. The caller holds the executor's Python object meanwhile. Reentrant and thread-safe. Needs the GIL, which it releases while
// a big plan runs; `outputs` must not be shared. Unless the status is ok, `outputs` is
// empty, and torch's CPU random stream is where it was; on error and torn `*why` (may be nullptr) says what failed. Never throws and
// sets no Python error.
RunStatus run(const Executor& executor, c10::TensorImpl* const* inputs, size_t count,
              std::vector<at::Tensor>& outputs, std::string* why);

}  // namespace accel
