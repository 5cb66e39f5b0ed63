// A device `cuda:0` that computes on the CPU: every operator of the CUDA dispatch key runs on host tensors that share
// the memory of its arguments. Dispatch, autograd, autocast and tensors are torch's own; only the kernels are not.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::IValue;

namespace {

const Device kDevice(DeviceType::CUDA, 0);
const Device kHost(DeviceType::CPU);

// ---- what the tests read ----

using Observer = void (*)(const char* kind, const char* name);
std::atomic<Observer> observer{nullptr};
std::atomic<long> launches{0};
std::atomic<size_t> allocated{0}, peak{0}, limit{0};  // no limit where it is 0

void tell(const char* kind, const std::string& name) {
  if (auto call = observer.load()) call(kind, name.c_str());
}

// ---- memory: the host's, with another label ----

void count(size_t bytes) {
  size_t now = allocated += bytes, before = peak.load(), most = limit.load();
  if (most && bytes && now > most) {
    allocated -= bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes.");
  }
  while (now > before && !peak.compare_exchange_weak(before, now)) {
  }
}

struct Block {
  c10::Storage owner;  // of the memory
  size_t bytes;        // counted as allocated on the device; 0 for a second label of the same memory
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= block->bytes;
  delete block;
}

c10::DataPtr relabelled(const c10::Storage& storage, Device device, bool counted) {
  size_t bytes = counted ? storage.nbytes() : 0;
  count(bytes);
  return {const_cast<void*>(storage.data()), new Block{storage, bytes}, &release, device};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* host = c10::GetCPUAllocator();
    c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), bytes, host->allocate(bytes), host, true));
    return relabelled(storage, kDevice, true);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
DeviceAllocator device_allocator;

// Pinned memory is remembered, because only copies from it run beside the computation.
std::mutex pinned_lock;
std::set<std::pair<const char*, const char*>> pinned;

struct PinnedAllocator final : c10::Allocator {
  struct Memory {
    c10::DataPtr data;
    std::pair<const char*, const char*> range;
  };
  static void forget(void* context) {
    auto* memory = static_cast<Memory*>(context);
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(memory->range);
    delete memory;
  }
  c10::DataPtr allocate(size_t bytes) override {
    auto data = c10::GetCPUAllocator()->allocate(bytes);
    auto* start = static_cast<const char*>(data.get());
    void* pointer = data.get();
    auto* memory = new Memory{std::move(data), {start, start + bytes}};
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.insert(memory->range);
    return {pointer, memory, &forget, kHost};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  for (auto& [start, stop] : pinned)
    if (pointer >= start && pointer < stop) return true;
  return false;
}

at::Generator& device_generator() {  // apart from the host's
  static at::Generator generator = at::detail::createCPUGenerator(0);
  return generator;
}

// ---- one operator ----

bool on_device(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == DeviceType::CUDA; }

class Call {
 public:
  at::Tensor to_host(const at::Tensor& tensor) {
    if (!on_device(tensor)) return tensor;
    auto host = make(to_host(tensor.storage()), DispatchKey::CPU, tensor);
    originals_.emplace(host.unsafeGetTensorImpl(), tensor);
    copies_.push_back(host);
    return host;
  }

