// A torch device that behaves like a GPU but uses the host's memory. An operation that mixes its tensors with the host's
// fails, as on a GPU. Operations are launched on a stream, and the CPU's kernels compute them when the host waits for it.

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
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "stream.hpp"

extern "C" bool device_holds(const void *data, size_t bytes);

namespace {

constexpr auto DEVICE = c10::DeviceType::PrivateUse1;
// During a capture the host may neither wait nor copy, because a replay would not repeat it.
void forbid_in_capture(const char *what) {
    TORCH_CHECK(!stream::graph || stream::within_step, what, " within a capture: on a GPU this ends the capture with an error");
}

void wait() {
    const char *wrong = stream::wait_for_all();
    TORCH_CHECK(!wrong, "on the device: ", wrong);
}

// The memory of all tensors, by address; a kernel may touch nothing else.
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

// Bytes allocated now, and the most that were allocated at once since peak was last reset.
std::atomic<size_t> taken{0}, peak{0};

struct Block {
    void *data = nullptr;
    size_t bytes;
// `of_graph`: the graph owns the memory, and frees it. `counted`: not allocated by a step of this device for itself.
    bool of_graph = false, counted = !stream::within_step;
    explicit Block(size_t size) : bytes(size) {
        if (size && posix_memalign(&data, 512, size)) throw std::bad_alloc();
        if (stream::graph && counted && data) of_graph = true, stream::graph->memory.push_back(data);
        if (counted) taken += bytes;
        peak = std::max(peak.load(), taken.load());
        if (data) place(data, size);
    }
// It counts as free at once, because anything that reuses it comes later on the stream.
    ~Block() {
        if (counted) taken -= bytes;
        if (!data || of_graph) return;
        auto release = [data = data]() -> const char * { return displace(data), std::free(data), nullptr; };
        if (counted) stream::when_done(release);
        else release();
    }
};

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        auto *block = new Block(bytes);
        return {block->data, block, [](void *made) { delete static_cast<Block *>(made); }, c10::Device(DEVICE, 0)};
    }
    void copy_data(void *to, const void *from, size_t bytes) const override { wait(), std::memcpy(to, from, bytes); }
};
Memory memory;

// Pinned memory of the host: copies from and to it are done while the host goes on.
std::map<const char *, size_t> pinned;
bool is_pinned(const void *data) {
    const std::lock_guard held(places_guard);
    auto found = pinned.upper_bound(static_cast<const char *>(data));
    return found != pinned.begin() && data < (--found)->first + found->second;
}

