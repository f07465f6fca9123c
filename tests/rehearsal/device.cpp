// A torch device whose memory is the host's, apart from it by name: an operation on tensors of both ends in an error,
// as it does on a GPU. Operations are computed by the CPU's kernels.

#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr auto DEVICE = c10::DeviceType::PrivateUse1;
// While a step is captured the host may neither wait nor copy: what it did then would not be done again by a replay.
std::atomic<int> capturing{0};
// An operation's way to the CPU's kernels and back may look at anything.
std::atomic<int> within_operation{0};

// A captured step, as a graph holds it: every operation and kernel with the tensors, numbers and addresses of then. What was allocated
// while it was captured stays where it is until the graph is dropped.
struct Graph {
    std::vector<std::function<const char *()>> steps;
    std::vector<void *> memory;
    ~Graph();
};
Graph *graph = nullptr;

void forbid_in_capture(const char *what) {
    TORCH_CHECK(!capturing || within_operation, what, " within a capture: on a GPU this ends the capture with an error");
}

// Where tensors lie: a kernel may touch nothing else.
std::mutex places_guard;
std::map<const char *, size_t> places;
std::atomic<unsigned> places_changed{0};

void place(const void *data, size_t bytes) {
    const std::lock_guard held(places_guard);
    places[static_cast<const char *>(data)] = bytes;
    places_changed++;
}
void displace(const void *data) {
    const std::lock_guard held(places_guard);
    places.erase(static_cast<const char *>(data));
    places_changed++;
}

// Bytes allocated now, and at most since peak was last set.
std::atomic<size_t> taken{0}, peak{0};

struct Block {
    void *data = nullptr;
    size_t bytes;
    bool of_graph = false;
    explicit Block(size_t size) : bytes(size) {
        if (size && posix_memalign(&data, 512, size)) throw std::bad_alloc();
        if (graph && data) of_graph = true, graph->memory.push_back(data);
        taken += bytes;
        peak = std::max(peak.load(), taken.load());
        if (data) place(data, size);
    }
    // Of a graph's memory other tensors of the same capture would be made, so that it counts as free.
    ~Block() {
        if (data && !of_graph) displace(data), std::free(data);
        taken -= bytes;
    }
};

Graph::~Graph() {
    steps.clear();
    for (void *data : memory) displace(data), std::free(data);
}

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        auto *block = new Block(bytes);
        return {block->data, block, [](void *made) { delete static_cast<Block *>(made); }, c10::Device(DEVICE, 0)};
    }
    void copy_data(void *to, const void *from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(DEVICE, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return DEVICE; }
    c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
    c10::Device getDevice() const override { return {DEVICE, 0}; }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    at::Allocator *getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                     type.value_or(at::kFloat), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> type,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                             c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type.value_or(at::kFloat));
}

// The same bytes as a tensor of the CPU, which must not outlive this one.
at::Tensor on_host(const at::Tensor &self) {
    if (self.is_cpu()) return self;
    return at::from_blob(self.data_ptr(), self.sizes(), self.strides(), self.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor &self, const at::Tensor &to, bool) {
    if (self.device() != to.device()) forbid_in_capture("a copy between host and device");
    on_host(to).copy_(on_host(self));
    if (graph) graph->steps.push_back([self, to] { return on_host(to).copy_(on_host(self)), nullptr; });
    return to;
}

at::Tensor copy_from_and_resize(const at::Tensor &self, const at::Tensor &to) {
    if (to.sizes() != self.sizes()) to.resize_(self.sizes());
    return copy_from(self, to, false);
}

at::Tensor as_strided(const at::Tensor &self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
    std::optional<int64_t> at;
    if (offset) at = offset->guard_int(__FILE__, __LINE__);
    return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at);
}

at::Tensor reshape_alias(const at::Tensor &self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
    return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), self.storage_offset());
}

