// Draws a row's next token from its logits, by the same rules as memserve/engine/sampling.py.
//
// A draw inverts the cumulative distribution over tokens, ordered by falling weight, then rising id, at one uniform
// number that is a function of (seed, position) alone; all in float64. Only a few tokens are ever sorted. A histogram
// over the leading bits of the weights, which order as the weights do, shows in which bucket the answer lies. Only
// the members of that bucket are examined again, with finer buckets while they are many. So a flat distribution costs
// little more than a peaked one. The order is that of the weights: logits that differ may have equal weights.
//
// One thread makes a draw, from its first logit to its token, and sums in one order: neither the threads nor other
// rows can change it.

#pragma once

#include <algorithm>
#include <numeric>

#include "vectors.hpp"

constexpr int MS_LOGPROBS_MAX = 20;
constexpr int NOT_A_TOKEN = -1;  // the result if the largest logit is not finite

// memserve/kernels/native/__init__.py and prompt_logprobs.py mirror these structs.
extern "C" {

struct ms_ids {
    const int32_t* ids;
    int64_t count;
};

// Adjustments of a row's logits before its draw: memserve/engine/adjusting.py has the order and the arithmetic.
struct ms_adjustments {
    ms_ids biased;      // each id once
    const float* bias;  // one per id
    ms_ids prompt;      // if `repetition` counts it
    ms_ids output;      // the answer so far
    ms_ids forbidden;   // never drawn
    ms_ids allowed;     // a bit for each token, set if it can be drawn, 32 to a number; empty: all can
    float repetition, frequency, presence;
};

// Log probabilities by the logits before any adjustment: of the drawn token, or of a given one.
struct ms_logprobs {
    int32_t count;  // how many of the most probable tokens to report, at most MS_LOGPROBS_MAX
    int32_t ids[MS_LOGPROBS_MAX];
    double values[MS_LOGPROBS_MAX];
    double drawn;
    int32_t token;  // the given token, or NOT_A_TOKEN: one is drawn
    int32_t rank;   // of the given token, from 1 on: by falling probability, then rising id
};

// How a row's token is drawn.
struct ms_sampling {
    double temperature;  // 0 is greedy
    double top_p;        // 1 or more is no limit
    uint64_t seed;
    int64_t top_k;                 // 0 is no limit
    double reach;                  // logits further below the largest are not drawn; -infinity is no limit
    const ms_adjustments* adjust;  // or null
    ms_logprobs* reported;         // log probabilities to report; or null
};

}  // extern "C"

namespace {

constexpr int BUCKETS = 2048;      // buckets of a histogram
constexpr int FEW_TOKENS = 64;     // tokens that are sorted instead of divided into finer buckets
constexpr double LEAST = 0x1p-63;  // smaller weights share a bucket: even together they are hardly ever drawn

inline uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
    return value ^ (value >> 31);
}

// A number in [0, 1); `uniform` in sampling.py says why the seed is mixed first.
inline double uniform(uint64_t seed, int64_t position) {
    return (mix(mix(seed) + (uint64_t)(position + 1) * 0x9E3779B97F4A7C15) >> 11) * 0x1p-53;
}

// Index of the first of the largest logits, or NOT_A_TOKEN if that is not finite or any logit is NaN.
inline int largest(const float* logits, int vocab) {
    const Floats least = every(-INFINITY);
    Floats most[4] = {least, least, least, least};
    unsigned no_number = 0;
    for (int i = 0; i < vocab; i += 64)
        for (int j = 0; j < 4; j++) {
            int at = i + 16 * j;
            Floats v = load_first(logits + at, std::max(0, vocab - at), -INFINITY);
            no_number |= strange(v);
            most[j] = larger(most[j], v);
        }
    float top = largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
    if (no_number || !std::isfinite(top)) return NOT_A_TOKEN;
    for (int i = 0;; i += 16) {
        Floats v = load_first(logits + i, vocab - i, -INFINITY);
        if (unsigned here = equal(v, every(top))) return i + __builtin_ctz(here);
    }
}

