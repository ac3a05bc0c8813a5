// Serving a call: guards, executor, result.
//
// Ownership: a variant owns its guard program, ambient state, executor and what its result
// needs. During a run the inputs are held by references to their Python objects: a big
// plan releases the GIL, and another thread may drop a parameter meanwhile.
#include "variant.h"

#include "gradients.h"
#include "dispatch.h"
#include "entry.h"
#include "executor.h"
#include "forced_failures.h"
#include "guards.h"
#include "lifted.h"
#include "pointers.h"
#include "run_errors.h"
#include "signals.h"
#include "tensors.h"

#include <cstddef>
#include <cstring>
#include <structmember.h>
#include <torch/csrc/autograd/graph_task.h>

namespace accel {

enum class ResultKind : uint8_t { tensor, parts, constant, call };

// The result, or one element of a tuple that is the result.
struct Part {
  PyObject* constant = nullptr;  // borrowed from the payload; NULL: an output or a slot
  bool is_slot = false;
  size_t index = 0;              // of the output, or among the variant's `needed`
};

struct Variant {
  PyObject_HEAD
  PyObject* guards;
  PyObject* ambient;
  PyObject* executor;  // an accel._native.Executor, or any callable
  PyObject* payload;   // the constant, the callable of a call, or the parts; else NULL
  PyObject* gradients;  // a tuple of accel._native.Gradient; NULL: nothing requires grad
  Lifted* lifted;      // numbers that differ between calls; NULL: none
  const AmbientState* state;  // inside ambient
  const Executor* native;     // inside executor; NULL for a callable
  std::vector<int32_t>* inputs;
  std::vector<Part>* parts;      // what makes the result; one, where it is a tensor
  std::vector<int32_t>* needed;  // slots that parts are, or that a call reads; NULL: any
  ResultKind kind;
  long hits, guard_failures, ambient_failures, misspeculations, errors;
  long shortages;    // runs without memory since the last hit
  long eager_runs;   // so many calls that this variant would serve are given to on_call
  bool outside_backward;  // calls inside a backward pass are not served
  bool repeatable;  // changes nothing but the random state: may be served in a checkpoint
  bool is_random;
  long probe_every;  // measure each so-manyth hit; 0: none
  long until_probe;
  long doubt_at;     // the failed speculation after which on_event is told; 0: never
  long review_at;    // the hit after which on_event is told; 0: never
  PyObject* landing;  // of a node's variant: where Python goes on, see islands.cpp; or NULL
  int64_t* probes;   // ring of the last PROBES measured times; NULL until the first
  long probe_count;
};

namespace {

constexpr long PROBES = 64;
const std::vector<int32_t> NO_SLOTS;

PyTypeObject* variant_type = nullptr;
PyTypeObject* ambient_type = nullptr;
PyObject* torn_error = nullptr;
PyObject* declined_error = nullptr;
PyObject* no_memory_error = nullptr;

constexpr long MAX_SHORTAGES = 16;  // runs in a row for which there is no memory, before they are errors

// As declared in ambient.cpp; init_variant compares the sizes.
struct AmbientObject {
  PyObject_HEAD
  AmbientState* state;
};

Variant* self_of(PyObject* self) { return reinterpret_cast<Variant*>(self); }

// The input tensors' Python objects, held; the graph's inputs that are lifted numbers come
// behind them.
class HeldInputs {
 public:
  HeldInputs(const GuardCheck& check, const std::vector<int32_t>& slots)
      : objects_(slots.size()), count_(slots.size()) {
    for (size_t k = 0; k < count_; k++) {
      objects_[k] = check.slot(static_cast<size_t>(slots[k]));
      Py_XINCREF(objects_[k]);
    }
  }
  ~HeldInputs() {
    for (size_t k = 0; k < count_; k++) Py_XDECREF(objects_[k]);
  }
  size_t size() const { return count_ + scalars.size(); }
  PyObject* object(size_t index) {  // new; NULL with a Python error set
    if (index >= count_) return wrap(scalars[index - count_]);
    return Py_NewRef(objects_[index] ? objects_[index] : Py_None);
  }
  c10::TensorImpl* tensor(size_t index) {  // NULL: no plain tensor
    if (index >= count_) return scalars[index - count_].unsafeGetTensorImpl();
    return objects_[index] ? unwrap(objects_[index]) : nullptr;
  }

