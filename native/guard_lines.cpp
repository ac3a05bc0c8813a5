// Lines: the fast path of a guard program. A line remembers, for one set of root objects,
// the values found by a full check that held, and the shortest list of records whose
// holding implies that a full check would find the same again.
//
// Why no pointer in a line can dangle or be stale. A record is looked at only after all
// records before it held, and by then its pointers are known to be live:
//   LIVE   the slot's pointer was just read from a live holder (or is a root of this very
//          call) and equals the remembered one. The object is alive, but it may be another
//          one at the same address. So everything known about it is read again.
//   SAME   it is the very object of the full check. Either the program holds it, or it was
//          reached from a dict whose version is unchanged (or an immutable part of a SAME
//          object). A dict version is a number that no other state of any dict of the
//          interpreter ever has, so an equal version means: this dict, these contents;
//          and the dict has held its values alive all the time.
//   The rest is VOLATILE: loaded by the ordinary instruction each time.
// What can happen in between, and what notices:
//   obj.__dict__ = other, or the dict is made for inline attributes: the word in the
//     object that points to the dict is read again each time (AT_DICT, RELOAD);
//   obj.__class__ = other: TYPE, for every object whose class can be assigned; the word's
//     place depends on the class, so TYPE comes first. The line holds the class, so that
//     its address cannot come back as another one's;
//   a dict changes between split and combined tables, or grows: no address inside a dict
//     is remembered, and contents that did not change keep their version;
//   lists, sets, cells, slots, inline attributes, functions' defaults: no versions; read
//     again each time;
//   OrderedDict.move_to_end changes an order without a version: DICT_KEYS runs;
//   type attributes: TYPE_ATTRS compares the type's version itself;
//   Python code run by CALL and ATTR_GENERIC: it comes last, and then the whole line is
//     checked once more without running Python code.
// CPython 3.13 has no dict versions: there every dict is like a list.
//
// What changes at almost every call (a global loop variable, a step counter) would make
// its dict's version useless: after a few failures (`churn`) that dict's items are
// reloaded one by one, and an item that changes itself becomes volatile.
#include "guard_program.h"

#include "cpython_compat.h"

#include <algorithm>

namespace accel {
namespace {

constexpr size_t MAX_LINES = 128;         // per program; beyond it all are forgotten
constexpr int MAX_ROOT_CHANGES = 64;      // builds in a row before a root counts as volatile
constexpr long POOR_BUILDS = 256;         // builds beyond hits before building gets rare
constexpr long RARE = 64;                 // then every so many full checks
constexpr uint8_t CHURN_LIMIT = 3;        // failures of a slot before it is not trusted
constexpr long CALM_HITS = 64;            // hits after which earlier failures are forgiven

enum class Kind : int32_t { TYPE, AT_DICT, DICT, TENSOR, RELOAD, RUN };

// AT_DICT and DICT: object is the dict. RELOAD: object is the expected value.
struct Record {
  Kind kind;
  int32_t slot;
  PyObject* object = nullptr;
  union {
    PyTypeObject* type;
    PyObject** location;
    const TensorMetaGuard* meta;
    const Instruction* instruction;
  };
  uint64_t version = 0;
};

enum class Know : uint8_t { VOLATILE, LIVE, SAME, DEFERRED };

}  // namespace

struct Line {
  std::vector<PyObject*> key;     // addresses of the key roots, never dereferenced
  std::vector<PyObject*> slots;   // addresses; see the head of this file
  std::vector<Record> records;
  std::vector<const Instruction*> deferred;  // Python code and what depends on it
  std::vector<PyTypeObject*> types;          // owned
  std::vector<uint8_t> churn;                // failures per slot
  long hits_since_failure = 0;

  ~Line() {
    for (PyTypeObject* type : types) Py_DECREF(type);
  }
  void move_types(std::vector<PyObject*>& kept) {
    for (PyTypeObject* type : types) kept.push_back(reinterpret_cast<PyObject*>(type));
    types.clear();
  }
};

namespace {

bool can_change_class(PyTypeObject* type) {
  return (type->tp_flags & Py_TPFLAGS_HEAPTYPE) || PyType_IsSubtype(type, &PyModule_Type);
}

// Turns a full pass that just held into a line. Runs no Python code.
class Builder {
 public:
  Builder(const GuardProgram& program, const Pass& pass, Line& line)
      : program_(program), pass_(pass), line_(line), know_(program.slots, Know::VOLATILE),
        versioned_(program.slots, false), proven_(program.slots, false) {}

