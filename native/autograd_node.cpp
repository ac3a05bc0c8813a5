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
// Outputs that other outputs are computed from (inner ones) are where eager's backward gathers
// gradients, runs hooks and gives what it is asked for. So outputs lie in tiers: those of tier t
// depend on inner ones of tier t-1 and lower, and each tier has a node with edges to these, so
// that the engine runs what stands at them in eager's order. Where nobody asks for the gradient
// at an inner output, a tier's node hands what arrived to the tier below ("carries" it), and one
// plan serves the whole backward; else it runs the forward again, for its own part.
//
// Ownership: a node owns what it saved until release_variables. Visible tensors are SavedVariables,
// so that their versions are checked; values that only the plans know are plain tensors.
#include "autograd_node.h"

#include "engine_order.h"
#include "executor.h"
#include "plan.h"
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

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
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

// The node of one tier of outputs.
class TierNode : public torch::autograd::Node {
 public:
  TierNode(std::shared_ptr<const Description> description, size_t tier)
      : description_(std::move(description)), tier_(tier) {}

  std::string name() const override { return description_->names[members()[0]]; }

  // Takes gradients that arrived at outputs of higher tiers, for this run of the engine.
  void carry(variable_list grads) {
    std::lock_guard<std::mutex> lock(carried_mutex_);
    carried_.emplace_back(torch::autograd::get_current_graph_task_id(), std::move(grads));
  }

 protected:
  const std::vector<uint32_t>& members() const { return description_->tiers[tier_]; }

  // By position in node_outputs: what arrived here and what was carried.
  variable_list gathered(variable_list&& grads) {
    if (description_->tiers.size() == 1) return std::move(grads);
    variable_list all(description_->node_outputs.size());
    {
      std::lock_guard<std::mutex> lock(carried_mutex_);
      auto now = torch::autograd::get_current_graph_task_id();
      for (auto one = carried_.begin(); one != carried_.end(); ++one) {
        if (one->first != now) continue;
        all = std::move(one->second);
        carried_.erase(one);
        break;
      }
    }
    for (size_t i = 0; i < grads.size(); ++i) all[members()[i]] = std::move(grads[i]);
    return all;
  }

  static bool any_defined(const variable_list& grads) {
    for (const at::Tensor& grad : grads) {
      if (grad.defined()) return true;
    }
    return false;
  }

  const std::shared_ptr<const Description> description_;
  const size_t tier_;

 private:
  std::mutex carried_mutex_;
  std::vector<std::pair<int, variable_list>> carried_;  // by the engine's run
};

// The lowest tier's node.
class PlanBackward : public TierNode {
 public:
  explicit PlanBackward(std::shared_ptr<const Description> description)
      : TierNode(std::move(description), 0) {}

  // Fills in what is saved; the outputs have their history already. No GIL needed.
  void save(c10::TensorImpl* const* inputs, size_t count, std::vector<at::Tensor>& outputs,
            const at::Tensor& random_state, const std::vector<at::Tensor>& before) {
    random_state_ = random_state;
    const Description& d = *description_;
    saved_.reserve(d.saved.size());
    for (const Place& place : d.saved) saved_.push_back(save_one(place, inputs, outputs));
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
    variable_list found = gradients(std::move(arriving));
    variable_list result(found.size());
    for (size_t i = 0; i < found.size(); ++i) result[(*edge_of_)[i]] = std::move(found[i]);
    return result;
  }

  // The edges to `inputs`, placed so that the engine comes to leaves as in eager. Needs the GIL.
  edge_list place_edges(c10::TensorImpl* const* inputs) {
    const Description& d = *description_;
    std::vector<bool> leaves;
    std::vector<torch::autograd::Edge> edges;
    for (uint32_t i : d.grads) {
      at::Tensor input = hold(inputs[i]);
      edges.push_back(torch::autograd::impl::gradient_edge(input));
      leaves.push_back(!input.grad_fn());
    }
    if (!d.edge_of || d.leaves != leaves) {
      d.edge_of = std::make_shared<const std::vector<uint32_t>>(edge_places(leaves));
      d.leaves = std::move(leaves);
    }
    edge_of_ = d.edge_of;
    edge_list placed(edges.size());
    for (size_t i = 0; i < edges.size(); ++i) placed[(*edge_of_)[i]] = std::move(edges[i]);
    return placed;
  }

  // By input of `grads`.
  variable_list gradients(variable_list&& arriving) {
    const Description& d = *description_;
    variable_list grads = gathered(std::move(arriving));
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
    for (size_t k = 0; k < d.tangents.size(); ++k) {
      held.push_back(arranged(grads[d.tangents[k]], plan.inputs[d.saved.size() + k]));
    }
    std::vector<c10::TensorImpl*> impls(held.size());
    for (size_t i = 0; i < held.size(); ++i) impls[i] = held[i].unsafeGetTensorImpl();
    variable_list outputs;
    std::string why;
    RunStatus status;
    {
      pybind11::gil_scoped_acquire gil;
      status = run(*d.executor, impls.data(), impls.size(), outputs, &why);
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
    } else {
      saved.plain = outputs[place.index];
    }
    return saved;
  }

