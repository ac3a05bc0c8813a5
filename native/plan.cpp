// Parses and checks plans. Every fault is a PlanError that says where it is.
#include "plan.h"

#include "externs.h"
#include "plan_reader.h"
#include "tensors.h"

#include <ATen/core/enum_tag.h>
#include <dlfcn.h>

#include <algorithm>
#include <iterator>
#include <map>

namespace accel {
namespace {

// Work below this many bytes does not pay for releasing the GIL. An extern counts
// EXTERN_WEIGHT times the bytes of its tensors, for it does more per byte.
constexpr size_t RELEASE_BYTES = 256 << 10;
constexpr size_t EXTERN_WEIGHT = 4;

Layout parse_layout(const py::dict& dict, const std::string& where) {
  Layout layout;
  layout.sizes = integers(dict, "sizes", where);
  layout.strides = integers(dict, "strides", where);
  layout.dtype = by_name(DTYPES, text(dict, "dtype", where), where + ".dtype");
  if (layout.sizes.size() != layout.strides.size()) fail(where, "sizes and strides differ in length");
  layout.numel = 1;
  int64_t last = 0, expected = 1;
  layout.contiguous = true;
  for (size_t i = layout.sizes.size(); i-- > 0;) {
    int64_t size = layout.sizes[i], stride = layout.strides[i];
    if (size < 0 || stride < 0) fail(where, "a negative size or stride");
    if (__builtin_mul_overflow(layout.numel, size, &layout.numel)) fail(where, "too many elements");
    if (stride != expected) layout.contiguous = false;
    expected *= std::max<int64_t>(size, 1);
    int64_t reach;
    if (size > 0 && (__builtin_mul_overflow(size - 1, stride, &reach) ||
                     __builtin_add_overflow(last, reach, &last))) {
      fail(where, "strides reach too far");
    }
  }
  // For a tensor without elements torch keeps the strides it is given.
  if (layout.numel == 0) layout.contiguous = false;
  layout.storage_bytes =
      layout.numel ? static_cast<size_t>(last + 1) * c10::elementSize(layout.dtype) : 0;
  return layout;
}

class PlanParser {
 public:
  PlanParser(const py::dict& source, void* library, const std::string& images)
      : source_(source), library_(library), images_(images) {}

  Plan parse() {
    if (integer(source_, "version", "plan") != 1) fail("version", "this executor reads version 1");
    int64_t arena = integer(source_, "arena_bytes", "plan");
    if (arena < 0) fail("arena_bytes", "negative");
    plan_.arena_bytes = static_cast<size_t>(arena);
    parse_device();
    parse_inputs();
    parse_buffers();
    parse_gpu_kernels();
    parse_draws();
    plan_.steps = parse_steps("steps", false);
    plan_.commit = parse_steps("commit", true);
    parse_speculations();
    parse_outputs();
    derive();
    return std::move(plan_);
  }

 private:
  void parse_device() {
    if (!source_.contains("device")) return;
    std::string name = text(source_, "device", "plan");
    try {
      plan_.device = c10::Device(name);
    } catch (const c10::Error&) {
      fail("device", "unknown name '" + name + "'");
    }
    if (plan_.device.is_cuda() && !plan_.device.has_index()) fail("device", "it has no number");
    if (!plan_.device.is_cpu() && !plan_.device.is_cuda()) {
      fail("device", "not one that plans run on");
    }
    note_gpus_used();
  }

  void parse_draws() {
    if (!source_.contains("draws")) return;
    int64_t draws = integer(source_, "draws", "plan");
    if (draws <= 0 || draws % 4 != 0) fail("draws", "not a multiple of 4");
    if (!plan_.device.is_cuda()) fail("draws", "from the stream of a GPU only");
    plan_.draws = static_cast<uint64_t>(draws);
  }

  // The functions that launches start, each loaded once.
  void parse_gpu_kernels() {
    if (!source_.contains("kernels")) return;
    py::list list = as_list(source_["kernels"], "kernels");
    for (size_t i = 0; i < list.size(); ++i) {
      std::string where = "kernels[" + std::to_string(i) + "]";
      py::dict row = as_dict(list[i], where);
      std::vector<CudaKernel::Image> images;
      for (const auto& item : as_list(member(row, "images", where), where + ".images")) {
        images.push_back(parse_image(as_dict(item, where + ".images"), where + ".images"));
      }
      if (images.empty()) fail(where, "it has no image");
      std::string symbol = text(row, "symbol", where);
      int device = plan_.device.is_cuda() ? plan_.device.index() : 0;
      gpu_kernels_[symbol] =
          std::make_shared<CudaKernel>(device, symbol, positive(row, "threads", where, 1),
                                       positive(row, "scratch_pointers", where, 0), images);
    }
  }

