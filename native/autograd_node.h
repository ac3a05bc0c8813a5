// The autograd nodes that run backward plans. Variant.cpp makes them for every call of a
// differentiable variant. Everything here needs the GIL unless it says otherwise.
#pragma once

#include "native.h"

#include <ATen/core/Tensor.h>

#include <vector>

namespace accel {

// True for a tuple, not empty, of accel._native.Gradient: one for each component.
bool are_gradients(PyObject* object);

// Gives the outputs of a forward run (user outputs, then what only backward reads) their
// history: nodes whose edges lead to `inputs` (borrowed). Only user outputs are left in
// `outputs`. `random_state`: of the generator before the run, for running it again.
// Returns false with a Python error set.
bool connect(PyObject* gradients, c10::TensorImpl* const* inputs, size_t count,
             std::vector<at::Tensor>& outputs, const at::Tensor& random_state);

}  // namespace accel
