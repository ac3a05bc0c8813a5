// Guard programs inside: the instruction table, the parsed form, and the lines that make
// a repeated check fast. Shared by guards.cpp, guard_ops.cpp and guard_lines.cpp only.
#pragma once

#include "guards.h"
#include "tensors.h"

#include <cstdint>
#include <unordered_map>

namespace accel {

// Rules for whoever adds a row:
// 1. A load writes its out slot and fails when the step is impossible; a check writes
//    nothing. Neither may run Python code, allocate Python objects or release the GIL,
//    except the ones that go through Pass::run_python.
// 2. Whatever the input slot holds must be handled: nothing is implied by an earlier
//    instruction. The input may be unbound (NULL) or inline attributes (is_inline).
// 3. OPERAND says how the operand is given and kept: see parse_operand in guards.cpp.
// 4. LINE says what lines know when the instruction's input is the very object of the
//    last check: see the rules in guard_lines.cpp. When in doubt: run.
// 5. Add the row's case to run_instruction in guard_ops.cpp, and to accel.guards or
//    accel.sources its Python side; a test asserts that both sides agree.
//
//         NAME               IS_LOAD  OPERAND    LINE
#define ACCEL_GUARD_OPS(X)                                  \
  X(INSTANCE_DICT,       true,  none,      attributes)      \
  X(DICT_ITEM,           true,  key,       dict)            \
  X(LIST_ITEM,           true,  index,     reload)          \
  X(DEQUE_ITEM,          true,  index,     reload)          \
  X(TUPLE_ITEM,          true,  index,     fixed)           \
  X(CELL_CONTENTS,       true,  none,      reload)          \
  X(SLOT_MEMBER,         true,  member,    reload)          \
  X(CONST_OBJECT,        true,  object,    constant)        \
  X(FUNCTION_CODE,       true,  none,      reload)          \
  X(FUNCTION_DEFAULTS,   true,  none,      reload)          \
  X(FUNCTION_KWDEFAULTS, true,  none,      reload)          \
  X(FUNCTION_CLOSURE,    true,  index,     fixed)           \
  X(FUNCTION_GLOBALS,    true,  none,      fixed)           \
  X(BOUND_SELF,          true,  none,      fixed)           \
  X(BOUND_FUNC,          true,  none,      fixed)           \
  X(TYPE_OF,             true,  none,      reload)          \
  X(ATTR_GENERIC,        true,  name,      reload)          \
  X(IS,                  false, identity,  settled)         \
  X(TYPE_IS,             false, type,      type)            \
  X(EQUALS,              false, constant,  settled)         \
  X(DICT_ABSENT,         false, key,       dict)            \
  X(DICT_KEYS,           false, keys,      dict_order)      \
  X(LEN,                 false, index,     length)          \
  X(SET_EQUALS,          false, members,   run)             \
  X(SAME,                false, slot,      pair)            \
  X(NOT_SAME,            false, slot,      pair)            \
  X(TYPE_ATTRS,          false, attrs,     run)             \
  X(UNBOUND,             false, none,      run)             \
  X(BOUND,               false, none,      run)             \
  X(TENSOR,              false, tensor,    tensor)          \
  X(TENSOR_KIND,         false, tensor,    tensor)          \
  X(NO_OVERLAP,          false, slot,      run)             \
  X(CALL,                false, callable,  run)

enum class Op : uint8_t {
#define X(name, is_load, operand, line) name,
  ACCEL_GUARD_OPS(X)
#undef X
};

enum class Operand : uint8_t {
  none, key, index, member, object, name, identity, type, constant, keys, members, slot,
  attrs, tensor, callable
};

enum class LineRule : uint8_t {
  attributes, dict, reload, fixed, constant, settled, type, dict_order, length, run, pair, tensor
};

struct OpRow {
  const char* name;
  bool is_load;
  Operand operand;
  LineRule line;
};

constexpr OpRow OPS[] = {
#define X(name, is_load, operand, line) {#name, is_load, Operand::operand, LineRule::line},
    ACCEL_GUARD_OPS(X)
#undef X
};

struct ExpectedAttribute {
  PyObject* name;   // owned, interned
  PyObject* value;  // owned; NULL: the lookup finds nothing
};

struct Instruction {
  Op op;
  bool weak = false;            // operand is a weak reference to the object meant
  int32_t out = -1;
  int32_t in = 0;
  Py_ssize_t number = 0;        // an index, a length, a second slot, a tensor's number
  Py_hash_t hash = 0;           // of a key operand
  unsigned version = 0;         // TYPE_ATTRS: the type's version when the list held last
  PyObject* operand = nullptr;  // owned
  std::vector<ExpectedAttribute> attributes;
  PyObject* mro = nullptr;        // TYPE_ATTRS: the classes that are looked through; owned
  PyObject* metaclass = nullptr;  // TYPE_ATTRS: the class of the type; owned
  std::unordered_multimap<Py_hash_t, PyObject*> members;  // values are held by operand
  std::vector<char> table;  // SET_EQUALS: the set's table when its members held last

