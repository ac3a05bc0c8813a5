// Calls of ATen operations from plans: direct ones by a table, the others boxed.
#include "externs.h"

#include <ATen/core/List.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_cpu_dispatch.h>
#include <ATen/ops/_softmax_cpu_dispatch.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/baddbmm_cpu_dispatch.h>
#include <ATen/ops/bmm_cpu_dispatch.h>
#include <ATen/ops/convolution_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/copy_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/embedding_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/index_select_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/native_layer_norm_cpu_dispatch.h>

#include <algorithm>
#include <iterator>
#include <string_view>

namespace accel {
namespace {

// The arguments of one direct call, by position in the schema.
struct Call {
  const ExternStep& step;
  at::Tensor* tensors;
  at::Tensor* results;

  at::Tensor& tensor(size_t i) const { return tensors[step.arguments[i].buffer]; }
  std::optional<at::Tensor> optional_tensor(size_t i) const {
    uint32_t id = step.arguments[i].buffer;
    return id == NO_BUFFER ? std::nullopt : std::optional<at::Tensor>(tensors[id]);
  }
  const at::Scalar& scalar(size_t i) const { return step.scalars[i]; }
  at::IntArrayRef integers(size_t i) const { return step.integers[i]; }
  const c10::IValue& constant(size_t i) const { return step.arguments[i].value; }
};

void addmm(const Call& c) {
  at::cpu::addmm_outf(c.tensor(0), c.tensor(1), c.tensor(2), c.scalar(3), c.scalar(4), c.tensor(5));
}

void baddbmm(const Call& c) {
  at::cpu::baddbmm_outf(c.tensor(0), c.tensor(1), c.tensor(2), c.scalar(3), c.scalar(4),
                        c.tensor(5));
}

void mm(const Call& c) { at::cpu::mm_outf(c.tensor(0), c.tensor(1), c.tensor(2)); }

void bmm(const Call& c) { at::cpu::bmm_outf(c.tensor(0), c.tensor(1), c.tensor(2)); }

void copy_(const Call& c) {
  at::compositeexplicitautograd::copy_(c.tensor(0), c.tensor(1), c.constant(2).toBool());
}

void convolution(const Call& c) {
  c.results[0] = at::compositeexplicitautograd::convolution(
      c.tensor(0), c.tensor(1), c.optional_tensor(2), c.integers(3), c.integers(4), c.integers(5),
      c.constant(6).toBool(), c.integers(7), c.constant(8).toInt());
}

void embedding(const Call& c) {
  c.results[0] = at::compositeexplicitautograd::embedding(
      c.tensor(0), c.tensor(1), c.constant(2).toInt(), c.constant(3).toBool(),
      c.constant(4).toBool());
}

void index_select(const Call& c) {
  at::cpu::index_select_outf(c.tensor(0), c.constant(1).toInt(), c.tensor(2), c.tensor(3));
}

void softmax(const Call& c) {
  at::cpu::_softmax_outf(c.tensor(0), c.constant(1).toInt(), c.constant(2).toBool(), c.tensor(3));
}

void native_layer_norm(const Call& c) {
  std::tie(c.results[0], c.results[1], c.results[2]) =
      at::cpu::native_layer_norm(c.tensor(0), c.integers(1), c.optional_tensor(2),
                                 c.optional_tensor(3), c.constant(4).toDouble());
}

void flash_attention(const Call& c) {
  const c10::IValue& scale = c.constant(6);
  std::tie(c.results[0], c.results[1]) = at::cpu::_scaled_dot_product_flash_attention_for_cpu(
      c.tensor(0), c.tensor(1), c.tensor(2), c.constant(3).toDouble(), c.constant(4).toBool(),
      c.optional_tensor(5), scale.isNone() ? std::nullopt : std::optional(scale.toDouble()));
}

template <void (*FUNCTION)(const Call&)>
void direct(const ExternStep& step, at::Tensor* tensors, at::Tensor* results) {
  FUNCTION(Call{step, tensors, results});
}

struct Row {
  std::string_view name;
  DirectCall call;
};

constexpr Row DIRECT_CALLS[] = {
    {"aten::addmm.out", direct<addmm>},
    {"aten::mm.out", direct<mm>},
    {"aten::bmm.out", direct<bmm>},
    {"aten::baddbmm.out", direct<baddbmm>},
    {"aten::copy_", direct<copy_>},
    {"aten::convolution", direct<convolution>},
    {"aten::embedding", direct<embedding>},
    {"aten::index_select.out", direct<index_select>},
    {"aten::_softmax.out", direct<softmax>},
    {"aten::native_layer_norm", direct<native_layer_norm>},
    {"aten::_scaled_dot_product_flash_attention_for_cpu", direct<flash_attention>},
};

c10::IValue tensor_list(const std::vector<uint32_t>& ids, const at::Tensor* tensors) {
  c10::List<at::Tensor> list;
  list.reserve(ids.size());
  for (uint32_t id : ids) list.push_back(tensors[id]);
  return list;
}

c10::IValue optional_tensor_list(const std::vector<uint32_t>& ids, const at::Tensor* tensors) {
  c10::List<std::optional<at::Tensor>> list;
  list.reserve(ids.size());
  for (uint32_t id : ids) {
    list.push_back(id == NO_BUFFER ? std::nullopt : std::optional<at::Tensor>(tensors[id]));
  }
  return list;
}

void bind(at::Tensor* tensors, uint32_t id, at::Tensor value) {
  if (id == NO_BUFFER) return;
  TORCH_CHECK(value.defined(), "the operation returned no tensor where the plan expects one");
  tensors[id] = std::move(value);
}

void call_boxed(const ExternStep& step, at::Tensor* tensors) {
  // A fresh stack: what the operation leaves must not outlive the call.
  torch::jit::Stack stack;
  stack.reserve(std::max(step.arguments.size(), step.results.size()) + 1);
  for (const ExternArgument& argument : step.arguments) {
    switch (argument.kind) {
      case ExternArgument::tensor:
        stack.emplace_back(tensors[argument.buffer]);
        break;
      case ExternArgument::tensors:
        stack.emplace_back(tensor_list(argument.list, tensors));
        break;
      case ExternArgument::optional_tensors:
        stack.emplace_back(optional_tensor_list(argument.list, tensors));
        break;
      case ExternArgument::constant:
        // Lists are shared by reference inside an IValue: an operation may change its own.
        stack.emplace_back(argument.value.isList() ? argument.value.deepcopy() : argument.value);
        break;
    }
  }
  step.handle.callBoxed(stack);
  if (step.results.empty()) return;
  if (stack.size() == 1 && stack[0].isTensorList()) {
    auto list = stack[0].toTensorVector();
    TORCH_CHECK(list.size() == step.results.size(), "the operation returned ", list.size(),
                " tensors, the plan expects ", step.results.size());
    for (size_t i = 0; i < list.size(); ++i) bind(tensors, step.results[i], std::move(list[i]));
    return;
  }
  TORCH_CHECK(stack.size() == step.results.size(), "the operation returned ", stack.size(),
              " values, the plan expects ", step.results.size());
  for (size_t i = 0; i < stack.size(); ++i) {
    if (step.results[i] != NO_BUFFER) bind(tensors, step.results[i], stack[i].toTensor());
  }
}

}  // namespace

DirectCall find_direct_call(const std::string& name) {
  for (const Row& row : DIRECT_CALLS) {
    if (row.name == name) return row.call;
  }
  return nullptr;
}

void call_extern(const ExternStep& step, at::Tensor* tensors) {
  if (!step.direct) return call_boxed(step, tensors);
  at::Tensor results[3];
  step.direct(step, tensors, results);
  for (size_t i = 0; i < step.results.size(); ++i) bind(tensors, step.results[i], results[i]);
}

}  // namespace accel
