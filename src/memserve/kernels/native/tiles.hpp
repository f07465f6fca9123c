// How matrices are stored: in tiles of 1 KB, so that both kernels read them sequentially.
//
// Weights (outputs, K) are strips of 16 outputs. A strip is K / 32 tiles. A tile is 16 pairs of values along k; a
// pair has two values for each of the 16 outputs:
//                                          [outputs / 16][K / 32][pair 16][output 16][2]
//
// A linear's input (rows, K) is blocks of 16 rows. A block is K / 32 tiles of 32 values of each row:
//                                          [rows / 16][K / 32][row 16][32]
//
// AMX multiplies both as they are. In the vector kernels a pair of a weight tile is one vector, against which a pair
// of an input row is broadcast. Outputs and rows are padded to 16; padding affects nothing but padding.

#pragma once

#include "vectors.hpp"

// One matrix of weights, in tiles: bfloat16, or int8 with a float32 scale for each output.
struct Matrix {
    const void* values;
    const float* scales;  // null for bfloat16
};

namespace {

constexpr int TILE = 16;     // outputs of a strip, rows of a block
constexpr int TILE_K = 32;   // values along k of a tile
constexpr int TILE_VALUES = TILE * TILE_K;

inline int whole_tiles(int rows) { return (rows + TILE - 1) / TILE * TILE; }

// One row of a linear's input.
struct InputRow {
    Operand* start;
    InputRow(Operand* inputs, int row, long K)
        : start(inputs + row / TILE * TILE * K + row % TILE * TILE_K) {}
    Operand* at(long k) const { return start + k / TILE_K * TILE_VALUES + k % TILE_K; }
};

// One output's weights as float32, scaled: of an embedding table, one token's row. `to` has room for K values.
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