  const OpRow& row() const { return OPS[static_cast<size_t>(op)]; }
};

// ---- slots -----------------------------------------------------------------------------

// A slot may stand for the attributes of an object that has no dict (yet): the object's
// address with the lowest bit set. Such a slot answers DICT_* and LEN like the dict would.
inline bool is_inline(PyObject* slot) { return reinterpret_cast<uintptr_t>(slot) & 1; }
inline PyObject* inline_owner(PyObject* slot) {
  return reinterpret_cast<PyObject*>(reinterpret_cast<uintptr_t>(slot) & ~uintptr_t{1});
}
inline PyObject* inline_slot(PyObject* owner) {
  return reinterpret_cast<PyObject*>(reinterpret_cast<uintptr_t>(owner) | 1);
}

// ---- running ---------------------------------------------------------------------------

// One walk over instructions. Python code may run in the middle of it; from then on every
// value found is kept alive (`kept`), and the walk must be confirmed by a second one that
// reuses the first one's Python results and runs in one go.
struct Pass {
  struct Answer {
    PyObject* input;  // what the Python code was given
    PyObject* value;  // what it answered; NULL for a CALL, which answered True
  };

  const GuardProgram& program;
  PyObject** slots;
  std::vector<PyObject*>& kept;  // owned references
  std::unordered_map<const Instruction*, Answer> answers{};  // objects in it are in kept
  bool ran_python = false;
  bool confirming = false;  // the second walk: Python code must not run
  bool pure = false;        // an instruction that needs Python code fails

  void begin_python();            // keeps alive what the slots hold now
  void keep(PyObject* borrowed);  // adds a reference to `kept`
};

// True when the instruction holds. Clears Python errors.
bool run_instruction(Pass& pass, const Instruction& instruction);

// The entry `name` (a str) of an instance dict, borrowed; NULL: none. Makes no dict.
PyObject* instance_attribute(PyObject* object, PyObject* name);

// Type and value of two constants are equal, floats bit by bit, containers deeply.
bool constants_equal(PyObject* expected, PyObject* actual);
// nullptr, or why constants_equal cannot compare such an operand.
const char* constant_refusal(PyObject* operand);

// ---- lines -----------------------------------------------------------------------------

struct Line;

// The roots of a call: an array and, after it, one more (or NULL for none).
struct Roots {
  PyObject* const* first;
  size_t count;
  PyObject* last;

  size_t size() const { return count + (last ? 1 : 0); }
  PyObject* at(size_t i) const { return i < count ? first[i] : last; }
};

// The lines of a program, and what is learnt about which roots are worth a line.
class Lines {
 public:
  Lines();
  ~Lines();

  // Decides which roots name a line; `wanted` adds roots to those found by their use.
  void prepare(const GuardProgram& program, const std::vector<int>& wanted);

  // The line for these roots, or nullptr.
  Line* find(const Roots& roots);
  // True when everything in the line still holds; its slots are then complete.
  bool holds(Line& line, GuardProgram& program, const Roots& roots,
             std::vector<PyObject*>& kept);
  // After a full pass that held: makes or remakes the line of these roots.
  void remember(GuardProgram& program, const Pass& pass, const Roots& roots);

  static PyObject** slots_of(Line& line);
  int visit(visitproc visit, void* arg);
  // References it gives up go to `kept`, when given: dropping them may run Python code.
  void clear(std::vector<PyObject*>* kept = nullptr);
  size_t count() const { return lines_.size(); }
  // What the lines consist of: (kind of record, how many in all lines).
  std::vector<std::pair<std::string, long>> describe() const;

  long hits = 0, builds = 0;

 private:
  bool worthwhile(const Roots& roots, std::vector<PyObject*>& kept);

  std::vector<int> key_roots_;
  std::vector<int> root_changes_;      // per key root: builds in a row for another object
  std::vector<PyObject*> last_built_;  // addresses only, never dereferenced
  std::vector<std::unique_ptr<Line>> lines_;
  size_t last_ = 0;
  long skipped_ = 0;
};

struct GuardProgram {
  PyObject_HEAD
  size_t roots;
  size_t slots;
  std::vector<Instruction>* instructions;
  std::vector<TensorMetaGuard>* metas;
  Lines* lines;
  PyObject** scratch;  // slots of full passes
  int active;          // checks in which Python code runs right now
};

}  // namespace accel
