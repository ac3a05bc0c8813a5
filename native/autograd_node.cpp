// Autograd nodes over backward plans.
//
// A node serves what its plan was compiled for: first derivatives, with gradients arriving at
// the outputs that were expected to get one. Anything else (create_graph, another set of
// gradients, a plan that fails) goes to `recompute`, which runs the recorded operations
// eagerly on the same inputs and differentiates those.
//
// Outputs whose backwards have nothing in common in eager have nothing in common here: each such
// component has its own node (or nodes), plan and saved tensors, and is freed by itself.
//
// Within a component, the engine walks where eager's would, whatever output a backward begins at:
//   gate    one for each output, which is its history. Behind it the gates of the outputs that this
//           one was computed from (inner ones), the component's PlanBackward, and tails.
//   tail    one for each set of outputs that lead to some inputs: leads to these. The PlanBackward
//           itself leads to the tail of what all outputs lead to, or, if that is everything, to the
//           inputs.
// Gates put the gradients that arrive down for the PlanBackward, which runs one plan for all of them
// and puts down what the tails give on. Where somebody asks for the gradient at an inner output
// (a hook, retain_grad, torch.autograd.grad), the gates above it run the forward again for their own
// part instead, so that the engine gathers there what eager's gathers. A component with one output
// needs none of this: its PlanBackward is the history.
//
// Ownership: a node owns what it saved until release_variables. Visible tensors are SavedVariables,
// so that their versions are checked; values that only the plans know are plain tensors.
#include "autograd_node.h"

#include "engine_order.h"
#include "executor.h"
#include "plan.h"
#include "run_errors.h"
#include "tensors.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_hook.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <ATen/SequenceNumber.h>
#include <ATen/ops/add.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/input_metadata.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <type_traits>
#include <typeinfo>

namespace accel {

at::Tensor hold(c10::TensorImpl* impl) {
  return at::Tensor(
      c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::unsafe_reclaim_from_nonowning(
          impl));
}

namespace {

using torch::autograd::edge_list;
using undefined_input = torch::autograd::Node::undefined_input;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
// intrusive_ptr since torch 2.13, shared_ptr before.
using NodePointer = decltype(torch::autograd::Edge::function);

// Templates, so that only the branch for this torch is compiled.
template <typename Node>
NodePointer pointer_to(Node* node) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) return node->getptr();
  else return node->shared_from_this();
}

template <typename Node>
NodePointer owning_pointer(std::unique_ptr<Node> node) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) {
    return c10::intrusive_ptr<Node>::unsafe_steal_from_new(node.release());
  } else {
    return NodePointer(node.release(), [](auto* last) { deleteNode(last); });
  }
}

// An input as `recompute` wants it: the tensor itself, or weakly what eager would not hold.
struct Remembered {
  at::Tensor strong;
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> weak;
  uint32_t version = 0;
  bool has_version = false;
  bool is_copy = false;

  // What the input held before the run has written it, which nobody else can change.
  explicit Remembered(at::Tensor copy)
      : strong(std::move(copy)), weak(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()),
        is_copy(true) {}

  Remembered(const at::Tensor& tensor, bool keep)
      : weak(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()) {
    has_version = !tensor.is_inference();
    if (has_version) version = tensor.unsafeGetTensorImpl()->version_counter().current_version();
    if (keep) strong = tensor;
    else weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(
        tensor.getIntrusivePtr());
  }

  at::Tensor get() const {
    if (strong.defined()) return strong;
    return at::Tensor(weak.lock());
  }
};

PyObject* tensor_list(const std::vector<at::Tensor>& tensors);
[[noreturn]] void throw_python_error();

// What the nodes of one component hand to each other in one run of the engine.
struct Pass {
  explicit Pass(const Description& d) : arrived(d.node_outputs.size()), found(d.grads.size()) {}

  variable_list arrived;  // by node output
  variable_list found;    // by input of `grads`: what tails, and the PlanBackward, are to give on
  bool is_run = false;    // the plan has run for all that had arrived
};

class Passes : public std::enable_shared_from_this<Passes> {
 public:
  // That of the run that this thread is in.
  std::shared_ptr<Pass> now(const Description& d) {
    int task = torch::autograd::get_current_graph_task_id();
    std::lock_guard<std::mutex> lock(mutex_);
    auto& pass = passes_[task];
    if (!pass) {
      pass = std::make_shared<Pass>(d);
      torch::autograd::Engine::get_default_engine().queue_callback(
          [self = shared_from_this(), task] { self->forget(task); });
    }
    return pass;
  }

