// Autograd nodes over backward plans: what describes them, and how a call's outputs get theirs.
#pragma once

#include "native.h"

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace accel {

class Executor;

// Where a saved tensor is found: an input, or an output of the forward plan.
struct Place {
  bool output;
  uint32_t index;
};

// A visible tensor whose version eager's backward checks when a gradient arrives at one of
// the node outputs in `bits`. `position`: where it is among the saved ones, or -1.
struct Watched {
  Place place;
  uint64_t bits;
  int64_t position;
};

// Where the edges to inputs stand, see engine_order.h; kept from call to call, under the GIL.
struct EdgePlaces {
  std::vector<bool> leaves;
  std::shared_ptr<const std::vector<uint32_t>> places;
};

// Inputs to which the same outputs lead.
struct Group {
  uint64_t outputs;             // bits of node_outputs
  bool is_common;               // they are all there are
  std::vector<uint32_t> grads;  // places in Description::grads
  mutable EdgePlaces last;
};

// What the nodes of one component are made from. A Gradient and the nodes share it; it owns the
// executor's Python object and `recompute`, and whoever drops it last takes the GIL.
struct Description {
  PyObject* owner = nullptr;      // the backward's Executor object, owned
  PyObject* recompute = nullptr;  // owned
  const Executor* executor = nullptr;  // inside owner
  std::vector<std::string> names;  // of node_outputs: eager's names of what made them
  size_t output_count = 0;
  std::vector<uint32_t> node_outputs;  // user outputs whose history is the node
  std::vector<uint32_t> tangents;      // positions in node_outputs: the plan's last inputs
  std::vector<std::vector<uint32_t>> inner;  // by node output: those it was computed from
  std::vector<uint32_t> order;         // node outputs, each behind its inner ones
  std::vector<uint32_t> detached;      // user outputs that are aliases without history
  std::vector<uint32_t> grads;         // inputs that get a gradient, in the order of eager's visits
  std::vector<int64_t> results;        // by edge: which output of the plan, or -1
  std::vector<Place> saved;            // the plan's first inputs
  std::vector<Watched> watched;
  std::vector<bool> written;           // by input: the forward writes it
  std::vector<uint64_t> needs;         // by input: which of node_outputs are computed from it
  std::vector<bool> kept;              // by input: recomputing needs it held
  std::vector<bool> stale;             // by input: written, and what it held before is needed
  bool any_stale = false;
  std::vector<Group> groups;           // the inputs of `grads`; none where all outputs lead to all
  std::vector<uint32_t> common;        // places in `grads`: all of them, or none where there are groups
  std::vector<uint64_t> reach;         // by input of `grads`: which of node_outputs lead to it
  std::vector<uint64_t> freed_with;    // by node output: whose backward frees what its own needs
  std::vector<uint64_t> needed_for;    // by saved tensor: the gradients that its value counts for
  at::Tensor on_device;                // of a GPU's plan: an empty tensor there
  mutable EdgePlaces last;             // of `common`
  mutable std::atomic<long> runs{0}, recomputed{0};

  ~Description() {
    if (!owner && !recompute) return;
    if (!Py_IsInitialized()) return;  // the interpreter has gone: nothing can be dropped
    PyGILState_STATE state = PyGILState_Ensure();
    Py_XDECREF(owner);
    Py_XDECREF(recompute);
    PyGILState_Release(state);
  }
};

using Descriptions = std::vector<std::shared_ptr<const Description>>;

// An owning reference to a tensor that somebody else holds.
at::Tensor hold(c10::TensorImpl* impl);

// Gives the outputs of a forward run (user outputs, then what only backwards read) their history:
// nodes whose edges lead to `inputs` (borrowed), for each component. Only user outputs are left in
// `outputs`. `random_state`: of the generator before the run, for running it again; `before`: by
// input, what it held before the run wrote it, or nothing. Needs the GIL; throws.
void connect_components(const Descriptions& components, c10::TensorImpl* const* inputs,
                        size_t count, std::vector<at::Tensor>& outputs,
                        const at::Tensor& random_state, const std::vector<at::Tensor>& before);

}  // namespace accel
