// Frames: binding inputs, outputs, views and dynamic buffers to memory.
#include "frame.h"

#include "externs.h"
#include "output_pool.h"

#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>

#include <cstring>

namespace accel {
namespace {

constexpr c10::DispatchKeySet CPU_KEYS(c10::DispatchKey::CPU);
constexpr c10::DispatchKeySet CUDA_KEYS(c10::DispatchKey::CUDA);

// A borrowed at::Tensor: release() before it is destroyed.
at::Tensor borrow(c10::TensorImpl* impl) {
  return at::Tensor(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim(impl));
}

at::Tensor tensor_over(c10::Storage storage, const Layout& layout, int64_t offset_bytes) {
  auto size = static_cast<int64_t>(c10::elementSize(layout.dtype));
  TORCH_CHECK(offset_bytes % size == 0, "a buffer's offset is not a multiple of its element size");
  c10::DispatchKeySet keys = storage.device().is_cpu() ? CPU_KEYS : CUDA_KEYS;
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), keys, c10::scalarTypeToTypeMeta(layout.dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(layout.sizes, layout.strides,
                                                      offset_bytes / size);
  return tensor;
}

// What a prepared view points to between runs. Never destroyed: frames may outlive
// static destructors.
const c10::Storage& empty_storage() {
  static const auto* storage = new c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), 0, c10::DataPtr(nullptr, c10::Device(c10::kCPU)),
      nullptr, /*resizable=*/false));
  return *storage;
}

void* data_of(const c10::TensorImpl* impl, bool written) {
  auto* mutable_impl = const_cast<c10::TensorImpl*>(impl);
  return written ? mutable_impl->mutable_data() : const_cast<void*>(mutable_impl->data());
}

template <typename T>
bool nonzero(const void* data) {
  return *static_cast<const T*>(data) != T(0);
}

bool read_truth(const void* data, at::ScalarType dtype) {
  switch (dtype) {
    case at::kBool: return nonzero<bool>(data);
    case at::kByte: return nonzero<uint8_t>(data);
    case at::kChar: return nonzero<int8_t>(data);
    case at::kShort: return nonzero<int16_t>(data);
    case at::kInt: return nonzero<int32_t>(data);
    case at::kLong: return nonzero<int64_t>(data);
    case at::kFloat: return nonzero<float>(data);
    case at::kDouble: return nonzero<double>(data);
    case at::kHalf: return static_cast<float>(*static_cast<const at::Half*>(data)) != 0;
    case at::kBFloat16: return static_cast<float>(*static_cast<const at::BFloat16*>(data)) != 0;
    default: TORCH_CHECK(false, "no truth value for dtype ", dtype);
  }
}

}  // namespace

at::Tensor allocate_output(const Layout& layout, c10::Device device) {
  if (!device.is_cpu()) {
    auto options = at::TensorOptions().dtype(layout.dtype).device(device);
    auto elements = static_cast<int64_t>(layout.storage_bytes / c10::elementSize(layout.dtype));
    at::Tensor tensor = at::empty_strided({elements}, {1}, options);  // its memory may be longer
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(layout.sizes, layout.strides);
    return tensor;
  }
  c10::Allocator* allocator = c10::GetCPUAllocator();
  size_t bytes = layout.storage_bytes;
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, allocate_pooled(bytes), allocator,
      /*resizable=*/true);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(storage)), CPU_KEYS, c10::scalarTypeToTypeMeta(layout.dtype));
  auto* impl = tensor.unsafeGetTensorImpl();
  if (layout.contiguous) {
    if (layout.sizes.size() != 1 || layout.sizes[0] != 0) impl->set_sizes_contiguous(layout.sizes);
  } else {
    impl->set_sizes_and_strides(layout.sizes, layout.strides);
  }
  return tensor;
}

Frame::Frame(const Plan& plan)
    : plan_(plan),
      pointers_(plan.buffers.size(), nullptr),
      tensors_(plan.buffers.size()),
      arguments_(plan.max_kernel_buffers, nullptr) {
  // Prepared tensors are ordinary ones, whatever mode the first run is in.
  c10::InferenceMode ordinary(false);
  prepare_arena();
}

Frame::~Frame() { end(); }

c10::Storage Frame::cpu_arena() const {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), plan_.arena_bytes,
      c10::GetCPUAllocator()->allocate(plan_.arena_bytes), nullptr, /*resizable=*/false));
}

