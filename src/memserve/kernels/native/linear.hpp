// Linears: out = x w^T, weights and inputs in tiles (tiles.hpp), with one order of summation however many rows x has.
//
// On AMX the order is the instruction's. On vectors an output is one sum that takes the pairs of values along k one after
// another. Neither depends on the rows beside a row, so its outputs do not either, bit for bit.

#pragma once

#include <algorithm>

#include "amx.hpp"

namespace {

constexpr int COLUMNS = 2 * TILE;        // outputs of one task of a linear
constexpr int ROWS = std::min(8, SUMS);  // rows of x that vectors work on together
constexpr int WEIGHTS_DEPTH = 512;       // values along k of a task's weights that the first level holds beside the inputs
constexpr int AHEAD = 8192;              // bytes of weights between what is prefetched and what is used

// STRIPS strips of weights times M rows of one block. The first pass over weights fetches what comes AHEAD: the
// hardware's prefetcher stops at every page.
template <int STRIPS, int M, bool FETCH, class Weight>
inline void vector_product(const Weight* w, long K, const Operand* x, float* out, long stride) {
    Floats sums[STRIPS][M];
    for (auto& strip : sums)
        for (auto& sum : strip) sum = every(0.f);
    for (long tile = 0; tile < TILE * K; tile += TILE_VALUES)
        for (int pair = 0; pair < TILE; pair++) {
            const Weight* from = w + tile + pair * 2 * TILE;
            const Operand* values = x + tile + 2 * pair;
            if (FETCH)
                for (int s = 0; s < STRIPS; s++) prefetch((const char*)(from + s * TILE * K) + AHEAD);
            each_pass([&](auto pass) {
                Pairs weights[STRIPS];
                for (int s = 0; s < STRIPS; s++) weights[s] = pairs<pass.value>(from + s * TILE * K);
                for (int m = 0; m < M; m++) {
                    Pairs value = every_pair<pass.value>(values + m * TILE_K);
                    for (int s = 0; s < STRIPS; s++) sums[s][m] = add_products(sums[s][m], weights[s], value);
                }
            });
        }
    for (int m = 0; m < M; m++)
        for (int s = 0; s < STRIPS; s++) store(out + m * stride + s * TILE, sums[s][m]);
}

// Calls run(first row, std::integral_constant of rows) for up to 16 rows, in as few parts as there can be, of equal
// sizes.
template <class F>
inline void parts_of_block(int rows, F run) {
    int count = (rows + ROWS - 1) / ROWS;
    for (int i = 0, m = 0; i < count; i++) {
        int here = (rows - m + count - i - 1) / (count - i);
        switch (std::min(here, ROWS)) {
            case 1: run(m, std::integral_constant<int, 1>()); break;
            case 2: run(m, std::integral_constant<int, 2>()); break;
            case 3: run(m, std::integral_constant<int, 3>()); break;
            case 4: run(m, std::integral_constant<int, 4>()); break;
            case 5: run(m, std::integral_constant<int, 5>()); break;
            case 6: run(m, std::integral_constant<int, 6>()); break;
            case 7: run(m, std::integral_constant<int, std::min(7, ROWS)>()); break;
            default: run(m, std::integral_constant<int, ROWS>());
        }
        m += here;
    }
}

// M rows of one block: all strips at a time where there are registers for their sums.
template <int STRIPS, int M, bool FETCH, class Weight>
inline void vector_strips(const Weight* w, long K, const Operand* x, float* out, long stride) {
    constexpr int TOGETHER = STRIPS * M <= SUMS ? STRIPS : 1;
    for (int s = 0; s < STRIPS; s += TOGETHER)
        vector_product<TOGETHER, M, FETCH>(w + s * TILE * K, K, x, out + s * TILE, stride);
}

template <int STRIPS, class Weight>
inline void vector_rows(const Weight* w, long K, const Operand* x, int rows, float* out, long stride) {
    for (int block = 0; block < rows; block += TILE)
        parts_of_block(std::min(TILE, rows - block), [&](int m, auto M) {
            auto run = block + m == 0 ? vector_strips<STRIPS, M.value, true, Weight>
                                      : vector_strips<STRIPS, M.value, false, Weight>;
            run(w, K, x + block * K + m * TILE_K, out + (block + m) * stride, stride);
        });
}

// Computes whole blocks: rows of padding too. Deep products go in parts whose weights stay in the first level. Where weights are used more than once, each pass fetches a share of those
// of the next task; where once, the hardware's prefetcher is the better one.
template <int STRIPS, class Weight>
inline void amx_rows(const Weight* w, long K, const Operand* x, int rows, float* out, long stride) {
    int passes = (rows + 2 * TILE - 1) / (2 * TILE), lines = passes > 1 ? STRIPS * TILE_VALUES * sizeof(Weight) / 64 : 0;
    long depth = passes > 1 && K > 3 * WEIGHTS_DEPTH / 2 ? WEIGHTS_DEPTH : K;
    for (long start = 0; start < K; start += depth)
        for (int pass = 0; pass < passes; pass++) {
            int m = pass * 2 * TILE;
            auto run = m + TILE < rows ? amx_product<STRIPS, 2, Weight> : amx_product<STRIPS, 1, Weight>;
            run(w, K, start, std::min(start + depth, K), x + m * K, out + m * stride, stride, pass * lines / passes,
                (pass + 1) * lines / passes);
        }
}

// A thread's linears.
struct Linear {
    bool amx = false;
    Buffer<bf16> widened;  // (COLUMNS, widest input): int8 weights as bfloat16

    // out[m][0..count) = w[first..first + count) . x[m]. `x`: the first row of a block; K: a multiple of 32; `first`: of
    // 16. A row of `out` is `stride` values long; `out` has room for whole tiles of rows and of outputs, and what is
    // beyond the real ones is undefined.
    void operator()(const Matrix& w, long first, int count, long K, const Operand* x, int rows, float* out, long stride) {
        for (int n = 0; n < count; n += COLUMNS) {
            if (count - n > TILE) strips<2>(w, first + n, K, x, rows, out + n, stride);
            else strips<1>(w, first + n, K, x, rows, out + n, stride);
        }
    }

    template <int STRIPS>
    void strips(const Matrix& w, long first, long K, const Operand* x, int rows, float* out, long stride) {
        if (!w.scales) return run<STRIPS>((const bf16*)w.values + first * K, K, x, rows, out, stride);
        const int8_t* weights = (const int8_t*)w.values + first * K;
        if (rows <= 2 * (amx ? TILE : ROWS)) {  // each value is used once or twice: it is widened on its way
            run<STRIPS>(weights, K, x, rows, out, stride);
        } else {
            for (long i = 0; i < STRIPS * TILE * K; i += TILE_K) {
                prefetch(weights + i + AHEAD);
                widen(widened.data() + i, weights + i);
            }
            run<STRIPS>((const bf16*)widened.data(), K, x, rows, out, stride);
        }
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < STRIPS * TILE; n += TILE) {
                float* to = out + m * stride + n;
                store(to, load(to) * load(w.scales + first + n));
            }
    }

    template <int STRIPS, class Weight>
    void run(const Weight* w, long K, const Operand* x, int rows, float* out, long stride) {
        if (amx) amx_rows<STRIPS>(w, K, x, rows, out, stride);
        else vector_rows<STRIPS>(w, K, x, rows, out, stride);
    }
};

}  // namespace
