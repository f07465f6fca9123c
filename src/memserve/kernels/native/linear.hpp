// Linears: out = x w^T, weights and inputs in tiles (tiles.hpp), with one order of summation however many rows x has.
//
// On AMX the order is the instruction's. On AVX-512 an output is one accumulator that takes the pairs of values along k
// one after another. Neither depends on the rows beside a row, so its outputs do not either, bit for bit.

#pragma once

#include <algorithm>
#include <type_traits>

#include "amx.hpp"

namespace {

constexpr int COLUMNS = 2 * TILE;  // outputs of one task of a linear
constexpr int ROWS = 8;            // rows of x that AVX-512 works on together: with two strips 16 accumulators
constexpr int AHEAD = 8192;        // bytes of weights between what is prefetched and what is used

// A pair of each output of a tile.
inline __m512bh pair_of(const bf16* from) { return load(from); }
inline __m512bh pair_of(const int8_t* from) { return widen_int8(from); }

// STRIPS strips of weights times M rows of one block. The first pass over weights fetches what comes AHEAD: the
// hardware's prefetcher stops at every page.
template <int STRIPS, int M, bool FETCH, class Weight>
inline void avx_product(const Weight* w, long K, const bf16* x, float* out, long stride) {
    __m512 sums[STRIPS][M];
    for (auto& strip : sums)
        for (auto& sum : strip) sum = _mm512_setzero_ps();
    for (long tile = 0; tile < TILE * K; tile += TILE_VALUES)
        for (int pair = 0; pair < TILE; pair++) {
            __m512bh weights[STRIPS];
            for (int s = 0; s < STRIPS; s++) {
                const Weight* from = w + s * TILE * K + tile + pair * 2 * TILE;
                weights[s] = pair_of(from);
                if (FETCH) _mm_prefetch((const char*)from + AHEAD, _MM_HINT_T1);
            }
            for (int m = 0; m < M; m++) {
                int32_t values;
                std::memcpy(&values, x + tile + m * TILE_K + 2 * pair, sizeof values);
                __m512bh value = (__m512bh)_mm512_set1_epi32(values);
                for (int s = 0; s < STRIPS; s++) sums[s][m] = _mm512_dpbf16_ps(sums[s][m], weights[s], value);
            }
        }
    for (int m = 0; m < M; m++)
        for (int s = 0; s < STRIPS; s++) _mm512_storeu_ps(out + m * stride + s * TILE, sums[s][m]);
}

// Calls run(first row, std::integral_constant of rows) for up to 16 rows, in as few parts as there can be, of equal
// sizes.
template <class F>
inline void parts_of_block(int rows, F run) {
    int count = (rows + ROWS - 1) / ROWS;
    for (int i = 0, m = 0; i < count; i++) {
        int here = (rows - m + count - i - 1) / (count - i);
        switch (here) {
            case 1: run(m, std::integral_constant<int, 1>()); break;
            case 2: run(m, std::integral_constant<int, 2>()); break;
            case 3: run(m, std::integral_constant<int, 3>()); break;
            case 4: run(m, std::integral_constant<int, 4>()); break;
            case 5: run(m, std::integral_constant<int, 5>()); break;
            case 6: run(m, std::integral_constant<int, 6>()); break;
            case 7: run(m, std::integral_constant<int, 7>()); break;
            default: run(m, std::integral_constant<int, 8>());
        }
        m += here;
    }
}

template <int STRIPS, class Weight>
inline void avx_rows(const Weight* w, long K, const bf16* x, int rows, float* out, long stride) {
    for (int block = 0; block < rows; block += TILE)
        parts_of_block(std::min(TILE, rows - block), [&](int m, auto M) {
            auto run = block + m == 0 ? avx_product<STRIPS, M.value, true, Weight>
                                      : avx_product<STRIPS, M.value, false, Weight>;
            run(w, K, x + block * K + m * TILE_K, out + (block + m) * stride, stride);
        });
}

// Computes whole blocks: rows of padding too. Where weights are used more than once, each pass fetches a share of those
// of the next task; where once, the hardware's prefetcher is the better one.
template <int STRIPS, class Weight>
inline void amx_rows(const Weight* w, long K, const bf16* x, int rows, float* out, long stride) {
    int passes = (rows + 2 * TILE - 1) / (2 * TILE), lines = passes > 1 ? STRIPS * TILE_VALUES * sizeof(Weight) / 64 : 0;
    for (int pass = 0; pass < passes; pass++) {
        int m = pass * 2 * TILE;
        auto run = m + TILE < rows ? amx_product<STRIPS, 2, Weight> : amx_product<STRIPS, 1, Weight>;
        run(w, K, x + m * K, out + m * stride, stride, pass * lines / passes, (pass + 1) * lines / passes);
    }
}

// A thread's linears.
struct Linear {
    bool amx = false;
    Buffer<bf16> widened;  // (COLUMNS, widest input): int8 weights as bfloat16

    // out[m][0..count) = w[first..first + count) . x[m]. `x`: the first row of a block; K: a multiple of 32; `first`: of
    // 16. A row of `out` is `stride` values long; `out` has room for whole tiles of rows and of outputs, and what is
    // beyond the real ones is undefined.
    void operator()(const Matrix& w, long first, int count, long K, const bf16* x, int rows, float* out, long stride) {
        for (int n = 0; n < count; n += COLUMNS) {
            if (count - n > TILE) strips<2>(w, first + n, K, x, rows, out + n, stride);
            else strips<1>(w, first + n, K, x, rows, out + n, stride);
        }
    }

    template <int STRIPS>
    void strips(const Matrix& w, long first, long K, const bf16* x, int rows, float* out, long stride) {
        if (!w.scales) return run<STRIPS>((const bf16*)w.values + first * K, K, x, rows, out, stride);
        const int8_t* weights = (const int8_t*)w.values + first * K;
        if (rows <= (amx ? 2 * TILE : ROWS)) {  // each value is used once: it is widened on its way
            run<STRIPS>(weights, K, x, rows, out, stride);
        } else {
            for (long i = 0; i < STRIPS * TILE * K; i += TILE_K) {
                _mm_prefetch((const char*)weights + i + AHEAD, _MM_HINT_T1);
                _mm512_storeu_si512(widened.data() + i, (__m512i)widen_int8(weights + i));
            }
            run<STRIPS>((const bf16*)widened.data(), K, x, rows, out, stride);
        }
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < STRIPS * TILE; n += TILE) {
                float* to = out + m * stride + n;
                _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_loadu_ps(w.scales + first + n)));
            }
    }

    template <int STRIPS, class Weight>
    void run(const Weight* w, long K, const bf16* x, int rows, float* out, long stride) {
        if (amx) amx_rows<STRIPS>(w, K, x, rows, out, stride);
        else avx_rows<STRIPS>(w, K, x, rows, out, stride);
    }
};

}  // namespace
