// accel._native.GuardProgram: parsing of instruction tuples, checking, explanations.
//
// Ownership: a program owns its operands. Constants, types, code and other operands are
// held strongly; the object of IS is held weakly when it can be (it is the user's), except
// for what is_code_like says. The example of TENSOR is not held at all.
#include "guards.h"

#include "cpython_compat.h"
#include "guard_program.h"

#include <algorithm>
#include <cstring>

namespace accel {

PyObject* unbound = nullptr;

namespace {

PyTypeObject* program_type = nullptr;
PyObject* missing = nullptr;  // MISSING: TYPE_ATTRS, the lookup finds nothing

// ---- parsing ---------------------------------------------------------------------------

const std::unordered_map<std::string, Op>& op_names() {
  static const std::unordered_map<std::string, Op> names = {
#define X(name, is_load, operand, line) {#name, Op::name},
      ACCEL_GUARD_OPS(X)
#undef X
  };
  return names;
}

bool fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  PyErr_FormatV(PyExc_ValueError, format, arguments);
  va_end(arguments);
  return false;
}

bool parse_key(Instruction& i, PyObject* operand) {
  i.operand = Py_NewRef(operand);
  if (PyUnicode_CheckExact(operand)) PyUnicode_InternInPlace(&i.operand);
  i.hash = PyObject_Hash(i.operand);
  return i.hash != -1;
}

bool parse_index(Instruction& i, PyObject* operand) {
  i.number = PyNumber_AsSsize_t(operand, PyExc_OverflowError);
  return i.number != -1 || !PyErr_Occurred();
}

bool parse_member(Instruction& i, PyObject* operand) {
  if (Py_TYPE(operand) != &PyMemberDescr_Type) {
    return fail("SLOT_MEMBER takes a member descriptor, not %R", operand);
  }
  i.operand = Py_NewRef(operand);
  return true;
}

// Objects that belong to a program's code and not to its data: holding them is harmless.
bool is_code_like(PyObject* object) {
  if (PyFunction_Check(object)) return !PyFunction_GET_CLOSURE(object);
  if (PyCFunction_Check(object)) {
    PyObject* self = PyCFunction_GET_SELF(object);
    return !self || PyModule_Check(self);
  }
  return PyType_Check(object) || PyModule_Check(object) || PyCode_Check(object);
}

bool parse_identity(Instruction& i, PyObject* operand) {
  if (!is_code_like(operand) && PyType_SUPPORTS_WEAKREFS(Py_TYPE(operand))) {
    i.operand = PyWeakref_NewRef(operand, nullptr);
    i.weak = i.operand != nullptr;
    if (i.weak) return true;
    PyErr_Clear();
  }
  i.operand = Py_NewRef(operand);
  return true;
}

bool parse_type(Instruction& i, PyObject* operand) {
  if (!PyType_Check(operand)) return fail("TYPE_IS takes a type, not %R", operand);
  i.operand = Py_NewRef(operand);
  return true;
}

bool parse_constant(Instruction& i, PyObject* operand) {
  if (const char* why = constant_refusal(operand)) {
    return fail("EQUALS cannot compare an object of type %s", why);
  }
  i.operand = Py_NewRef(operand);
  return true;
}

bool parse_keys(Instruction& i, PyObject* operand) {
  if (!PyTuple_CheckExact(operand)) return fail("DICT_KEYS takes a tuple of keys");
  i.operand = Py_NewRef(operand);
  return true;
}

bool parse_members(Instruction& i, PyObject* operand) {
  if (!PyFrozenSet_CheckExact(operand)) return fail("SET_EQUALS takes a frozenset");
  i.operand = Py_NewRef(operand);
  Py_ssize_t cursor = 0;
  PyObject* member;
  Py_hash_t hash;
  while (_PySet_NextEntry(operand, &cursor, &member, &hash)) i.members.emplace(hash, member);
  return true;
}

bool parse_attribute(Instruction& i, PyObject* pair) {
  if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2 ||
      !PyUnicode_CheckExact(PyTuple_GET_ITEM(pair, 0))) {
    return fail("TYPE_ATTRS takes (name, object) pairs, not %R", pair);
  }
  PyObject* name = Py_NewRef(PyTuple_GET_ITEM(pair, 0));
  PyUnicode_InternInPlace(&name);
  PyObject* value = PyTuple_GET_ITEM(pair, 1);
  i.attributes.push_back({name, value == missing ? nullptr : Py_NewRef(value)});
  return true;
}

