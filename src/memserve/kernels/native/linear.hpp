// Linears: out = x w^T for row-major bfloat16 weights, with one order of summation however many rows x has.
//
// An output has four partial sums. Partial sum p takes the pairs of values 2 p, 2 p + 1 of every eight along k, in
// order, in one accumulator; the four are then added as (0 + 2) + (1 + 3). Both ways below keep to that, so a row's
// outputs do not depend on the rows beside it, bit for bit:
//
// * few rows: the weights are read in place, once, and rearranged in registers: memory bandwidth is the limit;
// * many rows: 16 outputs' weights are rearranged once into a buffer that stays in the caches, for all rows.
//
// A vector of rearranged weights, "quad": eight values along k of four outputs, 128 bits each. The same eight values of
// x are broadcast against it. Of 16 accumulated values four belong to one output, so that few shuffles end the sum.

#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.hpp"

namespace {

constexpr int COLUMNS = 32;   // outputs of one task of a linear
constexpr int TILE = 6;       // rows of x that are worked on together: with 16 outputs 24 accumulators
constexpr int PACK_MIN = 16;  // rows from which weights are worth packing
constexpr int AHEAD = 12288;  // bytes of weights between what is prefetched and what is used

// Four rows of w, 32 values each, to four quads.
inline void quads(const bf16* w, long K, __m512bh* to) {
    __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + K);
    __m512i c = _mm512_loadu_si512(w + 2 * K), d = _mm512_loadu_si512(w + 3 * K);
    __m512i ab = _mm512_shuffle_i32x4(a, b, 0x44), cd = _mm512_shuffle_i32x4(c, d, 0x44);
    to[0] = (__m512bh)_mm512_shuffle_i32x4(ab, cd, 0x88);
    to[1] = (__m512bh)_mm512_shuffle_i32x4(ab, cd, 0xdd);
    ab = _mm512_shuffle_i32x4(a, b, 0xee), cd = _mm512_shuffle_i32x4(c, d, 0xee);
    to[2] = (__m512bh)_mm512_shuffle_i32x4(ab, cd, 0x88);
    to[3] = (__m512bh)_mm512_shuffle_i32x4(ab, cd, 0xdd);
}

inline __m512bh eight(const bf16* x) { return (__m512bh)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)x)); }

// Ends the sums of four quads: their 16 outputs in order.
inline __m512 finish(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512 mixed = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));  // outputs 0 4 8 12, 1 5 9 13, ...
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(order, mixed);
}

// What lies AHEAD bytes further is prefetched on the way through weights, which doubles the rate: several rows at once
// are no stream to the hardware's prefetcher, and it stops at every page. Into the second level, because more lines can
// be under way to it (Zen 4; distances of 8 to 64 KB differ little).
inline void prefetch(const bf16* w, long bytes, int lines) {
    for (int i = 0; i < lines; i++) _mm_prefetch((const char*)w + AHEAD + bytes + i * 64, _MM_HINT_T1);
}

// out[m][0..4 Q) for M rows of x and 4 Q rows of w, in place.
template <int Q, int M, bool FETCH>
inline void in_place(const bf16* w, long K, const bf16* x, float* out, long stride) {
    __m512 sums[Q][M];
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    for (long k = 0; k < K; k += 32) {
        __m512bh weights[Q][4];
        for (int q = 0; q < Q; q++) quads(w + 4 * q * K + k, K, weights[q]);
        if (FETCH) prefetch(w, k * 8 * Q, 4 * Q);
        for (int s = 0; s < 4; s++)
            for (int m = 0; m < M; m++) {
                __m512bh value = eight(x + m * K + k + 8 * s);
                for (int q = 0; q < Q; q++) sums[q][m] = _mm512_dpbf16_ps(sums[q][m], weights[q][s], value);
            }
    }
    const __m512 none = _mm512_setzero_ps();
    for (int m = 0; m < M; m++) {
        __m512 done = finish(sums[0][m], Q > 1 ? sums[Q - 1][m] : none, none, none);
        _mm512_mask_storeu_ps(out + m * stride, first_lanes(4 * Q), done);
    }
}

// out[m][0..16) for M rows of x and packed weights.
template <int M>
inline void packed(const bf16* w, long K, const bf16* x, float* out, long stride, __mmask16 real) {
    __m512 sums[4][M];
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    for (long k = 0; k < K; k += 8, w += 4 * 32) {
        __m512bh weights[4] = {load(w), load(w + 32), load(w + 64), load(w + 96)};
        for (int m = 0; m < M; m++) {
            __m512bh value = eight(x + m * K + k);
            for (int q = 0; q < 4; q++) sums[q][m] = _mm512_dpbf16_ps(sums[q][m], weights[q], value);
        }
    }
    for (int m = 0; m < M; m++)
        _mm512_mask_storeu_ps(out + m * stride, real, finish(sums[0][m], sums[1][m], sums[2][m], sums[3][m]));
}

// `groups` (up to 4) times four rows of w to (K / 8, 4 groups, 32 values); the last one stands in for what is missing.
inline void pack(const bf16* w, int groups, long K, bf16* to) {
    for (int g = 0; g < 4; g++) {
        const bf16* from = w + 4 * std::min(g, groups - 1) * K;
        for (long k = 0; k < K; k += 32) {
            __m512bh four[4];
            quads(from + k, K, four);
            prefetch(from, k * 8, 4);
            for (int s = 0; s < 4; s++) _mm512_storeu_si512(to + ((k / 8 + s) * 4 + g) * 32, (__m512i)four[s]);
        }
    }
}

// Calls run(first row, std::integral_constant of rows) for all rows, in as few tiles as there can be, of equal sizes.
template <class F>
inline void tiles(int rows, F run) {
    int count = (rows + TILE - 1) / TILE;
    for (int i = 0, m = 0; i < count; i++) {
        int here = (rows - m + count - i - 1) / (count - i);
        switch (here) {
            case 1: run(m, std::integral_constant<int, 1>()); break;
            case 2: run(m, std::integral_constant<int, 2>()); break;
            case 3: run(m, std::integral_constant<int, 3>()); break;
            case 4: run(m, std::integral_constant<int, 4>()); break;
            case 5: run(m, std::integral_constant<int, 5>()); break;
            default: run(m, std::integral_constant<int, 6>());
        }
        m += here;
    }
}

template <int Q>
inline void few_rows(const bf16* w, long K, const bf16* x, int rows, float* out, long stride) {
    tiles(rows, [&](int m, auto M) {
        auto run = m == 0 ? in_place<Q, M.value, true> : in_place<Q, M.value, false>;
        run(w, K, x + m * K, out + m * stride, stride);
    });
}

// out[m][0..count) = w . x[m] for `count` rows of w (a multiple of 4) and `rows` rows of x, K values each (a multiple
// of 32). `buffer`: of 16 K values. A row of `out` is `stride` values long.
inline void linear(const bf16* w, int count, long K, const bf16* x, int rows, float* out, long stride, bf16* buffer) {
    if (rows < PACK_MIN) {
        int n = 0;
        for (; n + 8 <= count; n += 8) few_rows<2>(w + n * K, K, x, rows, out + n, stride);
        for (; n < count; n += 4) few_rows<1>(w + n * K, K, x, rows, out + n, stride);
        return;
    }
    for (int n = 0; n < count; n += 16) {
        pack(w + n * K, std::min(4, (count - n) / 4), K, buffer);
        tiles(rows, [&](int m, auto M) {
            packed<M.value>(buffer, K, x + m * K, out + m * stride + n, stride, first_lanes(count - n));
        });
    }
}

}  // namespace