  CudaKernel::Image parse_image(const py::dict& row, const std::string& where) {
    uint64_t offset = positive(row, "offset", where, 0), size = positive(row, "size", where, 1);
    if (offset + size > images_.size()) fail(where, "it ends behind the file of images");
    return {positive(row, "alignment", where, 1), positive(row, "shared_bytes", where, 0),
            images_.substr(offset, size)};
  }

  unsigned positive(const py::dict& row, const char* name, const std::string& where, int64_t low) {
    int64_t value = integer(row, name, where);
    if (value < low || value > INT32_MAX) fail(where + "." + name, "out of range");
    return static_cast<unsigned>(value);
  }

  void parse_inputs() {
    py::list list = as_list(member(source_, "inputs", "plan"), "inputs");
    for (size_t i = 0; i < list.size(); ++i) {
      std::string where = "inputs[" + std::to_string(i) + "]";
      py::dict row = as_dict(list[i], where);
      Layout layout = parse_layout(row, where);
      layout.host = row.contains("host");
      if (layout.host && (layout.numel != 1 || c10::elementSize(layout.dtype) > sizeof(uint64_t))) {
        fail(where, "not one number");
      }
      plan_.inputs.push_back(std::move(layout));
    }
  }

  void parse_buffers() {
    py::list list = as_list(member(source_, "buffers", "plan"), "buffers");
    for (size_t i = 0; i < list.size(); ++i) {
      std::string where = "buffers[" + std::to_string(i) + "]";
      parse_buffer(as_dict(list[i], where), where, static_cast<uint32_t>(i));
    }
    plan_.views_of.resize(plan_.buffers.size());
    for (uint32_t id = 0; id < plan_.buffers.size(); ++id) {
      const Buffer& buffer = plan_.buffers[id];
      if (buffer.kind == BufferKind::view) plan_.views_of[buffer.root].push_back(id);
    }
  }

  void parse_buffer(const py::dict& dict, const std::string& where, uint32_t id) {
    static constexpr Named<BufferKind> KINDS[] = {{"input", BufferKind::input},
                                                  {"arena", BufferKind::arena},
                                                  {"output", BufferKind::output},
                                                  {"dynamic", BufferKind::dynamic},
                                                  {"view", BufferKind::view}};
    Buffer buffer;
    buffer.kind = by_name(KINDS, text(dict, "kind", where), where + ".kind");
    buffer.root = id;
    buffer.has_layout = true;
    switch (buffer.kind) {
      case BufferKind::input: {
        int64_t index = integer(dict, "index", where);
        if (index < 0 || static_cast<size_t>(index) >= plan_.inputs.size()) {
          fail(where, "there is no input " + std::to_string(index));
        }
        buffer.index = static_cast<uint32_t>(index);
        buffer.layout = plan_.inputs[buffer.index];
        plan_.input_buffers.push_back(id);
        break;
      }
      case BufferKind::arena:
        buffer.layout = parse_layout(dict, where);
        buffer.offset_bytes = integer(dict, "offset", where);
        if (buffer.offset_bytes < 0 || buffer.offset_bytes % 64 != 0) {
          fail(where, "the offset is not a multiple of 64");
        }
        if (static_cast<size_t>(buffer.offset_bytes) + buffer.layout.storage_bytes >
            plan_.arena_bytes) {
          fail(where, "it ends behind the arena");
        }
        break;
      case BufferKind::output:
        buffer.layout = parse_layout(dict, where);
        if (dict.contains("memory")) {
          size_t elements = static_cast<size_t>(std::max<int64_t>(0, integer(dict, "memory", where)));
          size_t bytes = elements * c10::elementSize(buffer.layout.dtype);
          buffer.layout.storage_bytes = std::max(buffer.layout.storage_bytes, bytes);
        }
        buffer.index = static_cast<uint32_t>(plan_.output_buffers.size());
        plan_.output_buffers.push_back(id);
        break;
      case BufferKind::dynamic:
        buffer.has_layout = dict.contains("sizes");
        if (buffer.has_layout) buffer.layout = parse_layout(dict, where);
        break;
      case BufferKind::view:
        parse_view(dict, where, id, buffer);
        break;
    }
    plan_.buffers.push_back(std::move(buffer));
  }

