// A GPU that is not there: tensors "on cuda:0" whose memory is the processor's, for a torch without CUDA.
//
// Every operation runs as the processor's on the same memory; views stay views, in-place stays in-place.
// Launches are handed to `simulated_gpu_launch`, a callback. What a GPU does beside the program (streams,
// waiting, faults) is not simulated.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/GeneratorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <unordered_map>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::Device GPU(CUDA, 0);

// ---- memory and the device

struct Memory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* made = nullptr;
    if (bytes && posix_memalign(&made, 512, bytes)) TORCH_CHECK(false, "no memory");
    return {made, made, &std::free, GPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
Memory memory;

struct Counting : c10::GeneratorImpl {
  Counting() : GeneratorImpl(GPU, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { seed_ = seed, offset_ = 0; }
  void set_offset(uint64_t offset) override { offset_ = offset; }
  uint64_t get_offset() const override { return offset_; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override { return seed_; }
  void set_state(const c10::TensorImpl& state) override {
    const auto* numbers = static_cast<const uint64_t*>(state.data());
    seed_ = numbers[0], offset_ = numbers[1];
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    at::Tensor state = at::detail::empty_cpu({16}, at::kByte, std::nullopt, c10::kCPU, false, std::nullopt);
    auto* numbers = static_cast<uint64_t*>(state.mutable_data_ptr());
    numbers[0] = seed_, numbers[1] = offset_;
    return state.getIntrusivePtr();
  }
  Counting* clone_impl() const override {
    auto* copy = new Counting();
    copy->seed_ = seed_, copy->offset_ = offset_;
    return copy;
  }
  uint64_t seed_ = 0, offset_ = 0;
};

const at::Generator& generator() {
  static const at::Generator made = at::make_generator<Counting>();
  return made;
}

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
  // The first one is the default one, for `torch.cuda.default_generators`.
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    static bool given = false;
    if (given) return at::make_generator<Counting>();
    given = true;
    return generator();
  }
};

// One device, one stream; all that is launched has happened.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override { *event = this_(); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  void* this_() const { return const_cast<Guard*>(this); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ---- operations

// The same memory as the processor's; one storage for all tensors of a storage in a call.
class Call {
 public:
  at::Tensor here(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cuda()) return tensor;
    at::Tensor made = over(mapped(tensor.storage()), tensor, c10::DispatchKey::CPU);
    tensors_.push_back({made, tensor});
    return made;
  }

  at::Tensor there(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().is_cuda() || !tensor.has_storage()) return tensor;
    for (auto& [made, original] : tensors_) {
      if (made.is_same(tensor)) return original;
    }
    return over(unmapped(tensor.storage()), tensor, c10::DispatchKey::CUDA);
  }

  // What the operation has done to its arguments' shapes and memory.
  void finish() {
    for (auto& [made, original] : tensors_) {
      auto* impl = original.unsafeGetTensorImpl();
      if (made.storage().unsafeGetStorageImpl() != storages_.at(original.storage().unsafeGetStorageImpl()).unsafeGetStorageImpl()) {
        impl->set_storage_keep_dtype(unmapped(made.storage()));
      }
      if (made.sizes() != original.sizes() || made.strides() != original.strides() ||
          made.storage_offset() != original.storage_offset()) {
        impl->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
      }
      // A storage that has grown lies elsewhere.
      const auto& storage = made.storage();
      auto* mine = original.storage().unsafeGetStorageImpl();
      if (storage.nbytes() > mine->nbytes()) {
        c10::DataPtr grown = memory.allocate(storage.nbytes());
        std::memcpy(grown.get(), storage.data(), storage.nbytes());
        mine->set_data_ptr_noswap(std::move(grown));
        mine->set_nbytes(storage.nbytes());
      }
    }
  }

 private:
  static at::Tensor over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
    auto* impl = made.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    impl->_set_conj(like.is_conj());
    impl->_set_neg(like.is_neg());
    if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    return made;
  }

  const c10::Storage& mapped(const c10::Storage& storage) {
    auto* key = storage.unsafeGetStorageImpl();
    auto found = storages_.find(key);
    if (found != storages_.end()) return found->second;
    auto* kept = new c10::Storage(storage);
    c10::DataPtr data(storage.mutable_data(), kept, [](void* p) { delete static_cast<c10::Storage*>(p); },
                      c10::Device(c10::kCPU));
    c10::Storage made(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                      c10::GetAllocator(c10::kCPU), /*resizable=*/true);
    back_.emplace(made.unsafeGetStorageImpl(), storage);
    return storages_.emplace(key, made).first->second;
  }

  const c10::Storage& unmapped(const c10::Storage& storage) {
    auto* key = storage.unsafeGetStorageImpl();
    auto found = back_.find(key);
    if (found != back_.end()) return found->second;
    c10::DataPtr data = memory.allocate(storage.nbytes());
    if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
    c10::Storage made(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), &memory, /*resizable=*/true);
    held_.push_back(storage);
    return back_.emplace(key, made).first->second;
  }

  std::unordered_map<c10::StorageImpl*, c10::Storage> storages_, back_;
  std::vector<c10::Storage> held_;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;
};

