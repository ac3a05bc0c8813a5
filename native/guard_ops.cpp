// The instructions of guard programs: one function a row of ACCEL_GUARD_OPS.
//
// Slots are borrowed references. A function may read whatever its input slot holds and
// must answer false for what it does not understand. Loads return the value (borrowed,
// alive as long as its holder is unchanged) or NULL.
#include "guard_program.h"

#include "cpython_compat.h"
#include "dispatch.h"
#include "signals.h"

#include <cstring>
#include <structmember.h>

namespace accel {
namespace {

constexpr size_t MAX_TABLE_BYTES = 1 << 16;  // of a set that is worth a copy

bool is_object(PyObject* slot) { return slot && !is_inline(slot); }

// ---- loads ---------------------------------------------------------------------------

PyObject* load_attributes(PyObject* in) {
  if (!is_object(in)) return nullptr;
  Attributes found = attributes_of(in);
  if (!found.possible) return nullptr;
  return found.dict ? found.dict : inline_slot(in);
}

PyObject* inline_get(PyObject* owner, PyObject* name) {
  Attributes found = attributes_of(owner);
  if (found.dict) return PyUnicode_CheckExact(name)
                             ? dict_get(found.dict, name, PyObject_Hash(name)) : nullptr;
  if (!found.inline_values || !PyUnicode_CheckExact(name)) return nullptr;
  Py_ssize_t position = inline_position(Py_TYPE(owner), name);
  return position < 0 ? nullptr : inline_value(found.inline_values, position);
}

PyObject* load_dict_item(PyObject* in, const Instruction& i) {
  if (!in) return nullptr;
  if (is_inline(in)) return inline_get(inline_owner(in), i.operand);
  return PyDict_Check(in) ? dict_get(in, i.operand, i.hash) : nullptr;
}

// A position as Python counts it (from the end when negative), or -1 when out of range.
Py_ssize_t position(Py_ssize_t index, Py_ssize_t size) {
  if (index < 0) index += size;
  return index >= 0 && index < size ? index : -1;
}

PyObject* load_list_item(PyObject* in, Py_ssize_t index) {
  if (!is_object(in) || !PyList_Check(in)) return nullptr;
  Py_ssize_t at = position(index, PyList_GET_SIZE(in));
  return at < 0 ? nullptr : PyList_GET_ITEM(in, at);
}

// collections.deque; borrowed from its module, which is never unloaded.
PyTypeObject* deque_type() {
  static PyTypeObject* type = [] {
    PyObject* module = PyImport_ImportModule("collections");
    PyObject* found = module ? PyObject_GetAttrString(module, "deque") : nullptr;
    Py_XDECREF(module);
    if (!found) PyErr_Clear();
    return reinterpret_cast<PyTypeObject*>(found);  // a reference for good
  }();
  return type;
}

PyObject* load_deque_item(PyObject* in, Py_ssize_t index) {
  PyTypeObject* type = deque_type();
  if (!is_object(in) || !type || !PyObject_TypeCheck(in, type)) return nullptr;
  PySequenceMethods* methods = type->tp_as_sequence;
  Py_ssize_t at = position(index, methods->sq_length(in));
  if (at < 0) return nullptr;
  PyObject* item = methods->sq_item(in, at);  // a new reference, beside the deque's own
  Py_XDECREF(item);
  return item;
}

PyObject* load_tuple_item(PyObject* in, Py_ssize_t index) {
  if (!is_object(in) || !PyTuple_Check(in)) return nullptr;
  Py_ssize_t at = position(index, PyTuple_GET_SIZE(in));
  return at < 0 ? nullptr : PyTuple_GET_ITEM(in, at);
}

PyObject* load_cell(PyObject* in) {
  return is_object(in) && PyCell_Check(in) ? PyCell_GET(in) : nullptr;
}

// A __slots__ member or a C struct's object field. A number in a C struct would need a
// new object, which is what the recorder's "attribute" source is for.
PyObject* read_member(PyObject* object, PyMemberDescrObject* descriptor) {
  if (!PyObject_TypeCheck(object, PyDescr_TYPE(descriptor))) return nullptr;
  PyMemberDef* member = descriptor->d_member;
  if (member->type != T_OBJECT && member->type != T_OBJECT_EX) return nullptr;
  PyObject* value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + member->offset);
  return value || member->type == T_OBJECT_EX ? value : Py_None;
}

PyObject* load_member(PyObject* in, PyObject* descriptor) {
  if (!is_object(in)) return nullptr;
  return read_member(in, reinterpret_cast<PyMemberDescrObject*>(descriptor));
}

PyObject* or_none(PyObject* value) { return value ? value : Py_None; }

PyObject* load_function_part(PyObject* in, const Instruction& i) {
  if (!is_object(in) || !PyFunction_Check(in)) return nullptr;
  auto* function = reinterpret_cast<PyFunctionObject*>(in);
  switch (i.op) {
    case Op::FUNCTION_CODE: return function->func_code;
    case Op::FUNCTION_DEFAULTS: return or_none(function->func_defaults);
    case Op::FUNCTION_KWDEFAULTS: return or_none(function->func_kwdefaults);
    case Op::FUNCTION_GLOBALS: return function->func_globals;
    default:
      return function->func_closure ? load_tuple_item(function->func_closure, i.number) : nullptr;
  }
}

PyObject* load_bound_self(PyObject* in) {
  if (!is_object(in)) return nullptr;
  if (PyMethod_Check(in)) return PyMethod_GET_SELF(in);
  return PyCFunction_Check(in) ? PyCFunction_GET_SELF(in) : nullptr;
}

PyObject* load_bound_function(PyObject* in) {
  return is_object(in) && PyMethod_Check(in) ? PyMethod_GET_FUNCTION(in) : nullptr;
}

}  // namespace