bool parse_attributes(Instruction& i, PyObject* type, PyObject* pairs) {
  if (!PyType_Check(type)) return fail("TYPE_ATTRS takes a type, not %R", type);
  i.operand = Py_NewRef(type);
  i.mro = Py_XNewRef(reinterpret_cast<PyTypeObject*>(type)->tp_mro);
  i.metaclass = Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(type)));
  PyObject* sequence = PySequence_Fast(pairs, "TYPE_ATTRS takes a sequence of pairs");
  if (!sequence) return false;
  bool ok = true;
  for (Py_ssize_t k = 0; ok && k < PySequence_Fast_GET_SIZE(sequence); k++) {
    ok = parse_attribute(i, PySequence_Fast_GET_ITEM(sequence, k));
  }
  Py_DECREF(sequence);
  return ok;
}

// An example tensor, or what was captured of one when it still was as the guard wants it.
bool parse_tensor(GuardProgram* program, Instruction& i, PyObject* operand) {
  bool layout = i.op == Op::TENSOR;
  i.number = static_cast<Py_ssize_t>(program->metas->size());
  if (const TensorMetaGuard* captured = meta_guard_of(operand)) {
    program->metas->push_back(captured->with_layout(layout));
    return true;
  }
  std::string why;
  auto meta = TensorMetaGuard::capture(operand, {.layout = layout}, &why);
  if (!meta) return fail("%s cannot guard this tensor: %s", i.row().name, why.c_str());
  program->metas->push_back(std::move(*meta));
  return true;
}

bool parse_object(Instruction& i, PyObject* operand, PyObject* weak) {
  int is_weak = weak ? PyObject_IsTrue(weak) : 0;
  if (is_weak < 0) return false;
  i.weak = is_weak;
  i.operand = is_weak ? PyWeakref_NewRef(operand, nullptr) : Py_NewRef(operand);
  return i.operand != nullptr;
}

// `operands` are those after the in slot; their number was checked.
bool parse_operand(GuardProgram* program, Instruction& i, PyObject* const* operands,
                   Py_ssize_t count) {
  switch (i.row().operand) {
    case Operand::none: return true;
    case Operand::key: return parse_key(i, operands[0]);
    case Operand::index:
    case Operand::slot: return parse_index(i, operands[0]);
    case Operand::member: return parse_member(i, operands[0]);
    case Operand::object: return parse_object(i, operands[0], count > 1 ? operands[1] : nullptr);
    case Operand::identity: return parse_identity(i, operands[0]);
    case Operand::type: return parse_type(i, operands[0]);
    case Operand::constant: return parse_constant(i, operands[0]);
    case Operand::keys: return parse_keys(i, operands[0]);
    case Operand::members: return parse_members(i, operands[0]);
    case Operand::attrs: return parse_attributes(i, operands[0], operands[1]);
    case Operand::tensor: return parse_tensor(program, i, operands[0]);
    case Operand::name:
      if (!PyUnicode_CheckExact(operands[0])) return fail("%s takes a name", i.row().name);
      return parse_key(i, operands[0]);
    case Operand::callable:
      if (!PyCallable_Check(operands[0])) return fail("%s takes a callable", i.row().name);
      i.operand = Py_NewRef(operands[0]);
      return true;
  }
  return false;
}

std::pair<Py_ssize_t, Py_ssize_t> operand_counts(Operand operand) {
  switch (operand) {
    case Operand::none: return {0, 0};
    case Operand::object: return {1, 2};
    case Operand::attrs: return {2, 2};
    default: return {1, 1};
  }
}

