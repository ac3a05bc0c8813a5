// What makes the autograd nodes of a compiled call: accel._native.Gradient, one for each component.
// Variant.cpp uses them for every call of a differentiable variant. Everything here needs the GIL.
#pragma once

#include "native.h"

#include <ATen/core/Tensor.h>

#include <vector>

namespace accel {

// True for a tuple, not empty, of accel._native.Gradient.
bool are_gradients(PyObject* object);

// What the nodes need of inputs that the run is about to write: copies of those that are not too
// big, by input; empty where there are none. No Python error is set.
std::vector<at::Tensor> values_before(PyObject* gradients, c10::TensorImpl* const* inputs,
                                      size_t count);

// `connect_components`, with what `values_before` gave. Returns false with a Python error set.
bool connect(PyObject* gradients, c10::TensorImpl* const* inputs, size_t count,
             std::vector<at::Tensor>& outputs, const at::Tensor& random_state,
             const std::vector<at::Tensor>& before);

}  // namespace accel