PyObject* instance_attribute(PyObject* object, PyObject* name) {
  Attributes found = attributes_of(object);
  if (found.dict) return PyDict_Check(found.dict)
                             ? dict_get(found.dict, name, PyObject_Hash(name)) : nullptr;
  return found.inline_values ? inline_get(object, name) : nullptr;
}

namespace {

// A class attribute as the class itself shows it, when no code has to run for that.
PyObject* unbound_attribute(PyObject* found) {
  if (!found) return nullptr;
  PyTypeObject* type = Py_TYPE(found);
  if (!type->tp_descr_get || type == &PyFunction_Type) return found;
  if (type != &PyStaticMethod_Type) return nullptr;
  static PyObject* const name = PyUnicode_InternFromString("__func__");
  PyObject* member = _PyType_Lookup(type, name);
  if (!member || Py_TYPE(member) != &PyMemberDescr_Type) return nullptr;
  return read_member(found, reinterpret_cast<PyMemberDescrObject*>(member));
}

// What getattr() would answer, when that is a lookup without any code to run; else NULL.
PyObject* plain_attribute(PyObject* object, PyObject* name) {
  PyTypeObject* type = Py_TYPE(object);
  if (PyType_Check(object)) {
    if (type->tp_getattro != PyType_Type.tp_getattro) return nullptr;
    if (_PyType_Lookup(type, name)) return nullptr;  // the metaclass: __dict__, __name__, ...
    return unbound_attribute(_PyType_Lookup(reinterpret_cast<PyTypeObject*>(object), name));
  }
  bool module = type->tp_getattro == PyModule_Type.tp_getattro;  // generic, then __getattr__
  if (!module && type->tp_getattro != PyObject_GenericGetAttr) return nullptr;
  PyObject* found = _PyType_Lookup(type, name);
  if (found && Py_TYPE(found) == &PyMemberDescr_Type) {
    return read_member(object, reinterpret_cast<PyMemberDescrObject*>(found));
  }
  if (found && Py_TYPE(found)->tp_descr_set) return nullptr;
  PyObject* own = instance_attribute(object, name);
  if (own) return own;
  return found && !Py_TYPE(found)->tp_descr_get ? found : nullptr;
}

// An interrupt that arrived in our own code belongs to the program: raise it there.
void drop_error() {
  if (!PyErr_Occurred()) return;
  bool interrupt = PyErr_ExceptionMatches(PyExc_KeyboardInterrupt);
  PyErr_Clear();
  if (interrupt) PyErr_SetInterrupt();
}

PyObject* load_attribute(Pass& pass, PyObject* in, const Instruction& i) {
  if (!is_object(in)) return nullptr;
  if (PyObject* plain = plain_attribute(in, i.operand)) return plain;
  if (pass.pure) return nullptr;
  if (pass.confirming) {
    auto found = pass.answers.find(&i);
    return found != pass.answers.end() && found->second.input == in ? found->second.value
                                                                    : nullptr;
  }
  pass.begin_python();
  pass.keep(in);
  PyObject* value;
  {
    DispatchPause pause;
    SignalHold hold;
    value = PyObject_GetAttr(in, i.operand);
  }
  drop_error();
  if (!value) return nullptr;
  pass.kept.push_back(value);
  pass.answers[&i] = {in, value};
  return value;
}

PyObject* run_load(Pass& pass, PyObject* in, const Instruction& i) {
  switch (i.op) {
    case Op::INSTANCE_DICT: return load_attributes(in);
    case Op::DICT_ITEM: return load_dict_item(in, i);
    case Op::LIST_ITEM: return load_list_item(in, i.number);
    case Op::DEQUE_ITEM: return load_deque_item(in, i.number);
    case Op::TUPLE_ITEM: return load_tuple_item(in, i.number);
    case Op::CELL_CONTENTS: return load_cell(in);
    case Op::SLOT_MEMBER: return load_member(in, i.operand);
    case Op::CONST_OBJECT: return i.weak ? weak_target(i.operand) : i.operand;
    case Op::FUNCTION_CODE:
    case Op::FUNCTION_DEFAULTS:
    case Op::FUNCTION_KWDEFAULTS:
    case Op::FUNCTION_CLOSURE:
    case Op::FUNCTION_GLOBALS: return load_function_part(in, i);
    case Op::BOUND_SELF: return load_bound_self(in);
    case Op::BOUND_FUNC: return load_bound_function(in);
    case Op::TYPE_OF:
      return is_object(in) ? reinterpret_cast<PyObject*>(Py_TYPE(in)) : nullptr;
    case Op::ATTR_GENERIC: return load_attribute(pass, in, i);
    default: return nullptr;
  }
}

// ---- checks --------------------------------------------------------------------------

bool check_identity(PyObject* in, const Instruction& i) {
  return in && in == (i.weak ? weak_target(i.operand) : i.operand);
}

bool check_absent(PyObject* in, const Instruction& i) {
  if (!in) return false;
  if (is_inline(in)) return !inline_get(inline_owner(in), i.operand);
  return PyDict_Check(in) && !dict_get(in, i.operand, i.hash);
}

bool same_key(PyObject* expected, PyObject* actual) {
  return expected == actual || constants_equal(expected, actual);
}

bool check_inline_keys(PyObject* owner, PyObject* keys) {
  Attributes found = attributes_of(owner);
  if (!found.inline_values) return PyTuple_GET_SIZE(keys) == 0;
  if (inline_count(found.inline_values) != PyTuple_GET_SIZE(keys)) return false;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(keys); k++) {
    Py_ssize_t position = inline_order(found.inline_values, k);
    if (!same_key(PyTuple_GET_ITEM(keys, k), inline_key(Py_TYPE(owner), position))) return false;
  }
  return true;
}

