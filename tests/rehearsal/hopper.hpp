// What Hopper added: barriers in shared memory (mbarrier), the copy engine (TMA), matrix products of four warps (wgmma).
#pragma once

#include "warps.hpp"

// An mbarrier, 64 bits in shared memory: arrivals that a phase needs, those still missing, bytes still to come, the phase.
struct Phases { u16 needed, missing; s32 bytes : 31; u32 phase : 1; };
static_assert(sizeof(Phases) == 8);
template <class Change> inline void change_phases(u64 address, Change change) {
    char *at = in_shared(address, 8);
    Phases found = load<Phases>(at);
    change(found);
    if (!found.missing && !found.bytes) found.phase ^= 1, found.missing = found.needed;
    store(at, found);
    block.progress++;
}
inline void phases_begin(u64 address, u32 needed) { store(in_shared(address, 8), Phases{u16(needed), u16(needed), 0, 0}); }
inline void phases_arrive(u64 address) {
    change_phases(address, [](Phases &found) { if (!found.missing--) fail("more arrive at an mbarrier than it expects"); });
}
inline void phases_expect(u64 address, u32 bytes) {
    change_phases(address, [&](Phases &found) { found.bytes += s32(bytes), found.missing--; });
}
inline bool phases_passed(u64 address, u32 parity) {
    if (load<Phases>(in_shared(address, 8)).phase != (parity & 1)) return true;
    others_first();
    return false;
}

// The result of cuTensorMapEncodeTiled; cudart.c writes it.
struct TensorMap { u64 address, strides[4]; u32 dims[5]; u16 box[5]; u8 rank, bytes, swizzle; };
static_assert(sizeof(TensorMap) <= 128);

// Swizzling: rows of 16 bytes are rearranged by their address. `bits` (1, 2 or 3) is how many bits of it are used.
inline u64 swizzled(u64 address, u32 bits) { return address ^ (address >> 7 & ((1u << bits) - 1)) << 4; }

inline void copy_box(u64 to, u64 map_at, const s32 *from, u64 phases) {
    const TensorMap map = load<TensorMap>(in_global(map_at, 64));
    u32 at[5] = {}, copied = 0;
    u64 many = 1;
    for (u32 i = 0; i < map.rank; i++) many *= map.box[i];
    for (u64 i = 0; i < many; i++, copied += map.bytes) {
        u64 address = map.address;
        bool inside = true;
        for (u32 d = 0; d < map.rank; d++) {
            const s64 index = s64(from[d]) + at[d];
            inside &= index >= 0 && index < map.dims[d];
            address += u64(index) * (d ? map.strides[d - 1] : map.bytes);
        }
        char *target = shared_memory + swizzled(to + copied, map.swizzle);
        in_shared(to + copied, map.bytes);
        if (inside) std::memcpy(target, in_global(address, map.bytes), map.bytes); else std::memset(target, 0, map.bytes);
        for (u32 d = 0; d < map.rank && ++at[d] == map.box[d]; d++) at[d] = 0;
    }
    change_phases(phases, [&](Phases &found) { found.bytes -= s32(copied); });
}

// A matrix in shared memory, as its descriptor says. Gives the address of value (row, k); a row is along M or N.
// Follows CUTLASS, mma_traits_sm90_gmma.hpp.
struct Described {
    u32 start, leading, stride, swizzle;
    explicit Described(u64 bits) : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
        const u32 kind = bits >> 62;
        swizzle = kind ? 4 - kind : 0;  // kinds 1, 2, 3 swizzle 128, 64, 32 bytes
        if (bits >> 49 & 7) fail("a matrix that does not begin where its swizzle does");
    }
    u32 by_k(u32 row, u32 k) const {
        if (!swizzle) return start + row / 8 * stride + row % 8 * 16 + k / 8 * leading + k % 8 * 2;
        return start + row / 8 * stride + row % 8 * (16 << swizzle) + k * 2;
    }
    u32 by_row(u32 row, u32 k) const {
        const u32 wide = 8 << swizzle;
        if (!swizzle) return start + row / 8 * stride + row % 8 * 2 + k / 8 * leading + k % 8 * 16;
        return start + row / wide * leading + row % wide * 2 + k / 8 * stride + k % 8 * 2 * wide;
    }
    f32 at(bool transposed, u32 row, u32 k) const {
        return from_bf16(load<u16>(in_shared(swizzled(transposed ? by_row(row, k) : by_k(row, k), swizzle), 2)));
    }
};

// wgmma: d = a * b + d; d is 64xN of float, a 64x16 and b 16xN of bfloat16. It is computed as soon as it is issued.
template <u32 N> struct WideProduct { f32 *d[N / 2]; bool a_in_registers; u32 a[4]; u64 a_at, b_at; bool add; s32 sign_a, sign_b; bool a_transposed, b_transposed; };
template <u32 N> void wide_product_all(WideProduct<N> **of) {
    const auto &first = *of[0];
    static f32 a[64][16], b[16][N], sums[64][N];
    const Described b_matrix(first.b_at);
    for (u32 n = 0; n < N; n++)
        for (u32 k = 0; k < 16; k++) b[k][n] = first.sign_b * b_matrix.at(first.b_transposed, n, k);
    if (first.a_in_registers)
        for (u32 thread = 0; thread < 128; thread++) spread_a(a + thread / 32 * 16, of[thread]->a, thread % 32);
    else {
        const Described a_matrix(first.a_at);
        for (u32 m = 0; m < 64; m++)
            for (u32 k = 0; k < 16; k++) a[m][k] = a_matrix.at(first.a_transposed, m, k);
    }
    for (u32 m = 0; m < 64; m++) {
        for (u32 n = 0; n < N; n++) sums[m][n] = 0;
        for (u32 k = 0; k < 16; k++)
            for (u32 n = 0; n < N; n++) sums[m][n] += first.sign_a * a[m][k] * b[k][n];
    }
    for (u32 thread = 0; thread < 128; thread++) {
        auto &mine = *of[thread];
        const u32 row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
        for (u32 i = 0; i < N / 2; i++) {
            const f32 sum = sums[row + i % 4 / 2 * 8][i / 4 * 8 + column + i % 2];
            *mine.d[i] = mine.add ? *mine.d[i] + sum : sum;
        }
    }
}
template <u32 N> void wide_product(Thread &t, WideProduct<N> &mine) {
    if (t.warpgroup->size != 128) fail("a product of four warps in a block that has fewer");
    meet(*t.warpgroup, t.index % 128, mine, wide_product_all<N>);
}