  void parse_view(const py::dict& dict, const std::string& where, uint32_t id, Buffer& buffer) {
    buffer.layout = parse_layout(dict, where);
    static constexpr Named<Buffer::Severed> SEVERED[] = {{"detach", Buffer::detach},
                                                         {"data", Buffer::data}};
    if (dict.contains("severed")) {
      buffer.severed = by_name(SEVERED, text(dict, "severed", where), where + ".severed");
    }
    int64_t base = integer(dict, "base", where);
    if (base < 0 || base >= static_cast<int64_t>(id)) fail(where, "its base must come before it");
    int64_t offset = integer(dict, "offset", where);
    auto size = static_cast<int64_t>(c10::elementSize(buffer.layout.dtype));
    if (offset < 0 || __builtin_mul_overflow(offset, size, &offset)) fail(where, "a bad offset");
    const Buffer& parent = plan_.buffers[static_cast<size_t>(base)];
    buffer.root = parent.root;
    if (dict.contains("of")) {
      buffer.of = buffer_id(dict["of"], where + ".of");
      const Buffer& other = plan_.buffers[buffer.of];
      if (other.severed == Buffer::no || other.root != buffer.root ||
          other.layout.dtype != buffer.layout.dtype) {
        fail(where, "'of' is no severed view of the same memory");
      }
    }
    buffer.offset_bytes = offset + (parent.kind == BufferKind::view ? parent.offset_bytes : 0);
    const Buffer& root = plan_.buffers[buffer.root];
    // An input may lie in a larger storage and a view reach what the input does not
    // (as_strided), so only memory of our own is checked.
    bool ours = root.kind == BufferKind::arena || root.kind == BufferKind::output;
    if (ours && buffer.layout.storage_bytes &&
        static_cast<size_t>(buffer.offset_bytes) + buffer.layout.storage_bytes >
            root.layout.storage_bytes) {
      fail(where, "it reaches behind its base");
    }
  }

  uint32_t buffer_id(const py::handle& value, const std::string& where) {
    auto id = take<int64_t>(value, where, "a buffer id");
    if (id < 0 || static_cast<size_t>(id) >= plan_.buffers.size()) {
      fail(where, "there is no buffer " + std::to_string(id));
    }
    return static_cast<uint32_t>(id);
  }

  uint32_t optional_buffer_id(const py::handle& value, const std::string& where) {
    return value.is_none() ? NO_BUFFER : buffer_id(value, where);
  }

  std::vector<Step> parse_steps(const char* name, bool commit) {
    std::vector<Step> steps;
    py::list list = as_list(member(source_, name, "plan"), name);
    for (size_t i = 0; i < list.size(); ++i) {
      std::string where = std::string(name) + "[" + std::to_string(i) + "]";
      steps.push_back(parse_step(as_dict(list[i], where), where, commit));
    }
    return steps;
  }

  Step parse_step(const py::dict& dict, const std::string& where, bool commit) {
    std::string op = text(dict, "op", where);
    if (op == "kernel") return parse_kernel(dict, where, commit);
    if (op == "launch") return parse_launch(dict, where, commit);
    if (op == "extern") return parse_extern(dict, where, commit);
    if (op != "free") fail(where, "unknown op '" + op + "'");
    uint32_t id = buffer_id(member(dict, "buffer", where), where);
    if (plan_.buffers[id].kind != BufferKind::dynamic) fail(where, "only dynamic buffers are freed");
    require_produced(id, where);
    std::erase(produced_, id);
    return {StepKind::free, id, {}};
  }