 private:
  void forget(int task) {
    std::shared_ptr<Pass> last;  // what it holds is dropped without the lock
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = passes_.find(task);
    if (found == passes_.end()) return;
    last = std::move(found->second);
    passes_.erase(found);
  }

  std::mutex mutex_;
  std::map<int, std::shared_ptr<Pass>> passes_;  // by the engine's run; guarded by mutex_
};

bool any_defined(const variable_list& grads) {
  for (const at::Tensor& grad : grads) {
    if (grad.defined()) return true;
  }
  return false;
}

void add_to(at::Tensor& sum, at::Tensor more) {
  if (!more.defined()) return;
  sum = sum.defined() ? at::add(sum, more) : std::move(more);
}

// Edges to inputs, placed so that the engine comes to leaves as in eager, and which of a
// component's inputs they lead to.
class Leads {
 public:
  // The inputs whose places in `grads` are given. Needs the GIL.
  Leads(const Description& d, const std::vector<uint32_t>& which, EdgePlaces& last,
        c10::TensorImpl* const* inputs)
      : which_(which) {
    std::vector<torch::autograd::Edge> edges;
    std::vector<bool> leaves;
    for (uint32_t i : which_) {
      at::Tensor input = hold(inputs[d.grads[i]]);
      edges.push_back(torch::autograd::impl::gradient_edge(input));
      leaves.push_back(!input.grad_fn());
    }
    if (!last.places || last.leaves != leaves) {
      last.places = std::make_shared<const std::vector<uint32_t>>(edge_places(leaves));
      last.leaves = std::move(leaves);
    }
    places_ = last.places;
    edges_.resize(edges.size());
    for (size_t i = 0; i < edges.size(); ++i) edges_[(*places_)[i]] = std::move(edges[i]);
  }

  edge_list edges() { return std::move(edges_); }

  // A node's results out of `found`, by input of `grads`; these are taken out.
  variable_list take(variable_list& found) const {
    variable_list results(which_.size());
    for (size_t i = 0; i < which_.size(); ++i) results[(*places_)[i]] = std::move(found[which_[i]]);
    return results;
  }

 private:
  const std::vector<uint32_t>& which_;  // the Description's
  std::shared_ptr<const std::vector<uint32_t>> places_;
  edge_list edges_;
};

// What arrives at the node comes another way. Its input says only which thread of autograd runs it: that of
// its device, since leaves behind it are to be queued before one is visited (engine_order.h).
void take_no_gradient(torch::autograd::Node& node, const Description& description) {
  if (description.on_device.defined()) {
    node.add_input_metadata(description.on_device);
  } else {
    node.add_input_metadata(torch::autograd::Node::undefined_input{});
  }
}

// Runs a component's backward plan.
class PlanBackward : public torch::autograd::Node {
 public:
  PlanBackward(std::shared_ptr<const Description> description, c10::TensorImpl* const* inputs)
      : passes(std::make_shared<Passes>()),
        description_(std::move(description)),
        leads_(*description_, description_->common, description_->last, inputs) {
    set_next_edges(leads_.edges());
    // With more outputs than one, gates lead here, and what arrives comes by way of `passes`.
    if (description_->node_outputs.size() > 1) take_no_gradient(*this, *description_);
  }

  std::string name() const override { return description_->names[0]; }

  const std::shared_ptr<Passes> passes;