  std::vector<at::Tensor> scalars;

 private:
  Pointers<PyObject*> objects_;
  size_t count_;
};

// Takes away the current Python error as text; false when the program must see it
// (KeyboardInterrupt, SystemExit: not an Exception), then it stays set.
bool take_error(std::string& why) {
  if (!PyErr_ExceptionMatches(PyExc_Exception)) return false;
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  PyObject* text = value ? PyObject_Str(value) : nullptr;
  const char* utf8 = text ? PyUnicode_AsUTF8(text) : nullptr;
  why = std::string(reinterpret_cast<PyTypeObject*>(type)->tp_name) + ": " + (utf8 ? utf8 : "?");
  PyErr_Clear();
  Py_XDECREF(text);
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(trace);
  return true;
}

// Whether a checkpoint may have this call served twice. A node's resumable code may have been
// replaced by the second time.
bool may_run_twice(const Variant* v, const Serving& serving) {
  bool is_node = v->landing && v->landing != Py_None;
  if (!v->repeatable || is_node || (v->is_random && !serving.draws_again)) return false;
  // In the second run of an outer checkpoint this first one comes inside a backward.
  return !(v->outside_backward && is_within_other_hooks());
}

// ---- running -----------------------------------------------------------------------

// Outputs, as tensors from a plan or as Python objects from a callable.
struct Outputs {
  std::vector<at::Tensor> tensors;
  PyObject* objects = nullptr;  // owned list or tuple; NULL when from a plan
  PyObject* numbers = nullptr;  // owned: the list that comes behind them; NULL without one