  void root(int slot) { know_[slot] = Know::LIVE; }

  void build() {
    for (const Instruction& i : *program_.instructions) step(i);
  }

 private:
  PyObject* value(int slot) const { return pass_.slots[slot]; }

  void emit_run(const Instruction& i) {
    Record record{Kind::RUN, i.in};
    record.instruction = &i;
    line_.records.push_back(record);
    if (i.out >= 0) know_[i.out] = Know::VOLATILE;
  }

  void emit_reload(const Instruction& i, Know known = Know::LIVE) {
    if (line_.churn[i.out] >= CHURN_LIMIT) return emit_run(i);
    Record record{Kind::RELOAD, i.out, value(i.out)};
    record.instruction = &i;
    line_.records.push_back(record);
    know_[i.out] = known;
  }

  void prove_type(int slot) {
    if (proven_[slot]) return;
    proven_[slot] = true;
    PyTypeObject* type = Py_TYPE(value(slot));
    if (know_[slot] == Know::SAME && !can_change_class(type)) return;
    Py_INCREF(type);
    line_.types.push_back(type);
    Record record{Kind::TYPE, slot, value(slot)};
    record.type = type;
    line_.records.push_back(record);
  }

  bool can_have_version(int slot) const {
    PyObject* dict = value(slot);
    return ACCEL_DICT_VERSIONS && !is_inline(dict) && PyDict_Check(dict) &&
           line_.churn[slot] < CHURN_LIMIT;
  }

  // True when the slot's dict is known to be unchanged, by a record made now if need be.
  bool ensure_version(int slot) {
    if (versioned_[slot]) return true;
    if (!can_have_version(slot)) return false;
    if (know_[slot] == Know::LIVE) prove_type(slot);  // it is a dict at all
    Record record{Kind::DICT, slot, value(slot)};
    record.location = nullptr;
    record.version = dict_version(value(slot));
    line_.records.push_back(record);
    know_[slot] = Know::SAME;
    return versioned_[slot] = true;
  }

  void step_attributes(const Instruction& i) {
    prove_type(i.in);
    Attributes found = attributes_of(value(i.in));
    if (!found.dict || !found.location || !can_have_version(i.out)) return emit_reload(i);
    Record record{Kind::AT_DICT, i.out, found.dict};
    record.location = found.location;
    record.version = dict_version(found.dict);
    line_.records.push_back(record);
    know_[i.out] = Know::SAME;
    versioned_[i.out] = true;
  }

  void step_dict(const Instruction& i) {
    if (ensure_version(i.in)) {
      if (i.out >= 0) know_[i.out] = Know::SAME;
    } else if (i.out >= 0) {
      emit_reload(i);
    } else {
      emit_run(i);
    }
  }

  void step_length(const Instruction& i) {
    PyObject* container = value(i.in);
    bool fixed = !is_inline(container) && PyTuple_Check(container) && know_[i.in] == Know::SAME;
    if (!fixed && !ensure_version(i.in)) emit_run(i);
  }

  // IS and EQUALS. A live object at the address of the operand is the operand, which the
  // program holds; so the slot's object is known for certain from here on.
  void step_settled(const Instruction& i) {
    if (know_[i.in] == Know::SAME) return;
    if (i.weak || value(i.in) != i.operand) return emit_run(i);
    know_[i.in] = Know::SAME;
  }

  void step_tensor(const Instruction& i) {
    Record record{Kind::TENSOR, i.in, value(i.in)};
    record.meta = &(*program_.metas)[static_cast<size_t>(i.number)];
    line_.records.push_back(record);
  }

  bool defer(const Instruction& i) {
    bool pair = i.row().operand == Operand::slot;
    bool needs_deferred = know_[i.in] == Know::DEFERRED ||
                          (pair && know_[i.number] == Know::DEFERRED);
    if (i.op == Op::TYPE_ATTRS || i.op == Op::CONST_OBJECT) needs_deferred = false;  // no input
    if (i.op != Op::CALL && !needs_deferred && !pass_.answers.count(&i)) return false;
    line_.deferred.push_back(&i);
    if (i.out >= 0) know_[i.out] = Know::DEFERRED;
    return true;
  }