// e^x for x <= 0, within one unit in the last place: 2^n times the Taylor series of e^r for r in [-ln 2 / 2, ln 2 / 2].
inline Doubles exponential(Doubles x) {
    x = larger(x, every(-1100.));  // the result is 0 from -746 down; infinities would make r NaN
    Doubles n = rounded(x * every(0x1.71547652b82fep0));
    Doubles r = minus_product(x, n, every(0x1.62e42fefa39efp-1));
    r = minus_product(r, n, every(0x1.abc9e3b39803fp-56));
    Doubles y = every(1. / 6227020800);  // 1 / 13!
    for (double factorial : {479001600., 39916800., 3628800., 362880., 40320., 5040., 720., 120., 24., 6., 2., 1., 1.})
        y = fma(y, r, every(1 / factorial));
    return scaled(y, n);
}

inline uint64_t bits(double value) {
    uint64_t number;
    std::memcpy(&number, &value, sizeof number);
    return number;
}

// Counts and sums of weights by their distance above `low`, both read as integers, in buckets of 2^shift. Higher
// buckets hold larger weights; the lowest also takes everything below `low`.
struct Histogram {
    uint64_t low;
    int shift;
    int32_t counts[BUCKETS];
    double sums[BUCKETS];

    void clear(double least, double most) {
        low = bits(least), shift = 0;
        while ((bits(most) - low) >> shift >= BUCKETS) shift++;
        std::fill_n(counts, BUCKETS, 0);
        std::fill_n(sums, BUCKETS, 0.);
    }
    int bucket(double weight) const { return bits(weight) > low ? (int)((bits(weight) - low) >> shift) : 0; }
    void add(double weight) {
        int at = bucket(weight);
        counts[at]++, sums[at] += weight;
    }
    // Smallest and largest weight of a bucket, as integers.
    uint64_t first(int bucket) const { return bucket ? low + ((uint64_t)bucket << shift) : 0; }
    uint64_t last(int bucket) const { return low + ((uint64_t)(bucket + 1) << shift) - 1; }
};

// A place in the order of tokens: the number of tokens up to and including `id`, and the sum of their weights.
struct Place {
    int id, count;
    double sum;
};

// One thread's memory for draws.
struct Sampler {
    Buffer<double> weights;   // (vocab rounded up to 8s,) e^((logit - largest) / temperature), then zeros
    Buffer<int32_t> members;  // (vocab + 8,) ids, rising, of the bucket being examined
    Buffer<float> adjusted;   // (vocab,)
    Buffer<int32_t> counts;   // (vocab,) occurrences of each token; zeros between draws
    Histogram whole, part;
    int vocab = 0;

    void resize(int size) {
        vocab = size;
        adjusted.resize(size);
        counts.resize(size);
        weights.resize((size_t)(size + 7) / 8 * 8);
        members.resize((size_t)size + 8);
    }

    // Adjusts the logits that a row draws from. The result is valid until the next call.
    const float* adjust(const float* logits, const ms_adjustments& how) {
        float* to = adjusted.data();
        std::copy_n(logits, vocab, to);
        for (int64_t i = 0; i < how.biased.count; i++) to[how.biased.ids[i]] += how.bias[i];
        if (how.repetition != 1) {
            for (const ms_ids& part : {how.prompt, how.output})
                for_new(part, [&](int id) { to[id] = to[id] > 0 ? to[id] / how.repetition : to[id] * how.repetition; });
            for (const ms_ids& part : {how.prompt, how.output}) forget(part);
        }
        if (how.frequency != 0 || how.presence != 0) {
            for_new(how.output, [](int) {});
            for (int64_t i = 0; i < how.output.count; i++) {
                int id = how.output.ids[i];
                if (!counts[id]) continue;
                to[id] -= how.frequency * (float)counts[id];  // not fused: see native_build.py
                to[id] -= how.presence;
                counts[id] = 0;
            }
        }
        for (int64_t i = 0; i < how.forbidden.count; i++) to[how.forbidden.ids[i]] = -INFINITY;
        if (how.allowed.count)
            for (int id = 0; id < vocab; id++)
                if (!(how.allowed.ids[id / 32] >> id % 32 & 1)) to[id] = -INFINITY;
        return to;
    }

