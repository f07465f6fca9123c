// Vectors on AVX-512 with its bfloat16 instructions, one of which multiplies and sums a vector of pairs.

#pragma once

namespace {

using Operand = bf16;
constexpr int PASSES = 1;
constexpr int SUMS = 24, SUMS_OF_TWO = 24;  // accumulators of a linear, and with two strips; of 32 registers

struct Floats {
    __m512 v;
};

inline Floats every(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, Floats a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
inline Floats fms(Floats a, Floats b, Floats c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }  // a b - c
inline Floats root(Floats a) { return {_mm512_sqrt_ps(a.v)}; }
inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats rounded(Floats a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a 2^n for whole n.
inline Floats scaled(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// 2^x for x <= 0, relative error below 1.1e-4, little compared with that of rounding to bfloat16: 2^n times a cubic
// that is 1 at 0 and 2 at 1.
inline Floats weight_of(Floats x) {
    Floats f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
    Floats y = fma(f, fma(f, fma(f, every(0.07826796f), every(0.22630769f)), every(0.69542435f)), every(1.f));
    return {_mm512_scalef_ps(y.v, x.v)};
}
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline float first(Floats a) { return _mm512_cvtss_f32(a.v); }

// A mask of the first `n` lanes; all of them if n >= 16.
inline __mmask16 first_lanes(int n) { return n >= 16 ? 0xFFFF : (__mmask16)((1 << n) - 1); }

// load_first: the first `n` of 16 values, and `rest` in place of the others, which are not read. keep_first: the
// first `n` lanes of a vector, and zeros.
inline Floats load_first(const float* p, int n, float rest) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(rest), first_lanes(n), p)};
}
inline Floats keep_first(Floats a, int n) { return {_mm512_maskz_mov_ps(first_lanes(n), a.v)}; }

// strange: a bit for every lane that is NaN. equal: a bit for every lane that is equal.
inline unsigned strange(Floats a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
inline unsigned equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }

// ---- products of pairs ---------------------------------------------------------------------------------------

using Pairs = __m512bh;

inline Pairs load_pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

// Converts 32 int8 values to bfloat16, which represents each exactly.
inline Pairs widen(const int8_t* from) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + 16))));
    return _mm512_cvtne2ps_pbh(high, low);
}
inline void widen(bf16* to, const int8_t* from) { _mm512_storeu_si512(to, (__m512i)widen(from)); }

template <int PASS>
inline Pairs pairs(const bf16* p) {
    return load_pairs(p);
}
template <int PASS>
inline Pairs pairs(const int8_t* p) {
    return widen(p);
}
template <int PASS>
inline Pairs every_pair(const Operand* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}
inline Floats add_products(Floats sum, Pairs a, Pairs b) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }

// Transposes 16 rows of 16 32-bit values.
inline void transpose(__m512i* a) {
    __m512i b[16];
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
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
}

// Transposes the 16 pairs from value d on of 16 bfloat16 rows, to rows that are `stride` apart. Null rows are zeros.
inline void transpose(const bf16* const* rows, int d, int32_t* to, long stride) {
    __m512i a[16];
    for (int i = 0; i < 16; i++) a[i] = rows[i] ? _mm512_loadu_si512(rows[i] + d) : _mm512_setzero_si512();
    transpose(a);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * stride, a[i]);
}

// ---- float64 -------------------------------------------------------------------------------------------------

struct Doubles {
    __m512d v;
};

inline Doubles every(double x) { return {_mm512_set1_pd(x)}; }
inline void store(double* p, Doubles a) { _mm512_storeu_pd(p, a.v); }
inline Doubles operator*(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Doubles operator/(Doubles a, Doubles b) { return {_mm512_div_pd(a.v, b.v)}; }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }       // a b + c
inline Doubles minus_product(Doubles c, Doubles a, Doubles b) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }  // c - a b
inline Doubles larger(Doubles a, Doubles b) { return {_mm512_max_pd(a.v, b.v)}; }
inline Doubles smaller(Doubles a, Doubles b) { return {_mm512_min_pd(a.v, b.v)}; }
inline Doubles rounded(Doubles a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
// a 2^n for a from 0.5 to 2 and whole n, rounded once.
inline Doubles scaled(Doubles a, Doubles n) { return {_mm512_scalef_pd(a.v, n.v)}; }
inline double smallest(Doubles a) { return _mm512_reduce_min_pd(a.v); }

// Subtracts `from`, in float32, from the first `n` of 8 values, and from `rest` in place of the others.
inline Doubles distances(const float* p, int n, float rest, float from) {
    __m256 v = _mm256_mask_loadu_ps(_mm256_set1_ps(rest), (__mmask8)first_lanes(n), p);
    return {_mm512_cvtps_pd(_mm256_sub_ps(v, _mm256_set1_ps(from)))};
}

// A bit for each of 8 values whose bits, as an integer, are from `first` to `last`.
inline unsigned between(const double* p, uint64_t first, uint64_t last) {
    __m512i keys = _mm512_loadu_si512(p);
    return _mm512_cmpge_epu64_mask(keys, _mm512_set1_epi64(first)) &
           _mm512_cmple_epu64_mask(keys, _mm512_set1_epi64(last));
}

// Writes `start` plus the position of each set bit of 8; `to` has room for 8.
inline void write_places(int32_t* to, int start, unsigned set) {
    __m256i ids = _mm256_add_epi32(_mm256_set1_epi32(start), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    _mm256_storeu_si256((__m256i*)to, _mm256_maskz_compress_epi32((__mmask8)set, ids));
}

}  // namespace
