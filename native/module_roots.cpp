// Modules as roots: an entry for each nn.Module instance that is called.
//
// The prologue of nn.Module.__call__ comes here with (self, args, kwargs) for every module
// of a model, nested ones included, so finding the entry costs one probe of a hash table.
//
// The table maps a module's address to its entry. It holds the entry and a weak reference
// to the module; the weak reference's callback removes the row before the address can be
// used again (CPython clears weak references, and calls those that are reachable, before
// an object's memory is freed; this one is reachable from here). Everything needs the GIL.
#include "checkpoints.h"
#include "dispatch.h"
#include "entry.h"

#include <vector>

namespace accel {

PyObject* module_hook = nullptr;

namespace {

struct Row {
  PyObject* module = nullptr;  // address only; NULL: the row is free
  PyObject* entry = nullptr;   // owned; NULL: the module's type is denied
  PyObject* weak = nullptr;    // owned
};

long default_threshold = 2;
std::vector<PyObject*>* denied_types = nullptr;  // owned

// Open addressing with linear probing and no tombstones: removal moves rows back.
class Table {
 public:
  Table() : rows_(64) {}

  Row* find(PyObject* module) {
    for (size_t at = home(module);; at = next(at)) {
      if (rows_[at].module == module) return &rows_[at];
      if (!rows_[at].module) return nullptr;
    }
  }

  void add(Row row) {
    if (2 * (count_ + 1) > rows_.size()) grow();
    place(row);
    count_++;
  }

  // Takes the row out; the caller drops its references.
  Row remove(PyObject* module) {
    Row* found = find(module);
    if (!found) return Row();
    Row taken = *found;
    size_t hole = static_cast<size_t>(found - rows_.data());
    rows_[hole] = Row();
    count_--;
    for (size_t at = next(hole); rows_[at].module; at = next(at)) {
      size_t wanted = home(rows_[at].module);
      bool reaches = ((at - wanted) & mask()) >= ((at - hole) & mask());
      if (!reaches) continue;
      rows_[hole] = rows_[at];
      rows_[at] = Row();
      hole = at;
    }
    return taken;
  }

  size_t size() const { return count_; }
  std::vector<Row>& rows() { return rows_; }

 private:
  size_t mask() const { return rows_.size() - 1; }
  size_t next(size_t at) const { return (at + 1) & mask(); }
  size_t home(PyObject* module) const {
    return (reinterpret_cast<uintptr_t>(module) * 0x9E3779B97F4A7C15ull >> 32) & mask();
  }
  void place(Row row) {
    size_t at = home(row.module);
    while (rows_[at].module) at = next(at);
    rows_[at] = row;
  }
  void grow() {
    std::vector<Row> old(2 * rows_.size());
    old.swap(rows_);
    for (Row& row : old) {
      if (row.module) place(row);
    }
  }

