// The part of CUDA's runtime that FlashInfer's host code calls, without a GPU. It has the limits of an H100. It notes
// each launch of a kernel, and passes it to the function given to `run_kernels`, if any.

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct { unsigned x, y, z; } dim3;
typedef struct { dim3 grid, block; size_t shared; void *stream; void *attrs; unsigned count; } launch_config;

enum { OK = 0, INVALID_VALUE = 1, KERNELS = 8192, LOG = 1 << 22 };
enum { SHARED_DEFAULT = 48 << 10, SHARED_MOST = 227 << 10, SHARED_OF_PROCESSOR = 228 << 10 };

static struct { const void *host; const char *name; int shared; } kernels[KERNELS];
static int known;
static char notes[LOG];
static size_t noted;
static launch_config pushed[16];
static int depth;
static int last;
static int (*runner)(const char *name, const dim3 *grid, const dim3 *block, size_t shared, void **args);
static const char *(*copier)(void *to, const void *from, size_t bytes, int kind);

static int find(const void *host) {
    for (int i = known - 1; i >= 0; i--) if (kernels[i].host == host) return i;
    return -1;
}

static int failed(int code) { last = code; return code; }

static int launch(const void *host, dim3 grid, dim3 block, size_t shared, void **args) {
    const int which = find(host);
    const size_t threads = (size_t)block.x * block.y * block.z;
    const size_t most = which >= 0 && kernels[which].shared ? kernels[which].shared : SHARED_DEFAULT;
    if (which < 0 || !threads || threads > 1024 || block.z > 64 || shared > most || !grid.x || !grid.y || !grid.z ||
        grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        fprintf(stderr, "a launch of %s is refused: grid %u %u %u, block %u %u %u, %zu bytes of shared memory of %zu\n",
                which < 0 ? "an unknown kernel" : kernels[which].name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, most);
        return failed(INVALID_VALUE);
    }
    if (noted + 1024 < LOG)
        noted += snprintf(notes + noted, 1024, "%.900s\t%u %u %u\t%u %u %u\t%zu\n", kernels[which].name, grid.x, grid.y,
                          grid.z, block.x, block.y, block.z, shared);
    return runner ? failed(runner(kernels[which].name, &grid, &block, shared, args)) : OK;
}

// ---- called by the tests ----

const char *noted_launches(void) { return notes; }
void forget_launches(void) { noted = 0; notes[0] = 0; }
// From now on, call `given` with the name and arguments of each kernel that is launched. NULL: kernels do not run.
void run_kernels(int (*given)(const char *, const dim3 *, const dim3 *, size_t, void **)) { runner = given; }
// From now on, `given` does the copies. It returns an error message, or NULL.
void copy_with(const char *(*given)(void *, const void *, size_t, int)) { copier = given; }

// ---- called by code that nvcc generates ----

