// Runs a kernel's threads on the CPU, each as a fiber. A fiber runs until its thread must wait for others: for its warp
// at an instruction of all lanes, for its block at a barrier. Blocks run one after another. ptx.py translates a kernel
// from PTX to C++ that includes this file. Instructions do what the PTX ISA says.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>
#include <immintrin.h>
#include <sys/mman.h>

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;
using f16 = _Float16; using f32 = float; using f64 = double;

struct Dim { u32 x, y, z; };

// ---- threads -------------------------------------------------------------------------------------------------

constexpr u32 SHARED_ROOM = 227 << 10, SHARED_FIRST = 1 << 10;  // the system reserves the bytes before SHARED_FIRST
constexpr size_t STACK = 256 << 10;

struct Thread;

// Where the threads of one warp, or of four, wait for one another; the last to arrive does the work for all.
struct Meeting {
    void *of[128];
    u32 size = 0, arrived = 0;
    u64 times = 0;
    const void *what = nullptr;
};
struct Barrier { u32 arrived = 0; u64 times = 0; };

struct Thread {
    void *stack_pointer;
    char *stack;
    Dim tid;
    u32 index, lane;
    Meeting *warp, *warpgroup;
    bool ended;
};

struct Block {
    Dim grid, dim, at;
    u32 threads, alive, now;
    u64 progress, seen;
    u32 idle;
    const char *params;
    void (*body)(Thread &);
    std::vector<Thread> thread;
    std::vector<Meeting> warps, warpgroups;
    Barrier barriers[16];
    void *outside;
    const char *failure;
    bool (*holds)(const void *, size_t);
};

inline Block block;
alignas(1024) inline char shared_memory[256 << 10];

extern "C" void switch_fiber(void **from, void *to);
asm(R"(
    .text
    .type switch_fiber, @function
switch_fiber:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .size switch_fiber, .-switch_fiber
)");

[[noreturn]] inline void fail(const char *why) {
    block.failure = why;
    void *nowhere;
    switch_fiber(&nowhere, block.outside);
    std::abort();
}

// Switch to the block's next thread. Fails if all threads wait for one another.
inline void others_first() {
    if (block.progress != block.seen) block.seen = block.progress, block.idle = 0;
    else if (++block.idle > 2 * block.threads) fail("all threads wait for one another");
    Thread &mine = block.thread[block.now];
    do block.now = block.now + 1 == block.threads ? 0 : block.now + 1;
    while (block.thread[block.now].ended);
    Thread &next = block.thread[block.now];
    if (&next != &mine) switch_fiber(&mine.stack_pointer, next.stack_pointer);
}

inline void thread_begins() {
    Thread &mine = block.thread[block.now];
    block.body(mine);
    mine.ended = true;
    block.progress++;
    if (--block.alive) others_first();
    void *nowhere;
    switch_fiber(&nowhere, block.outside);
}

// Each thread of `meeting` calls this with a value of its own; the last to arrive calls `together` on all values.
template <class T>
void meet(Meeting &meeting, u32 place, T &mine, void (*together)(T **)) {
    if (meeting.arrived && meeting.what != reinterpret_cast<const void *>(together)) fail("lanes of a warp meet at different instructions");
    meeting.what = reinterpret_cast<const void *>(together);
    meeting.of[place] = &mine;
    const u64 times = meeting.times;
    if (++meeting.arrived == meeting.size) {
        together(reinterpret_cast<T **>(meeting.of));
        meeting.arrived = 0, meeting.times++, block.progress++;
        return;
    }
    while (meeting.times == times) others_first();
}

// Called before a store to global memory, so that a warp's lanes advance together: all have done their earlier reads
// before one of them writes. FlashInfer's rotation in place depends on that.
inline void in_step() {
    block.progress++;
    others_first();
}

// bar.sync: wait for all threads that have not ended, or for `many` of them.
inline void barrier(u32 which, u32 many = 0) {
    Barrier &at = block.barriers[which];
    const u64 times = at.times;
    at.arrived++;
    while (at.times == times) {
        if (at.arrived >= (many ? many : block.alive)) at.arrived = 0, at.times++, block.progress++;
        else others_first();
    }
}
inline void barrier_arrive(u32 which, u32 many) {
    Barrier &at = block.barriers[which];
    if (++at.arrived >= many) at.arrived = 0, at.times++, block.progress++;
}

