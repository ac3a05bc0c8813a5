// The autograd node that runs a backward plan. Variant.cpp makes one for every call of a
// differentiable variant. Everything here needs the GIL unless it says otherwise.
#pragma once

#include "native.h"

#include <ATen/core/Tensor.h>

#include <vector>

namespace accel {

// True for an accel._native.Gradient.
bool is_gradient(PyObject* object);

// Gives the outputs of a forward run (user outputs, then what only backward reads) their
// history: one node, whose edges lead to `inputs` (borrowed). Only user outputs are left in
// `outputs`. `random_state`: of the generator before the run, for running it again.
// Returns false with a Python error set.
bool connect(PyObject* gradient, c10::TensorImpl* const* inputs, size_t count,
             std::vector<at::Tensor>& outputs, const at::Tensor& random_state);

}  // namespace accel