// OrderedDict keeps an order of its own beside the dict's, which move_to_end changes.
bool check_own_order(PyObject* dict, PyObject* keys) {
  PyObject* iterator = PyODict_Type.tp_iter(dict);
  bool equal = iterator != nullptr;
  for (Py_ssize_t k = 0; equal && k < PyTuple_GET_SIZE(keys); k++) {
    PyObject* key = PyIter_Next(iterator);
    equal = key && same_key(PyTuple_GET_ITEM(keys, k), key);
    Py_XDECREF(key);
  }
  Py_XDECREF(iterator);
  drop_error();
  return equal;
}

bool check_keys(PyObject* in, PyObject* keys) {
  if (!in) return false;
  if (is_inline(in)) return check_inline_keys(inline_owner(in), keys);
  if (!PyDict_Check(in) || PyDict_GET_SIZE(in) != PyTuple_GET_SIZE(keys)) return false;
  Py_ssize_t cursor = 0, k = 0;
  PyObject *key, *value;
  while (PyDict_Next(in, &cursor, &key, &value)) {
    if (!same_key(PyTuple_GET_ITEM(keys, k++), key)) return false;
  }
  return !PyODict_Check(in) || check_own_order(in, keys);
}

// -1: not a container whose length C code can tell.
Py_ssize_t length_of(PyObject* in) {
  if (is_inline(in)) {
    Attributes found = attributes_of(inline_owner(in));
    return found.inline_values ? inline_count(found.inline_values) : 0;
  }
  if (PyTuple_Check(in) || PyList_Check(in)) return Py_SIZE(in);
  if (PyDict_Check(in)) return PyDict_GET_SIZE(in);
  if (PyAnySet_Check(in)) return PySet_GET_SIZE(in);
  if (deque_type() && PyObject_TypeCheck(in, deque_type())) {
    return deque_type()->tp_as_sequence->sq_length(in);
  }
  PyTypeObject* type = Py_TYPE(in);
  bool in_c = !(type->tp_flags & Py_TPFLAGS_HEAPTYPE) || (type->tp_flags & Py_TPFLAGS_IMMUTABLETYPE);
  if (!in_c) return -1;
  lenfunc length = type->tp_as_sequence ? type->tp_as_sequence->sq_length : nullptr;
  if (!length && type->tp_as_mapping) length = type->tp_as_mapping->mp_length;
  Py_ssize_t found = length ? length(in) : -1;
  drop_error();
  return found;
}

