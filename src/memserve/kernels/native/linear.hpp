// Linears: out = x w^T, weights and inputs in tiles (tiles.hpp), with one order of summation however many rows x has.
//
// On AMX the instruction defines the order. On vectors an output is one sum that takes the pairs of values along k
// one after another. Neither depends on the other rows, so a row's outputs do not either, bit for bit.

#pragma once

#include <algorithm>

#include "amx.hpp"

namespace {

constexpr int COLUMNS = 2 * TILE;         // outputs of one task of a linear
constexpr int ROWS = std::min(12, SUMS);  // rows of x that vectors work on together
constexpr int WEIGHTS_DEPTH = 512;        // values along k of a task's weights that fit in L1 with the inputs
constexpr int AHEAD = 8192;               // bytes of weights between what is prefetched and what is used

// Multiplies one or two strips of weights, `apart` values from one to the other, by M rows of one block. FETCH, for
// the first pass over the weights: prefetches what comes AHEAD, and at the end of the strips those that follow; the
// hardware's prefetcher stops at every page boundary.
template <int STRIPS, int M, bool FETCH, class Weight>
inline void vector_product(const Weight* w, long apart, long K, const Operand* x, float* out, long stride) {
    Floats sums[STRIPS][M];
    each<STRIPS>([&](auto s) { each<M>([&](auto m) { sums[s][m] = every(0.f); }); });
    const long ahead = AHEAD / sizeof(Weight), skipped = apart == TILE * K ? (STRIPS - 1) * apart : 0;
    for (long tile = 0; tile < TILE * K; tile += TILE_VALUES) {
        const Weight* later = w + tile + ahead + (tile + ahead >= TILE * K ? skipped : 0);
        for (int pair = 0; pair < TILE; pair++) {
            const Weight* from = w + tile + pair * 2 * TILE;
            const Operand* values = x + tile + 2 * pair;
            if (FETCH)
                for (int s = 0; s < STRIPS; s++) prefetch(later + s * apart + pair * 2 * TILE);
            each<PASSES>([&](auto pass) {
                Pairs weights[STRIPS];
                each<STRIPS>([&](auto s) { weights[s] = pairs<pass.value>(from + s * apart); });
                each<M>([&](auto m) {
                    Pairs value = every_pair<pass.value>(values + m * TILE_K);
                    each<STRIPS>([&](auto s) { sums[s][m] = add_products(sums[s][m], weights[s], value); });
                });
            });
        }
    }
    each<M>([&](auto m) { each<STRIPS>([&](auto s) { store(out + m * stride + s * TILE, sums[s][m]); }); });
}

// Calls run(first row, std::integral_constant of rows) for up to 16 rows, in as few parts as possible, of about equal
// sizes. Parts of more than 4 rows have an even number, so that fewer are compiled; a surplus row is padding.
template <class F>
inline void parts_of_block(int rows, F run) {
    int count = (rows + ROWS - 1) / ROWS;
    for (int i = 0, m = 0; i < count; i++) {
        const int here = (rows - m + count - i - 1) / (count - i), twos = (here + 1) / 2;
        if (here <= 4) as_constant<4>(here, [&](auto M) { run(m, M); });
        else as_constant<ROWS / 2>(twos, [&](auto two) { run(m, std::integral_constant<int, 2 * two>()); });
        m += here <= 4 ? here : 2 * twos;
    }
}

// Computes M rows of one block: both strips at a time if there are registers for their sums.
template <int M, bool FETCH, class Weight>
inline void vector_strips(const Weight* w, long apart, long K, const Operand* x, float* out, long stride) {
    constexpr int TOGETHER = 2 * M <= SUMS_OF_TWO ? 2 : 1;
    for (int s = 0; s < 2; s += TOGETHER)
        vector_product<TOGETHER, M, FETCH>(w + s * apart, apart, K, x, out + s * TILE, stride);
}

template <class Weight, class Finish>
inline void vector_rows(const Weight* w, long apart, long K, const Operand* x, int rows, float* out, long stride,
                        Finish finish) {
    for (int block = 0; block < rows; block += TILE)
        parts_of_block(std::min(TILE, rows - block), [&](int m, auto M) {
            auto run = block + m ? vector_strips<M, false, Weight> : vector_strips<M, true, Weight>;
            run(w, apart, K, x + block * K + m * TILE_K, out + (block + m) * stride, stride);
            for (int row = block + m; row < std::min(block + m + M, rows); row++) finish(row);
        });
}

// The work that a pass does between its products: it prefetches a share of the strips that follow, and finishes the
// rows of the previous pass.
template <class Weight, class Finish>
struct Interleaved {
    const Weight* next;  // the strip that follows the first
    long apart;          // from there to the strip that follows the second
    int line, line_end;  // lines to prefetch of each of their tiles
    int row, row_end;    // rows to finish
    int at_once;         // how many of them with each tile of the pass's own weights
    Finish finish;