  // Fills in what is saved; the outputs have their history already. No GIL needed.
  void save(c10::TensorImpl* const* inputs, size_t count, std::vector<at::Tensor>& outputs,
            const at::Tensor& random_state, const std::vector<at::Tensor>& before) {
    random_state_ = random_state;
    const Description& d = *description_;
    saved_.reserve(d.saved.size());
    is_hooked_ = at::SavedTensorDefaultHooks::get_hooks().has_value();
    for (const Place& place : d.saved) saved_.push_back(save_one(place, inputs, outputs));
    if (is_hooked_) return hook_inputs(inputs, count);
    watched_.reserve(d.watched.size());
    for (const Watched& watched : d.watched) {
      watched_.push_back(watched.position < 0 ? save_one(watched.place, inputs, outputs) : Saved());
    }
    inputs_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      if (d.stale[i] && i < before.size() && before[i].defined()) {
        inputs_.emplace_back(before[i]);
        continue;
      }
      at::Tensor input = hold(inputs[i]);
      // Autograd holds a leaf anyway.
      bool keep = d.kept[i] && !(input.requires_grad() && !input.grad_fn());
      inputs_.emplace_back(input, keep);
    }
  }

  variable_list apply(variable_list&& arriving) override {
    variable_list results = run_node(std::move(arriving));
    if (is_hooked_) forget_unpacked();
    return results;
  }

  variable_list run_node(variable_list&& arriving) {
    const Description& d = *description_;
    if (d.node_outputs.size() == 1) {
      variable_list found = gradients(std::move(arriving));
      return leads_.take(found);
    }
    std::shared_ptr<Pass> pass = passes->now(d);
    variable_list found = gradients(variable_list(pass->arrived));
    for (size_t i = 0; i < found.size(); ++i) add_to(pass->found[i], std::move(found[i]));
    pass->is_run = true;
    if (!d.groups.empty()) return variable_list(num_outputs());
    return leads_.take(pass->found);
  }

  // By input of `grads`, for gradients by node output.
  variable_list gradients(variable_list grads) {
    const Description& d = *description_;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      running_ = arrived(grads);
    }
    if (!any_defined(grads)) return variable_list(d.grads.size());
    if (c10::GradMode::is_enabled()) return recompute(grads);
    variable_list result;
    if (expected(grads)) {
      return run_backward(grads, arrived(grads), false, result) ? result : recompute(grads);
    }
    variable_list whole = grads;
    if (!complete(whole) || !run_backward(whole, arrived(grads), true, result)) {
      return recompute(grads);
    }
    for (size_t i = 0; i < result.size(); ++i) {
      if (!(d.reach[i] & arrived(grads))) result[i] = at::Tensor();
    }
    return result;
  }

  // The compiled backward. With `filled` gradients it answers only if all it gives is finite:
  // a zero times an infinity would not be what eager, which leaves the product out, gives. False
  // where it gives no answer.
  bool run_backward(const variable_list& grads, uint64_t bits, bool filled,
                    variable_list& result) {
    const Description& d = *description_;
    std::vector<at::Tensor> held = unpack_saved(bits);
    const Plan& plan = plan_of(*d.executor);
    if (filled && may_be_captured(plan)) return false;  // nobody may look at what it gives
    for (size_t k = 0; k < d.tangents.size(); ++k) {
      held.push_back(arranged(grads[d.tangents[k]], plan.inputs[d.saved.size() + k]));
    }
    std::vector<c10::TensorImpl*> impls(held.size());
    for (size_t i = 0; i < held.size(); ++i) impls[i] = held[i].unsafeGetTensorImpl();
    variable_list outputs;
    RunError why;
    RunStatus status;
    {
      pybind11::gil_scoped_acquire gil;
      status = run(*d.executor, impls.data(), impls.size(), outputs, why);
    }
    if (status == RunStatus::ok && filled) {
      for (const at::Tensor& output : outputs) {
        if (!at::isfinite(output).all().item<bool>()) status = RunStatus::misspeculated;
      }
    }
    if (status != RunStatus::ok) return false;
    d.runs.fetch_add(1, std::memory_order_relaxed);
    result.resize(d.grads.size());
    for (size_t i = 0; i < result.size(); ++i) {
      if (d.results[i] >= 0) result[i] = outputs[static_cast<size_t>(d.results[i])];
    }
    return true;
  }

  // The forward once more, by `recompute`. With `cut`, positions in node_outputs, these are where
  // the derivatives end: the answer has theirs first, then those of the inputs.
  variable_list recompute(const variable_list& grads, const std::vector<uint32_t>* cut = nullptr);

  // What is needed for outputs whose backward did not run, and which shares nothing that eager
  // would free with those that did, stays.
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    freed_ |= running_;
    for (size_t k = 0; k < description_->freed_with.size(); ++k) {
      if (!is_freed(k)) return;
    }
    for (Saved& saved : saved_) saved.reset();
    for (Saved& saved : watched_) saved.reset();
    inputs_.clear();
    hooked_inputs_.clear();
    unpacked_.clear();
  }

 private:
  struct Saved {
    SavedVariable variable;
    at::Tensor plain;
    bool visible = false;

    void reset() {
      if (visible) variable.reset_data();
      plain = at::Tensor();
    }
  };

  Saved save_one(const Place& place, c10::TensorImpl* const* inputs,
                 const std::vector<at::Tensor>& outputs) {
    Saved saved;
    if (!place.output) {
      saved.visible = true;
      saved.variable = SavedVariable(hold(inputs[place.index]), false);
    } else if (place.index < description_->output_count) {
      const at::Tensor& output = outputs[place.index];
      saved.visible = true;
      saved.variable = SavedVariable(output, output.requires_grad());
    } else if (is_hooked_) {
      saved.visible = true;
      saved.variable = SavedVariable(outputs[place.index], false);
    } else {
      saved.plain = outputs[place.index];
    }
    return saved;
  }

  // Under hooks nothing but leaves is held beside what these hold; versions are not checked, as in
  // eager.
  void hook_inputs(c10::TensorImpl* const* inputs, size_t count) {
    const Description& d = *description_;
    std::vector<bool> wanted(d.kept);
    for (const Watched& watched : d.watched) {
      if (!watched.place.output) wanted[watched.place.index] = true;
    }
    for (const Place& place : d.saved) {
      if (!place.output) wanted[place.index] = false;  // held already
    }
    for (size_t i = 0; i < count; ++i) {
      at::Tensor input = hold(inputs[i]);
      bool is_leaf = input.requires_grad() && !input.grad_fn();
      inputs_.emplace_back(input, false);
      if (wanted[i] && !is_leaf) {
        hooked_inputs_.emplace_back(i, SavedVariable(input, false));
      }
    }
  }

  // Everything that hooks hold, once in a run of the engine: they give each only once. The mutex is
  // held.
  void unpack_hooked() {
    int task = torch::autograd::get_current_graph_task_id();
    if (!is_hooked_ || (unpacked_for_ == task && task != -1)) return;
    const Description& d = *description_;
    const Plan& plan = plan_of(*d.executor);
    unpacked_.clear();
    for (size_t i = 0; i < saved_.size(); ++i) {
      at::Tensor tensor = saved_[i].variable.unpack(self());
      const Layout& layout = plan.inputs[i];
      TORCH_CHECK(tensor.scalar_type() == layout.dtype &&
                      tensor.sizes() == c10::IntArrayRef(layout.sizes) &&
                      (tensor.strides() == c10::IntArrayRef(layout.strides) || layout.numel == 0),
                  "accel: the hooks on saved tensors gave another tensor back than was saved");
      unpacked_.push_back(std::move(tensor));
    }
    for (auto& [i, variable] : hooked_inputs_) unpacked_.push_back(variable.unpack(self()));
    unpacked_for_ = task;
    if (task == -1) return;  // somebody calls the node
    torch::autograd::Engine::get_default_engine().queue_callback([node = self()] {
      static_cast<PlanBackward*>(node.get())->forget_unpacked();
    });
  }

  void forget_unpacked() {
    std::vector<at::Tensor> last;  // dropped without the lock
    std::lock_guard<std::mutex> lock(mutex_);
    last.swap(unpacked_);
    unpacked_for_ = -1;
  }

  // The input, if anything holds it. The mutex is held.
  at::Tensor input_at(size_t index) {
    at::Tensor input = inputs_[index].get();
    if (input.defined() || !is_hooked_) return input;
    for (size_t i = 0; i < saved_.size(); ++i) {
      const Place& place = description_->saved[i];
      if (!place.output && place.index == index) return unpacked_[i];
    }
    for (size_t i = 0; i < hooked_inputs_.size(); ++i) {
      if (hooked_inputs_[i].first == index) return unpacked_[saved_.size() + i];
    }
    return input;
  }

  bool expected(const variable_list& grads) const {
    const std::vector<uint32_t>& wanted = description_->tangents;
    c10::Device device = plan_of(*description_->executor).device;
    size_t next = 0;
    for (size_t k = 0; k < grads.size(); ++k) {
      bool want = next < wanted.size() && wanted[next] == k;
      if (want) ++next;
      if (grads[k].defined() != want) return false;
      if (want && (grads[k].layout() != at::kStrided || grads[k].device() != device ||
                   grads[k].is_conj() || grads[k].is_neg() ||
                   grads[k].key_set().has(c10::DispatchKey::Python))) {
        return false;
      }
    }
    return true;
  }

  // Gradients have arrived at fewer outputs than the plan takes: true after zeros stand for the
  // others. Rather so than by running the forward again, whose inputs the program may have changed
  // unseen (by way of `.data`); eager would use what it saved, and so does the plan.
  bool complete(variable_list& grads) {
    const Description& d = *description_;
    const Plan& plan = plan_of(*d.executor);
    variable_list whole = grads;
    for (size_t k = 0; k < d.tangents.size(); ++k) {
      at::Tensor& grad = whole[d.tangents[k]];
      const Layout& layout = plan.inputs[d.saved.size() + k];
      auto options = at::TensorOptions(layout.dtype).device(plan.device);
      if (!grad.defined()) grad = at::zeros(layout.sizes, options);
    }
    if (!expected(whole)) return false;
    pybind11::gil_scoped_acquire gil;
    PyObject* arguments[5] = {Py_NewRef(Py_None), tensor_list(grads), Py_NewRef(Py_False),
                              Py_NewRef(Py_None), Py_NewRef(Py_None)};
    PyObject* answer = arguments[1] ? PyObject_Vectorcall(d.recompute, arguments, 5, nullptr)
                                    : nullptr;
    for (PyObject* argument : arguments) Py_XDECREF(argument);
    if (!answer) throw_python_error();
    Py_DECREF(answer);
    grads = std::move(whole);
    return true;
  }

  // A gradient in the layout that the plan's kernels read.
  static at::Tensor arranged(const at::Tensor& grad, const Layout& layout) {
    if (grad.scalar_type() == layout.dtype && grad.sizes() == c10::IntArrayRef(layout.sizes) &&
        (grad.strides() == c10::IntArrayRef(layout.strides) || layout.numel == 0)) {
      return grad;
    }
    TORCH_CHECK(grad.sizes() == c10::IntArrayRef(layout.sizes), "a gradient has sizes ",
                grad.sizes(), ", its tensor has ", c10::IntArrayRef(layout.sizes));
    at::Tensor copy =
        at::empty_strided(layout.sizes, layout.strides, grad.options().dtype(layout.dtype));
    return copy.copy_(grad);
  }

  static uint64_t arrived(const variable_list& grads) {
    uint64_t bits = 0;
    for (size_t k = 0; k < grads.size(); ++k) bits |= uint64_t{grads[k].defined()} << k;
    return bits;
  }

  // Whether eager would have freed what the backward of node output `k` needs.
  bool is_freed(size_t k) const { return description_->freed_with[k] & freed_; }

  // Throws what eager's backward throws when a tensor it saved has been written since.
  void check_versions(uint64_t bits, bool saved_too) {
    for (size_t k = 0; k < description_->freed_with.size(); ++k) {
      TORCH_CHECK(!(bits >> k & 1) || !is_freed(k), torch::autograd::ERR_BACKWARD_TWICE);
    }
    unpack_hooked();
    for (size_t i = 0; i < watched_.size(); ++i) {
      const Watched& watched = description_->watched[i];
      if (!(watched.bits & bits)) continue;
      if (watched.position < 0) {
        watched_[i].variable.unpack(self());
      } else if (saved_too) {
        saved_[static_cast<size_t>(watched.position)].variable.unpack(self());
      }
    }
  }

  std::vector<at::Tensor> unpack_saved(uint64_t bits) {
    std::lock_guard<std::mutex> lock(mutex_);
    check_versions(bits, false);
    std::vector<at::Tensor> held;
    held.reserve(saved_.size() + description_->tangents.size());
    for (size_t i = 0; i < saved_.size(); ++i) {
      const Saved& saved = saved_[i];
      const Place& place = description_->saved[i];
      if (is_hooked_) {
        held.push_back(unpacked_[i]);
      } else if (!saved.visible) {
        held.push_back(saved.plain);
      } else if (at::Tensor input; !place.output && !(description_->needed_for[i] & bits) &&
                 (input = inputs_[place.index].get()).defined()) {
        held.push_back(std::move(input));  // whoever wrote to it since may: zeros meet it
      } else {
        held.push_back(saved.variable.unpack(self()));
      }
    }
    return held;
  }

  NodePointer self() { return pointer_to(static_cast<torch::autograd::Node*>(this)); }

  // The inputs for `recompute`, unchanged since the forward; else `*why` says what is wrong.
  // Throws what eager's backward would throw.
  std::vector<at::Tensor> unchanged_inputs(uint64_t bits, std::string* why) {
    std::lock_guard<std::mutex> lock(mutex_);
    check_versions(bits, true);
    std::vector<at::Tensor> inputs;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      at::Tensor input = input_at(i);
      if (input.defined() && !(description_->needs[i] & bits)) {
        inputs.push_back(std::move(input));  // whatever it holds
        continue;
      }
      bool changed =
          input.defined() && !inputs_[i].is_copy && !is_hooked_ &&
          (description_->stale[i] ||
           (inputs_[i].has_version && !description_->written[i] &&
            input.unsafeGetTensorImpl()->version_counter().current_version() !=
                inputs_[i].version));
      if (!input.defined() || changed) {
        *why = "accel: this backward needs " + name() + " to run again, but its input " +
               std::to_string(i) +
               (changed ? " has been modified by an inplace operation since"
                        : " does not exist any more") +
               "; call the function once more, it runs eagerly from now on";
      }
      inputs.push_back(std::move(input));
    }
    return inputs;
  }

  const std::shared_ptr<const Description> description_;
  Leads leads_;
  std::vector<Saved> saved_, watched_;  // guarded by mutex_
  std::vector<Remembered> inputs_;      // guarded by mutex_
  bool is_hooked_ = false;              // what is saved went to somebody's hooks
  std::vector<std::pair<size_t, SavedVariable>> hooked_inputs_;  // guarded by mutex_
  // What the hooks gave back for `saved_` and `hooked_inputs_` in one run of the engine.
  std::vector<at::Tensor> unpacked_;    // guarded by mutex_
  int unpacked_for_ = -1;               // that run
  uint64_t running_ = 0, freed_ = 0;    // node outputs, as bits; guarded by mutex_
  at::Tensor random_state_;
};

