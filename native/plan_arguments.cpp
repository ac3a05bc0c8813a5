// The encoded arguments of extern steps, made into what the operation's schema wants.
#include "plan_reader.h"

#include <ATen/ScalarOps.h>
#include <ATen/core/List.h>
#include <c10/core/Layout.h>
#include <c10/core/MemoryFormat.h>

#include <cstdlib>

namespace accel {
namespace {

constexpr Named<at::Layout> LAYOUTS[] = {
    {"strided", at::kStrided}, {"sparse_coo", at::kSparse}, {"sparse_csr", at::kSparseCsr}};

constexpr Named<at::MemoryFormat> MEMORY_FORMATS[] = {
    {"contiguous_format", at::MemoryFormat::Contiguous},
    {"preserve_format", at::MemoryFormat::Preserve},
    {"channels_last", at::MemoryFormat::ChannelsLast},
    {"channels_last_3d", at::MemoryFormat::ChannelsLast3d}};

// A float written by float.hex(), or "nan", "inf", "-inf".
double parse_float(const py::handle& value, const std::string& where) {
  if (PyFloat_Check(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  auto digits = take<std::string>(value, where, "a hexadecimal float");
  char* end = nullptr;
  double number = std::strtod(digits.c_str(), &end);
  if (digits.empty() || *end) fail(where, "'" + digits + "' is no float");
  return number;
}

c10::IValue parse_list(const std::string& tag, const py::handle& value, c10::TypeKind element,
                       const std::string& where) {
  py::list items = as_list(value, where);
  bool numbers = element == c10::TypeKind::NumberType;  // Scalar[]
  c10::List<at::Scalar> scalars;
  if (tag == "il") {
    auto list = take<std::vector<int64_t>>(items, where, "integers");
    if (element == c10::TypeKind::FloatType) {
      return c10::List<double>(std::vector<double>(list.begin(), list.end()));
    }
    if (!numbers) return c10::List<int64_t>(list);
    for (int64_t number : list) scalars.push_back(at::Scalar(number));
    return scalars;
  }
  if (tag == "fl") {
    std::vector<double> list;
    for (const auto& item : items) list.push_back(parse_float(item, where));
    if (!numbers) return c10::List<double>(list);
    for (double number : list) scalars.push_back(at::Scalar(number));
    return scalars;
  }
  if (tag == "boollist") {
    c10::List<bool> list;
    for (const auto& item : items) list.push_back(take<bool>(item, where, "a bool"));
    return list;
  }
  fail(where, "unknown argument tag '" + tag + "'");
}

c10::IValue parse_constant(const std::string& tag, const py::handle& value,
                           const c10::TypePtr& type, const c10::Argument& formal,
                           const std::string& where) {
  using Kind = c10::TypeKind;
  Kind kind = type->kind();
  auto name = [&] { return take<std::string>(value, where, "a name"); };
  if (tag == "none") return {};
  if (tag == "i") {
    auto number = take<int64_t>(value, where, "an integer");
    if (kind == Kind::ListType) {  // int[2] stride=1
      return c10::List<int64_t>(
          std::vector<int64_t>(static_cast<size_t>(formal.N().value_or(1)), number));
    }
    if (kind == Kind::FloatType) return static_cast<double>(number);
    return number;
  }
  if (tag == "f") return parse_float(value, where);
  if (tag == "c") {
    py::list parts = as_list(value, where);
    if (parts.size() != 2) fail(where, "a complex number has two parts");
    return c10::complex<double>(parse_float(parts[0], where), parse_float(parts[1], where));
  }
  if (tag == "bool") return take<bool>(value, where, "a bool");
  if (tag == "s") return name();
  if (tag == "dtype") return static_cast<int64_t>(by_name(DTYPES, name(), where));
  if (tag == "layout") return static_cast<int64_t>(by_name(LAYOUTS, name(), where));
  if (tag == "memory_format") return static_cast<int64_t>(by_name(MEMORY_FORMATS, name(), where));
  if (tag == "device") return c10::Device(name());
  if (kind != Kind::ListType) fail(where, "unknown argument tag '" + tag + "'");
  return parse_list(tag, value, type->castRaw<c10::ListType>()->getElementType()->kind(), where);
}

// A number where the schema has a tensor, as torch's Python bindings make one of it: its dtype
// counts less than that of the other operand.
at::Tensor wrapped_number(const c10::IValue& number) {
  at::Tensor tensor = c10::scalar_to_tensor(number.toScalar());
  tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
  return tensor;
}

ExternArgument parse_tensor_list(const py::handle& value, const c10::TypePtr& type,
                                 const ReadBuffer& read_buffer, const std::string& where) {
  if (type->kind() != c10::TypeKind::ListType) fail(where, "the operation wants no tensor list");
  auto element = type->castRaw<c10::ListType>()->getElementType();
  ExternArgument argument;
  argument.kind = element->kind() == c10::TypeKind::OptionalType
                      ? ExternArgument::optional_tensors
                      : ExternArgument::tensors;
  for (const auto& entry : as_list(value, where)) {
    uint32_t id = entry.is_none() ? NO_BUFFER : read_buffer(entry, where);
    if (id == NO_BUFFER && argument.kind == ExternArgument::tensors) {
      fail(where, "None in a list of tensors");
    }
    argument.list.push_back(id);
  }
  return argument;
}

}  // namespace

ExternArgument parse_argument(const py::dict& dict, const c10::Argument& formal,
                              const ReadBuffer& read_buffer, const std::string& where) {
  if (dict.size() != 1) fail(where, "an argument is a dict of one item");
  auto item = *dict.begin();
  auto tag = take<std::string>(item.first, where, "a string as the argument's tag");
  ExternArgument argument;
  c10::TypePtr type = formal.type();
  if (type->kind() == c10::TypeKind::OptionalType) {
    type = type->castRaw<c10::OptionalType>()->getElementType();
  }
  if (tag == "b") {
    if (type->kind() != c10::TypeKind::TensorType) fail(where, "the operation wants no tensor");
    argument.kind = ExternArgument::tensor;
    argument.buffer = read_buffer(item.second, where);
    return argument;
  }
  if (tag == "bl") return parse_tensor_list(item.second, type, read_buffer, where);
  argument.value = parse_constant(tag, item.second, type, formal, where);
  if (type->kind() == c10::TypeKind::TensorType && argument.value.isScalar()) {
    argument.value = wrapped_number(argument.value);
  }
  // A bool is a Scalar to torch, though not to the schema's type system.
  bool scalar = type->kind() == c10::TypeKind::NumberType && argument.value.isBool();
  if (!scalar && !argument.value.type()->isSubtypeOf(*formal.type())) {
    fail(where, "the operation wants " + formal.type()->str() + ", not " +
                    argument.value.type()->str());
  }
  return argument;
}

}  // namespace accel