  Step parse_kernel(const py::dict& dict, const std::string& where, bool commit) {
    KernelStep kernel;
    std::string symbol = text(dict, "symbol", where);
    if (!library_) fail(where, "a kernel, but no library");
    kernel.function = reinterpret_cast<KernelFunction>(dlsym(library_, symbol.c_str()));
    if (!kernel.function) fail(where, "the library has no symbol '" + symbol + "'");
    if (dict.contains("parallel")) {
      kernel.parallel = take<bool>(dict["parallel"], where + ".parallel", "a bool");
    }
    std::vector<uint32_t> writes = parse_buffers_of(dict, where, commit, kernel.buffers);
    plan_.parallel |= kernel.parallel;
    plan_.max_kernel_buffers = std::max(plan_.max_kernel_buffers, kernel.buffers.size());
    plan_.kernels.push_back(std::move(kernel));
    return {StepKind::kernel, static_cast<uint32_t>(plan_.kernels.size() - 1), std::move(writes)};
  }

  Step parse_launch(const py::dict& dict, const std::string& where, bool commit) {
    LaunchStep launch;
    std::string symbol = text(dict, "symbol", where);
    auto found = gpu_kernels_.find(symbol);
    if (found == gpu_kernels_.end()) fail(where, "there is no kernel '" + symbol + "'");
    launch.kernel = found->second;
    int64_t grid = integer(dict, "grid", where);
    if (grid < 0) fail(where, "a negative grid");
    launch.grid = static_cast<uint64_t>(grid);
    for (const auto& item : as_list(member(dict, "numbers", where), where + ".numbers")) {
      launch.numbers.push_back(launch_number(item, where + ".numbers"));
    }
    std::vector<uint32_t> writes = parse_buffers_of(dict, where, commit, launch.buffers);
    plan_.launches.push_back(std::move(launch));
    return {StepKind::launch, static_cast<uint32_t>(plan_.launches.size() - 1), std::move(writes)};
  }

  LaunchNumber launch_number(const py::handle& item, const std::string& where) {
    if (!PyDict_Check(item.ptr()) && !PyUnicode_Check(item.ptr())) {
      return {LaunchNumber::plain, take<int64_t>(item, where, "an integer")};
    }
    if (PyDict_Check(item.ptr()) && as_dict(item, where).contains("host")) {
      uint32_t id = buffer_id(as_dict(item, where)["host"], where + ".host");
      if (!plan_.buffers[id].layout.host) fail(where, "not a number on the processor");
      return {LaunchNumber::host, id};
    }
    if (plan_.draws == 0) fail(where, "a number of a stream that the plan does not draw from");
    if (PyUnicode_Check(item.ptr())) {
      if (item.cast<std::string>() != "seed") fail(where, "expected 'seed'");
      return {LaunchNumber::seed, 0};
    }
    int64_t blocks = integer(as_dict(item, where), "drawn", where);
    if (blocks < 0 || static_cast<uint64_t>(blocks) >= plan_.draws / 4) fail(where, "out of range");
    return {LaunchNumber::drawn, blocks};
  }

  // A kernel's buffers, and which inputs it writes.
  std::vector<uint32_t> parse_buffers_of(const py::dict& dict, const std::string& where,
                                         bool commit, std::vector<uint32_t>& buffers) {
    std::vector<uint32_t> writes;
    for (const auto& item : as_list(member(dict, "buffers", where), where + ".buffers")) {
      uint32_t id = buffer_id(item, where + ".buffers");
      require_produced(id, where);
      if (plan_.buffers[id].layout.host) fail(where, "a kernel cannot read the processor's memory");
      buffers.push_back(id);
      if (commit && !dict.contains("writes")) note_write(id, writes);
    }
    if (commit && dict.contains("writes")) {
      for (const auto& item : as_list(dict["writes"], where + ".writes")) {
        note_write(buffer_id(item, where + ".writes"), writes);
      }
    }
    count_versions(dict, where, writes);
    return writes;
  }

  // Writes that eager counts more or less often than once in the tensor's version: an id stands as
  // often in `writes`.
  void count_versions(const py::dict& dict, const std::string& where,
                      std::vector<uint32_t>& writes) {
    if (!dict.contains("versions")) return;
    for (const auto& item : as_list(dict["versions"], where + ".versions")) {
      py::list row = as_list(item, where + ".versions");
      if (row.size() != 2) fail(where, "versions: pairs of a buffer and a number");
      uint32_t root = plan_.buffers[buffer_id(row[0], where + ".versions")].root;
      auto count = take<int64_t>(row[1], where + ".versions", "a number");
      if (std::erase(writes, root) == 0) fail(where, "versions: of what is not written");
      if (count < 0 || count > 1'000'000) fail(where, "versions: not a number of writes");
      writes.insert(writes.end(), static_cast<size_t>(count), root);
    }
  }

