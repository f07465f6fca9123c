// Attention's products on AVX-512.
//
// K is rearranged into columns and V into pairs of tokens, so that scores and outputs are matrix products that need
// no sums across a vector.

#pragma once

namespace {

constexpr int STRIP = 64;   // columns worked on together
constexpr int QUERIES = 6;  // queries worked on together: with a strip, 24 accumulators

// One thread's memory for attention.
struct Attention {
    bool amx = false;
    AmxAttention tiles;      // on AMX, used instead of the following
    Buffer<int32_t> keys;    // (PART / STRIP, head_dim / 2, STRIP): pairs of values along head_dim
    Buffer<int32_t> values;  // (head_dim / STRIP, rounded up, PART / 2, STRIP): pairs of tokens
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

// V in pairs of tokens: for 32 values of two tokens, the pairs of the first 16 values and those of the last 16.
struct TokenPairs {
    const Keys& keys;
    const __m512i first = interleaved(0), last = interleaved(16);

    __m512i values(int t, int d) const {
        return t < keys.count ? _mm512_loadu_si512(keys.at[t] + keys.to_value + d) : _mm512_setzero_si512();
    }
    Pairs first_of(__m512i a, __m512i b) const { return (Pairs)_mm512_permutex2var_epi16(a, first, b); }
    Pairs last_of(__m512i a, __m512i b) const { return (Pairs)_mm512_permutex2var_epi16(a, last, b); }
};

inline void rearrange_values(const Keys& keys, int head_dim, Attention& mine) {
    const TokenPairs pairs = {keys};
    for (int t = 0; t < whole_strips(keys.count); t += 2)
        for (int d = 0; d < head_dim; d += 32) {
            __m512i a = pairs.values(t, d), b = pairs.values(t + 1, d);
            int32_t* to = &mine.values[((size_t)d / STRIP * (PART / 2) + t / 2) * STRIP + d % STRIP];
            _mm512_storeu_si512(to, (__m512i)pairs.first_of(a, b));
            _mm512_storeu_si512(to + 16, (__m512i)pairs.last_of(a, b));
        }
}

// One pair per column of a strip.
struct Columns {
    Pairs pairs[4];
};

// The k-th pairs of the columns of a rearranged strip.
struct Rearranged {
    const int32_t* strip;
    Columns operator()(int k) const {
        const int32_t* row = strip + k * STRIP;
        return {load_pairs(row), load_pairs(row + 16), load_pairs(row + 32), load_pairs(row + 48)};
    }
};

// The k-th pairs of V's columns from value d on, rearranged on use. With all queries worked on together, that is
// cheaper than storing the rearranged V, which also takes half of the first-level cache.
struct InPlace {
    const TokenPairs& tokens;
    int d;
    Columns operator()(int k) const {
        __m512i a = tokens.values(2 * k, d), b = tokens.values(2 * k + 1, d);
        __m512i c = tokens.values(2 * k, d + 32), e = tokens.values(2 * k + 1, d + 32);
        return {tokens.first_of(a, b), tokens.last_of(a, b), tokens.first_of(c, e), tokens.last_of(c, e)};
    }
};

// out[n][0..STRIP) = the sum over k < count of the pair x[n][k] times the pairs columns(k), for N rows of x. Stores
// the first `width` values.
template <int N, class Source>
inline void outer(const bf16* const* x, Source columns, int count, float* const* out, int width) {
    Floats sums[N][4];
    for (auto& row : sums)
        for (auto& sum : row) sum = every(0.f);
    for (int k = 0; k < count; k++) {
        const Columns column = columns(k);
        for (int n = 0; n < N; n++) {
            Pairs value = every_pair<0>(x[n] + 2 * k);
            for (int j = 0; j < 4; j++) sums[n][j] = add_products(sums[n][j], value, column.pairs[j]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int j = 0; j < width / 16; j++) store(out[n] + 16 * j, sums[n][j]);
}

// Attends with N queries to a part whose K is rearranged, and whose V is too unless IN_PLACE.
template <int N, bool IN_PLACE>
inline void attend_queries(const Query* queries, int padded, int head_dim, const Keys& keys, Attention& mine) {
    int size = result_size(head_dim);
    const bf16 *x[N], *weights[N];
    for (int n = 0; n < N; n++) x[n] = queries[n].q, weights[n] = &mine.weights[n * PART];
    float *to[N], *outs = mine.outs.data();
    for (int t = 0; t < padded; t += STRIP) {
        for (int n = 0; n < N; n++) to[n] = &mine.scores[n * PART + t];
        outer<N>(x, Rearranged{&mine.keys[(size_t)t * (head_dim / 2)]}, head_dim / 2, to, STRIP);
    }
    float factor = 1.44269504f / std::sqrt((float)head_dim);
    for (int n = 0; n < N; n++)
        softmax(&mine.scores[n * PART], queries[n].from, queries[n].count, padded, factor, outs + n * size + head_dim,
                &mine.weights[n * PART]);
    const TokenPairs tokens = {keys};
    for (int d = 0; d < head_dim; d += STRIP) {
        const int width = std::min(STRIP, head_dim - d);
        for (int n = 0; n < N; n++) to[n] = outs + n * size + d;
        if constexpr (IN_PLACE) outer<N>(weights, InPlace{tokens, d}, padded / 2, to, width);
        else outer<N>(weights, Rearranged{&mine.values[(size_t)d * (PART / 2)]}, padded / 2, to, width);
    }
    for (int n = 0; n < N; n++) merge(queries[n].out, outs + n * size, head_dim, keys.first);
}

template <class Ahead>
inline void attend(const Query* queries, int number, const Keys& keys, int head_dim, Attention& mine, Ahead ahead) {
    if (mine.amx) return attend(queries, number, keys, head_dim, mine.tiles, ahead);
    for (; !queries->count; number--) queries++;
    rearrange_keys(keys, head_dim, mine, ahead);
    const bool in_place = number <= QUERIES && head_dim % STRIP == 0;
    if (!in_place) rearrange_values(keys, head_dim, mine);
    for (int n = 0; n < number; n += QUERIES) {
        int most = 0, here = std::min(QUERIES, number - n);
        for (int i = n; i < n + here; i++) most = std::max(most, queries[i].count);
        int padded = whole_strips(most);
        as_constant<QUERIES>(here, [&](auto N) {
            auto run = in_place ? attend_queries<N, true> : attend_queries<N, false>;
            run(queries + n, padded, head_dim, keys, mine);
        });
    }
}

}  // namespace