PyObject* tensor_list(const std::vector<at::Tensor>& tensors) {
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(tensors.size()));
  for (size_t i = 0; list && i < tensors.size(); ++i) {
    PyObject* item = tensors[i].defined() ? wrap(tensors[i]) : Py_NewRef(Py_None);
    if (item) PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), item);
    else Py_CLEAR(list);
  }
  return list;
}

[[noreturn]] void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

// A backward that nothing can serve; the callable hears of it too: the root is eager from now
// on. Holds the GIL.
[[noreturn]] void refuse(const Description& description, const std::string& why) {
  PyObject* answer = PyObject_CallFunction(description.recompute, "OOsOO", Py_None, Py_None,
                                           why.c_str(), Py_None, Py_None);
  if (!answer) throw_python_error();
  Py_DECREF(answer);
  TORCH_CHECK(false, why);
  std::abort();  // not reached
}

PyObject* number_list(const std::vector<uint32_t>* values) {
  if (!values) return Py_NewRef(Py_None);
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(values->size()));
  for (size_t i = 0; list && i < values->size(); ++i) {
    PyObject* item = PyLong_FromUnsignedLong((*values)[i]);
    if (item) PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), item);
    else Py_CLEAR(list);
  }
  return list;
}

// recompute(inputs, gradients, create_graph, random state, cut) -> gradients.
variable_list PlanBackward::recompute(const variable_list& grads,
                                      const std::vector<uint32_t>* cut) {
  std::string why;
  std::vector<at::Tensor> inputs = unchanged_inputs(arrived(grads), &why);
  description_->recomputed.fetch_add(1, std::memory_order_relaxed);
  pybind11::gil_scoped_acquire gil;
  if (!why.empty()) refuse(*description_, why);
  PyObject* arguments[5] = {tensor_list(inputs), tensor_list(grads),
                            Py_NewRef(c10::GradMode::is_enabled() ? Py_True : Py_False),
                            random_state_.defined() ? wrap(random_state_) : Py_NewRef(Py_None),
                            number_list(cut)};
  PyObject* answer = nullptr;
  if (arguments[0] && arguments[1] && arguments[3] && arguments[4]) {
    answer = PyObject_Vectorcall(description_->recompute, arguments, 5, nullptr);
  }
  for (PyObject* argument : arguments) Py_XDECREF(argument);
  inputs.clear();
  size_t count = description_->grads.size() + (cut ? cut->size() : 0);
  if (answer && (!PyList_Check(answer) || PyList_GET_SIZE(answer) != Py_ssize_t(count))) {
    Py_DECREF(answer);
    answer = PyErr_Format(PyExc_SystemError, "recompute gave something else than gradients");
  }
  if (!answer) throw_python_error();
  variable_list result(count);
  for (size_t i = 0; i < count; ++i) {
    PyObject* item = PyList_GET_ITEM(answer, static_cast<Py_ssize_t>(i));
    if (item != Py_None && is_tensor(item)) result[i] = unpack(item);
  }
  Py_DECREF(answer);
  return result;
}

