// Attention of a few queries to one part of a sequence: PART positions, or fewer at its end.
//
// All queries of a kv head go through the same code, be they one decode row's or a chunk's. Each value is one sum in one
// order (along head_dim, along the tokens), whichever queries are beside it; what is padded adds zeros. The products are
// in attend_avx512.hpp and attend_avx2.hpp, as each set of instructions is best fed.

#pragma once

#include <algorithm>

#include "amx.hpp"

namespace {

constexpr int PART = 256;       // positions of one attention task
constexpr int KEYS_AHEAD = 32;  // tokens

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
    const Operand* q;
    int count;
    float* out;
};

// Fetches the V of TILE tokens, which is needed next, and the K of others ahead.
inline void fetch(const Keys& keys, int token, int head_dim) {
    for (int i = token; i < std::min(token + TILE, keys.count); i++)
        for (int d = 0; d < head_dim; d += 32) _mm_prefetch((const char*)(keys.at[i] + keys.to_value + d), _MM_HINT_T1);
    for (int i = token + KEYS_AHEAD; i < std::min(token + KEYS_AHEAD + TILE, keys.known); i++)
        for (int d = 0; d < head_dim; d += 32) _mm_prefetch((const char*)(keys.at[i] + d), _MM_HINT_T1);
}

// Scores of `count` positions to weights 2^(factor (score - maximum)), zeros up to `padded`; out[0] becomes the maximum
// times factor, out[1] the sum of weights. Weights may be where the scores are, if they are of one type.
inline void softmax(const float* scores, int count, int padded, float factor, float* out, Operand* weights) {
    const Floats scale = every(factor);
    Floats most = every(-INFINITY), total = every(0.f);
    for (int i = 0; i < count; i += 16) most = larger(most, load_first(scores + i, count - i, -INFINITY));
    out[0] = factor * largest(most);
    const Floats maximum = every(out[0]);
    int i = 0;
    for (; i < count; i += 16) {
        Floats weight = keep_first(power_of_two(fms(load(scores + i), scale, maximum)), count - i);
        store(weights + i, weight);
        total = total + weight;
    }
    for (; i < padded; i += 16) store(weights + i, every(0.f));
    out[1] = sum(total);
}

// Adds a part to what is known of a query so far, both as in Query::out.
inline void merge(float* sums, const float* part, int head_dim) {
    float most = std::max(sums[0], part[0]);
    Floats keep = power_of_two(every(sums[0] - most)), take = power_of_two(every(part[0] - most));
    sums[0] = most;
    sums[1] = first(keep) * sums[1] + first(take) * part[1];
    for (int i = 2; i < head_dim + 2; i += 16) store(sums + i, fma(take, load(part + i), keep * load(sums + i)));
}

}  // namespace

#ifdef __AVX512BF16__
#include "attend_avx512.hpp"
#else
#include "attend_avx2.hpp"
#endif