inline const char *run_kernel(void (*body)(Thread &), Dim grid, Dim dim, const char *params, bool (*holds)(const void *, size_t)) {
    static std::vector<char *> stacks;
    Block &b = block;
    b.grid = grid, b.dim = dim, b.threads = dim.x * dim.y * dim.z, b.body = body, b.params = params, b.holds = holds, b.failure = nullptr;
    while (stacks.size() < b.threads) {
        void *made = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (made == MAP_FAILED) return "no memory for another thread";
        stacks.push_back(static_cast<char *>(made));
    }
    const u32 warps = (b.threads + 31) / 32, as_before = _mm_getcsr();
    for (u64 i = 0; i < u64(grid.x) * grid.y * grid.z && !b.failure; i++) {
        b.at = {u32(i % grid.x), u32(i / grid.x % grid.y), u32(i / grid.x / grid.y)};
        b.thread.assign(b.threads, {});
        b.warps.assign(warps, {}), b.warpgroups.assign((warps + 3) / 4, {});
        for (auto &one : b.barriers) one = {};
        std::memset(shared_memory, 0xff, sizeof shared_memory);  // all NaN, to find reads of what was never written
        for (u32 t = 0; t < b.threads; t++) {
            Thread &thread = b.thread[t];
            thread = {nullptr, stacks[t], {t % dim.x, t / dim.x % dim.y, t / dim.x / dim.y}, t, t % 32, &b.warps[t / 32], &b.warpgroups[t / 128], false};
            thread.warp->size++, thread.warpgroup->size++;
// The stack of a fiber that was switched away from: six registers and a return address, placed as after a call.
            auto *top = reinterpret_cast<void **>(thread.stack + STACK - 64);
            *--top = nullptr;
            *--top = reinterpret_cast<void *>(thread_begins);
            top -= 6;
            thread.stack_pointer = top;
        }
        b.alive = b.threads, b.now = 0, b.progress = 1, b.seen = 0, b.idle = 0;
        _mm_setcsr(as_before | 0x8040);  // .ftz: denormal numbers are zero
        switch_fiber(&b.outside, b.thread[0].stack_pointer);
        _mm_setcsr(as_before);
    }
    return b.failure;
}

// ---- values ----------------------------------------------------------------------------------------------------

// A register's value as an instruction of another type reads it.
template <class T, class S> inline T as(S value) {
    if constexpr (std::is_same_v<T, S>) return value;
    else if constexpr (std::is_same_v<T, bool> || std::is_same_v<S, bool>) return static_cast<T>(value);
    else if constexpr (sizeof(T) == sizeof(S)) return std::bit_cast<T>(value);
    else if constexpr (sizeof(S) == 4 && !std::is_integral_v<S>) return as<T>(std::bit_cast<u32>(value));
    else if constexpr (sizeof(S) == 8 && !std::is_integral_v<S>) return as<T>(std::bit_cast<u64>(value));
    else if constexpr (sizeof(T) == 2 && !std::is_integral_v<T>) return std::bit_cast<T>(static_cast<u16>(value));
    else if constexpr (!std::is_integral_v<T>) return as<T>(static_cast<std::conditional_t<sizeof(T) == 4, u32, u64>>(value));
    else return static_cast<T>(value);
}
// Write a value to a register. If the register is wider, the value is extended as its type requires.
template <class D, class S> inline void put(D &to, S value) { to = as<D>(value); }