  ~Outputs() {
    Py_XDECREF(objects);
    Py_XDECREF(numbers);
  }
  size_t size() const {
    return objects ? static_cast<size_t>(PySequence_Fast_GET_SIZE(objects)) : tensors.size();
  }
  PyObject* get(size_t index) const {  // new; NULL with a Python error set
    if (index >= size()) {
      return PyErr_Format(PyExc_SystemError, "the executor gave %zu outputs, output %zu is missing",
                          size(), index);
    }
    return objects ? Py_NewRef(PySequence_Fast_GET_ITEM(objects, static_cast<Py_ssize_t>(index)))
                   : wrap(tensors[index]);
  }
};

// There is no memory for a run: eager may need less, and the program may let go of some. A variant
// that never gets it only takes time.
Outcome without_memory(Variant* v) {
  return ++v->shortages > MAX_SHORTAGES ? Outcome::failed : Outcome::declined;
}

// A checkpoint's second run has no body to run instead: what torch has to say ends it.
Outcome raise_if_again(const RunError& error, bool again, Outcome otherwise) {
  if (!again || !error.of_torch) return otherwise;
  raise(error, PyExc_RuntimeError);
  return Outcome::raised;
}

Outcome run_plan(Variant* v, HeldInputs& inputs, Outputs& outputs, Serving& serving) {
  std::string& why = serving.why;
  bool again = serving.run == CheckpointRun::again;
  Pointers<c10::TensorImpl*> tensors(inputs.size());
  for (size_t k = 0; k < inputs.size(); k++) {
    tensors[k] = inputs.tensor(k);
    if (!tensors[k]) {
      why = "input " + std::to_string(k) + " is not a plain tensor";
      return Outcome::failed;
    }
  }
  at::Tensor drawn_from = v->gradients ? random_state(*v->native) : at::Tensor();
  std::vector<at::Tensor> before;
  if (v->gradients) before = values_before(v->gradients, tensors.data(), inputs.size());
  RunError error;
  RunStatus status = run(*v->native, tensors.data(), inputs.size(), outputs.tensors, error);
  why = error.text;
  switch (status) {
    case RunStatus::ok:
      if (!v->gradients) return Outcome::served;
      return connect(v->gradients, tensors.data(), inputs.size(), outputs.tensors, drawn_from,
                     before)
                 ? Outcome::served
                 : Outcome::raised;
    case RunStatus::misspeculated: return Outcome::misspeculated;
    case RunStatus::declined: return raise_if_again(error, again, Outcome::declined);
    case RunStatus::exhausted: return raise_if_again(error, again, without_memory(v));
    case RunStatus::error: return Outcome::failed;
    case RunStatus::torn:
      v->errors++;
      raise(error, torn_error);
      return Outcome::raised;
  }
  return Outcome::failed;
}

// New list, or NULL with a Python error set.
PyObject* object_list(HeldInputs& held) {
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(held.size()));
  for (size_t k = 0; list && k < held.size(); k++) {
    PyObject* object = held.object(k);
    if (object) PyList_SET_ITEM(list, static_cast<Py_ssize_t>(k), object);
    else Py_CLEAR(list);
  }
  return list;
}

Outcome run_callable(Variant* v, HeldInputs& inputs, Outputs& outputs, std::string& why) {
  PyObject* list = object_list(inputs);
  if (!list) return take_error(why) ? Outcome::failed : Outcome::raised;
  PyObject* answer;
  {
    DispatchPause pause;
    answer = PyObject_CallOneArg(v->executor, list);
  }
  Py_DECREF(list);
  if (!answer) {
    // Half of a commit has happened: the body must not run.
    if (PyErr_ExceptionMatches(torn_error)) {
      v->errors++;
      return Outcome::raised;
    }
    bool declined = PyErr_ExceptionMatches(declined_error);
    bool exhausted = PyErr_ExceptionMatches(no_memory_error);
    if (!take_error(why)) return Outcome::raised;
    if (exhausted) return without_memory(v);
    return declined ? Outcome::declined : Outcome::failed;
  }
  if (answer == Py_None) {
    Py_DECREF(answer);
    return Outcome::misspeculated;
  }
  if (!PyList_Check(answer) && !PyTuple_Check(answer)) {
    why = std::string("the backend's callable returned a ") + Py_TYPE(answer)->tp_name;
    Py_DECREF(answer);
    return Outcome::failed;
  }
  outputs.objects = answer;
  return Outcome::served;
}

// Makes the numbers of the call, whose leaves are held, inputs and outputs.
Outcome lift(Variant* v, HeldInputs& leaves, HeldInputs& inputs, Outputs& outputs,
             std::string& why) {
  PyObject* list = object_list(leaves);
  Evaluation evaluation = Evaluation::failed;
  if (list) {
    DispatchPause pause;
    SignalHold hold;
    evaluation = evaluate(*v->lifted, list, inputs.scalars, &outputs.numbers);
    Py_DECREF(list);
  }
  if (evaluation == Evaluation::ok) return Outcome::served;
  if (evaluation == Evaluation::refused) return Outcome::misspeculated;
  return take_error(why) ? Outcome::failed : Outcome::raised;
}

// ---- results -----------------------------------------------------------------------

PyObject* output_list(const Outputs& outputs) {
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(outputs.size()));
  for (size_t k = 0; list && k < outputs.size(); k++) {
    PyObject* output = outputs.get(k);
    if (output) PyList_SET_ITEM(list, static_cast<Py_ssize_t>(k), output);
    else Py_CLEAR(list);
  }
  if (list && outputs.numbers && PyList_Append(list, outputs.numbers) < 0) Py_CLEAR(list);
  return list;
}

PyObject* call_finish(Variant* v, const GuardCheck& check, const Outputs& outputs) {
  PyObject* arguments[2] = {output_list(outputs), nullptr};
  arguments[1] = arguments[0] ? check.slot_list() : nullptr;
  PyObject* result = nullptr;
  if (arguments[1]) {
    DispatchPause pause;
    result = PyObject_Vectorcall(v->payload, arguments, 2, nullptr);
  }
  Py_XDECREF(arguments[0]);
  Py_XDECREF(arguments[1]);
  return result;
}

PyObject* tuple_of_parts(const Variant* v, const HeldSlots& slots, const Outputs& outputs) {
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(v->parts->size()));
  for (size_t k = 0; tuple && k < v->parts->size(); k++) {
    const Part& part = (*v->parts)[k];
    PyObject* item = part.constant  ? Py_NewRef(part.constant)
                     : part.is_slot ? slots.object(part.index)
                                    : outputs.get(part.index);
    if (item) PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(k), item);
    else Py_CLEAR(tuple);
  }
  return tuple;
}

