// How matrices lie in memory: in tiles of 1 KB, so that both kernels read them from one end to the other.
//
// Weights (outputs, K) are strips of 16 outputs; a strip is K / 32 tiles; a tile is 16 pairs of values along k, for each
// pair its 16 outputs, two values each:    [outputs / 16][K / 32][pair 16][output 16][2]
//
// A linear's input (rows, K) is blocks of 16 rows; a block is K / 32 tiles of 32 values of each row:
//                                          [rows / 16][K / 32][row 16][32]
//
// Both are what AMX multiplies. Otherwise a pair of a weight tile is one vector, against which a pair of an input row
// is broadcast. Outputs and rows are padded to 16; what padding holds reaches nothing but padding.

#pragma once

#include "vectors.hpp"

// One matrix of weights, in tiles: bfloat16, or int8 with a float32 scale for each output.
struct Matrix {
    const void* values;
    const float* scales;  // null for bfloat16
};

namespace {

constexpr int TILE = 16;     // outputs of a strip, rows of a block
constexpr int TILE_K = 32;   // values along k
constexpr int TILE_VALUES = TILE * TILE_K;

inline int whole_tiles(int rows) { return (rows + TILE - 1) / TILE * TILE; }

// One row of a linear's input.
struct InputRow {
    Operand* start;
    InputRow(Operand* inputs, int row, long K)
        : start(inputs + row / TILE * TILE * K + row % TILE * TILE_K) {}
    Operand* at(long k) const { return start + k / TILE_K * TILE_VALUES + k % TILE_K; }
};

// The weights of one output, as they are used: of an embedding table, one token's row. `to` takes K values.
inline void read_output(const Matrix& w, long output, long K, float* to) {
    long at = output / TILE * TILE * K + output % TILE * 2;
    for (long pair = 0; pair < K / 2; pair++, at += 2 * TILE)
        for (int i = 0; i < 2; i++) {
            if (w.scales) {
                to[2 * pair + i] = ((const int8_t*)w.values)[at + i] * w.scales[output];
            } else {
                uint32_t bits = (uint32_t)((const bf16*)w.values)[at + i] << 16;
                std::memcpy(to + 2 * pair + i, &bits, sizeof bits);
            }
        }
}

}  // namespace