struct Pinned final : c10::Allocator {
    static void release(void *data) {
        stream::when_done([data]() -> const char * {
            const std::lock_guard held(places_guard);
            return pinned.erase(static_cast<const char *>(data)), std::free(data), nullptr;
        });
    }
    c10::DataPtr allocate(size_t bytes) override {
        void *data = nullptr;
        if (bytes && posix_memalign(&data, 512, bytes)) throw std::bad_alloc();
        const std::lock_guard held(places_guard);
        if (data) pinned[static_cast<const char *>(data)] = bytes;
        return {data, data, [](void *made) { if (made) release(made); }, c10::Device(c10::kCPU)};
    }
    void copy_data(void *to, const void *from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Pinned pinned_memory;
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
    bool isPinnedPtr(const void *data) const override { return is_pinned(data); }
    at::Allocator *getPinnedMemoryAllocator() const override { return &pinned_memory; }
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

// The same bytes as a tensor that does not own them: on the CPU, to compute with it, or on this device, for a launch.
at::Tensor on(const at::Tensor &self, c10::DeviceType type) {
    return at::for_blob(self.data_ptr(), self.sizes()).strides(self.strides()).options(self.options().device(type)).target_device(type == DEVICE ? c10::Device(DEVICE, 0) : c10::Device(c10::kCPU)).make_tensor();
}

// Whether a tensor's memory is still allocated when its step runs. Neither a stream nor a graph keeps it allocated.
bool is_there(const at::Tensor &one) {
    if (!one.defined() || one.device().type() != DEVICE || !one.numel()) return true;
    int64_t last = 0;
    for (int64_t i = 0; i < one.dim(); i++) last += (one.size(i) - 1) * one.stride(i);
    return device_holds(one.data_ptr(), (last + 1) * one.element_size());
}
constexpr auto GONE = "a tensor was freed before a step that was launched, or captured, with it has run";

at::Tensor on_host(const at::Tensor &self) { return self.is_cpu() ? self : on(self, c10::kCPU); }

void launch_copy(const at::Tensor &from, const at::Tensor &to) {
    auto unowned = [](const at::Tensor &one) { return on(one, one.device().type()); };
    stream::launch([from = unowned(from), to = unowned(to)]() -> const char * {
        if (!is_there(from) || !is_there(to)) return GONE;
        return on_host(to).copy_(on_host(from)), nullptr;
    });
}

// Between host and device, with `without_waiting`: a copy to or from pinned memory is launched, and one from other memory
// of the host reads it now. Any other copy between them is done before this returns.
at::Tensor copy_from(const at::Tensor &self, const at::Tensor &to, bool without_waiting) {
    if (stream::within_step) return on_host(to).copy_(on_host(self)), to;
    const bool both = self.device() == to.device();
    if (!both) forbid_in_capture("a copy between host and device");
    if (both || (without_waiting && is_pinned((self.is_cpu() ? self : to).data_ptr()))) return launch_copy(self, to), to;
    if (without_waiting && self.is_cpu()) {
        stream::launch([from = self.clone(), to = on(to, DEVICE)]() -> const char * {
            if (!is_there(to)) return GONE;
            return on_host(to).copy_(from), nullptr;
        });
        return to;
    }
    wait();
    on_host(to).copy_(on_host(self));
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
    if (!stream::within_step) wait();
    return on_host(self).item();
}

using Change = std::function<at::Tensor(const at::Tensor &)>;

// A copy of `value` in which `change` was applied to each tensor of the device.
c10::IValue changed(const c10::IValue &value, const Change &change) {
    auto one = [&](const at::Tensor &tensor) { return tensor.defined() && !tensor.is_cpu() ? change(tensor) : tensor; };
    if (value.isTensor()) return one(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor &tensor : value.toTensorList()) list.push_back(one(tensor));
        return list;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> list;
        for (const std::optional<at::Tensor> &tensor : value.toOptionalTensorList()) list.push_back(tensor ? std::optional(one(*tensor)) : tensor);
        return list;
    }
    return value;
}

torch::jit::Stack changed(const torch::jit::Stack &values, const Change &change) {
    torch::jit::Stack found;
    for (const auto &value : values) found.push_back(changed(value, change));
    return found;
}

// The index of the argument into which the operation writes this result; nullopt if it allocates the result.
std::optional<size_t> written(const c10::FunctionSchema &schema, size_t result) {
    const auto *alias = schema.returns()[result].alias_info();
    for (size_t i = 0; alias && i < schema.arguments().size(); i++)
        if (const auto *other = schema.arguments()[i].alias_info(); other && other->beforeSets() == alias->beforeSets()) return i;
    return std::nullopt;
}

// Tensors for the results of an operation. Their shapes are found without computing it.
std::vector<at::Tensor> results_of(const c10::OperatorHandle &op, const torch::jit::Stack &given) {
    auto shapes = changed(given, [](const at::Tensor &one) { return at::empty_strided(one.sizes(), one.strides(), one.options().device(c10::kMeta)); });
    for (auto &value : shapes) if (value.isDevice() && value.toDevice().type() == DEVICE) value = c10::Device(c10::kMeta);
    op.callBoxed(shapes);
    std::vector<at::Tensor> found;
    for (size_t i = 0; i < shapes.size(); i++) {
        const at::Tensor shape = shapes[i].toTensor();
        if (const auto argument = written(op.schema(), i)) {
            found.push_back(given[*argument].toTensor());
            if (found.back().sizes() != shape.sizes()) found.back().resize_(shape.sizes());
        } else {
            found.push_back(shape.defined() ? at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(c10::Device(DEVICE, 0))) : shape);
        }
    }
    return found;
}

// A step that computes an operation with the CPU's kernels and copies the results to `results`.
stream::Step computed(const c10::OperatorHandle &op, const torch::jit::Stack &given, const std::vector<at::Tensor> &results) {
    const Change here = [](const at::Tensor &one) { return on(one, DEVICE); };
    std::vector<at::Tensor> places;
    for (const at::Tensor &result : results) places.push_back(result.defined() ? here(result) : result);
    return [op, given = changed(given, here), places]() -> const char * {
        bool there = true;
        torch::jit::Stack stack = changed(given, [&](const at::Tensor &one) { return there &= is_there(one), one; });
        for (const at::Tensor &place : places) there &= is_there(place);
        if (!there) return GONE;
        at::native::cpu_fallback(op, &stack);
        for (size_t i = 0; i < places.size(); i++) {
            if (!places[i].defined()) continue;
            const at::Tensor found = stack[i].toTensor();
            if (found.data_ptr() != places[i].data_ptr()) on_host(places[i]).copy_(on_host(found));
        }
        return nullptr;
    };
}

