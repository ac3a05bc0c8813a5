// Which guard checks, speculations and executors are to fail, and how many there were.
//
// A place has a number: how many of its kind came before it since force_failures(). It fails when
// its number is the chosen one, or when a hash of seed and number falls below the share.
#include "forced_failures.h"

#include <cstring>
#include <iterator>

namespace accel {

std::atomic<bool> forcing_failures{false};

namespace {

constexpr const char* NAMES[] = {"guard", "speculation", "executor"};

struct Orders {
  std::atomic<long> seen{0};
  std::atomic<long> failed{0};
  std::atomic<long> at{-1};      // the number of the place that fails; -1: none
  std::atomic<double> share{0};  // of the others
  std::atomic<uint64_t> seed{0};
};

Orders orders[std::size(NAMES)];
thread_local int unfailing = 0;

// Source: the finaliser of MurmurHash3 by Austin Appleby (public domain).
double hashed(uint64_t value) {
  value ^= value >> 33;
  value *= 0xff51afd7ed558ccdULL;
  value ^= value >> 33;
  value *= 0xc4ceb9fe1a85ec53ULL;
  value ^= value >> 33;
  return static_cast<double>(value >> 11) / static_cast<double>(1ULL << 53);
}

int kind_called(const char* name) {
  for (size_t k = 0; k < std::size(NAMES); k++) {
    if (std::strcmp(name, NAMES[k]) == 0) return static_cast<int>(k);
  }
  PyErr_Format(PyExc_ValueError, "a kind of failure is guard, speculation or executor, not %s", name);
  return -1;
}

PyObject* py_force(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"kind", "at", "share", "seed", nullptr};
  const char* name;
  long at = -1;
  double share = 0;
  unsigned long long seed = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s|ldK:force_failures", const_cast<char**>(names),
                                   &name, &at, &share, &seed)) {
    return nullptr;
  }
  int kind = kind_called(name);
  if (kind < 0) return nullptr;
  Orders& own = orders[kind];
  own.seen = 0;
  own.failed = 0;
  own.at = at;
  own.share = share;
  own.seed = seed;
  forcing_failures = true;
  Py_RETURN_NONE;
}

PyObject* py_stop(PyObject*, PyObject*) {
  forcing_failures = false;
  PyObject* counts = PyDict_New();
  for (size_t k = 0; counts && k < std::size(NAMES); k++) {
    Orders& own = orders[k];
    PyObject* pair = Py_BuildValue("(ll)", own.seen.load(), own.failed.load());
    if (!pair || PyDict_SetItemString(counts, NAMES[k], pair) < 0) Py_CLEAR(counts);
    Py_XDECREF(pair);
    own.seen = own.failed = 0;
    own.at = -1;
    own.share = 0;
  }
  return counts;
}

PyMethodDef METHODS[] = {
    {"force_failures", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_force)),
     METH_VARARGS | METH_KEYWORDS,
     "force_failures(kind, at=-1, share=0.0, seed=0): from now on the place number `at` of this "
     "kind fails, and of all others that share; kinds are guard, speculation, executor."},
    {"stop_failures", py_stop, METH_NOARGS,
     "Nothing fails any longer; {kind: (places met, failures forced)}."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

Unfailing::Unfailing() { ++unfailing; }

Unfailing::~Unfailing() { --unfailing; }

bool failure_is_due(Failure kind) {
  if (unfailing) return false;
  Orders& own = orders[static_cast<int>(kind)];
  long number = own.seen.fetch_add(1);
  double share = own.share.load();
  bool due = number == own.at.load() ||
             (share > 0 && hashed(own.seed.load() * 0x9e3779b97f4a7c15ULL +
                                  static_cast<uint64_t>(number) + 1) < share);
  if (due) own.failed.fetch_add(1);
  return due;
}

int init_forced_failures(PyObject* module) { return PyModule_AddFunctions(module, METHODS); }

}  // namespace accel
