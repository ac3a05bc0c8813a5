// A stand-in for NVIDIA's driver: two GPUs, loads any image, writes down every call, and runs kernels
// called `twice(from, to, count)` on the processor; of `draw(to, n, n, n)` it writes down the numbers,
// of others only that they were launched.
// A graph is run as its kernels, in the order of its nodes.
// While a stream is captured it loads nothing, and makes and launches no graph, for a thread that has not
// said that it may.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {
std::string failing;
int code = 0;
int succeeding = 0;  // calls of what fails that do not
int captured = 0;
bool elsewhere = false;  // another stream is
thread_local int mode = 0;

void note(const std::string& line) {
  FILE* log = std::fopen(std::getenv("FAKE_CUDA_LOG"), "a");
  std::fprintf(log, "%s\n", line.c_str());
  std::fclose(log);
}
int answer(const char* name) {
  if (failing != name) return 0;
  return succeeding-- > 0 ? 0 : code;
}

// A context is the address of its GPU's number.
int contexts[2] = {0, 1};
thread_local std::vector<void*> current;
void* present() { return current.empty() ? nullptr : current.back(); }

struct Module {
  std::string image;
  void* context;
};
struct Function {
  Module* module;
  std::string name;
};

std::string place(const Module* module) {
  if (module->context != present()) return " elsewhere";
  return present() == &contexts[1] ? " on 1" : "";
}
thread_local void* streams[4];

// cuda.h's CUDA_KERNEL_NODE_PARAMS_v2.
struct KernelNode {
  void* function;
  unsigned grid[3], block[3], shared;
  void **arguments, **extra;
  void *kernel, *context;
};
struct Node {
  KernelNode kernel;
  std::vector<uint64_t> values;  // parameters are copied when they are given

  void set(const KernelNode* given) {
    kernel = *given;
    const std::string& name = static_cast<Function*>(kernel.function)->name;
    values.resize(name == "twice" ? 5 : name == "draw" ? 4 : 0);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = *static_cast<uint64_t*>(given->arguments[i]);
    }
  }
};
struct Graph {
  std::vector<Node*> nodes;
};
struct Ready {
  std::vector<std::pair<Node*, Node>> nodes;  // what it was made of, and what is launched
};
bool forbidden() { return (captured || elsewhere) && mode != 2; }
}  // namespace