inline f32 from_bf16(u16 bits) { return std::bit_cast<f32>(u32(bits) << 16); }
inline u16 to_bf16(f32 value) {
    const u32 bits = std::bit_cast<u32>(value);
    if (value != value) return 0x7fff;
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <class T> inline T shift_left(T value, u32 by) { return by >= sizeof(T) * 8 ? T(0) : T(value << by); }
template <class T> inline T shift_right(T value, u32 by) {
    const u32 most = sizeof(T) * 8 - 1;
    return by > most ? (std::is_signed_v<T> ? T(value >> most) : T(0)) : T(value >> by);
}
template <class T> inline T least(T a, T b) { return a != a ? b : b != b ? a : a < b ? a : b; }
template <class T> inline T most(T a, T b) { return a != a ? b : b != b ? a : a > b ? a : b; }
inline u32 insert_bits(u32 a, u32 b, u32 at, u32 many) {
    at &= 255, many &= 255;
    const u32 mask = at > 31 ? 0 : shift_left(many > 31 ? ~0u : (1u << many) - 1, at);
    return (b & ~mask) | (shift_left(a, at) & mask);
}

// ---- memory ------------------------------------------------------------------------------------------------------

inline char *in_shared(u64 address, u32 bytes) {
    if (address < SHARED_FIRST || address + bytes > SHARED_FIRST + SHARED_ROOM || address % (bytes > 16 ? 16 : bytes)) fail("an address of shared memory is out of bounds or not aligned");
    return shared_memory + address;
}
// The host's pointer for a global or generic address. It may also lie in shared memory or in the kernel's parameters,
// because these are addressed by the host's addresses too.
inline char *in_global(u64 address, u32 bytes) {
    auto *found = reinterpret_cast<char *>(address);
    if (address % bytes) fail("an address of global memory is not aligned");
    const bool own = found >= shared_memory && found + bytes <= shared_memory + sizeof shared_memory;
    const bool given = found >= block.params && found + bytes <= block.params + 4096;
    if (!own && !given && block.holds && !block.holds(found, bytes)) fail("an address of global memory lies in no tensor");
    return found;
}
template <class T> inline T load(const char *from) { T value; std::memcpy(&value, from, sizeof value); return value; }
template <class T> inline void store(char *to, T value) { std::memcpy(to, &value, sizeof value); }

// cp.async, done at once: `bytes` of the `size` bytes are copied, and the rest is set to zero.
inline void copy_async(u64 to, u64 from, u32 size, u32 bytes) {
    char *at = in_shared(to, size);
    std::memset(at, 0, size);
    if (bytes) std::memcpy(at, in_global(from, size), bytes);
}

// ---- instructions of a warp ----------------------------------------------------------------------------------------

struct Shuffle { u32 value, by, clamp; char mode; u32 found; bool inside; u32 lanes; };
inline void shuffle_all(Shuffle **of) {
    Shuffle made[32];
    const u32 lanes = of[0]->lanes;
    for (u32 lane = 0; lane < lanes; lane++) {
        made[lane] = *of[lane];
        const u32 segment = made[lane].clamp >> 8 & 31, clamp = made[lane].clamp & 31, by = made[lane].by & 31;
        const u32 last = (lane & segment) | (clamp & ~segment), first = lane & segment;
        s32 from = lane;
        switch (made[lane].mode) {
        case 'u': from = s32(lane) - s32(by), made[lane].inside = from >= s32(last); break;
        case 'd': from = lane + by, made[lane].inside = from <= s32(last); break;
        case 'b': from = lane ^ by, made[lane].inside = from <= s32(last); break;
        default: from = first | (by & ~segment), made[lane].inside = from <= s32(last);
        }
        if (made[lane].inside && u32(from) >= lanes) fail("a shuffle from a lane that is not there");
        made[lane].found = of[made[lane].inside ? from : lane]->value;
    }
    for (u32 lane = 0; lane < lanes; lane++) *of[lane] = made[lane];
}
inline Shuffle shuffle(Thread &t, char mode, u32 value, u32 by, u32 clamp, u32 members) {
    if (members != ~0u) fail("a shuffle of a part of a warp");
    Shuffle mine{value, by, clamp, mode, 0, false, t.warp->size};
    meet(*t.warp, t.lane, mine, shuffle_all);
    return mine;
}

// ldmatrix and stmatrix: rows of eight 16-bit values. Lane i gives the address of row i, and holds two values per matrix.
struct Matrices { u32 address, many; bool transposed, stored; u32 part[4]; };
inline void matrices_all(Matrices **of) {
    const Matrices &first = *of[0];
    for (u32 m = 0; m < first.many; m++)
        for (u32 lane = 0; lane < 32; lane++) {
            u16 values[2];
            std::memcpy(values, &of[lane]->part[m], 4);
            for (u32 i = 0; i < 2; i++) {
                const u32 a = lane / 4, b = lane % 4 * 2 + i, row = first.transposed ? b : a, column = first.transposed ? a : b;
                char *at = in_shared(of[8 * m + row]->address, 16) + 2 * column;
                if (first.stored) store(at, values[i]); else values[i] = load<u16>(at);
            }
            std::memcpy(&of[lane]->part[m], values, 4);
        }
}
inline void whole_warp(const Thread &t) { if (t.warp->size != 32) fail("an instruction of a warp in a warp of fewer lanes"); }
inline void matrices(Thread &t, Matrices &mine) { whole_warp(t), meet(*t.warp, t.lane, mine, matrices_all); }

// mma: d = a * b + c; d and c are 16x8 of float, a is 16x16 and b 16x8 of bfloat16.
struct Product { f32 d[4]; u32 a[4], b[2]; f32 c[4]; };
inline void pair(f32 *to, u32 bits) { to[0] = from_bf16(u16(bits)), to[1] = from_bf16(u16(bits >> 16)); }
inline void spread_a(f32 (*a)[16], const u32 *part, u32 lane) {
    const u32 row = lane / 4, at = lane % 4 * 2;
    pair(&a[row][at], part[0]), pair(&a[row + 8][at], part[1]), pair(&a[row][at + 8], part[2]), pair(&a[row + 8][at + 8], part[3]);
}
inline void product_all(Product **of) {
    f32 a[16][16], b[8][16], sums[16][8];
    for (u32 lane = 0; lane < 32; lane++) {
        spread_a(a, of[lane]->a, lane);
        pair(&b[lane / 4][lane % 4 * 2], of[lane]->b[0]), pair(&b[lane / 4][lane % 4 * 2 + 8], of[lane]->b[1]);
    }
    for (u32 row = 0; row < 16; row++)
        for (u32 column = 0; column < 8; column++) {
            f32 sum = 0;
            for (u32 k = 0; k < 16; k++) sum += a[row][k] * b[column][k];
            sums[row][column] = sum;
        }
    for (u32 lane = 0; lane < 32; lane++)
        for (u32 i = 0; i < 4; i++) of[lane]->d[i] = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] + of[lane]->c[i];
}
inline void product(Thread &t, Product &mine) { whole_warp(t), meet(*t.warp, t.lane, mine, product_all); }
