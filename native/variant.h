// Variants: one compiled form of a root, and when and how it serves a call.
// Shared by variant.cpp and dispatch.cpp only. Everything here needs the GIL.
#pragma once

#include "checkpoints.h"
#include "native.h"

#include <string>

namespace accel {

// The Python object accel._native.Variant. Immutable but for its counters.
struct Variant;

enum class Outcome {
  served,         // `result` is the call's result (new reference)
  guarded,        // ambient state or guards do not hold: try the next variant
  declined,       // they hold, but not where this call comes from: run the body
  skipped,        // they hold, but this call is to run the body (`eager_runs`)
  misspeculated,  // a speculation failed; nothing was committed: try the next variant
  failed,         // the executor failed, nothing was committed, see `why`: run the body
  raised,         // a Python error is set which the program must see
};

struct Serving {
  PyObject* result = nullptr;
  PyObject* landing = nullptr;  // the variant's (borrowed), NULL unless it is a node's
  std::string why;
  CheckpointRun run = CheckpointRun::none;
  bool draws_again = true;  // in a checkpoint's second run, the same random numbers
};

// True for a Variant.
bool is_variant(PyObject* object);

// Serves a call with these roots (borrowed, alive for the call; `last` may be NULL).
// `variant` must stay alive for the call.
Outcome serve(Variant* variant, PyObject* const* roots, size_t count, PyObject* last,
              Serving& serving);

// True once, when the variant has served as many calls as its `review_at` says.
bool review_due(Variant* variant);

// True once, when so many speculations of the variant have failed as its `doubt_at` says.
bool doubt_due(Variant* variant);

// How often the executor of this variant failed.
long error_count(const Variant* variant);

// ---- called by init_dispatch ---------------------------------------------------------

int init_variant(PyObject* module);

}  // namespace accel
