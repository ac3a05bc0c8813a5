// Calls of ATen operations from plans.
//
// Rules for a new row of the direct table (externs.cpp):
// 1. The key is the full schema name; the function must do what the dispatcher would do
//    for dense CPU tensors without autograd.
// 2. Arguments come in schema order: tensor(i), scalar(i), integers(i), constant(i).
// 3. It may throw whatever ATen throws; it must not keep a tensor.
#pragma once

#include "plan.h"

namespace accel {

// The direct call for a schema name, or nullptr.
DirectCall find_direct_call(const std::string& name);

// Calls `step` on `tensors` (indexed by buffer id), which must be defined where used, and
// stores what `step.results` binds into `tensors`. Throws what the operation throws.
void call_extern(const ExternStep& step, at::Tensor* tensors);

}  // namespace accel