bool members_equal(PyObject* in, const Instruction& i, bool* identical) {
  Py_ssize_t cursor = 0;
  PyObject* member;
  Py_hash_t hash;
  while (_PySet_NextEntry(in, &cursor, &member, &hash)) {
    auto [begin, end] = i.members.equal_range(hash);
    bool found = false;
    for (auto at = begin; at != end && !found; ++at) {
      found = same_key(at->second, member);
      if (found && at->second != member) *identical = false;
    }
    if (!found) return false;
  }
  return true;
}

// A set has no version. When its members are the very objects of the operand, which the
// program holds, a copy of its table tells the next time that it is unchanged.
bool check_members(PyObject* in, const Instruction& i) {
  if (!is_object(in) || !PyAnySet_Check(in)) return false;
  if (PySet_GET_SIZE(in) != PySet_GET_SIZE(i.operand)) return false;
  SetTable table = set_table(in);
  if (i.table.size() == table.size_bytes &&
      std::memcmp(i.table.data(), table.bytes, table.size_bytes) == 0) {
    return true;
  }
  bool identical = table.size_bytes <= MAX_TABLE_BYTES;
  if (!members_equal(in, i, &identical)) return false;
  const char* bytes = static_cast<const char*>(table.bytes);
  if (identical) const_cast<Instruction&>(i).table.assign(bytes, bytes + table.size_bytes);
  return true;
}

// Whether two MROs (tuples, or NULL) are of the same classes.
bool same_classes(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (!a || !b || PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return false;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(a); k++) {
    if (PyTuple_GET_ITEM(a, k) != PyTuple_GET_ITEM(b, k)) return false;
  }
  return true;
}

// The version says at once that no lookup on the type can have changed; when it differs
// (or ran out), the lookups are made again. `version` is a cache: it is the program's.
bool check_class(const Instruction& i) {
  auto* type = reinterpret_cast<PyTypeObject*>(i.operand);
  if (reinterpret_cast<PyObject*>(Py_TYPE(type)) != i.metaclass) return false;
  if (i.version && type_version(type) == i.version) return true;
  if (!same_classes(type->tp_mro, i.mro)) return false;
  for (const ExpectedAttribute& expected : i.attributes) {
    if (_PyType_Lookup(type, expected.name) != expected.value) return false;
  }
  const_cast<Instruction&>(i).version = type_version(type);
  return true;
}