c10::Storage Frame::gpu_arena() const {
  auto options = at::TensorOptions().dtype(at::kByte).device(plan_.device);
  return at::empty_strided({static_cast<int64_t>(plan_.arena_bytes)}, {1}, options).storage();
}

void Frame::prepare_arena() {
  if (plan_.arena_bytes == 0) return;
  // c10's allocations are 64-byte aligned, a GPU's more.
  c10::Storage whole = plan_.device.is_cpu() ? cpu_arena() : gpu_arena();
  char* base = static_cast<char*>(whole.mutable_data());
  Layout bytes;
  bytes.sizes = {static_cast<int64_t>(plan_.arena_bytes)};
  bytes.strides = {1};
  bytes.dtype = at::kByte;
  arena_ = tensor_over(whole, bytes, 0);
  for (uint32_t id = 0; id < plan_.buffers.size(); ++id) {
    const Buffer& buffer = plan_.buffers[id];
    if (plan_.buffers[buffer.root].kind != BufferKind::arena) continue;
    int64_t offset = buffer.offset_bytes;
    if (buffer.kind == BufferKind::view) offset += plan_.buffers[buffer.root].offset_bytes;
    pointers_[id] = base + offset;
    if (buffer.as_tensor) tensors_[id] = tensor_over(whole, buffer.layout, offset);
  }
  arena_uses_ = static_cast<uint32_t>(whole.use_count()) - 1;  // without `whole` itself
}

bool Frame::reusable() const {
  if (!plan_.device.is_cpu()) return false;
  if (!plan_.boxed || !arena_.defined()) return true;
  if (arena_.storage().use_count() != arena_uses_) return false;
  for (uint32_t id = 0; id < tensors_.size(); ++id) {
    if (tensors_[id].defined() && tensors_[id].use_count() != 1) return false;
  }
  return true;
}

void Frame::begin(c10::TensorImpl* const* inputs) {
  inputs_ = inputs;
  for (uint32_t id : plan_.input_buffers) {
    const Buffer& buffer = plan_.buffers[id];
    c10::TensorImpl* impl = inputs[buffer.index];
    TORCH_CHECK(!impl->is_conj() && !impl->is_neg(), "input ", buffer.index,
                " is conjugated or negated lazily");
    pointers_[id] = data_of(impl, buffer.written);
    TORCH_CHECK(pointers_[id] || buffer.layout.numel == 0, "input ", buffer.index,
                " has no memory");
    tensors_[id] = borrow(impl);
    bind_views(id);
  }
  for (uint32_t id : plan_.output_buffers) {
    tensors_[id] = allocate_output(layout(id), plan_.device);
    pointers_[id] = const_cast<void*>(tensors_[id].unsafeGetTensorImpl()->data());
    bind_views(id);
  }
}

void Frame::bind_views(uint32_t root) {
  for (uint32_t id : plan_.views_of[root]) {
    pointers_[id] = static_cast<char*>(pointers_[root]) + plan_.buffers[id].offset_bytes;
    if (plan_.buffers[id].as_tensor) prepare_view(id);
  }
}

// Points the view's prepared tensor at its root's storage (or makes it on first use).
void Frame::prepare_view(uint32_t id) {
  const Buffer& buffer = plan_.buffers[id];
  const c10::TensorImpl* root = tensors_[buffer.root].unsafeGetTensorImpl();
  int64_t offset = buffer.offset_bytes +
                   root->storage_offset() * static_cast<int64_t>(root->itemsize());
  if (!tensors_[id].defined()) {
    c10::InferenceMode ordinary(false);
    tensors_[id] = tensor_over(root->unsafe_storage(), buffer.layout, offset);
    return;
  }
  auto size = static_cast<int64_t>(c10::elementSize(buffer.layout.dtype));
  TORCH_CHECK(offset % size == 0, "a view's offset is not a multiple of its element size");
  auto* view = tensors_[id].unsafeGetTensorImpl();
  view->set_storage_keep_dtype(root->unsafe_storage());
  view->set_storage_offset(offset / size);
}

void Frame::run_kernel(const KernelStep& kernel, long threads) {
  size_t count = kernel.buffers.size();
  if (arguments_.size() < count) arguments_.resize(count);  // a launch used it
  for (size_t i = 0; i < count; ++i) arguments_[i] = pointers_[kernel.buffers[i]];
  kernel.function(arguments_.data(), threads);
}

