// Attention of a few queries to one part of a sequence: PART positions, or fewer at its end.
//
// All queries of a kv head go through the same code, be they one decode row's or a chunk's. K is rearranged to columns
// and V to pairs of tokens, so that scores and outputs are matrix products without sums across a vector. Each value is
// one sum in one order (along head_dim, along the tokens), whichever queries are beside it; what is padded adds zeros.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "amx.hpp"

namespace {

constexpr int PART = 256;       // positions of one attention task: a multiple of STRIP
constexpr int STRIP = 64;       // columns that are worked on together
constexpr int QUERIES = 6;      // queries that AVX-512 works on together: with a strip 24 accumulators
constexpr int TOGETHER = 32;    // queries that AMX works on together: two tiles
constexpr int KEYS_AHEAD = 32;  // tokens

// One thread's memory for it.
struct Attention {
    bool amx = false;
    Buffer<int32_t> keys;    // (PART / STRIP, head_dim / 2, STRIP): pairs of values along head_dim
    Buffer<int32_t> values;  // (head_dim up to a multiple of STRIP / STRIP, PART / 2, STRIP): pairs of tokens
    Buffer<float> scores;    // (TOGETHER, PART)
    Buffer<bf16> weights;    // (TOGETHER, PART)
    Buffer<bf16> queries;    // (TOGETHER, head_dim)
    Buffer<float> outs;      // (TOGETHER, head_dim)
    Buffer<float> columns;   // (TILE, TILE)

    void resize(int head_dim) {
        keys.resize((size_t)head_dim / 2 * PART);
        values.resize((size_t)(head_dim + STRIP - 1) / STRIP * STRIP * PART / 2);
        scores.resize(TOGETHER * PART);
        weights.resize(TOGETHER * PART);
        queries.resize((size_t)TOGETHER * head_dim);
        outs.resize((size_t)TOGETHER * head_dim);
        columns.resize(TILE * TILE);
    }
};

// The K of a part's tokens: keys[0..count), then, up to `known`, what comes after them. Each is `to_value` values before
// its V. Tokens may lie anywhere; where `tiles` is set, TILE tokens from every multiple of TILE on are one after another.
struct Keys {
    const bf16* const* at;
    int count, known;
    long to_value;
    bool tiles;
};

// One query's part in a task: to `count` positions. `out`: (2 + head_dim,): maximum, sum of weights, weighted V.
struct Query {
    const bf16* q;
    int count;
    float* out;
};

inline int whole_strips(int count) { return (count + STRIP - 1) / STRIP * STRIP; }

// 16 rows of 16 32-bit values, transposed to rows of a strip. Rows of null are zeros.
inline void transpose(const bf16* const* rows, int d, int32_t* to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = rows[i] ? _mm512_loadu_si512(rows[i] + d) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + i * STRIP, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * STRIP, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 4) * STRIP, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 12) * STRIP, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

// Fetches the V of TILE tokens, which is needed next, and the K of others ahead.
inline void fetch(const Keys& keys, int token, int head_dim) {
    for (int i = token; i < std::min(token + TILE, keys.count); i++)
        for (int d = 0; d < head_dim; d += 32) _mm_prefetch((const char*)(keys.at[i] + keys.to_value + d), _MM_HINT_T1);
    for (int i = token + KEYS_AHEAD; i < std::min(token + KEYS_AHEAD + TILE, keys.known); i++)
        for (int d = 0; d < head_dim; d += 32) _mm_prefetch((const char*)(keys.at[i] + d), _MM_HINT_T1);
}

inline void rearrange_keys(const Keys& keys, int head_dim, Attention& mine) {
    for (int t = 0; t < whole_strips(keys.count); t += TILE) {
        const bf16* rows[TILE];
        for (int i = 0; i < TILE; i++) rows[i] = t + i < keys.count ? keys.at[t + i] : nullptr;
        fetch(keys, t, head_dim);
        int32_t* to = &mine.keys[(size_t)t / STRIP * STRIP * (head_dim / 2) + t % STRIP];
        for (int d = 0; d < head_dim; d += 32) transpose(rows, d, to + d / 2 * STRIP);
    }
}

// Indices for permutex2var that pair value i of one vector with value i of another, from value `start` on.
inline __m512i interleaved(int start) {
    alignas(64) int16_t index[32];
    for (int i = 0; i < 32; i++) index[i] = (int16_t)(start + i / 2 + (i % 2 ? 32 : 0));
    return _mm512_load_si512(index);
}

