// Calls inside torch.utils.checkpoint(use_reentrant=False).
//
// What its function saves for the backward goes to hooks, which drop it; the backward runs the
// function again, and takes what is saved then, in order, for what was saved first. So a call has to
// be served in the second run exactly if it was in the first, by the same variant. What was served
// is written down beside the checkpoint's own frame (accel/checkpoints.py).
//
// Everything here needs the GIL and concerns the calling thread, unless it says otherwise.
#pragma once

#include "native.h"

#include <cstdint>

namespace accel {

enum class CheckpointRun : uint8_t { none, first, again };

// Which of its runs this thread is in, if the uppermost hooks on saved tensors are a checkpoint's.
CheckpointRun checkpoint_run();

// How many hooks on saved tensors there are; none counts where the uppermost are a checkpoint's.
uint64_t hooks_of_others();

// Whether a second run may need a call of any root at all, were it off by now.
bool checkpoints_are_logged();

// Whether this thread is in a second run, in which something was served the first time.
inline bool must_serve_again() {
  return checkpoints_are_logged() && checkpoint_run() == CheckpointRun::again;
}

// A first run: where a call is in it, for `log_served`, None where nothing is to be served any more;
// with *draws_again false where random numbers are others the second time. NULL with a Python error
// set.
PyObject* checkpoint_place(bool* draws_again);

// A first run: `variant` has served (None: nothing has) the call at this place of `callee`, the function whose frame
// asks, or else the entry of a module. False: error set.
bool log_served(PyObject* place, PyObject* callee, PyObject* variant);

// A first run, if this is one: from here on nothing is served, since calls come that are not logged.
void close_log();

// Whether the uppermost hooks are not the only ones.
bool is_within_other_hooks();

// A second run: the variant that has served this call (new reference), None, or NULL with an error
// set.
PyObject* served_before(PyObject* callee);

// Sets the error of a call that `name` (borrowed) was served and cannot be served again.
void cannot_serve_again(PyObject* name, const char* why);

}  // namespace accel