  void step(const Instruction& i) {
    if (defer(i)) return;
    LineRule rule = i.row().line;
    if (rule == LineRule::constant) {
      if (i.weak) return emit_reload(i, Know::SAME);
      know_[i.out] = Know::SAME;
      return;
    }
    Know in = know_[i.in];
    if (rule == LineRule::run || in == Know::VOLATILE) return emit_run(i);
    switch (rule) {
      case LineRule::attributes: return step_attributes(i);
      case LineRule::dict_order:
        if (!is_inline(value(i.in)) && PyODict_Check(value(i.in))) return emit_run(i);
        return step_dict(i);
      case LineRule::dict: return step_dict(i);
      case LineRule::length: return step_length(i);
      case LineRule::tensor: return step_tensor(i);
      case LineRule::type: return prove_type(i.in);
      case LineRule::settled: return step_settled(i);
      case LineRule::pair:
        // Both addresses are the remembered ones, and both objects are alive.
        if (know_[i.number] == Know::VOLATILE) emit_run(i);
        return;
      case LineRule::fixed:
        if (in != Know::SAME) return emit_reload(i);
        know_[i.out] = Know::SAME;
        return;
      default: return emit_reload(i);
    }
  }

  const GuardProgram& program_;
  const Pass& pass_;
  Line& line_;
  std::vector<Know> know_;
  std::vector<bool> versioned_, proven_;
};

inline bool record_holds(const Record& r, Pass& pass) {
  switch (r.kind) {
    case Kind::TYPE: return Py_TYPE(r.object) == r.type;
    case Kind::AT_DICT:
      return *r.location == r.object && dict_version(r.object) == r.version;
    case Kind::DICT: return dict_version(r.object) == r.version;
    case Kind::TENSOR: return r.meta->check(r.object);
    case Kind::RELOAD:
      return run_instruction(pass, *r.instruction) && pass.slots[r.slot] == r.object;
    case Kind::RUN: return run_instruction(pass, *r.instruction);
  }
  return false;
}

void note_failure(Line& line, const Record& r) {
  if (line.hits_since_failure > CALM_HITS) std::fill(line.churn.begin(), line.churn.end(), 0);
  line.hits_since_failure = 0;
  bool versioned = r.kind == Kind::AT_DICT || r.kind == Kind::DICT;
  if (versioned || r.kind == Kind::RELOAD) {
    if (line.churn[r.slot] < 255) line.churn[r.slot]++;
  }
}

bool records_hold(Line& line, Pass& pass) {
  for (const Record& r : line.records) {
    if (__builtin_expect(!record_holds(r, pass), 0)) {
      note_failure(line, r);
      return false;
    }
  }
  return true;
}

bool deferred_hold(Line& line, Pass& pass) {
  for (const Instruction* i : line.deferred) {
    if (!run_instruction(pass, *i)) return false;
  }
  return true;
}

}  // namespace

Lines::Lines() = default;
Lines::~Lines() = default;

PyObject** Lines::slots_of(Line& line) { return line.slots.data(); }

void Lines::clear(std::vector<PyObject*>* kept) {
  std::vector<std::unique_ptr<Line>> dropped = std::move(lines_);
  lines_.clear();
  last_ = 0;
  for (auto& line : dropped) {
    if (kept) line->move_types(*kept);
  }
}

int Lines::visit(visitproc visit, void* arg) {
  for (auto& line : lines_) {
    for (PyTypeObject* type : line->types) Py_VISIT(type);
  }
  return 0;
}

std::vector<std::pair<std::string, long>> Lines::describe() const {
  static const char* const NAMES[] = {"type", "attributes", "dict", "tensor", "reload", "run"};
  std::unordered_map<std::string, long> counts;
  for (const auto& line : lines_) {
    for (const Record& r : line->records) {
      std::string name = NAMES[static_cast<int>(r.kind)];
      if (r.kind >= Kind::RELOAD) name += std::string(" ") + r.instruction->row().name;
      counts[name]++;
    }
    for (const Instruction* i : line->deferred) counts[std::string("deferred ") + i->row().name]++;
  }
  return {counts.begin(), counts.end()};
}

void Lines::prepare(const GuardProgram& program, const std::vector<int>& wanted) {
  std::vector<bool> keyed(program.roots, false);
  for (int root : wanted) keyed[root] = true;
  for (const Instruction& i : *program.instructions) {
    // A container as a root is mostly made for the call (args, kwargs); an object that
    // has attributes, a function or a bound method mostly is not.
    bool container = i.op == Op::TUPLE_ITEM || i.op == Op::LIST_ITEM || i.op == Op::DEQUE_ITEM ||
                     i.op == Op::DICT_ITEM ||
                     i.op == Op::CONST_OBJECT || i.op == Op::TYPE_OF;
    if (i.row().is_load && !container && static_cast<size_t>(i.in) < program.roots) {
      keyed[i.in] = true;
    }
  }
  for (size_t root = 0; root < program.roots; root++) {
    if (keyed[root]) key_roots_.push_back(static_cast<int>(root));
  }
  root_changes_.assign(key_roots_.size(), 0);
}

Line* Lines::find(const Roots& roots) {
  // Equal layers are called one after the other: try the last line, then the following.
  for (size_t tried = 0; tried < lines_.size(); tried++) {
    size_t at = last_ + tried;
    if (at >= lines_.size()) at -= lines_.size();
    Line& line = *lines_[at];
    bool found = true;
    for (size_t k = 0; found && k < key_roots_.size(); k++) {
      found = line.key[k] == roots.at(static_cast<size_t>(key_roots_[k]));
    }
    if (found) {
      last_ = at;
      return &line;
    }
  }
  return nullptr;
}

bool Lines::holds(Line& line, GuardProgram& program, const Roots& roots,
                  std::vector<PyObject*>& kept) {
  for (size_t r = 0; r < program.roots; r++) line.slots[r] = roots.at(r);
  Pass pass{program, line.slots.data(), kept};
  pass.pure = true;
  if (!records_hold(line, pass)) return false;
  if (!line.deferred.empty()) {
    // Every slot of the line is live now; from here on Python code may run. Meanwhile
    // other checks of this program keep off the lines.
    pass.pure = false;
    pass.ran_python = true;
    program.active++;
    bool held = deferred_hold(line, pass);
    program.active--;
    if (!held) return false;
    pass.confirming = true;
    pass.ran_python = false;
    pass.pure = true;
    for (size_t r = 0; r < program.roots; r++) line.slots[r] = roots.at(r);
    if (!records_hold(line, pass)) return false;
    pass.pure = false;
    if (!deferred_hold(line, pass)) return false;
  }
  line.hits_since_failure++;
  hits++;
  return true;
}

// Keeps programs from building lines that nobody will use again.
bool Lines::worthwhile(const Roots& roots, std::vector<PyObject*>& kept) {
  if (last_built_.size() == key_roots_.size()) {
    for (size_t k = 0; k < key_roots_.size(); k++) {
      bool changed = last_built_[k] != roots.at(static_cast<size_t>(key_roots_[k]));
      root_changes_[k] = changed && hits <= builds ? root_changes_[k] + 1 : 0;
      if (root_changes_[k] <= MAX_ROOT_CHANGES) continue;
      key_roots_.erase(key_roots_.begin() + static_cast<std::ptrdiff_t>(k));
      root_changes_.assign(key_roots_.size(), 0);
      clear(&kept);
      break;
    }
  }
  last_built_.clear();
  for (int root : key_roots_) last_built_.push_back(roots.at(static_cast<size_t>(root)));
  return builds - 2 * hits < POOR_BUILDS || ++skipped_ % RARE == 0;
}

void Lines::remember(GuardProgram& program, const Pass& pass, const Roots& roots) {
  if (!worthwhile(roots, pass.kept)) return;
  Line* line = find(roots);
  if (!line) {
    if (lines_.size() >= MAX_LINES) clear(&pass.kept);
    lines_.push_back(std::make_unique<Line>());
    last_ = lines_.size() - 1;
    line = lines_.back().get();
    line->key = last_built_;
    line->churn.assign(program.slots, 0);
  }
  builds++;
  line->slots.assign(pass.slots, pass.slots + program.slots);
  line->records.clear();
  line->deferred.clear();
  // Dropping a class may run Python code, so it waits until the check is over.
  line->move_types(pass.kept);
  Builder builder(program, pass, *line);
  for (int root : key_roots_) {
    if (roots.at(static_cast<size_t>(root))) builder.root(root);
  }
  builder.build();
}

}  // namespace accel