    // Counts tokens, and calls run(id) for each when it first occurs.
    template <class F>
    void for_new(const ms_ids& part, F run) {
        for (int64_t i = 0; i < part.count; i++)
            if (!counts[part.ids[i]]++) run(part.ids[i]);
    }

    void forget(const ms_ids& part) {
        for (int64_t i = 0; i < part.count; i++) counts[part.ids[i]] = 0;
    }

    // The number of logits within `reach` (not positive) of the largest, `most`.
    int within(const float* logits, float most, double reach) const {
        int count = 0;
        for (int i = 0; i < vocab; i++) count += (double)(logits[i] - most) >= reach;
        return count;
    }

    // Reports the log probabilities of `token` and of the most probable tokens. `most`: the largest logit.
    void report(const float* logits, float most, int token, ms_logprobs& to) const {
        Doubles sums = every(0.);
        for (int i = 0; i < vocab; i += 8)
            sums = fma(exponential(distances(logits + i, vocab - i, -INFINITY, most)), every(1.), sums);
        double each[8];
        store(each, sums);
        double scale = std::log(std::accumulate(each, each + 8, 0.));
        to.drawn = (double)(logits[token] - most) - scale;
        to.count = std::clamp((int)to.count, 0, std::min(vocab, MS_LOGPROBS_MAX));
        int found = 0;
        for (int i = 0; i < vocab && to.count; i++) {
            if (found == to.count && !(logits[i] > logits[to.ids[found - 1]])) continue;
            int at = found < to.count ? found++ : found - 1;
            for (; at > 0 && logits[i] > logits[to.ids[at - 1]]; at--) to.ids[at] = to.ids[at - 1];
            to.ids[at] = i;
        }
        for (int i = 0; i < found; i++) to.values[i] = (double)(logits[to.ids[i]] - most) - scale;
    }

    // The rank of `token`, from 1 on: by falling probability, then rising id.
    int rank(const float* logits, int token) const {
        int before = 0;
        for (int i = 0; i < token; i++) before += logits[i] >= logits[token];
        for (int i = token + 1; i < vocab; i++) before += logits[i] > logits[token];
        return before + 1;
    }

    // Makes the weights of all tokens and their histogram; returns the sum of weights. `most`: the largest logit.
    double weigh(const float* logits, float most, double temperature) {
        Doubles least = every(1.);
        for (int i = 0; i < vocab; i += 8) {
            Doubles below = distances(logits + i, vocab - i, -INFINITY, most);  // in float32, like sampling.py
            Doubles weight = exponential(below / every(temperature));
            store(&weights[i], weight);
            least = smaller(least, weight);
        }
        whole.clear(std::max(LEAST, smallest(least)), 1);
        for (int i = 0; i < vocab; i++) whole.add(weights[i]);
        double sum = 0;
        for (int bucket = BUCKETS; bucket--;) sum += whole.sums[bucket];
        return sum;
    }

