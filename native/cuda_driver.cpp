// The driver's functions are declared here by hand, as in cuda.h of CUDA 12 and 13; they are
// C functions with a stable ABI.
#include "cuda_driver.h"

#include "native.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

namespace accel {
namespace {

using Result = int;  // CUresult; 0 is success
constexpr int MIN_VERSION = 12000;
constexpr unsigned PLAIN_SHARED_BYTES = 48 << 10;  // beyond this a function must ask for more
constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;   // CU_FUNC_ATTRIBUTE_...
constexpr uint64_t MAX_GRID = 0x7fffffff;
constexpr int CAPTURE_RELAXED = 2;            // CU_STREAM_CAPTURE_MODE_...
constexpr Result CAPTURE_IMPLICIT = 906;      // the default stream's, while another one is captured

// The driver's and the runtime's documentation: the process has to be ended to use the GPU again.
constexpr Result FINAL[] = {
    214,  // CUDA_ERROR_ECC_UNCORRECTABLE
    700,  // CUDA_ERROR_ILLEGAL_ADDRESS
    702,  // CUDA_ERROR_LAUNCH_TIMEOUT
    709,  // CUDA_ERROR_CONTEXT_IS_DESTROYED
    710,  // CUDA_ERROR_ASSERT
    714,  // CUDA_ERROR_HARDWARE_STACK_ERROR
    715,  // CUDA_ERROR_ILLEGAL_INSTRUCTION
    716,  // CUDA_ERROR_MISALIGNED_ADDRESS
    717,  // CUDA_ERROR_INVALID_ADDRESS_SPACE
    718,  // CUDA_ERROR_INVALID_PC
    719,  // CUDA_ERROR_LAUNCH_FAILED
    721,  // CUDA_ERROR_CONTAINED
};

// CUDA_KERNEL_NODE_PARAMS_v2
struct KernelNode {
  void* function;
  unsigned grid[3], block[3], shared_bytes;
  void** arguments;
  void** extra;
  void* kernel;  // read if there is no function
  void* context;
};

struct Driver {
  Result (*init)(unsigned flags);
  Result (*version)(int* version);
  Result (*device_count)(int* count);
  Result (*device_get)(int* device, int ordinal);
  Result (*retain_context)(void** context, int device);
  Result (*current_context)(void** context);
  Result (*push_context)(void* context);
  Result (*pop_context)(void** context);
  Result (*load_module)(void** module, const void* image);
  Result (*unload_module)(void* module);
  Result (*get_function)(void** function, void* module, const char* name);
  Result (*set_attribute)(void* function, int attribute, int value);
  Result (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void* stream, void** arguments, void** extra);
  Result (*capturing)(void* stream, int* status);
  Result (*exchange_mode)(int* mode);
  Result (*finish_loading)(void* function);  // null before CUDA 12.4
  Result (*make_graph)(void** graph, unsigned flags);
  Result (*add_kernel)(void** node, void* graph, void* const* behind, size_t count,
                       const KernelNode* kernel);
  Result (*make_ready)(void** ready, void* graph, unsigned long long flags);
  Result (*set_kernel)(void* ready, void* node, const KernelNode* kernel);
  Result (*launch_graph)(void* ready, void* stream);
  Result (*destroy_ready)(void* ready);
  Result (*destroy_graph)(void* graph);
  Result (*error_name)(Result error, const char** text);

