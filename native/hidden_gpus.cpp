// A process that only compiles for GPUs and never touches one.
//
// autograd asks a device for its stream and starts a thread for each, tensors without memory included; with
// torch's own guard that would make a context on the GPU, and fail in a forked process.
#include "native.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace accel {
namespace {

// Nothing is ever launched: events have happened, streams are the default ones.
class Hidden final : public c10::impl::DeviceGuardImplInterface {
 public:
  explicit Hidden(c10::DeviceIndex count) : count_(count) {}

  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    current = device.index();
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(c10::kCUDA, current); }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const noexcept override { return stream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream(device); }
  c10::Stream exchangeStream(c10::Stream other) const noexcept override { return stream(other.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return count_; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

 private:
  static c10::Stream stream(c10::Device device) {
    c10::DeviceIndex index = device.has_index() ? device.index() : current;
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::kCUDA, index));
  }
  static thread_local c10::DeviceIndex current;
  const c10::DeviceIndex count_;
};

thread_local c10::DeviceIndex Hidden::current = 0;

PyObject* py_hide_gpus(PyObject*, PyObject* number) {
  long count = PyLong_AsLong(number);
  if (count == -1 && PyErr_Occurred()) return nullptr;
  auto* guard = new Hidden(static_cast<c10::DeviceIndex>(count));  // the registry keeps it for good
  c10::impl::DeviceGuardImplRegistrar(c10::kCUDA, guard);
  Py_RETURN_NONE;
}

PyMethodDef METHODS[] = {
    {"hide_gpus", py_hide_gpus, METH_O,
     "From here on nothing in this process reaches one of so many GPUs; before autograd's first backward."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int init_hidden_gpus(PyObject* module) { return PyModule_AddFunctions(module, METHODS); }

}  // namespace accel
