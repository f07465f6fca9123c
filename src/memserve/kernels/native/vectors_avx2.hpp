// Vectors on AVX2 with FMA: two registers each. There are no bfloat16 products, so operands stay in float32, and a
// pair of weights is widened on use: first the values in the lower halves of 32 bits, then those in the upper ones.

#pragma once

namespace {

using Operand = float;
constexpr int PASSES = 2;
// Vectors that a linear sums into at a time: 12 of 16 registers, or 8 with two strips, whose weights take more.
constexpr int SUMS = 6, SUMS_OF_TWO = 4;

struct Floats {
    __m256 low, high;
};

inline Floats every(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats a) { _mm256_storeu_ps(p, a.low), _mm256_storeu_ps(p + 8, a.high); }
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fma(Floats a, Floats b, Floats c) {  // a b + c
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fms(Floats a, Floats b, Floats c) {  // a b - c
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats root(Floats a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

inline __m256 rounded(__m256 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats rounded(Floats a) { return {rounded(a.low), rounded(a.high)}; }

// a 2^n for whole n from -126 to 127.
inline __m256 scaled(__m256 a, __m256 n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Floats scaled(Floats a, Floats n) { return {scaled(a.low, n.low), scaled(a.high, n.high)}; }

inline float sum(Floats a) {
    __m256 eight = _mm256_add_ps(a.low, a.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Floats a) {
    __m256 eight = _mm256_max_ps(a.low, a.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float first(Floats a) { return _mm256_cvtss_f32(a.low); }

// A mask of the first `n` of 8 lanes.
inline __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256 load_first_8(const float* p, int n, float rest) {
    __m256i lanes = first_lanes(n);
    return _mm256_blendv_ps(_mm256_set1_ps(rest), _mm256_maskload_ps(p, lanes), _mm256_castsi256_ps(lanes));
}

// load_first: the first `n` of 16 values, and `rest` in place of the others, which are not read. keep_first: the
// first `n` lanes of a vector, and zeros.
inline Floats load_first(const float* p, int n, float rest) {
    return {load_first_8(p, n, rest), load_first_8(p + 8, n - 8, rest)};
}
inline Floats keep_first(Floats a, int n) {
    return {_mm256_and_ps(a.low, _mm256_castsi256_ps(first_lanes(n))),
            _mm256_and_ps(a.high, _mm256_castsi256_ps(first_lanes(n - 8)))};
}

// strange: a bit for every lane that is NaN. equal: a bit for every lane that is equal.
inline unsigned lanes(__m256 low, __m256 high) { return _mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8; }
inline unsigned strange(Floats a) {
    return lanes(_mm256_cmp_ps(a.low, a.low, _CMP_UNORD_Q), _mm256_cmp_ps(a.high, a.high, _CMP_UNORD_Q));
}
inline unsigned equal(Floats a, Floats b) {
    return lanes(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ));
}

// Stores the upper halves of 16 values of 32 bits.
inline void store_upper(bf16* p, __m256i low, __m256i high) {
    __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xD8));
}
// Values whose upper halves are `a` rounded to nearest even. NaN stays NaN.
inline __m256i nearest(__m256 a) {
    __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(1 << 22));
    __m256 no_number = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(no_number));
}
inline void store(bf16* p, Floats a) { store_upper(p, nearest(a.low), nearest(a.high)); }

// ---- products of pairs ---------------------------------------------------------------------------------------

using Pairs = Floats;

// One value of each of 8 pairs as float32: that in the lower half, or in pass 1 that in the upper half.
template <int PASS>
inline __m256 half(__m256i pairs) {
    return _mm256_castsi256_ps(PASS ? _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xFFFF0000))
                                    : _mm256_slli_epi32(pairs, 16));
}
template <int PASS>
inline __m256 half(const bf16* p) {
    return half<PASS>(_mm256_loadu_si256((const __m256i*)p));
}
template <int PASS>
inline __m256 half(const int8_t* p) {
    __m256i both = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p));  // the sign is the second value's
    __m256i one = PASS ? _mm256_srai_epi32(both, 8) : _mm256_srai_epi32(_mm256_slli_epi32(both, 24), 24);
    return _mm256_cvtepi32_ps(one);
}