bool parse_slots(const GuardProgram* program, Instruction& i, PyObject* row,
                 std::vector<bool>& defined) {
  Py_ssize_t out = PyNumber_AsSsize_t(PyTuple_GET_ITEM(row, 1), PyExc_OverflowError);
  Py_ssize_t in = PyNumber_AsSsize_t(PyTuple_GET_ITEM(row, 2), PyExc_OverflowError);
  if (PyErr_Occurred()) return false;
  bool has_input = i.op != Op::CONST_OBJECT && i.op != Op::TYPE_ATTRS;
  auto known = [&](Py_ssize_t slot) {
    return slot >= 0 && slot < static_cast<Py_ssize_t>(defined.size()) && defined[slot];
  };
  if (has_input && !known(in)) return fail("%s reads slot %zd before it is set", i.row().name, in);
  i.in = has_input ? static_cast<int32_t>(in) : 0;
  if (!i.row().is_load) {
    return out == -1 || fail("%s is a check and writes no slot", i.row().name);
  }
  if (out < static_cast<Py_ssize_t>(program->roots) || out >= (1 << 24) || known(out)) {
    return fail("%s cannot write slot %zd", i.row().name, out);
  }
  i.out = static_cast<int32_t>(out);
  if (static_cast<size_t>(out) >= defined.size()) defined.resize(out + 1, false);
  return true;
}

bool parse_instruction(GuardProgram* program, PyObject* row, std::vector<bool>& defined) {
  if (!PyTuple_Check(row) || PyTuple_GET_SIZE(row) < 3 ||
      !PyUnicode_Check(PyTuple_GET_ITEM(row, 0))) {
    return fail("an instruction is a tuple (name, out, in, ...), not %R", row);
  }
  const char* name = PyUnicode_AsUTF8(PyTuple_GET_ITEM(row, 0));
  if (!name) return false;
  auto found = op_names().find(name);
  if (found == op_names().end()) return fail("there is no guard instruction %s", name);
  // In the list from the start, so that the program frees what a failing parse leaves.
  program->instructions->emplace_back();
  Instruction& i = program->instructions->back();
  i.op = found->second;
  Py_ssize_t count = PyTuple_GET_SIZE(row) - 3;
  auto [least, most] = operand_counts(i.row().operand);
  if (count < least || count > most) return fail("%s: wrong number of operands: %R", name, row);
  if (!parse_slots(program, i, row, defined)) return false;
  if (!parse_operand(program, i, &PyTuple_GET_ITEM(row, 3), count)) return false;
  bool pair = i.row().operand == Operand::slot;
  if (pair && (i.number < 0 || i.number >= static_cast<Py_ssize_t>(defined.size()) ||
               !defined[i.number])) {
    return fail("%s compares with slot %zd before it is set", name, i.number);
  }
  if (i.out >= 0) defined[i.out] = true;
  return true;
}

bool parse_program(GuardProgram* program, PyObject* rows) {
  PyObject* sequence = PySequence_Fast(rows, "instructions must be a sequence");
  if (!sequence) return false;
  std::vector<bool> defined(program->roots, true);
  bool ok = true;
  program->instructions->reserve(static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence)));
  for (Py_ssize_t k = 0; ok && k < PySequence_Fast_GET_SIZE(sequence); k++) {
    ok = parse_instruction(program, PySequence_Fast_GET_ITEM(sequence, k), defined);
  }
  Py_DECREF(sequence);
  program->slots = std::max<size_t>(defined.size(), 1);
  return ok;
}

bool parse_stable(const GuardProgram* program, PyObject* stable, std::vector<int>& roots) {
  if (!stable || stable == Py_None) return true;
  PyObject* sequence = PySequence_Fast(stable, "stable_roots must be a sequence");
  if (!sequence) return false;
  bool ok = true;
  for (Py_ssize_t k = 0; ok && k < PySequence_Fast_GET_SIZE(sequence); k++) {
    Py_ssize_t root =
        PyNumber_AsSsize_t(PySequence_Fast_GET_ITEM(sequence, k), PyExc_OverflowError);
    ok = !PyErr_Occurred();
    // Slots of constant objects are stable by nature; only roots are to be named.
    if (ok && root >= 0 && root < static_cast<Py_ssize_t>(program->roots)) {
      roots.push_back(static_cast<int>(root));
    }
  }
  Py_DECREF(sequence);
  return ok;
}

// ---- the Python type -------------------------------------------------------------------

GuardProgram* self_of(PyObject* self) { return reinterpret_cast<GuardProgram*>(self); }