template <typename Change>
c10::IValue changed(const c10::IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(change(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (std::optional<at::Tensor> t : value.toOptionalTensorList()) {
      list.push_back(t ? std::optional<at::Tensor>(change(*t)) : std::nullopt);
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(c10::kCPU);
  return value;
}

void on_the_processor(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  size_t count = schema.arguments().size();
  size_t first = stack->size() - count;
  Call call;
  bool from_gpu = false;
  auto before = std::vector<c10::IValue>(stack->begin() + first, stack->end());
  // A processor's tensor beside a GPU's stays one only where it is a number.
  for (size_t i = 0; i < count; ++i) {
    (*stack)[first + i] = changed(before[i], [&](const at::Tensor& t) {
      from_gpu |= t.defined() && t.device().is_cuda();
      return call.here(t);
    });
  }
  const std::string& name = schema.name();
  bool copies = name == "aten::copy_" || name == "aten::_copy_from";
  if (!copies) {
    for (const auto& value : before) {
      changed(value, [&](const at::Tensor& t) {
        TORCH_CHECK(!t.defined() || t.device().is_cuda() || t.dim() == 0 || name.rfind("aten::index", 0) == 0 ||
                        name.rfind("aten::_index", 0) == 0,
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!");
        return t;
      });
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    c10::impl::ExcludeDispatchKeyGuard uncast(c10::autocast_dispatch_keyset);
    op.callBoxed(stack);
  }
  call.finish();
  size_t results = schema.returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); ++i) {
    bool moves_away = copies && before[0].isTensor() && before[0].toTensor().device().is_cpu();
    if (moves_away) {
      (*stack)[i] = before[0];
      continue;
    }
    (*stack)[i] = changed((*stack)[i], [&](const at::Tensor& t) { return call.there(t); });
  }
}

at::Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(c10::asIntArrayRefSlow(sizes, __FILE__, __LINE__), &memory,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype())), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(c10::asIntArrayRefSlow(sizes, __FILE__, __LINE__),
                                           c10::asIntArrayRefSlow(strides, __FILE__, __LINE__), &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype())));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_processor>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  // Not as for any device, from smaller operations: as the processor's own.
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    static const std::set<std::string> others = {"empty", "empty_strided", "copy_", "fill_", "uniform_", "bernoulli_",
                                                 "native_dropout"};
    auto op = dispatcher.findOp(name);
    if (name.name.rfind("aten::", 0) != 0 || !op || others.count(name.name.substr(6))) continue;
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::CPU) || op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    std::string whole = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
    m.impl(whole.c_str(), torch::CppFunction::makeFromBoxedFunction<&on_the_processor>());
  }
  for (const char* name : {"copy_", "fill_.Scalar"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_the_processor>());
  }
}

// ---- launches

using Launch = int (*)(const char* image, const char* symbol, uint64_t grid, void** arguments);
Launch launcher = nullptr;
using Parameters = int (*)(const char* image, const char* symbol);
Parameters parameters = nullptr;  // how many a kernel has
int context = 0;
thread_local void* current = nullptr;