void **__cudaRegisterFatBinary(void *binary) { static void *handle; (void)binary; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
void __cudaRegisterVar(void **h, char *host, char *device, const char *name, int ext, size_t size, int constant, int global) {
    (void)h, (void)host, (void)device, (void)name, (void)ext, (void)size, (void)constant, (void)global;
}
void __cudaRegisterFunction(void **h, const char *host, char *device, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {
    (void)h, (void)device, (void)limit, (void)a, (void)b, (void)c, (void)d, (void)e;
    if (known < KERNELS) kernels[known].host = host, kernels[known].name = name, known++;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed[depth++] = (launch_config){grid, block, shared, stream, NULL, 0};
    return 0;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    const launch_config found = pushed[--depth];
    *grid = found.grid, *block = found.block, *shared = found.shared;
    *(void **)stream = found.stream;
    return OK;
}
int __cudaGetKernel(const void **kernel, const void *entry) { *kernel = entry; return OK; }
int __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **args, size_t shared, void *stream) {
    (void)stream;
    return launch(kernel, grid, block, shared, args);
}

// ---- the runtime's calls ----

int cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **args, size_t shared, void *stream) {
    (void)stream;
    return launch(host, grid, block, shared, args);
}
int cudaLaunchKernelExC(const launch_config *config, const void *host, void **args) {
    return launch(host, config->grid, config->block, config->shared, args);
}
int cudaFuncSetAttribute(const void *host, int attribute, int value) {
    const int which = find(host);
    if (which < 0 || (attribute == 8 && value > SHARED_MOST)) return failed(INVALID_VALUE);
    if (attribute == 8) kernels[which].shared = value;
    return OK;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *host, int threads, size_t shared, unsigned flags) {
    (void)flags;
// Registers are not counted, so this is an upper bound. It is the safe side: each block needs a part of a workspace.
    const int by_threads = 2048 / threads, by_shared = (int)(SHARED_OF_PROCESSOR / (shared + 1024));
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    return find(host) < 0 ? failed(INVALID_VALUE) : OK;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *host, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared, 0);
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 8: *value = SHARED_DEFAULT; return OK;
    case 16: *value = 132; return OK;
    case 39: *value = 2048; return OK;
    case 75: *value = 9; return OK;
    case 76: *value = 0; return OK;
    case 81: *value = SHARED_OF_PROCESSOR; return OK;
    case 97: *value = SHARED_MOST; return OK;
    default: fprintf(stderr, "attribute %d of the device is unknown\n", attribute); return failed(INVALID_VALUE);
    }
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    (void)stream;
    return copier(to, from, bytes, kind) ? failed(INVALID_VALUE) : OK;
}
// FlashAttention 3 describes the memory that the copy engine will read. Checked as strictly as the documentation of
// cuTensorMapEncodeTiled says.
static int encode_tensor_map(void *map, int type, unsigned rank, const void *address, const uint64_t *dims, const uint64_t *strides,
                             const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
    static const int bytes_of[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    (void)interleave, (void)promotion, (void)fill;
    if ((uintptr_t)map % 64 || (uintptr_t)address % 16 || type < 0 || type > 12 || rank < 1 || rank > 5) return INVALID_VALUE;
    for (unsigned i = 0; i < rank; i++) {
        if (!dims[i] || dims[i] > 1ull << 32 || !box[i] || box[i] > 256 || !steps[i] || steps[i] > 8) return INVALID_VALUE;
        if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40)) return INVALID_VALUE;
    }
    const unsigned inner = box[0] * bytes_of[type];
    if (inner % 16 || swizzle < 0 || swizzle > 3 || (swizzle && inner > 16u << swizzle)) return INVALID_VALUE;
    struct { uint64_t address, strides[4]; uint32_t dims[5]; uint16_t box[5]; uint8_t rank, bytes, swizzle; } made = {0};  // TensorMap in warps.hpp
    made.address = (uintptr_t)address, made.rank = rank, made.bytes = bytes_of[type], made.swizzle = swizzle;
    for (unsigned i = 0; i < rank; i++) {
        made.dims[i] = (uint32_t)(dims[i] > UINT32_MAX ? UINT32_MAX : dims[i]), made.box[i] = box[i];
        if (steps[i] != 1) return INVALID_VALUE;
        if (i + 1 < rank) made.strides[i] = strides[i];
    }
    memcpy(map, &made, sizeof made);
    return OK;
}
int cudaGetDriverEntryPointByVersion(const char *symbol, void **entry, unsigned version, unsigned long long flags, int *status) {
    (void)version, (void)flags;
    const int known_symbol = !strcmp(symbol, "cuTensorMapEncodeTiled");
    *entry = known_symbol ? (void *)encode_tensor_map : NULL;
    if (status) *status = known_symbol ? 0 : 1;
    if (!known_symbol) fprintf(stderr, "%s of the driver is unknown\n", symbol);
    return OK;
}
int cudaDriverGetVersion(int *version) { *version = 13000; return OK; }
int cudaGetDevice(int *device) { *device = 0; return OK; }
int cudaSetDevice(int device) { return device ? failed(INVALID_VALUE) : OK; }
int cudaGetLastError(void) { const int found = last; last = OK; return found; }
const char *cudaGetErrorName(int code) { return code ? "cudaErrorInvalidValue" : "cudaSuccess"; }
const char *cudaGetErrorString(int code) { return code ? "invalid argument" : "no error"; }