void Frame::run_launch(const LaunchStep& launch, void* stream) {
  prepare_launch(launch, launch_);
  launch.kernel->launch(stream, launch_, arguments_);
}

void Frame::prepare_launch(const LaunchStep& launch, KernelLaunch& prepared) const {
  std::vector<uint64_t>& values = prepared.values;
  values.clear();
  for (uint32_t id : launch.buffers) values.push_back(reinterpret_cast<uint64_t>(pointers_[id]));
  for (const LaunchNumber& number : launch.numbers) values.push_back(value_of(number));
  launch.kernel->prepare(prepared, launch.grid, launch.buffers.size());
}

uint64_t Frame::value_of(const LaunchNumber& number) const {
  switch (number.kind) {
    case LaunchNumber::plain: break;
    case LaunchNumber::seed: return seed_;
    case LaunchNumber::drawn: return block_ + static_cast<uint64_t>(number.value);
    case LaunchNumber::host: {
      uint64_t bits = 0;
      auto id = static_cast<size_t>(number.value);
      std::memcpy(&bits, pointers_[id], c10::elementSize(plan_.buffers[id].layout.dtype));
      return bits;
    }
  }
  return static_cast<uint64_t>(number.value);
}

void Frame::run_extern(const ExternStep& step) {
  call_extern(step, tensors_.data());
  for (uint32_t id : step.results) {
    if (id != NO_BUFFER) bind_dynamic(id);
  }
}

// A fresh result: kernels and views rely on its layout, so it is made what the plan says.
void Frame::bind_dynamic(uint32_t id) {
  at::Tensor& tensor = tensors_[id];
  if (tensor.is_conj() || tensor.is_neg()) tensor = tensor.resolve_conj().resolve_neg();
  TORCH_CHECK(tensor.device() == plan_.device, "an operation returned a tensor on ",
              tensor.device(), ", the plan is one for ", plan_.device);
  const Buffer& buffer = plan_.buffers[id];
  if (buffer.has_layout) {
    const Layout& expected = buffer.layout;
    TORCH_CHECK(tensor.sizes() == c10::IntArrayRef(expected.sizes) &&
                    tensor.scalar_type() == expected.dtype,
                "an operation returned ", tensor.scalar_type(), tensor.sizes(),
                ", the plan expects ", expected.dtype, c10::IntArrayRef(expected.sizes));
    if (tensor.strides() != c10::IntArrayRef(expected.strides) && expected.numel > 1) {
      at::Tensor copy = allocate_output(expected, plan_.device);
      copy.copy_(tensor);
      tensor = std::move(copy);
    }
  }
  TORCH_CHECK(tensor.device() == plan_.device && tensor.layout() == at::kStrided,
              "an operation returned a tensor that is not a dense one on ", plan_.device);
  pointers_[id] = const_cast<void*>(tensor.unsafeGetTensorImpl()->data());
  bind_views(id);
}

bool Frame::truth(uint32_t id) const {
  const Buffer& buffer = plan_.buffers[id];
  if (!plan_.device.is_cpu()) {  // waits for the kernels
    at::Tensor here = tensors_[id].to(at::kCPU);
    TORCH_CHECK(here.numel() == 1, "a speculated value has ", here.numel(), " elements");
    return read_truth(here.const_data_ptr(), here.scalar_type());
  }
  if (buffer.has_layout) return read_truth(pointers_[id], buffer.layout.dtype);
  const at::Tensor& tensor = tensors_[id];
  TORCH_CHECK(tensor.numel() == 1, "a speculated value has ", tensor.numel(), " elements");
  return read_truth(pointers_[id], tensor.scalar_type());
}

void Frame::check_writable() const {
  if (c10::InferenceMode::is_enabled()) return;
  for (uint32_t id : plan_.input_buffers) {
    TORCH_CHECK(!plan_.buffers[id].written || !tensors_[id].is_inference(),
                "Inplace update to inference tensor outside InferenceMode is not allowed.");
  }
}

void Frame::bump_version(uint32_t input_buffer) {
  tensors_[input_buffer].unsafeGetTensorImpl()->bump_version();
}

void Frame::collect(std::vector<at::Tensor>& outputs) {
  outputs.reserve(plan_.outputs.size());
  for (size_t i = 0; i < plan_.outputs.size(); ++i) {
    // The same buffer twice is the same tensor twice.
    size_t first = 0;
    while (plan_.outputs[first] != plan_.outputs[i]) ++first;
    if (first < i) {
      outputs.push_back(outputs[first]);
    } else {
      outputs.push_back(output_of(plan_.outputs[i]));
    }
  }
}