// An output's history.
class Gate : public torch::autograd::Node {
 public:
  // `lowest` is owned by way of an edge, the first behind those to inner outputs.
  Gate(std::shared_ptr<const Description> description, uint32_t output, PlanBackward* lowest)
      : description_(std::move(description)), output_(output), lowest_(lowest) {}

  std::string name() const override { return description_->names[output_]; }

  variable_list apply(variable_list&& grads) override {
    const Description& d = *description_;
    const std::vector<uint32_t>& inner = d.inner[output_];
    variable_list results(num_outputs());
    if (!grads[0].defined()) return results;
    std::shared_ptr<Pass> pass = lowest_->passes->now(d);
    bool asked = false;
    for (size_t i = 0; i < inner.size(); ++i) asked = asked || is_asked_for(next_edge(i));
    if (!asked) {
      pass->arrived[output_] = std::move(grads[0]);
      return results;
    }
    variable_list own(d.node_outputs.size());
    own[output_] = std::move(grads[0]);
    variable_list found = lowest_->recompute(own, &inner);
    for (size_t i = 0; i < found.size(); ++i) {
      if (i < inner.size()) results[i] = std::move(found[i]);
      else add_to(pass->found[i - inner.size()], std::move(found[i]));
    }
    return results;
  }

 private:
  // Whether this backward shows anybody the gradient at the tensor that `edge` leads to.
  // UBSan's check of a downcast needs the type info of the hook, which torch does not export.
  __attribute__((no_sanitize("vptr"))) static bool is_asked_for(
      const torch::autograd::Edge& edge) {
    torch::autograd::Node* node = edge.function.get();
    if (const auto* running = torch::autograd::get_current_graph_task_exec_info()) {
      auto found = running->find(node);
      if (found != running->end() && found->second.captures_) {
        for (const auto& capture : *found->second.captures_) {
          if (static_cast<uint32_t>(capture.input_idx_) == edge.input_nr) return true;
        }
      }
    }
    if (!node->pre_hooks().empty() || !node->post_hooks().empty()) return true;
    if (node->retains_grad_hooks().count(edge.input_nr)) return true;
    for (const auto& hook : node->tensor_pre_hooks()) {
      using Hook = torch::autograd::PyFunctionTensorPreHook;
      const torch::autograd::FunctionPreHook& one = *hook;
      if (!strstr(typeid(one).name(), "PyFunctionTensorPreHook")) return true;
      if (static_cast<uint32_t>(static_cast<const Hook&>(one).value_idx) == edge.input_nr) return true;
    }
    return false;
  }

