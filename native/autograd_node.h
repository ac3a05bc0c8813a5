// The autograd nodes that run backward plans. Variant.cpp makes them for every call of a
// differentiable variant. Everything here needs the GIL unless it says otherwise.
#pragma once

#include "native.h"

#include <ATen/core/Tensor.h>

#include <vector>

namespace accel {

// True for a tuple, not empty, of accel._native.Gradient: one for each component.
bool are_gradients(PyObject* object);

// What the nodes need of inputs that the run is about to write: copies of those that are not too
// big, by input; empty where there are none. No Python error is set.
std::vector<at::Tensor> values_before(PyObject* gradients, c10::TensorImpl* const* inputs,
                                      size_t count);

// Gives the outputs of a forward run (user outputs, then what only backward reads) their
// history: nodes whose edges lead to `inputs` (borrowed). Only user outputs are left in
// `outputs`. `random_state`: of the generator before the run, for running it again; `before`: what
// `values_before` gave.
// Returns false with a Python error set.
bool connect(PyObject* gradients, c10::TensorImpl* const* inputs, size_t count,
             std::vector<at::Tensor>& outputs, const at::Tensor& random_state,
             const std::vector<at::Tensor>& before);

}  // namespace accel