inline void rearrange_values(const Keys& keys, int head_dim, Attention& mine) {
    const __m512i low = interleaved(0), high = interleaved(16), zero = _mm512_setzero_si512();
    for (int t = 0; t < whole_strips(keys.count); t += 2)
        for (int d = 0; d < head_dim; d += 32) {
            auto value = [&](int t) { return t < keys.count ? _mm512_loadu_si512(keys.at[t] + keys.to_value + d) : zero; };
            __m512i a = value(t), b = value(t + 1);
            int32_t* to = &mine.values[((size_t)d / STRIP * (PART / 2) + t / 2) * STRIP + d % STRIP];
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
        }
}

// out[n][0..STRIP) = sum over k < count of the pair x[n][k] times the pairs of strip row k, for N rows of x. Stores
// `width` of them.
template <int N>
inline void outer(const bf16* const* x, const int32_t* strip, int count, float* const* out, int width) {
    __m512 sums[N][4];
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int k = 0; k < count; k++, strip += STRIP) {
        __m512bh columns[4] = {load(strip), load(strip + 16), load(strip + 32), load(strip + 48)};
        for (int n = 0; n < N; n++) {
            int32_t pair;
            std::memcpy(&pair, x[n] + 2 * k, sizeof pair);
            __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
            for (int j = 0; j < 4; j++) sums[n][j] = _mm512_dpbf16_ps(sums[n][j], value, columns[j]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int j = 0; j < width / 16; j++) _mm512_storeu_ps(out[n] + 16 * j, sums[n][j]);
}

// Scores of `count` positions to bfloat16 weights 2^(factor (score - maximum)), zeros up to `padded`; out[0] becomes
// the maximum times factor, out[1] the sum of weights.
inline void softmax(const float* scores, int count, int padded, float factor, float* out, bf16* weights) {
    const __m512 least = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(factor);
    __m512 most = least, sum = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16)
        most = _mm512_max_ps(most, _mm512_mask_loadu_ps(least, first_lanes(count - i), scores + i));
    out[0] = factor * _mm512_reduce_max_ps(most);
    const __m512 maximum = _mm512_set1_ps(out[0]);
    int i = 0;
    for (; i < count; i += 16) {
        __m512 shifted = _mm512_fmsub_ps(_mm512_loadu_ps(scores + i), scale, maximum);
        __m512 weight = _mm512_maskz_mov_ps(first_lanes(count - i), power_of_two(shifted));
        narrow(weights + i, weight);
        sum = _mm512_add_ps(sum, weight);
    }
    for (; i < padded; i += 16) narrow(weights + i, _mm512_setzero_ps());
    out[1] = _mm512_reduce_add_ps(sum);
}

// N queries against the rearranged part.
template <int N>
inline void attend_queries(const Query* queries, int padded, int head_dim, Attention& mine) {
    const bf16 *x[N], *weights[N];
    for (int n = 0; n < N; n++) x[n] = queries[n].q, weights[n] = &mine.weights[n * PART];
    float* to[N];
    for (int t = 0; t < padded; t += STRIP) {
        for (int n = 0; n < N; n++) to[n] = &mine.scores[n * PART + t];
        outer<N>(x, &mine.keys[(size_t)t * (head_dim / 2)], head_dim / 2, to, STRIP);
    }
    float factor = 1.44269504f / std::sqrt((float)head_dim);
    for (int n = 0; n < N; n++)
        softmax(&mine.scores[n * PART], queries[n].count, padded, factor, queries[n].out, &mine.weights[n * PART]);
    for (int d = 0; d < head_dim; d += STRIP) {
        for (int n = 0; n < N; n++) to[n] = queries[n].out + 2 + d;
        outer<N>(weights, &mine.values[(size_t)d * (PART / 2)], padded / 2, to, std::min(STRIP, head_dim - d));
    }
}

// Weights of up to TOGETHER queries from their scores, then their sums of V.
inline void weigh_tiles(const Query* queries, int number, int padded, int head_dim, Attention& mine) {
    float factor = 1.44269504f / std::sqrt((float)head_dim);
    for (int n = 0; n < number; n++)
        softmax(&mine.scores[n * PART], queries[n].count, padded, factor, queries[n].out, &mine.weights[n * PART]);
    auto run = number > TILE ? amx_pairs<2> : amx_pairs<1>;
    for (int d = 0; d < head_dim; d += 2 * TILE) {
        const int32_t* values = &mine.values[(size_t)d / STRIP * STRIP * (PART / 2) + d % STRIP];
        run(mine.weights.data(), PART, values, STRIP, padded, &mine.outs[d], head_dim);
    }
    for (int n = 0; n < number; n++)
        std::memcpy(queries[n].out + 2, &mine.outs[(size_t)n * head_dim], head_dim * sizeof(float));
}

