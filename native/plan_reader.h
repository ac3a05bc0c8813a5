// Reading a plan's dictionaries: every function takes `where`, the path of what it reads,
// and throws a PlanError that names it. Needs the GIL; Python objects are held by pybind11.
#pragma once

#include "plan.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>

namespace accel {

namespace py = pybind11;

[[noreturn]] inline void fail(const std::string& where, const std::string& what) {
  throw PlanError("plan: " + where + ": " + what);
}

template <typename Value>
struct Named {
  const char* name;
  Value value;
};

// By torch's names.
inline constexpr Named<at::ScalarType> DTYPES[] = {
    {"float32", at::kFloat},           {"float64", at::kDouble},
    {"float16", at::kHalf},            {"bfloat16", at::kBFloat16},
    {"int64", at::kLong},              {"int32", at::kInt},
    {"int16", at::kShort},             {"int8", at::kChar},
    {"uint8", at::kByte},              {"bool", at::kBool},
    {"complex64", at::kComplexFloat},  {"complex128", at::kComplexDouble},
    {"complex32", at::kComplexHalf},   {"uint16", at::kUInt16},           {"uint32", at::kUInt32},
    {"uint64", at::kUInt64},           {"float8_e4m3fn", at::kFloat8_e4m3fn},
    {"float8_e5m2", at::kFloat8_e5m2},
};

template <typename Value, size_t N>
Value by_name(const Named<Value> (&rows)[N], const std::string& name, const std::string& where) {
  for (const auto& row : rows) {
    if (name == row.name) return row.value;
  }
  fail(where, "unknown name '" + name + "'");
}

template <typename T>
T take(const py::handle& value, const std::string& where, const char* expected) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    fail(where, std::string("expected ") + expected);
  }
}

inline py::object member(const py::dict& dict, const char* name, const std::string& where) {
  if (!dict.contains(name)) fail(where, std::string("'") + name + "' is missing");
  return dict[name];
}

inline py::dict as_dict(const py::handle& value, const std::string& where) {
  if (!PyDict_Check(value.ptr())) fail(where, "expected a dict");
  return py::reinterpret_borrow<py::dict>(value);
}

inline py::list as_list(const py::handle& value, const std::string& where) {
  if (!PyList_Check(value.ptr()) && !PyTuple_Check(value.ptr())) fail(where, "expected a list");
  return py::list(py::reinterpret_borrow<py::object>(value));
}

inline std::string text(const py::dict& dict, const char* name, const std::string& where) {
  return take<std::string>(member(dict, name, where), where + "." + name, "a string");
}

inline int64_t integer(const py::dict& dict, const char* name, const std::string& where) {
  return take<int64_t>(member(dict, name, where), where + "." + name, "an integer");
}

inline std::vector<int64_t> integers(const py::dict& dict, const char* name, const std::string& where) {
  return take<std::vector<int64_t>>(member(dict, name, where), where + "." + name, "integers");
}

// Turns a buffer id of the plan into an index.
using ReadBuffer = std::function<uint32_t(const py::handle& value, const std::string& where)>;

// One encoded argument, e.g. {"b": 3} or {"il": [1, 2]}, for the parameter `formal`.
ExternArgument parse_argument(const py::dict& dict, const c10::Argument& formal,
                              const ReadBuffer& read_buffer, const std::string& where);

}  // namespace accel
