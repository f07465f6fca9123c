// Matrix products on AMX tiles: one instruction multiplies 16 rows by 16 columns along 32 values of k.
//
// Each element of a product is summed along k in one fixed order, whatever its neighbours and however many rows there
// are. So a row's results do not depend on the rows it is computed with.

#pragma once

#include <asm/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.hpp"

namespace {

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
constexpr bool AMX = true;
#else
constexpr bool AMX = false;
#endif

constexpr long ASK_FOR_STATE = 0x1023, TILE_STATE = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

// Asks the kernel for permission to use the tile registers, for all threads of this process.
inline bool amx_granted() { return AMX && syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_STATE) == 0; }

// All eight tile registers are 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig TILE_CONFIG;

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

// Makes the compiler complete its stores before a tile load: the intrinsics do not declare that they read memory.
inline void stores_done() { asm volatile("" ::: "memory"); }

// Owns a thread's tile registers during a shift. They are released afterwards, so that the kernel need not save them.
struct Tiles {
    bool held;
    explicit Tiles(bool wanted) : held(wanted) {
        if (held) _tile_loadconfig(&TILE_CONFIG);
    }
    ~Tiles() {
        if (held) _tile_release();
    }
};

// The tile of weights `from` as bfloat16: in place, or widened into `to`.
inline const bf16* tile_of(const bf16* from, bf16*) { return from; }
inline const bf16* tile_of(const int8_t* from, bf16* to) {
    for (int i = 0; i < TILE_VALUES; i += TILE_K) widen(to + i, from + i);
    stores_done();
    return to;
}

// Multiplies two strips of weights, `apart` values from one to the other, by one or two blocks of 16 rows, along
// `count` values of k. Adds to `out` if `on_top`, otherwise overwrites it. Inputs are loaded with a streaming hint:
// it is the weights that are needed again, for the next rows. Calls interleaved(tile) with each tile of weights:
// while products are under way, one of the two vector ports is free.
template <int BLOCKS, class Weight, class Interleaved>
inline void amx_product(const Weight* w, long apart, long K, long count, bool on_top, const bf16* x, float* out, long stride,
                        const Interleaved& interleaved) {
    alignas(64) bf16 widened[2][2][TILE_VALUES];  // used in turn, so that no tile waits for the previous one
    const bf16* x2 = x + TILE * K;
    float* out2 = out + TILE * stride;
    stores_done();
    if (on_top) {
        _tile_loadd(0, out, stride * 4);
        _tile_loadd(1, out + TILE, stride * 4);
        if constexpr (BLOCKS > 1) _tile_loadd(2, out2, stride * 4);
        if constexpr (BLOCKS > 1) _tile_loadd(3, out2 + TILE, stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (BLOCKS > 1) _tile_zero(2);
        if constexpr (BLOCKS > 1) _tile_zero(3);
    }
    for (long at = 0; at < TILE * count; at += TILE_VALUES) {
        auto& turn = widened[at / TILE_VALUES % 2];
        _tile_loadd(6, tile_of(w + at, turn[0]), 64);
        _tile_loadd(7, tile_of(w + apart + at, turn[1]), 64);
        _tile_stream_loadd(4, x + at, 64);
        if constexpr (BLOCKS > 1) _tile_stream_loadd(5, x2 + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (BLOCKS > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (BLOCKS > 1) _tile_dpbf16ps(3, 5, 7);
        interleaved(at / TILE_VALUES);
    }
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, out + TILE, stride * 4);
    if constexpr (BLOCKS > 1) _tile_stored(2, out2, stride * 4);
    if constexpr (BLOCKS > 1) _tile_stored(3, out2 + TILE, stride * 4);
}

// out[0..16)[0..16 COLUMNS): the product of 16 rows of `depth` values (a multiple of 32), `x_stride` values apart,
// and columns in tiles. The tiles of 16 columns are contiguous; the next 16 columns start `column` values later.
template <int COLUMNS>
inline void amx_columns(const bf16* x, long x_stride, const bf16* tiles, long column, int depth, float* out, long stride) {
    stores_done();
    _tile_zero(0);
    if constexpr (COLUMNS > 1) _tile_zero(1);
    for (int k = 0; k < depth; k += TILE_K) {
        _tile_loadd(4, x + k, x_stride * 2);
        _tile_loadd(6, tiles + TILE * k, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (COLUMNS > 1) _tile_loadd(7, tiles + column + TILE * k, 64);
        if constexpr (COLUMNS > 1) _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, out, stride * 4);
    if constexpr (COLUMNS > 1) _tile_stored(1, out + TILE, stride * 4);
}

#else  // without AMX in the processor or compiler, amx_granted() returns false and these are never called

struct Tiles {
    explicit Tiles(bool) {}
};
template <int BLOCKS, class Weight, class Interleaved>
inline void amx_product(const Weight*, long, long, long, bool, const Operand*, float*, long, const Interleaved&) {}
template <int COLUMNS>
inline void amx_columns(const Operand*, long, const Operand*, long, int, float*, long) {}

#endif

}  // namespace
