// A stand-in for NVIDIA's driver: two GPUs, loads any image, writes down every call, and runs kernels
// called `twice(from, to, count)` on the processor; of `draw(to, n, n, n)` it writes down the numbers,
// of others only that they were launched.
// While a stream is captured it loads nothing for a thread that has not said that it may.
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
}  // namespace

extern "C" {
void fake_fail(const char* name, int with) { failing = name, code = with, succeeding = 0; }
void fake_fail_after(int calls) { succeeding = calls; }
int fake_capture_mode() { return mode; }
int fake_contexts() { return static_cast<int>(current.size()); }

void fake_capture(int status) { captured = status; }

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
