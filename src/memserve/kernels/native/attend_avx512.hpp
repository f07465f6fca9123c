// Attention's products on AVX-512.
//
// K is rearranged to columns and V to pairs of tokens, so that scores and outputs are matrix products without sums
// across a vector.

#pragma once

namespace {

constexpr int STRIP = 64;   // columns that are worked on together
constexpr int QUERIES = 6;  // queries that are worked on together: with a strip 24 accumulators

// One thread's memory for attention.
struct Attention {
    bool amx = false;
    AmxAttention tiles;      // instead of the following
    Buffer<int32_t> keys;    // (PART / STRIP, head_dim / 2, STRIP): pairs of values along head_dim
    Buffer<int32_t> values;  // (head_dim up to a multiple of STRIP / STRIP, PART / 2, STRIP): pairs of tokens
    Buffer<float> scores;    // (QUERIES, PART)
    Buffer<bf16> weights;    // (QUERIES, PART)
    Buffer<float> outs;      // (QUERIES, result_size)

    void resize(int head_dim, int most_queries) {
        if (amx) return tiles.resize(head_dim, most_queries);
        keys.resize((size_t)head_dim / 2 * PART);
        values.resize((size_t)(head_dim + STRIP - 1) / STRIP * STRIP * PART / 2);
        scores.resize(QUERIES * PART);
        weights.resize(QUERIES * PART);
        outs.resize((size_t)QUERIES * result_size(head_dim));
    }
};

inline int whole_strips(int count) { return (count + STRIP - 1) / STRIP * STRIP; }

template <class Ahead>
inline void rearrange_keys(const Keys& keys, int head_dim, Attention& mine, Ahead ahead) {
    for (int t = 0; t < whole_strips(keys.count); t += TILE) {
        const bf16* rows[TILE];
        for (int i = 0; i < TILE; i++) rows[i] = t + i < keys.count ? keys.at[t + i] : nullptr;
        ahead(t / TILE, whole_strips(keys.count) / TILE);
        int32_t* to = &mine.keys[(size_t)t / STRIP * STRIP * (head_dim / 2) + t % STRIP];
        for (int d = 0; d < head_dim; d += 32) transpose(rows, d, to + d / 2 * STRIP, STRIP);
    }
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
inline void attend_queries(const Query* queries, int padded, int head_dim, bool first, Attention& mine) {
    int size = result_size(head_dim);
    const bf16 *x[N], *weights[N];
    for (int n = 0; n < N; n++) x[n] = queries[n].q, weights[n] = &mine.weights[n * PART];
    float *to[N], *outs = mine.outs.data();
    for (int t = 0; t < padded; t += STRIP) {
        for (int n = 0; n < N; n++) to[n] = &mine.scores[n * PART + t];
        outer<N>(x, &mine.keys[(size_t)t * (head_dim / 2)], head_dim / 2, to, STRIP);
    }
    float factor = 1.44269504f / std::sqrt((float)head_dim);
    for (int n = 0; n < N; n++)
        softmax(&mine.scores[n * PART], queries[n].count, padded, factor, outs + n * size + head_dim, &mine.weights[n * PART]);
    for (int d = 0; d < head_dim; d += STRIP) {
        for (int n = 0; n < N; n++) to[n] = outs + n * size + d;
        outer<N>(weights, &mine.values[(size_t)d * (PART / 2)], padded / 2, to, std::min(STRIP, head_dim - d));
    }
    for (int n = 0; n < N; n++) merge(queries[n].out, outs + n * size, head_dim, first);
}

template <class Ahead>
inline void attend(const Query* queries, int number, const Keys& keys, int head_dim, Attention& mine, Ahead ahead) {
    if (mine.amx) return attend(queries, number, keys, head_dim, mine.tiles, ahead);
    for (; !queries->count; number--) queries++;
    rearrange_keys(keys, head_dim, mine, ahead);
    rearrange_values(keys, head_dim, mine);
    for (int n = 0; n < number; n += QUERIES) {
        int most = 0, here = std::min(QUERIES, number - n);
        for (int i = n; i < n + here; i++) most = std::max(most, queries[i].count);
        int padded = whole_strips(most);
        as_constant<QUERIES>(here, [&](auto N) { attend_queries<N>(queries + n, padded, head_dim, keys.first, mine); });
    }
}

}  // namespace
