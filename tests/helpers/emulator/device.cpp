// A device of torch whose memory is the host's and whose operators are the CPU's. It is used through ctypes.
//
// It adds three things to the CPU. An operator whose tensors are on two devices fails, as it does on a GPU. Memory is
// counted. What a GPU would make the host wait for is reported, and so is every copy between device and host.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr auto EMU = c10::DeviceType::PrivateUse1;
c10::DeviceIndex count = 1, current = 0;  // each process uses one device and must not touch those of the others

c10::Device device() { return c10::Device(EMU, current); }

bool on_device(const at::Tensor& tensor) { return tensor.device().type() == EMU; }

// ---------------------------------------------------------------------------------------------------------- memory

constexpr size_t HEADER = 64;   // keeps the alignment of a tensor's data; holds its size
constexpr size_t ROUND = 512;   // CUDA's allocator rounds sizes to this many bytes
std::atomic<int64_t> allocated{0}, peak{0};

void release(void* data) {
  if (!data) return;
  auto* block = static_cast<char*>(data) - HEADER;
  allocated -= *reinterpret_cast<int64_t*>(block);
  std::free(block);
}

struct DeviceAllocator final : at::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &release, device()};
    auto rounded = (bytes + ROUND - 1) / ROUND * ROUND;
    auto* block = static_cast<char*>(std::aligned_alloc(HEADER, rounded + HEADER));
    TORCH_CHECK(block, "emu: the host has no memory for ", bytes, " bytes");
    *reinterpret_cast<int64_t*>(block) = static_cast<int64_t>(rounded);
    auto now = allocated += static_cast<int64_t>(rounded);
    for (auto most = peak.load(); now > most && !peak.compare_exchange_weak(most, now);) {}
    return {block + HEADER, block + HEADER, &release, device()};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceAllocator device_allocator;
REGISTER_ALLOCATOR(EMU, &device_allocator);

std::mutex pinned_lock;
std::map<const char*, size_t> pinned;  // start -> bytes

void release_pinned(void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  pinned.erase(static_cast<const char*>(data));
  std::free(data);
}

struct PinnedAllocator final : at::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* data = static_cast<char*>(std::aligned_alloc(HEADER, (bytes + HEADER) / HEADER * HEADER));
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned[data] = bytes;
    return {data, data, &release_pinned, c10::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) return false;
  auto& [start, bytes] = *std::prev(after);
  return static_cast<const char*>(data) < start + bytes;
}

// ------------------------------------------------------------------------------------------------ device and streams

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::DeviceType type() const override { return EMU; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return count; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto generator = at::detail::createCPUGenerator();
    return generator;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::DeviceIndex deviceCount() const override { return count; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
};

// ---------------------------------------------------------------------------------------------------------- reports

using Report = void (*)(const char* kind, int64_t bytes);
std::atomic<Report> reporter{nullptr};
thread_local int inside = 0;  // operators computed by the CPU's: their own copies are no copies

void report(const char* kind, int64_t bytes) {
  auto call = reporter.load();
  if (call && !inside) call(kind, bytes);
}

// -------------------------------------------------------------------------------------------------------- operators

at::Tensor on_host(const at::Tensor& tensor) {  // the same memory
  if (!on_device(tensor)) return tensor;
  auto options = tensor.options().device(at::kCPU).requires_grad(false);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}

const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

void check_device(std::optional<at::Device> wanted) {
  TORCH_CHECK(!wanted || !wanted->has_index() || wanted->index() == current,
              *wanted, " is the device of another process; this one uses ", device());
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> where, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  check_device(where);
  return at::detail::empty_generic(size, &device_allocator, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> where, std::optional<bool>) {
  check_device(where);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, KEYS, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, storage, offset, size, stride);
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) { return at::native::set_(self, storage); }

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  auto bytes = static_cast<int64_t>(self.nbytes());
  if (!bytes) return to;
  if (on_device(self) && !on_device(to)) {
    bool waits = !non_blocking || !is_pinned(to.data_ptr());
    report(waits ? "copy to host" : "copy to pinned host memory", bytes);
  } else if (!on_device(self) && on_device(to)) {
    bool waits = !non_blocking || !is_pinned(self.data_ptr());
    report(!waits ? "copy from pinned memory" : non_blocking ? "copy from pageable memory" : "copy to device", bytes);
  }
  on_host(to).copy_(on_host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  to.resize_(self.sizes());
  on_host(to).copy_(on_host(self));
  return to;
}

at::Scalar read_scalar(const at::Tensor& self) {
  report("item", static_cast<int64_t>(self.nbytes()));
  return on_host(self).item();
}

// The number of outputs depends on values, which the host must know.
const std::set<std::string> VALUE_SHAPED = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::equal",   "aten::bincount"};

struct Operator {  // what this file needs to know of one; its schema takes long to read
  std::string name;
  bool takes_host_scalars, reads_by_index, writes_by_index, value_shaped, repeats;
  bool in_place = true;      // all that it writes are arguments that keep their size, and it returns no views
  std::vector<int> returns;  // for each output: the argument that it is, or -1
};

const Operator& look_up(const c10::OperatorHandle& op) {
  static std::mutex lock;
  static std::map<const void*, Operator> known;
  std::lock_guard<std::mutex> guard(lock);
  auto [entry, is_new] = known.try_emplace(&op.schema());
  auto& found = entry->second;
  if (!is_new) return found;
  const auto& schema = op.schema();
  found.name = c10::toString(op.operator_name());
  auto begins = [&](const char* text) { return found.name.rfind(text, 0) == 0; };
  found.takes_host_scalars = !begins("aten::_fused_adam");
  found.reads_by_index = begins("aten::index.");
  found.writes_by_index = begins("aten::index_put") || begins("aten::_index_put");
  found.value_shaped = VALUE_SHAPED.count(found.name);
  found.repeats = found.name == "aten::repeat_interleave.Tensor";
  for (const auto& argument : schema.arguments())
    if (argument.is_out()) found.in_place = false;
  for (const auto& output : schema.returns()) {
    int same = -1;
    const auto* alias = output.alias_info();
    for (size_t i = 0; alias && i < schema.arguments().size(); i++) {
      const auto* other = schema.arguments()[i].alias_info();
      if (other && *other == *alias) same = static_cast<int>(i);
    }
    bool is_new_tensor = !alias && output.type()->kind() == c10::TypeKind::TensorType;
    if (!is_new_tensor && (same < 0 || !alias->isWrite())) found.in_place = false;
    found.returns.push_back(same);
  }
  return found;
}

struct Tensors {  // of the arguments of one call
  bool device = false;
  int host = -1;  // the first argument that is on the host and has dimensions
};

void look(const at::Tensor& tensor, size_t argument, const Operator& known, Tensors& found) {
  if (!tensor.defined()) return;
  if (on_device(tensor)) found.device = true;
  else if (tensor.is_cpu() && (tensor.dim() > 0 || !known.takes_host_scalars) && found.host < 0)
    found.host = static_cast<int>(argument);
}

Tensors look_at_arguments(const torch::jit::Stack& stack, size_t count, const Operator& known) {
  Tensors found;
  for (size_t i = 0; i < count; i++) {
    const auto& value = stack[stack.size() - count + i];
    if (value.isTensor()) {
      look(value.toTensor(), i, known, found);
    } else if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) look(tensor, i, known, found);
    } else if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector())
        if (tensor) look(*tensor, i, known, found);
    }
  }
  return found;
}

