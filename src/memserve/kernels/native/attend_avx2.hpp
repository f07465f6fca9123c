// Attention's products on AVX2: K and V are read in place.
//
// A score is a sum of 8 lanes along head_dim, added up in one order; an output is summed along the tokens. Both read
// 16 bfloat16 values at a time, first the 8 even ones, then the 8 odd ones.

#pragma once

namespace {

constexpr int QUERIES = 3;    // queries worked on together: with four tokens, or 32 values, 12 accumulators
constexpr int SCORED = 4;     // tokens scored together
constexpr int TOGETHER = 12;  // queries that take turns while K and V are in the first-level cache
constexpr int DEPTH = 32;     // values of V worked on together
constexpr int STEP = 8;       // tokens between two prefetches of what comes next: many at once would stall

// One thread's memory for attention.
struct Attention {
    bool amx = false;       // never on AVX2
    Buffer<float> queries;  // (TOGETHER, head_dim): of every 16 values the even ones first
    Buffer<float> weights;  // (TOGETHER, PART): scores, then weights
    Buffer<float> outs;     // (TOGETHER, result_size)

    void resize(int head_dim, int) {
        queries.resize((size_t)TOGETHER * head_dim);
        weights.resize(TOGETHER * PART);
        outs.resize((size_t)TOGETHER * result_size(head_dim));
    }
};

// Reorders 16 values, the even ones first, and back.
inline Floats parted(const float* p) {
    __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
    __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    return {_mm256_shuffle_ps(low, high, 0x88), _mm256_shuffle_ps(low, high, 0xDD)};
}
inline Floats joined(Floats parts) {
    __m256 a = _mm256_unpacklo_ps(parts.low, parts.high), b = _mm256_unpackhi_ps(parts.low, parts.high);
    return {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)};
}

// The sums of the lanes of each of four vectors.
inline __m128 sums_of(const __m256* a) {
    __m256 b[2];
    for (int i = 0; i < 2; i++)
        b[i] = _mm256_add_ps(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    __m256 c = _mm256_add_ps(_mm256_shuffle_ps(b[0], b[1], 0x44), _mm256_shuffle_ps(b[0], b[1], 0xEE));
    return _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
}

// Scores N queries against the tokens [start, end), in steps of SCORED: fewer than SCORED scores more may be written.
// Not inlined: it takes all registers.
template <int N>
[[gnu::noinline]] void score(const float* queries, const Keys& keys, int start, int end, int head_dim, float* scores) {
    for (int t = start; t < end; t += SCORED) {
        const bf16* at[SCORED];
        for (int i = 0; i < SCORED; i++) at[i] = keys.at[std::min(t + i, keys.count - 1)];
        __m256 sums[N][SCORED];
        for (auto& row : sums)
            for (auto& sum : row) sum = _mm256_setzero_ps();
        for (int d = 0; d < head_dim; d += 16)
            each<PASSES>([&](auto pass) {
                __m256 values[N];
                for (int n = 0; n < N; n++) values[n] = _mm256_load_ps(queries + n * head_dim + d + 8 * pass.value);
                for (int i = 0; i < SCORED; i++) {
                    __m256 key = half<pass.value>(at[i] + d);
                    for (int n = 0; n < N; n++) sums[n][i] = _mm256_fmadd_ps(key, values[n], sums[n][i]);
                }
            });
        for (int n = 0; n < N; n++) _mm_storeu_ps(scores + n * PART + t, sums_of(sums[n]));
    }
}

// Sums V over `count` tokens for N queries. Calls step(i) before every STEP tokens.
template <int N, class Step>
inline void weigh(const float* weights, const Keys& keys, int count, int head_dim, float* outs, Step step) {
    const int steps = (count + STEP - 1) / STEP;
    constexpr int GROUPS = DEPTH / 16;
    for (int d = 0; d < head_dim; d += DEPTH) {
        Floats sums[N][GROUPS];
        for (auto& row : sums)
            for (auto& sum : row) sum = every(0.f);
        for (int t = 0; t < count; t++) {
            if (t % STEP == 0) step(d / DEPTH * steps + t / STEP);
            const bf16* from = keys.at[t] + keys.to_value + d;
            __m256 weight[N];
            for (int n = 0; n < N; n++) weight[n] = _mm256_broadcast_ss(weights + n * PART + t);
            for (int j = 0; j < GROUPS; j++) {
                __m256 even = half<0>(from + 16 * j), odd = half<1>(from + 16 * j);
                for (int n = 0; n < N; n++) sums[n][j].low = _mm256_fmadd_ps(weight[n], even, sums[n][j].low);
                for (int n = 0; n < N; n++) sums[n][j].high = _mm256_fmadd_ps(weight[n], odd, sums[n][j].high);
            }
        }
        for (int n = 0; n < N; n++)
            for (int j = 0; j < GROUPS; j++) store(outs + n * result_size(head_dim) + d + 16 * j, joined(sums[n][j]));
    }
}

// Calls run(first, std::integral_constant of queries) for `number` queries, in as few equal parts as possible.
template <class F>
inline void parts_of_queries(int number, F run) {
    int count = (number + QUERIES - 1) / QUERIES;
    for (int i = 0, n = 0, here; i < count; i++, n += here) {
        here = (number - n + count - i - 1) / (count - i);
        as_constant<QUERIES>(here, [&](auto N) { run(n, N); });
    }
}

template <class Ahead>
inline void attend(const Query* queries, int number, const Keys& keys, int head_dim, Attention& mine, Ahead ahead) {
    for (; !queries->count; number--) queries++;
    float factor = 1.44269504f / std::sqrt((float)head_dim);
    float *weights = mine.weights.data(), *parts = mine.queries.data(), *outs = mine.outs.data();
    int size = result_size(head_dim);
    for (int done = 0; done < number; done += TOGETHER, queries += TOGETHER) {
        int most = 0, here = std::min(TOGETHER, number - done);
        for (int n = 0; n < here; n++) {
            most = std::max(most, queries[n].count);
            for (int d = 0; d < head_dim; d += 16) store(parts + n * head_dim + d, parted(queries[n].q + d));
        }
        const int steps = (most + STEP - 1) / STEP, all = steps * (1 + head_dim / DEPTH);
        for (int t = 0; t < most; t += STEP) {
            if (!done) ahead(t / STEP, all);
            parts_of_queries(here, [&](int n, auto N) {
                score<N.value>(parts + n * head_dim, keys, t, std::min(most, t + STEP), head_dim, weights + n * PART);
            });
        }
        for (int n = 0; n < here; n++)
            softmax(weights + n * PART, queries[n].from, queries[n].count, most, factor, outs + n * size + head_dim,
                    weights + n * PART);
        parts_of_queries(here, [&](int n, auto N) {
            weigh<N.value>(weights + n * PART, keys, most, head_dim, outs + n * size, [&](int i) {
                if (!done && !n) ahead(steps + i, all);
            });
        });
        for (int n = 0; n < here; n++) merge(queries[n].out, outs + n * size, head_dim, keys.first);
    }
}

}  // namespace
