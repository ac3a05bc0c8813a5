// The operation watch: a RecordFunction callback that sees every torch operation of
// one thread, whoever called it, and counts those that no trampoline announced.
//
// The callback runs inside the dispatcher, with or without the GIL: it must not touch
// Python, throw, or call an operation. Only outermost operations count: those that an
// operation calls in turn are its own business.
#include "tensors.h"

#include <ATen/record_function.h>

#include <cstring>

namespace accel {
namespace {

struct Watch {
  at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;
  long announced = 0;    // depth of announce_begin
  long depth = 0;        // operations running now
  long unannounced = 0;  // operations counted
  // A fixed array: the first name is copied without allocating in the callback.
  char first[128] = {0};
};

thread_local Watch watch;

// Operations are named "namespace::name". Other things are measured as well: the `apply` of an
// autograd.Function bears its class's name, and what its `forward` does counts by itself.
bool is_operation(const at::RecordFunction& function) {
  const char* name = function.name();
  return !name || std::strstr(name, "::") != nullptr;
}

std::unique_ptr<at::ObserverContext> on_begin(const at::RecordFunction& function) {
  if (!is_operation(function)) return nullptr;
  if (watch.depth++ == 0 && watch.announced == 0 && watch.unannounced++ == 0) {
    const char* name = function.name();
    size_t used = 0;
    for (; name && name[used] && used + 1 < sizeof watch.first; ++used) {
      watch.first[used] = name[used];
    }
    watch.first[used] = 0;
  }
  return nullptr;
}

void on_end(const at::RecordFunction& function, at::ObserverContext*) {
  if (!is_operation(function)) return;
  // An operation that began before the watch was restarted ends in the new watch.
  if (watch.depth > 0) --watch.depth;
}

void remove_callback() {
  if (watch.handle != at::INVALID_CALLBACK_HANDLE) {
    at::removeCallback(watch.handle);
    watch.handle = at::INVALID_CALLBACK_HANDLE;
  }
}

PyObject* py_start(PyObject*, PyObject*) {
  op_watch_start();
  Py_RETURN_NONE;
}

PyObject* py_stop(PyObject*, PyObject*) {
  auto [count, name] = op_watch_stop();
  if (count == 0) return Py_BuildValue("(lO)", count, Py_None);
  return Py_BuildValue("(ls)", count, name.c_str());
}

PyObject* py_announce_begin(PyObject*, PyObject*) {
  announce_begin();
  Py_RETURN_NONE;
}

PyObject* py_announce_end(PyObject*, PyObject*) {
  announce_end();
  Py_RETURN_NONE;
}

PyMethodDef METHODS[] = {
    {"op_watch_start", py_start, METH_NOARGS,
     "Start counting this thread's unannounced outermost torch operations."},
    {"op_watch_stop", py_stop, METH_NOARGS,
     "Stop counting; (count, name of the first or None)."},
    {"announce_begin", py_announce_begin, METH_NOARGS, "Operations from here are expected."},
    {"announce_end", py_announce_end, METH_NOARGS, "Ends the matching announce_begin."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void op_watch_start() {
  remove_callback();
  watch.depth = 0;
  watch.unannounced = 0;
  watch.first[0] = 0;
  watch.handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(on_begin, on_end).scopes({at::RecordScope::FUNCTION}));
}

std::pair<long, std::string> op_watch_stop() {
  remove_callback();
  return {watch.unannounced, watch.first};
}

long op_watch_count() { return watch.unannounced; }

void announce_begin() { ++watch.announced; }

void announce_end() {
  if (watch.announced > 0) --watch.announced;
}

int init_op_watch(PyObject* module) { return PyModule_AddFunctions(module, METHODS); }

}  // namespace accel