  const std::shared_ptr<const Description> description_;
  const uint32_t output_;
  PlanBackward* const lowest_;
};

// Gives on what the plan found for the inputs of one group.
class Tail : public torch::autograd::Node {
 public:
  Tail(std::shared_ptr<const Description> description, const Group& group, PlanBackward* lowest,
       c10::TensorImpl* const* inputs, uint64_t sequence_nr)
      : Node(sequence_nr),
        description_(std::move(description)),
        group_(group),
        passes_(lowest->passes),
        leads_(*description_, group.grads, group.last, inputs) {
    set_next_edges(leads_.edges());
    take_no_gradient(*this, *description_);
  }

  std::string name() const override { return description_->names[0]; }

  // The plan's node, which does not lead here.
  void keep(NodePointer lowest) { lowest_ = std::move(lowest); }

  variable_list apply(variable_list&&) override {
    const Description& d = *description_;
    std::shared_ptr<Pass> pass = passes_->now(d);
    if (!pass->is_run && lowest_) {
      // The engine does not need the plan's node, or came here first.
      auto* lowest = static_cast<PlanBackward*>(lowest_.get());
      variable_list own(d.node_outputs.size());
      for (size_t k = 0; k < own.size(); ++k) {
        if (group_.outputs >> k & 1) own[k] = pass->arrived[k];
      }
      variable_list found = lowest->gradients(std::move(own));
      for (uint32_t i : group_.grads) add_to(pass->found[i], std::move(found[i]));
    }
    return leads_.take(pass->found);
  }

