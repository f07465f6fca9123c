// Attention of a few queries to one part of a sequence: PART positions, or fewer at its end.
//
// All queries of a kv head go through the same code, be they one decode row's or a chunk's. Each value is one sum in one
// order (along head_dim, along the tokens), whichever queries are beside it; what is padded adds zeros. Parts are merged
// in order. The products are in attend_avx512.hpp, attend_amx.hpp and attend_avx2.hpp, as each set of instructions is
// best fed.

#pragma once

#include <algorithm>
#include <vector>

#include "amx.hpp"

namespace {

constexpr int PART = 128;  // positions of one attention task: what is known of them stays in the first level

// A result of attention: head_dim weighted sums of V, then these, in a vector of its own.
constexpr int TOTAL = 0, MOST = 1;  // the sum of weights, and the maximum that they are relative to
inline int result_size(int head_dim) { return head_dim + TILE; }

// The K of a part's tokens, each `to_value` values before its V. Tokens may lie anywhere; where `tiles` is set, TILE tokens
// from every multiple of TILE on are one after another. `first`, `last`: of the parts that the task attends to.
struct Keys {
    const bf16* const* at;
    int count;
    long to_value;
    bool tiles, first, last;
};

// One query's share of a task: `count` positions of a part. Its result is at `out` after the last part, and may be elsewhere
// before.
struct Query {
    const Operand* q;
    int count;
    float* out;
};

// Lines of memory that are to be fetched, in runs of one length: memory answers many such requests at a time, and translates
// the address of each page of the system's once.
struct Upcoming {
    std::vector<const char*> runs;
    int length = 0;  // of a run
    int next = 0;    // line, of all

    // Asks for the share-th of `shares` equal shares, and for what is left of those before it.
    void fetch(int share, int shares) {
        int end = (int)runs.size() * length * (share + 1) / shares;
        for (int run = next / std::max(length, 1), line = next - run * length; next < end; next++) {
            prefetch(runs[run] + line * 64);
            if (++line == length) run++, line = 0;
        }
    }
};

// Scores of `count` positions to weights 2^(factor (score - maximum)), zeros up to `padded`; `beside`: TOTAL and MOST, the
// maximum times factor. Weights may be where the scores are, if they are of one type.
inline void softmax(const float* scores, int count, int padded, float factor, float* beside, Operand* weights) {
    const Floats scale = every(factor);
    Floats most = every(-INFINITY), total = every(0.f);
    for (int i = 0; i < count; i += 16) most = larger(most, load_first(scores + i, count - i, -INFINITY));
    const Floats maximum = every(factor * largest(most));
    int i = 0;
    for (; i < count; i += 16) {
        Floats weight = keep_first(weight_of(fms(load(scores + i), scale, maximum)), count - i);
        store(weights + i, weight);
        total = total + weight;
    }
    for (; i < padded; i += 16) store(weights + i, every(0.f));
    store(beside, every(sum(total)));
    beside[MOST] = first(maximum);
}

// Adds a part's result to what is known of a query so far; `first`: nothing is.
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
//   Attention  one thread's memory for attention, of tasks of most_queries at most
//   attend     does a part. A task's queries are the same for all of its parts, in the order of their positions; those
//              whose positions are all before the part have a count of 0, and `out` only where they had an earlier part.
//              ahead(i, n) fetches what is needed after the part, the i-th of n shares of it.

#ifdef __AVX512BF16__
#include "attend_amx.hpp"
#include "attend_avx512.hpp"
#else
#include "attend_avx2.hpp"
#endif