  void note_write(uint32_t id, std::vector<uint32_t>& writes) {
    uint32_t root = plan_.buffers[id].root;
    if (plan_.buffers[root].kind != BufferKind::input) return;
    plan_.buffers[root].written = true;
    if (std::find(writes.begin(), writes.end(), root) == writes.end()) writes.push_back(root);
  }

  // A dynamic buffer has no memory before some extern has bound it.
  void require_produced(uint32_t id, const std::string& where) {
    uint32_t root = plan_.buffers[id].root;
    if (plan_.buffers[root].kind == BufferKind::dynamic && !produced(root)) {
      fail(where, "buffer " + std::to_string(id) + " is used before a step makes it");
    }
  }

  bool produced(uint32_t id) const {
    return std::find(produced_.begin(), produced_.end(), id) != produced_.end();
  }

  Step parse_extern(const py::dict& dict, const std::string& where, bool commit) {
    std::string target = text(dict, "target", where);
    size_t dot = target.find('.', target.find("::"));
    std::string name = target.substr(0, dot);
    std::string overload = dot == std::string::npos ? "" : target.substr(dot + 1);
    if (overload == "default") overload.clear();
    auto handle = c10::Dispatcher::singleton().findSchema({name, overload});
    if (!handle) fail(where, "there is no operation '" + target + "'");
    ExternStep step(*handle);
    plan_.random |= handle->hasTag(at::Tag::nondeterministic_seeded) && !dict.contains("certain");
    parse_arguments(dict, where, step);
    std::vector<uint32_t> writes = extern_writes(step, where, commit);
    count_versions(dict, where, writes);
    bool binds_alias = parse_results(dict, where, step);
    if (!binds_alias && step.results.size() <= 3) {
      step.direct = find_direct_call(overload.empty() ? name : name + "." + overload);
    }
    if (!step.direct) plan_.holds_inputs = plan_.boxed = true;
    prepare_constants(step);
    plan_.externs.push_back(std::move(step));
    return {StepKind::extern_, static_cast<uint32_t>(plan_.externs.size() - 1), std::move(writes)};
  }

  void parse_arguments(const py::dict& dict, const std::string& where, ExternStep& step) {
    const auto& formals = step.handle.schema().arguments();
    py::list positional = as_list(member(dict, "args", where), where + ".args");
    py::dict named = dict.contains("kwargs") ? as_dict(dict["kwargs"], where + ".kwargs") : py::dict();
    if (positional.size() > formals.size()) fail(where, "too many arguments");
    ReadBuffer read = [this](const py::handle& value, const std::string& at) {
      return buffer_id(value, at);
    };
    size_t used = 0;
    for (size_t i = 0; i < formals.size(); ++i) {
      const c10::Argument& formal = formals[i];
      std::string at = where + "." + formal.name();
      if (i < positional.size()) {
        step.arguments.push_back(parse_argument(as_dict(positional[i], at), formal, read, at));
      } else if (named.contains(formal.name().c_str())) {
        step.arguments.push_back(
            parse_argument(as_dict(named[formal.name().c_str()], at), formal, read, at));
        ++used;
      } else if (formal.default_value()) {
        ExternArgument argument;
        argument.value = *formal.default_value();
        step.arguments.push_back(std::move(argument));
      } else {
        fail(at, "the argument is missing");
      }
      for (uint32_t id : step.arguments.back().list) want_tensor(id, at);
      want_tensor(step.arguments.back().buffer, at);
    }
    if (used != named.size()) fail(where, "a keyword argument that the operation does not have");
  }

  void want_tensor(uint32_t id, const std::string& where) {
    if (id == NO_BUFFER) return;
    require_produced(id, where);
    plan_.buffers[id].as_tensor = true;
  }

  // What the schema says the operation writes. Writing an input outside the commit would
  // break the promise that a run can be thrown away.
  std::vector<uint32_t> extern_writes(const ExternStep& step, const std::string& where,
                                      bool commit) {
    std::vector<uint32_t> writes;
    const auto& formals = step.handle.schema().arguments();
    for (size_t i = 0; i < formals.size(); ++i) {
      const c10::AliasInfo* alias = formals[i].alias_info();
      if (!alias || !alias->isWrite()) continue;
      const ExternArgument& argument = step.arguments[i];
      std::vector<uint32_t> ids = argument.list;
      if (argument.buffer != NO_BUFFER) ids.push_back(argument.buffer);
      for (uint32_t id : ids) {
        if (id != NO_BUFFER) note_write(id, writes);
      }
    }
    if (!commit && !writes.empty()) fail(where, "it writes an input before the commit");
    return writes;
  }

