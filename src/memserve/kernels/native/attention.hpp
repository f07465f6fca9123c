// Attention of a few queries to one part of a sequence: PART positions, or fewer at its end.
//
// All queries of a kv head run the same code, whether they belong to a decode row or to a chunk. Each value is one
// sum in one order (along head_dim, along the tokens), whatever queries are computed with it; padding adds zeros.
// Parts are merged in order. The products are in attend_avx512.hpp, attend_amx.hpp and attend_avx2.hpp, each written
// for its instruction set.

#pragma once

#include <algorithm>
#include <vector>

#include "amx.hpp"

namespace {

constexpr int PART = 128;  // positions of a part: what is computed of them stays in the first-level cache

// A result of attention: head_dim weighted sums of V, followed by a vector that holds these two values.
constexpr int TOTAL = 0, MOST = 1;  // the sum of weights, and the maximum that they are relative to
inline int result_size(int head_dim) { return head_dim + TILE; }

// The K of a part's tokens; each token's V is `to_value` values behind its K. Tokens may lie anywhere; if `tiles` is
// set, TILE tokens from every multiple of TILE on are contiguous. `first`: the queries have no results of earlier
// parts. `last`: the part is the task's last.
struct Keys {
    const bf16* const* at;
    int count;
    long to_value;
    bool tiles, first, last;
};

// One query's share of a task: it attends to positions [from, count) of a part. Its result is at `out` after the last
// part, and may be elsewhere before. With a sliding window, a part may lie before all that a query attends to.
struct Query {
    const Operand* q;
    int from, count;
    float* out;
};

// The maximum of a query that attends to nothing of a part, whose sums are zeros. It is below that of every other part,
// so that merging leaves the bits of that part's result.
constexpr float UNSEEN = -1e30f;

// Cache lines to prefetch, in runs of equal length. Memory serves many such requests at a time, and the address of
// each of the system's pages is translated once.
struct Upcoming {
    std::vector<const char*> runs;
    int length = 0;  // lines of a run
    int next = 0;    // next line to fetch, counted over all runs

    // Prefetches the share-th of `shares` equal shares, and the rest of those before it.
    void fetch(int share, int shares) {
        int end = (int)runs.size() * length * (share + 1) / shares;
        for (int run = next / std::max(length, 1), line = next - run * length; next < end; next++) {
            prefetch(runs[run] + line * 64);
            if (++line == length) run++, line = 0;
        }
    }
};

// A vector of weights of positions from i on, with zeros before position `from`.
inline Floats from_on(Floats weight, int i, int from) { return i < from ? weight - keep_first(weight, from - i) : weight; }

// Turns the scores of positions [from, count) into weights 2^(factor (score - maximum)), with zeros before and up to
// `padded`. Writes TOTAL and MOST, the maximum times factor, to `beside`. Overwrites the scores before `from`; weights
// may overwrite the others if both have one type.
inline void softmax(float* scores, int from, int count, int padded, float factor, float* beside, Operand* weights) {
    if (from >= count) {
        for (int i = 0; i < padded; i += 16) store(weights + i, every(0.f));
        store(beside, every(0.f));
        beside[MOST] = UNSEEN;
        return;
    }
    std::fill(scores, scores + from, -INFINITY);
    const Floats scale = every(factor);
    Floats most = every(-INFINITY), total = every(0.f);
    for (int i = 0; i < count; i += 16) most = larger(most, load_first(scores + i, count - i, -INFINITY));
    const Floats maximum = every(factor * largest(most));
    int i = 0;
    for (; i < count; i += 16) {
        Floats weight = keep_first(weight_of(fms(load(scores + i), scale, maximum)), count - i);
        weight = from_on(weight, i, from);
        store(weights + i, weight);
        total = total + weight;
    }
    for (; i < padded; i += 16) store(weights + i, every(0.f));
    store(beside, every(sum(total)));
    beside[MOST] = first(maximum);
}

// Adds a part's result to a query's result so far; `first`: there is none yet.
inline void merge(float* sums, const float* part, int head_dim, bool first) {
    if (first) {
        std::memcpy(sums, part, result_size(head_dim) * sizeof(float));
        return;
    }
    float most = std::max(sums[head_dim + MOST], part[head_dim + MOST]);
    Floats keep = power_of_two(every(sums[head_dim + MOST] - most));
    Floats take = power_of_two(every(part[head_dim + MOST] - most));
    for (int i = 0; i < result_size(head_dim); i += 16) store(sums + i, fma(take, load(part + i), keep * load(sums + i)));
    sums[head_dim + MOST] = most;
}

}  // namespace

// Both files have
//   Attention  one thread's memory for attention, for tasks of at most most_queries queries
//   attend     attends to one part. A task's queries are the same for all its parts, in the order of their positions.
//              Those whose positions are all before the part have a count of 0, and an `out` only if they had an
//              earlier part. ahead(i, n) prefetches the i-th of n shares of what is needed after the part.

#ifdef __AVX512BF16__
#include "attend_amx.hpp"
#include "attend_avx512.hpp"
#else
#include "attend_avx2.hpp"
#endif