// Up to TOGETHER queries against the rearranged part, on AMX. Rows of missing queries are left as they are: they reach
// only themselves.
inline void attend_tiles(const Query* queries, int number, int padded, int head_dim, Attention& mine) {
    for (int n = 0; n < number; n++)
        std::memcpy(&mine.queries[(size_t)n * head_dim], queries[n].q, head_dim * sizeof(bf16));
    auto run = number > TILE ? amx_pairs<2> : amx_pairs<1>;
    for (int t = 0; t < padded; t += 2 * TILE) {
        const int32_t* keys = &mine.keys[(size_t)t / STRIP * STRIP * (head_dim / 2) + t % STRIP];
        run(mine.queries.data(), head_dim, keys, STRIP, head_dim, &mine.scores[t], PART);
    }
    weigh_tiles(queries, number, padded, head_dim, mine);
}

// Few queries on AMX, against K where it lies: the queries are what is rearranged. The same products and sums.
inline void attend_in_place(const Query* queries, int number, const Keys& keys, int head_dim, Attention& mine) {
    const bf16* rows[TILE] = {};
    for (int n = 0; n < number; n++) rows[n] = queries[n].q;
    for (int d = 0; d < head_dim; d += 32) transpose(rows, d, &mine.keys[(size_t)d / 2 * STRIP]);
    const __m512i lines = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(TILE));
    for (int t = 0; t < keys.count; t += TILE) {
        fetch(keys, t, head_dim);
        amx_tile(keys.at[t], head_dim, mine.keys.data(), STRIP, mine.columns.data());
        for (int n = 0; n < number; n++)
            _mm512_storeu_ps(&mine.scores[n * PART + t], _mm512_i32gather_ps(lines, &mine.columns[n], 4));
    }
    rearrange_values(keys, head_dim, mine);
    weigh_tiles(queries, number, whole_strips(keys.count), head_dim, mine);
}

// `queries` against a part. No query's count is above the part's; each is at least one.
inline void attend(const Query* queries, int number, const Keys& keys, int head_dim, Attention& mine) {
    if (mine.amx && number <= TILE && keys.tiles) return attend_in_place(queries, number, keys, head_dim, mine);
    rearrange_keys(keys, head_dim, mine);
    rearrange_values(keys, head_dim, mine);
    const int together = mine.amx ? TOGETHER : QUERIES;
    for (int n = 0; n < number; n += together) {
        int most = 0, here = std::min(together, number - n);
        for (int i = n; i < n + here; i++) most = std::max(most, queries[i].count);
        int padded = whole_strips(most);
        if (mine.amx) {
            attend_tiles(queries + n, here, padded, head_dim, mine);
            continue;
        }
        switch (here) {
            case 1: attend_queries<1>(queries + n, padded, head_dim, mine); break;
            case 2: attend_queries<2>(queries + n, padded, head_dim, mine); break;
            case 3: attend_queries<3>(queries + n, padded, head_dim, mine); break;
            case 4: attend_queries<4>(queries + n, padded, head_dim, mine); break;
            case 5: attend_queries<5>(queries + n, padded, head_dim, mine); break;
            default: attend_queries<6>(queries + n, padded, head_dim, mine); break;
        }
    }
}

// Adds a part to what is known of a query so far, both as in Query::out.
inline void merge(float* sums, const float* part, int head_dim) {
    float most = std::max(sums[0], part[0]);
    __m512 keep = power_of_two(_mm512_set1_ps(sums[0] - most)), take = power_of_two(_mm512_set1_ps(part[0] - most));
    sums[0] = most;
    sums[1] = _mm512_cvtss_f32(keep) * sums[1] + _mm512_cvtss_f32(take) * part[1];
    for (int i = 2; i < head_dim + 2; i += 16)
        _mm512_storeu_ps(sums + i, _mm512_fmadd_ps(take, _mm512_loadu_ps(part + i),
                                                   _mm512_mul_ps(keep, _mm512_loadu_ps(sums + i))));
}

}  // namespace