  // True when a result is bound that is one of the arguments.
  bool parse_results(const py::dict& dict, const std::string& where, ExternStep& step) {
    bool binds_alias = false;
    const auto& returns = step.handle.schema().returns();
    py::list list = as_list(member(dict, "results", where), where + ".results");
    for (const auto& item : list) {
      uint32_t id = optional_buffer_id(item, where + ".results");
      if (id != NO_BUFFER) {
        if (plan_.buffers[id].kind != BufferKind::dynamic) {
          fail(where, "results are bound to dynamic buffers only");
        }
        produced_.push_back(id);
        for (const c10::Argument& value : returns) binds_alias |= value.alias_info() != nullptr;
      }
      step.results.push_back(id);
    }
    bool list_result = returns.size() == 1 && returns[0].type()->kind() == c10::TypeKind::ListType;
    if (!step.results.empty() && !list_result && step.results.size() != returns.size()) {
      fail(where, "the operation has " + std::to_string(returns.size()) + " results");
    }
    return binds_alias;
  }

  static void prepare_constants(ExternStep& step) {
    for (const ExternArgument& argument : step.arguments) {
      bool constant = argument.kind == ExternArgument::constant;
      step.scalars.push_back(constant && argument.value.isScalar() ? argument.value.toScalar()
                                                                   : at::Scalar());
      step.integers.push_back(constant && argument.value.isIntList() ? argument.value.toIntVector()
                                                                     : std::vector<int64_t>());
    }
  }

  void parse_speculations() {
    py::list list = as_list(member(source_, "speculations", "plan"), "speculations");
    for (size_t i = 0; i < list.size(); ++i) {
      std::string where = "speculations[" + std::to_string(i) + "]";
      py::dict dict = as_dict(list[i], where);
      uint32_t id = buffer_id(member(dict, "buffer", where), where);
      require_produced(id, where);
      const Buffer& buffer = plan_.buffers[id];
      if (buffer.has_layout && buffer.layout.numel != 1) fail(where, "not one element");
      if (!buffer.has_layout || !plan_.device.is_cpu()) plan_.buffers[id].as_tensor = true;
      bool expected = take<bool>(member(dict, "expected", where), where, "a bool");
      plan_.speculations.push_back({id, expected});
    }
  }

  void parse_outputs() {
    for (const auto& item : as_list(member(source_, "outputs", "plan"), "outputs")) {
      uint32_t id = buffer_id(item, "outputs");
      require_produced(id, "outputs");
      plan_.outputs.push_back(id);
    }
  }

  size_t bytes_of(uint32_t id) const { return plan_.buffers[id].layout.storage_bytes; }

  // Facts about the whole plan.
  void derive() {
    size_t work = 0;
    for (const KernelStep& kernel : plan_.kernels) {
      for (uint32_t id : kernel.buffers) work += bytes_of(id);
    }
    for (const ExternStep& step : plan_.externs) {
      for (const ExternArgument& argument : step.arguments) {
        if (argument.buffer != NO_BUFFER) work += EXTERN_WEIGHT * bytes_of(argument.buffer);
        for (uint32_t id : argument.list) {
          if (id != NO_BUFFER) work += EXTERN_WEIGHT * bytes_of(id);
        }
      }
    }
    if (plan_.random && !plan_.device.is_cpu()) fail("steps", "random numbers of a GPU");
    plan_.releases_gil = work > RELEASE_BYTES;
    plan_.holds_inputs |= plan_.releases_gil;
  }

  py::dict source_;
  void* library_;
  const std::string& images_;
  std::map<std::string, std::shared_ptr<const CudaKernel>> gpu_kernels_;
  Plan plan_;
  std::vector<uint32_t> produced_;  // dynamic buffers bound so far
};

}  // namespace

Plan parse_plan(PyObject* plan, void* library, const std::string& images) {
  return PlanParser(as_dict(plan, "plan"), library, images).parse();
}

}  // namespace accel