 private:
  const std::shared_ptr<const Description> description_;
  const Group& group_;  // the Description's
  const std::shared_ptr<Passes> passes_;
  NodePointer lowest_;
  Leads leads_;
};

// An output whose history the node is must be no view of another tensor.
at::Tensor own_tensor(const at::Tensor& output) {
  if (!output.is_view()) return output;
  auto impl = output.unsafeGetTensorImpl()->shallow_copy_and_detach(
      /*version_counter=*/c10::VariableVersion(0), /*allow_tensor_metadata_change=*/true);
  return at::Tensor(std::move(impl));
}

// Gives a component's outputs their history. Returns the node that is to save tensors; its
// outputs own it.
PlanBackward* connect_component(const std::shared_ptr<const Description>& description,
                                c10::TensorImpl* const* inputs,
                                std::vector<at::Tensor>& outputs) {
  const Description& d = *description;
  for (uint32_t k : d.detached) outputs[k] = outputs[k].detach();
  // The engine takes younger nodes first: gates, then the plan's node, then tails, of these first
  // those to whose inputs eager comes first.
  std::vector<uint64_t> ages;
  for (size_t g = 0; g < d.groups.size(); ++g) {
    ages.push_back(at::sequence_number::get_and_increment());
  }
  auto owned = std::make_unique<PlanBackward>(description, inputs);
  PlanBackward* const lowest = owned.get();
  NodePointer node = owning_pointer(std::move(owned));
  if (d.node_outputs.size() == 1) {
    at::Tensor& output = outputs[d.node_outputs[0]];
    output = own_tensor(output);
    torch::autograd::set_history(output, node);
    return lowest;
  }
  std::vector<NodePointer> tails;
  for (const Group& group : d.groups) {
    auto tail = std::make_unique<Tail>(description, group, lowest, inputs, ages.back());
    ages.pop_back();
    tails.push_back(owning_pointer(std::move(tail)));
    if (group.is_common) lowest->add_next_edge({tails.back(), 0});
    else static_cast<Tail*>(tails.back().get())->keep(node);
  }
  for (uint32_t k : d.order) {
    edge_list edges;
    for (uint32_t inner : d.inner[k]) {
      edges.push_back(torch::autograd::impl::gradient_edge(outputs[d.node_outputs[inner]]));
    }
    edges.emplace_back(node, 0);
    for (size_t g = 0; g < tails.size(); ++g) {
      if (!d.groups[g].is_common && (d.groups[g].outputs >> k & 1)) edges.emplace_back(tails[g], 0);
    }
    NodePointer gate = owning_pointer(std::make_unique<Gate>(description, k, lowest));
    gate->set_next_edges(std::move(edges));
    at::Tensor& output = outputs[d.node_outputs[k]];
    output = own_tensor(output);
    torch::autograd::set_history(output, gate);
  }
  return lowest;
}

}  // namespace

void connect_components(const Descriptions& components, c10::TensorImpl* const* inputs,
                        size_t count, std::vector<at::Tensor>& outputs,
                        const at::Tensor& random_state, const std::vector<at::Tensor>& before) {
  std::vector<PlanBackward*> nodes;
  for (const auto& component : components) {
    nodes.push_back(connect_component(component, inputs, outputs));
  }
  // With all histories in place: what is saved of another component's output has none.
  for (PlanBackward* node : nodes) node->save(inputs, count, outputs, random_state, before);
  if (!components.empty()) outputs.resize(components[0]->output_count);
}

}  // namespace accel
