// Forced failures: a test makes chosen guard checks, speculations and executors fail, as if they
// had; the program's answers must not change by that. Nothing of it happens unless it is asked for.
#pragma once

#include "native.h"

#include <atomic>

namespace accel {

enum class Failure { guard, speculation, executor };

// True while some failures are to be forced, or their places counted.
extern std::atomic<bool> forcing_failures;

// Whether the present place of this kind fails; counts it. Any thread, with or without the GIL.
bool failure_is_due(Failure kind);

inline bool must_fail(Failure kind) {
  return __builtin_expect(forcing_failures.load(std::memory_order_relaxed), 0) &&
         failure_is_due(kind);
}

// While one of these lives on a thread nothing fails there, and no place counts: where a failure is
// an error by design.
class Unfailing {
 public:
  Unfailing();
  ~Unfailing();
  Unfailing(const Unfailing&) = delete;
  Unfailing& operator=(const Unfailing&) = delete;
};

}  // namespace accel