    // The first place with a sum above `target` (not negative), or place number `limit` (at least 1) if that comes
    // first.
    Place find(int limit, double target) {
        Place at = {0, 0, 0};
        int count = select(pass(whole, limit, target, at));
        while (count > FEW_TOKENS) {
            double least = 1, most = 0;
            for (int i = 0; i < count; i++) {
                least = std::min(least, weights[members[i]]);
                most = std::max(most, weights[members[i]]);
            }
            if (least == most) break;
            part.clear(least, most);
            for (int i = 0; i < count; i++) part.add(weights[members[i]]);
            count = narrow_to(pass(part, limit, target, at), count);
        }
        if (count <= FEW_TOKENS)  // otherwise they are all equal, and in order
            std::sort(&members[0], &members[count], [&](int a, int b) {
                return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
            });
        for (int i = 0;; i++) {
            at = {members[i], at.count + 1, at.sum + weights[members[i]]};
            // A bucket's sum is rounded differently from adding its tokens one by one, which may just fail to exceed
            // the target.
            if (at.sum > target || at.count == limit || i == count - 1) return at;
        }
    }

    // The bucket in which `limit` or `target` is reached; adds everything before it to `at`. If rounding keeps the
    // sum below a target at the very end, this is the lowest bucket, which is never empty.
    static int pass(const Histogram& all, int limit, double target, Place& at) {
        int bucket = BUCKETS - 1;
        for (; bucket > 0; bucket--) {
            if (at.count + all.counts[bucket] >= limit || at.sum + all.sums[bucket] > target) break;
            at.count += all.counts[bucket], at.sum += all.sums[bucket];
        }
        return bucket;
    }

    // Makes the tokens of a bucket of `whole` the members; returns how many they are.
    int select(int bucket) {
        const uint64_t first = whole.first(bucket), last = whole.last(bucket);
        int count = 0;
        for (int i = 0; i < vocab; i += 8) {
            unsigned in = between(&weights[i], first, last) & ((1u << std::min(vocab - i, 8)) - 1);
            if (!in) continue;
            write_places(&members[count], i, in);
            count += __builtin_popcount(in);
        }
        return count;
    }

    // Keeps those of `count` members that are in a bucket of `part`; returns how many they are.
    int narrow_to(int bucket, int count) {
        auto end = std::remove_if(&members[0], &members[count],
                                  [&](int id) { return part.bucket(weights[id]) != bucket; });
        return (int)(end - &members[0]);
    }
};

// The token at `position` of a sequence; `best` is the token with the largest logit.
inline int choose(const float* logits, int best, const ms_sampling& how, int64_t position, Sampler& mine) {
    if (best == NOT_A_TOKEN || !(how.temperature > 0) || how.top_k == 1) return best;
    double mass = mine.weigh(logits, logits[best], how.temperature);
    int kept = how.top_k > 0 && how.top_k < mine.vocab ? (int)how.top_k : mine.vocab;
    if (how.reach > -INFINITY) kept = std::min(kept, mine.within(logits, logits[best], how.reach));
    if (kept < mine.vocab) mass = mine.find(kept, INFINITY).sum;
    if (how.top_p < 1) {
        // The token that reaches the share is kept: the first whose sum exceeds the next smaller number.
        Place last = mine.find(kept, std::max(0., std::nextafter(how.top_p * mass, 0.)));
        kept = last.count, mass = last.sum;
    }
    return mine.find(kept, uniform(how.seed, position) * mass).id;
}

// Draws the token at `position` of a sequence from its logits, or returns NOT_A_TOKEN. If the token is given, only
// reports its log probabilities and returns it.
inline int draw(const float* logits, const ms_sampling& how, int64_t position, Sampler& mine) {
    int best = largest(logits, mine.vocab);
    if (best == NOT_A_TOKEN) return best;
    if (how.reported && how.reported->token != NOT_A_TOKEN) {
        mine.report(logits, logits[best], how.reported->token, *how.reported);
        how.reported->rank = mine.rank(logits, how.reported->token);
        return how.reported->token;
    }
    const float* from = how.adjust ? mine.adjust(logits, *how.adjust) : logits;
    int token = choose(from, how.adjust ? largest(from, mine.vocab) : best, how, position, mine);
    if (how.reported && token != NOT_A_TOKEN) mine.report(logits, logits[best], token, *how.reported);
    return token;
}

}  // namespace