// New reference, or NULL with a Python error set: by now effects may have been applied, so
// an error is the program's to see, not a reason to run the body.
PyObject* make_result(Variant* v, const GuardCheck& check, const HeldSlots& slots,
                      const Outputs& outputs) {
  switch (v->kind) {
    case ResultKind::tensor: return outputs.get((*v->parts)[0].index);
    case ResultKind::constant: return Py_NewRef(v->payload);
    case ResultKind::call: return call_finish(v, check, outputs);
    case ResultKind::parts: return tuple_of_parts(v, slots, outputs);
  }
  Py_UNREACHABLE();
}

// ---- measuring ---------------------------------------------------------------------

bool probe_due(Variant* v) {
  if (v->probe_every <= 0 || --v->until_probe > 0) return false;
  v->until_probe = v->probe_every;
  return true;
}

void store_probe(Variant* v, int64_t ns) {
  if (!v->probes) v->probes = new int64_t[PROBES]();
  v->probes[v->probe_count++ % PROBES] = ns;
}

PyObject* get_probes(PyObject* self, void*) {
  Variant* v = self_of(self);
  long count = v->probe_count < PROBES ? v->probe_count : PROBES;
  PyObject* list = PyList_New(count);
  for (long k = 0; list && k < count; k++) {
    PyObject* number = PyLong_FromLongLong(v->probes[(v->probe_count - count + k) % PROBES]);
    if (number) PyList_SET_ITEM(list, k, number);
    else Py_CLEAR(list);
  }
  return list;
}

PyObject* clear_probes(PyObject* self, PyObject*) {
  self_of(self)->probe_count = 0;
  Py_RETURN_NONE;
}

// ---- construction ------------------------------------------------------------------

bool take_indices(PyObject* object, size_t limit, const char* what, std::vector<int32_t>& into) {
  PyObject* sequence = PySequence_Fast(object, "expected a sequence of numbers");
  if (!sequence) return false;
  bool ok = true;
  for (Py_ssize_t k = 0; ok && k < PySequence_Fast_GET_SIZE(sequence); k++) {
    Py_ssize_t index =
        PyNumber_AsSsize_t(PySequence_Fast_GET_ITEM(sequence, k), PyExc_OverflowError);
    ok = !PyErr_Occurred();
    if (ok && (index < 0 || static_cast<size_t>(index) >= limit)) {
      PyErr_Format(PyExc_ValueError, "there is no %s %zd", what, index);
      ok = false;
    }
    if (ok) into.push_back(static_cast<int32_t>(index));
  }
  Py_DECREF(sequence);
  return ok;
}

constexpr size_t ANY_OUTPUT = 1 << 20;

bool take_call(Variant* v, PyObject* result, size_t slots) {
  v->kind = ResultKind::call;
  v->payload = Py_NewRef(PyTuple_GET_ITEM(result, 1));
  if (!PyCallable_Check(v->payload)) {
    PyErr_SetString(PyExc_TypeError, "a call result needs a callable");
    return false;
  }
  if (PyTuple_GET_SIZE(result) == 2) return true;
  v->needed = new std::vector<int32_t>();
  return take_indices(PyTuple_GET_ITEM(result, 2), slots, "slot", *v->needed);
}

// The one number in `object`, appended to `into`.
bool take_index(PyObject* object, size_t limit, const char* what, std::vector<int32_t>& into) {
  PyObject* one = PyTuple_Pack(1, object);
  bool ok = one && take_indices(one, limit, what, into);
  Py_XDECREF(one);
  return ok;
}

bool take_output(PyObject* number, std::vector<Part>& parts) {
  std::vector<int32_t> output;
  if (!take_index(number, ANY_OUTPUT, "output", output)) return false;
  parts.push_back({nullptr, false, static_cast<size_t>(output[0])});
  return true;
}