  std::vector<Row> rows_;
  size_t count_ = 0;
};

Table* table = nullptr;

bool is_denied(PyTypeObject* type) {
  for (PyObject* denied : *denied_types) {
    if (PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(denied))) return true;
  }
  return false;
}

void drop(Row row) {
  Py_XDECREF(row.entry);
  Py_XDECREF(row.weak);
}

// The callback of a row's weak reference; `self` is the address as a number.
PyObject* module_died(PyObject* self, PyObject*) {
  drop(table->remove(static_cast<PyObject*>(PyLong_AsVoidPtr(self))));
  Py_RETURN_NONE;
}

PyMethodDef DIED = {"module_died", module_died, METH_O, nullptr};

PyObject* watch(PyObject* module) {
  PyObject* address = PyLong_FromVoidPtr(module);
  PyObject* callback = address ? PyCFunction_New(&DIED, address) : nullptr;
  PyObject* weak = callback ? PyWeakref_NewRef(module, callback) : nullptr;
  Py_XDECREF(address);
  Py_XDECREF(callback);
  return weak;
}

PyObject* entry_for(PyObject* module) {
  PyObject* name = PyUnicode_FromString(Py_TYPE(module)->tp_name);
  if (!name) return nullptr;
  Entry* entry = new_entry(name);
  Py_DECREF(name);
  if (entry) entry->threshold = default_threshold;
  return reinterpret_cast<PyObject*>(entry);
}

// The module's row, made at need; NULL with a Python error set.
Row* row_for(PyObject* module) {
  if (Row* found = table->find(module)) return found;
  Row row;
  row.module = module;
  row.weak = watch(module);
  if (!row.weak) return nullptr;
  if (!is_denied(Py_TYPE(module))) {
    row.entry = entry_for(module);
    if (!row.entry) {
      drop(row);
      return nullptr;
    }
  }
  // Making the objects may have run the garbage collector and, in it, other calls.
  if (table->find(module)) drop(row);
  else table->add(row);
  return table->find(module);
}

PyObject* first_call(PyObject* module, PyObject* const* args) {
  Row* row = row_for(module);
  if (!row) {  // no weak references, or no memory: such a module is no root
    PyErr_Clear();
    return answer_run_body();
  }
  if (!row->entry) return answer_run_body();
  return dispatch_call(reinterpret_cast<Entry*>(row->entry), args, 3, nullptr);
}

// module_prologue(self, args, kwargs)
PyObject* py_module_prologue(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "module_prologue() takes three arguments");
  bool again = must_serve_again();
  if (!module_hook) return answer_run_body();
  if (!again && (!dispatch_enabled || dispatch_paused())) return answer_run_body();
  Row* row = table->find(args[0]);
  if (__builtin_expect(!row, 0)) return first_call(args[0], args);
  auto* entry = reinterpret_cast<Entry*>(row->entry);
  if (!entry) return answer_run_body();
  if (entry->state == EntryState::off && !again) {
    entry->calls++;
    return answer_run_body();
  }
  return dispatch_call(entry, args, 3, nullptr);
}

PyObject* py_module_entry(PyObject*, PyObject* module) {
  Row* row = row_for(module);
  if (!row) return nullptr;
  return Py_NewRef(row->entry ? row->entry : Py_None);
}

PyObject* py_deny(PyObject*, PyObject* type) {
  if (!PyType_Check(type)) return PyErr_Format(PyExc_TypeError, "expected a type, not %R", type);
  denied_types->push_back(Py_NewRef(type));
  std::vector<PyObject*> dropped;
  for (Row& row : table->rows()) {
    if (!row.module || !row.entry || !is_denied(Py_TYPE(row.module))) continue;
    reinterpret_cast<Entry*>(row.entry)->state = EntryState::off;
    dropped.push_back(row.entry);
    row.entry = nullptr;
  }
  for (PyObject* entry : dropped) Py_DECREF(entry);
  Py_RETURN_NONE;
}

PyObject* py_set_hook(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"on_call", "threshold", nullptr};
  PyObject* hook;
  long threshold = default_threshold;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|l:set_module_hook", const_cast<char**>(names),
                                   &hook, &threshold)) {
    return nullptr;
  }
  default_threshold = threshold;
  PyObject* old = module_hook;
  module_hook = hook == Py_None ? nullptr : Py_NewRef(hook);
  Py_XDECREF(old);
  Py_RETURN_NONE;
}

PyObject* py_count(PyObject*, PyObject*) { return PyLong_FromSize_t(table->size()); }

PyMethodDef FUNCTIONS[] = {
    {"module_prologue", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_module_prologue)),
     METH_FASTCALL, "module_prologue(self, args, kwargs): the call's result, or RUN_BODY."},
    {"module_entry", py_module_entry, METH_O,
     "module_entry(module): its entry, made at need; None for denied types."},
    {"deny_module_type", py_deny, METH_O,
     "deny_module_type(type): modules of it and of its subclasses are no roots."},
    {"set_module_hook", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_set_hook)),
     METH_VARARGS | METH_KEYWORDS,
     "set_module_hook(on_call, threshold=2): who is asked about modules; None: nobody. "
     "Entries made from now on have this threshold."},
    {"module_entry_count", py_count, METH_NOARGS, "How many live modules are known."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int init_module_roots(PyObject* module) {
  table = new Table();
  denied_types = new std::vector<PyObject*>();
  return PyModule_AddFunctions(module, FUNCTIONS);
}

}  // namespace accel