// About an operation's tensors. `mixed`: some are on the host and some on the device. `mask`: one is a boolean index; how
// many elements it selects must be read back to the host.
struct Found { bool mixed, mask; };
Found look_at(const torch::jit::Stack &given) {
    bool device = false, host = false, mask = false;
    auto look = [&](const at::Tensor &one) {
        if (!one.defined()) return;
        if (one.is_cpu()) host |= one.dim() > 0;
        else device = true;
    };
    for (const auto &value : given) {
        if (value.isTensor()) look(value.toTensor());
        if (value.isTensorList()) for (const auto &one : value.toTensorList()) look(one);
        if (value.isOptionalTensorList()) for (const std::optional<at::Tensor> &one : value.toOptionalTensorList())
            if (one && one->defined()) look(*one), mask |= one->scalar_type() == at::kBool;
    }
    return {device && host, mask};
}

// Any other operation: check that its tensors are where a GPU would need them, and launch it.
void compute(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
    static const std::set<std::string> indexed_from_host{"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index.Tensor_out"};
    static const std::set<std::string> waiting{"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal",
                                               "aten::repeat_interleave", "aten::bincount"};
    const auto &schema = op.schema();
    const torch::jit::Stack given = torch::jit::last(stack, schema.arguments().size()).vec();
    const auto [mixed, mask] = look_at(given);
    TORCH_CHECK(!mixed || indexed_from_host.count(schema.name()), schema.name(), ": tensors of the host and of the device in one operation");
    if (mixed) forbid_in_capture("indices from the host");
    if (mixed || mask || waiting.count(schema.name())) {
        forbid_in_capture(schema.name().c_str());
        wait();
        const stream::Within step;
        return at::native::cpu_fallback(op, stack);
    }
    const std::vector<at::Tensor> results = results_of(op, given);
    stream::launch(computed(op, given, results));
    torch::jit::drop(*stack, given.size());
    for (const at::Tensor &result : results) stack->push_back(result);
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
    // One kernel on an H100. Without this, torch would make the products one by one and read back how large they are.
    m.impl("_grouped_mm", torch::CppFunction::makeFromBoxedFunction<&compute>());
}

// A tensor on bytes that something else allocated; they must outlive it.
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
// How many steps have been launched. device_wait runs the first `mark` of them and returns an error message, or null.
size_t device_mark() { return stream::launched_steps; }
const char *device_wait(size_t mark) { return stream::wait(mark); }
// How often the host has waited for steps that were not done, since the last call.
size_t device_waits() { return std::exchange(stream::waits, 0); }
// Begin to capture a graph. The caller of device_end_capture gets it, and may replay it and must drop it.
void device_begin_capture() { stream::graph = new stream::Graph; }
void *device_end_capture() { return std::exchange(stream::graph, nullptr); }
void device_replay(void *held) { stream::replay(static_cast<stream::Graph *>(held)); }
void device_drop(void *held) {
    stream::when_done([held]() -> const char * {
        const auto *dropped = static_cast<stream::Graph *>(held);
        for (void *data : dropped->memory) displace(data), std::free(data);
        return delete dropped, nullptr;
    });
}
// cudaMemcpyAsync of the runtime. A copy from memory of the host that is not pinned reads it now, and a copy to such memory
// is done before this returns. Any other copy is only launched.
const char *device_copy(void *to, const void *from, size_t bytes, int kind) {
    enum { UP = 1, DOWN = 2 };
    if (kind == DOWN && !is_pinned(to)) {
        const char *wrong = stream::wait_for_all();
        return std::memcpy(to, from, bytes), wrong;
    }
    auto copied = [=]() -> const char * { return std::memcpy(to, from, bytes), nullptr; };
    if (kind != UP || is_pinned(from)) return stream::launch(copied), nullptr;
    const auto *begin = static_cast<const char *>(from);
    stream::launch([to, now = std::vector<char>(begin, begin + bytes)]() -> const char * { return std::memcpy(to, now.data(), now.size()), nullptr; });
    return nullptr;
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
// Launch a kernel that ptx_kernels.py has compiled.
struct Dim { unsigned x, y, z; };
struct alignas(128) Params { char bytes[4096]; };
using Run = const char *(*)(Dim, Dim, size_t, const char *, bool (*)(const void *, size_t));
void device_run(Run run, const char *name, Dim grid, Dim block, size_t shared, const char *given) {
    Params params;
    std::memcpy(params.bytes, given, sizeof params);
    stream::launch([=, name = std::string(name)]() -> const char * {
        static std::string failure;
        const char *wrong = run(grid, block, shared, params.bytes, device_holds);
        return wrong ? (failure = name + ": " + wrong).c_str() : nullptr;
    });
}
size_t device_peak() { return peak.exchange(taken); }
}
