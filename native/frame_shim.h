// The eval-frame shim: while a thread records, frames without a twin are redirected to one.
#pragma once

#include "native.h"

namespace accel {

// Puts the shim in, for one more session; false where frames cannot be seen (the session counts all
// the same). Every call needs a `remove_shim`. Needs the GIL.
bool install_shim();
void remove_shim();

// True while the interpreter's frames are evaluated by neither CPython nor us: Dynamo is at work,
// or a debugger. Cheap; needs the GIL.
bool frames_are_anothers();

}  // namespace accel