PyObject* program_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"instructions", "num_roots", "stable_roots", nullptr};
  PyObject *rows, *stable = nullptr;
  Py_ssize_t roots;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "On|O:GuardProgram", const_cast<char**>(names),
                                   &rows, &roots, &stable)) {
    return nullptr;
  }
  if (roots < 0) return PyErr_Format(PyExc_ValueError, "num_roots must not be negative");
  auto* program = reinterpret_cast<GuardProgram*>(type->tp_alloc(type, 0));
  if (!program) return nullptr;
  program->roots = static_cast<size_t>(roots);
  program->instructions = new std::vector<Instruction>();
  program->metas = new std::vector<TensorMetaGuard>();
  program->lines = new Lines();
  std::vector<int> wanted;
  if (!parse_program(program, rows) || !parse_stable(program, stable, wanted)) {
    Py_DECREF(program);
    return nullptr;
  }
  program->scratch = new PyObject*[program->slots]();
  program->lines->prepare(*program, wanted);
  return reinterpret_cast<PyObject*>(program);
}

int program_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  GuardProgram* program = self_of(self);
  if (program->instructions) {
    for (const Instruction& i : *program->instructions) {
      Py_VISIT(i.operand);
      Py_VISIT(i.mro);
      Py_VISIT(i.metaclass);
      for (const ExpectedAttribute& attribute : i.attributes) Py_VISIT(attribute.value);
    }
  }
  return program->lines ? program->lines->visit(visit, arg) : 0;
}

// The instructions go away as a whole, first: nothing can be checked with half of them.
int program_clear(PyObject* self) {
  GuardProgram* program = self_of(self);
  if (program->lines) program->lines->clear();
  std::vector<Instruction> dropped;
  if (program->instructions) dropped.swap(*program->instructions);
  program->roots = SIZE_MAX;  // no call has that many: nothing holds any more
  for (Instruction& i : dropped) {
    Py_XDECREF(i.operand);
    Py_XDECREF(i.mro);
    Py_XDECREF(i.metaclass);
    for (ExpectedAttribute& attribute : i.attributes) {
      Py_DECREF(attribute.name);
      Py_XDECREF(attribute.value);
    }
  }
  return 0;
}

void program_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  program_clear(self);
  GuardProgram* program = self_of(self);
  delete program->instructions;
  delete program->metas;
  delete program->lines;
  delete[] program->scratch;
  type->tp_free(self);
  Py_DECREF(type);
}

// Roots as Python gives them: a tuple, UNBOUND standing for an unbound one.
bool take_roots(PyObject* tuple, std::vector<PyObject*>& roots) {
  if (!PyTuple_Check(tuple)) {
    PyErr_SetString(PyExc_TypeError, "roots must be a tuple");
    return false;
  }
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(tuple); k++) {
    PyObject* root = PyTuple_GET_ITEM(tuple, k);
    roots.push_back(root == unbound ? nullptr : root);
  }
  return true;
}

PyObject* program_check(PyObject* self, PyObject* tuple) {
  std::vector<PyObject*> roots;
  if (!take_roots(tuple, roots)) return nullptr;
  GuardCheck check(*self_of(self));
  bool held = check.holds(roots.data(), roots.size(), nullptr);
  return PyLong_FromLong(held ? -1 : check.failed());
}

PyObject* program_slots(PyObject* self, PyObject* tuple) {
  std::vector<PyObject*> roots;
  if (!take_roots(tuple, roots)) return nullptr;
  GuardCheck check(*self_of(self));
  if (!check.holds(roots.data(), roots.size(), nullptr)) {
    return PyErr_Format(PyExc_ValueError, "instruction %d does not hold", check.failed());
  }
  check.hold_slots(nullptr);
  return check.slot_list();
}

std::string text_of(PyObject* object, const char* otherwise) {
  PyObject* repr = object ? PyObject_Repr(object) : nullptr;
  const char* text = repr ? PyUnicode_AsUTF8(repr) : nullptr;
  std::string result = text ? text : otherwise;
  Py_XDECREF(repr);
  PyErr_Clear();
  return result.size() > 120 ? result.substr(0, 117) + "..." : result;
}