// Indices may be on the host: they are copied. Boolean ones become numbers, except to fill with a number.
// Reading by indices reports this by itself.
void report_indices(const torch::jit::Stack& stack, size_t count) {
  const auto* call = &stack[stack.size() - count];
  bool fills = call[2].toTensor().numel() == 1 && call[2].toTensor().is_cpu();
  for (const auto& index : call[1].toOptionalTensorVector()) {
    if (!index || !index->defined()) continue;
    if (index->is_cpu()) report("copy to device", static_cast<int64_t>(index->nbytes()));
    auto type = index->scalar_type();
    if ((type == at::kBool || type == at::kByte) && !fills) report("nonzero", static_cast<int64_t>(index->nbytes()));
  }
}

at::Tensor to_device(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  auto dtype = tensor.scalar_type();
  at::Tensor made =
      at::detail::empty_strided_generic(tensor.sizes(), tensor.strides(), &device_allocator, KEYS, dtype);
  on_host(made).copy_(tensor);
  return made;
}

c10::IValue value_on_host(const c10::IValue& value) {
  if (value.isTensor()) return value.toTensor().defined() ? c10::IValue(on_host(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<at::Tensor> tensors;
    for (const auto& tensor : value.toTensorVector()) tensors.push_back(on_host(tensor));
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (const auto& tensor : value.toOptionalTensorVector())
      tensors.push_back(tensor && tensor->defined() ? std::make_optional(on_host(*tensor)) : tensor);
    return tensors;
  }
  if (value.isDevice()) return c10::Device(at::kCPU);
  return value;
}

// Call the CPU's operator on the same memory. Its new tensors are copied to the device.
void call_in_place(const c10::OperatorHandle& op, const Operator& known, torch::jit::Stack* stack, size_t count) {
  std::vector<c10::IValue> arguments(stack->end() - count, stack->end());
  for (size_t i = 0; i < count; i++) (*stack)[stack->size() - count + i] = value_on_host(arguments[i]);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = 0; i < known.returns.size(); i++) {
    auto& output = (*stack)[stack->size() - known.returns.size() + i];
    output = known.returns[i] >= 0 ? arguments[known.returns[i]] : c10::IValue(to_device(output.toTensor()));
  }
}

void compute_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& known = look_up(op);
  auto count = op.schema().arguments().size();
  auto found = look_at_arguments(*stack, count, known);
  TORCH_CHECK(!found.device || found.host < 0 || known.reads_by_index || known.writes_by_index,
              "Expected all tensors to be on the same device, but found at least two devices, emu and cpu! "
              "(argument ", op.schema().arguments()[std::max(found.host, 0)].name(), " of ", known.name, ")");
  if (found.device) {
    if (known.value_shaped) report(known.name.c_str() + 6, 0);
    if (known.repeats && torch::jit::peek(*stack, 1, 2).isNone()) report("repeat_interleave", 0);
    if (known.writes_by_index) report_indices(*stack, count);
  }
  struct Inside {
    Inside() { inside++; }
    ~Inside() { inside--; }
  } guard;
  if (known.in_place && found.device) call_in_place(op, known, stack, count);
  else at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("set_.source_Tensor", at::native::set_tensor_);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", read_scalar);
}
// For devices without a kernel of their own torch decomposes this one, which rounds otherwise.
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
}
TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

}  // namespace

extern "C" {
void emu_register(int devices) {
  count = static_cast<c10::DeviceIndex>(devices);
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}
void emu_set_device(int index) { current = static_cast<c10::DeviceIndex>(index); }
int emu_current_device() { return current; }
void emu_report_to(Report call) { reporter = call; }
int64_t emu_allocated() { return allocated; }
int64_t emu_peak() { return peak; }
void emu_reset_peak() { peak = allocated.load(); }
}