  int known_version = 0;
  std::string missing;         // why there is no driver
  std::string graphs_missing;  // why it makes no graphs
};

template <typename Function>
bool find(void* library, const char* name, Function& function, std::string& missing) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) missing = std::string("NVIDIA's driver has no ") + name;
  return function != nullptr;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string error_text(const Driver& driver, Result error) {
  const char* name = nullptr;
  if (driver.error_name && driver.error_name(error, &name) == 0 && name) return name;
  return "error " + std::to_string(error);
}

Driver load_driver() {
  Driver d{};
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    d.missing = "NVIDIA's driver (libcuda.so.1) is not installed; install it";
    return d;
  }
  bool all = find(library, "cuInit", d.init, d.missing) &&
             find(library, "cuDriverGetVersion", d.version, d.missing) &&
             find(library, "cuDeviceGetCount", d.device_count, d.missing) &&
             find(library, "cuDeviceGet", d.device_get, d.missing) &&
             find(library, "cuDevicePrimaryCtxRetain", d.retain_context, d.missing) &&
             find(library, "cuCtxGetCurrent", d.current_context, d.missing) &&
             find(library, "cuCtxPushCurrent_v2", d.push_context, d.missing) &&
             find(library, "cuCtxPopCurrent_v2", d.pop_context, d.missing) &&
             find(library, "cuModuleLoadData", d.load_module, d.missing) &&
             find(library, "cuModuleUnload", d.unload_module, d.missing) &&
             find(library, "cuModuleGetFunction", d.get_function, d.missing) &&
             find(library, "cuFuncSetAttribute", d.set_attribute, d.missing) &&
             find(library, "cuLaunchKernel", d.launch, d.missing) &&
             find(library, "cuStreamIsCapturing", d.capturing, d.missing) &&
             find(library, "cuThreadExchangeStreamCaptureMode", d.exchange_mode, d.missing) &&
             find(library, "cuGetErrorName", d.error_name, d.missing);
  if (!all) return d;
  d.finish_loading = reinterpret_cast<Result (*)(void*)>(dlsym(library, "cuFuncLoad"));
  // What CUDA 12's cuda.h means by the names without `_v2` and `WithFlags`.
  find(library, "cuGraphCreate", d.make_graph, d.graphs_missing) &&
      find(library, "cuGraphAddKernelNode_v2", d.add_kernel, d.graphs_missing) &&
      find(library, "cuGraphInstantiateWithFlags", d.make_ready, d.graphs_missing) &&
      find(library, "cuGraphExecKernelNodeSetParams_v2", d.set_kernel, d.graphs_missing) &&
      find(library, "cuGraphLaunch", d.launch_graph, d.graphs_missing) &&
      find(library, "cuGraphExecDestroy", d.destroy_ready, d.graphs_missing) &&
      find(library, "cuGraphDestroy", d.destroy_graph, d.graphs_missing);
  if (Result error = d.version(&d.known_version)) {
    d.missing = "NVIDIA's driver does not say its version: " + error_text(d, error);
  } else if (d.known_version < MIN_VERSION) {
    d.missing = "NVIDIA's driver is too old: it knows CUDA " + version_text(d.known_version) +
                ", kernels need " + version_text(MIN_VERSION) + "; install a newer one";
  } else if (Result error = d.init(0)) {
    d.missing = "NVIDIA's driver does not start: " + error_text(d, error) +
                "; `nvidia-smi` may say why";
  }
  return d;
}

// Loaded once and never closed: torch uses the same library.
const Driver& driver() {
  static const Driver* const found = new Driver(load_driver());
  if (!found->missing.empty()) throw DriverError(found->missing);
  return *found;
}

void check(const Driver& d, Result error, const std::string& what) {
  if (error) throw DriverError(what + ": " + error_text(d, error), error);
}

// The device's primary context, which torch's runtime uses too, is current in this scope.
class Current {
 public:
  Current(const Driver& d, int ordinal) : driver_(d) {
    int device;
    check(d, d.device_get(&device, ordinal), "there is no GPU " + std::to_string(ordinal));
    check(d, d.retain_context(&context_, device), "a GPU's context cannot be used");
    enter();
  }
  Current(const Driver& d, void* context) : driver_(d), context_(context) { enter(); }
  ~Current() {
    void* popped;
    if (pushed_) driver_.pop_context(&popped);
  }
  Current(const Current&) = delete;
  void* context() const { return context_; }

 private:
  void enter() {
    void* now = nullptr;
    check(driver_, driver_.current_context(&now), "no current GPU");
    if (now == context_) return;
    check(driver_, driver_.push_context(context_), "a GPU cannot be made current");
    pushed_ = true;
  }

  const Driver& driver_;
  void* context_ = nullptr;
  bool pushed_ = false;
};

// What this thread does here is no part of a graph that anybody captures, and allowed meanwhile.
class OutsideOfCaptures {
 public:
  explicit OutsideOfCaptures(const Driver& d) : driver_(d) {
    check(d, d.exchange_mode(&mode_), "a thread cannot load while a stream is captured");
  }
  ~OutsideOfCaptures() { driver_.exchange_mode(&mode_); }
  OutsideOfCaptures(const OutsideOfCaptures&) = delete;

 private:
  const Driver& driver_;
  int mode_ = CAPTURE_RELAXED;
};

// A new function, loaded wholly: the driver may put that off until the first launch.
void* load_function(const Driver& d, const std::string& symbol, const CudaKernel::Image& image) {
  void *module, *function;
  OutsideOfCaptures outside(d);
  check(d, d.load_module(&module, image.code.data()), "kernel " + symbol + " does not load");
  try {
    check(d, d.get_function(&function, module, symbol.c_str()),
          "kernel " + symbol + " is not in its image");
    if (image.shared_bytes > PLAIN_SHARED_BYTES) {
      check(d,
            d.set_attribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES,
                            static_cast<int>(image.shared_bytes)),
            "kernel " + symbol + " does not get its shared memory");
    }
    if (d.finish_loading) {
      check(d, d.finish_loading(function), "kernel " + symbol + " does not load");
    }
  } catch (...) {
    d.unload_module(module);
    throw;
  }
  return function;
}