std::string describe(const Instruction& i) {
  std::string text = i.row().name;
  text += " slot " + std::to_string(i.in);
  if (i.out >= 0) text += " -> slot " + std::to_string(i.out);
  switch (i.row().operand) {
    case Operand::index: return text + ": " + std::to_string(i.number);
    case Operand::slot: return text + ": slot " + std::to_string(i.number);
    case Operand::attrs:
      text += ": " + text_of(i.operand, "?");
      for (const auto& attribute : i.attributes) text += " " + text_of(attribute.name, "?");
      return text;
    default: break;
  }
  if (i.operand) {
    PyObject* object = i.weak ? weak_target(i.operand) : i.operand;
    Py_XINCREF(object);
    text += ": " + text_of(object, "an object that is gone");
    Py_XDECREF(object);
  }
  return text;
}

// What the instruction's input is instead, for a call with these roots.
std::string describe_actual(GuardProgram* program, const Instruction& i, GuardCheck& check,
                            const std::vector<PyObject*>& roots) {
  check.holds(roots.data(), roots.size(), nullptr);
  if (check.failed() < 0 || &(*program->instructions)[check.failed()] != &i) return "";
  PyObject* in = program->scratch[i.in];
  if (!in) return "; the slot is unbound";
  if (is_inline(in)) return "";
  Py_INCREF(in);
  std::string text;
  if (i.row().operand == Operand::tensor) {
    text = is_tensor(in) ? "; " + (*program->metas)[i.number].difference(in) : "; not a tensor";
  } else {
    text = std::string("; found a ") + Py_TYPE(in)->tp_name;
    if (!constant_refusal(in)) text += " " + text_of(in, "?");
  }
  Py_DECREF(in);
  return text;
}

PyObject* program_explain(PyObject* self, PyObject* args) {
  Py_ssize_t index;
  PyObject* tuple = nullptr;
  if (!PyArg_ParseTuple(args, "n|O:explain", &index, &tuple)) return nullptr;
  GuardProgram* program = self_of(self);
  if (index < 0 || index >= static_cast<Py_ssize_t>(program->instructions->size())) {
    return PyErr_Format(PyExc_IndexError, "there is no instruction %zd", index);
  }
  const Instruction& i = (*program->instructions)[static_cast<size_t>(index)];
  std::string text = describe(i);
  if (tuple && tuple != Py_None) {
    std::vector<PyObject*> roots;
    if (!take_roots(tuple, roots)) return nullptr;
    GuardCheck check(*program);
    text += describe_actual(program, i, check, roots);
  }
  return PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
}

PyObject* program_facts(PyObject* self, PyObject*) {
  GuardProgram* program = self_of(self);
  return Py_BuildValue("{s:n,s:n,s:n,s:n,s:l,s:l}", "roots",
                       static_cast<Py_ssize_t>(program->roots), "slots",
                       static_cast<Py_ssize_t>(program->slots), "instructions",
                       static_cast<Py_ssize_t>(program->instructions->size()), "lines",
                       static_cast<Py_ssize_t>(program->lines->count()), "line_hits",
                       program->lines->hits, "line_builds", program->lines->builds);
}

PyObject* program_records(PyObject* self, PyObject*) {
  PyObject* table = PyDict_New();
  for (const auto& [name, count] : self_of(self)->lines->describe()) {
    PyObject* number = table ? PyLong_FromLong(count) : nullptr;
    if (!number || PyDict_SetItemString(table, name.c_str(), number) < 0) Py_CLEAR(table);
    Py_XDECREF(number);
  }
  return table;
}