bool check_apart(PyObject* a, PyObject* b) {
  if (!is_object(a) || !is_object(b) || !is_tensor(a) || !is_tensor(b)) return false;
  return !storage_overlaps(unpack(a), unpack(b));
}

bool check_call(Pass& pass, PyObject* in, const Instruction& i) {
  if (!is_object(in) || pass.pure) return false;
  if (pass.confirming) {
    auto found = pass.answers.find(&i);
    return found != pass.answers.end() && found->second.input == in;
  }
  pass.begin_python();
  pass.keep(in);
  PyObject* answer;
  {
    DispatchPause pause;
    SignalHold hold;
    answer = PyObject_CallOneArg(i.operand, in);
  }
  bool held = answer == Py_True;
  Py_XDECREF(answer);
  drop_error();
  pass.answers[&i] = {in, nullptr};
  return held;
}

bool run_check(Pass& pass, PyObject* in, const Instruction& i) {
  switch (i.op) {
    case Op::IS: return check_identity(in, i);
    case Op::TYPE_IS:
      return is_object(in) && Py_TYPE(in) == reinterpret_cast<PyTypeObject*>(i.operand);
    case Op::EQUALS: return is_object(in) && constants_equal(i.operand, in);
    case Op::DICT_ABSENT: return check_absent(in, i);
    case Op::DICT_KEYS: return check_keys(in, i.operand);
    case Op::LEN: return in && length_of(in) == i.number;
    case Op::SET_EQUALS: return check_members(in, i);
    case Op::SAME: return in && in == pass.slots[i.number];
    case Op::NOT_SAME: return in && in != pass.slots[i.number];
    case Op::TYPE_ATTRS: return check_class(i);
    case Op::UNBOUND: return !in;
    case Op::BOUND: return in;
    case Op::TENSOR:
    case Op::TENSOR_KIND:
      return is_object(in) && (*pass.program.metas)[static_cast<size_t>(i.number)].check(in);
    case Op::NO_OVERLAP: return check_apart(in, pass.slots[i.number]);
    case Op::CALL: return check_call(pass, in, i);
    default: return false;
  }
}

// ---- constants -----------------------------------------------------------------------

bool equal_bits(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0; }

bool equal_items(PyObject* a, PyObject* b) {
  if (PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return false;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(a); k++) {
    if (!constants_equal(PyTuple_GET_ITEM(a, k), PyTuple_GET_ITEM(b, k))) return false;
  }
  return true;
}

bool equal_complex(PyObject* a, PyObject* b) {
  Py_complex x = PyComplex_AsCComplex(a), y = PyComplex_AsCComplex(b);
  return equal_bits(x.real, y.real) && equal_bits(x.imag, y.imag);
}

bool equal_slices(PyObject* a, PyObject* b) {
  auto *x = reinterpret_cast<PySliceObject*>(a), *y = reinterpret_cast<PySliceObject*>(b);
  return constants_equal(x->start, y->start) && constants_equal(x->stop, y->stop) &&
         constants_equal(x->step, y->step);
}

// Two ranges may be == and still differ in stop and step, which a program can read.
bool equal_ranges(PyObject* a, PyObject* b) {
  for (const char* part : {"start", "stop", "step"}) {
    PyObject* x = PyObject_GetAttrString(a, part);
    PyObject* y = PyObject_GetAttrString(b, part);
    bool equal = x && y && constants_equal(x, y);
    Py_XDECREF(x);
    Py_XDECREF(y);
    if (!equal) return false;
  }
  return true;
}

// Equality as the type's own C code sees it: exact static types only.
bool equal_natively(PyObject* a, PyObject* b) {
  int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) drop_error();
  return equal == 1;
}

