// The Python type that describes autograd nodes, and what the dispatch of calls asks of it.
#include "gradients.h"

#include "autograd_node.h"
#include "executor.h"
#include "plan.h"
#include "plan_reader.h"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>

namespace accel {
namespace {

// Inputs that are written are copied before for the sake of derivatives that may never be asked for.
constexpr int64_t COPIED_BYTES = int64_t{1} << 20;

struct GradientObject {
  PyObject_HEAD
  std::shared_ptr<Description> description;
};

PyTypeObject* gradient_type = nullptr;

GradientObject* object_of(PyObject* self) { return reinterpret_cast<GradientObject*>(self); }

std::vector<uint32_t> numbers(const py::dict& spec, const char* name, size_t limit) {
  std::vector<uint32_t> found;
  for (int64_t number : integers(spec, name, "gradient")) {
    if (number < 0 || static_cast<size_t>(number) >= limit) {
      fail("gradient", std::string(name) + ": there is no " + std::to_string(number));
    }
    found.push_back(static_cast<uint32_t>(number));
  }
  return found;
}

// [[number, ...], ...]: `count` sets of numbers below `limit`.
std::vector<uint64_t> rows_of_bits(const py::dict& spec, const char* name, size_t count,
                                   size_t limit) {
  std::vector<uint64_t> found;
  for (const auto& row : as_list(member(spec, name, "gradient"), name)) {
    uint64_t bits = 0;
    for (const auto& item : as_list(row, name)) {
      auto number = take<uint32_t>(item, name, "a number");
      if (number >= limit) fail("gradient", std::string(name) + ": a number is too large");
      bits |= uint64_t{1} << number;
    }
    found.push_back(bits);
  }
  if (found.size() != count) fail("gradient", std::string(name) + ": wrong number of rows");
  return found;
}

// ["input" | "output", index, ...] with at least `length` items.
Place place(const py::list& item, size_t length, size_t inputs, size_t outputs) {
  if (item.size() < length) fail("gradient", "a place has too few items");
  auto kind = take<std::string>(item[0], "gradient", "a string");
  auto index = take<int64_t>(item[1], "gradient", "an integer");
  bool output = kind == "output";
  if (index < 0 || static_cast<size_t>(index) >= (output ? outputs : inputs)) {
    fail("gradient", "there is no " + kind + " " + std::to_string(index));
  }
  return {output, static_cast<uint32_t>(index)};
}

// By node output, the positions of those that it was computed from, theirs included.
void read_inner(const py::list& rows, Description& d) {
  size_t count = d.node_outputs.size();
  for (const auto& row : rows) {
    std::vector<uint32_t> positions;
    for (const auto& item : as_list(row, "inner")) {
      auto position = take<uint32_t>(item, "inner", "a number");
      if (position >= count) fail("gradient", "inner: there is no such output");
      positions.push_back(position);
    }
    d.inner.push_back(std::move(positions));
  }
  if (d.inner.size() != count) fail("gradient", "inner: one row for each of node_outputs");
  for (uint32_t k = 0; k < count; ++k) d.order.push_back(k);
  std::stable_sort(d.order.begin(), d.order.end(), [&](uint32_t a, uint32_t b) {
    return d.inner[a].size() < d.inner[b].size();
  });
  for (size_t at = 0; at < count; ++at) {
    for (uint32_t k : d.inner[d.order[at]]) {
      if (std::find(d.order.begin(), d.order.begin() + static_cast<ptrdiff_t>(at), k) ==
          d.order.begin() + static_cast<ptrdiff_t>(at)) {
        fail("gradient", "inner: outputs depend on each other");
      }
    }
  }
}

// Sorts the inputs of `grads`, which are in the order of eager's visits, by the outputs that lead to
// them. Where all outputs lead to all of them there is nothing to sort.
void group_inputs(Description& d) {
  uint64_t all = (uint64_t{1} << d.node_outputs.size()) - 1;
  auto is_common = [&](uint64_t reach) { return reach == all; };
  if (std::all_of(d.reach.begin(), d.reach.end(), is_common)) {
    for (uint32_t i = 0; i < d.grads.size(); ++i) d.common.push_back(i);
    return;
  }
  for (uint32_t i = 0; i < d.grads.size(); ++i) {
    auto same = [&](const Group& group) { return group.outputs == d.reach[i]; };
    auto found = std::find_if(d.groups.begin(), d.groups.end(), same);
    if (found == d.groups.end()) {
      found = d.groups.insert(found, Group{d.reach[i], is_common(d.reach[i]), {}, {}});
    }
    found->grads.push_back(i);
  }
}

void read_spec(const py::dict& spec, const Plan& forward, const Plan& backward, Description& d) {
  size_t inputs = forward.inputs.size(), outputs = forward.outputs.size();
  auto count = integer(spec, "outputs", "gradient");
  if (count < 0 || static_cast<size_t>(count) > outputs) fail("gradient", "outputs: too many");
  d.output_count = static_cast<size_t>(count);
  d.node_outputs = numbers(spec, "node_outputs", d.output_count);
  d.tangents = numbers(spec, "tangents", d.node_outputs.size());
  d.detached = numbers(spec, "detached", d.output_count);
  d.grads = numbers(spec, "grads", inputs);
  d.results = integers(spec, "results", "gradient");
  d.names = take<std::vector<std::string>>(member(spec, "names", "gradient"), "names", "strings");
  if (d.names.empty() || d.names.size() != d.node_outputs.size() || d.names.size() > 64) {
    fail("gradient", "names: one for each of node_outputs");
  }
  read_inner(as_list(member(spec, "inner", "gradient"), "inner"), d);
  for (const auto& item : as_list(member(spec, "saved", "gradient"), "saved")) {
    d.saved.push_back(place(as_list(item, "saved"), 2, inputs, outputs));
  }
  for (const auto& item : as_list(member(spec, "watched", "gradient"), "watched")) {
    py::list row = as_list(item, "watched");
    Place where = place(row, 4, inputs, d.output_count);
    auto bits = take<uint64_t>(row[2], "watched", "a set");
    auto position = take<int64_t>(row[3], "watched", "an integer");
    if (position >= static_cast<int64_t>(d.saved.size())) fail("gradient", "watched: not saved");
    d.watched.push_back({where, bits, position});
  }
  if (backward.inputs.size() != d.saved.size() + d.tangents.size()) {
    fail("gradient", "the backward plan takes another number of tensors");
  }
  if (d.results.size() != d.grads.size()) fail("gradient", "results: one for each of grads");
  for (int64_t result : d.results) {
    if (result >= static_cast<int64_t>(backward.outputs.size())) {
      fail("gradient", "the backward plan makes fewer gradients");
    }
  }
  if (!backward.commit.empty()) fail("gradient", "the backward plan writes its inputs");
  d.written.assign(inputs, false);
  for (uint32_t i : numbers(spec, "written", inputs)) d.written[i] = true;
  d.needs = rows_of_bits(spec, "needs", inputs, d.node_outputs.size());
  d.kept.assign(inputs, false);
  for (uint32_t i : numbers(spec, "kept", inputs)) d.kept[i] = true;
  d.stale.assign(inputs, false);
  for (uint32_t i : numbers(spec, "stale", inputs)) d.any_stale = d.stale[i] = true;
  d.reach = rows_of_bits(spec, "reach", d.grads.size(), d.node_outputs.size());
  group_inputs(d);
  d.freed_with = rows_of_bits(spec, "freed_with", d.node_outputs.size(), d.node_outputs.size());
  d.needed_for = rows_of_bits(spec, "needed_for", d.saved.size(), d.node_outputs.size());
  // A saved variable holds its tensor anyway.
  auto held = [&](const Place& place) {
    if (!place.output) d.kept[place.index] = false;
  };
  for (const Place& place : d.saved) held(place);
  for (const Watched& watched : d.watched) held(watched.place);
}

PyObject* gradient_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"spec", "forward", "backward", "recompute", nullptr};
  PyObject *spec, *forward, *backward, *recompute;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO:Gradient", const_cast<char**>(names),
                                   &spec, &forward, &backward, &recompute)) {
    return nullptr;
  }
  const Executor* first = as_executor(forward);
  const Executor* second = as_executor(backward);
  if (!first || !second) {
    return PyErr_Format(PyExc_TypeError, "forward and backward must be Executors");
  }
  if (!PyCallable_Check(recompute)) {
    return PyErr_Format(PyExc_TypeError, "recompute must be callable");
  }
  auto description = std::make_shared<Description>();
  try {
    read_spec(as_dict(spec, "gradient"), plan_of(*first), plan_of(*second), *description);
    c10::Device device = plan_of(*second).device;
    if (!device.is_cpu()) description->on_device = at::empty({0}, device);
  } catch (pybind11::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_ValueError, "%s", error.what());
  }
  description->executor = second;
  description->owner = Py_NewRef(backward);
  description->recompute = Py_NewRef(recompute);
  PyObject* self = type->tp_alloc(type, 0);
  if (self) new (&object_of(self)->description) std::shared_ptr<Description>(std::move(description));
  return self;
}