  bool expected(const variable_list& grads) const {
    const std::vector<uint32_t>& wanted = description_->tangents;
    size_t next = 0;
    for (size_t k = 0; k < grads.size(); ++k) {
      bool want = next < wanted.size() && wanted[next] == k;
      if (want) ++next;
      if (grads[k].defined() != want) return false;
      if (want && (grads[k].layout() != at::kStrided || !grads[k].device().is_cpu() ||
                   grads[k].is_conj() || grads[k].is_neg() ||
                   grads[k].key_set().has(c10::DispatchKey::Python))) {
        return false;
      }
    }
    return true;
  }

  // Gradients have arrived at fewer outputs than the plan takes, and the forward cannot run
  // again: true after zeros stand for the others.
  bool complete(variable_list& grads) {
    std::string why;
    unchanged_inputs(arrived(grads), &why);
    if (why.empty()) return false;
    const Description& d = *description_;
    const Plan& plan = plan_of(*d.executor);
    variable_list whole = grads;
    for (size_t k = 0; k < d.tangents.size(); ++k) {
      at::Tensor& grad = whole[d.tangents[k]];
      const Layout& layout = plan.inputs[d.saved.size() + k];
      if (!grad.defined()) grad = at::zeros(layout.sizes, at::TensorOptions(layout.dtype));
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
      if (!saved.visible) {
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
      at::Tensor input = inputs_[i].get();
      if (input.defined() && !description_->needs[i]) {
        inputs.push_back(std::move(input));  // whatever it holds
        continue;
      }
      bool changed =
          input.defined() && !inputs_[i].is_copy &&
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

  std::shared_ptr<const std::vector<uint32_t>> edge_of_;  // by input of `grads`
  std::vector<Saved> saved_, watched_;  // guarded by mutex_
  std::vector<Remembered> inputs_;      // guarded by mutex_
  uint64_t running_ = 0, freed_ = 0;    // node outputs, as bits; guarded by mutex_
  at::Tensor random_state_;
};

// Stands between the node and an output that eager would have made with another node, so
// that its history has eager's name. Passes a gradient on.
class Relay : public torch::autograd::Node {
 public:
  Relay(std::string name, NodePointer node, uint32_t position) : name_(std::move(name)) {
    add_next_edge({std::move(node), position});
  }
  std::string name() const override { return name_; }
  variable_list apply(variable_list&& grads) override { return std::move(grads); }

 private:
  const std::string name_;
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

// The node of a tier above the lowest. Its edges: to the inner outputs that its own depend on, then
// to the inputs.
class UpperBackward : public TierNode {
 public:
  // `below`: the node of the tier below; `lowest`: that of the lowest. Owned by way of the edges.
  UpperBackward(std::shared_ptr<const Description> description, size_t tier, TierNode* below,
                PlanBackward* lowest)
      : TierNode(std::move(description), tier), below_(below), lowest_(lowest) {}

  variable_list apply(variable_list&& arriving) override {
    const Description& d = *description_;
    const std::vector<uint32_t>& inner = d.inner[tier_];
    variable_list grads = gathered(std::move(arriving));
    if (any_defined(grads)) {
      for (size_t i = 0; i < inner.size(); ++i) {
        if (is_asked_for(next_edge(i))) return lowest_->recompute(grads, &inner);
      }
      below_->carry(std::move(grads));
    }
    return variable_list(inner.size() + d.grads.size());
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

  TierNode* const below_;
  PlanBackward* const lowest_;
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
  auto leads_to = [](const at::Tensor& tensor) {
    return torch::autograd::impl::gradient_edge(tensor);
  };
  auto owned = std::make_unique<PlanBackward>(description);
  PlanBackward* const lowest = owned.get();
  TierNode* below = lowest;
  NodePointer node = owning_pointer(std::move(owned));
  for (size_t tier = 0; tier < d.tiers.size(); ++tier) {
    if (tier > 0) {
      auto upper = std::make_unique<UpperBackward>(description, tier, below, lowest);
      below = upper.get();
      node = owning_pointer(std::move(upper));
    }
    edge_list edges;
    if (tier == 0) {
      edges = lowest->place_edges(inputs);
    } else {
      edges.reserve(d.inner[tier].size() + d.grads.size());
      for (uint32_t k : d.inner[tier]) edges.push_back(leads_to(outputs[d.node_outputs[k]]));
      for (uint32_t i : d.grads) edges.push_back(leads_to(hold(inputs[i])));
    }
    node->set_next_edges(std::move(edges));
    for (uint32_t k : d.tiers[tier]) {
      at::Tensor& output = outputs[d.node_outputs[k]];
      output = own_tensor(output);
      if (d.names[k] == node->name()) {
        torch::autograd::set_history(output, node);
      } else {
        uint32_t position = node->add_input_metadata(output);
        torch::autograd::set_history(
            output, owning_pointer(std::make_unique<Relay>(d.names[k], node, position)));
      }
    }
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