  c10::Storage to_host(const c10::Storage& storage) {
    if (storage.device_type() != DeviceType::CUDA) return storage;
    auto [place, is_new] = hosts_.try_emplace(storage.unsafeGetStorageImpl());
    if (is_new) {
      place->second = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), storage.nbytes(), relabelled(storage, kHost, false),
          c10::GetCPUAllocator(), true));
      devices_.emplace(place->second.unsafeGetStorageImpl(), storage);
    }
    return place->second;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (auto place = originals_.find(tensor.unsafeGetTensorImpl()); place != originals_.end()) return place->second;
    copies_.push_back(tensor);  // its address shall not be another's before the call ends
    return make(to_device(tensor.storage()), DispatchKey::CUDA, tensor);
  }

  c10::Storage to_device(const c10::Storage& storage) {
    auto [place, is_new] = devices_.try_emplace(storage.unsafeGetStorageImpl());
    if (is_new)
      place->second = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), storage.nbytes(), relabelled(storage, kDevice, true),
          &device_allocator, true));
    return place->second;
  }

  // An operator may give an argument that it writes to another shape or other memory.
  void take_over(const at::Tensor& host) {
    auto place = originals_.find(host.unsafeGetTensorImpl());
    if (place == originals_.end()) return;
    auto& original = place->second;
    auto theirs = to_device(host.storage());
    if (!theirs.is_alias_of(original.storage()))
      original.unsafeGetTensorImpl()->set_storage_keep_dtype(theirs);
    else if (host.storage().data() != theirs.data()) {
      theirs.unsafeGetStorageImpl()->set_data_ptr_noswap(relabelled(host.storage(), kDevice, true));
      theirs.unsafeGetStorageImpl()->set_nbytes(host.storage().nbytes());
    }
    if (host.sizes() != original.sizes() || host.strides() != original.strides())
      original.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }

 private:
  static at::Tensor make(c10::Storage storage, DispatchKey key, const at::Tensor& like) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(key), like.unsafeGetTensorImpl()->dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return made;
  }

  std::unordered_map<c10::StorageImpl*, c10::Storage> hosts_, devices_;
  std::unordered_map<c10::TensorImpl*, at::Tensor> originals_;
  std::vector<at::Tensor> copies_;
};

template <typename Change>
IValue changed(const IValue& value, Change change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector())
      list.push_back(tensor.has_value() ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
    return list;
  }
  return value;
}

template <typename Look>
void each_tensor(const IValue& value, Look look) {
  changed(value, [&](const at::Tensor& tensor) {
    if (tensor.defined()) look(tensor);
    return tensor;
  });
}

// What waits for the device: the host needs a number, or the size of a result.
const std::unordered_set<std::string> kWaits = {
    "aten::_local_scalar_dense", "aten::nonzero",   "aten::masked_select", "aten::_unique",   "aten::_unique2",
    "aten::unique_dim",          "aten::equal",     "aten::is_nonzero",    "aten::bincount",  "aten::unique_consecutive",
    "aten::unique_dim_consecutive"};
// What takes a host tensor beside one of the device.
const std::unordered_set<std::string> kMixes = {
    "aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_copy_from", "aten::set_"};
const std::unordered_set<std::string> kNothing = {"aten::_local_scalar_dense", "aten::set_", "aten::resize_"};

// What draws random numbers and takes no generator: the host's stands in for the device's.
const std::unordered_set<std::string> kDraws = {"aten::native_dropout"};

void swap_generators() {
  auto host = at::detail::getDefaultCPUGenerator();
  auto state = host.get_state();
  host.set_state(device_generator().get_state());
  device_generator().set_state(state);
}