void gradient_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  object_of(self)->description.~shared_ptr();
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* get_runs(PyObject* self, void*) {
  return PyLong_FromLong(object_of(self)->description->runs.load());
}

PyObject* get_recomputed(PyObject* self, void*) {
  return PyLong_FromLong(object_of(self)->description->recomputed.load());
}

PyGetSetDef GETTERS[] = {
    {"runs", get_runs, nullptr, "backwards that ran the plan", nullptr},
    {"recomputed", get_recomputed, nullptr, "backwards that ran the forward again", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot SLOTS[] = {
    {Py_tp_new, reinterpret_cast<void*>(gradient_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(gradient_dealloc)},
    {Py_tp_getset, GETTERS},
    {Py_tp_doc, const_cast<char*>("Gradient(spec, forward, backward, recompute)")},
    {0, nullptr},
};

PyType_Spec SPEC = {"accel._native.Gradient", sizeof(GradientObject), 0, Py_TPFLAGS_DEFAULT,
                    SLOTS};

void copy_stale(const Description& d, c10::TensorImpl* const* inputs, size_t count,
                std::vector<at::Tensor>& copies) {
  for (size_t i = 0; d.any_stale && i < count; ++i) {
    if (!d.stale[i] || (i < copies.size() && copies[i].defined())) continue;
    if (inputs[i]->numel() * static_cast<int64_t>(inputs[i]->itemsize()) > COPIED_BYTES) continue;
    copies.resize(count);
    c10::NoGradGuard no_grad;
    copies[i] = hold(inputs[i]).detach().clone();
  }
}

}  // namespace

bool are_gradients(PyObject* object) {
  if (!PyTuple_CheckExact(object) || PyTuple_GET_SIZE(object) == 0) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i) {
    if (Py_TYPE(PyTuple_GET_ITEM(object, i)) != gradient_type) return false;
  }
  return true;
}

std::vector<at::Tensor> values_before(PyObject* gradients, c10::TensorImpl* const* inputs,
                                      size_t count) {
  std::vector<at::Tensor> copies;
  try {
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(gradients); ++k) {
      copy_stale(*object_of(PyTuple_GET_ITEM(gradients, k))->description, inputs, count, copies);
    }
  } catch (const c10::Error&) {  // no memory for them
    copies.clear();
  }
  return copies;
}

bool connect(PyObject* gradients, c10::TensorImpl* const* inputs, size_t count,
             std::vector<at::Tensor>& outputs, const at::Tensor& random_state,
             const std::vector<at::Tensor>& before) {
  try {
    Descriptions components;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(gradients); ++i) {
      components.push_back(object_of(PyTuple_GET_ITEM(gradients, i))->description);
    }
    connect_components(components, inputs, count, outputs, random_state, before);
    return true;
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
  }
  return false;
}

int init_gradients(PyObject* module) {
  gradient_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&SPEC));
  if (!gradient_type) return -1;
  return PyModule_AddObjectRef(module, "Gradient", reinterpret_cast<PyObject*>(gradient_type));
}

}  // namespace accel
