#include "cuda_generator.h"

#include "cuda_driver.h"

#include "native.h"

#include <ATen/Context.h>
#include <dlfcn.h>

#include <mutex>

#include <pybind11/pybind11.h>

namespace accel {
namespace {

// The generator's own setter. The virtual `set_offset` also has cuDNN's dropout begin anew, which draws a seed
// from the processor's stream.
void move_to(const at::Generator& generator, uint64_t offset) {
  using Setter = void (*)(c10::GeneratorImpl*, uint64_t);
  static const auto setter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    const char* name = "_ZN2at17CUDAGeneratorImpl28set_philox_offset_per_threadEm";
    return library ? reinterpret_cast<Setter>(dlsym(library, name)) : nullptr;
  }();
  if (!setter) throw DriverError("this torch has no generator for GPUs");
  setter(generator.unsafeGetGeneratorImpl(), offset);
}

}  // namespace

GpuDraws::GpuDraws(c10::Device device, uint64_t words) {
  if (words == 0) return;
  generator_ = at::globalContext().defaultGenerator(device);
  std::lock_guard<std::mutex> lock(generator_.mutex());
  seed_ = generator_.current_seed();
  before_ = after_ = generator_.get_offset();
  TORCH_CHECK(before_ % 4 == 0, "the generator stands in the middle of a block");
  move_to(generator_, before_ + words);
  after_ = before_ + words;
}

GpuDraws::~GpuDraws() {
  if (after_ == before_) return;
  try {
    std::lock_guard<std::mutex> lock(generator_.mutex());
    if (generator_.current_seed() == seed_ && generator_.get_offset() == after_) {
      move_to(generator_, before_);
    }
  } catch (const c10::Error&) {
    // Somebody has begun to capture: the generator cannot be asked now.
  }
}

// ---- Python ---------------------------------------------------------------------

namespace {

PyObject* py_gpu_offsets(PyObject*, PyObject* number) {
  long count = PyLong_AsLong(number);
  if (count == -1 && PyErr_Occurred()) return nullptr;
  try {
    pybind11::tuple offsets(count);
    for (long i = 0; i < count; ++i) {
      c10::Device device(c10::kCUDA, static_cast<c10::DeviceIndex>(i));
      const at::Generator& generator = at::globalContext().defaultGenerator(device);
      offsets[i] = pybind11::make_tuple(generator.current_seed(), generator.get_offset());
    }
    return offsets.release().ptr();
  } catch (const c10::Error&) {
    Py_RETURN_NONE;
  }
}

PyObject* py_move_gpu_offset(PyObject*, PyObject* arguments) {
  int device;
  unsigned long long offset;
  if (!PyArg_ParseTuple(arguments, "iK", &device, &offset)) return nullptr;
  try {
    at::Generator generator = at::globalContext().defaultGenerator(
        c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)));
    std::lock_guard<std::mutex> lock(generator.mutex());
    move_to(generator, offset);
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
  Py_RETURN_NONE;
}

PyMethodDef METHODS[] = {
    {"move_gpu_offset", py_move_gpu_offset, METH_VARARGS,
     "Has the random stream of a GPU (its number) go on at an offset.\n\n"
     "Errors: RuntimeError when torch has no such generator."},
    {"gpu_offsets", py_gpu_offsets, METH_O,
     "Where the random streams of the first so many GPUs stand: (seed, offset) of each; "
     "None while a stream is captured."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int init_cuda_generator(PyObject* module) { return PyModule_AddFunctions(module, METHODS); }

}  // namespace accel
