// Attention's products on AMX.
//
// A chunk's queries are processed in units of 16. Scores, weights and outputs have one column per query, so that a
// single value of a query is a lane of a vector. K is copied into tiles of 16 tokens. V is transposed into tiles of
// 32 tokens, in which tokens i and i + 16 form a pair, as they do in the weights. The sum of weights is a product
// with ones, of exactly the weights that V is multiplied with.
//
// First the weights of all units are made, then all are multiplied with V. So K (or V) and what a unit makes of it
// stay in the first-level cache, which could not hold everything together.
//
// Few queries are processed the other way round, with one row per query, against K in place. Products, sums and
// weights are the same, bit for bit.

#pragma once

namespace {

constexpr int GROUP = TILE_K;  // tokens of a tile of V
constexpr bf16 ONE = 0x3F80;

inline int whole_groups(int count) { return (count + GROUP - 1) / GROUP * GROUP; }

// One thread's memory for attention.
struct AmxAttention {
    // For a task's queries, by unit:
    Buffer<bf16> queries;    // (units, head_dim / 32) tiles: pairs of values
    Buffer<bf16> weights;    // (units, PART / GROUP) tiles: pairs of tokens
    Buffer<float> results;   // (units, head_dim + 2, TILE) over the parts so far: sums of V, then TOTAL and MOST
    Buffer<int32_t> froms, counts;  // (units, TILE) for the current part
    Buffer<float> most;      // (units, TILE) for the current part
    // For one part or one unit:
    Buffer<bf16> keys;    // (PART / TILE, head_dim / 32) tiles
    Buffer<bf16> values;  // (head_dim / TILE + 1, PART / GROUP) tiles, the last row of which is ones
    Buffer<float> scores;  // (PART, TILE), or for few queries (TILE, PART)
    Buffer<float> outs;    // (head_dim + TILE, TILE), or for few queries (TILE, result_size)

    void resize(int head_dim, int most_queries) {
        size_t columns = whole_tiles(most_queries);
        queries.resize(columns * head_dim);
        weights.resize(columns * PART);
        results.resize(columns * (head_dim + 2));
        froms.resize(columns), counts.resize(columns);
        most.resize(columns);
        keys.resize((size_t)head_dim * PART);
        values.assign((size_t)(head_dim + TILE) * PART, ONE);
        scores.resize(TILE * PART);
        outs.resize((size_t)TILE * result_size(head_dim));
    }
};

inline float scale_of(int head_dim) { return 1.44269504f / std::sqrt((float)head_dim); }

// The two weights of a pair of tokens, cut to bfloat16, not rounded: the sum of weights is that of the cut ones.
inline __m512i pair_of(Floats a, Floats b) {
    return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(_mm512_castps_si512(a.v), 16), _mm512_castps_si512(b.v));
}

// ---- units -----------------------------------------------------------------------------------------------------

inline void rearrange_queries(const Query* queries, int number, int head_dim, AmxAttention& mine) {
    for (int n = 0; n < number; n += TILE) {
        const bf16* rows[TILE] = {};
        for (int i = 0; i < std::min(TILE, number - n); i++) rows[i] = queries[n + i].q;
        for (int d = 0; d < head_dim; d += TILE_K)
            transpose(rows, d, (int32_t*)&mine.queries[(size_t)n * head_dim + d * TILE], TILE);
    }
}

inline void copy_keys(const Keys& keys, int head_dim, AmxAttention& mine) {
    for (int t = 0; t < whole_groups(keys.count); t++) {
        bf16* to = &mine.keys[(size_t)t / TILE * TILE * head_dim + t % TILE * TILE_K];
        for (int d = 0; d < head_dim; d += TILE_K)
            _mm512_store_si512(to + d * TILE,
                               t < keys.count ? _mm512_loadu_si512(keys.at[t] + d) : _mm512_setzero_si512());
    }
}

inline void transpose_values(const Keys& keys, int head_dim, AmxAttention& mine) {
    auto value = [&](int t, int d) {
        return t < keys.count ? _mm512_loadu_si512(keys.at[t] + keys.to_value + d) : _mm512_setzero_si512();
    };
    for (int t = 0; t < whole_groups(keys.count); t += GROUP)
        for (int d = 0; d < head_dim; d += 32)
            for (int half = 0; half < 2; half++) {  // halves of every 8 values
                __m512i rows[TILE];
                for (int i = 0; i < TILE; i++) {
                    __m512i a = value(t + i, d), b = value(t + i + TILE, d);
                    rows[i] = half ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
                }
                transpose(rows);
                for (int i = 0; i < TILE; i++) {
                    int at = d + i / 4 * 8 + half * 4 + i % 4;
                    _mm512_store_si512(&mine.values[(size_t)at / TILE * TILE * PART + t * TILE + at % TILE * TILE_K], rows[i]);
                }
            }
}

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