void observe(const c10::FunctionSchema& schema, const std::vector<IValue>& arguments) {
  const auto& name = schema.name();
  if (kWaits.count(name)) tell("wait", name);
  if (name == "aten::repeat_interleave" && schema.overload_name() == "Tensor" && arguments.back().isNone())
    tell("wait", name);
  if (name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_")
    for (const auto& index : arguments[1].toOptionalTensorVector()) {
      if (!index || !index->defined()) continue;
      if (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte) tell("wait", name + " by a mask");
      else if (!on_device(*index)) tell("to_device", name + " pageable");
    }
  if (name == "aten::copy_") {
    const auto &to = arguments[0].toTensor(), &from = arguments[1].toTensor();
    if (on_device(to) && !on_device(from))
      tell("to_device", name + (is_pinned(from.storage().data()) ? " pinned" : " pageable"));
    if (!on_device(to) && on_device(from)) tell("to_host", name);
    if (!on_device(to) && on_device(from) && !(arguments[2].toBool() && is_pinned(to.storage().data())))
      tell("wait", name);
  }
  bool is_view = false;
  for (const auto& argument : schema.arguments())
    is_view |= argument.alias_info() && !argument.alias_info()->isWrite();
  if (!is_view && name.rfind("aten::empty", 0) != 0 && !kNothing.count(name)) {
    ++launches;
    tell("launch", name);
  }
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t number = schema.arguments().size();
  std::vector<IValue> arguments(stack->end() - number, stack->end());
  torch::jit::drop(*stack, number);

  bool has_device_tensor = false, to_host = false;
  const at::Tensor* stray = nullptr;
  std::vector<at::Tensor> strays;
  for (const auto& argument : arguments) {
    each_tensor(argument, [&](const at::Tensor& tensor) {
      if (on_device(tensor)) has_device_tensor = true;
      else if (tensor.dim() > 0) strays.push_back(tensor);
    });
    to_host |= argument.isDevice() && argument.toDevice().is_cpu();
  }
  if (!strays.empty()) stray = &strays.front();
  TORCH_CHECK(
      !has_device_tensor || stray == nullptr || kMixes.count(schema.name()),
      "Expected all tensors to be on the same device: ", schema.name(), " got cuda:0 and cpu ",
      stray ? stray->sizes() : c10::IntArrayRef());
  observe(schema, arguments);

  // torch has this form of softmax, fp16 to fp32, on a GPU only
  const bool is_softmax = schema.name() == "aten::_softmax" || schema.name() == "aten::_log_softmax";
  if (is_softmax && arguments[2].toBool()) {
    arguments[0] = arguments[0].toTensor().to(at::kFloat);
    arguments[2] = false;
  }
  std::optional<at::ScalarType> rounded;
  if (schema.name() == "aten::_softmax_backward_data" || schema.name() == "aten::_log_softmax_backward_data")
    if (auto dtype = static_cast<at::ScalarType>(arguments[3].toInt()); dtype != arguments[0].toTensor().scalar_type()) {
      rounded = dtype;
      arguments[3] = static_cast<int64_t>(arguments[0].toTensor().scalar_type());
    }

  Call call;
  std::vector<IValue> given;
  bool takes_generator = false;
  for (size_t i = 0; i < number; ++i) {
    const auto& argument = arguments[i];
    const auto type = schema.arguments()[i].type();
    if (argument.isDevice()) given.emplace_back(kHost);
    else if (argument.isNone() && type->str() == "Generator?") {
      takes_generator = true;
      given.emplace_back(device_generator());
    } else if (argument.isStorage()) given.emplace_back(call.to_host(argument.toStorage()));
    else given.push_back(changed(argument, [&](const at::Tensor& tensor) { return call.to_host(tensor); }));
  }
  const bool draws = !takes_generator && kDraws.count(schema.name());
  torch::jit::Stack inner = given;
  {
    c10::impl::ExcludeDispatchKeyGuard below(
        c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
        c10::DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot}));
    if (draws) swap_generators();
    op.callBoxed(&inner);
    if (draws) swap_generators();
  }
  for (size_t i = 0; i < number; ++i)
    if (const auto* alias = schema.arguments()[i].alias_info(); alias && alias->isWrite())
      each_tensor(given[i], [&](const at::Tensor& tensor) { call.take_over(tensor); });

  // a result on the host is one that was asked for there, or written to there
  for (const auto& result : inner) {
    bool stays = to_host;
    for (const auto& argument : arguments)
      each_tensor(argument, [&](const at::Tensor& tensor) {
        stays |= !on_device(tensor) && result.isTensor() && result.toTensor().is_same(tensor);
      });
    if (rounded) {
      stack->push_back(call.to_device(result.toTensor()).to(*rounded));
      continue;
    }
    stack->push_back(stays ? result : changed(result, [&](const at::Tensor& tensor) { return call.to_device(tensor); }));
  }
}

// ---- what torch asks of a device beside its kernels ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream getNewStream(Device, int) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return device_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

// torch has one function for all devices here, which looks for a kernel of the device
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  for (const char* name : {"copy_"}) library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}

extern "C" {
void virtual_install() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new Guard());
  c10::SetAllocator(DeviceType::CUDA, &device_allocator, 1);
}
void virtual_observe(Observer call) { observer = call; }
long virtual_launches() { return launches; }
void virtual_seed(uint64_t seed) { device_generator().set_current_seed(seed); }
size_t virtual_allocated() { return allocated; }
size_t virtual_peak() { return peak; }
void virtual_limit(size_t bytes) { limit = bytes; }
void virtual_reset_peak() { peak = allocated.load(); }
}