PyMethodDef METHODS[] = {
    {"records", program_records, METH_NOARGS, "What the lines consist of: {kind: how many}."},
    {"check", program_check, METH_O,
     "check(roots): -1 when everything holds, else the index of what does not."},
    {"slots", program_slots, METH_O, "slots(roots): the values found by a check that holds."},
    {"explain", program_explain, METH_VARARGS,
     "explain(index, roots=None): an instruction in words, and what it met."},
    {"facts", program_facts, METH_NOARGS, "Sizes, and how often lines were used and made."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot SLOTS[] = {
    {Py_tp_new, reinterpret_cast<void*>(program_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(program_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(program_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(program_clear)},
    {Py_tp_methods, METHODS},
    {Py_tp_doc, const_cast<char*>("GuardProgram(instructions, num_roots, stable_roots=())")},
    {0, nullptr},
};

PyType_Spec SPEC = {"accel._native.GuardProgram", sizeof(GuardProgram), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, SLOTS};

// {name: (is_load, how many operands at least)}: what accel.guards is compared with.
PyObject* op_table() {
  PyObject* table = PyDict_New();
  for (const OpRow& row : OPS) {
    PyObject* facts = table ? Py_BuildValue("(On)", row.is_load ? Py_True : Py_False,
                                            operand_counts(row.operand).first)
                            : nullptr;
    if (!facts || PyDict_SetItemString(table, row.name, facts) < 0) Py_CLEAR(table);
    Py_XDECREF(facts);
  }
  return table;
}

}  // namespace

// ---- one check -------------------------------------------------------------------------

GuardProgram* as_guard_program(PyObject* object) {
  return Py_TYPE(object) == program_type ? self_of(object) : nullptr;
}

size_t root_count(const GuardProgram& program) { return program.roots; }
size_t slot_count(const GuardProgram& program) { return program.slots; }

GuardCheck::GuardCheck(GuardProgram& program) : program_(program) {
  Py_INCREF(reinterpret_cast<PyObject*>(&program_));
}

GuardCheck::~GuardCheck() {
  for (PyObject* object : kept_) Py_DECREF(object);
  for (PyObject* value : held_) {
    if (value) Py_DECREF(is_inline(value) ? inline_owner(value) : value);
  }
  Py_DECREF(reinterpret_cast<PyObject*>(&program_));
}

bool GuardCheck::holds(PyObject* const* first, size_t count, PyObject* last) {
  Roots roots{first, count, last};
  failed_ = 0;
  if (roots.size() != program_.roots) return false;
  if (program_.active == 0) {
    Line* line = program_.lines->find(roots);
    if (line && program_.lines->holds(*line, program_, roots, kept_)) {
      slots_ = Lines::slots_of(*line);
      failed_ = -1;
      return true;
    }
  }
  return full(roots);
}

bool GuardCheck::full(const Roots& roots) {
  slots_ = program_.scratch;
  if (program_.active > 0) {
    own_ = std::make_unique<PyObject*[]>(program_.slots);
    slots_ = own_.get();
  }
  Pass pass{program_, slots_, kept_};
  auto walk = [&] {
    std::fill(slots_, slots_ + program_.slots, nullptr);
    for (size_t r = 0; r < program_.roots; r++) slots_[r] = roots.at(r);
    int index = 0;
    for (const Instruction& i : *program_.instructions) {
      if (!run_instruction(pass, i)) {
        failed_ = index;
        return false;
      }
      index++;
    }
    return true;
  };
  program_.active++;
  bool held = walk();
  program_.active--;
  if (held && pass.ran_python) {
    pass.confirming = true;
    pass.ran_python = false;
    held = walk();
  }
  if (!held) return false;
  failed_ = -1;
  if (program_.active == 0) program_.lines->remember(program_, pass, roots);
  return true;
}

PyObject* GuardCheck::slot(size_t index) const {
  PyObject* value = slots_[index];
  return is_inline(value) ? nullptr : value;
}

// What a slot's value is to Python: a new reference, or NULL with a Python error set.
static PyObject* object_in(PyObject* value) {
  if (!value) return Py_NewRef(Py_None);
  if (is_inline(value)) return PyObject_GenericGetDict(inline_owner(value), nullptr);
  return Py_NewRef(value);
}

void GuardCheck::hold_slots(const std::vector<int32_t>* which) {
  held_.assign(program_.slots, nullptr);
  auto hold = [&](size_t index) {
    PyObject* value = slots_[index];
    if (!value || held_[index]) return;
    Py_INCREF(is_inline(value) ? inline_owner(value) : value);
    held_[index] = value;
  };
  if (which) {
    for (int32_t index : *which) hold(static_cast<size_t>(index));
  } else {
    for (size_t index = 0; index < program_.slots; index++) hold(index);
  }
}

HeldSlots::HeldSlots(const GuardCheck& check, const std::vector<int32_t>& which)
    : values_(which.size()), count_(which.size()) {
  for (size_t k = 0; k < count_; k++) {
    PyObject* value = check.slots_[static_cast<size_t>(which[k])];
    if (value) Py_INCREF(is_inline(value) ? inline_owner(value) : value);
    values_[k] = value;
  }
}

HeldSlots::~HeldSlots() {
  for (size_t k = 0; k < count_; k++) {
    PyObject* value = values_[k];
    if (value) Py_DECREF(is_inline(value) ? inline_owner(value) : value);
  }
}

PyObject* HeldSlots::object(size_t k) const { return object_in(values_[k]); }

PyObject* GuardCheck::slot_list() const {
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(held_.size()));
  if (!list) return nullptr;
  for (size_t index = 0; index < held_.size(); index++) {
    PyObject* object = object_in(held_[index]);
    if (!object) {
      Py_DECREF(list);
      return nullptr;
    }
    PyList_SET_ITEM(list, static_cast<Py_ssize_t>(index), object);
  }
  return list;
}

// own_attribute(object, name): a new reference.
PyObject* py_own_attribute(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyUnicode_Check(args[1])) {
    return PyErr_Format(PyExc_TypeError, "own_attribute(object, name: str)");
  }
  if (!attributes_of(args[0]).possible) return Py_NewRef(unbound);
  PyObject* value = instance_attribute(args[0], args[1]);
  return Py_NewRef(value ? value : missing);
}

// class_attributes(type, names): [(name, value), ...], new references.
PyObject* py_class_attributes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyType_Check(args[0]) || !PyTuple_CheckExact(args[1])) {
    return PyErr_Format(PyExc_TypeError, "class_attributes(type, names: tuple[str, ...])");
  }
  auto* type = reinterpret_cast<PyTypeObject*>(args[0]);
  Py_ssize_t size = PyTuple_GET_SIZE(args[1]);
  PyObject* found = PyList_New(size);
  for (Py_ssize_t k = 0; found && k < size; k++) {
    PyObject* name = PyTuple_GET_ITEM(args[1], k);
    PyObject* value = PyUnicode_CheckExact(name) ? _PyType_Lookup(type, name) : nullptr;
    PyObject* pair = PyTuple_Pack(2, name, value ? value : missing);
    if (!pair) {
      Py_DECREF(found);
      return nullptr;
    }
    PyList_SET_ITEM(found, k, pair);
  }
  return found;
}