// out[0..tokens)[0..TILE): the product of tiles of tokens and one tile of queries, along head_dim. Two tiles of
// tokens at a time, in two pairs of registers in turn, so that no product waits for the previous pair's store.
inline void amx_scores(const bf16* keys, const bf16* queries, int tokens, int head_dim, float* out) {
    const int one = TILE * head_dim;  // values of a tile of tokens
    stores_done();
    for (int t = 0; t < tokens; t += 4 * TILE, keys += 4 * one, out += 4 * TILE * TILE) {
        _tile_zero(0);
        _tile_zero(1);
        for (int d = 0; d < one; d += TILE_VALUES) {
            _tile_loadd(4, queries + d, 64);
            _tile_loadd(6, keys + d, 64);
            _tile_dpbf16ps(0, 6, 4);
            _tile_loadd(7, keys + one + d, 64);
            _tile_dpbf16ps(1, 7, 4);
        }
        _tile_stored(0, out, 64);
        _tile_stored(1, out + TILE * TILE, 64);
        if (t + 2 * TILE >= tokens) break;
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < one; d += TILE_VALUES) {
            _tile_loadd(5, queries + d, 64);
            _tile_loadd(6, keys + 2 * one + d, 64);
            _tile_dpbf16ps(2, 6, 5);
            _tile_loadd(7, keys + 3 * one + d, 64);
            _tile_dpbf16ps(3, 7, 5);
        }
        _tile_stored(2, out + 2 * TILE * TILE, 64);
        _tile_stored(3, out + 3 * TILE * TILE, 64);
    }
}

// out[0..TILE N)[0..TILE): the product of N tiles of values, up to 5, and one tile of weights, along `tokens` tokens.
template <int N>
inline void amx_values(const bf16* values, const bf16* weights, int tokens, float* out) {
    stores_done();
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
    if constexpr (N > 4) _tile_zero(4);
    for (int t = 0; t < TILE * tokens; t += TILE_VALUES) {
        _tile_loadd(7, weights + t, 64);
        _tile_loadd(5, values + t, 64);
        _tile_dpbf16ps(0, 5, 7);
        if constexpr (N > 1) _tile_loadd(6, values + TILE * PART + t, 64);
        if constexpr (N > 1) _tile_dpbf16ps(1, 6, 7);
        if constexpr (N > 2) _tile_loadd(5, values + 2 * TILE * PART + t, 64);
        if constexpr (N > 2) _tile_dpbf16ps(2, 5, 7);
        if constexpr (N > 3) _tile_loadd(6, values + 3 * TILE * PART + t, 64);
        if constexpr (N > 3) _tile_dpbf16ps(3, 6, 7);
        if constexpr (N > 4) _tile_loadd(5, values + 4 * TILE * PART + t, 64);
        if constexpr (N > 4) _tile_dpbf16ps(4, 5, 7);
    }
    _tile_stored(0, out, 64);
    if constexpr (N > 1) _tile_stored(1, out + TILE * TILE, 64);
    if constexpr (N > 2) _tile_stored(2, out + 2 * TILE * TILE, 64);
    if constexpr (N > 3) _tile_stored(3, out + 3 * TILE * TILE, 64);
    if constexpr (N > 4) _tile_stored(4, out + 4 * TILE * TILE, 64);
}

#else

inline void amx_scores(const bf16*, const bf16*, int, int, float*) {}
template <int N>
inline void amx_values(const bf16*, const bf16*, int, float*) {}

#endif

// What the queries of a unit attend to of a part: all of it, the positions before their counts, or those from a window's
// begin on.
enum class Reach { ALL, COUNTS, WINDOWS };

// Turns scores into weights, like softmax(), with one query per lane.
template <Reach REACH>
inline void weigh_unit(const float* scores, const int32_t* froms, const int32_t* counts, int tokens, float factor,
                       float* most, bf16* weights) {
    const __m512i from = _mm512_loadu_si512(froms), count = _mm512_loadu_si512(counts);
    const Floats scale = every(factor), none = every(-INFINITY);
    // `value` for the queries that attend to token t, `other` for the rest.
    auto own = [&](int t, Floats value, Floats other) {
        if (REACH == Reach::ALL) return value;
        const __m512i at = _mm512_set1_epi32(t);
        __mmask16 mine = _mm512_cmpgt_epi32_mask(count, at);
        if (REACH == Reach::WINDOWS) mine = _mm512_mask_cmple_epi32_mask(mine, from, at);
        return Floats{_mm512_mask_mov_ps(other.v, mine, value.v)};
    };
    Floats largest[4] = {none, none, none, none};
    for (int t = 0; t < tokens; t += 4)
        for (int i = 0; i < 4; i++)
            largest[i] = larger(largest[i], own(t + i, load(scores + (t + i) * TILE), none));
    Floats maximum = scale * larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
    if (REACH == Reach::WINDOWS) maximum = larger(maximum, every(UNSEEN));
    store(most, maximum);
    auto weight = [&](int t) {
        return own(t, weight_of(fms(load(scores + t * TILE), scale, maximum)), every(0.f));
    };
    for (int group = 0; group < tokens; group += GROUP)
        for (int t = group; t < group + TILE; t++, weights += 2 * TILE)
            _mm512_store_si512(weights, pair_of(weight(t), weight(t + TILE)));
}