bool torch_type_named(PyTypeObject* type, const char* name) {
  return !(type->tp_flags & Py_TPFLAGS_HEAPTYPE) && std::strcmp(type->tp_name, name) == 0;
}

enum class ConstantKind { none, single, number, text, real, complex, items, slice, range, native };

ConstantKind classify(PyTypeObject* type) {
  static const std::pair<PyTypeObject*, ConstantKind> KINDS[] = {
      {&PyUnicode_Type, ConstantKind::text},   {&PyLong_Type, ConstantKind::number},
      {&PyBool_Type, ConstantKind::single},    {Py_TYPE(Py_None), ConstantKind::single},
      {&PyFloat_Type, ConstantKind::real},     {&PyTuple_Type, ConstantKind::items},
      {&PyBytes_Type, ConstantKind::native},   {&PyComplex_Type, ConstantKind::complex},
      {&PySlice_Type, ConstantKind::slice},    {&PyRange_Type, ConstantKind::range},
      {&PyEllipsis_Type, ConstantKind::single}, {Py_TYPE(Py_NotImplemented), ConstantKind::single}};
  for (const auto& [known, kind] : KINDS) {
    if (type == known) return kind;
  }
  static const std::pair<const char*, ConstantKind> TORCH_KINDS[] = {
      {"torch.dtype", ConstantKind::native},  {"torch.device", ConstantKind::native},
      {"torch.layout", ConstantKind::native}, {"torch.memory_format", ConstantKind::native},
      {"torch.Size", ConstantKind::items}};
  for (const auto& [name, kind] : TORCH_KINDS) {
    if (torch_type_named(type, name)) return kind;
  }
  return ConstantKind::none;
}

}  // namespace

bool constants_equal(PyObject* expected, PyObject* actual) {
  if (expected == actual) return true;
  if (Py_TYPE(expected) != Py_TYPE(actual)) return false;
  switch (classify(Py_TYPE(expected))) {
    case ConstantKind::number:
    case ConstantKind::native: return equal_natively(expected, actual);
    case ConstantKind::text: return PyUnicode_Compare(expected, actual) == 0;
    case ConstantKind::real:
      return equal_bits(PyFloat_AS_DOUBLE(expected), PyFloat_AS_DOUBLE(actual));
    case ConstantKind::complex: return equal_complex(expected, actual);
    case ConstantKind::items: return equal_items(expected, actual);
    case ConstantKind::slice: return equal_slices(expected, actual);
    case ConstantKind::range: return equal_ranges(expected, actual);
    case ConstantKind::single:
    case ConstantKind::none: break;  // equal only when the same object
  }
  return false;
}

const char* constant_refusal(PyObject* operand) {
  switch (classify(Py_TYPE(operand))) {
    case ConstantKind::none: return Py_TYPE(operand)->tp_name;
    case ConstantKind::items:
      for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(operand); k++) {
        if (const char* why = constant_refusal(PyTuple_GET_ITEM(operand, k))) return why;
      }
      return nullptr;
    case ConstantKind::slice: {
      auto* parts = reinterpret_cast<PySliceObject*>(operand);
      for (PyObject* part : {parts->start, parts->stop, parts->step}) {
        if (const char* why = constant_refusal(part)) return why;
      }
      return nullptr;
    }
    default: return nullptr;
  }
}

void Pass::keep(PyObject* borrowed) {
  kept.push_back(Py_NewRef(is_inline(borrowed) ? inline_owner(borrowed) : borrowed));
}

void Pass::begin_python() {
  if (ran_python) return;
  ran_python = true;
  for (size_t k = 0; k < program.slots; k++) {
    if (slots[k]) keep(slots[k]);
  }
}

bool run_instruction(Pass& pass, const Instruction& i) {
  PyObject* in = pass.slots[i.in];
  if (!i.row().is_load) return run_check(pass, in, i);
  PyObject* value = run_load(pass, in, i);
  if (!value) return false;
  if (pass.ran_python) pass.keep(value);
  pass.slots[i.out] = value;
  return true;
}

}  // namespace accel