// A part is ("output", k), ("slot", s) or ("const", object).
bool take_part(Variant* v, PyObject* spec, size_t slots) {
  bool shaped = PyTuple_Check(spec) && PyTuple_GET_SIZE(spec) == 2 &&
                PyUnicode_Check(PyTuple_GET_ITEM(spec, 0));
  const char* kind = shaped ? PyUnicode_AsUTF8(PyTuple_GET_ITEM(spec, 0)) : "";
  if (!kind) return false;
  PyObject* operand = shaped ? PyTuple_GET_ITEM(spec, 1) : nullptr;
  if (std::strcmp(kind, "output") == 0) return take_output(operand, *v->parts);
  if (std::strcmp(kind, "slot") == 0) {
    if (!take_index(operand, slots, "slot", *v->needed)) return false;
    v->parts->push_back({nullptr, true, v->needed->size() - 1});
    return true;
  }
  if (std::strcmp(kind, "const") == 0) {
    v->parts->push_back({operand, false, 0});
    return true;
  }
  PyErr_Format(PyExc_ValueError, "a part is an output, a slot or a const, not %R", spec);
  return false;
}

bool take_parts(Variant* v, PyObject* specs, size_t slots) {
  v->kind = ResultKind::parts;
  v->payload = PySequence_Tuple(specs);
  v->needed = new std::vector<int32_t>();
  bool ok = v->payload != nullptr;
  for (Py_ssize_t k = 0; ok && k < PyTuple_GET_SIZE(v->payload); k++) {
    ok = take_part(v, PyTuple_GET_ITEM(v->payload, k), slots);
  }
  return ok;
}

bool take_result(Variant* v, PyObject* result, size_t slots) {
  bool shaped = PyTuple_Check(result) && PyTuple_GET_SIZE(result) >= 2 &&
                PyTuple_GET_SIZE(result) <= 3 && PyUnicode_Check(PyTuple_GET_ITEM(result, 0));
  const char* kind = shaped ? PyUnicode_AsUTF8(PyTuple_GET_ITEM(result, 0)) : nullptr;
  if (kind) {
    PyObject* operand = PyTuple_GET_ITEM(result, 1);
    if (std::strcmp(kind, "call") == 0) return take_call(v, result, slots);
    if (std::strcmp(kind, "parts") == 0) return take_parts(v, operand, slots);
    if (std::strcmp(kind, "const") == 0) {
      v->kind = ResultKind::constant;
      v->payload = Py_NewRef(operand);
      return true;
    }
    if (std::strcmp(kind, "tensor") == 0) {
      v->kind = ResultKind::tensor;
      return take_output(operand, *v->parts);
    }
  }
  if (!PyErr_Occurred()) {
    PyErr_Format(PyExc_ValueError,
                 "a result is (\"tensor\", k), (\"parts\", [part, ...]), "
                 "(\"const\", object) or (\"call\", finish[, slots]), not %R",
                 result);
  }
  return false;
}

PyObject* variant_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"guards", "ambient", "executor", "inputs",
                                "result", "gradients", "numbers", nullptr};
  PyObject *guards, *ambient, *executor, *inputs, *result;
  PyObject *gradients = Py_None, *numbers = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO|OO:Variant", const_cast<char**>(names),
                                   &guards, &ambient, &executor, &inputs, &result, &gradients,
                                   &numbers)) {
    return nullptr;
  }
  GuardProgram* program = as_guard_program(guards);
  if (!program) return PyErr_Format(PyExc_TypeError, "guards must be a GuardProgram");
  if (Py_TYPE(ambient) != ambient_type) {
    return PyErr_Format(PyExc_TypeError, "ambient must be an accel._native.Ambient");
  }
  const Executor* native = as_executor(executor);
  if (!native && !PyCallable_Check(executor)) {
    return PyErr_Format(PyExc_TypeError, "executor must be an Executor or a callable");
  }
  if (gradients != Py_None && !(native && are_gradients(gradients))) {
    return PyErr_Format(PyExc_TypeError, "gradients must be Gradients beside an Executor");
  }
  auto* v = reinterpret_cast<Variant*>(type->tp_alloc(type, 0));
  if (!v) return nullptr;
  v->guards = Py_NewRef(guards);
  v->ambient = Py_NewRef(ambient);
  v->state = reinterpret_cast<AmbientObject*>(ambient)->state;
  v->executor = Py_NewRef(executor);
  v->native = native;
  v->gradients = gradients == Py_None ? nullptr : Py_NewRef(gradients);
  v->inputs = new std::vector<int32_t>();
  v->parts = new std::vector<Part>();
  size_t slots = slot_count(*program);
  bool ok = take_indices(inputs, slots, "slot", *v->inputs) && take_result(v, result, slots);
  if (ok && numbers != Py_None) {
    v->lifted = take_lifted(numbers, slots);
    ok = v->lifted != nullptr;
  }
  if (!ok) {
    Py_DECREF(v);
    return nullptr;
  }
  return reinterpret_cast<PyObject*>(v);
}

