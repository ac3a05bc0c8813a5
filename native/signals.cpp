// The main thread's number, which decides who may run the handlers of signals (source:
// _Py_ThreadCanHandleSignals, handle_signals and COMPUTE_EVAL_BREAKER of CPython 3.11).
#include "signals.h"

#include "native.h"

#if PY_VERSION_HEX < 0x030c0000
// The layouts are the same without C's atomics, which C++ does not have.
#undef HAVE_STD_ATOMIC
#undef _PyGC_FINALIZED
#define Py_BUILD_CORE 1
extern "C" {
#include "internal/pycore_runtime.h"
}

namespace accel {
namespace {

bool is_pending() { return _Py_atomic_load_relaxed(&_PyRuntime.ceval.signals_pending) != 0; }

}  // namespace

SignalHold::SignalHold() : held_(0) {
  unsigned long own = PyThread_get_thread_ident();
  if (_PyRuntime.main_thread != own) return;
  held_ = own;
  _PyRuntime.main_thread = 0;  // no thread has this number
}

SignalHold::~SignalHold() {
  if (!held_) return;
  _PyRuntime.main_thread = held_;
  _ceval_state& state = PyInterpreterState_Get()->ceval;
  if (!is_pending() && !_Py_atomic_load_relaxed(&state.pending.calls_to_do)) return;
  _Py_atomic_store_relaxed(&state.eval_breaker, 1);  // the program's next instruction looks
}

bool signal_waits() { return _PyRuntime.main_thread == 0 && is_pending(); }

bool is_collecting() { return PyInterpreterState_Get()->gc.collecting != 0; }

}  // namespace accel

#else

namespace accel {

SignalHold::SignalHold() : held_(0) {}
SignalHold::~SignalHold() { (void)held_; }
bool signal_waits() { return false; }
bool is_collecting() { return false; }

}  // namespace accel

#endif
