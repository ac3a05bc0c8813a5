// Lifted numbers: Python ints and floats that differ between the calls of one variant.
// Shared with variant.cpp only. Everything here needs the GIL.
#pragma once

#include "native.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace accel {

// What a variant does with its numbers before its executor runs.
struct Lifted {
  PyObject* program = nullptr;        // owned: program(leaves) -> (operands, outputs) or None
  std::vector<int32_t> slots;         // where the guard program found the leaves
  std::vector<at::ScalarType> types;  // of the graph's inputs that the operands are for

  ~Lifted() { Py_XDECREF(program); }
};

// From (program, slots, dtype names); NULL with a Python error set.
Lifted* take_lifted(PyObject* spec, size_t slot_count);

enum class Evaluation { ok, refused, failed };

// Runs the program on `leaves` (a list, borrowed): `operands` become tensors without
// dimensions behind `scalars`, `*outputs` a list of the numbers that the result is made of
// (new). `refused`: the graph does not serve these numbers. `failed` leaves a Python error.
Evaluation evaluate(const Lifted& lifted, PyObject* leaves, std::vector<at::Tensor>& scalars,
                    PyObject** outputs);

}  // namespace accel