    // Not inlined: the compiler would have too few registers for tile addresses, and moves by way of vector registers
    // or the stack delay products, by 15 to 17 % with one such move for every four products.
    [[gnu::noinline]] void operator()(long tile) const {
        for (int s = 0; s < 2; s++)
            for (int l = line; l < line_end; l++)
                prefetch((const char*)(next + s * apart + tile * TILE_VALUES) + l * 64);
        const int first = row + (int)tile * at_once, end = std::min(first + at_once, row_end);
        for (int i = first; i < end; i++) finish(i);
    }
};

// Computes whole blocks, including rows of padding. Deep products are split into parts whose weights stay in the
// first-level cache. If weights are used more than once, each pass prefetches a share of the following ones; if only
// once, the hardware's prefetcher does better.
template <class Weight, class Finish>
inline void amx_rows(const Weight* w, long apart, long K, const Operand* x, int rows, float* out, long stride, Finish finish) {
    constexpr int PASS = 2 * TILE;  // rows of a pass
    const int passes = (rows + PASS - 1) / PASS, lines = passes > 1 ? TILE_VALUES * sizeof(Weight) / 64 : 0;
    const long depth = passes > 1 && K > 3 * WEIGHTS_DEPTH / 2 ? WEIGHTS_DEPTH : K;
    const Weight* next = w + (apart == TILE * K ? 2 : 1) * TILE * K;
    for (long start = 0, count; start < K; start += count) {
        count = std::min(depth, K - start);
        const bool last = start + count == K;
        const int at_once = int((PASS * TILE_K + count - 1) / count);
        for (int pass = 0; pass < passes; pass++) {
            const int m = pass * PASS, ready = last && pass ? m - PASS : m;
            Interleaved<Weight, Finish> interleaved = {next + TILE * start, apart, pass * lines / passes,
                                                       (pass + 1) * lines / passes, ready, m, at_once, finish};
            auto run = m + TILE < rows ? amx_product<2, Weight, decltype(interleaved)>
                                       : amx_product<1, Weight, decltype(interleaved)>;
            run(w + TILE * start, apart, K, count, start > 0, x + m * K + TILE * start, out + m * stride, stride, interleaved);
        }
    }
    for (int row = (passes - 1) * PASS; row < rows; row++) finish(row);
}

// One thread's linears.
struct Linear {
    bool amx = false;
    Buffer<bf16> widened;  // (COLUMNS, widest input): int8 weights as bfloat16

    // out[m][0..TILE) = w[first..first + TILE) . x[m], and the next TILE values likewise with w from `second` on.
    // Calls finish(m) for every row, some time after it is complete. `x`: the first row of a block; K: a multiple of
    // 32; `first`, `second`: multiples of 16. Rows of `out` are `stride` values apart. `out` has room for whole tiles
    // of rows, and its padding rows are undefined.
    template <class Finish>
    void strips(const Matrix& w, long first, long second, long K, const Operand* x, int rows, float* out, long stride,
                Finish finish) {
        const long apart = (second - first) * K;
        if (!w.scales) return run((const bf16*)w.values + first * K, apart, K, x, rows, out, stride, finish);
        auto scaled = [&](int m) {
            float* to = out + m * stride;
            store(to, load(to) * load(w.scales + first));
            store(to + TILE, load(to + TILE) * load(w.scales + second));
            finish(m);
        };
        const int8_t* weights = (const int8_t*)w.values + first * K;
        if (rows <= (amx ? 2 * TILE : std::min(TILE, 2 * ROWS)))  // each value is used once or twice: widen it on use
            return run(weights, apart, K, x, rows, out, stride, scaled);
        for (int s = 0; s < 2; s++)
            for (long i = 0; i < TILE * K; i += TILE_K) {
                prefetch(weights + s * apart + i + AHEAD);
                widen(widened.data() + s * TILE * K + i, weights + s * apart + i);
            }
        run((const bf16*)widened.data(), TILE * K, K, x, rows, out, stride, scaled);
    }

    template <class Weight, class Finish>
    void run(const Weight* w, long apart, long K, const Operand* x, int rows, float* out, long stride, Finish finish) {
        if (amx) amx_rows(w, apart, K, x, rows, out, stride, finish);
        else vector_rows(w, apart, K, x, rows, out, stride, finish);
    }
};

}  // namespace
