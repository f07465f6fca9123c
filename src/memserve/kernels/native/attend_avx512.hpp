// Attention's products on AVX-512, and on AMX.
//
// K is rearranged to columns and V to pairs of tokens, so that scores and outputs are matrix products without sums
// across a vector.

#pragma once

namespace {

constexpr int STRIP = 64;     // columns that are worked on together
constexpr int QUERIES = 6;    // queries that vectors work on together: with a strip 24 accumulators
constexpr int TOGETHER = 32;  // queries that AMX works on together: two tiles

// One thread's memory for attention.
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
    Floats sums[N][4];
    for (auto& row : sums)
        for (auto& sum : row) sum = every(0.f);
    for (int k = 0; k < count; k++, strip += STRIP) {
        Pairs columns[4] = {load_pairs(strip), load_pairs(strip + 16), load_pairs(strip + 32), load_pairs(strip + 48)};
        for (int n = 0; n < N; n++) {
            Pairs value = every_pair<0>(x[n] + 2 * k);
            for (int j = 0; j < 4; j++) sums[n][j] = add_products(sums[n][j], value, columns[j]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int j = 0; j < width / 16; j++) store(out[n] + 16 * j, sums[n][j]);
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

}  // namespace
