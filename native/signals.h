// Signal handlers of the program, kept out of code that is not the program's.
//
// Python runs the handlers of signals between two instructions of the main thread. Between two
// instructions of accel's own Python code they could do harm: an exception raised there would be
// taken for an error of ours, or leave a root locked for good; and what a handler changes while a
// call is recorded is no part of that call. So the main thread is not the main thread while one of
// these lives: handlers wait, and run at the program's own next instruction.
//
// Everything here needs the GIL. On other threads, and from CPython 3.12 on, it does nothing.
#pragma once

namespace accel {

class SignalHold {
 public:
  SignalHold();
  ~SignalHold();
  SignalHold(const SignalHold&) = delete;
  SignalHold& operator=(const SignalHold&) = delete;

 private:
  unsigned long held_;  // the main thread's number; 0 where another one holds already
};

// Whether a handler waits for the end of a hold of this thread.
bool signal_waits();

// Whether Python's cyclic garbage collector is running.
bool is_collecting();

}  // namespace accel