int variant_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Variant* v = self_of(self);
  Py_VISIT(v->guards);
  Py_VISIT(v->ambient);
  Py_VISIT(v->executor);
  Py_VISIT(v->payload);
  Py_VISIT(v->gradients);
  Py_VISIT(v->landing);
  if (v->lifted) Py_VISIT(v->lifted->program);
  return 0;
}

// No tp_clear: a variant is immutable while it serves, and the cycles it may be part of
// go through its program, its callable or an entry, which can be cleared.
void variant_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  Variant* v = self_of(self);
  Py_XDECREF(v->guards);
  Py_XDECREF(v->ambient);
  Py_XDECREF(v->executor);
  Py_XDECREF(v->payload);
  Py_XDECREF(v->gradients);
  Py_XDECREF(v->landing);
  delete v->lifted;
  delete v->inputs;
  delete v->needed;
  delete v->parts;
  delete[] v->probes;
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef MEMBERS[] = {
    {"guards", T_OBJECT, offsetof(Variant, guards), READONLY, nullptr},
    {"ambient", T_OBJECT, offsetof(Variant, ambient), READONLY, nullptr},
    {"executor", T_OBJECT, offsetof(Variant, executor), READONLY, nullptr},
    {"gradients", T_OBJECT, offsetof(Variant, gradients), READONLY, "None: nothing requires grad"},
    {"hits", T_LONG, offsetof(Variant, hits), READONLY, "calls served"},
    {"guard_failures", T_LONG, offsetof(Variant, guard_failures), READONLY, nullptr},
    {"ambient_failures", T_LONG, offsetof(Variant, ambient_failures), READONLY, nullptr},
    {"misspeculations", T_LONG, offsetof(Variant, misspeculations), READONLY, nullptr},
    {"errors", T_LONG, offsetof(Variant, errors), READONLY, "runs in which the executor failed"},
    {"eager_runs", T_LONG, offsetof(Variant, eager_runs), 0,
     "so many calls that it would serve are given to the entry's on_call instead"},
    {"outside_backward", T_BOOL, offsetof(Variant, outside_backward), 0,
     "calls inside a backward pass (a checkpoint's second run) are left to Python"},
    {"repeatable", T_BOOL, offsetof(Variant, repeatable), 0,
     "changes nothing but the random state: a checkpoint may run it twice"},
    {"is_random", T_BOOL, offsetof(Variant, is_random), 0, "draws random numbers"},
    {"probe_every", T_LONG, offsetof(Variant, probe_every), 0, "measure each so-manyth hit"},
    {"landing", T_OBJECT, offsetof(Variant, landing), 0,
     "of a node's variant: (pad, locals written, locals unbound); set before it serves"},
    {"doubt_at", T_LONG, offsetof(Variant, doubt_at), 0,
     "the misspeculation after which the entry's on_event is told \"misspeculated\"; 0: never"},
    {"review_at", T_LONG, offsetof(Variant, review_at), 0,
     "the hit after which the entry's on_event is told \"review\"; 0: never"},
    {nullptr, 0, 0, 0, nullptr},
};