// Makes a unit's weights for a part, with zeros up to `tokens`. Lanes without a query hold anything; nothing uses
// them.
inline void weigh_unit(int unit, int tokens, int head_dim, AmxAttention& mine) {
    const bf16 *keys = mine.keys.data(), *queries = &mine.queries[(size_t)unit * TILE * head_dim];
    float *scores = mine.scores.data(), *most = &mine.most[unit * TILE];
    const int32_t *froms = &mine.froms[unit * TILE], *counts = &mine.counts[unit * TILE];
    bf16* weights = &mine.weights[(size_t)unit * TILE * PART];
    amx_scores(keys, queries, tokens, head_dim, scores);
    bool all = *std::min_element(counts, counts + TILE) >= tokens, begins = *std::max_element(froms, froms + TILE) > 0;
    auto weigh = begins ? weigh_unit<Reach::WINDOWS> : all ? weigh_unit<Reach::ALL> : weigh_unit<Reach::COUNTS>;
    weigh(scores, froms, counts, tokens, scale_of(head_dim), most, weights);
}

// Adds a part's results to a unit's results so far, like merge().
inline void merge_unit(int unit, int head_dim, bool first, AmxAttention& mine) {
    float *sums = &mine.results[(size_t)unit * TILE * (head_dim + 2)], *most = sums + (head_dim + 1) * TILE;
    const float* part = mine.outs.data();
    Floats before = load(most), here = load(&mine.most[unit * TILE]), both = larger(before, here);
    if (first) {
        std::memcpy(sums, part, (head_dim + 1) * TILE * sizeof(float));
        return store(most, here);
    }
    Floats keep = power_of_two(before - both), take = power_of_two(here - both);
    for (int i = 0; i < (head_dim + 1) * TILE; i += TILE)
        store(sums + i, fma(take, load(part + i), keep * load(sums + i)));
    store(most, both);
}

// Makes a unit's sums of V.
inline void sum_values(int unit, int tokens, int head_dim, AmxAttention& mine) {
    const bf16 *values = mine.values.data(), *weights = &mine.weights[(size_t)unit * TILE * PART];
    float* outs = mine.outs.data();
    int left = head_dim / TILE + 1;
    for (; left > 5; left -= 4, values += 4 * TILE * PART, outs += 4 * TILE * TILE)
        amx_values<4>(values, weights, tokens, outs);
    auto run = left > 3 ? amx_values<5> : amx_values<3>;
    run(values, weights, tokens, outs);
}

// Writes the results of all units to their queries.
inline void hand_out(const Query* queries, int number, int head_dim, AmxAttention& mine) {
    for (int n = 0; n < number; n += TILE) {
        const float* results = &mine.results[(size_t)n * (head_dim + 2)];
        int here = std::min(TILE, number - n);
        for (int d = 0; d < head_dim; d += TILE) {
            __m512i rows[TILE];
            for (int i = 0; i < TILE; i++) rows[i] = _mm512_loadu_si512(results + (d + i) * TILE);
            transpose(rows);
            for (int i = 0; i < here; i++)
                if (queries[n + i].out) _mm512_storeu_si512(queries[n + i].out + d, rows[i]);
        }
        for (int i = 0; i < here; i++)
            if (float* out = queries[n + i].out) {
                out[head_dim + TOTAL] = results[head_dim * TILE + i];
                out[head_dim + MOST] = results[(head_dim + 1) * TILE + i];
            }
    }
}

template <class Ahead>
inline void attend_units(const Query* queries, int number, const Keys& keys, int head_dim, AmxAttention& mine,
                         Ahead ahead) {
    if (keys.first) rearrange_queries(queries, number, head_dim, mine);
    copy_keys(keys, head_dim, mine);
    transpose_values(keys, head_dim, mine);
    for (int n = 0; n < whole_tiles(number); n++) {
        mine.froms[n] = n < number ? queries[n].from : 0;
        mine.counts[n] = n < number ? queries[n].count : 0;
    }
    auto tokens = [&](int unit) {
        return whole_groups(queries[std::min((unit + 1) * TILE, number) - 1].count);  // the last query's is largest
    };
    int units = (number + TILE - 1) / TILE;
    for (int unit = 0; unit < units; unit++) {
        ahead(unit, units);
        if (tokens(unit)) weigh_unit(unit, tokens(unit), head_dim, mine);
    }
    for (int unit = 0; unit < units; unit++)
        if (tokens(unit)) {
            sum_values(unit, tokens(unit), head_dim, mine);
            merge_unit(unit, head_dim, keys.first, mine);
        }
    if (keys.last) hand_out(queries, number, head_dim, mine);
}