struct Function {
  std::string image, name;
};

// cuda.h's CUDA_KERNEL_NODE_PARAMS_v2.
struct KernelNode {
  Function* function;
  unsigned grid[3], block[3], shared;
  void **arguments, **extra;
  void *kernel, *context;
};
// A kernel of a graph; its parameters are copied when they are given.
struct Node {
  Function* function;
  uint64_t grid;
  std::vector<uint64_t> values;

  void set(const KernelNode* given) {
    function = given->function, grid = given->grid[0];
    values.resize(parameters(function->image.c_str(), function->name.c_str()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = *static_cast<uint64_t*>(given->arguments[i]);
  }
};
using Graph = std::vector<Node*>;
using Ready = std::vector<std::pair<Node*, Node>>;  // what it was made of, and what is launched

struct Start {
  Start() { c10::SetAllocator(CUDA, &memory, /*priority=*/255); }
} start;

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

extern "C" {
void simulated_gpu_launcher(Launch launch, Parameters count) { launcher = launch, parameters = count; }

// Of torch's library for GPUs.
void _ZN2at17CUDAGeneratorImpl28set_philox_offset_per_threadEm(void*, uint64_t offset) {
  static_cast<Counting*>(generator().unsafeGetGeneratorImpl())->offset_ = offset;
}
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }

// Of the driver's.
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void** result, int) { return *result = &context, 0; }
int cuCtxGetCurrent(void** result) { return *result = current, 0; }
int cuCtxPushCurrent_v2(void* pushed) { return current = pushed, 0; }
int cuCtxPopCurrent_v2(void** popped) { return *popped = current, current = nullptr, 0; }
int cuModuleLoadData(void** module, const void* image) {
  return *module = new std::string(static_cast<const char*>(image)), 0;
}
int cuModuleUnload(void* module) { return delete static_cast<std::string*>(module), 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  return *function = new Function{*static_cast<std::string*>(module), name}, 0;
}
int cuThreadExchangeStreamCaptureMode(int*) { return 0; }
int cuFuncLoad(void*) { return 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuLaunchKernel(void* function, unsigned grid, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                   void** arguments, void**) {
  auto* f = static_cast<Function*>(function);
  return launcher(f->image.c_str(), f->name.c_str(), grid, arguments);
}
int cuGraphCreate(void** graph, unsigned) { return *graph = new Graph, 0; }
int cuGraphAddKernelNode_v2(void** node, void* graph, void* const*, size_t, const KernelNode* kernel) {
  auto* made = new Node;
  made->set(kernel);
  static_cast<Graph*>(graph)->push_back(made);
  return *node = made, 0;
}
int cuGraphInstantiateWithFlags(void** ready, void* graph, unsigned long long) {
  auto* made = new Ready;
  for (Node* node : *static_cast<Graph*>(graph)) made->push_back({node, *node});
  return *ready = made, 0;
}
int cuGraphExecKernelNodeSetParams_v2(void* ready, void* node, const KernelNode* kernel) {
  for (auto& [made_of, launched] : *static_cast<Ready*>(ready)) {
    if (made_of == node) return launched.set(kernel), 0;
  }
  return 1;
}
int cuGraphLaunch(void* ready, void*) {
  for (auto& [_, node] : *static_cast<Ready*>(ready)) {
    std::vector<void*> arguments;
    for (uint64_t& value : node.values) arguments.push_back(&value);
    int error = launcher(node.function->image.c_str(), node.function->name.c_str(), node.grid, arguments.data());
    if (error) return error;
  }
  return 0;
}
int cuGraphExecDestroy(void* ready) { return delete static_cast<Ready*>(ready), 0; }
int cuGraphDestroy(void* graph) {
  for (Node* node : *static_cast<Graph*>(graph)) delete node;
  return delete static_cast<Graph*>(graph), 0;
}
int cuStreamIsCapturing(void*, int* status) { return *status = 0, 0; }
int cuGetErrorName(int error, const char** text) {
  return *text = error == 710 ? "CUDA_ERROR_ASSERT" : "CUDA_ERROR_UNKNOWN", 0;
}
}