PyGetSetDef GETSETS[] = {
    {"ns_compiled", get_probes, nullptr, "measured times of hits, oldest first", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef METHODS[] = {
    {"clear_probes", clear_probes, METH_NOARGS, "Forget the measured times."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot SLOTS[] = {
    {Py_tp_new, reinterpret_cast<void*>(variant_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(variant_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(variant_traverse)},
    {Py_tp_members, MEMBERS},
    {Py_tp_getset, GETSETS},
    {Py_tp_methods, METHODS},
    {Py_tp_doc, const_cast<char*>("Variant(guards, ambient, executor, inputs, result, gradients=None, numbers=None)")},
    {0, nullptr},
};

PyType_Spec SPEC = {"accel._native.Variant", sizeof(Variant), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, SLOTS};

}  // namespace

bool is_variant(PyObject* object) { return Py_TYPE(object) == variant_type; }

long error_count(const Variant* variant) { return variant->errors; }

bool review_due(Variant* v) {
  if (v->review_at <= 0 || v->hits < v->review_at) return false;
  v->review_at = 0;
  return true;
}

bool doubt_due(Variant* v) {
  if (v->doubt_at <= 0 || v->misspeculations < v->doubt_at) return false;
  v->doubt_at = 0;
  return true;
}

Outcome serve(Variant* v, PyObject* const* roots, size_t count, PyObject* last,
              Serving& serving) {
  bool again = serving.run == CheckpointRun::again;
  // Modes that the backward alone is under change nothing in what is computed again.
  if (!again && !ambient_equal(*v->state)) {
    v->ambient_failures++;
    return Outcome::guarded;
  }
  bool probe = v->probe_every > 0 && v->until_probe <= 1;
  int64_t start = probe ? now_ns() : 0;
  GuardCheck check(*as_guard_program(v->guards));
  if (!check.holds(roots, count, last) || must_fail(Failure::guard)) {
    v->guard_failures++;
    return Outcome::guarded;
  }
  if (serving.run == CheckpointRun::first && !may_run_twice(v, serving)) return Outcome::declined;
  if (v->outside_backward && !again && torch::autograd::get_current_graph_task_id() != -1) {
    return Outcome::declined;
  }
  if (v->eager_runs > 0 && !again) {
    --v->eager_runs;
    return Outcome::skipped;
  }
  HeldInputs inputs(check, *v->inputs);
  HeldInputs leaves(check, v->lifted ? v->lifted->slots : NO_SLOTS);
  if (v->kind == ResultKind::call) check.hold_slots(v->needed);
  HeldSlots parts(check, v->kind == ResultKind::parts ? *v->needed : NO_SLOTS);
  Outputs outputs;
  Outcome outcome =
      v->lifted ? lift(v, leaves, inputs, outputs, serving.why) : Outcome::served;
  if (outcome == Outcome::served) {
    SignalHold hold;  // an error is answered by running the body: one of a handler must not be
    outcome = v->native ? run_plan(v, inputs, outputs, serving)
                        : run_callable(v, inputs, outputs, serving.why);
  }
  if (outcome == Outcome::served) {
    v->hits++;
    v->shortages = 0;
    serving.result = make_result(v, check, parts, outputs);
    serving.landing = v->landing;
    if (!again && probe_due(v) && probe) store_probe(v, now_ns() - start);
    return serving.result ? Outcome::served : Outcome::raised;
  }
  // What a checkpoint's second run has saved last ends it: by an exception.
  if (outcome == Outcome::raised && again) v->hits++;
  if (outcome == Outcome::misspeculated) v->misspeculations++;
  if (outcome == Outcome::failed) v->errors++;
  return outcome;
}

int init_variant(PyObject* module) {
  ambient_type =
      reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(module, "Ambient"));
  torn_error = PyObject_GetAttrString(module, "TornCommitError");
  declined_error = PyObject_GetAttrString(module, "DeclinedError");
  no_memory_error = PyObject_GetAttrString(module, "NoMemoryError");
  variant_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&SPEC));
  if (!ambient_type || !torn_error || !declined_error || !no_memory_error || !variant_type) return -1;
  if (ambient_type->tp_basicsize != static_cast<Py_ssize_t>(sizeof(AmbientObject))) {
    PyErr_SetString(PyExc_SystemError, "the layout of accel._native.Ambient changed");
    return -1;
  }
  return PyModule_AddObjectRef(module, "Variant", reinterpret_cast<PyObject*>(variant_type));
}

}  // namespace accel