at::Tensor view(const at::Tensor &self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

const at::Tensor &resize(const at::Tensor &self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
    return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Scalar local_scalar(const at::Tensor &self) {
    forbid_in_capture("reading a value back");
    return on_host(self).item();
}

// An operation done again, its results where they were the first time.
std::function<const char *()> again(const c10::OperatorHandle &op, torch::jit::Stack given, std::vector<c10::IValue> found) {
    return [=] {
        torch::jit::Stack stack = given;
        at::native::cpu_fallback(op, &stack);
        for (size_t i = 0; i < found.size(); i++) {
            if (!found[i].isTensor() || found[i].toTensor().data_ptr() == stack[i].toTensor().data_ptr()) continue;
            on_host(found[i].toTensor()).copy_(on_host(stack[i].toTensor()));
        }
        return nullptr;
    };
}

// Any other operation: on the CPU's kernels, once its tensors were found to be where a GPU's would want them.
void compute(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
    static const std::set<std::string> indexed_from_host{"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index.Tensor_out"};
    static const std::set<std::string> waiting{"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal",
                                               "aten::repeat_interleave", "aten::bincount"};
    const auto &schema = op.schema();
    if (waiting.count(schema.name())) forbid_in_capture(schema.name().c_str());
    const torch::jit::Stack given = torch::jit::last(stack, schema.arguments().size()).vec();
    bool device = false, host = false;
    auto look = [&](const at::Tensor &one) {
        if (!one.defined()) return;
        if (one.is_cpu()) host |= one.dim() > 0;
        else device = true;
    };
    for (const auto &value : given) {
        if (value.isTensor()) look(value.toTensor());
        if (value.isTensorList()) for (const auto &one : value.toTensorList()) look(one);
        if (value.isOptionalTensorList()) for (const std::optional<at::Tensor> &one : value.toOptionalTensorList()) if (one) look(*one);
    }
    const bool mixed = device && host;
    TORCH_CHECK(!mixed || indexed_from_host.count(schema.name()), schema.name(), ": tensors of the host and of the device in one operation");
    if (mixed) forbid_in_capture("indices from the host");
    struct Operation {
        Operation() { within_operation++; }
        ~Operation() { within_operation--; }
    } operation;
    at::native::cpu_fallback(op, stack);
    if (graph) graph->steps.push_back(again(op, given, torch::jit::last(stack, schema.returns().size()).vec()));
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", &empty);
    m.impl("empty_strided", &empty_strided);
    m.impl("_copy_from", &copy_from);
    m.impl("_copy_from_and_resize", &copy_from_and_resize);
    m.impl("as_strided", &as_strided);
    m.impl("_reshape_alias", &reshape_alias);
    m.impl("view", &view);
    m.impl("resize_", &resize);
    m.impl("_local_scalar_dense", &local_scalar);
    m.impl("set_.source_Tensor", &at::native::set_tensor_);
}

// Bytes that something else allocated, as a tensor; they must outlive it.
at::Tensor bytes_at(int64_t address, int64_t bytes) {
    const c10::Device device(DEVICE, 0);
    place(reinterpret_cast<void *>(address), bytes);
    return at::for_blob(reinterpret_cast<void *>(address), {bytes}).options(at::TensorOptions(at::kByte).device(device)).target_device(device).make_tensor();
}

TORCH_LIBRARY(rehearsal, m) { m.def("bytes_at(int address, int bytes) -> Tensor", &bytes_at); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

}  // namespace

extern "C" {
void device_register() { at::RegisterPrivateUse1HooksInterface(new Hooks()); }
// Begin a graph; what device_end_capture gives is replayed and dropped by whoever has it.
void device_begin_capture() { graph = new Graph, capturing = 1; }
void *device_end_capture() { return capturing = 0, std::exchange(graph, nullptr); }
void device_drop(void *held) { delete static_cast<Graph *>(held); }
// Why a kernel failed, or nothing.
const char *device_replay(void *held) {
    struct Operation {
        Operation() { within_operation++; }
        ~Operation() { within_operation--; }
    } operation;
    for (const auto &step : static_cast<Graph *>(held)->steps)
        if (const char *wrong = step()) return wrong;
    return nullptr;
}
// A kernel of ptx_kernels.py was launched: while a graph is captured, it is part of it.
struct Dim { unsigned x, y, z; };
struct alignas(128) Params { char bytes[4096]; };
using Run = const char *(*)(Dim, Dim, size_t, const char *, bool (*)(const void *, size_t));
bool device_holds(const void *data, size_t bytes);
const char *device_run(Run run, Dim grid, Dim block, size_t shared, const char *given) {
    Params params;
    std::memcpy(params.bytes, given, sizeof params);
    if (graph) graph->steps.push_back([=] { return run(grid, block, shared, params.bytes, device_holds); });
    return run(grid, block, shared, params.bytes, device_holds);
}
bool device_holds(const void *data, size_t bytes) {
    static thread_local const char *begin = nullptr, *end = nullptr;
    static thread_local unsigned as_of = 0;
    const auto *asked = static_cast<const char *>(data);
    if (as_of == places_changed && asked >= begin && asked + bytes <= end) return true;
    const std::lock_guard held(places_guard);
    auto found = places.upper_bound(asked);
    if (found == places.begin()) return false;
    --found;
    as_of = places_changed, begin = found->first, end = begin + found->second;
    return asked + bytes <= end;
}
size_t device_peak() { return peak.exchange(taken); }
}