// class_lookup(type, name, default=None): a new reference.
PyObject* py_class_lookup(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 2 || count > 3 || !PyType_Check(args[0]) || !PyUnicode_CheckExact(args[1])) {
    return PyErr_Format(PyExc_TypeError, "class_lookup(type, name: str, default=None)");
  }
  PyObject* value = _PyType_Lookup(reinterpret_cast<PyTypeObject*>(args[0]), args[1]);
  return Py_NewRef(value ? value : count == 3 ? args[2] : Py_None);
}

// memo_result(link): a new reference.
PyObject* py_memo_result(PyObject*, PyObject* link) {
  PyObject* result = memo_result(link);
  return Py_NewRef(result ? result : missing);
}

PyMethodDef MODULE_METHODS[] = {
    {"memo_result", py_memo_result, METH_O,
     "memo_result(link): the value that a bounded functools.lru_cache keeps in it, or MISSING."},
    {"class_lookup", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_class_lookup)),
     METH_FASTCALL,
     "class_lookup(type, name, default=None): what the type has under the name along its MRO, "
     "without descriptors or metaclass."},
    {"class_attributes",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_class_attributes)), METH_FASTCALL,
     "class_attributes(type, names): what the type finds under each of them along its MRO, or "
     "MISSING."},
    {"own_attribute",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_own_attribute)), METH_FASTCALL,
     "own_attribute(object, name): what lies in its instance dict, which is not made for it; "
     "MISSING: no such entry; UNBOUND: its class gives no instance dict."},
    {nullptr, nullptr, 0, nullptr},
};

int init_guards(PyObject* module) {
  program_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&SPEC));
  missing = PyObject_CallNoArgs(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  unbound = PyObject_CallNoArgs(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  PyObject* table = op_table();
  if (!program_type || !missing || !unbound || !table) return -1;
  int status =
      PyModule_AddObjectRef(module, "GuardProgram", reinterpret_cast<PyObject*>(program_type));
  if (status == 0) status = PyModule_AddObjectRef(module, "MISSING", missing);
  if (status == 0) status = PyModule_AddObjectRef(module, "UNBOUND", unbound);
  if (status == 0) status = PyModule_AddObjectRef(module, "GUARD_OPS", table);
  Py_DECREF(table);
  if (status == 0) status = PyModule_AddFunctions(module, MODULE_METHODS);
  return status;
}

}  // namespace accel