extern "C" {
void fake_fail(const char* name, int with) { failing = name, code = with, succeeding = 0; }
void fake_fail_after(int calls) { succeeding = calls; }
int fake_capture_mode() { return mode; }
int fake_contexts() { return static_cast<int>(current.size()); }

void fake_capture(int status) { captured = status; }
void fake_capture_elsewhere(int on) { elsewhere = on; }

int cuInit(unsigned) {
  const char* result = std::getenv("FAKE_CUDA_INIT");
  return result ? std::atoi(result) : 0;
}
int cuDriverGetVersion(int* version) {
  *version = std::atoi(std::getenv("FAKE_CUDA_VERSION"));
  return 0;
}
int cuDeviceGetCount(int* count) { return *count = 2, 0; }
int cuDeviceGet(int* device, int ordinal) {
  *device = 100 + ordinal;
  return ordinal < 2 ? 0 : 101;
}
int cuDevicePrimaryCtxRetain(void** result, int device) {
  note("retain " + std::to_string(device));
  return *result = &contexts[device - 100], 0;
}
int cuCtxGetCurrent(void** result) { return *result = present(), 0; }
int cuCtxPushCurrent_v2(void* pushed) { return current.push_back(pushed), 0; }
int cuCtxPopCurrent_v2(void** popped) { return *popped = present(), current.pop_back(), 0; }
int cuModuleLoadData(void** module, const void* image) {
  if (int error = answer("cuModuleLoadData")) return error;
  if (captured && mode != 2) return 900;
  auto* made = new Module{static_cast<const char*>(image), present()};
  note("load " + made->image + place(made));
  return *module = made, 0;
}
int cuFuncLoad(void* function) {
  if (captured && mode != 2) return 900;
  note("finish " + static_cast<Function*>(function)->module->image);
  return answer("cuFuncLoad");
}
int cuThreadExchangeStreamCaptureMode(int* wanted) {
  std::swap(*wanted, mode);
  return 0;
}
int cuModuleUnload(void* module) {
  note("unload " + static_cast<Module*>(module)->image);
  delete static_cast<Module*>(module);
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (int error = answer("cuModuleGetFunction")) return error;
  *function = new Function{static_cast<Module*>(module), name};
  return 0;
}
int cuFuncSetAttribute(void*, int attribute, int value) {
  note("attribute " + std::to_string(attribute) + " " + std::to_string(value));
  return answer("cuFuncSetAttribute");
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** arguments, void** extra) {
  if (int error = answer("cuLaunchKernel")) return error;
  auto* f = static_cast<Function*>(function);
  char line[256];
  std::snprintf(line, sizeof line,
                "launch %s of %s grid %u %u %u block %u %u %u shared %u stream %p%s",
                f->name.c_str(), f->module->image.c_str(), gx, gy, gz, bx, by, bz, shared, stream,
                extra ? " extra" : place(f->module).c_str());
  note(line);
  if (f->name == "draw") {  // of an address: what its three numbers are
    for (int i = 1; i < 4; ++i) {
      note("number " + std::to_string(*static_cast<uint64_t*>(arguments[i])));
    }
    return 0;
  }
  if (f->name != "twice") return 0;
  auto* from = *static_cast<float**>(arguments[0]);
  auto* to = *static_cast<float**>(arguments[1]);
  auto count = *static_cast<int64_t*>(arguments[2]);
  for (int64_t i = 0; i < count; ++i) to[i] = 2 * from[i];
  for (int i = 3; i < 5; ++i) {
    if (*static_cast<void**>(arguments[i])) note("a scratch pointer that is not null");
  }
  return 0;
}
int cuGraphCreate(void** graph, unsigned) {
  if (int error = answer("cuGraphCreate")) return error;
  note(std::string("graph") + (present() == &contexts[1] ? " on 1" : ""));
  return *graph = new Graph, 0;
}
int cuGraphAddKernelNode_v2(void** node, void* graph, void* const* behind, size_t count,
                            const KernelNode* kernel) {
  if (int error = answer("cuGraphAddKernelNode_v2")) return error;
  auto& nodes = static_cast<Graph*>(graph)->nodes;
  if (count != !nodes.empty() || (count && behind[0] != nodes.back())) return 1;  // not in order
  auto* made = new Node;
  made->set(kernel);
  nodes.push_back(made);
  return *node = made, 0;
}
int cuGraphInstantiateWithFlags(void** ready, void* graph, unsigned long long) {
  if (int error = answer("cuGraphInstantiateWithFlags")) return error;
  if (forbidden()) return 900;
  auto* made = new Ready;
  for (Node* node : static_cast<Graph*>(graph)->nodes) made->nodes.push_back({node, *node});
  note("instantiate " + std::to_string(made->nodes.size()));
  return *ready = made, 0;
}
int cuGraphExecKernelNodeSetParams_v2(void* ready, void* node, const KernelNode* kernel) {
  if (int error = answer("cuGraphExecKernelNodeSetParams_v2")) return error;
  for (auto& [made_of, launched] : static_cast<Ready*>(ready)->nodes) {
    if (made_of != node) continue;
    note("set");
    return launched.set(kernel), 0;
  }
  return 1;
}
int cuGraphLaunch(void* ready, void* stream) {
  if (int error = answer("cuGraphLaunch")) return error;
  if (forbidden()) return 900;
  char line[64];
  std::snprintf(line, sizeof line, "start graph stream %p", stream);
  note(line);
  for (auto& [_, node] : static_cast<Ready*>(ready)->nodes) {
    std::vector<void*> arguments;
    for (uint64_t& value : node.values) arguments.push_back(&value);
    const KernelNode& k = node.kernel;
    cuLaunchKernel(k.function, k.grid[0], k.grid[1], k.grid[2], k.block[0], k.block[1], k.block[2],
                   k.shared, stream, arguments.data(), k.extra);
  }
  return 0;
}
int cuGraphExecDestroy(void* ready) {
  note("destroy instance");
  return delete static_cast<Ready*>(ready), 0;
}
int cuGraphDestroy(void* graph) {
  note("destroy graph");
  for (Node* node : static_cast<Graph*>(graph)->nodes) delete node;
  return delete static_cast<Graph*>(graph), 0;
}
int cuStreamIsCapturing(void* stream, int* status) { return *status = captured, 0; }
int cuGetErrorName(int error, const char** text) {
  *text = error == 200   ? "CUDA_ERROR_INVALID_IMAGE"
          : error == 710 ? "CUDA_ERROR_ASSERT"
                         : "CUDA_ERROR_UNKNOWN";
  return 0;
}

// Of torch's library. The generator is in fake_generator.cpp.
void _ZN2at17CUDAGeneratorImpl28set_philox_offset_per_threadEm(void*, uint64_t offset) {
  reinterpret_cast<void (*)(uint64_t)>(dlsym(RTLD_DEFAULT, "fake_generator_move"))(offset);
}
int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = streams[device] ? streams[device] : reinterpret_cast<void*>(0x1000 + device);
  return 0;
}
// Of this thread, as torch's.
void fake_stream(int device, void* stream) { streams[device] = stream; }
}
