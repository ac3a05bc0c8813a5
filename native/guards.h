// Guards: whether everything a recording relied on still holds, and the values found on
// the way. A program is a straight list of instructions over slots; see guard_program.h
// for the table.
//
// Everything here needs the GIL. Checking runs no Python code except that of CALL and of
// attributes that only Python code can compute; both happen with dispatch paused.
#pragma once

#include "native.h"
#include "pointers.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace accel {

extern PyObject* unbound;  // UNBOUND: in a tuple of roots, a root that is not bound

// The Python object accel._native.GuardProgram. Immutable for its users; keeps caches.
struct GuardProgram;

// The program inside `object` (borrowed), or nullptr when it is no GuardProgram.
GuardProgram* as_guard_program(PyObject* object);

// How many roots, and how many slots in all, the program has.
size_t root_count(const GuardProgram& program);
size_t slot_count(const GuardProgram& program);

// One check of one call; lives on the stack.
class GuardCheck {
 public:
  explicit GuardCheck(GuardProgram& program);
  ~GuardCheck();
  GuardCheck(const GuardCheck&) = delete;
  GuardCheck& operator=(const GuardCheck&) = delete;

  // Checks `count` roots, then `last` as one more root unless it is NULL. Roots are
  // borrowed and must stay alive until this object is gone; an unbound root is NULL.
  // A wrong number of roots does not hold. Leaves no Python error set.
  bool holds(PyObject* const* roots, size_t count, PyObject* last);

  // After holds() answered false: the instruction that failed (0 for a wrong number of
  // roots in an empty program).
  int failed() const { return failed_; }

  // After holds() answered true: the value of a slot, borrowed; NULL when the slot is
  // unbound or stands for attributes that have no dict. Valid until Python code runs, an
  // object is allocated (the garbage collector may run), the GIL is released, or the
  // program is checked again: take references first to what you need.
  PyObject* slot(size_t index) const;

  // Takes references to these slots (all of them when NULL) until this object is gone ...
  void hold_slots(const std::vector<int32_t>* which);
  // ... and makes the list of all slots, None where nothing is held or bound (new; NULL
  // with a Python error set on failure). Makes the dict of an object whose attributes lie
  // inline.
  PyObject* slot_list() const;

 private:
  friend class HeldSlots;

  bool full(const struct Roots& roots);

  GuardProgram& program_;
  PyObject** slots_ = nullptr;              // borrowed: the program's, a line's, or own_'s
  std::unique_ptr<PyObject*[]> own_;        // only when the program's memory is in use
  std::vector<PyObject*> kept_;             // owned references, dropped at the end
  std::vector<PyObject*> held_;             // per slot: owned, inline ones marked; or empty
  int failed_ = -1;
};

// What some slots of a check held, kept while the call runs.
class HeldSlots {
 public:
  // After holds() answered true. `which` must outlive this object.
  HeldSlots(const GuardCheck& check, const std::vector<int32_t>& which);
  ~HeldSlots();
  HeldSlots(const HeldSlots&) = delete;
  HeldSlots& operator=(const HeldSlots&) = delete;

  // What the k-th of `which` held, None where nothing is bound (new; NULL with a Python error
  // set on failure). Makes the dict of an object whose attributes lie inline.
  PyObject* object(size_t k) const;

 private:
  Pointers<PyObject*> values_;  // owned, inline ones marked
  size_t count_;
};

}  // namespace accel