at::Tensor Frame::output_of(uint32_t id) {
  switch (plan_.buffers[id].kind) {
    case BufferKind::input:
    case BufferKind::output: return tensors_[id];
    case BufferKind::dynamic: return tensors_[id] = dynamic_output(tensors_[id]);
    case BufferKind::view:
      return plan_.buffers[id].severed == Buffer::no ? view_output(id) : severed_output(id);
    case BufferKind::arena: break;
  }
  at::Tensor copy = allocate_output(layout(id), plan_.device);
  copy.copy_(tensor_over(arena_.storage(), layout(id), plan_.buffers[id].offset_bytes));
  return copy;
}

at::Tensor Frame::view_output(uint32_t id) {
  const Buffer& buffer = plan_.buffers[id];
  const Layout& view = buffer.layout;
  if (plan_.buffers[buffer.root].kind == BufferKind::arena) {
    int64_t offset = plan_.buffers[buffer.root].offset_bytes + buffer.offset_bytes;
    at::Tensor copy = allocate_output(view, plan_.device);
    copy.copy_(tensor_over(arena_.storage(), view, offset));
    return copy;
  }
  at::Tensor root = output_of(buffer.root);
  if (root.scalar_type() != view.dtype) root = root.view(view.dtype);
  auto size = static_cast<int64_t>(c10::elementSize(view.dtype));
  // Through the dispatcher: `_base`, the shared version counter and the view's autograd
  // metadata are then eager's.
  int64_t offset = root.storage_offset() + buffer.offset_bytes / size;
  at::Tensor from = buffer.of == NO_BUFFER ? root : severed_output(buffer.of);
  at::Tensor result = from.as_strided(view.sizes, view.strides, offset);
  switch (buffer.severed) {
    case Buffer::no: return result;
    case Buffer::detach: return result.detach();
    case Buffer::data: return result.variable_data();
  }
  return result;
}

// One tensor in a run: others may be its views.
at::Tensor Frame::severed_output(uint32_t id) {
  for (const auto& [known, tensor] : severed_) {
    if (known == id) return tensor;
  }
  return severed_.emplace_back(id, view_output(id)).second;
}

// An extern may return an alias: of the arena (copied: outputs own their memory), of an
// input (made again as a view that autograd knows), or a prepared tensor (never given out).
at::Tensor Frame::dynamic_output(const at::Tensor& tensor) {
  if (!tensor.has_storage()) return tensor;
  if (arena_.defined() && tensor.storage().is_alias_of(arena_.storage())) {
    at::Tensor copy = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options());
    return copy.copy_(tensor);
  }
  for (uint32_t id : plan_.input_buffers) {
    const at::Tensor& input = tensors_[id];
    if (input.is_same(tensor)) return tensor;
    if (!tensor.storage().is_alias_of(input.storage())) continue;
    if (input.scalar_type() != tensor.scalar_type()) return input.view(tensor.scalar_type());
    return input.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  }
  for (uint32_t id = 0; id < tensors_.size(); ++id) {
    if (plan_.buffers[id].kind == BufferKind::view && tensors_[id].is_same(tensor)) {
      return tensor.alias();
    }
  }
  return tensor;
}

void Frame::end() noexcept {
  if (!inputs_) return;
  inputs_ = nullptr;
  severed_.clear();
  for (uint32_t id = 0; id < tensors_.size(); ++id) {
    const Buffer& buffer = plan_.buffers[id];
    at::Tensor& tensor = tensors_[id];
    if (!tensor.defined()) continue;
    switch (buffer.kind) {
      case BufferKind::input: tensor.unsafeReleaseTensorImpl(); break;
      case BufferKind::output:
      case BufferKind::dynamic: tensor = at::Tensor(); break;
      case BufferKind::arena: break;
      case BufferKind::view:
        if (plan_.buffers[buffer.root].kind == BufferKind::arena) break;
        // Kept for the next run without its storage, unless someone else holds it.
        if (tensor.use_count() == 1 && plan_.device.is_cpu()) {
          tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(empty_storage());
        } else {
          tensor = at::Tensor();
        }
        break;
    }
  }
}

}  // namespace accel