// ---- few queries -----------------------------------------------------------------------------------------------

// Indices for permutex2var that pair value i of one vector with value i of another, from value `start` on.
inline __m512i interleaved(int start) {
    alignas(64) int16_t index[32];
    for (int i = 0; i < 32; i++) index[i] = (int16_t)(start + i / 2 + (i % 2 ? 32 : 0));
    return _mm512_load_si512(index);
}

// Arranges V in tiles of pairs of tokens, of 16 values each.
inline void pair_values(const Keys& keys, int head_dim, AmxAttention& mine) {
    const __m512i low = interleaved(0), high = interleaved(16), zero = _mm512_setzero_si512();
    for (int pair = 0; pair < whole_groups(keys.count) / 2; pair++)
        for (int d = 0; d < head_dim; d += 32) {
            auto value = [&](int t) { return t < keys.count ? _mm512_loadu_si512(keys.at[t] + keys.to_value + d) : zero; };
            int t = pair / TILE * GROUP + pair % TILE;
            __m512i a = value(t), b = value(t + TILE);
            bf16* to = &mine.values[(size_t)d * PART + pair * 2 * TILE];
            _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(to + TILE * PART, _mm512_permutex2var_epi16(a, high, b));
        }
}

// Turns one query's scores into weights, like softmax(); returns the maximum times factor.
inline float weigh(float* scores, int from, int count, float factor, bf16* weights) {
    if (from >= count) {
        std::fill(weights, weights + whole_groups(count), (bf16)0);
        return UNSEEN;
    }
    std::fill(scores, scores + from, -INFINITY);
    Floats most = every(-INFINITY);
    for (int t = 0; t < count; t += TILE) most = larger(most, load_first(scores + t, count - t, -INFINITY));
    const Floats scale = every(factor), maximum = every(factor * largest(most));
    auto weight = [&](int t) {
        Floats weight = keep_first(weight_of(fms(load(scores + t), scale, maximum)), std::max(count - t, 0));
        return from_on(weight, t, from);
    };
    for (int t = 0; t < count; t += GROUP) _mm512_store_si512(weights + t, pair_of(weight(t), weight(t + TILE)));
    return first(maximum);
}

template <class Ahead>
inline void attend_in_place(const Query* queries, int number, const Keys& keys, int head_dim, AmxAttention& mine,
                            Ahead ahead) {
    alignas(64) float columns[TILE * TILE];
    rearrange_queries(queries, number, head_dim, mine);
    const __m512i lines = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(TILE));
    for (int t = 0; t < keys.count; t += TILE) {
        ahead(t / TILE, (keys.count + TILE - 1) / TILE);
        amx_columns<1>(keys.at[t], head_dim, mine.queries.data(), 0, head_dim, columns, TILE);
        for (int n = 0; n < number; n++)
            _mm512_storeu_ps(&mine.scores[n * PART + t], _mm512_i32gather_ps(lines, columns + n, 4));
    }
    pair_values(keys, head_dim, mine);
    int tokens = whole_groups(keys.count), size = result_size(head_dim);
    for (int n = 0; n < number; n++) {
        bf16* weights = &mine.weights[n * PART];
        mine.most[n] = weigh(&mine.scores[n * PART], queries[n].from, queries[n].count, scale_of(head_dim), weights);
        std::fill(weights + whole_groups(queries[n].count), weights + tokens, (bf16)0);
    }
    const bf16 *weights = mine.weights.data(), *values = mine.values.data();
    for (int d = 0; d < head_dim; d += 2 * TILE, values += 2 * TILE * PART)
        amx_columns<2>(weights, PART, values, TILE * PART, tokens, &mine.outs[d], size);
    amx_columns<1>(weights, PART, values, 0, tokens, &mine.outs[head_dim], size);
    for (int n = 0; n < number; n++) {
        mine.outs[n * size + head_dim + MOST] = mine.most[n];
        merge(queries[n].out, &mine.outs[n * size], head_dim, keys.first);
    }
}

template <class Ahead>
inline void attend(const Query* queries, int number, const Keys& keys, int head_dim, AmxAttention& mine, Ahead ahead) {
    if (number > TILE || !keys.tiles) return attend_units(queries, number, keys, head_dim, mine, ahead);
    for (; !queries->count; number--) queries++;
    attend_in_place(queries, number, keys, head_dim, mine, ahead);
}

}  // namespace
