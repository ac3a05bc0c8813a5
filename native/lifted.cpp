// Ownership: a Lifted owns its program. The tensors made here own their memory: a backward
// may keep them as long as it likes.
#include "lifted.h"

#include <ATen/EmptyTensor.h>

#include <cstring>

namespace accel {

namespace {

struct Kind {
  const char* name;
  at::ScalarType type;
};

constexpr Kind KINDS[] = {
    {"float32", at::kFloat},
    {"float64", at::kDouble},
    {"int64", at::kLong},
};

bool take_types(PyObject* names, std::vector<at::ScalarType>& into) {
  PyObject* sequence = PySequence_Fast(names, "expected a sequence of dtype names");
  if (!sequence) return false;
  bool ok = true;
  for (Py_ssize_t k = 0; ok && k < PySequence_Fast_GET_SIZE(sequence); k++) {
    const char* name = PyUnicode_AsUTF8(PySequence_Fast_GET_ITEM(sequence, k));
    if (!name) {
      ok = false;
      break;
    }
    size_t before = into.size();
    for (const Kind& kind : KINDS) {
      if (std::strcmp(kind.name, name) == 0) into.push_back(kind.type);
    }
    if (into.size() == before) {
      PyErr_Format(PyExc_ValueError, "a lifted number cannot be a %s", name);
      ok = false;
    }
  }
  Py_DECREF(sequence);
  return ok;
}

bool take_slots(PyObject* slots, size_t limit, std::vector<int32_t>& into) {
  PyObject* sequence = PySequence_Fast(slots, "expected a sequence of slots");
  if (!sequence) return false;
  bool ok = true;
  for (Py_ssize_t k = 0; ok && k < PySequence_Fast_GET_SIZE(sequence); k++) {
    Py_ssize_t slot =
        PyNumber_AsSsize_t(PySequence_Fast_GET_ITEM(sequence, k), PyExc_OverflowError);
    ok = !PyErr_Occurred();
    if (ok && (slot < 0 || static_cast<size_t>(slot) >= limit)) {
      PyErr_Format(PyExc_ValueError, "there is no slot %zd", slot);
      ok = false;
    }
    if (ok) into.push_back(static_cast<int32_t>(slot));
  }
  Py_DECREF(sequence);
  return ok;
}

// A tensor without dimensions of this number; false with a Python error set.
bool store(PyObject* number, at::ScalarType type, at::Tensor& into) {
  at::Tensor tensor = at::detail::empty_cpu({}, type);
  if (type == at::kLong) {
    long long value = PyLong_AsLongLong(number);
    if (value == -1 && PyErr_Occurred()) return false;
    *tensor.mutable_data_ptr<int64_t>() = value;
  } else {
    double value = PyFloat_AsDouble(number);
    if (value == -1.0 && PyErr_Occurred()) return false;
    if (type == at::kDouble) *tensor.mutable_data_ptr<double>() = value;
    else *tensor.mutable_data_ptr<float>() = static_cast<float>(value);
  }
  into = std::move(tensor);
  return true;
}

}  // namespace

Lifted* take_lifted(PyObject* spec, size_t slot_count) {
  PyObject *program, *slots, *types;
  if (!PyTuple_Check(spec) || !PyArg_ParseTuple(spec, "OOO", &program, &slots, &types)) {
    if (!PyErr_Occurred()) {
      PyErr_SetString(PyExc_TypeError, "numbers must be (program, slots, dtypes)");
    }
    return nullptr;
  }
  if (!PyCallable_Check(program)) {
    PyErr_SetString(PyExc_TypeError, "a program of numbers must be callable");
    return nullptr;
  }
  auto* lifted = new Lifted();
  if (!take_slots(slots, slot_count, lifted->slots) || !take_types(types, lifted->types)) {
    delete lifted;
    return nullptr;
  }
  lifted->program = Py_NewRef(program);
  return lifted;
}

Evaluation evaluate(const Lifted& lifted, PyObject* leaves, std::vector<at::Tensor>& scalars,
                    PyObject** outputs) {
  PyObject* answer = PyObject_CallOneArg(lifted.program, leaves);
  if (!answer) return Evaluation::failed;
  if (answer == Py_None) {
    Py_DECREF(answer);
    return Evaluation::refused;
  }
  PyObject *operands, *results;
  bool ok = PyTuple_Check(answer) &&
            PyArg_ParseTuple(answer, "O!O!", &PyList_Type, &operands, &PyList_Type, &results);
  if (ok && static_cast<size_t>(PyList_GET_SIZE(operands)) != lifted.types.size()) ok = false;
  if (!ok && !PyErr_Occurred()) {
    PyErr_SetString(PyExc_TypeError, "a program of numbers gave something else");
  }
  scalars.resize(lifted.types.size());
  for (size_t k = 0; ok && k < lifted.types.size(); k++) {
    ok = store(PyList_GET_ITEM(operands, static_cast<Py_ssize_t>(k)), lifted.types[k], scalars[k]);
  }
  if (ok) *outputs = Py_NewRef(results);
  Py_DECREF(answer);
  return ok ? Evaluation::ok : Evaluation::failed;
}

}  // namespace accel