template <int PASS, class Weight>
inline Pairs pairs(const Weight* p) {
    return {half<PASS>(p), half<PASS>(p + 16)};
}
template <int PASS>
inline Pairs every_pair(const Operand* p) {
    return every(p[PASS]);
}
inline Floats add_products(Floats sum, Pairs a, Pairs b) { return fma(a, b, sum); }

// Converts 32 int8 values to bfloat16, which represents each exactly.
inline void widen(bf16* to, const int8_t* from) {
    auto eight = [&](int i) {
        __m256i values = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + i)));
        return _mm256_castps_si256(_mm256_cvtepi32_ps(values));
    };
    for (int i = 0; i < 32; i += 16) store_upper(to + i, eight(i), eight(i + 8));
}

// ---- float64 -------------------------------------------------------------------------------------------------

struct Doubles {
    __m256d low, high;
};

inline Doubles every(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
inline void store(double* p, Doubles a) { _mm256_storeu_pd(p, a.low), _mm256_storeu_pd(p + 4, a.high); }
inline Doubles operator*(Doubles a, Doubles b) { return {_mm256_mul_pd(a.low, b.low), _mm256_mul_pd(a.high, b.high)}; }
inline Doubles operator/(Doubles a, Doubles b) { return {_mm256_div_pd(a.low, b.low), _mm256_div_pd(a.high, b.high)}; }
inline Doubles fma(Doubles a, Doubles b, Doubles c) {  // a b + c
    return {_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
}
inline Doubles minus_product(Doubles c, Doubles a, Doubles b) {  // c - a b
    return {_mm256_fnmadd_pd(a.low, b.low, c.low), _mm256_fnmadd_pd(a.high, b.high, c.high)};
}
inline Doubles larger(Doubles a, Doubles b) { return {_mm256_max_pd(a.low, b.low), _mm256_max_pd(a.high, b.high)}; }
inline Doubles smaller(Doubles a, Doubles b) { return {_mm256_min_pd(a.low, b.low), _mm256_min_pd(a.high, b.high)}; }

inline __m256d rounded(__m256d a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Doubles rounded(Doubles a) { return {rounded(a.low), rounded(a.high)}; }

// 2^n for whole n from -1022 to 1023.
inline __m256d power(__m128i n) {
    __m256i exponent = _mm256_add_epi64(_mm256_cvtepi32_epi64(n), _mm256_set1_epi64x(1023));
    return _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52));
}
// a 2^n for a from 0.5 to 2 and whole n down to -2000, in two products, of which only the second can round.
inline __m256d scaled(__m256d a, __m256d n) {
    __m128i whole = _mm256_cvtpd_epi32(n), some = _mm_srai_epi32(whole, 1);
    return _mm256_mul_pd(_mm256_mul_pd(a, power(some)), power(_mm_sub_epi32(whole, some)));
}
inline Doubles scaled(Doubles a, Doubles n) { return {scaled(a.low, n.low), scaled(a.high, n.high)}; }

inline double smallest(Doubles a) {
    __m256d four = _mm256_min_pd(a.low, a.high);
    __m128d two = _mm_min_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_min_sd(two, _mm_unpackhi_pd(two, two)));
}

// Subtracts `from`, in float32, from the first `n` of 8 values, and from `rest` in place of the others.
inline Doubles distances(const float* p, int n, float rest, float from) {
    __m256 below = _mm256_sub_ps(load_first_8(p, n, rest), _mm256_set1_ps(from));
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(below)), _mm256_cvtps_pd(_mm256_extractf128_ps(below, 1))};
}

// A bit for each of 8 values whose bits, as an integer, are from `first` to `last`. All three are below 2^63.
inline unsigned between(const double* p, uint64_t first, uint64_t last) {
    auto outside = [&](const double* p) {
        __m256i keys = _mm256_loadu_si256((const __m256i*)p);
        __m256i below = _mm256_cmpgt_epi64(_mm256_set1_epi64x((long long)first), keys);
        __m256i above = _mm256_cmpgt_epi64(keys, _mm256_set1_epi64x((long long)last));
        return (unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_or_si256(below, above)));
    };
    return ~(outside(p) | outside(p + 4) << 4) & 0xFF;
}

// Writes `start` plus the position of each set bit of 8; `to` has room for 8.
inline void write_places(int32_t* to, int start, unsigned set) {
    for (; set; set &= set - 1) *to++ = start + __builtin_ctz(set);
}

}  // namespace