// The function of an image in the current context.
void* function_of(const Driver& d, void* context, const std::string& symbol,
                  const CudaKernel::Image& image) {
  using Key = std::tuple<void*, std::string, unsigned, std::string>;
  static auto* const mutex = new std::mutex();
  static auto* const loaded = new std::map<Key, void*>();
  std::lock_guard<std::mutex> lock(*mutex);
  Key key(context, symbol, image.shared_bytes, image.code);
  auto found = loaded->find(key);
  if (found == loaded->end()) {
    void* function = load_function(d, symbol, image);
    found = loaded->emplace(std::move(key), function).first;
  }
  return found->second;
}

}  // namespace

bool is_final(int code) {
  return std::find(std::begin(FINAL), std::end(FINAL), code) != std::end(FINAL);
}

// By the function behind torch's own checks, since text and type depend on its version.
std::exception_ptr error_of_torch(int code) {
  using Check = void (*)(int32_t, const char*, const char*, uint32_t, bool);
  static const auto throw_error = [] {
    void* library = dlopen("libc10_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    const char* name = "_ZN3c104cuda29c10_cuda_check_implementationEiPKcS2_jb";
    return library ? reinterpret_cast<Check>(dlsym(library, name)) : nullptr;
  }();
  try {
    if (throw_error) throw_error(code, __FILE__, __func__, __LINE__, true);
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

DriverFacts driver_facts() {
  const Driver& d = driver();
  DriverFacts facts{d.known_version, 0};
  check(d, d.device_count(&facts.devices), "the GPUs cannot be counted");
  return facts;
}

// Through torch's C interface for compiled models, which is the same in every version.
void* current_cuda_stream(int device) {
  using Ask = int (*)(int32_t device, void** stream);
  static const auto ask = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Ask>(found);
  }();
  void* stream = nullptr;
  if (!ask || ask(device, &stream) != 0) throw DriverError("this torch has no CUDA streams");
  return stream;
}

bool is_capturing(void* stream) {
  const Driver& d = driver();
  int status = 0;  // CU_STREAM_CAPTURE_STATUS_NONE
  Result error = d.capturing(stream, &status);
  if (error == CAPTURE_IMPLICIT) return true;
  check(d, error, "a stream does not say whether it is captured");
  return status != 0;
}

CudaKernel::CudaKernel(int device, const std::string& symbol, unsigned threads,
                       unsigned scratch_pointers, const std::vector<Image>& images)
    : symbol_(symbol), threads_(threads), scratch_pointers_(scratch_pointers) {
  const Driver& d = driver();
  Current current(d, device);
  context_ = current.context();
  for (const Image& image : images) {
    loaded_.push_back(
        {image.alignment, image.shared_bytes, function_of(d, context_, symbol, image)});
  }
  std::sort(loaded_.begin(), loaded_.end(),
            [](const Loaded& a, const Loaded& b) { return a.alignment > b.alignment; });
}

const CudaKernel::Loaded& CudaKernel::image_for(const std::vector<uint64_t>& values,
                                                size_t pointers) const {
  uint64_t bits = 0;
  for (size_t i = 0; i < pointers; ++i) bits |= values[i];
  for (const Loaded& image : loaded_) {
    if (bits % image.alignment == 0) return image;
  }
  throw DriverError("kernel " + symbol_ + " has no image for these addresses");
}

void CudaKernel::prepare(KernelLaunch& launch, uint64_t grid, size_t pointers) const {
  launch.kernel = this;
  launch.function = nullptr;
  if (grid == 0) return;
  if (grid > MAX_GRID) throw DriverError("kernel " + symbol_ + " would need too many programs");
  const Loaded& image = image_for(launch.values, pointers);
  launch.values.resize(launch.values.size() + scratch_pointers_, 0);
  launch.function = image.function;
  launch.grid = static_cast<unsigned>(grid);
  launch.shared_bytes = image.shared_bytes;
}

namespace {

void** addresses_of(KernelLaunch& launch, std::vector<void*>& arguments) {
  arguments.clear();
  for (uint64_t& value : launch.values) arguments.push_back(&value);
  return arguments.data();
}

}  // namespace

void CudaKernel::launch(void* stream, KernelLaunch& launch, std::vector<void*>& arguments) const {
  if (!launch.function) return;
  const Driver& d = driver();
  Current current(d, context_);
  check(d,
        d.launch(launch.function, launch.grid, 1, 1, threads_, 1, 1, launch.shared_bytes, stream,
                 addresses_of(launch, arguments), nullptr),
        "kernel " + symbol_ + " cannot be launched");
}

// ---- graphs ---------------------------------------------------------------------

namespace {

KernelNode node_of(KernelLaunch& launch, unsigned threads, std::vector<void*>& arguments) {
  return {launch.function, {launch.grid, 1, 1}, {threads, 1, 1}, launch.shared_bytes,
          addresses_of(launch, arguments), nullptr, nullptr, nullptr};
}

}  // namespace

CudaGraph::CudaGraph(const std::vector<KernelLaunch>& launches) : launches_(launches) {
  const Driver& d = driver();
  if (!d.graphs_missing.empty()) throw DriverError(d.graphs_missing);
  context_ = launches_.front().kernel->context_;
  Current current(d, context_);
  OutsideOfCaptures outside(d);
  check(d, d.make_graph(&graph_, 0), "no graph can be made");
  try {
    add_nodes();
    check(d, d.make_ready(&ready_, graph_, 0), "a graph cannot be made ready");
  } catch (...) {
    d.destroy_graph(graph_);
    throw;
  }
}

CudaGraph::~CudaGraph() {
  try {
    const Driver& d = driver();
    Current current(d, context_);
    OutsideOfCaptures outside(d);
    d.destroy_ready(ready_);
    d.destroy_graph(graph_);
  } catch (const DriverError&) {  // the driver has gone, and all that it had with it
  }
}

void CudaGraph::add_nodes() {
  const Driver& d = driver();
  std::vector<void*> arguments;
  void* last = nullptr;
  for (KernelLaunch& launch : launches_) {
    void* node = nullptr;
    if (launch.function) {
      KernelNode kernel = node_of(launch, launch.kernel->threads_, arguments);
      check(d, d.add_kernel(&node, graph_, &last, last ? 1 : 0, &kernel),
            "kernel " + launch.kernel->symbol_ + " cannot be part of a graph");
      last = node;
    }
    nodes_.push_back(node);
  }
}

bool CudaGraph::fits(const std::vector<KernelLaunch>& launches) const {
  return std::equal(launches.begin(), launches.end(), launches_.begin(), launches_.end(),
                    [](const KernelLaunch& a, const KernelLaunch& b) {
                      return a.function == b.function && a.grid == b.grid;
                    });
}

void CudaGraph::set(const std::vector<KernelLaunch>& launches) {
  const Driver& d = driver();
  Current current(d, context_);
  std::vector<void*> arguments;
  for (size_t i = 0; i < launches.size(); ++i) {
    KernelLaunch& launch = launches_[i];
    if (!nodes_[i] || launch.values == launches[i].values) continue;
    launch.values = launches[i].values;
    KernelNode kernel = node_of(launch, launch.kernel->threads_, arguments);
    check(d, d.set_kernel(ready_, nodes_[i], &kernel),
          "a graph does not take the parameters of kernel " + launch.kernel->symbol_);
  }
}

void CudaGraph::launch(void* stream) const {
  const Driver& d = driver();
  Current current(d, context_);
  OutsideOfCaptures outside(d);  // its first launch may take memory
  check(d, d.launch_graph(ready_, stream), "a graph cannot be launched");
}

// ---- Python ---------------------------------------------------------------------

namespace {

PyObject* py_cuda_driver(PyObject*, PyObject*) {
  try {
    DriverFacts facts = driver_facts();
    return Py_BuildValue("{s:i,s:i}", "version", facts.version, "devices", facts.devices);
  } catch (const DriverError& error) {
    PyErr_SetString(PyExc_OSError, error.what());
    return nullptr;
  }
}

PyObject* py_cuda_stream(PyObject*, PyObject* number) {
  long device = PyLong_AsLong(number);
  if (device == -1 && PyErr_Occurred()) return nullptr;
  try {
    return PyLong_FromVoidPtr(current_cuda_stream(static_cast<int>(device)));
  } catch (const DriverError& error) {
    PyErr_SetString(PyExc_OSError, error.what());
    return nullptr;
  }
}

PyMethodDef METHODS[] = {
    {"cuda_driver", py_cuda_driver, METH_NOARGS,
     "What NVIDIA's driver says of itself: version (1000 * major + 10 * minor), devices.\n\n"
     "Errors: OSError, one line, when there is none that will do."},
    {"cuda_stream", py_cuda_stream, METH_O,
     "The address of the stream that launches on a device go to now.\n\n"
     "Errors: OSError when torch has no CUDA."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int init_cuda_driver(PyObject* module) { return PyModule_AddFunctions(module, METHODS); }

}  // namespace accel
